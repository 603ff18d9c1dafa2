"""Learning from a teacher's stored vectors: to give the same vectors, and the same neighbours.

A loss here is a sum over some rows, those of one worker; the mean is the caller's. Shape suffixes: N texts of the
batch, Q rows, D width of the student, E of the teacher.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.pooling import normalize

Distance = Literal["cosine", "mse"]


def distillation_loss(
    vectors_ND: Tensor,
    teacher_NE: Tensor,
    *,
    distance: Distance = "cosine",
    distance_weight: float = 1.0,
    neighbour_weight: float = 0.0,
    temperature: float = 0.05,
    dims: Sequence[int] = (),
    share: tuple[int, int] = (0, 1),
) -> tuple[Tensor, Tensor]:
    """Distance to the teacher's vectors, and to its ranking of the batch.

    Args:
        vectors_ND: the student's vectors of all texts of the global batch; not normalised.
        teacher_NE: the teacher's. The distance needs as many dimensions as the student has; neighbours need not.
        distance: "cosine" (1 - cosine) or "mse" (the mean over dimensions of the squared difference).
        distance_weight, neighbour_weight: of the two parts; a part with weight 0 is not computed.
        temperature: of the softmax over the other texts of the batch. Ranking is decided among near neighbours: a low
            one puts the weight there.
        dims: leading parts of the student's vectors that must have the teacher's neighbours too (Matryoshka).
        share: (k, n): the texts k, k + n, ... only.

    Returns:
        The loss summed over these texts, and their summed cosine to the teacher (no gradient; 0 where lengths differ).
    """
    rows = slice(share[0], None, share[1])
    student, teacher = vectors_ND[rows], teacher_NE[rows].to(vectors_ND.dtype)
    total, cosine = vectors_ND.new_zeros(()), vectors_ND.new_zeros(())
    if student.shape[1] == teacher.shape[1]:
        cosines_Q = (normalize(student) * normalize(teacher)).sum(dim=1)
        cosine = cosines_Q.detach().sum()
        if distance_weight:
            apart = (1 - cosines_Q).sum() if distance == "cosine" else (student - teacher).square().mean(dim=1).sum()
            total = total + distance_weight * apart
    if neighbour_weight:
        for dim in tuple(dims) or (vectors_ND.shape[1],):
            part = neighbour_loss(vectors_ND[:, :dim], teacher_NE.to(vectors_ND.dtype), rows, temperature)
            total = total + part * (neighbour_weight / max(len(dims), 1))
    return total, cosine


def neighbour_loss(vectors_ND: Tensor, teacher_NE: Tensor, rows: slice, temperature: float) -> Tensor:
    """Cross-entropy of the student's softmax over the other texts to the teacher's, summed over rows, less the entropy
    of the teacher's: 0 where they agree.
    """
    student, teacher = normalize(vectors_ND), normalize(teacher_NE)
    myself_QN = torch.zeros(len(student[rows]), len(student), dtype=torch.bool, device=student.device)
    numbers = torch.arange(len(student), device=student.device)
    myself_QN[torch.arange(len(myself_QN), device=student.device), numbers[rows]] = True
    log_student = F.log_softmax((student[rows] @ student.T / temperature).masked_fill(myself_QN, -math.inf), dim=1)
    log_teacher = F.log_softmax((teacher[rows] @ teacher.T / temperature).masked_fill(myself_QN, -math.inf), dim=1)
    apart = torch.where(myself_QN, torch.zeros_like(log_teacher), log_teacher - log_student)
    return (log_teacher.exp() * apart).sum()
