"""A quantized folder is kept only if its vectors are the float model's; the command says which, by its exit status."""

import json
from pathlib import Path

import numpy as np
import pytest

from jobs.cli import main
from jobs.quantize import compare, refusal, run_quantize, sample_texts
from model.embedder import Embedder
from model.errors import InputError
from model.folder import read_folder

SMALL = str(Path(__file__).resolve().parent.parent / "models" / "nightloom-small")


@pytest.fixture
def texts(tmp_path: Path) -> str:
    lines = [
        json.dumps({"id": str(i), "text": f"Number {i} of {i * i} is about {'lists' if i % 2 else 'trees'}."})
        for i in range(9)
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(tmp_path / "texts.jsonl")


def test_a_good_one_is_kept_and_embeds(texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "int8"
    assert main(["quantize", SMALL, str(out), "--sample", texts, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["status"] == "done"
    assert report["texts"] == 9
    assert 0.99 < report["cosine_min"] <= report["cosine_mean"] < 1
    assert report["bytes_after"] < 0.55 * report["bytes_before"]
    before, after = read_folder(SMALL), read_folder(out)
    assert after.int8
    wanted = before.sentence_options() | {"dense": after.dense}  # files of its own, of the same content
    assert after.sentence_options() == wanted
    assert [layer.file.read_bytes() for layer in after.dense] == [layer.file.read_bytes() for layer in before.dense]
    assert Embedder(out, device="cpu").encode("a text").shape == Embedder(SMALL, device="cpu").encode("a text").shape
    assert sorted(path.name for path in out.parent.iterdir()) == ["int8"]


def test_a_bad_one_is_removed_and_said(texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "int8"
    assert main(["quantize", SMALL, str(out), "--sample", texts, "--min-centred", "0.99999"]) == 3
    assert "was not kept: its centred cosine mean to the float model is 0.99" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.jsonl"]


def test_wrong_input_is_one_line(texts: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists already"):
        run_quantize(SMALL, str(tmp_path))
    (tmp_path / "two.jsonl").write_text('{"id": "1", "text": "one"}\n{"id": "2", "text": "two"}', encoding="utf-8")
    with pytest.raises(InputError, match="has 2 texts"):
        run_quantize(SMALL, str(tmp_path / "int8"), sample=str(tmp_path / "two.jsonl"))
    run_quantize(SMALL, str(tmp_path / "int8"), sample=texts)
    with pytest.raises(InputError, match="int8 weights already"):
        run_quantize(str(tmp_path / "int8"), str(tmp_path / "again"))


def test_the_sample_spans_the_corpus(texts: str) -> None:
    assert [text.split()[1] for text in sample_texts(texts, 3)] == ["0", "4", "8"]


def test_what_is_compared() -> None:
    exact = np.eye(4, dtype=np.float32)
    assert compare(exact, exact) == {
        "cosine_mean": 1.0,
        "cosine_min": 1.0,
        "centred_cosine_mean": 1.0,
        "same_nearest": 1.0,
    }
    shared = exact + 10
    shared /= np.linalg.norm(shared, axis=1, keepdims=True)
    found = compare(np.roll(shared, 1, axis=0), shared)
    assert found["cosine_min"] > 0.99  # the shared part hides that every vector is another's
    assert found["centred_cosine_mean"] < 0
    assert refusal(found, 0.99, 0.98).startswith("its centred cosine mean")
    assert refusal({"cosine_mean": float("nan"), "centred_cosine_mean": 1.0}, 0.99, 0.98)
    assert refusal({"cosine_mean": 1.0, "centred_cosine_mean": 1.0}, 0.99, 0.98) == ""
