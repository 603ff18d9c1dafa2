"""InfoNCE against a loop over pairs, and what counts as a negative."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.contrastive import NEGATIVE, POSITIVE, QUERY, Texts, contrastive_loss, hidden_pairs
from model.pooling import normalize

SCALE = torch.tensor(4.0, dtype=torch.float64)
TEXTS = Texts(
    example_N=torch.tensor([0, 0, 0, 1, 1, 2, 2, 2]),
    role_N=torch.tensor([QUERY, POSITIVE, NEGATIVE, QUERY, POSITIVE, QUERY, POSITIVE, NEGATIVE]),
    key_N=torch.tensor([0, 10, 11, 1, 12, 2, 13, 14]),
    text_N=torch.arange(8),
)
"""Three examples, each with its texts beside one another."""


def vectors(count: int = 8, dim: int = 6) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def by_hand(vectors_ND: Tensor, queries: list[int], positives: list[int], candidates: list[list[int]]) -> float:
    """-log softmax of each positive among its candidates, one by one."""
    unit, total = normalize(vectors_ND), 0.0
    for query, positive, some in zip(queries, positives, candidates, strict=True):
        logits = [float(unit[query] @ unit[c] * SCALE) for c in some]
        total -= logits[some.index(positive)] - math.log(sum(map(math.exp, logits)))
    return total


def test_every_text_but_queries_is_a_candidate() -> None:
    loss, correct = contrastive_loss(vectors(), SCALE, TEXTS)
    everything = [1, 4, 6, 2, 7]
    assert float(loss) == pytest.approx(by_hand(vectors(), [0, 3, 5], [1, 4, 6], [everything] * 3), abs=1e-12)
    unit = normalize(vectors())
    nearest = [everything[int((unit[q] @ unit[everything].T).argmax())] for q in (0, 3, 5)]
    assert int(correct) == sum(n == p for n, p in zip(nearest, (1, 4, 6), strict=True))


def test_the_other_direction() -> None:
    loss, _ = contrastive_loss(vectors(), SCALE, TEXTS, symmetric=True)
    there = by_hand(vectors(), [0, 3, 5], [1, 4, 6], [[1, 4, 6, 2, 7]] * 3)
    back = by_hand(vectors(), [1, 4, 6], [0, 3, 5], [[0, 3, 5]] * 3)
    assert float(loss) == pytest.approx((there + back) / 2, abs=1e-12)


def test_one_document_is_no_negative_of_itself() -> None:
    """The positives of the first and the last example, and a negative of the second, are one document."""
    key = TEXTS.key_N.clone()
    key[6] = key[2] = key[1]
    loss, _ = contrastive_loss(vectors(), SCALE, replace(TEXTS, key_N=key))
    left = [[1, 4, 7], [1, 4, 6, 2, 7], [4, 6, 7]]
    assert float(loss) == pytest.approx(by_hand(vectors(), [0, 3, 5], [1, 4, 6], left), abs=1e-12)


def test_one_text_is_no_negative_of_itself_under_another_id() -> None:
    """The negative of the second example has the words of the first positive, and its id is the last one's. The first
    and the last are told apart all the same.
    """
    text, key = TEXTS.text_N.clone(), TEXTS.key_N.clone()
    example = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2])
    role = torch.tensor([QUERY, POSITIVE, QUERY, POSITIVE, NEGATIVE, QUERY, POSITIVE, NEGATIVE])
    text[4], key[4] = text[1], key[6]
    loss, _ = contrastive_loss(vectors(), SCALE, Texts(example, role, key, text))
    left = [[1, 3, 6, 7], [1, 3, 4, 6, 7], [1, 3, 6, 7]]
    assert float(loss) == pytest.approx(by_hand(vectors(), [0, 2, 5], [1, 3, 6], left), abs=1e-12)


def test_an_answer_to_the_same_question_is_no_negative() -> None:
    key = TEXTS.key_N.clone()
    key[3] = key[0]
    loss, _ = contrastive_loss(vectors(), SCALE, replace(TEXTS, key_N=key))
    left = [[1, 6, 2, 7], [4, 6, 2, 7], [1, 4, 6, 2, 7]]
    assert float(loss) == pytest.approx(by_hand(vectors(), [0, 3, 5], [1, 4, 6], left), abs=1e-12)


def test_questions_and_documents_share_no_keys() -> None:
    """A query and a text may have one number: they are counted apart."""
    same = torch.zeros(8, dtype=torch.int64)
    distinct = replace(TEXTS, key_N=torch.tensor([0, 0, 1, 1, 2, 2, 3, 4]))
    hidden = hidden_pairs(distinct, distinct.of(QUERY), distinct.of(POSITIVE))
    assert hidden.equal(torch.eye(3, dtype=torch.bool))
    assert hidden_pairs(replace(TEXTS, key_N=same), TEXTS.of(QUERY), TEXTS.of(POSITIVE)).all()


def test_what_is_nearer_than_the_positive_by_a_margin_is_left_out() -> None:
    drawn = vectors()
    unit = normalize(drawn)
    margin = 0.2
    documents = [1, 4, 6, 2, 7]
    left = [
        [c for c in documents if c == p or float(unit[q] @ unit[c]) <= float(unit[q] @ unit[p]) + margin]
        for q, p in ((0, 1), (3, 4), (5, 6))
    ]
    assert any(len(some) < 5 for some in left), "something is hidden"
    loss, _ = contrastive_loss(drawn, SCALE, TEXTS, margin=margin)
    assert float(loss) == pytest.approx(by_hand(drawn, [0, 3, 5], [1, 4, 6], left), abs=1e-12)


def test_leading_parts_are_losses_of_their_own() -> None:
    drawn = vectors()
    parts = [float(contrastive_loss(drawn[:, :dim], SCALE, TEXTS)[0]) for dim in (2, 6)]
    loss, correct = contrastive_loss(drawn, SCALE, TEXTS, dims=(2, 6), weights=(1, 3))
    assert float(loss) == pytest.approx((parts[0] + 3 * parts[1]) / 4, abs=1e-12)
    assert correct == contrastive_loss(drawn, SCALE, TEXTS)[1], "of whole vectors"


@pytest.mark.parametrize("num", [2, 3, 5])
def test_shares_add_up(num: int) -> None:
    whole = contrastive_loss(vectors(), SCALE, TEXTS, symmetric=True)
    shares = [contrastive_loss(vectors(), SCALE, TEXTS, symmetric=True, share=(k, num)) for k in range(num)]
    assert float(sum(s[0] for s in shares)) == pytest.approx(float(whole[0]), abs=1e-12)
    assert sum(int(s[1]) for s in shares) == int(whole[1])


def test_a_masked_candidate_gets_no_gradient() -> None:
    drawn = vectors().requires_grad_()
    key = TEXTS.key_N.clone()
    key[7] = key[1] = key[4] = key[6]
    loss, _ = contrastive_loss(drawn, SCALE, replace(TEXTS, key_N=key))
    loss.backward()
    assert drawn.grad is not None
    assert drawn.grad[7].abs().max() == 0
    assert drawn.grad[2].abs().max() > 0
