"""The whole evaluation on small sets: names, comparisons, what is kept, and what is refused in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from test_jobs_cli import nightloom

from jobs.configuration import load
from jobs.evaluate import correlation_of, evaluate, run_evaluate, validate
from jobs.evaluation import EVALUATION, EvaluateConfiguration, Evaluation, read_evaluation
from jobs.intervals import Figure
from model import Embedder
from model.errors import InputError
from model.folder import weights_hash

WORDS = ("cluster", "vector", "night", "crash", "window", "token", "brown", "fox", "lazy", "dog", "attention", "embeds")
DRAW = np.random.default_rng(5)


def sentence(length: int) -> str:
    return " ".join(DRAW.choice(WORDS, length))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of three small sets: 24 documents, half of them long, asked for by their first words."""
    folder = tmp_path_factory.mktemp("sets")

    def write(name: str, rows: list[dict[str, Any]]) -> str:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(folder / name)

    texts = [f"number{i} {sentence(150 if i % 2 else 8)}" for i in range(24)]
    write("beir/corpus.jsonl", [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)])
    write("beir/queries.jsonl", [{"_id": f"q{i}", "text": text[:40]} for i, text in enumerate(texts)])
    (folder / "beir" / "qrels").mkdir()
    judged = "".join(f"q{i}\td{i}\t1\n" for i in range(24))
    (folder / "beir" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged, encoding="utf-8")
    pairs = [{"sentence1": texts[i], "sentence2": texts[i - i % 4], "score": float(i % 4 == 0)} for i in range(24)]
    labelled = [
        {"text": f"{'apples pears' if i % 2 else 'hammer nails'} {sentence(4)}", "label": i % 2} for i in range(60)
    ]
    return {
        "retrieval": {
            "toy": {
                "path": str(folder / "beir"),
                "modes": ["document", "chunk-late", "chunk-none"],
                "long_words": 100,
            }
        },
        "similarity": {"pairs": {"path": write("pairs.jsonl", pairs)}},
        "classification": {
            "labels": {"train": write("train.jsonl", labelled[:40]), "test": write("test.jsonl", labelled[40:])}
        },
        "samples": 200,
        "chunk_tokens": 32,
        "dtype": "float32",
    }


def configured(model: Path, **settings: Any) -> EvaluateConfiguration:
    return load(EvaluateConfiguration, file=None, sets=[], given={}, defaults={"model": str(model), **settings})


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(tiny_model_folder, tmp_path_factory.mktemp("evaluated") / "model"))


@pytest.fixture(scope="module")
def evaluation(model: Path, tiny_model_folder: Path, sets: dict[str, Any]) -> Evaluation:
    peers = {"same": {"path": str(tiny_model_folder)}}
    return run_evaluate(configured(model, lexical=["bm25", "tf-idf"], random_weights=True, peers=peers, **sets))


def find(evaluation: Evaluation, name: str) -> Figure:
    (figure,) = (f for f in evaluation.figures if f.name == name)
    return figure


def test_every_system_has_its_figures(evaluation: Evaluation) -> None:
    systems = {f.system for f in evaluation.figures if f.set == "toy"}
    cheaper = {f"document+{name}" for name in ("int8", "binary", "dim32", "dim16")}
    assert systems == {"document", "chunk-late", "chunk-none", "random", "same", "bm25", "tf-idf"} | cheaper
    assert {f.system for f in evaluation.figures if f.set == "pairs"} == {"document", "random", "same", "tf-idf"}
    assert {f.system for f in evaluation.figures if f.set == "labels"} == {"document", "random", "same", "tf-idf"}
    assert find(evaluation, "toy/document/ndcg@10").num_items == 24
    assert find(evaluation, "toy-long/document/ndcg@10").num_items == 12
    # A question is the beginning of its document: words find it every time.
    assert find(evaluation, "toy/bm25/recall@10").interval.value > 0.9
    assert find(evaluation, "labels/tf-idf/accuracy").interval.value == 1.0
    assert find(evaluation, "labels/document/accuracy").interval.value > 0.7
    for figure in evaluation.figures:
        assert figure.interval.low <= figure.interval.value <= figure.interval.high, figure.name


def test_differences_are_paired_and_say_against_what(evaluation: Evaluation) -> None:
    same = find(evaluation, "toy/same/ndcg@10")
    assert same.against == "document"
    assert same.difference is not None
    assert (same.difference.low, same.difference.value, same.difference.high) == (0, 0, 0)
    assert find(evaluation, "toy/document/ndcg@10").difference is None
    late = find(evaluation, "toy-long/chunk-late/ndcg@10")
    assert late.against == "chunk-none"
    alone = find(evaluation, "toy-long/chunk-none/ndcg@10")
    assert late.difference is not None
    assert late.difference.value == pytest.approx(late.interval.value - alone.interval.value)
    assert find(evaluation, "toy/document+int8/mrr@10").against == "document"


def test_what_is_kept_is_the_evaluation_of_these_weights(evaluation: Evaluation, model: Path) -> None:
    kept = read_evaluation(str(model))
    assert kept is not None
    assert kept.to_tree() == evaluation.to_tree()
    assert kept.weights == weights_hash(model)
    assert kept.sets["toy"]["items"] == 24
    assert len(kept.sets["pairs"]["fingerprint"]) == 32
    assert {"torch", "pytrec-eval-terrier"} <= set(kept.versions)
    Embedder(model)  # the file does not stand in a model's way


def test_a_table_for_people(evaluation: Evaluation) -> None:
    text = evaluation.summary()
    assert "toy-long, 12 items" in text
    figure = find(evaluation, "toy/chunk-late/ndcg@10")
    assert str(figure.interval) in text
    assert "against chunk-none" in text
    assert text.isascii()


@pytest.mark.parametrize("ranked", [True, False])
def test_correlations_are_scipys(ranked: bool) -> None:
    first, second = DRAW.normal(size=50), np.round(DRAW.normal(size=50))  # ranks with ties
    picks = DRAW.integers(0, 50, (5, 50))
    expected = [(spearmanr if ranked else pearsonr)(first[p], second[p])[0] for p in picks]
    assert correlation_of(first, second, ranked=ranked)(picks) == pytest.approx(expected)
    assert np.isnan(correlation_of(first, np.ones(50), ranked=ranked)(picks)).all()


def test_a_training_loop_gets_names_and_values(model: Path, sets: dict[str, Any]) -> None:
    from ray.train import Checkpoint

    settings = {"similarity": sets["similarity"], "samples": 100, "dtype": "float32"}
    before = (model / EVALUATION).stat().st_mtime_ns if (model / EVALUATION).exists() else None
    values = validate(Checkpoint.from_directory(str(model.parent)), settings, subfolder="model")
    assert set(values) == {"pairs/document/spearman", "pairs/document/pearson"}
    assert values == evaluate(model, {"keep": False, **settings})
    json.dumps(values)
    assert before == ((model / EVALUATION).stat().st_mtime_ns if (model / EVALUATION).exists() else None)


def test_the_command_prints_json_and_writes_it_elsewhere(model: Path, sets: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "evaluate.toml"
    config.write_text(f'[similarity.pairs]\npath = "{sets["similarity"]["pairs"]["path"]}"\n', encoding="utf-8")
    out = tmp_path / "out.json"
    run = nightloom("evaluate", model, config, "--output", out, "--set", "keep=false", "--set", "samples=100", "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == json.loads(out.read_text())
    assert json.loads(run.stdout)["figures"][0]["name"] == "pairs/document/spearman"


def test_words_that_find_nothing_in_common_spoil_no_evaluation(model: Path, tmp_path: Path) -> None:
    """As in pairs of two languages."""
    pairs = [("ein Hund rennt", "some dog runs"), ("gutes Wetter", "rain today"), ("drei Katzen", "three cats")]
    rows = [{"sentence1": a, "sentence2": b, "score": float(score)} for score, (a, b) in enumerate(pairs)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {"keep": False, "lexical": ["tf-idf"], "samples": 100, "dtype": "float32"}
    found = evaluate(model, {"similarity": {"cross": {"path": str(tmp_path / "pairs.jsonl")}}, **settings})
    assert set(found) == {"cross/document/spearman", "cross/document/pearson"}


def test_what_is_wrong_is_said_before_anything_is_embedded(tmp_path: Path, sets: dict[str, Any]) -> None:
    def wrong(says: str, **settings: Any) -> None:
        with pytest.raises(InputError, match=says):
            run_evaluate(configured(tmp_path / "no model", **settings))

    pairs = sets["similarity"]["pairs"]
    wrong("nothing to evaluate on; name a set, as in --set retrieval.NAME.path=FOLDER")
    wrong("has no corpus.jsonl", retrieval={"x": {"path": str(tmp_path)}})
    wrong("the name 'x' stands for two sets", similarity={"x": pairs}, masked={"x": {"tokens": "t"}})
    wrong("a slash in it", similarity={"a/b": pairs})
    wrong("a peer cannot be called 'bm25'", similarity={"x": pairs}, peers={"bm25": {"path": "p"}})
    wrong("no model folder at", similarity={"x": pairs})
    with pytest.raises(InputError, match=r"similarity\.x\.path is"):
        configured(tmp_path, similarity={"x": {"path": 3}})


def test_dimensions_that_the_model_has_not_are_refused(model: Path, sets: dict[str, Any]) -> None:
    settings = {"retrieval": {"toy": {"path": sets["retrieval"]["toy"]["path"]}}, "cheaper": {"dims": [65]}}
    with pytest.raises(InputError, match="dims has 65; the model gives 64 dimensions"):
        run_evaluate(configured(model, keep=False, **settings))
