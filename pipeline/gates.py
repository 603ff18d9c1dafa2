"""Gates on what a run is about to publish: the vectors that the published version lacks, read back from storage.

Finite, of the promised length, not collapsed. Rows are streamed, in Ray tasks where there are many; what is kept of
them does not grow with their number. Rows that a crashed or refused run left behind are looked at like all others.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import lance
import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.keys import Keys, as_keys, hash_ids
from pipeline.recipe import Recipe
from pipeline.table import EmbeddingTable
from pipeline.vectors import also_column, as_array, as_vectors, column_type, vector_array

log = logging.getLogger(__name__)

NAMES = ("canaries", "sample", "vectors", "collapse")
"""All gates; the first two are `pipeline.probes`."""

ROWS_PER_BATCH = 4096
ROWS_PER_TASK = 500_000
"""Up to here the driver reads the vectors itself."""
MOST_COMPARED = 50_000
"""Rows among which identical vectors are looked for; beyond, these stand for all."""
FEWEST_TEXTS = 100
"""Different texts below which nothing is said about collapse."""
MOST_REMOVED = 5_000_000
"""Documents with bad vectors that one run takes out of the table: 24 bytes each."""

MOST_IDENTICAL = 0.5
"""Share of rows whose vector is also that of another text. 0 over the bundled corpus; boilerplate makes some."""
FLOOR = 1e-3
"""A dimension is dead when its variance is below this share of the mean square of all. Over the bundled corpus it is
0.013 in the least and 0.37 in the middle one of 256 dimensions."""
MOST_DEAD_DIMENSIONS = 0.5


def norm_tolerance(vector_type: str) -> float:
    """How far from 1 the length of a stored unit vector may be. What keeps no length has length 1, unless it is 0."""
    return 2e-3 if vector_type == "float16" else 1e-4


@dataclass(slots=True)
class VectorStatistics:
    """What is kept of the rows of some fragments; statistics of other fragments can be added."""

    rows: int = 0
    not_finite: int = 0
    odd_length: int = 0
    disagreeing: int = 0
    """Rows one of whose cheaper forms is not that of their vector."""
    farthest: float = 0.0
    """Largest difference of a length from 1."""
    bad: Keys = field(default_factory=Keys.empty)
    """The documents of such rows (not sorted), at most MOST_REMOVED, with their fragments."""
    sums_D: np.ndarray = field(default_factory=lambda: np.zeros(0))
    squares_D: np.ndarray = field(default_factory=lambda: np.zeros(0))
    compared: np.ndarray = field(default_factory=lambda: np.empty((3, 0), np.uint64))
    """Of the MOST_COMPARED rows with the smallest draw: draw, hash of the vector, hash of the text."""

    def add(self, other: "VectorStatistics") -> None:
        self.rows += other.rows
        self.not_finite += other.not_finite
        self.odd_length += other.odd_length
        self.disagreeing += other.disagreeing
        self.farthest = max(self.farthest, other.farthest)
        if len(other.bad.ids):
            ids = np.concatenate([self.bad.ids, other.bad.ids])[:MOST_REMOVED]
            self.bad = Keys(ids, ids, np.concatenate([self.bad.fragments, other.bad.fragments])[:MOST_REMOVED])
        self.sums_D = other.sums_D + (self.sums_D if len(self.sums_D) else 0)
        self.squares_D = other.squares_D + (self.squares_D if len(self.squares_D) else 0)
        self.compared = smallest(np.concatenate([self.compared, other.compared], axis=1))

    def identical(self) -> tuple[float, int]:
        """(share of the compared rows whose vector is also that of another text, how many texts were compared)."""
        _, vectors, texts = self.compared
        if not len(texts):
            return 0.0, 0
        pairs = np.unique(np.stack([vectors, texts]), axis=1)
        found, texts_of_vector = np.unique(pairs[0], return_counts=True)
        shared = texts_of_vector[np.searchsorted(found, vectors)] > 1
        return float(shared.mean()), len(np.unique(texts))

    def dead_dimensions(self) -> tuple[float, float]:
        """(share of dimensions below the floor, smallest variance as a share of the mean square of a dimension)."""
        good = self.rows - self.not_finite
        squares = self.squares_D / max(good, 1)
        variances = squares - (self.sums_D / max(good, 1)) ** 2
        shares = variances / max(float(squares.mean()) if len(squares) else 0.0, 1e-30)
        return (float((shares < FLOOR).mean()), float(shares.min())) if len(shares) else (0.0, 0.0)


def smallest(compared: np.ndarray) -> np.ndarray:
    """The MOST_COMPARED columns with the smallest draws: a sample that does not depend on the order of rows."""
    if compared.shape[1] <= MOST_COMPARED:
        return compared
    return compared[:, np.argpartition(compared[0], MOST_COMPARED)[:MOST_COMPARED]]


def scan(uri: str, version: int, fragments: Sequence[int], recipe: Recipe) -> VectorStatistics:
    """Read the vectors of some fragments of a version; on any worker, a batch at a time."""
    dataset = lance.dataset(uri, version=version, storage_options=storage.lance_options(uri))
    total = VectorStatistics()
    for number in fragments:
        fragment = dataset.get_fragment(number)
        columns = ["document_id", "chunk", "text_hash", *map(also_column, recipe.also), "vector"]
        for batch in fragment.to_batches(columns=columns, batch_size=ROWS_PER_BATCH):
            total.add(look_at(pa.Table.from_batches([batch]), number, recipe))
    return total


def look_at(rows: pa.Table, fragment: int, recipe: Recipe) -> VectorStatistics:
    """The statistics of some rows."""
    vectors = as_vectors(rows["vector"], recipe.vector_type)
    finite = np.asarray(np.isfinite(vectors).all(axis=1))
    clean = np.where(finite[:, None], vectors, 0)
    off = np.abs(np.linalg.norm(clean, axis=1) - 1)
    odd: np.ndarray = finite & (off > norm_tolerance(recipe.vector_type)) & recipe.normalize
    disagree = np.zeros(len(rows), bool)
    for form in recipe.also:
        kept, due = as_array(rows[also_column(form)]), as_array(vector_array(clean, form))
        disagree |= finite & (kept != due).any(axis=1)
    bad = hash_ids(rows["document_id"].filter(pa.array(~finite | odd | disagree)).unique())
    good = vectors[finite].astype(np.float64)
    texts = np.ascontiguousarray(as_keys(rows["text_hash"])).view(np.uint64)[::2]
    draws = texts ^ ((rows["chunk"].to_numpy().astype(np.uint64) + np.uint64(2)) * np.uint64(0x9E3779B97F4A7C15))
    return VectorStatistics(
        rows=len(rows),
        not_finite=int((~finite).sum()),
        odd_length=int(odd.sum()),
        disagreeing=int(disagree.sum()),
        farthest=float(off[finite].max(initial=0.0)) if recipe.normalize else 0.0,
        bad=Keys(bad, bad, np.full(len(bad), fragment, np.int64)),
        sums_D=good.sum(axis=0),
        squares_D=(good**2).sum(axis=0),
        compared=smallest(np.stack([draws, hash_vectors(vectors), texts])[:, finite]),
    )


def hash_vectors(vectors: np.ndarray) -> np.ndarray:
    """A 64-bit hash (uint64) of each float32 row: a sum of its words times random odd numbers, modulo 2**64."""
    factors = np.random.default_rng(0).integers(0, 2**63, vectors.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(
        1
    )
    return (np.ascontiguousarray(vectors).view(np.uint32).astype(np.uint64) * factors).sum(axis=1, dtype=np.uint64)


def unpublished_fragments(table: EmbeddingTable) -> list[int]:
    """The fragments of this version that have a data file which the published one has not."""
    published = table.published_version()
    old: set[str] = set()
    if published is not None:
        fragments = table.dataset.checkout_version(published).get_fragments()
        old = {file.path for fragment in fragments for file in fragment.metadata.files}
    new = table.dataset.get_fragments()
    return [f.fragment_id for f in new if not all(file.path in old for file in f.metadata.files)]


def scan_unpublished(table: EmbeddingTable) -> VectorStatistics:
    """The statistics of everything that would be published; in Ray tasks where there is much and a session."""
    fragments = unpublished_fragments(table)
    dataset = table.dataset
    sizes = {number: dataset.get_fragment(number).metadata.num_rows or 0 for number in fragments}
    arguments = (table.uri, table.version)
    total = VectorStatistics()
    if sum(sizes.values()) <= ROWS_PER_TASK or not ray_is_there():
        total.add(scan(*arguments, fragments, table.recipe))
        return total
    import ray

    task = ray.remote(scan).options(num_cpus=1)
    waiting = [task.remote(*arguments, part, table.recipe) for part in grouped(sizes)]
    while waiting:
        done, waiting = ray.wait(waiting)
        total.add(ray.get(done[0]))
    return total


def ray_is_there() -> bool:
    import sys

    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def grouped(sizes: dict[int, int]) -> Iterable[list[int]]:
    """Fragments in groups of about ROWS_PER_TASK rows."""
    group: list[int] = []
    rows = 0
    for number, size in sizes.items():
        group.append(number)
        rows += size
        if rows >= ROWS_PER_TASK:
            yield group
            group, rows = [], 0
    if group:
        yield group


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gates say of everything that would be published."""

    measured: dict[str, Any]
    """Numbers for the record of the run."""
    refused: list[str]
    """Which gate does not let it pass, and by how much; empty when all do."""
    removed: int = 0
    """Documents with bad vectors that were taken out, to be embedded again by the next run."""


def check_vectors(table: EmbeddingTable, off: Iterable[str], *, run: str) -> Verdict:
    """Look at all vectors that would be published.

    Documents with a vector that is not finite or has another length than promised are removed from the newest version:
    readers never saw them, and the next run finds them missing.

    Args:
        off: gates that are not to refuse anything.
    """
    recipe = table.recipe
    for name, form in {"vector": recipe.vector_type, **{also_column(form): form for form in recipe.also}}.items():
        kind, expected = table.schema.field(name).type, column_type(recipe.dim, form)
        if kind != expected:
            return Verdict({}, [f"vectors: the column {name} is {kind}, the recipe promises {expected}"])
    seen = scan_unpublished(table)
    identical, texts = seen.identical()
    dead, smallest_variance = seen.dead_dimensions()
    measured = {
        "rows": seen.rows,
        "not_finite": seen.not_finite,
        "odd_length": seen.odd_length,
        "disagreeing": seen.disagreeing,
        "farthest_length": round(seen.farthest, 7),
        "identical": round(identical, 6),
        "texts_compared": texts,
        "dead_dimensions": round(dead, 6),
        "smallest_variance": round(smallest_variance, 9),
    }
    refused = []
    removed = 0
    if len(seen.bad.ids) and "vectors" not in off:
        removed = remove(table, seen.bad, run)
        refused.append(
            f"vectors: of {seen.rows} {seen.not_finite} are not finite, {seen.odd_length} not of length 1 (off by up "
            f"to {seen.farthest:.2g})"
            + (f", {seen.disagreeing} unlike a cheaper form beside them" if seen.disagreeing else "")
            + f"; their {removed} documents are taken out, the next run embeds them again"
        )
    if texts >= FEWEST_TEXTS and "collapse" not in off:
        if identical > MOST_IDENTICAL:
            refused.append(
                f"collapse: {identical:.1%} of the vectors are also that of another text (at most {MOST_IDENTICAL:.0%})"
            )
        if dead > MOST_DEAD_DIMENSIONS:
            refused.append(
                f"collapse: {dead:.1%} of the dimensions hardly vary (at most {MOST_DEAD_DIMENSIONS:.0%} may have less "
                f"than {FLOOR} of the mean square)"
            )
    return Verdict(measured, refused, removed)


def remove(table: EmbeddingTable, bad: Keys, run: str) -> int:
    """Take documents out of the newest version; how many there were."""
    order = np.argsort(bad.ids, kind="stable")
    ids = np.unique(bad.ids)
    table.commit([], ids, Keys(bad.ids[order], bad.hashes[order], bad.fragments[order]), run=run)
    return len(ids)
