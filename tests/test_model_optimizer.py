"""StableAdamW against its formulas written out in numpy, what decays and what does not, and the scale of float16."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from model.optimizer import LossScale, StableAdamW, corrected, gradient_norm, parameter_groups, scale_gradients

BETAS, EPS = (0.9, 0.98), 1e-6


def small_module(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    return module


def set_gradients(module: nn.Module, step: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in module.parameters():
        parameter.grad = size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def test_steps_follow_the_formulas() -> None:
    """With a jump of the gradients in the middle, which the clip must answer."""
    module = small_module()
    optimizer = StableAdamW(parameter_groups(module, 0.01), lr=1e-2, betas=BETAS, eps=EPS)
    weights = {name: p.detach().numpy().copy() for name, p in module.named_parameters()}
    first = {name: np.zeros_like(w) for name, w in weights.items()}
    second = {name: np.zeros_like(w) for name, w in weights.items()}
    clipped = 0
    for step in range(1, 9):
        lr = 1e-2 * min(step / 4, 1.0)
        optimizer.set_rate(lr, 1e-2)
        set_gradients(module, step, size=30.0 if step == 6 else 1.0)
        optimizer.step()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None
            g = parameter.grad.numpy()
            # Plain Adam: biased averages, corrected when they are used.
            first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * g
            second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * g**2
            m, v = first[name] / (1 - BETAS[0] ** step), second[name] / (1 - BETAS[1] ** step)
            clip = max(1.0, math.sqrt(np.mean(g**2 / np.maximum(v, EPS**2))))
            clipped += clip > 2
            if weights[name].ndim > 1:
                weights[name] *= 1 - 0.01 * lr / 1e-2
            weights[name] -= lr / clip * m / (np.sqrt(v) + EPS)
            np.testing.assert_allclose(parameter.detach().numpy(), weights[name], rtol=1e-12, atol=1e-14)
    assert clipped >= len(weights)
    assert optimizer.steps == 8


def test_decay_is_a_share_of_the_weights_whatever_the_peak_rate() -> None:
    """A step at the peak takes weight_decay off the matrices, and nothing off norms and biases."""
    for peak in (1e-1, 1e-5):
        module = small_module()
        before = [p.detach().clone() for p in module.parameters()]
        optimizer = StableAdamW(parameter_groups(module, 0.25), lr=peak)
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for old, parameter in zip(before, module.parameters(), strict=True):
            expected = old * 0.75 if old.ndim > 1 else old
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=0)


def test_moments_moved_to_another_optimizer_continue_the_run() -> None:
    module, copy = small_module(), small_module()
    one = StableAdamW(parameter_groups(module, 0.01), lr=1e-2)
    for step in range(3):
        set_gradients(module, step)
        one.step()
    copy.load_state_dict(module.state_dict())
    other = StableAdamW(parameter_groups(copy, 0.01), lr=1e-2)
    other.steps = one.steps
    for mine, theirs in zip(module.parameters(), copy.parameters(), strict=True):
        for moment, target in zip(one.moments(mine), other.moments(theirs), strict=True):
            target.copy_(moment)
    for optimizer, model in ((one, module), (other, copy)):
        set_gradients(model, 3)
        optimizer.step()
    for mine, theirs in zip(module.parameters(), copy.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_corrected_average_is_the_mean_of_equal_weights_at_first() -> None:
    assert corrected(0.9, 1) == 0.0
    assert corrected(0.98, 10_000) == pytest.approx(0.98)
    biased = average = 0.0
    for step, value in enumerate([3.0, -1.0, 4.0, 1.5], start=1):
        biased = 0.9 * biased + 0.1 * value
        beta = corrected(0.9, step)
        average = beta * average + (1 - beta) * value
        assert average == pytest.approx(biased / (1 - 0.9**step), rel=1e-12)


def test_gradient_norm_and_scaling() -> None:
    module = small_module()
    set_gradients(module, 0)
    flat = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    assert gradient_norm(module) == pytest.approx(float(flat.norm()), rel=1e-12)
    scale_gradients(module, 0.5)
    assert gradient_norm(module) == pytest.approx(float(flat.norm()) / 2, rel=1e-12)


def test_loss_scale_falls_on_overflow_and_rises_after_quiet() -> None:
    scale = LossScale.of(torch.float16)
    assert scale.value == 65536
    scale.update(overflowed=True)
    assert (scale.value, scale.good_steps) == (32768, 0)
    for _ in range(scale.interval):
        scale.update(overflowed=False)
    assert (scale.value, scale.good_steps) == (65536, 0)


def test_a_loss_scale_comes_back_from_the_bottom() -> None:
    scale = LossScale.of(torch.float16)
    for _ in range(20):
        scale.update(overflowed=True)
    assert scale.value == 1
    for _ in range(scale.interval):
        scale.update(overflowed=False)
    assert scale.value == 2


def test_other_types_are_not_scaled() -> None:
    scale = LossScale.of(torch.bfloat16)
    for _ in range(3 * scale.interval):
        scale.update(overflowed=False)
    assert scale.value == 1.0
