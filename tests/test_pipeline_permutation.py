"""Permutations that lose nothing, and random bits that are random enough and always the same."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.permutation import ALL_BITS, below, draws, key_of, keys_of, mix64, permute


def test_mix64_is_splitmix64() -> None:
    """The first numbers of splitmix64 from seed 1234567, as the reference implementation in C prints them."""
    stream = draws(np.full(3, 1234567, np.uint64), np.arange(3))
    assert stream.tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_keys_depend_on_every_part_and_on_their_order() -> None:
    keys = {key_of(), key_of(0), key_of(0, 0), key_of(1, 2), key_of(2, 1), key_of(-1), key_of(1)}
    assert len(keys) == 7
    assert key_of(-1) == key_of(ALL_BITS)
    parts = np.array([0, 5, ALL_BITS], dtype=np.uint64)
    assert keys_of(key_of(7), parts).tolist() == [key_of(7, int(part)) for part in parts]


@given(st.integers(1, 3000), st.integers(0, ALL_BITS))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(size: int, key: int) -> None:
    whole = permute(np.arange(size), size, key)
    assert np.array_equal(np.sort(whole), np.arange(size))
    some = np.arange(0, size, 3)
    assert np.array_equal(permute(some, size, key), whole[some]), "an element goes where it goes, whoever asks"


def test_permute_reaches_every_order() -> None:
    """All 24 orders of four things come up about as often: chi squared over 23 degrees of freedom is under 60."""
    orders, counts = np.unique([permute(np.arange(4), 4, key) for key in range(4800)], axis=0, return_counts=True)
    assert len(orders) == 24
    assert float(((counts - 200) ** 2 / 200).sum()) < 60


def test_permute_takes_elements_one_by_one_out_of_a_huge_range() -> None:
    size = 10**15 + 7
    taken = permute(np.arange(1000) * 10**11, size, 5)
    assert len(np.unique(taken)) == 1000
    assert taken.min() >= 0
    assert taken.max() < size
    assert taken.mean() / size == pytest.approx(0.5, abs=0.05)


def test_draws_are_uniform_and_unrelated_between_keys() -> None:
    keys = keys_of(3, np.arange(2))
    first, second = (draws(np.full(100_000, key), np.arange(100_000)) / 2.0**64 for key in keys)
    for values in (first, second):
        assert values.mean() == pytest.approx(0.5, abs=0.005)
        assert np.bincount((values * 64).astype(int), minlength=64) == pytest.approx(np.full(64, 1562), abs=250)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.015
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.015


def test_below_covers_its_range_evenly() -> None:
    numbers = below(mix64(np.arange(70_000, dtype=np.uint64)), 7)
    assert np.bincount(numbers) == pytest.approx(np.full(7, 10_000), abs=500)
    limits = np.array([1, 2, 3, 1 << 32])
    assert (below(np.full(4, ALL_BITS, np.uint64), limits) == limits - 1).all()
