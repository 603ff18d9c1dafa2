"""The loss of a student: least at its teacher, blind to what the teacher does not say."""

import math

import pytest
import torch
from torch import Tensor

from model.distillation import distillation_loss
from model.pooling import normalize


def draw(seed: int, dim: int = 8, count: int = 12) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_is_least_at_the_teacher() -> None:
    teacher = draw(0)
    best, cosine = distillation_loss(teacher * 3, teacher, neighbour_weight=1.0)
    assert float(best) == pytest.approx(0, abs=1e-12)
    assert float(cosine) == pytest.approx(12)
    worse, _ = distillation_loss(teacher + 0.3 * draw(1), teacher, neighbour_weight=1.0)
    assert 0 < float(worse) < float(distillation_loss(draw(1), teacher, neighbour_weight=1.0)[0])


def test_distances_by_hand() -> None:
    student, teacher = draw(1), draw(0)
    cosine, _ = distillation_loss(student, teacher)
    assert float(cosine) == pytest.approx(float((1 - (normalize(student) * normalize(teacher)).sum(1)).sum()))
    square, _ = distillation_loss(student, teacher, distance="mse", distance_weight=2.0)
    assert float(square) == pytest.approx(float(2 * ((student - teacher) ** 2).mean(1).sum()))


def test_neighbours_by_hand() -> None:
    student, teacher = draw(1), draw(0, dim=5)
    found, cosine = distillation_loss(student, teacher, distance_weight=0.0, neighbour_weight=1.0, temperature=0.1)
    total = 0.0
    for row in range(12):
        others = [i for i in range(12) if i != row]
        p, q = (torch.softmax(normalize(v)[row] @ normalize(v)[others].T / 0.1, dim=0) for v in (teacher, student))
        total += float((p * (p / q).log()).sum())
    assert float(found) == pytest.approx(total, abs=1e-10)
    assert float(cosine) == 0, "another width has no cosine"


def test_neighbours_do_not_mind_a_rotation() -> None:
    teacher = draw(0)
    turn, _ = torch.linalg.qr(draw(2, count=8))
    loss, _ = distillation_loss(teacher @ turn, teacher, distance_weight=0.0, neighbour_weight=1.0)
    assert float(loss) == pytest.approx(0, abs=1e-12)


def test_leading_parts_have_the_teachers_neighbours() -> None:
    student, teacher = draw(1), draw(0)
    options = {"distance_weight": 0.0, "neighbour_weight": 1.0}
    both, _ = distillation_loss(student, teacher, dims=(4, 8), **options)  # type: ignore[arg-type]
    parts = [distillation_loss(student[:, :dim], teacher, **options)[0] for dim in (4, 8)]  # type: ignore[arg-type]
    assert float(both) == pytest.approx(float(sum(parts)) / 2)


def test_shares_add_up() -> None:
    student, teacher = draw(1), draw(0)
    whole = distillation_loss(student, teacher, neighbour_weight=0.3)
    shares = [distillation_loss(student, teacher, neighbour_weight=0.3, share=(k, 5)) for k in range(5)]
    for i in range(2):
        assert float(sum(s[i] for s in shares)) == pytest.approx(float(whole[i]))


def test_gradients_are_numbers() -> None:
    """The similarity of a text to itself is taken out as minus infinity."""
    student = draw(1).requires_grad_()
    distillation_loss(student, draw(0), neighbour_weight=1.0, share=(0, 2))[0].backward()
    assert student.grad is not None
    assert all(map(math.isfinite, student.grad.flatten().tolist()))
    assert student.grad[1].abs().max() > 0, "neighbours are moved too"
