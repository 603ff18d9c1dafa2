"""Two runs that are started together: one publishes, the other ends with status 2 within seconds, changing nothing."""

import json
import subprocess
import sys
import time
from pathlib import Path

import lance
import pytest
from nights import SETS, corpus_of, hashes_of, rows_of, write_corpus

from pipeline.table import PUBLISHED

ROOT = Path(__file__).resolve().parent.parent
MOST_S = 10
"""Within this the second is told, over what it takes two that are started together to be told anything at all."""


def command(source: Path, table: str, model: Path) -> list[str]:
    words = [sys.executable, "-m", "jobs.cli", "embed", str(source), table, "--model", str(model), "--json"]
    return [*words, *(word for item in SETS for word in ("--set", item))]


def start(source: Path, table: str, model: Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(command(source, table, model), cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def startup_s(table: str, model: Path) -> float:
    """Seconds until two runs are told that their source does not exist."""
    begun = time.monotonic()
    both = [start(Path("/nowhere"), table, model) for _ in range(2)]
    for run in both:
        run.communicate(timeout=300)
        assert run.returncode == 2
    return time.monotonic() - begun


@pytest.mark.parametrize("place", ["disk", pytest.param("s3", marks=pytest.mark.slow)])
def test_of_two_runs_one_publishes_and_one_is_refused(tmp_path, tiny_model_folder, request, monkeypatch, place):
    table, options = str(tmp_path / "table.lance"), None
    if place == "s3":
        environment = request.getfixturevalue("s3_server")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        from pipeline.storage import lance_options

        table = f"s3://bucket/{tmp_path.name}.lance"
        options = lance_options(table)
    write_corpus(corpus_of(0), tmp_path / "corpus")
    usual_s = startup_s(table, tiny_model_folder)
    begun = time.monotonic()
    both = [start(tmp_path / "corpus", table, tiny_model_folder) for _ in range(2)]
    while all(run.poll() is None for run in both):
        assert time.monotonic() - begun < 300
        time.sleep(0.05)
    told_s = time.monotonic() - begun
    said = [run.communicate(timeout=600) for run in both]
    assert sorted(run.returncode for run in both) == [0, 2], said
    loser = next(i for i, run in enumerate(both) if run.returncode == 2)
    assert said[loser][0] == ""
    assert "another run is writing" in said[loser][1]
    assert said[loser][1].count("\n") == 1
    assert told_s < MOST_S + 2 * usual_s  # the other starts Ray meanwhile
    report = json.loads(said[1 - loser][0])
    wanted = hashes_of(corpus_of(0))
    assert (report["status"], report["embedded"]) == ("published", len(wanted))
    dataset = lance.dataset(table, version=PUBLISHED, storage_options=options)
    assert {name: rows[0][-1] for name, rows in rows_of(dataset).items()} == wanted
    assert dataset.count_rows() == report["chunks"]
