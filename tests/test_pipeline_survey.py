"""The survey: a document gets one status, the first of several with one id counts, work is read back exactly."""

import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.columns import DocumentColumns
from pipeline.storage import list_sources
from pipeline.survey import CHANGED, DEAD, EMPTY, NEW, UNCHANGED, make_plan, pieces, read_work, survey_file, work_tables
from pipeline.table import Keys, hash_ids

COLUMNS = DocumentColumns()


def write(path: Path, rows: list[tuple[str, str]]) -> None:
    path.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in rows))


def hashes(values) -> np.ndarray:
    return hash_ids(pa.array(list(values), pa.string()))


def keys_of(documents: dict[str, str]) -> Keys:
    """The keys of a table that holds these documents; its text hashes are those of `read_documents`."""
    ids, texts = hashes(documents), hashes(documents.values())
    order = np.argsort(ids)
    return Keys(ids[order], texts[order], np.zeros(len(ids), np.int64))


def plan_of(folder: Path, held: dict[str, str], delete_missing: bool = False):
    keys = keys_of(held)
    surveys = [survey_file(file, COLUMNS, keys) for file in list_sources(str(folder))]
    return make_plan(surveys, keys, delete_missing=delete_missing)


def texts_of(plan, chars: int = 50) -> list[tuple[str, str]]:
    return [
        (row["document_id"], row["text"])
        for items in work_tables(plan.work, chars)
        for table in read_work(items, COLUMNS, chars)
        for row in table.to_pylist()
    ]


def test_statuses(tmp_path):
    write(tmp_path / "a.jsonl", [("new", "n"), ("old", "same"), ("edited", "after"), ("blank", " \n")])
    held = {"old": "same", "edited": "before", "gone": "x"}
    (file,) = list_sources(str(tmp_path))
    survey = survey_file(file, COLUMNS, keys_of(held))
    assert survey.status.tolist() == [NEW, UNCHANGED, CHANGED, EMPTY]
    assert survey.chars.tolist() == [1, 4, 5, 2]
    plan = plan_of(tmp_path, held)
    assert plan.counts == {"read": 4, "new": 1, "changed": 1, "unchanged": 1, "empty": 1, "duplicate": 0, "dead": 0}
    assert plan.deleted.tolist() == []
    assert plan.replaced.tolist() == hashes(["edited"]).tolist()
    assert plan_of(tmp_path, held, delete_missing=True).deleted.tolist() == hashes(["gone"]).tolist()
    assert texts_of(plan) == [("new", "n"), ("edited", "after")]


def test_first_of_duplicates_counts_over_all_files(tmp_path):
    write(tmp_path / "b.jsonl", [("x", "third"), ("y", "only")])
    write(tmp_path / "a.jsonl", [("x", "  "), ("x", "first"), ("x", "second")])
    plan = plan_of(tmp_path, {})
    assert plan.counts == {"read": 5, "new": 2, "changed": 0, "unchanged": 0, "empty": 1, "duplicate": 2, "dead": 0}
    assert texts_of(plan) == [("x", "first"), ("y", "only")]
    # The first one stands in the table: nothing to do, whatever the others say.
    assert plan_of(tmp_path, {"x": "first", "y": "only"}).work == []


def test_document_that_became_empty_leaves_the_table(tmp_path):
    write(tmp_path / "a.jsonl", [("was", ""), ("both", ""), ("both", "text")])
    plan = plan_of(tmp_path, {"was": "text", "both": "text"})
    assert plan.deleted.tolist() == hashes(["was"]).tolist()


def test_dead_rows_are_counted_and_not_deleted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": "fine", "text": "t"}\nnot json\n')
    plan = plan_of(tmp_path, {"a.jsonl#1": "readable once"}, delete_missing=True)
    assert (plan.counts["read"], plan.counts["new"], plan.counts["dead"]) == (2, 1, 1)
    assert plan.deleted.tolist() == []
    assert [row["stage"] for row in plan.dead] == ["read"]


def test_random_corpora_against_a_dictionary(tmp_path):
    draw = random.Random(11)
    for trial in range(15):
        folder = tmp_path / str(trial)
        folder.mkdir()
        ids = [f"d{draw.randrange(40)}" for _ in range(60)]
        rows = [(name, draw.choice(["", " ", "a", "bb", "c" * 40])) for name in ids]
        cuts = sorted(draw.randrange(61) for _ in range(2))
        for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, 60], strict=True)):
            write(folder / f"{number}.jsonl", rows[start:stop])
        held = {f"d{draw.randrange(50)}": draw.choice(["a", "bb", "z"]) for _ in range(20)}
        first: dict[str, str] = {}
        for name, text in rows:
            if text.strip():
                first.setdefault(name, text)
        todo = [(name, text) for name, text in first.items() if held.get(name) != text]
        plan = plan_of(folder, held, delete_missing=True)
        assert sorted(texts_of(plan, draw.choice([1, 30, 10_000]))) == sorted(todo)
        assert plan.embedded.tolist() == np.sort(hashes(name for name, _ in todo)).tolist()
        gone = [name for name in held if name not in first]
        assert plan.deleted.tolist() == np.sort(hashes(gone)).tolist()
        counts = dict(plan.counts)
        assert counts.pop("read") == sum(counts.values()) == 60


def test_rows_of_a_file_that_changed_since_are_left_out(tmp_path):
    write(tmp_path / "a.jsonl", [("a", "1"), ("b", "2"), ("c", "3")])
    plan = plan_of(tmp_path, {})
    write(tmp_path / "a.jsonl", [("a", "one"), ("new", "row"), ("c", "3")])
    assert texts_of(plan) == [("a", "one"), ("c", "3")]


def test_parquet_beyond_one_table(tmp_path):
    count = 3000
    rows = pa.table({"id": [f"d{i}" for i in range(count)], "text": [f"text {i}" for i in range(count)]})
    pq.write_table(rows, tmp_path / "a.parquet", row_group_size=700)
    held = {f"d{i}": f"text {i}" for i in range(count) if i % 1000 != 999}
    assert texts_of(plan_of(tmp_path, held)) == [(f"d{i}", f"text {i}") for i in (999, 1999, 2999)]


@pytest.mark.parametrize("chars", [1, 7, 100])
def test_pieces_cut_between_rows(chars):
    texts = ["", "abc", "d" * 50, "e", "", "f" * 8, ""]
    table = pa.table({"text": pa.array(texts, pa.large_string())})
    parts = list(pieces(table, chars))
    assert pa.concat_tables(parts)["text"].to_pylist() == texts
    assert all(len(p) == 1 or sum(map(len, p["text"].to_pylist())) <= chars for p in parts)


def test_status_codes_are_distinct():
    assert len({NEW, CHANGED, UNCHANGED, EMPTY, DEAD}) == 5
