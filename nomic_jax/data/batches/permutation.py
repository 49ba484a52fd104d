"""A pseudo-random permutation of a range, computed for many positions at once without storing the range.

At every step, every process needs the origin of all rows of the global batch. A run keeps the version of the
permutation that it began with, which its checkpoints record:

  1  a Simon cipher (https://eprint.iacr.org/2013/404) of 4 rounds, equal to ``grain.experimental.index_shuffle``. Rows
     that are neighbours in the source meet in a batch many times more often than by chance, and at sizes of
     2^(2m) + 1 one row comes twice and one never. Only for runs that began with it.
  2  a Feistel network of 6 rounds, whose round function multiplies and shifts.

Both permute a power of two that holds the range, and apply the permutation again to values beyond the range.
"""

import hashlib
import math

import numpy as np

from nomic_jax.extras import needs

VERSION = 2  # of new runs
SIMON_ROUNDS, FEISTEL_ROUNDS = 4, 6
SIMON_BITS = 16  # of a block, at least: smaller blocks show patterns
SIMON_SIZE = (1 << 12) + 1  # below this, index_shuffle is faster: the 16-bit cipher is applied too often
FEISTEL_SIZE = (1 << 10) + 1  # below this, random numbers are sorted: a network of a few bits is not random enough


def fingerprinted(version: int) -> tuple[str, ...]:
    """Returns what the fingerprint of a stream holds for the version: nothing for 1, which is older than versions."""
    return () if version == 1 else (f"shuffle {version}",)


def shuffled(positions: range, size: int, seed: int, epoch: int, version: int) -> np.ndarray:
    """Returns the int64 images of ``positions`` under the permutation of range(size) for seed and epoch."""
    if version == 1:
        return _simon(positions, size, seed, epoch)
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8 * FEISTEL_ROUNDS).digest()
    keys = np.frombuffer(digest, "<u8")
    numbers = np.arange(positions.start, positions.stop, dtype=np.uint64)
    if size < FEISTEL_SIZE:
        return np.argsort(_mixed(np.arange(size, dtype=np.uint64), keys[0]), kind="stable")[numbers]
    bits = (size - 1).bit_length()
    values = _feistel(numbers, bits, keys)
    while len(beyond := np.flatnonzero(values >= size)):
        values[beyond] = _feistel(values[beyond], bits, keys)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """Permutes values of ``bits`` bits: in turn, each half is xored with a function of the other half and a key."""
    low = np.uint64(bits // 2)
    high = np.uint64(bits) - low
    left, right = values >> low, values & ((np.uint64(1) << low) - np.uint64(1))
    for i in range(0, len(keys), 2):
        left = left ^ _mixed(right, keys[i]) >> (np.uint64(64) - high)
        right = right ^ _mixed(left, keys[i + 1]) >> (np.uint64(64) - low)
    return left << low | right


def _mixed(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """Returns 64 bits that depend on all bits of value and key, the highest the most (as in splitmix64)."""
    x = (values ^ key) * np.uint64(0xBF58476D1CE4E5B9)
    return (x ^ x >> np.uint64(32)) * np.uint64(0x94D049BB133111EB)


def _simon(positions: range, size: int, seed: int, epoch: int) -> np.ndarray:
    # The key has 32 bits; the odd multiplier separates neighbouring seeds and epochs.
    key = (seed * 1_000_003 + epoch * 7919) % (1 << 32)
    if size < SIMON_SIZE:
        with needs("this run's order of rows", "nomic_jax[train]"):
            from grain.experimental import index_shuffle

        moved = [index_shuffle(i, max_index=size - 1, seed=key, rounds=SIMON_ROUNDS) for i in positions]
        return np.array(moved, np.int64)
    bits = math.ceil(math.log2(size - 1))
    word = max(bits + bits % 2, SIMON_BITS) // 2
    round_keys = _seed_sequence(key, SIMON_ROUNDS)
    values = _encrypt(np.arange(positions.start, positions.stop, dtype=np.uint64), word, round_keys)
    while len(beyond := np.flatnonzero(values >= size)):
        values[beyond] = _encrypt(values[beyond], word, round_keys)
    return values.astype(np.int64)


def _encrypt(values: np.ndarray, word: int, keys: list[int]) -> np.ndarray:
    """Encrypts blocks of two words of ``word`` bits each."""
    mask = np.uint64((1 << word) - 1)

    def rotated(x: np.ndarray, by: int) -> np.ndarray:
        return (x << np.uint64(by) | x >> np.uint64(word - by)) & mask

    left, right = values >> np.uint64(word) & mask, values & mask
    for key in keys:
        mixed = rotated(right, 1) & rotated(right, 8) ^ rotated(right, 2)
        left, right = right, left ^ mixed ^ np.uint64(key) & mask
    return left << np.uint64(word) | right


def _seed_sequence(seed: int, count: int) -> list[int]:
    """Returns ``count`` < 7 numbers of 32 bits as C++'s ``std::seed_seq`` of a seed (ISO C++, [rand.util.seedseq])."""
    low = 0xFFFFFFFF
    b = [0x8B8B8B8B] * count
    shift = (count - 1) // 2
    p = (count - shift) // 2
    q = p + shift

    def tempered(x: int) -> int:
        return x ^ x >> 27

    for k in range(count):
        r1 = 1664525 * tempered(b[k] ^ b[(k + p) % count] ^ b[k - 1]) & low
        r2 = r1 + (1 if k == 0 else k + seed if k == 1 else k) & low
        b[(k + p) % count] = b[(k + p) % count] + r1 & low
        b[(k + q) % count] = b[(k + q) % count] + r2 & low
        b[k] = r2
    for k in range(count):
        r3 = 1566083941 * tempered(b[k] + b[(k + p) % count] + b[k - 1] & low) & low
        r4 = r3 - k & low
        b[(k + p) % count] ^= r3
        b[(k + q) % count] ^= r4
        b[k] = r4
    return b
