"""The table: fragments count when committed, changed documents are replaced in one step, writers exclude each other."""

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest
from seaweed import Proxy, Trouble
from test_pipeline_recipe import RECIPE as FULL_RECIPE

from model.errors import InputError
from pipeline.keys import Keys, hash_ids
from pipeline.lease import Lease
from pipeline.table import PUBLISHED, EmbeddingTable, table_schema, write_fragment

RECIPE = replace(FULL_RECIPE, dim=4)
ODD_IDS = ["it's", 'a "quoted" one', "back\\slash", "nul\x00inside", "trailing nul\x00", "", "\U0001f600", "a\nb", "%_"]


def rows(documents: dict[str, str], chunks: int = 2, **carried: list) -> pa.Table:
    """Finished rows of documents {id: text}, `chunks` rows each; a vector holds the text's length and the chunk."""
    ids = [name for name in documents for _ in range(chunks)]
    hashes = hash_ids(pa.array(documents.values(), pa.string()))
    count = len(ids)
    values = np.array(
        [[len(documents[name]), chunk % chunks, 0, 1] for chunk, name in enumerate(ids)], dtype=np.float32
    )
    columns = {
        "document_id": pa.array(ids, pa.string()),
        "chunk": pa.array(list(range(chunks)) * len(documents), pa.int32()),
        **{name: pa.array([0] * count, pa.int64()) for name in ("char_start", "char_end", "token_start", "token_end")},
        "text_hash": pa.array([h for h in hashes.tolist() for _ in range(chunks)], pa.binary(16)),
        "source": pa.array(["corpus.txt"] * count, pa.string()),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), 4),
    }
    return pa.table(columns | {name: pa.array(value) for name, value in carried.items()})


def contents(table: EmbeddingTable) -> dict[str, list[tuple[int, float]]]:
    """{id: [(chunk, length of the text)]} of the newest version."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in lance.dataset(table.uri).to_table().to_pylist():
        found.setdefault(row["document_id"], []).append((row["chunk"], row["vector"][0]))
    return {name: sorted(chunks) for name, chunks in found.items()}


@pytest.fixture
def table(tmp_path):
    return EmbeddingTable.create(str(tmp_path / "table.lance"), RECIPE, model="models/tiny")


def apply(table: EmbeddingTable, documents: dict[str, str], removed: list[str], keys: Keys | None = None) -> int:
    """Write `documents` as one fragment and commit it, replacing and deleting `removed`."""
    added = [write_fragment(table.uri, rows(documents), "r1")] if documents else []
    return table.commit(added, hash_ids(pa.array(removed, pa.string())), keys or table.keys(), run="r1")


def test_create_open_and_metadata(table):
    opened = EmbeddingTable.open(table.uri)
    assert opened.recipe == RECIPE
    assert opened.fingerprint == RECIPE.fingerprint()
    assert opened.model == "models/tiny"
    assert opened.schema.names == table_schema(4, "float32").names
    assert opened.carried == []
    assert len(opened.keys().ids) == 0


def test_fragments_count_only_when_committed(table):
    first = write_fragment(table.uri, rows({"a": "one"}), "r1")
    write_fragment(table.uri, rows({"orphan": "never committed"}), "r1")
    assert contents(table) == {}
    version = table.commit([first], hash_ids(pa.array([], pa.string())), table.keys(), run="r1")
    assert version == table.version == EmbeddingTable.open(table.uri).version
    assert contents(table) == {"a": [(0, 3.0), (1, 3.0)]}
    assert table.dataset.read_transaction(version).transaction_properties["nightloom.run"] == "r1"


def test_changed_documents_are_replaced_in_one_version(table):
    texts = {name: "x" * (i + 1) for i, name in enumerate(ODD_IDS)}
    apply(table, texts, [])
    before = table.version
    changed = dict.fromkeys(ODD_IDS[::2], "longer" * 5)
    assert apply(table, changed, list(changed)) == before + 1
    assert contents(table) == {
        name: [(c, float(len(text))) for c in (0, 1)] for name, text in (texts | changed).items()
    }
    # Again, on fragments that already carry deletions; then every row of a fragment.
    apply(table, {}, ODD_IDS[:3])
    apply(table, {}, ODD_IDS)
    assert contents(table) == {}


def test_keys_say_what_is_unchanged(table):
    texts = {name: f"text of {name}" for name in ODD_IDS}
    apply(table, {name: texts[name] for name in ODD_IDS[:4]}, [])
    apply(table, {name: texts[name] for name in ODD_IDS[4:]}, [])
    keys = EmbeddingTable.open(table.uri).keys()
    ids = hash_ids(pa.array([*ODD_IDS, "new"], pa.string()))
    hashes = hash_ids(pa.array([*texts.values(), "text"], pa.string()))
    assert keys.known(ids).tolist() == [True] * len(ODD_IDS) + [False]
    assert keys.unchanged(ids, hashes).tolist() == [True] * len(ODD_IDS) + [False]
    assert not keys.unchanged(ids, np.roll(hashes, 1)).any()
    assert not Keys.empty().known(ids).any()
    assert not Keys.empty().unchanged(ids, hashes).any()


def test_removal_reaches_a_document_whose_chunks_lie_in_two_fragments(table):
    whole = rows({"a": "text", "b": "text!"}, chunks=4)
    added = [write_fragment(table.uri, part, "r1") for part in (whole[:3], whole[3:])]  # as compaction may leave it
    table.commit(added, hash_ids(pa.array([], pa.string())), Keys.empty(), run="r1")
    assert apply(table, {"a": "new text"}, ["a"], EmbeddingTable.open(table.uri).keys()) == table.version
    assert contents(table) == {"a": [(0, 8.0), (1, 8.0)], "b": [(c, 5.0) for c in range(4)]}


def test_random_nights_against_a_dictionary(table):
    draw = random.Random(7)
    expected: dict[str, str] = {}
    for night in range(8):
        keys = table.keys()
        changed = {str(draw.randrange(60)): "y" * draw.randrange(1, 50) for _ in range(draw.randrange(20))}
        deleted = draw.sample(sorted(expected), k=min(len(expected), draw.randrange(6)))
        old = [name for name in changed if name in expected]
        changed = {name: text for name, text in changed.items() if name not in deleted}
        apply(table, changed, [*old, *deleted], keys)
        expected = {name: text for name, text in (expected | changed).items() if name not in deleted}
        assert contents(table) == {name: [(c, float(len(text))) for c in (0, 1)] for name, text in expected.items()}, (
            night
        )
        assert sorted(set(table.keys().ids)) == sorted(hash_ids(pa.array(expected, pa.string())).tolist())


def test_publish_moves_the_tag(table):
    assert table.published_version() is None
    with pytest.raises(InputError, match="nothing is published"):
        EmbeddingTable.open(table.uri, PUBLISHED)
    apply(table, {"a": "one"}, [])
    table.publish()
    apply(table, {"b": "two"}, [])
    assert EmbeddingTable.open(table.uri, PUBLISHED).dataset.count_rows() == 2
    assert EmbeddingTable.open(table.uri).dataset.count_rows() == 4
    table.publish()
    assert EmbeddingTable.open(table.uri, PUBLISHED).dataset.count_rows() == 4
    with pytest.raises(InputError, match="has no version 99"):
        EmbeddingTable.open(table.uri, 99)


def test_second_writer_is_stopped_and_leaves_nothing(table):
    other = EmbeddingTable.open(table.uri)
    apply(table, {"a": "one"}, [])
    with pytest.raises(InputError, match="another run is writing"):
        apply(other, {"a": "one"}, [])
    assert contents(table) == {"a": [(0, 3.0), (1, 3.0)]}


def test_a_commit_between_the_look_and_the_commit_is_seen(table):
    """Lance itself would let two appends pass side by side."""
    other = EmbeddingTable.open(table.uri)

    def late_fragments():
        yield write_fragment(table.uri, rows({"a": "one", "b": "two"}), "r2")
        apply(table, {"a": "one"}, [])

    with pytest.raises(InputError, match="another run is writing"):
        other.commit(late_fragments(), hash_ids(pa.array([], pa.string())), Keys.empty(), run="r2")
    assert table.dataset.latest_version == table.version
    assert contents(table) == {"a": [(0, 3.0), (1, 3.0)]}


def test_a_claim_refuses_what_was_under_way(table):
    apply(table, {"a": "one"}, [])
    stalled, before = EmbeddingTable.open(table.uri), contents(table)

    def stall():
        yield write_fragment(table.uri, rows({"b": "two"}), "r2")
        table.claim("r3")

    with pytest.raises(InputError, match="another run is writing"):
        stalled.commit(stall(), hash_ids(pa.array(["a"])), stalled.keys(), run="r2")
    assert contents(table) == before
    apply(table, {"b": "two"}, ["a"])
    assert contents(table) == {"b": [(0, 3.0), (1, 3.0)]}


RACE = """
import sys
from test_pipeline_table import *
uri, name = sys.argv[1:]
none, wins = hash_ids(pa.array([], pa.string())), []
print("ready", flush=True)
for line in sys.stdin:
    table = EmbeddingTable.open(uri)
    fragment = write_fragment(uri, rows({f"{name} {line.strip()}": "text"}), name)
    print("opened", table.version, flush=True)
    sys.stdin.readline()
    try:
        table.commit([fragment], none, Keys.empty(), run=name)
        print("won", flush=True)
    except InputError:
        print("refused", flush=True)
"""


def race(uri: str, rounds: int) -> list[str]:
    """Processes that each open the table, and then all commit at once; the ids of those that did, a line a winner."""
    root = Path(__file__).resolve().parent
    env = os.environ | {"PYTHONPATH": f"{root.parent}{os.pathsep}{root}"}
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", RACE, uri]
    racers = [subprocess.Popen([*command, n], env=env, stdin=pipe, stdout=pipe, text=True, bufsize=1) for n in "xyz"]
    assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 3
    won = []
    for turn in range(rounds):
        for go in (f"{turn}\n", "commit\n"):
            for racer in racers:
                racer.stdin.write(go)
            answers = [racer.stdout.readline().split() for racer in racers]
        assert sum(answer == ["won"] for answer in answers) == 1, answers
        won += [f"{name} {turn}" for name, answer in zip("xyz", answers, strict=True) if answer == ["won"]]
    for racer in racers:
        racer.stdin.close()
        racer.wait(timeout=120)
        racer.stdout.close()
    return won


def test_of_processes_that_commit_at_once_one_wins(table):
    won = race(table.uri, 20)
    assert sorted(contents(table)) == sorted(won)


def test_of_processes_that_commit_at_once_one_wins_on_s3(s3_server, monkeypatch, tmp_path):
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    table = EmbeddingTable.create(f"s3://bucket/{tmp_path.name}/race", RECIPE, model="m")
    won = race(table.uri, 5)
    rows_now = EmbeddingTable.open(table.uri).dataset.to_table(columns=["document_id"])["document_id"]
    assert sorted(rows_now.unique().to_pylist()) == sorted(won)


def test_a_commit_whose_answer_is_lost_counts_once(s3_server, monkeypatch, tmp_path):
    proxy = Proxy(int(s3_server["AWS_ENDPOINT_URL"].rpartition(":")[2]), seed=3)
    for name, value in (s3_server | {"AWS_ENDPOINT_URL": proxy.endpoint}).items():
        monkeypatch.setenv(name, value)
    table = EmbeddingTable.create(f"s3://bucket/{tmp_path.name}/lost", RECIPE, model="m")
    for number in range(6):
        fragment = write_fragment(table.uri, rows({str(number): "text"}), "r")
        proxy.trouble = Trouble(500, 0.5, carried_out=True, only=(b"PUT",))
        table.commit([fragment], hash_ids(pa.array([], pa.string())), Keys.empty(), run="r")
        proxy.trouble = None
        assert table.version == EmbeddingTable.open(table.uri).version == number + 2
    assert proxy.refused > 3
    found = table.dataset.to_table(columns=["document_id", "chunk"]).to_pylist()
    assert len(found) == len({tuple(row.values()) for row in found}) == 12
    proxy.close()


def test_a_lost_lease_stops_commit_and_publishing(table):
    apply(table, {"a": "one"}, [])
    with Lease.take(table.uri, "ours") as held:
        table.lease = held
        apply(table, {"b": "two"}, [])
        held.place.create(replace(held.owner, epoch=held.epoch + 1, run="theirs"))
        held._confirm()
        with pytest.raises(InputError, match="stood still for too long, and run theirs"):
            apply(table, {"c": "three"}, [])
        with pytest.raises(InputError, match="stood still"):
            table.publish()
    assert sorted(contents(table)) == ["a", "b"]
    assert table.published_version() is None


def test_published_versions_are_kept_and_can_be_shown_again(table):
    for text in ("one", "two!", "three"):
        apply(table, {"a": text}, ["a"])
        table.publish()
    assert table.kept_versions() == [2, 3, 4]
    table.show(2)
    assert EmbeddingTable.open(table.uri, PUBLISHED).dataset.to_table()["vector"][0].as_py()[0] == 3
    assert table.kept_versions() == [2, 3, 4]
    # A run that was killed after it moved the tag, before it made the second one.
    table.dataset.tags.delete("published-2")
    table.show(4)
    assert table.kept_versions() == [2, 3, 4]


def test_other_recipe_is_refused_by_name(table):
    table.require(replace(RECIPE))
    with pytest.raises(InputError, match=r"another recipe \(pooling: 'mean' -> 'cls'; dim: 4 -> 8\)"):
        table.require(replace(RECIPE, pooling="cls", dim=8))


@pytest.mark.parametrize("vector_type", ["float32", "float16", "int8"])
def test_vector_types_and_carried_columns(tmp_path, vector_type):
    carried = [pa.field("title", pa.string()), pa.field("year", pa.int32())]
    recipe = replace(RECIPE, vector_type=vector_type)
    table = EmbeddingTable.create(str(tmp_path / "t"), recipe, model="m", carried=carried)
    given = rows({"a": "one"}, chunks=1, title=["A"], year=[1999])
    given = given.set_column(8, "vector", given["vector"].cast(table.schema.field("vector").type))
    table.commit([write_fragment(table.uri, given, "r1")], hash_ids(pa.array([], pa.string())), Keys.empty(), run="r1")
    row = table.dataset.to_table().to_pylist()[0]
    assert (row["title"], row["year"], row["run"], row["vector"]) == ("A", 1999, "r1", [3, 0, 0, 1])
    assert EmbeddingTable.open(table.uri).carried == ["title", "year"]


@pytest.mark.parametrize("vector_type", ["float32", "float16", "int8"])
def test_search_is_exact(tmp_path, vector_type):
    table = EmbeddingTable.create(str(tmp_path / "t"), replace(RECIPE, vector_type=vector_type), model="m")
    values = np.random.default_rng(5).integers(-100, 100, (60, 4)).astype(np.float32)
    for part in (range(25), range(25, 60)):
        given = rows({f"{i:03}": "x" for i in part}, chunks=1)
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(values[part.start : part.stop].reshape(-1)), 4)
        given = given.set_column(8, "vector", vectors.cast(table.schema.field("vector").type))
        table.commit(
            [write_fragment(table.uri, given, "r1")], hash_ids(pa.array([], pa.string())), Keys.empty(), run="r"
        )
    table.commit([], hash_ids(pa.array(["003"])), table.keys(), run="r")
    query = np.array([3.0, -2.0, 0.5, 1.0], dtype=np.float32)
    cosines = values @ query / np.linalg.norm(values, axis=1) / np.linalg.norm(query)
    cosines[3] = -2
    expected = np.argsort(-cosines, kind="stable")[:7]
    found = table.search(query, 7)
    assert found["document_id"].to_pylist() == [f"{i:03}" for i in expected]
    tolerance = 2e-3 if vector_type == "float16" else 1e-5
    np.testing.assert_allclose(found["score"].to_numpy(), cosines[expected], atol=tolerance)
    assert len(table.search(query, 100)) == 59


def test_carried_column_with_a_name_of_ours():
    with pytest.raises(InputError, match="'source' cannot be carried"):
        table_schema(4, "float32", [pa.field("source", pa.string())])


def test_places_that_are_no_table(tmp_path):
    missing = str(tmp_path / "missing")
    assert EmbeddingTable.find(missing) is None
    with pytest.raises(InputError, match="there is no table at"):
        EmbeddingTable.open(missing)
    (tmp_path / "letters").mkdir()
    assert EmbeddingTable.find(str(tmp_path / "letters")) is None
    (tmp_path / "letters" / "a.txt").write_text("dear")
    with pytest.raises(InputError, match="holds files but no table"):
        EmbeddingTable.find(str(tmp_path / "letters"))
    for name in ("_lease/0000000001.json", "_runs/r.json", "_transactions/0.txn", "_versions/.tmp"):
        (tmp_path / "begun" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "begun" / name).write_text("killed while the table was made")
    assert EmbeddingTable.find(str(tmp_path / "begun")) is None
    EmbeddingTable.create(str(tmp_path / "begun"), RECIPE, model="m")
    lance.write_dataset(pa.table({"a": [1]}), str(tmp_path / "foreign"))
    with pytest.raises(InputError, match="without a recipe"):
        EmbeddingTable.find(str(tmp_path / "foreign"))
    EmbeddingTable.create(missing, RECIPE, model="m")
    with pytest.raises(InputError, match="cannot be made"):
        EmbeddingTable.create(missing, RECIPE, model="m")
