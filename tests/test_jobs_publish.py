"""Publishing: too many dead, probes that moved, vectors that are wrong leave readers where they are, with the reason;
the next run gets on. Stages that fail are stages of their own on a real Ray, not patched ones.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
from test_jobs_embed import configured, text_of, vectors

from jobs import embed
from jobs.embed import run_embed
from jobs.publish import ALWAYS_TOLERATED, most_dead
from model.errors import InputError
from pipeline.dead import list_letters
from pipeline.ledger import read_records
from pipeline.probes import FOLDER
from pipeline.table import PUBLISHED, EmbeddingTable
from pipeline.workers import Job, encoder_of

BLOCKS = "compute.block_chars=2000"


@pytest.fixture
def stages_by_value(ray_session):
    """Workers cannot import this file: they get its classes themselves."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


class Faulty:
    """The real encoder, and what goes wrong after it; `faults` tells documents from what is done to their vectors."""

    def __init__(self, job: Job) -> None:
        self.stage = encoder_of(job)

    def embed(self, tokens: pa.Table) -> Iterator[Any]:
        for part in self.stage.embed(tokens):
            at = part.rows.column_names.index("vector")
            column = part.rows["vector"].combine_chunks()
            found = np.array(column.flatten()).reshape(len(column), -1)
            for row, name in enumerate(part.rows["document_id"].to_pylist()):
                found[row] = self.fault(name, found[row])
            made = pa.FixedSizeListArray.from_arrays(pa.array(found.ravel()), column.type.list_size)
            rows = part.rows.set_column(at, "vector", made)
            yield SimpleNamespace(rows=rows, dead=part.dead, statistics=part.statistics)

    def fault(self, name: str, vector: np.ndarray) -> np.ndarray:
        return vector


class GivesNan(Faulty):
    def fault(self, name: str, vector: np.ndarray) -> np.ndarray:
        return vector * np.nan if name in ("001.txt", "004.txt") else vector


class GivesOneVector(Faulty):
    """Collapse, on the documents only: nothing but the last gate sees it."""

    def fault(self, name: str, vector: np.ndarray) -> np.ndarray:
        return vector if name.startswith(("canary", "sample")) else np.eye(1, len(vector), dtype=np.float32)[0]


class MovesAway(Faulty):
    def fault(self, name: str, vector: np.ndarray) -> np.ndarray:
        moved = vector + np.float32(0.05)
        return moved / np.linalg.norm(moved)


class MovesSampleAway(MovesAway):
    def fault(self, name: str, vector: np.ndarray) -> np.ndarray:
        return vector if name.startswith("canary") else super().fault(name, vector)


def write(folder: Path, names: range) -> None:
    folder.mkdir(exist_ok=True)
    for number in names:
        (folder / f"{number:03}.txt").write_text(text_of(number, 20))


@pytest.fixture
def with_encoder(monkeypatch, stages_by_value):
    """Runs whose workers hold another encoder, given to `Job` as any caller could."""

    def with_encoder(kind: type | None) -> None:
        made = Job if kind is None else lambda **given: replace(Job(**given), encoder=kind)
        monkeypatch.setattr(embed, "Job", made)

    return with_encoder


def refused_says(table: Path) -> list[str]:
    record = read_records(str(table))[-1]
    assert record["status"] == "unpublished"
    return record["reasons"]


def test_vectors_that_are_not_finite_are_not_published_and_embedded_again(tmp_path, tiny_model_folder, with_encoder):
    source, table = tmp_path / "corpus", tmp_path / "table.lance"
    write(source, range(6))
    with_encoder(GivesNan)
    report = run_embed(configured(source, table, tiny_model_folder))
    assert (report.status, report.embedded) == ("unpublished", 6)
    assert EmbeddingTable.open(str(table)).published_version() is None
    (reason,) = refused_says(table)
    assert reason.startswith("vectors: of 6 2 are not finite")
    assert len(lance.dataset(str(table)).to_table()) == 4
    with_encoder(None)
    report = run_embed(configured(source, table, tiny_model_folder))
    assert (report.status, report.embedded, report.unchanged) == ("published", 2, 4)
    assert np.isfinite(np.stack(list(vectors(table).values()))).all()
    assert read_records(str(table))[-1]["gates"]["vectors"]["rows"] == 6


def test_a_worker_that_computes_something_else_commits_nothing(tmp_path, tiny_model_folder, with_encoder):
    source, table = tmp_path / "corpus", tmp_path / "table.lance"
    write(source, range(6))
    assert run_embed(configured(source, table, tiny_model_folder)).status == "published"
    before = vectors(table)
    write(source, range(5, 20))
    for kind, gate in ((MovesAway, "canaries"), (MovesSampleAway, "sample")):
        with_encoder(kind)
        report = run_embed(configured(source, table, tiny_model_folder, BLOCKS))
        assert (report.status, report.embedded, report.left, report.dead) == ("unpublished", 0, 14, 0)
        (reason,) = refused_says(table)
        assert reason.startswith(f"{gate}: embedded again")
        assert "at most 1e-06" in reason
        assert sorted(vectors(table)) == sorted(before)
        assert len(lance.dataset(str(table)).to_table()) == 6
    with_encoder(None)
    report = run_embed(configured(source, table, tiny_model_folder))
    assert (report.status, report.embedded) == ("published", 14)
    probed = read_records(str(table))[-1]["gates"]
    assert probed["canaries"]["distance"] < 1e-8
    assert probed["sample"]["distance"] < 1e-8
    assert len(list((table / FOLDER).glob("*.json"))) == 1


@pytest.mark.slow
def test_collapsed_vectors_wait_for_someone_to_decide(tmp_path, tiny_model_folder, with_encoder):
    source, table = tmp_path / "corpus.jsonl", tmp_path / "table.lance"
    lines = [json.dumps({"id": f"d{i}", "text": f"text {i}"}) + "\n" for i in range(150)]
    source.write_text("".join(lines[:3]))
    run_embed(configured(source, table, tiny_model_folder))
    source.write_text("".join(lines))
    with_encoder(GivesOneVector)
    assert run_embed(configured(source, table, tiny_model_folder)).status == "unpublished"
    assert any(reason.startswith("collapse: 100.0% of the vectors") for reason in refused_says(table))
    with_encoder(None)
    # They stay, and the next run looks at them again; whoever knows that they are right says so.
    assert run_embed(configured(source, table, tiny_model_folder)).status == "unpublished"
    report = run_embed(configured(source, table, tiny_model_folder, "gates.off=collapse"))
    assert (report.status, report.embedded, report.unchanged) == ("published", 0, 150)
    assert len(np.unique(np.stack(list(vectors(table).values())), axis=0)) == 4


@pytest.mark.slow
def test_what_was_refused_can_be_thrown_away(tmp_path, tiny_model_folder, with_encoder):
    """The way back that docs/operations.md names."""
    source, table = tmp_path / "corpus.jsonl", tmp_path / "table.lance"
    lines = [json.dumps({"id": f"d{i}", "text": f"text {i}"}) + "\n" for i in range(150)]
    source.write_text("".join(lines[:3]))
    run_embed(configured(source, table, tiny_model_folder))
    source.write_text("".join(lines))
    with_encoder(GivesOneVector)
    assert run_embed(configured(source, table, tiny_model_folder)).status == "unpublished"
    with_encoder(None)
    lance.dataset(str(table), version=PUBLISHED).restore()
    report = run_embed(configured(source, table, tiny_model_folder))
    assert (report.status, report.embedded, report.unchanged) == ("published", 147, 3)
    assert len(np.unique(np.stack(list(vectors(table).values())), axis=0)) == 150


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_too_many_dead_are_not_published(tmp_path, tiny_model_folder):
    source, table = tmp_path / "corpus", tmp_path / "table.lance"
    write(source, range(3))
    (source / "broken.jsonl").write_text('{"id": "a", "text": "fine"}\n' + "broken\n" * 3)
    strict = configured(source, table, tiny_model_folder, "max_dead=2")
    report = run_embed(strict)
    assert (report.status, report.embedded, report.dead, report.read) == ("unpublished", 4, 3, 7)
    assert refused_says(table) == [
        f"max_dead: 3 of 7 documents are dead, at most 2 may be; `nightloom dead {table}` lists them"
    ]
    letters = list_letters(EmbeddingTable.open(str(table)))
    assert [(row["document_id"], row["stage"], row["attempts"]) for row in letters] == [
        (f"broken.jsonl#{i}", "read", 1) for i in (1, 2, 3)
    ]
    assert run_embed(strict).status == "unpublished"
    (source / "broken.jsonl").write_text('{"id": "a", "text": "fine"}\n{"id": "b", "text": "too"}\nbroken\n')
    report = run_embed(strict)
    assert (report.status, report.embedded, report.dead) == ("published", 1, 1)
    assert [row["document_id"] for row in list_letters(EmbeddingTable.open(str(table)))] == ["broken.jsonl#2"]


def test_how_many_may_be_dead(tmp_path, tiny_model_folder):
    assert [most_dead(setting, 10_000) for setting in (0, 7, 0.0, 0.01, 0.5)] == [0, 7, 0, 100, 5000]
    assert most_dead(0.01, 100) == ALWAYS_TOLERATED
    for wrong in ("max_dead=-1", "max_dead=1.5", "max_dead=none", "gates.off=everything"):
        with pytest.raises(InputError, match=wrong.partition("=")[0]):
            configured(tmp_path, tmp_path, tiny_model_folder, wrong)
    assert configured(tmp_path, tmp_path, tiny_model_folder, 'gates.off=["sample","collapse"]').gates.off == (
        "sample",
        "collapse",
    )


def test_published_tag_is_what_readers_open(tmp_path, tiny_model_folder, with_encoder):
    """A refused night after a published one: readers still open the old vectors."""
    source, table = tmp_path / "corpus", tmp_path / "table.lance"
    write(source, range(4))
    run_embed(configured(source, table, tiny_model_folder))
    before = vectors(table, PUBLISHED)
    (source / "001.txt").write_text("changed")
    with_encoder(GivesNan)
    report = run_embed(configured(source, table, tiny_model_folder))
    assert (report.status, report.published) == ("unpublished", 2)
    after = vectors(table, PUBLISHED)
    assert all(np.array_equal(before[key], after[key]) for key in before)
    with_encoder(None)
    assert run_embed(configured(source, table, tiny_model_folder)).status == "published"
    assert not np.array_equal(vectors(table)["001.txt", -1], before["001.txt", -1])
