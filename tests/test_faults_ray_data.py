"""What Ray Data's own checkpointing does wrong when a run breaks in the middle, and our table does not.

Measured on Ray 2.60 with failures injected: overwriting under a checkpoint lost half the rows and then all, a sink that
commits at the end lost half, one bad row with `max_errored_blocks=-1` lost ten and the checkpoint, chunk rows keyed
by their document's id lost chunks, appending without a checkpoint doubled rows, resuming with one CPU hung. Each has
its test here, on a real Ray, and each test says which of them it is.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lance
import pytest
from nights import SETS, corpus_of, hashes_of, rows_of, write_corpus

from jobs.configuration import EmbedConfiguration, load
from jobs.embed import run_embed
from pipeline import apply
from pipeline.table import PUBLISHED, EmbeddingTable

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = 30


class PowerCut(RuntimeError):
    """What the driver meets in the middle of a run."""


@pytest.fixture
def corpus(tmp_path) -> Path:
    write_corpus(corpus_of(0, DOCUMENTS), tmp_path / "corpus")
    return tmp_path / "corpus"


def configured(source: Path, table: Path, model: Path, *sets: str) -> EmbedConfiguration:
    given = {"source": str(source), "table": str(table), "model": str(model)}
    return load(
        EmbedConfiguration,
        file=None,
        sets=[*SETS, "compute.commit_every_s=0", "compute.single_chars=0", *sets],
        given=given,
    )


def cut_after(fragments: int, patch: pytest.MonkeyPatch) -> None:
    """From now on the driver meets a PowerCut after so many fragments of real workers."""
    whole = apply.written_fragments

    def part(*arguments: Any, **named: Any) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(whole(*arguments, **named)):
            if number == fragments:
                raise PowerCut
            yield row

    patch.setattr(apply, "written_fragments", part)


def whole_documents(table: Path, version: int | str | None = None) -> dict[str, bytes]:
    """{document: hash of its text} of a version; every document has all its chunks, once each."""
    found = {}
    for name, rows in rows_of(lance.dataset(str(table), version=version)).items():
        chunks = [row[0] for row in rows]
        assert chunks == list(range(len(rows))), f"{name} has the chunks {chunks}"
        assert [row[1] for row in rows[1:]] == [row[2] for row in rows[:-1]], f"{name} has a gap"
        found[name] = rows[0][-1]
        assert {row[-1] for row in rows} == {found[name]}
    return found


@pytest.mark.usefixtures("ray_session")
def test_what_a_broken_run_left_is_neither_lost_nor_doubled(corpus, tmp_path, tiny_model_folder):
    """Overwriting under a checkpoint, a sink that commits at the end, appending without one, chunks that were lost."""
    table, wanted = tmp_path / "table.lance", hashes_of(corpus_of(0, DOCUMENTS))
    configuration = configured(corpus, table, tiny_model_folder)
    with pytest.MonkeyPatch.context() as patch:
        cut_after(3, patch)
        with pytest.raises(PowerCut):
            run_embed(configuration)
    kept = whole_documents(table)
    assert 0 < len(kept) < len(wanted)
    assert kept.items() <= wanted.items()
    assert EmbeddingTable.open(str(table)).published_version() is None

    second = run_embed(configuration)
    assert (second.status, second.unchanged, second.embedded) == ("published", len(kept), len(wanted) - len(kept))
    assert whole_documents(table, PUBLISHED) == wanted
    rows = lance.dataset(str(table)).count_rows()
    third = run_embed(configuration)
    assert (third.status, third.embedded) == ("unchanged", 0)
    assert lance.dataset(str(table)).count_rows() == rows
    for entry in lance.dataset(str(table)).versions():
        assert whole_documents(table, entry["version"]).items() <= wanted.items()


@pytest.mark.usefixtures("ray_session")
def test_one_bad_row_costs_one_row(corpus, tmp_path, tiny_model_folder):
    """`max_errored_blocks=-1` lost the block of the bad row, and what was known of the others."""
    table, wanted = tmp_path / "table.lance", hashes_of(corpus_of(0, DOCUMENTS))
    with (corpus / "c.jsonl").open("a") as lines:
        lines.write('{"id": "bad", "text": \n')
    configuration = configured(corpus, table, tiny_model_folder)
    report = run_embed(configuration)
    assert (report.dead, report.embedded) == (1, len(wanted))
    assert whole_documents(table) == wanted
    again = run_embed(configuration)
    assert (again.dead, again.embedded, again.unchanged) == (1, 0, len(wanted))


@pytest.mark.slow
def test_a_cluster_with_one_cpu(corpus, tmp_path, tiny_model_folder):
    """Resuming there hung: an actor held the CPU that reading needed."""
    table, wanted = tmp_path / "table.lance", hashes_of(corpus_of(0, DOCUMENTS))
    program = (
        "from cluster.session import session\nfrom jobs.cli import main\nimport sys\n"
        "with session(num_cpus=1):\n    status = main(sys.argv[1:])\nsys.exit(status)"
    )
    command = [sys.executable, "-c", program, "embed", str(corpus), str(table), "--model", str(tiny_model_folder)]
    command += [word for item in SETS for word in ("--set", item)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, timeout=400)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert whole_documents(table, PUBLISHED) == wanted
