"""A pseudo-random permutation of a range, computed for many positions at once without storing the range.

The values equal those of ``grain.experimental.index_shuffle`` with 4 rounds, which takes 3 microseconds per value; at
every step, every process needs the origin of all rows of the global batch. The method is a Simon cipher
(https://eprint.iacr.org/2013/404) with the fewest bits that hold the range, applied again to values beyond the range.
"""

import math

import numpy as np
from grain.experimental import index_shuffle

ROUNDS = 4
MIN_BITS = 16  # of a block: smaller blocks show patterns
SMALL = 1 << 12  # up to this size, index_shuffle is faster: the 16-bit cipher is applied too often


def shuffled(positions: range, size: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the int64 images of ``positions`` under the permutation of range(size) for seed and epoch."""
    # The key has 32 bits; the odd multiplier separates neighbouring seeds and epochs.
    key = (seed * 1_000_003 + epoch * 7919) % (1 << 32)
    if size <= SMALL:
        moved = [index_shuffle(i, max_index=size - 1, seed=key, rounds=ROUNDS) for i in positions]
        return np.array(moved, np.int64)
    bits = math.ceil(math.log2(size - 1))
    word = max(bits + bits % 2, MIN_BITS) // 2
    round_keys = _seed_sequence(key, ROUNDS)
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
