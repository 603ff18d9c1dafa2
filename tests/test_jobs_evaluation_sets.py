"""Sets are read whole or refused with the line that is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.evaluation_sets import read_labelled, read_retrieval, read_similarity
from model.errors import InputError

HEAD = "query-id\tcorpus-id\tscore\n"


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    (tmp_path / "qrels").mkdir()
    corpus = [
        {"_id": "a", "title": "Cats", "text": "sit\u2028on mats"},
        {"_id": "b", "title": "", "text": "dogs"},
        {"_id": "c", "text": "birds"},
    ]
    (tmp_path / "corpus.jsonl").write_text(lines(corpus), encoding="utf-8")
    queries = [{"_id": f"q{i}", "text": f"question {i}", "metadata": {}} for i in range(4)]
    (tmp_path / "queries.jsonl").write_text(lines(queries), encoding="utf-8")
    (tmp_path / "qrels" / "test.tsv").write_text(HEAD + "q2\ta\t2\nq0\tb\t1\nq0\tc\t0\nq1\tb\t0\n", encoding="utf-8")
    return tmp_path


def test_retrieval_in_beirs_layout(beir: Path) -> None:
    found = read_retrieval(str(beir))
    assert found.document_ids == ["a", "b", "c"]
    assert found.documents == ["Cats sit\u2028on mats", "dogs", "birds"]
    assert found.query_ids == ["q0", "q2"]  # q1 has no answer, q3 no judgement
    assert found.queries == ["question 0", "question 2"]
    assert found.judgements == {"q2": {"a": 2}, "q0": {"b": 1, "c": 0}}
    assert read_retrieval(str(beir)).fingerprint == found.fingerprint
    # A question that nobody judged changes nothing; a grade does.
    with (beir / "queries.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"_id": "q9", "text": "another"}\n')
    assert read_retrieval(str(beir)).fingerprint == found.fingerprint
    (beir / "qrels" / "dev.tsv").write_text(HEAD + "q2\ta\t1\nq0\tb\t1\nq0\tc\t0\n", encoding="utf-8")
    assert read_retrieval(str(beir), "dev").fingerprint != found.fingerprint


def test_retrieval_on_s3(beir: Path, s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.shards import write_file

    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    for file in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        write_file("s3://bucket/beir", file, (beir / file).read_bytes())
    assert read_retrieval("s3://bucket/beir") == read_retrieval(str(beir))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("qrels/test.tsv", HEAD + "q0\tz\t1\n", "line 2: the document 'z' is not in corpus.jsonl"),
        ("qrels/test.tsv", "q0\ta\t1\nzz\ta\t1\n", "line 2: the query 'zz' is not in queries.jsonl"),
        ("qrels/test.tsv", HEAD + "q0\ta\n", "line 2: expected a query id, a document id and a whole grade"),
        ("qrels/test.tsv", HEAD + "q0\ta\t1.5\n", "line 2: expected a query id"),
        ("qrels/test.tsv", HEAD + "q0\ta\t0\n", "has no question with an answer"),
        ("qrels/test.tsv", "", "has no question with an answer"),
        ("corpus.jsonl", "", "corpus.jsonl is empty"),
        ("corpus.jsonl", '{"_id": "a", "text": "x"}\n{"_id": "a", "text": "y"}\n', "line 2: the id 'a' stands there"),
        ("corpus.jsonl", '{"_id": "a"}\n', "line 1: expected the texts _id and text"),
        ("queries.jsonl", "[1]\n", "line 1 is a JSON list, expected an object"),
        ("queries.jsonl", "{\n", "line 1 is not JSON"),
        ("queries.jsonl", b"\xff\xfe\n", "queries.jsonl is not UTF-8"),
    ],
)
def test_a_wrong_line_is_named(beir: Path, name: str, text: str | bytes, says: str) -> None:
    (beir / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as caught:
        read_retrieval(str(beir))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(beir: Path) -> None:
    with pytest.raises(InputError, match=r"has no qrels/train.tsv"):
        read_retrieval(str(beir), "train")
    with pytest.raises(InputError, match=r"has no corpus.jsonl"):
        read_retrieval(str(beir / "qrels"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_similarity_and_labels_from_either_format(tmp_path: Path, kind: str) -> None:
    def write(name: str, rows: list[dict[str, Any]]) -> str:
        file = tmp_path / f"{name}.{kind}"
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), file)
        else:
            file.write_text(lines(rows), encoding="utf-8")
        return str(file)

    pairs = [{"sentence1": f"a{i}", "sentence2": f"b{i}", "score": i / 2, "more": 1} for i in range(4)]
    found = read_similarity(write("pairs", pairs))
    assert (found.first[1], found.second[3], found.scores) == ("a1", "b3", [0.0, 0.5, 1.0, 1.5])
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(6)]
    labelled = read_labelled(write("train", rows[:4]), write("test", rows[4:]))
    assert labelled.train_labels == ["0", "1", "0", "1"]
    assert labelled.test_texts == ["t4", "t5"]
    with pytest.raises(InputError, match="row 2: the label '7' is not in"):
        read_labelled(write("train", rows), write("test", [rows[0], {"text": "t", "label": 7}]))
    with pytest.raises(InputError, match="has the label '0' only"):
        read_labelled(write("train", rows[::2]), write("test", rows[:1]))
    with pytest.raises(InputError, match=r"\.(jsonl|parquet), (line|row) 1: score is 'x'; expected a number"):
        read_similarity(write("pairs", [{"sentence1": "a", "sentence2": "b", "score": "x"}]))
    with pytest.raises(InputError, match="has 2 pairs; a correlation needs three"):
        read_similarity(write("pairs", pairs[:2]))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    def refused(says: str, read: Callable[[str], Any], name: str, data: bytes) -> None:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=says):
            read(str(tmp_path / name))

    refused("cannot be read as Parquet", read_similarity, "x.parquet", b"nonsense")
    refused("is empty", read_similarity, "x.jsonl", b"")
    refused(
        "label is None; expected text or a whole number", lambda f: read_labelled(f, f), "y.jsonl", b'{"text": "a"}'
    )
    refused("label is True", lambda f: read_labelled(f, f), "z.jsonl", b'{"text": "a", "label": true}')
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["a"]}), sink)
    refused(
        "has no column 'label'; it has text", lambda f: read_labelled(f, f), "w.parquet", sink.getvalue().to_pybytes()
    )
    with pytest.raises(InputError, match=r"has no absent.jsonl"):
        read_similarity(str(tmp_path / "absent.jsonl"))
