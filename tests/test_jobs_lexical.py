"""BM25 against its formula written out, tf-idf as cosines."""

import math

import numpy as np
import pytest

from jobs.lexical import K1, B, lexical_scorer, needed, tfidf_pairs
from model.errors import InputError

DOCUMENTS = ["the cat sat on the mat", "dogs and cats", "the dog chased the cat, the cat ran", "nothing of it"]
QUERIES = ["the cat", "dog", "zebra", "cat cat"]


def written_out(query: str, document: str) -> float:
    words = [text.replace(",", "").split() for text in DOCUMENTS]
    mean = sum(map(len, words)) / len(words)
    own = document.replace(",", "").split()
    score = 0.0
    for word in query.split():
        found = sum(word in other for other in words)
        idf = math.log(1 + (len(words) - found + 0.5) / (found + 0.5))
        count = own.count(word)
        score += idf * count * (K1 + 1) / (count + K1 * (1 - B + B * len(own) / mean))
    return score


def test_bm25_is_its_formula() -> None:
    scores = lexical_scorer("bm25", DOCUMENTS, QUERIES)(slice(0, 4))
    for i, query in enumerate(QUERIES):
        for j, document in enumerate(DOCUMENTS):
            expected = written_out(query, document)
            assert scores[i, j] == pytest.approx(expected, rel=1e-6) if expected else scores[i, j] == -np.inf
    assert scores[2].max() == -np.inf  # a word that no document has finds none
    assert np.array_equal(lexical_scorer("bm25", DOCUMENTS, QUERIES)(slice(1, 2)), scores[1:2])


def test_tfidf_is_a_cosine() -> None:
    scores = lexical_scorer("tf-idf", DOCUMENTS, DOCUMENTS)(slice(0, 4))
    assert scores.diagonal() == pytest.approx(np.ones(4))
    assert np.allclose(scores, scores.T)
    pairs = tfidf_pairs([DOCUMENTS[0], DOCUMENTS[0], DOCUMENTS[1]], [DOCUMENTS[2], DOCUMENTS[0], DOCUMENTS[3]])
    assert pairs[1] == pytest.approx(1)
    assert pairs[2] == 0  # no word in common
    assert 0 < pairs[0] < 1


def test_what_is_not_installed_is_said() -> None:
    with pytest.raises(InputError, match="evaluation needs no_such_metrics; install it with pip"):
        needed("no_such_metrics")
