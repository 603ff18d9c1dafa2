"""The journal: what arrives is committed once, in place of what it replaces; the distributed part end to end."""

import json
import time

import numpy as np
import pyarrow as pa
import pytest
from test_pipeline_table import RECIPE, contents, rows

from model.errors import InputError
from pipeline.apply import Journal, with_pauses
from pipeline.keys import hash_ids
from pipeline.survey import FileWork, Plan
from pipeline.table import EmbeddingTable, write_fragment


def ids_of(names) -> np.ndarray:
    return np.sort(hash_ids(pa.array(list(names), pa.string())))


@pytest.fixture
def table(tmp_path):
    return EmbeddingTable.create(str(tmp_path / "table.lance"), RECIPE, model="m")


def journal(table: EmbeddingTable, names: list[str]) -> Journal:
    ids = ids_of(names)
    work = [FileWork(None, np.arange(len(ids)), ids, 0)]  # the file is never read here
    return Journal(table, table.keys(), Plan({}, work, ids[:0], ids[:0], []), "r1")


def arrived(table: EmbeddingTable, documents: dict[str, str], **changes) -> dict:
    """A row as `EmbedAndWrite` returns it."""
    counts = {"tokens": 10, "truncated_tokens": 1, "padding_tokens": 0, "encoder_s": 0.5, "chars": 5}
    return {
        "fragment": write_fragment(table.uri, rows(documents), "r1") if documents else "",
        "ids": ids_of(documents).tobytes(),
        "dead": "[]",
        "chunks": 2 * len(documents),
        **counts,
        **changes,
    }


def test_fragments_are_committed_together_and_replace(table):
    first = journal(table, ["a", "b"])
    first.add(arrived(table, {"a": "x"}))
    first.add(arrived(table, {"b": "xy"}))
    assert contents(table) == {}
    first.commit()
    version = table.version
    first.commit()
    assert table.version == version
    assert contents(table) == {"a": [(0, 1.0), (1, 1.0)], "b": [(0, 2.0), (1, 2.0)]}
    assert (first.applied.documents, first.applied.chunks, first.applied.tokens, first.applied.commits) == (2, 4, 20, 1)
    second = journal(table, ["b", "c"])
    second.add(arrived(table, {"b": "xyz", "c": "wxyz"}))
    second.commit()
    assert table.version == version + 1
    assert contents(table)["b"] == [(0, 3.0), (1, 3.0)]
    assert len(contents(table)) == 3


def test_a_fragment_that_comes_twice_is_left_out(table):
    kept = journal(table, ["a", "b"])
    kept.add(arrived(table, {"a": "x", "b": "x"}))
    kept.add(arrived(table, {"a": "x", "b": "x"}))
    kept.commit()
    kept.add(arrived(table, {"b": "x"}))
    kept.commit()
    assert table.dataset.count_rows() == 4


def test_documents_in_part_twice_or_unplanned_stop_the_run(table):
    kept = journal(table, ["a", "b"])
    kept.add(arrived(table, {"a": "x"}))
    with pytest.raises(RuntimeError, match="second time"):
        kept.add(arrived(table, {"a": "x", "b": "x"}))
    with pytest.raises(RuntimeError, match="not planned"):
        kept.add(arrived(table, {"c": "x"}))
    kept.commit()
    assert sorted(contents(table)) == ["a"]


def test_dead_documents_are_remembered(table):
    kept = journal(table, ["a"])
    reason = {"document_id": "a", "source": "s", "stage": "tokens", "error": "why"}
    kept.add(arrived(table, {}, dead=json.dumps([reason])))
    assert kept.applied.dead == [reason]
    assert not kept.done.any()


def test_pauses_between_rows_are_told_and_errors_come_through():
    def slow():
        yield {"n": 1}
        yield {"n": 2}
        time.sleep(0.5)
        yield {"n": 3}
        raise InputError("the end")

    rows = with_pauses(slow(), 0.05)
    seen = []
    while 3 not in seen:
        row = next(rows)
        seen.append(row and row["n"])
    assert [n for n in seen if n] == [1, 2, 3]
    assert 3 <= seen.count(None) <= 10
    with pytest.raises(InputError, match="the end"):
        next(rows)
