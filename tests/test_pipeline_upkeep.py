"""Upkeep: the same rows in fewer files; what is kept stays readable; whatever moment it is killed at."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import lance
import pyarrow as pa
import pytest
from test_pipeline_table import RECIPE, apply, contents, rows

from model.errors import InputError
from pipeline import upkeep
from pipeline.keys import Keys, hash_ids
from pipeline.lease import Lease
from pipeline.table import PUBLISHED, EmbeddingTable, write_fragment
from pipeline.upkeep import clean_up, compact, groups_of

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(params=["local", "s3"])
def table(request, tmp_path, monkeypatch):
    uri = str(tmp_path / "table.lance")
    if request.param == "s3":
        for name, value in request.getfixturevalue("s3_server").items():
            monkeypatch.setenv(name, value)
        uri = f"s3://bucket/{tmp_path.name}/table.lance"
    return EmbeddingTable.create(uri, RECIPE, model="m")


def rows_of(table: EmbeddingTable, version: int | str | None = None) -> list[tuple]:
    """Every row, in the order of the table."""
    found = EmbeddingTable.open(table.uri, version).dataset.to_table().to_pylist()
    return [tuple(map(repr, row.values())) for row in found]


def files_of(table: EmbeddingTable, folder: str = "data") -> set[str]:
    paths = table.dataset.all_files().read_all()["path"].to_pylist()
    return {path for path in paths if path.startswith(f"{folder}/")}


def later(uri: str, run: str) -> Lease:
    """A lease that is younger than everything that has been written, by the second of a store's clock."""
    time.sleep(upkeep.CLOCK_STEP.total_seconds() + 1)
    return Lease.take(uri, run)


def test_many_small_fragments_become_one_with_the_same_rows_in_the_same_order(table):
    for number in range(10):
        apply(table, {f"{number}": "x" * number, f"{number} too": "y"}, [str(number - 1)] if number % 3 == 1 else [])
    before, version, fragments = rows_of(table), table.version, len(table.dataset.get_fragments())
    assert compact(table, "r2") == fragments == 10
    assert table.version == version + 1
    assert len(table.dataset.get_fragments()) == 1
    assert rows_of(table) == before
    assert rows_of(table, version) == before
    assert table.dataset.read_transaction(table.version).transaction_properties["nightloom.run"] == "r2"
    # Again there is nothing to do, and keys and removal go by the new fragment.
    assert compact(table, "r2") == 0
    apply(table, {"2": "new"}, ["2", "5 too"])
    assert len(rows_of(table)) == len(before) - 2


def test_what_is_worth_rewriting(monkeypatch):
    def fragment(number: int, size: int, rows: int = 100, deleted: int = 0) -> lance.FragmentMetadata:
        gone = {"file_type": "array", "id": 1, "num_deleted_rows": deleted, "read_version": 1, "base_id": None}
        data = {"path": f"{number}.lance", "fields": [0], "column_indices": [0], "file_size_bytes": size}
        file = {**data, "file_major_version": 2, "file_minor_version": 0}
        about = {"id": number, "files": [file], "physical_rows": rows, "deletion_file": gone if deleted else None}
        return lance.FragmentMetadata.from_json(json.dumps(about))

    def grouped(*fragments: lance.FragmentMetadata) -> list[list[int]]:
        return [[fragment.id for fragment in group] for group in groups_of(fragments)]

    monkeypatch.setattr(upkeep, "TARGET_BYTES", 1000)
    monkeypatch.setattr(upkeep, "MOST_BYTES", 5000)
    assert grouped() == []
    assert grouped(*(fragment(n, 100) for n in range(7))) == []
    assert grouped(*(fragment(n, 100) for n in range(8))) == [list(range(8))]
    assert grouped(*(fragment(n, 600) for n in range(30))) == []
    assert grouped(*(fragment(n, 600 if n % 2 else 100) for n in range(30))) == [list(range(0, 20, 2))]
    assert grouped(fragment(0, 100), fragment(1, 10_000, deleted=31), fragment(2, 100)) == [[0, 1]]
    assert grouped(fragment(0, 10_000, deleted=30)) == []
    assert grouped(*(fragment(n, 100) for n in range(100))) == [list(range(n, n + 10)) for n in range(0, 50, 10)]


def test_a_document_stays_in_one_fragment(table, monkeypatch):
    """Chunks of a document lie side by side, and a group becomes one fragment, however many rows that are."""
    monkeypatch.setattr(upkeep, "TARGET_BYTES", 30_000)
    for number in range(24):
        whole = rows({f"{number} {n}": "text" for n in range(3)}, chunks=7)
        table.commit(
            [write_fragment(table.uri, whole, "r")], hash_ids(pa.array([], pa.string())), Keys.empty(), run="r"
        )
    before = rows_of(table)
    assert compact(table, "r2") == 20
    assert sorted(rows_of(table)) == sorted(before)
    keys = table.keys()
    assert len(set(keys.ids)) == len(keys.ids) == 72
    assert len(table.dataset.get_fragments()) == 6


def test_compaction_in_workers_and_one_that_loses_rows(table):
    for number in range(8):
        apply(table, {f"{number}": "x"}, [])
    before, version = rows_of(table), table.version

    def lossy(function, calls):
        return (function(uri, number, ids[:-1]) for uri, number, ids in calls)

    with pytest.raises(RuntimeError, match="would lose rows"):
        compact(table, "r", each=lossy)
    assert EmbeddingTable.open(table.uri).version == version
    assert compact(table, "r", each=lambda function, calls: [function(*call) for call in calls]) == 8
    assert rows_of(table) == before


def test_compaction_of_one_who_is_not_alone_is_refused(table):
    for number in range(8):
        apply(table, {f"{number}": "x"}, [])
    stale = EmbeddingTable.open(table.uri)
    apply(table, {"new": "x"}, [])
    before = rows_of(table)
    with pytest.raises(InputError, match="another run is writing"):
        compact(stale, "r2")
    assert rows_of(table) == before


def test_versions_that_were_published_stay_for_a_while(table):
    with Lease.take(table.uri, "r") as table.lease:
        for number in range(5):
            apply(table, {"a": "x" * number, str(number): "y"}, ["a"])
            apply(table, {"b": "x" * number}, ["b"])
            table.publish()
        states = {version: rows_of(table, version) for version in table.kept_versions()}
        assert list(states) == [3, 5, 7, 9, 11]
        table.show(5)
        apply(table, {"c": "x"}, [])
        newest = rows_of(table)
        dropped, orphans = clean_up(table, keep_versions=2)
        assert (dropped, orphans) == (8, 0)
        assert [v["version"] for v in table.dataset.versions()] == [5, 9, 11, 12]
        assert table.kept_versions() == [5, 9, 11]
        for version in (5, 9, 11):
            assert rows_of(table, version) == states[version]
        assert rows_of(table, PUBLISHED) == states[5]
        assert rows_of(table) == newest
        assert clean_up(table, keep_versions=2) == (0, 0)


def test_files_of_no_version_go_unless_they_may_be_in_use(table):
    apply(table, {"a": "x"}, [])
    apply(table, {"b": "x"}, [])
    apply(table, {}, ["a"])
    used = files_of(table)
    write_fragment(table.uri, rows({"orphan": "x"}), "r")
    left = table.dataset.get_fragments()[-1].delete("chunk = 0")
    assert left.deletion_file is not None
    with later(table.uri, "r2") as table.lease:
        young = write_fragment(table.uri, rows({"young": "x"}), "r2")
        assert len(files_of(table)) == len(used) + 2
        assert clean_up(table, keep_versions=1)[1] == 2
        assert files_of(table, "_deletions") == set()
        table.commit([young], hash_ids(pa.array([], pa.string())), Keys.empty(), run="r2")
        assert len(rows_of(table)) == 4
        assert [row[0] for row in rows_of(table)] == ["'b'", "'b'", "'young'", "'young'"]


def test_who_lost_the_lease_deletes_nothing(table):
    apply(table, {"a": "x"}, [])
    table.publish()
    apply(table, {"a": "y"}, ["a"])
    with Lease.take(table.uri, "ours") as held:
        table.lease = held
        held.place.create(replace(held.owner, epoch=held.epoch + 1, run="theirs"))
        held._confirm()
        files = files_of(table)
        with pytest.raises(InputError, match="stood still"):
            clean_up(table, keep_versions=1)
        assert files_of(table) == files


UPKEEP = """
import sys
from pipeline.lease import Lease
from pipeline.table import EmbeddingTable
from pipeline.upkeep import clean_up, compact
from test_pipeline_table import apply
uri, seed = sys.argv[1], int(sys.argv[2])
with Lease.take(uri, f"run {seed}") as lease:
    table = EmbeddingTable.open(uri)
    table.lease = lease
    print("begun", flush=True)
    for number in range(100):
        apply(table, {str(number % 20): f"{seed} {number}"}, [str(number % 20)])
        if number % 10 == 9:
            compact(table, "r")
            table.publish()
            clean_up(table, keep_versions=2)
"""


def test_killed_at_any_moment_it_leaves_a_table_that_reads_the_same(tmp_path):
    uri = str(tmp_path / "table.lance")
    table = EmbeddingTable.create(uri, RECIPE, model="m")
    draw = random.Random(5)
    root = Path(__file__).resolve().parent
    environment = os.environ | {"PYTHONPATH": f"{root.parent}{os.pathsep}{root}"}
    for seed in range(4):
        command = [sys.executable, "-c", UPKEEP, uri, str(seed)]
        killed = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert killed.stdout.readline() == "begun\n"
        time.sleep(draw.uniform(0.02, 0.8))
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        killed.stdout.close()
        table = EmbeddingTable.open(uri)
        for version in {table.version, *table.kept_versions()}:
            opened = EmbeddingTable.open(uri, version)
            opened.dataset.validate()
            found = opened.dataset.to_table(columns=["document_id", "chunk"]).to_pylist()
            assert len({(row["document_id"], row["chunk"]) for row in found}) == len(found)
            assert len(found) % 2 == 0
    with later(uri, "last") as table.lease:
        before = contents(table)
        clean_up(table, keep_versions=1)
        compact(table, "last")
        clean_up(table, keep_versions=1)
        assert contents(table) == before
        used = {p for p in table.dataset.tracked_files().read_all()["path"].to_pylist() if p.startswith("data/")}
        assert files_of(table) == used
