"""Randomness that is a function of where it is used: hashes of counters, and permutations that take no memory.

Nothing here has a state, so nothing has to be saved, and whoever asks the same question gets the same answer on any
worker. The hash is splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014): its
stream from a seed `k` is `mix64(k + n * GOLDEN)` for n = 1, 2, ..., which can be read at any n, passes BigCrush, and is
eight vectorised integer operations in numpy. Philox, which is what numpy offers as a counter-based generator, needs an
object for every key, and there is a key for every document.
"""

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio, odd: the step of splitmix64's counter."""
ALL_BITS = (1 << 64) - 1
ROUNDS = 6
"""Of the Feistel network; four make a pseudorandom permutation (Luby and Rackoff), small domains like a few more."""


def mix64(values: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer, a bijection of 64-bit numbers: flipping any bit flips each bit of the result or not as a
    coin would.

    Args:
        values: uint64, left as they are.
    """
    mixed = values ^ (values >> np.uint64(30))
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def key_of(*parts: int) -> int:
    """One 64-bit key out of several integers, in which their order counts. Negative ones wrap around."""
    key = 0
    for part in parts:
        key = int(mix64(np.array([(key + GOLDEN + (part & ALL_BITS)) & ALL_BITS], dtype=np.uint64))[0])
    return key


def keys_of(key: int, parts: np.ndarray) -> np.ndarray:
    """`key_of` with one more part each: for a key made of `a`, `keys_of(key, [b, c])` is that of (a, b) and (a, c).

    Args:
        parts: integers of any kind.
    """
    return mix64(np.asarray(parts).astype(np.uint64) + np.uint64((key + GOLDEN) & ALL_BITS))


def draws(keys: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """64 random bits for every pair of a key and a counter: the stream of each key, read at its counters.

    Args:
        keys: uint64.
        counters: 0 or more, of the same shape.
    """
    return mix64(keys + (counters.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN))


def below(bits: np.ndarray, limits: np.ndarray | int) -> np.ndarray:
    """Whole numbers from 0 up to, not including, `limits` (at most 2^32), from the upper half of 64 random bits each.

    By multiplication instead of a remainder; the bias is under `limits` / 2^32.
    """
    return (((bits >> np.uint64(32)) * np.asarray(limits).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


def permute(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a permutation of 0 ... size - 1 takes the given indices: computed, not looked up.

    A balanced Feistel network permutes the next power of four; what falls outside of `size` goes through it again until
    it falls inside ("cycle walking"), which keeps the map one-to-one. As `size` is over a quarter of that power, a few
    walks are enough.

    Args:
        indices: int64 (N,), each from 0 to size - 1.
        size: at most 2^62.
        key: another one gives an unrelated permutation.

    Returns:
        int64 (N,), from 0 to size - 1; distinct where the indices are.
    """
    half = np.uint64(max(((size - 1).bit_length() + 1) // 2, 1))
    low = np.uint64((1 << int(half)) - 1)
    keys = [np.uint64(key_of(key, number)) for number in range(ROUNDS)]
    result = np.array(indices, dtype=np.uint64)
    outside = np.arange(len(result))
    while len(outside):
        values = result[outside]
        left, right = values >> half, values & low
        for round_key in keys:
            left, right = right, left ^ (mix64(right + round_key) & low)
        values = (left << half) | right
        result[outside] = values
        outside = outside[values >= np.uint64(size)]
    return result.astype(np.int64)
