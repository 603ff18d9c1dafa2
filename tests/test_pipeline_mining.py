"""The nearest rows against brute force, and which of them are negatives."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from test_pipeline_recipe import RECIPE as FULL_RECIPE

from pipeline.keys import Keys, hash_ids
from pipeline.mining import NONE, Choice, Nearest, choose_negatives, find_nearest
from pipeline.table import EmbeddingTable, write_fragment

DIM = 8


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(60, DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, vectors: np.ndarray) -> EmbeddingTable:
    """Thirty documents of two chunks each, in three fragments; documents 3 and 4 have one text."""
    table = EmbeddingTable.create(
        str(tmp_path_factory.mktemp("mining") / "t.lance"), replace(FULL_RECIPE, dim=DIM), model="m"
    )
    for start in (0, 10, 20):
        numbers = [n for n in range(start, start + 10) for _ in range(2)]
        texts = hash_ids(pa.array([str(3 if n == 4 else n) for n in numbers], pa.string()))
        zeros = pa.array([0] * 20, pa.int64())
        rows = pa.table(
            {
                "document_id": pa.array([f"d{n}" for n in numbers], pa.string()),
                "chunk": pa.array([0, 1] * 10, pa.int32()),
                **dict.fromkeys(("char_start", "char_end", "token_start", "token_end"), zeros),
                "text_hash": pa.array(texts.tolist(), pa.binary(16)),
                "source": pa.array(["corpus.txt"] * 20, pa.string()),
                "vector": pa.FixedSizeListArray.from_arrays(
                    pa.array(vectors[2 * start : 2 * start + 20].reshape(-1)), DIM
                ),
            }
        )
        table.commit([write_fragment(table.uri, rows, "r")], hash_ids(pa.array([], pa.string())), Keys.empty(), run="r")
    return table


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (left / np.linalg.norm(left, axis=1)[:, None]) @ (right / np.linalg.norm(right, axis=1)[:, None]).T


def questions() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(7, DIM)).astype(np.float32)


POSITIVES = ["d3", "d0", "d29", "nowhere", "d3", "d15", "d16"]


def test_the_nearest_are_those_of_brute_force(
    table: EmbeddingTable, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.mining.SCORES_AT_ONCE", 64 * 7)
    found = find_nearest(table, questions(), POSITIVES, 12)
    expected = cosines(questions(), vectors)
    order = np.argsort(-expected, axis=1)[:, :12]
    assert np.array_equal(found.row_QK, order)
    np.testing.assert_allclose(found.score_QK, np.take_along_axis(expected, order, axis=1), atol=1e-6)
    for question, positive in enumerate(POSITIVES):
        if positive == "nowhere":
            assert found.positive_Q[question] == NONE
            continue
        own = [2 * int(positive[1:]), 2 * int(positive[1:]) + 1]
        best = own[int(expected[question, own].argmax())]
        assert found.positive_Q[question] == best
        assert found.positive_score_Q[question] == pytest.approx(expected[question, best], abs=1e-6)
        before = {row // 2 for row in range(60) if expected[question, row] > expected[question, best]}
        assert found.rank_Q[question] == (len(before) if best in order[question] else 12)


def test_a_table_with_fewer_rows(table: EmbeddingTable) -> None:
    found = find_nearest(table, questions(), POSITIVES, 80)
    assert (found.row_QK[:, 60:] == NONE).all()
    chosen, _ = choose_negatives(found, [{p} for p in POSITIVES], Choice(0, 100, 100, -9.0))
    assert [len(some) for some in chosen] == [28, 29, 29, 0, 28, 29, 29], "all but the positive and its twin"


def line_of(scores: list[float], documents: list[int], positive: int, positive_score: float) -> Nearest:
    """One question whose nearest rows are these; row i is of document documents[i]."""
    names = [f"d{n}" for n in documents]
    rows = pa.table({"document_id": names, "text_hash": [name.encode() for name in names]})
    return Nearest(
        rows=rows,
        document_R=np.array(documents),
        row_QK=np.arange(len(scores))[None],
        score_QK=np.array([scores], np.float32),
        positive_Q=np.array([positive]),
        positive_score_Q=np.array([positive_score], np.float32),
        rank_Q=np.array([0]),
    )


NEAREST = line_of([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3], [1, 0, 2, 2, 3, 4, 5], positive=1, positive_score=0.8)


@pytest.mark.parametrize(
    "choice, answers, rows, too_near",
    [
        (Choice(0, 9, 9, 0.0), {"d0"}, [2, 4, 5, 6], 1),
        (Choice(0, 9, 9, -1.0), {"d0"}, [0, 2, 4, 5, 6], 0),
        (Choice(0, 9, 9, 0.15), {"d0"}, [4, 5, 6], 2),
        (Choice(0, 9, 2, 0.0), {"d0"}, [2, 4], 1),
        (Choice(2, 9, 9, 0.0), {"d0"}, [4, 5, 6], 0),
        (Choice(0, 3, 9, 0.0), {"d0"}, [2, 4], 1),
        (Choice(0, 9, 9, 0.0), {"d0", "d1", "d3"}, [2, 5, 6], 0),
    ],
)
def test_ranks_margin_and_answers(choice: Choice, answers: set[str], rows: list[int], too_near: int) -> None:
    assert choose_negatives(NEAREST, [answers], choice) == ([rows], too_near)
