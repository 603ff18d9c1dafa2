"""runs, versions and rollback, on tables made without an encoder, and as commands."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from test_pipeline_table import RECIPE, apply

from jobs.history import moved, run_rollback, run_runs, run_versions
from model.errors import InputError
from pipeline.lease import Lease
from pipeline.ledger import new_run, read_records, recorded, rolled_back
from pipeline.table import PUBLISHED, EmbeddingTable

ROOT = Path(__file__).resolve().parent.parent


def night(table: EmbeddingTable, documents: dict[str, str]) -> int:
    """A run as `embed` leaves it."""
    run = new_run()
    with Lease.take(table.uri, run), recorded(table.uri, run, "embed", version_before=table.version) as entry:
        apply(table, documents, [])
        table.publish()
        counts = {"read": 2, "embedded": len(documents), "unchanged": 0, "dead": 0, "deleted": 0, "tokens": 1234}
        entry.set(status="published", version=table.version, published=table.version, report=counts, dead=["long"])
        entry.set(rows=table.dataset.count_rows(), documents=table.count_documents(), tokens=1234)
    return table.version


@pytest.fixture(params=["local", "s3"])
def table(request, tmp_path, monkeypatch) -> EmbeddingTable:
    """Versions 2, 3 and 4 were published; the second row of a document makes it two rows each."""
    uri = str(tmp_path / "table.lance")
    if request.param == "s3":
        for name, value in request.getfixturevalue("s3_server").items():
            monkeypatch.setenv(name, value)
        uri = f"s3://bucket/{tmp_path.name}/table.lance"
    made = EmbeddingTable.create(uri, replace(RECIPE, granularity="chunk"), model="m")
    for name in "abc":
        night(made, {name: "text"})
    return made


def seen(table: EmbeddingTable) -> int:
    """Rows that readers see."""
    return EmbeddingTable.open(table.uri, PUBLISHED).dataset.count_rows()


def test_back_and_forth(table):
    assert seen(table) == 6
    report = run_rollback(table.uri)
    assert (report.before, report.published, report.newest) == (4, 3, 4)
    assert "see version 3 now, no longer 4" in report.summary()
    assert "goes on from version 4" in report.summary()
    assert seen(table) == 4
    assert rolled_back(table.uri, newest=4, published=3)
    assert run_rollback(table.uri).published == 2
    with pytest.raises(InputError, match="keeps no version that was published before 2"):
        run_rollback(table.uri)
    assert run_rollback(table.uri, 4).published == 4
    assert seen(table) == 6
    assert run_rollback(table.uri, 4).summary().endswith("see version 4 already.")
    records = read_records(table.uri)
    assert [(r["job"], r["published_before"], r["published"]) for r in records[3:]] == [
        ("rollback", 4, 3),
        ("rollback", 3, 2),
        ("rollback", 2, 4),
        ("rollback", 4, 4),
    ]


def test_refused_rollbacks_leave_no_trace(table):
    before = read_records(table.uri)
    with pytest.raises(InputError, match=r"version 1 of .* was never published, .* kept are 2, 3, 4"):
        run_rollback(table.uri, 1)
    with Lease.take(table.uri, "theirs", beat_s=0.1), pytest.raises(InputError, match="another run is writing"):
        run_rollback(table.uri)
    assert read_records(table.uri) == before
    assert seen(table) == 6


def test_versions_say_what_is_in_them(table):
    apply(table, {"d": "text"}, [])
    run_rollback(table.uri)
    report = run_versions(table.uri)
    runs = [record["run"] for record in read_records(table.uri)]
    shown = [(v.version, v.run, v.rows, v.documents, v.status) for v in report.versions]
    assert shown == [
        (2, runs[0], 2, 1, "kept"),
        (3, runs[1], 4, 2, "published"),
        (4, runs[2], 6, 3, "kept"),
        (5, None, 8, None, "newest"),
    ]
    assert report.versions[0].time <= report.versions[3].time < new_time()
    lines = report.summary().splitlines()
    assert lines[0].split() == ["version", "made", "run", "rows", "documents", "status"]
    assert lines[3].split()[0] == "3"
    assert lines[3].split()[-1] == "published"


def new_time() -> str:
    return (datetime.now(UTC) + timedelta(seconds=2)).strftime("%Y-%m-%d %H:%M:%S")


def test_runs_are_listed(table):
    with pytest.raises(RuntimeError), recorded(table.uri, new_run(), "embed"):
        raise RuntimeError("the machine is on fire")
    report = run_runs(table.uri)
    assert [run["status"] for run in report.runs] == ["published"] * 3 + ["failed"]
    assert "dead" not in report.runs[0]
    assert len(run_runs(table.uri, last=1).runs) == 1
    lines = report.summary().splitlines()
    assert "1 -> 2" in lines[2]
    assert "1,234" in lines[2]
    assert "the machine is on fire" in lines[5]


def test_moved():
    assert [moved(3, 7), moved(7, 7), moved(None, 7), moved(7, None)] == ["3 -> 7", "7", "7", ""]


def test_places_without_a_table(tmp_path):
    for job in (run_runs, run_versions, run_rollback):
        with pytest.raises(InputError, match="there is no table at"):
            job(str(tmp_path / "none"))
    table = EmbeddingTable.create(str(tmp_path / "new"), RECIPE, model="m")
    with pytest.raises(InputError, match="nothing is published"):
        run_rollback(table.uri)
    assert run_runs(table.uri).summary().startswith("No run has written")
    assert [v.status for v in run_versions(table.uri).versions] == ["newest"]


def test_as_commands(tmp_path):
    table = EmbeddingTable.create(str(tmp_path / "t"), RECIPE, model="m")
    night(table, {"a": "x"})
    night(table, {"b": "x"})

    def nightloom(*arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "jobs.cli", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=300)

    assert json.loads(nightloom("rollback", table.uri, "--json").stdout)["published"] == 2
    assert json.loads(nightloom("rollback", table.uri, 3, "--json").stdout)["published"] == 3
    run = nightloom("rollback", table.uri, 9)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert len(json.loads(nightloom("versions", table.uri, "--json").stdout)["versions"]) == 2
    run = nightloom("runs", table.uri, "--last", 3)
    assert run.returncode == 0, run.stderr
    assert sum("rolled back" in line for line in run.stdout.splitlines()) == 2
