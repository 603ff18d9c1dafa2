"""The survey: a document gets one status, the first of several with one id counts, however the id space is cut."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline.survey
from pipeline import sources
from pipeline.columns import DocumentColumns
from pipeline.keys import Keys, hash_ids
from pipeline.storage import list_sources
from pipeline.survey import BACKFILL, CHANGED, NEW, UNCHANGED, Options, Plan, Tasks, halves, make_plan, partitions_of
from pipeline.work import read_work

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


class HeldTable:
    """Stands where a table does: it holds these keys in one fragment."""

    def __init__(self, held: dict[str, str]) -> None:
        self.held, self.uri, self.version = keys_of(held), "", 1

    def fragment_groups(self, rows_per_group: int) -> list[list[int]]:
        return [[0]] if len(self.held.ids) else []


def plan_of(folder: Path, held: dict[str, str], chars: int = 50, table: Path | None = None, **options) -> Plan:
    return plan_files(list_sources(str(folder)), held, chars, table or folder / "no.table", table is not None, options)


def plan_files(files, held: dict[str, str], chars: int, table: Path, keep: bool, options) -> Plan:
    def survey_held(uri, version, fragments, num_partitions):
        keys = keys_of(held)
        yield len(keys.ids)
        for number in range(num_partitions):
            yield keys.take(np.flatnonzero(partitions_of(keys.ids, num_partitions) == number))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.survey, "survey_table", survey_held)
        return make_plan(
            files, COLUMNS, str(table), HeldTable(held), Options(**options), Tasks(), least_chars=chars, keep=keep
        )


def texts_of(plan: Plan, chars: int = 50) -> list[tuple[str, str]]:
    """What the work reads, in the order of its positions, which are complete."""
    rows = [row for item in plan.work for table in read_work(item.load(), COLUMNS, chars) for row in table.to_pylist()]
    assert [row["nightloom.position"] for row in rows] == list(range(plan.num_documents))
    return [(row["document_id"], row["text"]) for row in rows]


def ids(*names: str) -> list[bytes]:
    return np.sort(hashes(names)).tolist()


def test_statuses(tmp_path):
    write(tmp_path / "a.jsonl", [("new", "n"), ("old", "same"), ("edited", "after"), ("blank", " \n")])
    held = {"old": "same", "edited": "before", "gone": "x"}
    plan = plan_of(tmp_path, held)
    assert plan.counts == {"read": 4, "new": 1, "changed": 1, "unchanged": 1, "empty": 1, "duplicate": 0, "dead": 0}
    assert plan.deleted.tolist() == []
    assert plan.removals.ids.tolist() == ids("edited")
    plan = plan_of(tmp_path, held, delete_missing=True)
    assert plan.deleted.tolist() == ids("gone")
    assert plan.removals.ids.tolist() == ids("edited", "gone")
    # What readers have in an outdated form goes first.
    assert texts_of(plan) == [("edited", "after"), ("new", "n")]
    assert (plan.num_documents, plan.chars) == (2, 6)


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
    assert plan.deleted.tolist() == ids("was")


def test_dead_rows_are_counted_and_not_deleted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": "fine", "text": "t"}\nnot json\n')
    plan = plan_of(tmp_path, {"a.jsonl#1": "readable once"}, delete_missing=True)
    assert (plan.counts["read"], plan.counts["new"], plan.counts["dead"]) == (2, 1, 1)
    assert plan.deleted.tolist() == []
    assert [row["stage"] for row in plan.dead] == ["read"]


def test_documents_that_failed_before_are_left_alone_until_their_text_changes(tmp_path):
    write(tmp_path / "a.jsonl", [("poison", "p"), ("poison", "other"), ("cured", "new text"), ("fine", "f")])
    letters = keys_of({"poison": "p", "cured": "old text", "gone": "g"})
    plan = plan_of(tmp_path, {}, letters=letters)
    assert plan.counts == {"read": 4, "new": 2, "changed": 0, "unchanged": 0, "empty": 0, "duplicate": 1, "dead": 1}
    assert texts_of(plan) == [("cured", "new text"), ("fine", "f")]
    assert plan.buried.tolist() == ids("poison")
    assert plan.seen.tolist() == ids("poison", "cured")


def test_what_readers_have_under_another_recipe_comes_last(tmp_path):
    write(tmp_path / "a.jsonl", [("a", "old"), ("b", "edited"), ("c", "new"), ("d", "outdated")])
    plan = plan_of(tmp_path, {"d": "before"}, backfill=keys_of({"a": "old", "b": "before", "d": "outdated"}))
    assert [name for name, _ in texts_of(plan)] == ["b", "c", "a", "d"]
    assert plan.counts["changed"] == 1
    assert plan.removals.ids.tolist() == ids("d")
    assert BACKFILL == 2


def test_random_corpora_against_a_dictionary(tmp_path, monkeypatch):
    draw = random.Random(11)
    monkeypatch.setattr(sources, "RACY_NS", -(10**18))
    for trial in range(30):
        monkeypatch.setattr(pipeline.survey, "BYTES_PER_GROUP", draw.choice([1, 500, 10**6]))
        folder = tmp_path / str(trial)
        folder.mkdir()
        names = [f"d{draw.randrange(40)}" for _ in range(60)]
        rows = [(name, draw.choice(["", " ", "a", "bb", "c" * 40])) for name in names]
        cuts = sorted(draw.randrange(61) for _ in range(2))
        for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, 60], strict=True)):
            write(folder / f"{number}.jsonl", rows[start:stop])
        held = {f"d{draw.randrange(50)}": draw.choice(["a", "bb", "z"]) for _ in range(20)}
        first: dict[str, str] = {}
        for name, text in rows:
            if text.strip():
                first.setdefault(name, text)
        todo = [(name, text) for name, text in first.items() if held.get(name) != text]
        gone = [name for name in held if name not in first]
        options = {"delete_missing": True, "num_partitions": draw.choice([1, 3, 8])}
        table = tmp_path / f"{trial}.table"
        files = list_sources(str(folder))
        # The second time there are no files: what they held is on record.
        for chars in (draw.choice([1, 30, 10_000]), 50):
            plan = plan_files(files, held, chars, table, True, options)
            if folder.exists():
                assert sorted(texts_of(plan, chars)) == sorted(todo)
                shutil.rmtree(folder)
            assert plan.num_documents == len(todo)
            assert np.sort(plan.deleted).tolist() == ids(*gone)
            replaced = [name for name, _ in todo if name in held]
            assert plan.removals.ids.tolist() == ids(*gone, *replaced)
            counts = dict(plan.counts)
            assert counts.pop("read") == sum(counts.values()) == 60


def test_parquet_beyond_one_table(tmp_path):
    count = 3000
    rows = pa.table({"id": [f"d{i}" for i in range(count)], "text": [f"text {i}" for i in range(count)]})
    pq.write_table(rows, tmp_path / "a.parquet", row_group_size=700)
    held = {f"d{i}": f"text {i}" for i in range(count) if i % 1000 != 999}
    assert texts_of(plan_of(tmp_path, held)) == [(f"d{i}", f"text {i}") for i in (999, 1999, 2999)]


def test_a_large_parquet_file_is_surveyed_and_read_in_parts(tmp_path, monkeypatch):
    count = 3000
    rows = pa.table({"text": [f"text {i % 2900}" for i in range(count)]})
    pq.write_table(rows, tmp_path / "a.parquet", row_group_size=170)
    whole = plan_of(tmp_path, {}, 10**6)
    assert [item.documents for item in whole.work] == [count]
    monkeypatch.setattr(sources, "PART_BYTES", 2000)
    monkeypatch.setattr(pipeline.survey, "BYTES_PER_GROUP", 1)
    parts = plan_of(tmp_path, {}, 1000)
    assert max(item.chars for item in parts.work) < 2 * whole.chars / 8
    assert len(parts.work) > 3
    assert parts.counts == whole.counts
    # Ids are made of row numbers here: they do not depend on the parts.
    assert texts_of(parts) == texts_of(whole) == [(f"a.parquet#{i}", f"text {i % 2900}") for i in range(count)]


def test_halves_sort_like_keys():
    draw = np.random.default_rng(5)
    keys = np.frombuffer(draw.bytes(16 * 500), "S16")
    high, low = halves(keys)
    assert keys[np.lexsort((low, high))].tolist() == np.sort(keys).tolist()
    assert sorted(set(partitions_of(keys, 7).tolist())) == list(range(7))


def test_status_codes_are_distinct():
    assert len({NEW, CHANGED, UNCHANGED}) == 3
