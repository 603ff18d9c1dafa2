"""The journal: what arrives is committed once, in place of what it replaces; the distributed part end to end."""

import json
import threading

import numpy as np
import pyarrow as pa
import pytest
from test_pipeline_table import RECIPE, contents, rows

from model.errors import InputError
from pipeline.apply import Journal, Refused, with_pauses
from pipeline.columns import DocumentColumns
from pipeline.dead import DeadLetters, list_letters
from pipeline.keys import hash_ids
from pipeline.probes import TEXTS, make_probes, read_canaries, to_bytes
from pipeline.survey import Plan
from pipeline.table import EmbeddingTable, write_fragment
from pipeline.work import WorkTable


def ids_of(names) -> np.ndarray:
    return np.sort(hash_ids(pa.array(list(names), pa.string())))


@pytest.fixture
def table(tmp_path):
    return EmbeddingTable.create(str(tmp_path / "table.lance"), RECIPE, model="m")


def journal(table: EmbeddingTable, names: list[str], **more) -> Journal:
    """A journal of a plan whose documents have the positions of the alphabet."""
    gone, count = table.keys(), ord(max(names)) - ord("a") + 1
    return Journal(table, gone, Plan({}, [WorkTable(None, count, 0)], gone, gone.ids[:0], []), "r1", **more)


def arrived(table: EmbeddingTable, documents: dict[str, str], **changes) -> dict:
    """A row as `EmbedAndWrite` returns it."""
    counts = {
        "reused": 0,
        "tokens": 10,
        "truncated_tokens": 1,
        "padding_tokens": 0,
        "encoder_s": 0.5,
        "chars": 5,
        "lengths": [1],
    }
    return {
        "fragment": write_fragment(table.uri, rows(documents), "r1") if documents else "",
        "ids": ids_of(documents).tobytes(),
        "positions": np.array([ord(name) - ord("a") for name in documents], np.int64).tobytes(),
        "dead": "[]",
        "probes": b"",
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


def test_documents_in_part_twice_stop_the_run(table):
    kept = journal(table, ["a", "b"])
    kept.add(arrived(table, {"a": "x"}))
    with pytest.raises(RuntimeError, match="second time"):
        kept.add(arrived(table, {"a": "x", "b": "x"}))
    kept.commit()
    assert sorted(contents(table)) == ["a"]


def test_dead_documents_get_letters_before_the_commit_and_lose_them_with_it(table):
    reason = {"document_id": "a", "source": "s", "stage": "tokens", "error": "why", "text_hash": "01" * 16}
    first = journal(table, ["a", "b"], letters=DeadLetters(table))
    first.add(arrived(table, {"b": "x"}, dead=json.dumps([reason])))
    first.commit()
    first.add(arrived(table, {}, dead=json.dumps([reason])))  # a repeated task
    first.commit()
    assert [letter.shown() for letter in first.applied.dead.values()] == [
        {"document_id": "a", "source": "s", "stage": "tokens", "error": "why", "attempts": 1}
    ]
    assert [(row["document_id"], row["attempts"]) for row in list_letters(table)] == [("a", 1)]
    assert first.done.tolist() == [False, True]

    second = journal(table, ["a"], letters=DeadLetters(table))
    second.add(arrived(table, {"a": "x"}))
    table.commit = None  # the run dies right before it commits: the letter is gone, the document is not there
    with pytest.raises(TypeError):
        second.commit()
    assert list_letters(table) == []
    assert sorted(contents(table)) == ["b"]


def probe_bytes(**vectors: list[float]) -> bytes:
    values = pa.array([x for vector in vectors.values() for x in vector], pa.float32())
    chunk = pa.array([-1] * len(vectors), pa.int32())
    columns = {"document_id": [name.replace("_", "-") for name in vectors], "chunk": chunk}
    return to_bytes(pa.table(columns | {"vector": pa.FixedSizeListArray.from_arrays(values, 2)}))


def test_the_first_canaries_are_kept_and_later_workers_compared_with_them(table):
    probes = make_probes(table.uri, table.recipe, table.dataset, [], DocumentColumns(), "r1")
    first = journal(table, ["a", "b", "c"], probes=probes)
    first.add(arrived(table, {"a": "x"}, probes=probe_bytes(canary_0=[1, 0], sample_0=[5, 5])))
    texts, kept = read_canaries(table.uri, table.fingerprint)
    assert list(texts) == list(TEXTS)
    assert {key: vector.tolist() for key, vector in kept.items()} == {("canary-0", -1): [1, 0]}
    first.add(arrived(table, {"b": "x"}, probes=probe_bytes(canary_0=[2, 0])))
    with pytest.raises(Refused, match=r"canaries: embedded again, 'canary-0' is 0\.29 from"):
        first.add(arrived(table, {"c": "x"}, probes=probe_bytes(canary_0=[1, 1])))
    first.commit()
    assert sorted(contents(table)) == ["a", "b"]
    assert first.applied.probed["canaries"]["distance"] == pytest.approx(1 - 0.5**0.5)


def test_canaries_that_are_not_finite_are_never_kept(table):
    probes = make_probes(table.uri, table.recipe, table.dataset, [], DocumentColumns(), "r1")
    with pytest.raises(Refused, match="canaries"):
        journal(table, ["a"], probes=probes).add(arrived(table, {"a": "x"}, probes=probe_bytes(canary_0=[np.nan, 0])))
    assert read_canaries(table.uri, table.fingerprint) == (TEXTS, None)


def test_a_gate_that_is_off_refuses_nothing(table):
    probes = make_probes(table.uri, table.recipe, table.dataset, [], DocumentColumns(), "r1")
    kept = journal(table, ["a"], probes=probes, off=["canaries"])
    kept.add(arrived(table, {"a": "x"}, probes=probe_bytes(canary_0=[np.nan, 0])))
    assert kept.applied.probed["canaries"]["distance"] == 2
    assert read_canaries(table.uri, table.fingerprint) == (TEXTS, None)


def test_pauses_between_rows_are_told_and_errors_come_through():
    waited = threading.Event()

    def slow():
        yield {"n": 1}
        yield {"n": 2}
        waited.wait(60)
        yield {"n": 3}
        raise InputError("the end")

    rows = with_pauses(slow(), 0.05)
    seen = []
    while 3 not in seen:
        row = next(rows)
        seen.append(row and row["n"])
        if seen[-3:] == [None] * 3:
            waited.set()
    assert [n for n in seen if n] == [1, 2, 3]
    assert waited.is_set()
    with pytest.raises(InputError, match="the end"):
        next(rows)
