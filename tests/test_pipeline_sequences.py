"""Cutting loses nothing; pairs are the halves of a sequence, in one order or the other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sequences import NOT_APPLICABLE, NOWHERE, ORDERED, SWAPPED, Sequences, cut, cut_pairs, lay_out

CLS, SEP = 1, 2
CALM = settings(max_examples=80, deadline=None)
lengths = st.lists(st.integers(0, 60), min_size=1, max_size=12).map(np.array)


def documents(lengths_D: np.ndarray) -> list[np.ndarray]:
    """Documents in which every token is another number."""
    ends = np.cumsum(lengths_D) + 10
    return [np.arange(end - length, end) for end, length in zip(ends, lengths_D, strict=True)]


def with_pairs(lengths_D: np.ndarray, max_tokens: int, every: int, *ends: int) -> Sequences:
    """Sequences of documents in which a sentence begins at every so many tokens."""
    first_D = np.cumsum(lengths_D) - lengths_D
    sentences = np.concatenate([f + np.arange(0, n, every) for f, n in zip(first_D, lengths_D, strict=True)])
    keys_D = np.arange(len(lengths_D)).astype(np.uint64)
    return cut_pairs(lengths_D, max_tokens, keys_D, sentences, *ends)


def test_cut() -> None:
    sequences = cut(np.array([7, 0, 2]), 5)
    assert sequences.document_S.tolist() == [0, 0, 0, 2]
    assert sequences.start_S.tolist() == [0, 3, 6, 0]
    assert sequences.end_S.tolist() == [3, 6, 7, 2]
    assert sequences.length_S.tolist() == [5, 5, 3, 4]


@CALM
@given(lengths, st.integers(4, 20), st.integers(1, 9), st.integers(0, 99))
def test_no_token_is_lost_or_doubled(lengths_D: np.ndarray, max_tokens: int, every: int, seed: int) -> None:
    tokens_D = documents(lengths_D)
    for sequences in (cut(lengths_D, max_tokens), with_pairs(lengths_D, max_tokens, every, seed)):
        assert sequences.length_S.max(initial=0) <= max_tokens
        everything = np.arange(len(sequences.length_S))
        tokens, cu_seqlens, positions = lay_out(sequences, everything, tokens_D, cls_id=CLS, sep_id=SEP)
        assert np.diff(cu_seqlens).tolist() == sequences.length_S.tolist()
        text = positions != NOWHERE
        assert sorted(tokens[text].tolist()) == np.concatenate(tokens_D).tolist()
        document_T = np.repeat(sequences.document_S, sequences.length_S)
        first_D = np.cumsum(lengths_D) - lengths_D + 10
        assert np.array_equal(tokens[text], (first_D[document_T] + positions)[text])


@CALM
@given(lengths, st.integers(4, 30), st.integers(1, 9), st.integers(0, 99))
def test_a_pair_is_the_two_halves_of_its_sequence(
    lengths_D: np.ndarray, max_tokens: int, every: int, seed: int
) -> None:
    sequences = with_pairs(lengths_D, max_tokens, every, seed)
    tokens_D = documents(lengths_D)
    for s, label in enumerate(sequences.label_S):
        tokens, _, _ = lay_out(sequences, np.array([s]), tokens_D, cls_id=CLS, sep_id=SEP)
        start, end, pivot = int(sequences.start_S[s]), int(sequences.end_S[s]), int(sequences.pivot_S[s])
        content = tokens_D[sequences.document_S[s]]
        first, second = content[start:pivot].tolist(), content[pivot:end].tolist()
        # A pair begins where a sentence begins, ends where one ends, and has a third such place in between.
        whole = start % every == 0 and (end % every == 0 or end == len(content))
        boundary = any(place % every == 0 for place in range(start + 1, end))
        assert (label != NOT_APPLICABLE) == (whole and boundary) == (pivot > 0)
        assert whole or every > max_tokens - 3, "only a sentence that is too long is cut"
        if label == NOT_APPLICABLE:
            assert tokens.tolist() == [CLS, *content[start:end].tolist(), SEP]
            continue
        assert pivot % every == 0
        assert start < pivot < end
        if label == SWAPPED:
            first, second = second, first
        assert tokens.tolist() == [CLS, *first, SEP, *second, SEP]


def test_pairs_are_cut_where_sentences_begin() -> None:
    sequences = with_pairs(np.array([23, 0, 4]), 13, 4)
    assert sequences.document_S.tolist() == [0, 0, 0, 2]
    assert sequences.start_S.tolist() == [0, 8, 16, 0]
    assert sequences.end_S.tolist() == [8, 16, 23, 4]
    assert sequences.pivot_S.tolist() == [4, 12, 20, 0]
    assert (sequences.label_S != NOT_APPLICABLE).tolist() == [True, True, True, False]
    # A sentence of 20 tokens is cut where it must be, and no part of it makes a pair.
    sequences = with_pairs(np.array([45]), 13, 20)
    assert sequences.end_S.tolist() == [10, 20, 30, 40, 45]
    assert (sequences.label_S == NOT_APPLICABLE).all()


def test_half_of_the_pairs_are_swapped_anew_in_every_epoch() -> None:
    lengths_D = np.full(4000, 30)
    one, two = (with_pairs(lengths_D, 40, 5, 0, epoch) for epoch in (0, 1))
    assert np.mean(one.label_S == SWAPPED) == pytest.approx(0.5, abs=0.05)
    assert np.mean(one.label_S == ORDERED) == pytest.approx(0.5, abs=0.05)
    assert np.mean(one.label_S == two.label_S) == pytest.approx(0.5, abs=0.05)
    places, counts = np.unique(one.pivot_S, return_counts=True)
    assert places.tolist() == [5, 10, 15, 20, 25]
    assert counts == pytest.approx(np.full(5, 800), abs=150)
    # The order says nothing about the place.
    assert one.pivot_S[one.label_S == SWAPPED].mean() == pytest.approx(15, abs=0.7)
