"""The contrastive loss: every query against all texts of the global batch (InfoNCE), at every Matryoshka dimension.

A loss here is a sum over some rows, those of one worker; the mean is the caller's, over the rows of all workers. What
looks like a negative and answers the question all the same is masked. Shape suffixes: N texts of the batch, Q rows, C
candidates, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.pooling import normalize

QUERY, POSITIVE, NEGATIVE = 0, 1, 2
"""What a text of a batch is for."""


@dataclass(frozen=True, slots=True)
class Texts:
    """What the texts of a global batch are to one another; the same on every worker."""

    example_N: Tensor
    """int64: number of the example that a text belongs to, from 0; each has one query and one positive."""
    role_N: Tensor
    """int64: `QUERY`, `POSITIVE` or `NEGATIVE`."""
    key_N: Tensor
    """int64: equal for texts of one document, and for queries that are the same."""
    text_N: Tensor
    """int64: equal for equal texts, whatever their documents are called."""

    def of(self, role: int) -> Tensor:
        """Where the texts of a role stand, in the order of their examples."""
        index = (self.role_N == role).nonzero().squeeze(1)
        return index[self.example_N[index].argsort(stable=True)]


def hidden_pairs(texts: Texts, rows_Q: Tensor, candidates_C: Tensor) -> Tensor:
    """(Q, C): which candidates are no negatives of these rows, because they are known to belong together.

    A row and a candidate belong together where the candidate is the document of the row's own positive, or has its
    text, or is the positive of an example that asks the same. The row's own positive is hidden too. Rows may be
    queries, with candidates that are documents, or the other way about.

    Pair by pair: that A has an id in common with B and B a text with C says nothing of A and C. Joined all the way, one
    paragraph that stands in many documents would make one document of them, without a negative left.
    """
    queries, positives = texts.of(QUERY), texts.of(POSITIVE)
    question_N = torch.full_like(texts.key_N, -1)
    question_N[queries] = question_N[positives] = texts.key_N[queries]
    hidden_QC = (question_N[rows_Q, None] == question_N[candidates_C]) & (question_N[candidates_C] >= 0)
    for name_N in (texts.key_N, texts.text_N):
        answer_N = name_N.clone()
        answer_N[queries] = name_N[positives]
        hidden_QC |= answer_N[rows_Q, None] == answer_N[candidates_C]
    return hidden_QC


def info_nce(
    rows_QD: Tensor, candidates_CD: Tensor, positive_Q: Tensor, hidden_QC: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """-log softmax of each row's positive among the candidates that are not hidden, summed over the rows.

    Args:
        positive_Q: which candidate is the positive; it counts whether hidden or not.
        scale: what cosines are multiplied by, one over the temperature.

    Returns:
        The loss, and how many positives came first (no gradient).
    """
    logits_QC = normalize(rows_QD) @ normalize(candidates_CD).T * scale
    hidden_QC = hidden_QC.scatter(1, positive_Q[:, None], False)
    logits_QC = logits_QC.masked_fill(hidden_QC, -torch.inf)
    loss = F.cross_entropy(logits_QC, positive_Q, reduction="sum")
    return loss, (logits_QC.argmax(dim=1) == positive_Q).sum()


def contrastive_loss(
    vectors_ND: Tensor,
    scale: Tensor,
    texts: Texts,
    *,
    dims: Sequence[int] = (),
    weights: Sequence[float] = (),
    margin: float | None = None,
    symmetric: bool = False,
    share: tuple[int, int] = (0, 1),
) -> tuple[Tensor, Tensor]:
    """InfoNCE of one worker's examples against the whole global batch, hard negatives of all examples included.

    Args:
        vectors_ND: one vector for each text of the global batch; not normalised.
        scale: one over the temperature.
        dims: lengths of leading parts that must serve as vectors too (Matryoshka); none: the whole vector only.
        weights: of each of `dims`; none: 1 each. The loss is divided by their sum.
        margin: hides candidates that are nearer to the query than its positive by more than this, measured on whole
            vectors, as likely answers; None hides none.
        symmetric: the mean of this loss and of the one in which a positive has to find its query.
        share: (k, n): the examples k, k + n, ... only.

    Returns:
        The loss summed over these examples, and how many of their positives came first, on whole vectors.
    """
    queries, positives = texts.of(QUERY), texts.of(POSITIVE)
    documents = torch.cat([positives, texts.of(NEGATIVE)])
    chosen = torch.arange(len(queries), device=vectors_ND.device)[share[0] :: share[1]]
    directions = [(queries[chosen], documents)]
    if symmetric:
        directions.append((positives[chosen], queries))
    dims = tuple(dims) or (vectors_ND.shape[1],)
    weights = tuple(weights) or (1.0,) * len(dims)
    total, first = vectors_ND.new_zeros(()), None
    for rows, candidates in directions:
        hidden_QC = hidden_pairs(texts, rows, candidates)
        if margin is not None:
            hidden_QC |= too_near(vectors_ND[rows], vectors_ND[candidates], chosen, margin)
        for dim, weight in zip(dims, weights, strict=True):
            part_ND = vectors_ND[:, :dim]
            loss, correct = info_nce(part_ND[rows], part_ND[candidates], chosen, hidden_QC, scale)
            total = total + loss * (weight / sum(weights) / len(directions))
            if first is None and dim == max(dims):
                first = correct
    assert first is not None
    return total, first


@torch.no_grad()
def too_near(rows_QD: Tensor, candidates_CD: Tensor, positive_Q: Tensor, margin: float) -> Tensor:
    """(Q, C): candidates whose cosine to the row is over that of its positive by more than a margin."""
    cosine_QC = normalize(rows_QD) @ normalize(candidates_CD).T
    return cosine_QC > cosine_QC.gather(1, positive_Q[:, None]) + margin
