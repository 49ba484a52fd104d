"""Measures the host's work for one training step, in CPU seconds of one thread of a process with 8 GPUs.

    python -m benchmarks.host --output=benchmarks/results/scaling-host.json

The work is: the order of rows, their lengths, the plan of chunks, and the process's own texts. The real streams run
over tokens in memory, for the batches and numbers of devices of benchmarks/scaling.py. This takes about a minute and
4 GB. Every process does the parts "order" and "plan" for the whole global batch. They hold Python's lock, so more
threads do not help.
"""

import argparse
import datetime
import json
import os
import platform
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.loads import pair_lengths
from nomic_jax.data.batches.mixing import Mixing, Sampling
from nomic_jax.data.batches.mlm import MlmStream
from nomic_jax.data.batches.packing import bucketed_layout, packed_layout, plan_chunks, segments_for
from nomic_jax.data.batches.pairs import MAX_CHUNK_TOKENS, PairStream
from nomic_jax.data.batches.typical_lengths import LONGEST
from nomic_jax.data.tokens.store import RaggedTokens

GPUS_PER_HOST = 8
PAIR_TOKENS, MINED, NEGATIVES, ROW_TOKENS = 192, 20, 7, 2048
SPECIAL = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
TOKENIZER: Any = SimpleNamespace(
    sha256="", vocab_size=30_522, special_ids=np.array(list(SPECIAL.values())), special_id=SPECIAL.__getitem__
)
# (global batch, GPUs): the recipe's batch; 8 times that batch; and batches with a fixed share per GPU, an eighth of the
# recipe's batch.
MLM = ((4096, 8), (4096, 64), (4096, 1024), (32_768, 64), (32_768, 1024), (524_288, 1024))
PAIRS = ((16_384, 8), (16_384, 64), (16_384, 1024), (131_072, 64), (131_072, 1024), (1_048_576, 512), (2_097_152, 1024))
TRIPLETS = ((256, 8), (256, 64), (2048, 64), (2048, 1024), (32_768, 1024))


class Ragged(RaggedTokens):
    """Texts of random tokens, held in memory."""

    def __init__(self, lengths: np.ndarray):
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.ids = np.random.default_rng(0).integers(1000, 30_000, self.offsets[-1], dtype=np.uint16)


class Rows(SimpleNamespace):
    """A store with ``rows`` rows."""

    def __len__(self) -> int:
        return self.rows


class Repeated:
    """A text of any length that repeats a part held in memory."""

    def __init__(self, length: int):
        self.length, self.part = length, np.random.default_rng(0).integers(1000, 30_000, 1 << 20, dtype=np.uint16)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: slice) -> np.ndarray:
        start = place.start % (len(self.part) - ROW_TOKENS)
        return self.part[start : start + place.stop - place.start]


def store(rows: int, **columns: Any) -> Any:
    return Rows(name="", fingerprint="", rows=rows, manifest={"tokenizer": TOKENIZER.sha256}, columns=columns)


def seconds_of(call: Any) -> tuple[float, Any]:
    """Returns (CPU seconds of this thread, result). Other programs influence CPU seconds little."""
    started = time.thread_time()
    result = call()
    return round(time.thread_time() - started, 4), result


def mlm(batch: int, gpus: int) -> dict:
    text = SimpleNamespace(ids=Repeated(ROW_TOKENS * MLM[-1][0]), offsets=np.zeros(1, np.int64))
    stream = MlmStream([store(len(text.ids), text=text)], TOKENIZER, batch_size=batch, seq_len=ROW_TOKENS)
    hosts = gpus // GPUS_PER_HOST
    seconds, _ = seconds_of(lambda: stream.batch(0, 0, hosts))
    return {"stage": "mlm", "batch": batch, "gpus": gpus, "layout": "rows", "seconds": seconds, "filled": 1.0}


def pairs(batch: int, gpus: int, layout: str, lengths: tuple[np.ndarray, np.ndarray], columns: dict) -> dict:
    """Measures one batch with the default chunks: contrastive, or finetune if ``columns`` has negatives."""
    query, document = lengths
    texts = NEGATIVES + 1 if "negatives" in columns else 1
    tokens_per_row = query.mean() + texts * document.mean()
    budget = max(min(int(tokens_per_row * (batch // gpus) / 8), MAX_CHUNK_TOKENS), LONGEST)
    sample = np.concatenate([query[:10_000], document[:10_000]])
    shapes = (
        packed_layout(LONGEST, budget, segments=segments_for(sample, LONGEST))
        if layout == "packed"
        else bucketed_layout(sample, LONGEST, budget, parts=(1, 4))
    )
    data = store(len(query), **columns)
    data.negative_rows = np.arange(len(query) + 1) * MINED
    stream = PairStream(
        [data],
        TOKENIZER,
        batch_size=batch,
        query_length=LONGEST,
        document_length=LONGEST,
        num_negatives=texts - 1,
        layout=shapes,
        devices=gpus,
    )
    seconds, whole = seconds_of(lambda: stream.batch(0, 0, gpus // GPUS_PER_HOST))
    order, rows = seconds_of(lambda: Mixing([data], batch, 0, Sampling()).rows_of_step(0)[1])
    documents = np.stack([document[rows]] * texts, axis=1)
    plan, _ = seconds_of(lambda: plan_chunks(query[rows], documents, shapes, gpus))
    return {
        "stage": "finetune" if texts > 1 else "contrastive",
        "batch": batch,
        "gpus": gpus,
        "layout": layout,
        "seconds": seconds,
        "order": order,
        "plan": plan,
        "filled": round(whole.real_tokens / whole.padded_tokens, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--largest", type=int, default=1 << 40, help="skip larger global batches")
    args = parser.parse_args()
    results = []

    def measured(result: dict) -> None:
        print(result, flush=True)
        results.append(result)

    for batch, gpus in MLM:
        if batch <= args.largest:
            measured(mlm(batch, gpus))
    for cases, texts_per_row in ((PAIRS, 1), (TRIPLETS, 1 + MINED)):
        cases = tuple(case for case in cases if case[0] <= args.largest)
        lengths = pair_lengths(np.random.default_rng(0), max(batch for batch, _ in cases), PAIR_TOKENS)
        columns = {"query": Ragged(lengths[0]), "document": Ragged(lengths[1])}
        if texts_per_row > 1:
            columns["negatives"] = Ragged(np.repeat(lengths[1], MINED))
        for layout in ("packed", "bucketed"):
            for batch, gpus in cases:
                measured(pairs(batch, gpus, layout, lengths, columns))
    written = {
        "command": "python -m benchmarks.host",
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "date": datetime.date.today().isoformat(),
        "steps": results,
    }
    args.output.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
