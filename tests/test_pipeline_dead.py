"""Dead letters: one for a document, its attempts added up, gone with its reason; other recipes see none of it."""

from dataclasses import replace
from datetime import timedelta

import lance
import numpy as np
import pyarrow as pa
import pytest
from test_pipeline_table import RECIPE

from pipeline.dead import FOLDER, UNKNOWN_TEXT, Dead, DeadLetters, list_letters
from pipeline.keys import hash_ids
from pipeline.table import EmbeddingTable


def ids_of(*names: str) -> np.ndarray:
    return hash_ids(pa.array(names, pa.string()))


def dead(name: str, text: str = "text", stage: str = "embed", error: str = "why", source: str = "a.jsonl", **more):
    text_hash = hash_ids(pa.array([text], pa.string())).tobytes() if stage != "read" else UNKNOWN_TEXT
    return Dead.named(name, source, stage, error, text_hash=text_hash, **more)


def shown(table: EmbeddingTable) -> dict[str, tuple]:
    return {r["document_id"]: (r["stage"], r["attempts"], r["first_run"], r["last_run"]) for r in list_letters(table)}


@pytest.fixture
def table(tmp_path):
    return EmbeddingTable.create(str(tmp_path / "table.lance"), RECIPE, model="m")


def test_no_letters_make_no_dataset(table, tmp_path):
    letters = DeadLetters(table)
    letters.record([], "r1")
    letters.remove(ids_of("a"))
    letters.tidy()
    assert (len(letters), len(letters.keys().ids), list_letters(table)) == (0, 0, [])
    assert letters.outdated(ids_of(), ids_of(), ["a.jsonl"], complete=True).tolist() == []
    assert not (tmp_path / "table.lance" / FOLDER).exists()


def test_a_rerun_doubles_nothing_and_counts_attempts(table):
    DeadLetters(table).record([dead("a"), dead("b"), dead("b")], "r1")
    DeadLetters(table).record([dead("a", stage="quarantine", attempts=2), dead("b", text="changed")], "r2")
    assert shown(table) == {"a": ("quarantine", 3, "r1", "r2"), "b": ("embed", 1, "r2", "r2")}


def test_an_unreadable_row_that_says_the_same_is_left_as_it_is(table):
    letters = DeadLetters(table)
    letters.record([dead("a#3", stage="read", error="line 4 is not JSON")], "r1")
    version = letters.dataset.version
    letters.record([dead("a#3", stage="read", error="line 4 is not JSON")], "r2")
    assert letters.dataset.version == version
    letters.record([dead("a#3", stage="read", error="line 4 is a JSON list")], "r3")
    assert shown(table) == {"a#3": ("read", 2, "r1", "r3")}


def test_keys_know_which_text_died(table):
    names = [f"d{i}" for i in range(200)]
    letters = DeadLetters(table)
    letters.record([dead(name, text=name) for name in names], "r1")
    letters.record([dead("broken", stage="read")], "r1")
    keys = DeadLetters(table).keys()
    assert keys.unchanged(ids_of(*names), ids_of(*names)).all()
    assert not keys.unchanged(ids_of(*names), ids_of(*names[::-1])).any()
    assert not keys.unchanged(ids_of("broken", "other"), ids_of("broken", "other")).any()
    assert letters.known(ids_of("d7", "other", "broken")).tolist() == [True, False, True]


def test_remove_and_tidy(table):
    letters = DeadLetters(table)
    letters.record([dead("a"), dead("b")], "r1")
    letters.record([dead("c")], "r2")
    letters.remove(ids_of("b", "unknown"))
    letters.remove(ids_of("b"))
    assert sorted(shown(table)) == ["a", "c"]
    letters.tidy()
    assert sorted(shown(table)) == ["a", "c"]
    assert len(letters.dataset.get_fragments()) == 1
    letters.remove(ids_of("a", "c"))
    assert (len(letters), shown(table)) == (0, {})


def test_outdated_letters(table):
    letters = DeadLetters(table)
    letters.record([dead("still", source="read"), dead("fixed", source="read"), dead("elsewhere", source="not")], "r1")
    letters.record([dead("moved", source="not"), dead("vanished", source=None)], "r1")
    found = letters.outdated(ids_of("still"), ids_of("moved"), ["read"], complete=False)
    assert sorted(found.tolist()) == sorted(ids_of("fixed", "moved").tolist())
    found = letters.outdated(ids_of("still"), ids_of(), ["read"], complete=True)
    assert sorted(found.tolist()) == sorted(ids_of("fixed", "elsewhere", "moved", "vanished").tolist())


def test_other_recipes_do_not_see_them_and_clean_up_of_the_table_leaves_them(table):
    DeadLetters(table).record([dead("a")], "r1")
    other = EmbeddingTable(table.uri, table.dataset)
    other.fingerprint = replace(RECIPE, dim=8).fingerprint()
    assert len(DeadLetters(other)) == 0
    DeadLetters(other).record([dead("a", error="another reason")], "r2")
    DeadLetters(other).remove(ids_of("a"))
    lance.dataset(table.uri).cleanup_old_versions(older_than=timedelta(0), delete_unverified=True)
    assert shown(table) == {"a": ("embed", 1, "r1", "r1")}


def test_letters_move_with_a_migration(table, tmp_path):
    grown = EmbeddingTable.create(str(tmp_path / "next.lance"), replace(RECIPE, dim=8), model="m")
    DeadLetters(table).adopt(DeadLetters(grown))
    DeadLetters(table).record([dead("a", error="under the old recipe")], "r1")
    DeadLetters(grown).record([dead("a"), dead("b", attempts=2)], "r2")
    for _ in range(2):  # a switch that was killed is done again
        DeadLetters(table).adopt(DeadLetters(grown))
    assert shown(table) == {"a": ("embed", 1, "r1", "r1")}
    table.fingerprint = grown.fingerprint
    assert shown(table) == shown(grown) == {"a": ("embed", 1, "r2", "r2"), "b": ("embed", 2, "r2", "r2")}


def test_a_writer_without_its_lease_changes_no_letter(table):
    class Lost:
        def check(self):
            raise InterruptedError("lost")

    letters = DeadLetters(table)
    letters.record([dead("a")], "r1")
    table.lease = Lost()
    with pytest.raises(InterruptedError):
        letters.record([dead("b")], "r1")
    with pytest.raises(InterruptedError):
        letters.remove(ids_of("a"))
    table.lease = None
    assert sorted(shown(table)) == ["a"]


def test_on_s3(s3_server, monkeypatch):
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    table = EmbeddingTable.create("s3://bucket/dead/table.lance", RECIPE, model="m")
    assert list_letters(table) == []
    letters = DeadLetters(table)
    letters.record([dead("a"), dead("b")], "r1")
    letters.record([dead("a")], "r2")
    letters.remove(ids_of("b"))
    letters.tidy()
    assert shown(table) == {"a": ("embed", 2, "r1", "r2")}
