"""Work: cut by size and by file, positions without a gap, read back exactly."""

import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline import work
from pipeline.columns import DocumentColumns
from pipeline.keys import hash_ids
from pipeline.storage import SourceFile, list_sources
from pipeline.work import POSITION, ROW_BITS, Todo, WorkTable, cut_work, pieces, read_work

COLUMNS = DocumentColumns()


def cut(files: list[SourceFile], chars: int, *todos: Todo, urgency: int = 0, number: int = 0, position: int = 0):
    stream = cut_work(files, number, position, urgency, chars, *todos)
    return [WorkTable(next(stream), *about) for about in stream]


def todo_of(chosen: list[tuple[int, int, str, int]], urgency: int = 0) -> Todo:
    """Out of (file, row, id, characters)."""
    chosen = sorted(chosen)
    return Todo(
        np.array([(number << ROW_BITS) + row for number, row, _, _ in chosen], np.int64),
        hash_ids(pa.array([name for _, _, name, _ in chosen], pa.string())),
        np.array([chars for *_, chars in chosen], np.int32),
        np.full(len(chosen), urgency, np.uint8),
    )


def write(path: Path, rows: list[tuple[str, str]]) -> None:
    path.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in rows))


def read(items: list[WorkTable], chars: int = 50) -> list[tuple[int, str, str]]:
    tables = [table for item in items for table in read_work(item.load(), COLUMNS, chars)]
    return [(row[POSITION], row["document_id"], row["text"]) for table in tables for row in table.to_pylist()]


def test_random_choices_are_read_back_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "MOST_SCANS", 3)
    draw = random.Random(7)
    written = []
    for number in range(4):
        rows = [(f"{number}-{row}", "x" * draw.randrange(1, 60)) for row in range(draw.randrange(1, 40))]
        write(tmp_path / f"{number}.jsonl", rows)
        written.append(rows)
    files = list_sources(str(tmp_path))
    for _ in range(20):
        every = [(n, row, name, len(text)) for n, rows in enumerate(written) for row, (name, text) in enumerate(rows)]
        chosen = sorted(draw.sample(every, draw.randrange(1, len(every))))
        # Partitions of the id space: each has some of every file.
        deal = [draw.randrange(3) for _ in chosen]
        todos = [todo_of([c for c, d in zip(chosen, deal, strict=True) if d == part]) for part in range(3)]
        items = cut(files, draw.choice([1, 100, 10_000]), *todos, position=5)
        expected = [(5 + i, name, written[n][row][1]) for i, (n, row, name, _) in enumerate(chosen)]
        assert read(items, draw.choice([1, 70, 10_000])) == expected
        assert sum(item.documents for item in items) == len(chosen)
        assert sum(item.chars for item in items) == sum(chars for *_, chars in chosen)


def test_only_documents_of_these_files_and_this_urgency(tmp_path):
    for number in range(3):
        write(tmp_path / f"{number}.jsonl", [(f"{number}", "text")])
    files = list_sources(str(tmp_path))
    first = todo_of([(0, 0, "0", 4), (1, 0, "1", 4)])
    second = todo_of([(2, 0, "2", 4)], urgency=1)
    assert read(cut(files[1:], 100, first, second, number=1)) == [(0, "1", "text")]
    assert read(cut(files[1:], 100, first, second, number=1, urgency=1)) == [(0, "2", "text")]
    assert cut(files, 100, first, second, urgency=2) == []


def test_a_file_of_lines_is_cut_into_few_tables(tmp_path):
    rows = [(f"{row}", "x" * 10) for row in range(100)]
    write(tmp_path / "a.jsonl", rows)
    todo = todo_of([(0, row, name, 10) for row, (name, _) in enumerate(rows)])
    items = cut(list_sources(str(tmp_path)), 20, todo)
    assert len(items) == -(-1000 // (1000 // work.MOST_SCANS // 10 * 10)) == 9
    assert [text for _, _, text in read(items)] == ["x" * 10] * 100


def test_rows_of_a_file_that_changed_since_are_left_out(tmp_path):
    write(tmp_path / "a.jsonl", [("a", "1"), ("b", "2"), ("c", "3")])
    items = cut(list_sources(str(tmp_path)), 50, todo_of([(0, 0, "a", 1), (0, 1, "b", 1), (0, 2, "c", 1)]))
    write(tmp_path / "a.jsonl", [("a", "one"), ("new", "row"), ("c", "3")])
    assert read(items) == [(0, "a", "one"), (2, "c", "3")]


@pytest.mark.parametrize("chars", [1, 7, 100])
def test_pieces_cut_between_rows(chars):
    texts = ["", "abc", "d" * 50, "e", "", "f" * 8, ""]
    table = pa.table({"text": pa.array(texts, pa.large_string())})
    parts = list(pieces(table, chars))
    assert pa.concat_tables(parts)["text"].to_pylist() == texts
    assert all(len(p) == 1 or sum(map(len, p["text"].to_pylist())) <= chars for p in parts)
