"""Migration: another recipe in several nights, while readers and the old recipe go on; one switch, and a way back."""

import shutil
from dataclasses import replace

import lance
import numpy as np
import pyarrow as pa
import pytest
from pyarrow.fs import FileSelector, FileType
from test_jobs_embed import assert_same, configured, text_of, vectors, write_corpus
from test_pipeline_table import RECIPE, rows

from jobs.embed import run_embed
from jobs.migrate import clear_away, next_uri, run_migrate, switch
from model.errors import InputError
from pipeline.keys import hash_ids
from pipeline.lease import Lease
from pipeline.ledger import read_records
from pipeline.storage import filesystem, list_sources
from pipeline.table import NEXT, PUBLISHED, EmbeddingTable, write_fragment


def fill(uri: str, recipe, documents: dict[str, str], removed: tuple[str, ...] = ()) -> EmbeddingTable:
    """A published table with these documents; those removed were there before."""
    table = EmbeddingTable.create(uri, recipe, model="m")
    gone = dict.fromkeys(removed, "gone")
    none = hash_ids(pa.array([], pa.string()))
    table.commit([write_fragment(uri, rows(documents | gone), "r1")], none, table.keys(), run="r1")
    if removed:
        table.commit([], hash_ids(pa.array(removed)), table.keys(), run="r1")
    table.publish()
    return table


def contents(table: EmbeddingTable) -> dict[str, list[tuple[int, float]]]:
    """{document: [(chunk, first number of its vector)]} of the version that is open."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in table.dataset.to_table().sort_by("chunk").to_pylist():
        found.setdefault(row["document_id"], []).append((row["chunk"], row["vector"][0]))
    return found


def check_switch(uri: str) -> None:
    other = type(RECIPE)(**{name: getattr(RECIPE, name) for name in RECIPE.__slots__} | {"prompt": "other"})
    old = fill(uri, RECIPE, {"a": "x", "b": "xy"})
    before = contents(old)
    # A row that was deleted in the new table's fragments must not come back.
    fill(next_uri(uri), other, {"a": "xyz", "c": "wxyz"}, removed=("b",))
    version = switch(uri)
    now = EmbeddingTable.open(uri, PUBLISHED)
    assert (now.version, now.recipe.prompt, now.fingerprint) == (version, "other", other.fingerprint())
    assert sorted(contents(now)) == ["a", "c"]
    assert contents(now)["a"] == [(0, 3.0), (1, 3.0)]
    files, path = filesystem(next_uri(uri))
    found = files.get_file_info(FileSelector(path, recursive=True, allow_not_found=True))
    assert not [info.path for info in found if info.type == FileType.File]
    # The way back: the old version is all there, with its recipe.
    table = EmbeddingTable.open(uri)
    table.show(old.version)
    assert EmbeddingTable.open(uri, PUBLISHED).recipe == RECIPE.settled()
    assert contents(EmbeddingTable.open(uri, PUBLISHED)) == before
    assert [record["job"] for record in read_records(uri)] == ["migrate"]


def test_switch(tmp_path):
    check_switch(str(tmp_path / "table.lance"))


def test_switch_on_s3(s3_server, monkeypatch):
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    check_switch("s3://bucket/migrate/table.lance")


def test_fragments_without_deletions_are_taken_as_they_are(tmp_path):
    uri = str(tmp_path / "table.lance")
    fill(uri, RECIPE, {"a": "x"})
    grown, none = (
        fill(next_uri(uri), RECIPE, {"a": "xyz", "b": "x"}, removed=("c",)),
        hash_ids(pa.array([], pa.string())),
    )
    for name in ("d", "e", "f"):
        grown.commit([write_fragment(grown.uri, rows({name: "xy"}), "r2")], none, grown.keys(), run="r2")
    grown.publish()
    before = [f.metadata.files[0].path for f in grown.dataset.get_fragments()]
    switch(uri)
    now = EmbeddingTable.open(uri, PUBLISHED)
    assert sorted(contents(now)) == ["a", "b", "d", "e", "f"]
    after = [f.metadata.files[0].path for f in now.dataset.get_fragments()]
    assert set(before[1:]) < set(after)
    assert before[0] not in after


def test_what_a_night_published_meanwhile_is_not_undone(tmp_path):
    uri, none = str(tmp_path / "table.lance"), hash_ids(pa.array([], pa.string()))
    table = fill(uri, RECIPE, {"a": "x"})
    since = table.version
    fill(next_uri(uri), RECIPE, {"a": "xyz"})
    table.commit([write_fragment(uri, rows({"b": "xy"}), "r2")], none, table.keys(), run="r2")
    table.publish()
    assert switch(uri, since) is None
    assert sorted(contents(EmbeddingTable.open(uri, PUBLISHED))) == ["a", "b"]
    assert switch(uri, table.version) == EmbeddingTable.open(uri, PUBLISHED).version
    assert sorted(contents(EmbeddingTable.open(uri, PUBLISHED))) == ["a"]


def test_a_migration_takes_in_what_a_night_brings_while_it_ends(tmp_path, tiny_model_folder, monkeypatch):
    source, table = tmp_path / "corpus", tmp_path / "table.lance"
    write_corpus(source, 6, words=20)
    old = configured(source, table, tiny_model_folder)
    run_embed(old)
    nights = iter([True, False])

    def with_a_night(configuration, **how):
        report = run_embed(configuration, **how)
        if next(nights):
            (source / "late.txt").write_text(text_of(50, 20))
            assert run_embed(old).status == "published"
        return report

    monkeypatch.setattr("jobs.migrate.run_embed", with_a_night)
    report = run_migrate(configured(source, table, tiny_model_folder, "vectors.dim=16", migrate=True), run="r-1")
    assert (report.status, report.read) == ("published", 7)
    assert ("late.txt", -1) in vectors(table)
    assert {len(vector) for vector in vectors(table).values()} == {16}


def test_a_migration_to_a_third_recipe_is_left_alone(tmp_path, caplog):
    uri = str(tmp_path / "table.lance")
    clear_away(fill(uri, RECIPE, {"a": "x"}))  # nothing there
    other = replace(RECIPE, prompt="other")
    fill(next_uri(uri), other, {"a": "xyz"})
    table = EmbeddingTable.open(uri)
    clear_away(table)
    assert EmbeddingTable.find(next_uri(uri)) is not None
    assert "to another recipe" in caplog.text
    # What a switch left that was killed at its end goes, unless someone is at work there.
    shutil.rmtree(next_uri(uri))
    fill(next_uri(uri), RECIPE, {"a": "xyz"})
    with Lease.take(next_uri(uri), "another"):
        clear_away(table)
        assert EmbeddingTable.find(next_uri(uri)) is not None
    clear_away(table)
    assert not (tmp_path / "table.lance" / NEXT).exists()


def test_a_switch_that_was_killed_is_repeated(tmp_path, monkeypatch):
    uri = str(tmp_path / "table.lance")
    fill(uri, RECIPE, {"a": "x"})
    fill(next_uri(uri), RECIPE, {"a": "xyz"})
    aside = tmp_path / "aside"
    shutil.copytree(next_uri(uri), aside)
    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingTable, "overwrite", killed)
        with pytest.raises(KeyboardInterrupt):
            switch(uri)
    assert contents(EmbeddingTable.open(uri, PUBLISHED))["a"] == [(0, 1.0), (1, 1.0)]
    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingTable, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            switch(uri)
    assert contents(EmbeddingTable.open(uri, PUBLISHED))["a"] == [(0, 1.0), (1, 1.0)]
    switch(uri)
    assert contents(EmbeddingTable.open(uri, PUBLISHED))["a"] == [(0, 3.0), (1, 3.0)]


def killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_one_writer(tmp_path):
    uri = str(tmp_path / "table.lance")
    fill(uri, RECIPE, {"a": "x"})
    fill(next_uri(uri), RECIPE, {"a": "xyz"})
    with Lease.take(uri, "another"), pytest.raises(InputError, match="another run"):
        switch(uri)
    assert contents(EmbeddingTable.open(uri, PUBLISHED))["a"] == [(0, 1.0), (1, 1.0)]


def test_a_writer_that_came_in_between_is_not_overwritten(tmp_path):
    uri = str(tmp_path / "table.lance")
    fill(uri, RECIPE, {"a": "x"})
    stale, none = EmbeddingTable.open(uri), hash_ids(pa.array([], pa.string()))
    other = EmbeddingTable.open(uri)
    other.commit([write_fragment(uri, rows({"b": "xy"}), "r2")], none, other.keys(), run="r2")
    with pytest.raises(InputError, match="another run"):
        stale.overwrite(stale.schema, [], run="r3")
    assert sorted(contents(EmbeddingTable.open(uri))) == ["a", "b"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_nights_of_a_migration(tmp_path, tiny_model_folder):
    source, table = tmp_path / "corpus", tmp_path / "corpus" / "table.lance"
    write_corpus(source, 24, words=20)
    old = configured(source, table, tiny_model_folder, "compute.block_chars=400")
    sets = ["vectors.dim=16", "compute.block_chars=400", "compute.commit_every_s=0"]
    new = configured(source, table, tiny_model_folder, *sets, migrate=True)
    run_embed(old)
    before = vectors(table)
    with pytest.raises(InputError, match=r"dim: 64 -> 16.*--migrate"):
        run_embed(configured(source, table, tiny_model_folder, *sets))

    first = run_migrate(configured(source, table, tiny_model_folder, *sets, migrate=True, budget_tokens=100))
    assert (first.status, first.table) == ("partial", str(table))
    assert first.left > 0
    assert first.published == EmbeddingTable.open(str(table)).published_version()
    assert_same(vectors(table), before)
    with pytest.raises(InputError, match=r"migration .* to another recipe is under way \(dim: 16 -> 32\)"):
        run_migrate(configured(source, table, tiny_model_folder, "vectors.dim=32", migrate=True))

    # The old recipe's nights go on; files of the migration are no documents.
    (source / "new.txt").write_text(text_of(77, 20))
    night = run_embed(old)
    assert (night.status, night.embedded, night.read) == ("published", 1, 25)
    assert len(list_sources(str(source))) > 14

    last = run_migrate(new)
    assert (last.status, last.read, last.left) == ("published", 25, 0)
    assert last.embedded + last.unchanged == 25
    after = vectors(table)
    assert sorted(after) == sorted(vectors(table, version=night.version))
    assert {len(vector) for vector in after.values()} == {16}
    assert not (table / NEXT).exists()
    shutil.copytree(source, tmp_path / "plain", ignore=shutil.ignore_patterns("table.lance"))
    run_embed(configured(tmp_path / "plain", tmp_path / "anew.lance", tiny_model_folder, "vectors.dim=16"))
    assert_same(after, vectors(tmp_path / "anew.lance"))

    # From now on the new recipe is the table's; to migrate again is to embed.
    assert run_migrate(new).status == "unchanged"
    assert run_embed(configured(source, table, tiny_model_folder, *sets)).status == "unchanged"
    with pytest.raises(InputError, match=r"dim: 16 -> 64"):
        run_embed(old)
    assert np.shape(lance.dataset(str(table), version=night.version).to_table()["vector"][0].as_py()) == (64,)
