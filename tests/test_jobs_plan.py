"""`plan`: the counts of the run that would follow, the tokens it would see, and not a byte written."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_jobs_embed import configured, text_of, write_corpus
from test_pipeline_table import RECIPE, apply

import jobs.plan
from jobs.configuration import VectorSettings
from jobs.embed import run_embed
from jobs.plan import is_small, list_corpus, make_recipe, read_model, run_plan, survey_corpus
from model.errors import InputError
from pipeline.columns import DocumentColumns
from pipeline.ledger import keep_record
from pipeline.storage import list_sources, s3fs_filesystem
from pipeline.table import EmbeddingTable


def snapshot(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


@pytest.mark.usefixtures("ray_session")
def test_plan_says_what_embed_then_does(tmp_path, tiny_model_folder):
    source, table = tmp_path / "corpus", tmp_path / "table.lance"
    write_corpus(source, 20)
    configuration = configured(source, table, tiny_model_folder, delete_missing=True)
    planned = run_plan(configuration)
    assert (planned.read, planned.new, planned.files, planned.tokens_exact) == (20, 20, 11, True)
    assert not table.exists()
    report = run_embed(configuration)
    assert report.tokens == planned.tokens + 2 * 20  # the encoder also sees [CLS] and [SEP]

    (source / "001.txt").write_text("changed text")
    (source / "002.txt").unlink()
    before = snapshot(tmp_path)
    planned = run_plan(configuration)
    assert (planned.new, planned.changed, planned.unchanged, planned.deleted) == (0, 1, 18, 1)
    assert snapshot(tmp_path) == before
    assert "1 of 19 documents would be embedded" in planned.summary()
    assert run_embed(configuration).embedded == 1
    assert run_plan(configuration).summary().startswith("Nothing to do")


@pytest.mark.usefixtures("ray_session")
def test_survey_in_tasks_is_the_survey_in_process(tmp_path, tiny_model_folder):
    write_corpus(tmp_path / "corpus", 20)
    configuration = configured(tmp_path / "corpus", tmp_path / "t", tiny_model_folder)
    files = list_sources(str(tmp_path / "corpus"))
    here = survey_corpus(configuration, files, None, in_process=True).plan
    there = survey_corpus(configuration, files, None, in_process=False).plan
    assert here.counts == there.counts
    assert [item.load() for item in here.work] == [item.load() for item in there.work]
    assert not any(isinstance(item.rows, pa.Table) for item in there.work)


def test_many_small_documents_are_surveyed_on_workers(tmp_path, monkeypatch):
    for part in range(3):
        rows = {"id": [f"{part}-{n}" for n in range(400)], "text": ["w"] * 400}
        pq.write_table(pa.table(rows), tmp_path / f"{part}.parquet")
    files = list_sources(str(tmp_path))
    assert is_small(files, DocumentColumns())
    monkeypatch.setattr(jobs.plan, "SMALL_CORPUS_DOCUMENTS", 1000)
    assert not is_small(files, DocumentColumns())
    assert is_small(files[:2], DocumentColumns())
    # With a table the files are not looked into.
    table = EmbeddingTable.create(str(tmp_path / "table.lance"), replace(RECIPE, granularity="chunk"), model="m")
    gone = [replace(file, path="/nowhere/x.parquet") for file in files]
    apply(table, {f"d{n}": "x" for n in range(1000)}, [])
    assert is_small(gone, DocumentColumns(), table)
    apply(table, {"one more": "x"}, [])
    assert not is_small(gone, DocumentColumns(), table)
    monkeypatch.setattr(jobs.plan, "SMALL_CORPUS_BYTES", 1000)
    assert not is_small(files[:1], DocumentColumns())


def test_large_corpora_are_sampled(tmp_path, tiny_model_folder, monkeypatch):
    (tmp_path / "corpus").mkdir()
    for number in range(40):
        (tmp_path / "corpus" / f"{number}.txt").write_text(text_of(number, 60))
    configuration = configured(tmp_path / "corpus", tmp_path / "t", tiny_model_folder)
    exact = run_plan(configuration)
    monkeypatch.setattr(jobs.plan, "EXACT_CHARS", 4000)
    sampled = run_plan(configuration)
    assert (exact.tokens_exact, sampled.tokens_exact) == (True, False)
    assert abs(sampled.tokens / exact.tokens - 1) < 0.1
    assert "about" in sampled.summary()


def test_time_and_cost_go_by_past_runs(tmp_path, tiny_model_folder):
    (tmp_path / "corpus").mkdir()
    for number in range(4):
        (tmp_path / "corpus" / f"{number}.txt").write_text(text_of(number, 60))
    table = tmp_path / "table.lance"
    configuration = configured(tmp_path / "corpus", table, tiny_model_folder)
    unknown = run_plan(configuration, price_per_hour=7200)
    assert (unknown.seconds, unknown.cost) == (None, None)
    assert "not known before" in unknown.summary()
    keep_record(str(table), "20260101T000000.000000Z", {"status": "published", "tokens": 500, "embedding_s": 10.0})
    planned = run_plan(configuration, price_per_hour=7200)
    expected = (planned.tokens + 2 * 4) / 50
    assert planned.seconds == pytest.approx(expected, abs=0.1)
    assert planned.cost == pytest.approx(expected * 2, abs=0.01)
    assert f"cost       about {planned.cost:,.2f}" in planned.summary()
    with pytest.raises(InputError, match="price"):
        run_plan(configuration, price_per_hour=-1)


def test_table_within_the_source_is_not_read(tmp_path, tiny_model_folder):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "table" / "_runs").mkdir(parents=True)
    (tmp_path / "table" / "_runs" / "r.json").write_text("{}")
    configuration = configured(tmp_path, tmp_path / "table", tiny_model_folder)
    assert [file.relative for file in list_corpus(configuration)] == ["a.txt"]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(InputError, match="beside the table itself"):
        list_corpus(configuration)


def test_recipe_follows_the_configuration(tmp_path, tiny_model_folder):
    def recipe(*sets: str):
        model = read_model(configured(tmp_path, tmp_path / "t", tiny_model_folder, *sets))
        return make_recipe(model, VectorSettings(), dtype="float32")

    plain = recipe()
    assert (plain.dim, plain.normalize, plain.prompt, plain.max_tokens) == (64, True, "", 512)
    assert (plain.chunk_tokens, plain.context) == (None, None)
    assert recipe("vectors.prompt_name=query").prompt == "query: "
    assert recipe("vectors.dim=16").difference(plain) == ["dim: 16 -> 64"]
    assert recipe("compute.tokens_per_batch=99", "compute.block_chars=5").fingerprint() == plain.fingerprint()


@pytest.mark.parametrize(
    "item, says",
    [
        ("vectors.dim=65", "the model gives 64"),
        ("vectors.prompt_name=none_such", "has no prompt"),
        ("chunking.max_tokens=100000", "max_tokens"),
        ("chunking.overlap_tokens=512", "overlap"),
    ],
)
def test_settings_that_the_model_cannot_meet(tmp_path, tiny_model_folder, item, says):
    with pytest.raises(InputError, match=says):
        read_model(configured(tmp_path, tmp_path / "t", tiny_model_folder, item))


def test_a_model_on_s3_is_the_model(tmp_path, tiny_model_folder, s3_server, monkeypatch):
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NIGHTLOOM_CACHE", str(tmp_path / "cache"))
    s3fs_filesystem().put(str(tiny_model_folder), "bucket/plan/tiny", recursive=True)
    there = read_model(configured(tmp_path, tmp_path / "t", "s3://bucket/plan/tiny"))
    here = read_model(configured(tmp_path, tmp_path / "t", tiny_model_folder))
    # Every machine makes its own copy: what is handed to workers is the address, not this machine's folder.
    assert there.path == "s3://bucket/plan/tiny"
    recipes = [make_recipe(model, VectorSettings(), dtype="float32") for model in (there, here)]
    assert recipes[0] == recipes[1]
