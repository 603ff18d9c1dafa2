"""Promotion: refused below a gate with status 3, whole or not at all, and pinned by the runs that use it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from test_jobs_cli import nightloom, refused
from test_jobs_evaluation import make

from jobs.evaluation import EVALUATION
from jobs.promote import run_promote
from model import Embedder
from model.errors import InputError
from model.folder import tokenizer_hash, weights_hash
from pipeline.shards import read_file
from pipeline.storage import PROMOTED, filesystem, local_model, promoted_model

GATES = """
[[gate]]
figure = "s/document/ndcg@10"
at_least = {least}
of = "low"
[[gate]]
figure = "s/bm25/ndcg@10"
of = "difference_high"
at_most = 0.0
"""


@pytest.fixture
def model(tmp_path: Path, tiny_model_folder: Path) -> Path:
    """A model folder that carries an evaluation, and things that do not belong to it."""
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    evaluation = replace(make(), weights=weights_hash(folder), tokenizer=tokenizer_hash(folder))
    (folder / EVALUATION).write_text(evaluation.to_json())
    (folder / "checkpoints" / "step-1").mkdir(parents=True)
    (folder / "checkpoints" / "step-1" / "tensors.safetensors").write_bytes(b"large")
    (folder / "notes.txt").write_text("mine")
    return folder


def gates(tmp_path: Path, text: str = GATES, least: float = 0.3) -> str:
    (tmp_path / "gates.toml").write_text(text.format(least=least))
    return str(tmp_path / "gates.toml")


def test_a_model_that_passes_is_copied_whole_and_pointed_at(tmp_path: Path, model: Path) -> None:
    place = tmp_path / "models"
    report = run_promote(str(model), str(place), gates(tmp_path))
    assert report.status == "done"
    assert report.promoted == promoted_model(str(place))
    promoted = Path(local_model(str(place)))
    assert weights_hash(promoted) == weights_hash(model) == json.loads((place / PROMOTED).read_text())["weights"]
    names = {p.relative_to(promoted).as_posix() for p in promoted.rglob("*") if p.is_file()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "1_Pooling/config.json", EVALUATION} <= names
    assert not {"notes.txt"} & names
    assert not any("checkpoints" in name for name in names)
    assert (Embedder(promoted).encode("a text") == Embedder(model).encode("a text")).all()
    # Again: the same folder, nothing beside it.
    assert run_promote(str(model), str(place), gates(tmp_path)).promoted == report.promoted
    assert sorted(p.name for p in place.iterdir()) == sorted([promoted.name, PROMOTED])


def test_another_model_takes_over_and_the_first_stays(tmp_path: Path, model: Path) -> None:
    place = tmp_path / "models"
    first = run_promote(str(model), str(place), gates(tmp_path)).promoted
    settings = json.loads((model / "config_sentence_transformers.json").read_text())
    (model / "config_sentence_transformers.json").write_text(json.dumps(settings | {"prompts": {"query": "ask: "}}))
    second = run_promote(str(model), str(place), gates(tmp_path)).promoted
    assert first != second == promoted_model(str(place))
    assert first is not None
    assert Embedder(first).prompts["query"] == "query: "


def test_a_missed_gate_is_status_3_and_changes_nothing(tmp_path: Path, model: Path) -> None:
    place = tmp_path / "models"
    run = nightloom("promote", model, place, "--gates", gates(tmp_path, least=0.41))
    assert run.returncode == 3, run.stderr
    assert "was not promoted" in run.stdout
    assert "low of s/document/ndcg@10 is 0.40000, wanted >= 0.41: missed by 0.01000" in run.stdout
    assert "difference high of s/bm25/ndcg@10 is 0.00000, wanted <= 0: holds" in run.stdout
    assert not place.exists()
    report = run_promote(str(model), str(place), gates(tmp_path, least=0.41))
    assert json.loads(report.to_json())["status"] == "unpublished"
    assert [outcome.missed_by > 0 for outcome in report.outcomes] == [True, False]


def test_other_weights_than_were_evaluated_are_refused(tmp_path: Path, model: Path) -> None:
    place = tmp_path / "models"
    tree = json.loads((model / EVALUATION).read_text())
    (model / EVALUATION).write_text(json.dumps(tree | {"weights": "f" * 32}))
    with pytest.raises(InputError, match=r"is of other weights \(ffffffffffff\) than lie there"):
        run_promote(str(model), str(place), gates(tmp_path))
    (model / EVALUATION).unlink()
    refused("promote", model, place, "--gates", gates(tmp_path), says="carries no evaluation (evaluation.json)")
    assert not place.exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[[gate]]\nfigure = "s/document/ndcg"\nat_least = 1', "was not measured; the nearest is 's/document/ndcg@10'"),
        ('[[gate]]\nfigure = "s/document/ndcg@10"', "needs either at_least or at_most"),
        ('[[gate]]\nfigure = "s/document/ndcg@10"\nof = "difference"\nat_least = 0', "was compared with nothing"),
        ('[[gate]]\nfigure = "s/document/ndcg@10"\natleast = 0.5', "gate"),
        ("", "gate"),
        ("gate = []", "gate"),
    ],
)
def test_gates_that_mean_nothing_are_refused(tmp_path: Path, model: Path, text: str, says: str) -> None:
    with pytest.raises(InputError, match=says.replace("(", r"\(")):
        run_promote(str(model), str(tmp_path / "models"), gates(tmp_path, text))


def test_to_s3_and_from_there(
    tmp_path: Path, model: Path, s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NIGHTLOOM_CACHE", str(tmp_path / "cache"))
    place = "s3://bucket/promoted"
    report = run_promote(str(model), place, gates(tmp_path))
    assert report.promoted == promoted_model(place)
    assert report.promoted.startswith(place + "/")
    assert weights_hash(local_model(place)) == weights_hash(model)
    # A copy that was cut off is completed, and counts only then.
    pointer = read_file(place, PROMOTED)
    assert pointer is not None
    files, path = filesystem(report.promoted)
    with files.open_output_stream(f"{path}/model.safetensors") as stream:
        stream.write((model / "model.safetensors").read_bytes()[:1000])
    assert run_promote(str(model), place, gates(tmp_path)).promoted == report.promoted
    with files.open_input_stream(f"{path}/model.safetensors") as stream:
        assert stream.read() == (model / "model.safetensors").read_bytes()
    again = run_promote(report.promoted, "s3://bucket/elsewhere", gates(tmp_path))
    assert again.weights == report.weights


def test_a_damaged_pointer_is_said(tmp_path: Path) -> None:
    (tmp_path / PROMOTED).write_text("{")
    with pytest.raises(InputError, match=r"promoted\.json is damaged; promote a model again"):
        local_model(str(tmp_path))
    assert promoted_model(str(tmp_path / "elsewhere")) == str(tmp_path / "elsewhere")


def test_a_table_remembers_the_folder_that_counted(tmp_path: Path, model: Path) -> None:
    from jobs.configuration import EmbedConfiguration
    from jobs.plan import pinned, read_model

    place = tmp_path / "models"
    promoted = run_promote(str(model), str(place), gates(tmp_path)).promoted
    configuration = EmbedConfiguration(source="s", table="t", model=str(place))
    assert pinned(configuration).model == promoted
    assert read_model(configuration).path == promoted
