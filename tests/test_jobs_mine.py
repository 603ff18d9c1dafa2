"""Mining from a real table: texts are the table's own, answers stay out, and the file is one that finetune reads."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from test_jobs_embed import configured, text_of, write_corpus

from jobs.cli import main
from jobs.embed import run_embed
from jobs.mine import PROVENANCE, MineConfiguration, run_mine
from model.errors import InputError
from model.folder import load_tokenizer
from pipeline.examples import Reading, read_examples
from pipeline.table import PUBLISHED, EmbeddingTable

COUNT = 20


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, ray_session: None) -> Path:
    folder = tmp_path_factory.mktemp("mine")
    write_corpus(folder / "corpus", COUNT)
    sets = ("chunking.granularity=chunk", "chunking.chunk_tokens=40")
    run_embed(configured(folder / "corpus", folder / "table.lance", tiny_model_folder, *sets))
    return folder / "table.lance"


def name_of(number: int) -> str:
    return f"{number:03}.txt" if number < COUNT // 2 else f"row-{number}"


def write_questions(folder: Path, *rows: dict[str, str]) -> Path:
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / "questions.jsonl"


def test_negatives_are_texts_of_other_documents(
    table: Path, tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command; two rows ask the same, and neither has the other's answer as a negative."""
    rows = [{"query": text_of(n, 30)[20:60], "positive_id": name_of(n)} for n in range(0, COUNT, 2)]
    rows += [{"query": rows[0]["query"], "positive_id": name_of(7)}, {"query": "what?", "positive_id": "not there"}]
    questions, out = write_questions(tmp_path, *rows), tmp_path / "deep" / "mined.parquet"
    sets = ["--set", "margin=-2.0", "--set", "negatives=3", "--set", "last_rank=10"]
    assert main(["mine", str(table), str(questions), str(out), "--json", *sets]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["queries"], report["kept"], report["unknown"], report["inconsistent"]) == (12, 11, 1, 0)
    mined = pq.read_table(out)
    assert report["negatives"] == 33 == sum(map(len, mined["negatives"].to_pylist()))
    texts = {name_of(n): text_of(n, 30) for n in range(COUNT)}
    for row in mined.to_pylist():
        assert row["positive"] in texts[row["positive_id"]]
        assert row["positive_id"] not in row["negative_ids"]
        assert len(set(row["negative_ids"])) == 3
        for name, text in zip(row["negative_ids"], row["negatives"], strict=True):
            assert 0 < len(text) < len(texts[name])
            assert text in texts[name], "a chunk, not the document"
        assert row["negative_scores"] == sorted(row["negative_scores"], reverse=True)
    same = [row for row in mined.to_pylist() if row["query"] == rows[0]["query"]]
    assert {row["positive_id"] for row in same} == {name_of(0), name_of(7)}
    assert not {name_of(0), name_of(7)} & {name for row in same for name in row["negative_ids"]}
    facts = json.loads(mined.schema.metadata[PROVENANCE])
    opened = EmbeddingTable.open(str(table), PUBLISHED)
    assert (facts["table"], facts["version"], facts["fingerprint"]) == (str(table), opened.version, opened.fingerprint)
    assert facts["settings"]["margin"] == -2.0
    examples = read_examples(str(out), load_tokenizer(tiny_model_folder), Reading("contrastive", 128))
    assert examples.num_examples == 11


def test_only_consistent_pairs_stay(table: Path, tmp_path: Path) -> None:
    """A question that is another document's text: its positive is far away."""
    rows = [{"query": text_of(n, 30), "positive": text_of(n, 30)} for n in range(4)]
    rows.append({"query": text_of(5, 30), "positive": text_of(12, 30)})
    settings = MineConfiguration(
        table=str(table), queries=str(write_questions(tmp_path, *rows)), output=str(tmp_path / "mined.parquet"),
        consistent_rank=3, margin=0.0,
    )  # fmt: skip
    report = run_mine(settings)
    mined = pq.read_table(settings.output).to_pylist()
    assert report.inconsistent >= 1
    assert report.kept == len(mined) >= 3
    assert all(row["positive_rank"] < 3 for row in mined)
    assert {row["positive"] for row in mined} <= {text_of(n, 30) for n in range(4)}, "given texts stay as they are"
    for row in mined:
        assert all(score <= row["positive_score"] for score in row["negative_scores"])
    assert "pairs with" in report.summary()


@pytest.mark.parametrize(
    "row, sets, message",
    [
        ({"query": "a"}, {}, "neither a column 'positive_id' nor 'positive'"),
        ({"question": "a"}, {}, "has no column 'query', which mining needs"),
        ({"query": " ", "positive_id": "x"}, {}, "row 1: the query is empty"),
        ({"query": "a", "positive_id": "x"}, {}, "none of the 1 positives in .* is a document of .*the first is 'x'"),
        ({"query": "a", "positive_id": "x"}, {"first_rank": 50}, "first_rank is 50 and last_rank 50"),
    ],
)
def test_what_is_wrong_is_one_line(
    row: dict[str, str], sets: dict[str, int], message: str, table: Path, tmp_path: Path
) -> None:
    questions = write_questions(tmp_path, row)
    settings = {"table": str(table), "queries": str(questions), "output": str(tmp_path / "out.parquet"), **sets}
    with pytest.raises(InputError, match=message):
        run_mine(MineConfiguration.model_validate(settings))
    assert not (tmp_path / "out.parquet").exists()


def test_a_source_that_changed_is_named(tmp_path: Path, tiny_model_folder: Path, ray_session: None) -> None:
    (tmp_path / "a.txt").write_text("one text about foxes")
    run_embed(configured(tmp_path / "a.txt", tmp_path / "t", tiny_model_folder))
    (tmp_path / "a.txt").write_text("another text")
    questions = write_questions(tmp_path, {"query": "a fox", "positive_id": "a.txt"})
    settings = MineConfiguration(table=str(tmp_path / "t"), queries=str(questions), output=str(tmp_path / "o.parquet"))
    with pytest.raises(InputError, match=r"no longer holds the text of document 'a\.txt'"):
        run_mine(settings)
