"""Embeds texts of any characters and length, alone and in batches, and watches memory: unicode-texts."""

import ctypes
import gc
import itertools
import os
import random
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path

from tests.corpus import find_minilm
from tests.faults import processes, runs
from tests.faults.results import Results

BATCH_SIZES = (1, 8, 32)
TEXTS_PER_ROUND = 2500
LONGEST = 1_000_000  # characters
_SPACES = [chr(i) for i in range(0x3100) if chr(i).isspace()]
_MARKS = [chr(i) for i in itertools.chain(range(0x300, 0x370), range(0x483, 0x48A), range(0x20D0, 0x20F1))]
_CONTROLS = [chr(i) for i in range(0xFFFF) if unicodedata.category(chr(i)) in ("Cc", "Cf")] + ["\U000e0041", "\ufffe"]
_RIGHT_TO_LEFT = [chr(i) for i in (*range(0x5D0, 0x5EB), *range(0x600, 0x700), 0x200F, 0x202E, 0x2067, 0x2069)]
_EMOJI = [chr(i) for i in (*range(0x1F300, 0x1F650), *range(0x1F3FB, 0x1F400), *range(0x1F1E6, 0x1F200), 0x2764)]
_SPECIAL = ["[CLS]", "[SEP]", "[MASK]", "[PAD]", "[UNK]", "##ing", "search_query: ", "</s>", "\\ud800", "%s", "{}"]


class Texts:
    """Draws texts; the same seed gives the same texts."""

    def __init__(self, seed: int):
        self._rng = random.Random(seed)
        vocabulary = (find_minilm() / "vocab.txt").read_text(encoding="utf-8").split()
        self._words = [word for word in vocabulary if word.isalpha()]
        self.kinds: dict[str, Callable[[int], str]] = {
            "words": lambda n: self._repeat(n, " ".join(self._rng.choices(self._words, k=n // 6 + 1))),
            **{f"plane {plane}": lambda n, plane=plane: self._of_plane(n, plane) for plane in range(17)},  # type: ignore[misc]
            "all planes": lambda n: self._repeat(n, "".join(self._of_plane(1, i % 17) for i in range(_few(n)))),
            "controls": lambda n: self._among(n, _CONTROLS),
            "NUL": lambda n: self._among(n, ["\0", "\0", "a", " "]),
            "marks": lambda n: self._among(n, [*_MARKS, "e", "क"]),
            "one letter and marks": lambda n: "a" + self._among(n, _MARKS),
            "right to left": lambda n: self._among(n, [*_RIGHT_TO_LEFT, " ", "a", "1"]),
            "emoji": lambda n: self._repeat(n, "\u200d".join(self._rng.choices([*_EMOJI, "\ufe0f", " "], k=_few(n)))),
            "spaces": lambda n: self._among(n, _SPACES),
            "one word": lambda n: self._rng.choice("aéж中\U0001f600\u0b95") * n,
            "no spaces": lambda n: self._repeat(n, "".join(self._rng.choices(self._words, k=_few(n)))),
            "special tokens": lambda n: self._repeat(n, "".join(self._rng.choices([*_SPECIAL, " "], k=_few(n)))),
            "bytes": lambda n: self._repeat(n, self._rng.randbytes(_few(n)).decode("latin-1")),
            "empty": lambda n: "",
        }  # fmt: skip

    def draw(self, long: bool = False) -> str:
        kind = self._rng.choice(list(self.kinds))
        most = 2000 if self._rng.random() < 0.02 else 150
        return self.kinds[kind](self._length(10_000, LONGEST) if long else self._length(1, most))

    def draw_longest(self) -> str:
        return self._rng.choice([kind for name, kind in self.kinds.items() if name != "empty"])(LONGEST)

    def with_surrogates(self) -> tuple[str, int]:
        """Returns a text with lone surrogates and the position of the first."""
        text = self.draw().replace("\ud800", "")[:500]
        place = self._rng.randint(0, len(text))
        rest = "".join(chr(self._rng.randrange(0xD800, 0xE000)) for _ in range(self._rng.randint(1, 3)))
        return text[:place] + rest + text[place:], place

    def _length(self, least: int, most: int) -> int:
        return int(least * (most / least) ** self._rng.random())

    def _of_plane(self, n: int, plane: int) -> str:
        """Draws code points of one plane, assigned or not, except surrogates, which are not characters."""
        drawn = (self._rng.randrange(plane << 16, (plane + 1) << 16) for _ in range(_few(n)))
        return self._repeat(n, "".join(chr(i) if not 0xD800 <= i < 0xE000 else "\ud7a3" for i in drawn))

    def _among(self, n: int, characters: list[str]) -> str:
        return self._repeat(n, "".join(self._rng.choices(characters, k=_few(n))))

    @staticmethod
    def _repeat(n: int, text: str) -> str:
        return (text * (n // max(1, len(text)) + 1))[:n]


def _few(n: int) -> int:
    """The number of characters to draw; a longer text repeats them."""
    return max(1, min(n, 5000))


def unicode_texts(counts: dict[str, int], seed: int, folder: Path, results: Results) -> None:
    """Embeds rounds of texts in two orders and batch sizes, some also alone; then texts with lone surrogates."""
    results.expect(counts["texts"] + counts["surrogates"])
    processes.use_devices(1)
    embedder = _small_embedder(counts["tokens"])
    drawn, rng = Texts(seed), random.Random(seed)
    warnings.simplefilter("ignore")
    rounds = max(2, -(-counts["texts"] // TEXTS_PER_ROUND))
    long_ones = [drawn.draw_longest] * (counts["long"] // 2) + [lambda: drawn.draw(long=True)] * -(-counts["long"] // 2)
    # Warm up: compile all shapes and embed the largest texts, so that the process has allocated what it keeps.
    _compile_all(embedder)
    _round(embedder, [*(drawn.draw() for _ in range(500)), "e\u0301" * (LONGEST // 2), "中" * LONGEST], 20, rng, None)
    memory = [_memory()]
    for part, alone, long in zip(*(runs.shares(counts[kind], rounds) for kind in ("texts", "alone", "long"))):
        some = [drawn.draw() for _ in range(part - long)] + [long_ones.pop()() for _ in range(long)]
        _round(embedder, some, alone, rng, results)
        memory.append(_memory())
    _lone_surrogates(embedder, drawn, counts["surrogates"], rng, results)
    memory.append(_memory())
    resident, in_use = zip(*memory)
    results.note(megabytes_resident=_megabytes(resident), megabytes_in_use=_megabytes(in_use))
    # What a leak leaves is in use. Resident memory goes up and down by some 60 MB with what the allocator keeps.
    results.maximum((max(in_use) - in_use[0]) / 1e6, "MB in use above warm-up", limit=25)
    results.maximum((max(resident) - resident[0]) / 1e6, "MB resident above warm-up", limit=250)
    if counts["long_context"]:
        _long_texts(embedder.with_settings(max_length=8192), drawn, counts["long_context"], results)


def _small_embedder(max_length: int):
    """A model of random weights with the real vocabulary, which truncates texts to ``max_length`` tokens."""
    import jax

    from nomic_jax import Embedder
    from nomic_jax.data.tokens.tokenizer import Tokenizer
    from nomic_jax.model import EmbeddingConfig, EncoderConfig, init_encoder

    config = EmbeddingConfig(EncoderConfig(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64))
    params = init_encoder(jax.random.key(0), config.encoder)
    return Embedder.from_params(params, config, Tokenizer.from_directory(find_minilm()), max_length=max_length)


def _compile_all(embedder) -> None:
    """Compiles every possible shape of a batch."""
    from nomic_jax.data.batches.shapes import LENGTHS

    for length in (length for length in LENGTHS if length <= embedder.max_length):
        for rows in (1 << power for power in range(6)):
            embedder.encode(["a " * (length - 2)] * rows, prompt="", batch_size=rows)


def _round(embedder, some: list[str], alone: int, rng: random.Random, results: Results | None) -> None:
    import numpy as np

    prompt = rng.choice(("", "search_query: ", "\u202e"))
    vectors = embedder.encode(some, prompt=prompt, batch_size=rng.choice(BATCH_SIZES[1:]))
    order = rng.sample(range(len(some)), len(some))
    again = np.empty_like(vectors)
    again[order] = embedder.encode([some[i] for i in order], prompt=prompt, batch_size=rng.choice(BATCH_SIZES[1:]))
    apart = np.abs(again - vectors).max(axis=1)
    for i in rng.sample(range(len(some)), min(alone, len(some))):
        apart[i] = max(apart[i], np.abs(embedder.encode(some[i], prompt=prompt) - vectors[i]).max())
    if results is not None:
        _compare(some, vectors, apart, results)


def _compare(some: list[str], vectors, apart, results: Results) -> None:
    import numpy as np

    norms = np.abs(np.linalg.norm(vectors.astype(np.float64), axis=1) - 1)
    results.maximum(float(norms.max()), "deviation from length 1", limit=1e-5)
    results.maximum(float(apart.max()), "difference between two batches", limit=1e-6)
    for text, vector, norm, distance in zip(some, vectors, norms, apart):
        passed = bool(np.isfinite(vector).all() and norm <= 1e-5 and distance <= 1e-6)
        what = f"{len(text)} characters, {text[:20]!a}" if not passed else f"{len(text)} characters"
        results.add(passed, what, f"the length deviates by {norm:.1e}, two batches by {distance:.1e}")


def _lone_surrogates(embedder, drawn: Texts, count: int, rng: random.Random, results: Results) -> None:
    """A lone surrogate is refused with its position; the replacement that the error advises can be embedded."""
    import numpy as np

    for _ in range(count):
        text, place = drawn.with_surrogates()
        some = [drawn.draw() for _ in range(rng.randint(0, 3))]
        at = rng.randint(0, len(some))
        message = ""
        try:
            embedder.encode([*some[:at], text, *some[at:]], prompt="")
        except ValueError as error:
            message = str(error)
        advised = text.encode("utf-8", "replace").decode()
        norm = abs(float(np.linalg.norm(embedder.encode(advised, prompt=""))) - 1)
        wanted = f"input {at} holds half of a surrogate pair at character {place}"
        passed = message.startswith(wanted) and 'text.encode("utf-8", "replace").decode()' in message and norm <= 1e-5
        results.add(passed, f"lone surrogate at {place}", f"the error is {message!r:.200}")


def _long_texts(embedder, drawn: Texts, count: int, results: Results) -> None:
    """Embeds texts with up to 8192 tokens, in batches of two and alone."""
    import numpy as np

    results.expect(count)
    some = [drawn.draw(long=True) for _ in range(count)]
    vectors = embedder.encode(some, prompt="", batch_size=2)
    alone = np.stack([embedder.encode(text, prompt="") for text in some])
    _compare(some, vectors, np.abs(alone - vectors).max(axis=1), results)


def _memory() -> tuple[int, int]:
    """Resident bytes of this process, after free memory was returned to the system, and bytes its allocator gave out.

    Without glibc the second is the first.
    """
    gc.collect()
    libc = ctypes.CDLL(None)
    if glibc := hasattr(libc, "mallinfo2"):
        libc.malloc_trim(0)
    resident = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if not glibc:
        return resident, resident
    libc.mallinfo2.restype = _Mallinfo2
    state = libc.mallinfo2()
    return resident, state.uordblks + state.hblkhd


class _Mallinfo2(ctypes.Structure):
    """State of glibc's allocator, of all its arenas: mallinfo2(3)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for names in ("arena ordblks smblks hblks hblkhd", "usmblks fsmblks uordblks fordblks keepcost")
        for name in names.split()
    )


def _megabytes(sizes) -> list[float]:
    return [round(size / 1e6, 1) for size in sizes]
