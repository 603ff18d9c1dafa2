"""Metrics by hand, chunks by their best, cheaper representations by what they should lose."""

import math

import numpy as np
import pytest

from jobs.evaluation_sets import RetrievalSet
from jobs.retrieval import CANDIDATES, DEPTH, dense_scorer, judge, long_queries, rank, unit

DRAW = np.random.default_rng(0)


def make_set(judgements: dict[str, dict[str, int]], num_documents: int) -> RetrievalSet:
    ids = [f"d{i}" for i in range(num_documents)]
    return RetrievalSet(ids, [f"text {i}" for i in ids], list(judgements), list(judgements), judgements, "")


def test_metrics_by_hand() -> None:
    data = make_set({"q0": {"d1": 1}, "q1": {"d0": 2, "d2": 1, "d9": 0}, "q2": {"d15": 1}}, 30)
    scores = np.zeros((3, 30), np.float32)
    scores[0, [5, 1, 7]] = (3, 2, 1)  # the answer is second
    scores[1, [2, 9, 0]] = (3, 2, 1)  # answers are first and third
    scores[2] = -np.arange(30)  # the answer is sixteenth
    values = judge(rank(lambda chosen: scores[chosen], data), data)
    assert list(values) == ["ndcg@10", "mrr@10", "recall@10", "recall@100"]
    ideal = 2 + 1 / math.log2(3)
    expected = [1 / math.log2(3), (1 + 2 / math.log2(4)) / ideal, 0]
    assert values["ndcg@10"] == pytest.approx(expected)
    assert values["mrr@10"] == pytest.approx([0.5, 1, 0])
    assert values["recall@10"] == pytest.approx([1, 1, 0])
    assert values["recall@100"] == pytest.approx([1, 1, 1])


def test_a_query_that_finds_nothing_counts_as_nothing() -> None:
    data = make_set({"q0": {"d1": 1}, "q1": {"d0": 1}}, 3)
    scores = np.array([[-np.inf] * 3, [1, -np.inf, -np.inf]], np.float32)
    run = rank(lambda chosen: scores[chosen], data)
    assert run == {"q0": {}, "q1": {"d0": 1.0}}
    assert all(values.tolist() == [0.0, 1.0] for values in judge(run, data).values())


def test_a_run_holds_the_best_hundred() -> None:
    data = make_set({"q0": {"d0": 1}}, 250)
    scores = DRAW.normal(size=(1, 250)).astype(np.float32)
    run = rank(lambda chosen: scores[chosen], data)["q0"]
    best = np.argsort(-scores[0])[:DEPTH]
    assert set(run) == {f"d{i}" for i in best}


def test_a_document_is_as_near_as_its_nearest_chunk() -> None:
    rows = DRAW.normal(size=(7, 16)).astype(np.float32)
    queries = DRAW.normal(size=(3, 16)).astype(np.float32)
    first = np.array([0, 3, 4])  # chunks 0 to 2, 3, and 4 to 6
    cosines = unit(queries) @ unit(rows).T
    expected = np.stack([cosines[:, 0:3].max(1), cosines[:, 3], cosines[:, 4:].max(1)], axis=1)
    assert dense_scorer(queries, rows, first)(slice(0, 3)) == pytest.approx(expected, abs=1e-6)


def test_cheaper_representations_lose_what_they_should() -> None:
    rows = DRAW.normal(size=(400, 64)).astype(np.float32)
    queries = rows[:50] + 0.8 * DRAW.normal(size=(50, 64)).astype(np.float32)
    first = np.arange(400)
    exact = dense_scorer(queries, rows, first)(slice(0, 50))
    rounded = dense_scorer(queries, rows, first, "int8")(slice(0, 50))
    assert 0 < np.abs(rounded - exact).max() < 0.02
    halved = dense_scorer(queries, rows, first, "dim32")(slice(0, 50))
    assert halved == pytest.approx(unit(queries[:, :32]) @ unit(rows[:, :32]).T, abs=1e-6)
    binary = dense_scorer(queries, rows, first, "binary")(slice(0, 50))
    kept = np.isfinite(binary)
    assert (kept.sum(axis=1) == CANDIDATES).all()
    assert np.array_equal(binary[kept], exact[kept])  # rescored by whole vectors
    signs = (rows > 0) == (queries[0] > 0)
    assert signs.sum(axis=1)[kept[0]].min() >= np.sort(signs.sum(axis=1))[-CANDIDATES]


def test_long_questions_have_long_answers_only() -> None:
    data = make_set({"q0": {"d0": 1}, "q1": {"d1": 1}, "q2": {"d0": 1, "d1": 1}, "q3": {"d0": 0, "d1": 1}}, 2)
    data.documents[:] = ["short text", "word " * 30]
    assert long_queries(data, 20).tolist() == [False, True, False, True]
