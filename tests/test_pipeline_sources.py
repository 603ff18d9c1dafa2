"""Records of what files hold: used exactly as long as the file is the one that was read, and never wrong."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import sources
from pipeline.columns import DocumentColumns
from pipeline.keys import hash_ids
from pipeline.sources import (
    DEAD,
    EMPTY,
    TEXT,
    FilePart,
    Holding,
    Records,
    read_part,
    read_recorded,
    record,
    split_files,
)
from pipeline.storage import SourceFile, list_sources, s3fs_filesystem

COLUMNS = DocumentColumns()


@pytest.fixture
def at_rest(monkeypatch):
    """Files count as unchanging from the moment they are written; the trap this opens has a test of its own."""
    monkeypatch.setattr(sources, "RACY_NS", 0)


def listed(folder: Path | str) -> list[SourceFile]:
    return list_sources(str(folder))


def keep(uri: Path | str, files: list[SourceFile], columns: DocumentColumns = COLUMNS) -> list[Holding]:
    """Read all files and record them, as a survey does."""
    begun_ns = time.time_ns()
    parts = split_files(enumerate(files), columns)
    holdings = [read_part(part, columns) for part in parts]
    record(str(uri), parts, holdings, columns, begun_ns)
    return holdings


def unknown(uri: Path | str, files: list[SourceFile], columns: DocumentColumns = COLUMNS) -> list[str]:
    return [file.relative for _, file in Records(str(uri), files, columns).unknown]


def recalled(uri: Path | str, files: list[SourceFile], columns: DocumentColumns = COLUMNS) -> list[Holding]:
    found = [h for item in Records(str(uri), files, columns).found for h in read_recorded(str(uri), item, columns)]
    return sorted(found, key=lambda holding: (holding.number, holding.first_row))


def assert_same(left: list[Holding], right: list[Holding]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert (one.number, one.first_row, one.dead) == (other.number, other.first_row, other.dead)
        for name in ("ids", "hashes", "chars", "kinds"):
            assert getattr(one, name).tolist() == getattr(other, name).tolist()


def write_files(folder: Path) -> None:
    folder.mkdir()
    lines = [{"id": "a", "text": "x"}, {"id": "b", "text": " "}, {"text": "no id"}]
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "no json\n")
    (folder / "note.txt").write_text("a note")
    (folder / "empty.md").write_text("")
    table = pa.table({"id": [f"p{i}" for i in range(50)], "text": [f"text {i}" for i in range(50)]})
    pq.write_table(table, folder / "rows.parquet", row_group_size=10)


def test_what_a_file_holds(tmp_path):
    write_files(tmp_path / "in")
    held = read_part(FilePart(listed(tmp_path / "in")[1], 1), COLUMNS)
    assert held.kinds.tolist() == [TEXT, EMPTY, TEXT, DEAD]
    assert held.chars.tolist() == [1, 1, 5, 0]
    assert held.ids.tolist() == hash_ids(pa.array(["a", "b", "lines.jsonl#2", "lines.jsonl#3"])).tolist()
    assert [row["document_id"] for row in held.dead] == ["lines.jsonl#3"]


@pytest.mark.usefixtures("at_rest")
@pytest.mark.parametrize("part_bytes", [64_000_000, 300])
def test_records_are_what_was_read(tmp_path, monkeypatch, part_bytes):
    monkeypatch.setattr(sources, "PART_BYTES", part_bytes)
    write_files(tmp_path / "in")
    files = listed(tmp_path / "in")
    assert unknown(tmp_path / "t", files) == [file.relative for file in files]
    held = keep(tmp_path / "t", files)
    assert len(held) == (4 if part_bytes > 300 else 6)
    assert unknown(tmp_path / "t", files) == []
    assert_same(recalled(tmp_path / "t", files), held)
    # Recorded twice, by a task that was repeated: counted once.
    keep(tmp_path / "t", files)
    assert_same(recalled(tmp_path / "t", files), held)
    # Other settings read other documents out of the same files.
    assert len(unknown(tmp_path / "t", files, DocumentColumns(text=("id", "text")))) == len(files)


@pytest.mark.usefixtures("at_rest")
def test_a_file_of_which_a_part_is_missing_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PART_BYTES", 300)
    write_files(tmp_path / "in")
    files = listed(tmp_path / "in" / "rows.parquet")
    parts = split_files(enumerate(files), COLUMNS)
    record(str(tmp_path / "t"), parts[1:], [read_part(part, COLUMNS) for part in parts[1:]], COLUMNS, time.time_ns())
    assert unknown(tmp_path / "t", files) == ["rows.parquet"]
    assert recalled(tmp_path / "t", files) == []


@pytest.mark.usefixtures("at_rest")
def test_any_change_of_a_file_is_seen(tmp_path):
    write_files(tmp_path / "in")
    note = tmp_path / "in" / "note.txt"
    keep(tmp_path / "t", listed(tmp_path / "in"))

    def seen() -> bool:
        found = unknown(tmp_path / "t", listed(tmp_path / "in")) == ["note.txt"]
        keep(tmp_path / "t", listed(tmp_path / "in"))
        return found

    assert not seen()
    note.write_text("a longer note")
    assert seen()
    note.write_text("a l0nger note")  # as long as before
    assert seen()
    times = note.stat()
    note.write_text("a lOnger note")
    os.utime(note, ns=(times.st_atime_ns, times.st_mtime_ns))  # and as old, for who looks at the modification time
    assert seen()
    other = tmp_path / "other"
    other.write_text("a lonqer note")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.rename(note)
    assert seen()
    assert not seen()


def test_a_file_that_had_just_changed_is_not_trusted(tmp_path):
    """A change within the same tick as the one before leaves no trace in the listing: so it must not be recorded."""
    write_files(tmp_path / "in")
    files = listed(tmp_path / "in")
    keep(tmp_path / "t", files)
    assert len(unknown(tmp_path / "t", files)) == len(files)
    parts = split_files(enumerate(files), COLUMNS)
    late = max(file.mtime_ns for file in files) + sources.RACY_NS
    held = [read_part(part, COLUMNS) for part in parts]
    record(str(tmp_path / "t"), parts, held, COLUMNS, late)
    newest = [file.relative for file in files if file.mtime_ns + sources.RACY_NS == late]
    assert unknown(tmp_path / "t", files) == newest
    record(str(tmp_path / "t"), parts, held, COLUMNS, late + 1)
    assert unknown(tmp_path / "t", files) == []
    # A time in the future says nothing at all.
    ahead = time.time_ns() + 10**15
    os.utime(tmp_path / "in" / "note.txt", ns=(ahead, ahead))
    files = listed(tmp_path / "in")
    record(str(tmp_path / "t"), parts, held, COLUMNS, time.time_ns() + 10**10)
    assert unknown(tmp_path / "t", files) == ["note.txt"]


@pytest.mark.usefixtures("at_rest")
def test_a_text_file_that_could_not_be_read_is_tried_again(tmp_path):
    write_files(tmp_path / "in")
    files = listed(tmp_path / "in")
    (tmp_path / "in" / "note.txt").unlink()
    held = keep(tmp_path / "t", files)
    assert held[2].kinds.tolist() == [DEAD]
    assert unknown(tmp_path / "t", files) == ["note.txt"]


@pytest.mark.usefixtures("at_rest")
def test_damaged_records_are_only_a_loss_of_time(tmp_path, caplog):
    write_files(tmp_path / "in")
    files = listed(tmp_path / "in")
    held = keep(tmp_path / "t", files)
    records = Records(str(tmp_path / "t"), files, COLUMNS)
    (path,) = (tmp_path / "t" / "_sources").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes(20) + whole[120:])
    again = [h for item in records.found for h in read_recorded(str(tmp_path / "t"), item, COLUMNS)]
    assert_same(sorted(again, key=lambda h: h.number), held)
    path.write_bytes(b"cut off")
    assert unknown(tmp_path / "t", files) == [file.relative for file in files]
    assert "left out" in caplog.text


@pytest.mark.usefixtures("at_rest")
def test_many_small_records_are_merged_and_outdated_ones_dropped(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number:02}.txt").write_text(f"text {number}")
        keep(tmp_path / "t", listed(folder)[-1:])
    (folder / "00.txt").unlink()
    (folder / "01.txt").write_text("other")
    files = listed(folder)
    records = Records(str(tmp_path / "t"), files, COLUMNS)
    before = recalled(tmp_path / "t", files)
    assert [file.relative for _, file in records.unknown] == ["01.txt"]
    records.tidy()
    shards = list((tmp_path / "t" / "_sources").iterdir())
    assert len(shards) == 1
    assert pq.read_table(shards[0]).num_rows == 28
    assert_same(recalled(tmp_path / "t", files), before)
    records = Records(str(tmp_path / "t"), files, COLUMNS)
    records.tidy()
    assert list((tmp_path / "t" / "_sources").iterdir()) == shards


@pytest.mark.usefixtures("at_rest")
def test_records_are_compact(tmp_path):
    rows = pa.table({"id": [f"d{i}" for i in range(20_000)], "text": [f"text {i} " * 9 for i in range(20_000)]})
    pq.write_table(rows, tmp_path / "a.parquet")
    keep(tmp_path / "t", listed(tmp_path / "a.parquet"))
    (path,) = (tmp_path / "t" / "_sources").iterdir()
    assert path.stat().st_size < 40 * 20_000


@pytest.mark.usefixtures("at_rest")
def test_records_on_s3(tmp_path, s3_server, monkeypatch):
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    write_files(tmp_path / "in")
    s3 = s3fs_filesystem()
    s3.put(str(tmp_path / "in"), "bucket/sources/in", recursive=True)
    table = "s3://bucket/sources/t"
    files = listed("s3://bucket/sources/in")
    time.sleep(1.1)  # objects are stamped with whole seconds
    held = keep(table, files)
    assert unknown(table, files) == []
    assert_same(recalled(table, files), held)
    s3.pipe_file(files[2].path.removeprefix("s3://"), b"a nOte")
    assert unknown(table, listed("s3://bucket/sources/in")) == ["note.txt"]
    assert np.all([file.etag for file in files])
