"""A map of vectors: seeded, true about distances and groups, and neighbours that are nearest."""

from dataclasses import replace

import numpy as np
import pytest
from pages import make_table
from test_pipeline_recipe import RECIPE

from jobs import vector_map
from jobs.vector_map import choose, group_rows, nearest_documents, principal, sample_vectors
from pipeline.table import PUBLISHED, EmbeddingTable


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> EmbeddingTable:
    return EmbeddingTable.open(make_table(tmp_path_factory.mktemp("map"), nights=1, per_source=40), PUBLISHED)


def test_a_sample_is_the_same_every_time_and_tells_sources_apart(table):
    drawn, again = sample_vectors(table), sample_vectors(table)
    assert (drawn.points == again.points).all()
    assert (len(drawn.rows), drawn.total) == (121, 121)
    assert drawn.names == ["news.jsonl", "manual.jsonl", "letters.jsonl"]
    own, chance = drawn.own_kind()
    assert own > 0.95
    assert chance == pytest.approx(1 / 3, abs=0.01)
    few = sample_vectors(table, most=30)
    assert len(few.rows) == 30
    assert {row["document_id"] for row in few.rows} != {
        row["document_id"] for row in sample_vectors(table, seed=1, most=30).rows
    }


def test_tables_with_too_few_vectors_have_no_map(tmp_path):
    assert sample_vectors(EmbeddingTable.create(str(tmp_path / "t"), replace(RECIPE, dim=4), model="m")) is None


def test_principal_directions():
    draw = np.random.default_rng(0)
    plane = draw.normal(size=(200, 2)) * [5, 2]
    axes = np.linalg.qr(draw.normal(size=(10, 10)))[0][:2]
    points, held = principal(plane @ axes + 3 + draw.normal(0, 1e-3, (200, 10)))
    assert held > 0.999
    between = np.linalg.norm(points[:50, None] - points[None, :50], axis=-1)
    truth = np.linalg.norm(plane[:50, None] - plane[None, :50], axis=-1)
    assert np.allclose(between, truth, atol=0.05)
    flipped, _ = principal(-(plane @ axes))
    assert np.isclose(abs(flipped[:, 0]).sum(), abs(points[:, 0]).sum(), rtol=0.01)
    assert principal(np.ones((5, 4), np.float32))[1] == 0


@pytest.mark.parametrize(
    "sources, ids, names",
    [
        (["/a/x.parquet", "/a/y.parquet", "/a/x.parquet"], "abc", ["x.parquet", "y.parquet"]),
        (["/a/x.parquet"] * 3, ["py/1", "py/2", "c/1"], ["py", "c"]),
        (["/a/x.parquet"] * 3, "abc", ["x.parquet"]),
        ([f"/{'ab'[n % 2]}/{n}.txt" for n in range(9)], [str(n) for n in range(9)], ["a", "b"]),
        ([f"/{n // 2}/{n}.txt" for n in range(40)], [str(n) for n in range(40)], [*map(str, range(7)), "other"]),
    ],
)
def test_groups(sources, ids, names):
    found, group = group_rows([{"source": s, "document_id": i} for s, i in zip(sources, ids, strict=True)])
    assert found == names
    assert len(group) == len(sources)
    assert set(group.tolist()) == set(range(len(names)))


@pytest.mark.parametrize("whole", [True, False])
def test_neighbours_are_the_nearest_other_documents(table, monkeypatch, whole):
    if not whole:
        monkeypatch.setattr(vector_map, "MOST_SEARCHED", 10)
    drawn = sample_vectors(table)
    found = nearest_documents(table, drawn)
    assert [near.asked["document_id"].partition("/")[0] for near in found[:3]] == ["news", "manual", "letters"]
    for at, near in zip(choose(drawn), found, strict=True):
        scores = drawn.vectors @ drawn.vectors[at]
        scores[at] = -1
        best = [drawn.rows[i]["document_id"] for i in np.argsort(-scores)[:3]]
        assert [row["document_id"] for row in near.found] == best
        assert near.asked["snippet"]
