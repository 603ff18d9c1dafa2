"""Search: exact answers from the published version, through the table's own model, with the text that was embedded."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from test_jobs_embed import configured, text_of, write_corpus

from jobs.embed import run_embed
from jobs.search import SNIPPET_CHARS, encode_questions, run_search, snippet
from model.embedder import Embedder
from model.errors import InputError


@pytest.fixture(scope="module")
def table(tmp_path_factory, tiny_model_folder, ray_session):
    folder = tmp_path_factory.mktemp("search")
    write_corpus(folder / "corpus", 20)
    run_embed(configured(folder / "corpus", folder / "table.lance", tiny_model_folder))
    return folder / "table.lance"


def test_answers_are_those_of_brute_force(table, tiny_model_folder):
    embedder = Embedder(tiny_model_folder, device="cpu", dtype="float32")
    names = [f"{n:03}.txt" for n in range(10)] + [f"row-{n}" for n in range(10, 20)]
    question = "which fox jumps every night"
    cosines = embedder.encode([text_of(n, 30) for n in range(20)]) @ embedder.encode(question, prompt_name="query")
    report = run_search(str(table), question, k=5, device="cpu")
    # The query runs in the device's own precision: ties within it may change places.
    np.testing.assert_allclose([hit.score for hit in report.hits], np.sort(cosines)[::-1][:5], atol=2e-2)
    for hit in report.hits:
        assert abs(hit.score - cosines[names.index(hit.document_id)]) < 2e-2
    assert [hit.rank for hit in report.hits] == [1, 2, 3, 4, 5]


def test_snippets_are_the_embedded_text(table):
    report = run_search(str(table), "fox", k=20)
    for hit in report.hits:
        number = int(hit.document_id.removesuffix(".txt").removeprefix("row-"))
        assert hit.snippet is not None
        assert text_of(number, 30).startswith(hit.snippet.removesuffix(" ..."))
    assert report.hits[0].document_id in report.summary()


def test_changed_source_shows_no_snippet(tmp_path, tiny_model_folder, ray_session):
    (tmp_path / "a.txt").write_text("one text")
    run_embed(configured(tmp_path / "a.txt", tmp_path / "t", tiny_model_folder))
    (tmp_path / "a.txt").write_text("another text")
    assert run_search(str(tmp_path / "t"), "text").hits[0].snippet is None
    (tmp_path / "a.txt").unlink()
    assert run_search(str(tmp_path / "t"), "text").hits[0].snippet is None


def test_other_weights_are_refused(table, tmp_path, tiny_model_folder):
    other = tmp_path / "other"
    shutil.copytree(tiny_model_folder, other)
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    with pytest.raises(InputError, match="is not the model that"):
        run_search(str(table), "fox", model=str(other))
    with pytest.raises(InputError, match="-k is 0"):
        run_search(str(table), "fox", k=0)


@pytest.mark.parametrize("normalize", [True, False])
def test_questions_have_the_length_of_the_tables_vectors(tiny_model_folder, normalize):
    """Whatever the model's folder says, which is unit length here."""
    table = SimpleNamespace(recipe=SimpleNamespace(normalize=normalize, dim=24))
    vectors = encode_questions(table, str(tiny_model_folder), ["which fox", "every night"], "cpu")
    assert vectors.shape == (2, 24)
    assert (np.abs(np.linalg.norm(vectors, axis=1) - 1) < 1e-3).all() == normalize


def test_snippet_is_one_line_cut_at_a_word():
    assert snippet(None, 0, 3) is None
    assert snippet("xx a\n\n b\tc yy", 3, 10) == "a b c"
    long = snippet("word " * 100, 0, 500)
    assert long.endswith("word ...")
    assert len(long) <= SNIPPET_CHARS + 4
