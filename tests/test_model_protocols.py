"""An `Embedder` in the hands of mteb and of sentence-transformers' evaluators: the figures of the same folder in
sentence-transformers.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import Embedder
from model.errors import InputError
from model.protocols import texts_of

TEXTS = [f"{word} {number}" for word in ("cluster", "vector", "night", "fox") for number in range(6)]


@pytest.fixture(scope="module")
def ours(tiny_model_folder: Path) -> Embedder:
    return Embedder(tiny_model_folder, dtype="float32")


@pytest.fixture(scope="module")
def theirs(tiny_model_folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(tiny_model_folder), device="cpu", local_files_only=True)


def test_prompts_for_questions_and_documents(ours: Embedder, theirs: Any) -> None:
    assert ours.encode_query(TEXTS) == pytest.approx(theirs.encode_query(TEXTS), abs=1e-5)
    assert ours.encode_document(TEXTS) == pytest.approx(theirs.encode_document(TEXTS), abs=1e-5)
    assert (ours.encode_query(TEXTS, prompt="") == ours.encode(TEXTS, prompt="")).all()
    assert (ours.encode_query(TEXTS, prompt_name="document") == ours.encode_document(TEXTS)).all()


def test_options_of_others_are_taken_and_mistakes_are_not(ours: Embedder) -> None:
    plain = ours.encode(TEXTS)
    vectors = ours.encode(TEXTS, batch_size=3, show_progress_bar=True, convert_to_tensor=True, precision="float32")
    assert isinstance(vectors, torch.Tensor)
    assert (vectors.numpy() == plain).all()
    with pytest.raises(TypeError, match="has no option promt_name='query'"):
        ours.encode(TEXTS, promt_name="query")
    with pytest.raises(TypeError, match="has no option precision='int8'"):
        ours.encode(TEXTS, precision="int8")
    assert texts_of([{"text": ["a", "b"]}, {"text": ["c"]}]) == texts_of(["a", "b", "c"])


def test_similarities_are_cosines(ours: Embedder, theirs: Any) -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 5, 16)).astype(np.float32)
    assert torch.allclose(ours.similarity(a, b), theirs.similarity(a, b), atol=1e-6)
    assert torch.allclose(ours.similarity_pairwise(a, b), theirs.similarity_pairwise(a, b), atol=1e-6)
    assert ours.similarity(a[0], b).shape == (1, 5)


def test_similarities_are_what_the_folder_says(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "m"))
    file = folder / "config_sentence_transformers.json"
    a, b = np.random.default_rng(0).normal(size=(2, 5, 16)).astype(np.float32)
    for name, expected in (("dot", a @ b.T), ("euclidean", None)):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"similarity_fn_name": name}))
        embedder = Embedder(folder, dtype="float32")
        assert embedder.similarity_fn_name == name
        if expected is None:
            with pytest.raises(InputError, match="similarity is 'euclidean'; computed here are cosine and dot"):
                embedder.similarity(a, b)
            continue
        np.testing.assert_allclose(embedder.similarity(a, b), expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(embedder.similarity_pairwise(a, b), np.diag(expected), rtol=0, atol=1e-5)


def test_evaluators_of_sentence_transformers(ours: Embedder, theirs: Any) -> None:
    from sentence_transformers.sentence_transformer import evaluation

    queries = {str(i): text.split()[0] for i, text in enumerate(TEXTS)}
    relevant = {str(i): {str(j) for j in range(len(TEXTS)) if i // 6 == j // 6} for i in range(len(TEXTS))}
    halves = TEXTS[:12], TEXTS[12:]
    evaluators = [
        evaluation.InformationRetrievalEvaluator(queries, {str(i): t for i, t in enumerate(TEXTS)}, relevant),
        evaluation.EmbeddingSimilarityEvaluator(*halves, [i / 12 for i in range(12)]),
        evaluation.EmbeddingSimilarityEvaluator(
            *halves, [i / 12 for i in range(12)], similarity_fn_names=["cosine", "dot", "euclidean"]
        ),
        evaluation.BinaryClassificationEvaluator(*halves, [i % 2 for i in range(12)]),
        evaluation.TripletEvaluator(TEXTS[:6], TEXTS[1:7], TEXTS[12:18]),
    ]
    for evaluator in evaluators:
        found, expected = evaluator(ours), evaluator(theirs)
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, abs=1e-4), type(evaluator).__name__


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_tasks_of_mteb(ours: Embedder, theirs: Any) -> None:
    """The tasks that mteb ships to try models with: they hold their few texts themselves."""
    mteb = pytest.importorskip("mteb")
    from mteb.mocks.mock_tasks import MockClassificationTask, MockPairClassificationTask, MockRetrievalTask, MockSTSTask
    from mteb.models.models_protocols import EncoderProtocol

    assert isinstance(ours, EncoderProtocol)
    tasks = [MockRetrievalTask(), MockSTSTask(), MockClassificationTask(), MockPairClassificationTask()]
    scores = []
    for model in (ours, theirs):
        results = mteb.evaluate(model, tasks, cache=None, show_progress_bar=False).task_results
        scores.append({r.task_name: r.get_score() for r in results})
    assert scores[0].keys() == {task.metadata.name for task in tasks}
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
