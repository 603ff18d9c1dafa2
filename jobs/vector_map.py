"""A look at the vectors that readers see: a seeded sample, two directions to draw it in, what lies near what.

The directions are the first two principal components: the same table gives the same map, distances on it are never
larger than in truth, and nothing needs to be tuned. How much of the variance they hold is told beside it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.search import read_texts, snippet
from pipeline.chunks import WHOLE
from pipeline.table import EmbeddingTable
from pipeline.vectors import as_array

MOST_POINTS = 1500
"""Vectors on a map: more make a larger page and no clearer picture."""
MOST_GROUPS = 7
"""Sources that get a colour of their own; the rest are *other*."""
MOST_SEARCHED = 200_000
"""Rows of a table up to which all of it is searched for neighbours; beyond, the sample is."""
ASKED, NEAREST = 4, 3
"""Documents whose neighbours are shown, and how many of them."""


@dataclass(frozen=True, slots=True)
class VectorMap:
    """A sample of a table's vectors."""

    rows: list[dict[str, Any]]
    """The rows of the sample without their vectors."""
    total: int
    """Rows of the table."""
    vectors: np.ndarray
    """(n, dim) float32, of unit length."""
    points: np.ndarray
    """(n, 2)"""
    held: float
    """Share of the variance that the two directions hold."""
    names: list[str]
    """Groups, largest first."""
    group: np.ndarray
    """(n,) the number of each row's group."""

    def own_kind(self) -> tuple[float, float]:
        """(share of the vectors whose nearest other document is of their group, the same by chance)."""
        near = self.vectors @ self.vectors.T
        documents = np.unique([row["document_id"] for row in self.rows], return_inverse=True)[1]
        near[documents[:, None] == documents[None, :]] = -np.inf
        other = np.isfinite(near).any(axis=1)
        if not other.any():
            return 0.0, 0.0
        same = self.group[near.argmax(axis=1)] == self.group
        sizes = np.bincount(self.group) / len(self.group)
        return float(same[other].mean()), float((sizes**2).sum())


def sample_vectors(table: EmbeddingTable, *, seed: int = 0, most: int = MOST_POINTS) -> VectorMap | None:
    """A sample of a table as it was opened, or None where it holds fewer than three vectors."""
    total = table.dataset.count_rows()
    draw = np.random.default_rng(seed)
    chosen = np.sort(draw.choice(total, min(total, most), replace=False)) if total else np.empty(0, np.int64)
    columns = ["document_id", "chunk", "char_start", "char_end", "text_hash", "source", "vector"]
    taken = table.dataset.take(chosen.tolist(), columns=columns) if len(chosen) else table.schema.empty_table()
    if table.recipe.granularity == "both":
        taken = taken.filter(pa.compute.equal(taken["chunk"], WHOLE))
    if len(taken) < 3:
        return None
    vectors = as_array(taken["vector"]).astype(np.float32)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    points, held = principal(vectors)
    rows = taken.drop_columns("vector").to_pylist()
    names, group = group_rows(rows)
    return VectorMap(rows, total, vectors, points, held, names, group)


def principal(vectors: np.ndarray) -> tuple[np.ndarray, float]:
    """(n, dim) vectors in their first two principal directions, (n, 2), and the share of the variance in these.

    The signs are fixed, so that a map does not turn around when a vector is added: the largest component is positive.
    """
    centred = vectors - vectors.mean(axis=0)
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    two = directions[:2]
    two *= np.sign(two[np.arange(len(two)), np.abs(two).argmax(axis=1)])[:, None]
    total = float((values**2).sum())
    return centred @ two.T, float((values[:2] ** 2).sum()) / total if total else 0.0


def group_rows(rows: Sequence[dict[str, Any]]) -> tuple[list[str], np.ndarray]:
    """What rows are coloured by: their source file, its folder where there are many, or, where one file holds all,
    what their ids begin with. Small groups are *other*.
    """
    sources = [PurePosixPath(row["source"]) for row in rows]
    if len(set(sources)) == 1:
        labels = [row["document_id"].partition("/")[0] if "/" in row["document_id"] else "" for row in rows]
        labels = [label or sources[0].name for label in labels]
    elif len(set(sources)) <= MOST_GROUPS:
        labels = [source.name for source in sources]
    else:
        labels = [source.parent.name or source.name for source in sources]
    names = [name for name, _ in Counter(labels).most_common()]
    if len(names) > MOST_GROUPS + 1:
        names = [*names[:MOST_GROUPS], "other"]
    number = {name: at for at, name in enumerate(names)}
    return names, np.array([number.get(label, len(names) - 1) for label in labels])


@dataclass(frozen=True, slots=True)
class Neighbours:
    """A document and those nearest to it: rows with `score` and `snippet`."""

    asked: dict[str, Any]
    found: list[dict[str, Any]]


def nearest_documents(table: EmbeddingTable, drawn: VectorMap) -> list[Neighbours]:
    """The neighbours of some documents of the sample, of each group in turn."""
    asked = choose(drawn)
    found = []
    for at in asked:
        near = search(table, drawn, at)
        best = {row["document_id"]: row for row in reversed(near)}  # of each document its nearest row
        best.pop(drawn.rows[at]["document_id"], None)
        others = sorted(best.values(), key=lambda row: -row["score"])
        found.append((drawn.rows[at], others[:NEAREST]))
    texts = read_texts(table, [row for asked_row, near in found for row in (asked_row, *near)])

    def with_snippet(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "snippet": snippet(texts.get(row["document_id"]), row["char_start"], row["char_end"])}

    return [Neighbours(with_snippet(row), [with_snippet(other) for other in near]) for row, near in found]


def choose(drawn: VectorMap) -> list[int]:
    """Rows of the sample to ask about: the first ones of the groups in turn, of different documents."""
    turns = [np.flatnonzero(drawn.group == number).tolist() for number in range(len(drawn.names))]
    order = [turn[at] for at in range(ASKED) for turn in turns if at < len(turn)]
    by_document = {drawn.rows[at]["document_id"]: at for at in reversed(order)}
    return [at for at in order if by_document[drawn.rows[at]["document_id"]] == at][:ASKED]


def search(table: EmbeddingTable, drawn: VectorMap, at: int) -> list[dict[str, Any]]:
    """Rows near to a row of the sample, itself included, best first: of the whole table, or of the sample."""
    if drawn.total <= MOST_SEARCHED:
        return table.search(drawn.vectors[at], 10 * NEAREST).to_pylist()
    scores = drawn.vectors @ drawn.vectors[at]
    best = np.argsort(-scores, kind="stable")[: 10 * NEAREST]
    return [{**drawn.rows[number], "score": float(scores[number])} for number in best]
