"""Rotary positions against complex multiplication and against Hugging Face's tables."""

import pytest
import torch

from model.rotary import Rotary, rotary_table, rotate


@pytest.mark.parametrize("theta", [10_000.0, 160_000.0])
def test_rotation_is_complex_multiplication(theta: float) -> None:
    """Dimension d and d + H/2 are the real and imaginary part of a number that turns by position * frequency."""
    positions = torch.tensor([0, 1, 2, 0, 77, 8191])
    x = torch.randn(6, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, *Rotary(16, theta)(positions, 8192))
    frequency = theta ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    turn = torch.polar(torch.ones(6, 8, dtype=torch.float64), positions[:, None] * frequency)
    exact = torch.complex(*x.chunk(2, dim=-1)) * turn[:, None]
    # An angle of 8191 radians in float32 is known to 8191 * 2**-24, about 5e-4.
    torch.testing.assert_close(turned[:5], torch.cat([exact.real, exact.imag], -1)[:5], rtol=0, atol=5e-5)
    torch.testing.assert_close(turned, torch.cat([exact.real, exact.imag], -1), rtol=0, atol=5e-3)


@pytest.mark.parametrize("theta", [10_000.0, 160_000.0])
def test_table_is_that_of_hugging_face_to_the_bit(theta: float) -> None:
    modernbert = pytest.importorskip("transformers.models.modernbert.modeling_modernbert")
    from transformers import ModernBertConfig

    rope = {kind: {"rope_type": "default", "rope_theta": theta} for kind in ("full_attention", "sliding_attention")}
    config = ModernBertConfig(hidden_size=128, num_attention_heads=2, rope_parameters=rope)
    theirs = modernbert.ModernBertRotaryEmbedding(config)
    cos, sin = theirs(torch.zeros(1), torch.arange(8192)[None], layer_type="full_attention")
    table = rotary_table(8192, 64, theta)
    assert torch.equal(table[:, 0], cos[0, :, :32])
    assert torch.equal(table[:, 1], sin[0, :, :32])


def test_scores_depend_on_distance_only() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 1, 32, dtype=torch.float64, generator=generator)
    rotary = Rotary(32, 10_000.0)

    def score(i: int, j: int) -> float:
        turned = [rotate(x, *rotary(torch.tensor([p]), 200)) for x, p in ((q, i), (k, j))]
        return float((turned[0] * turned[1]).sum())

    assert score(3, 10) == pytest.approx(score(103, 110), abs=1e-4)
    assert score(3, 10) != pytest.approx(score(10, 3), abs=1e-4)


def test_table_grows_and_keeps_what_it_said() -> None:
    rotary = Rotary(16, 10_000.0)
    short = rotary(torch.arange(100), 100)
    assert rotary.table is not None
    assert rotary.table.shape[0] == 512
    long = rotary(torch.arange(600), 600)
    assert rotary.table.shape[0] == 600
    for a, b in zip(short, long, strict=True):
        assert torch.equal(a, b[:100])


def test_table_is_neither_saved_nor_cast() -> None:
    rotary = Rotary(16, 10_000.0)
    with torch.inference_mode():
        rotary(torch.arange(4), 4)
    rotary.to(torch.bfloat16)
    assert rotary.state_dict() == {}
    cos, _ = rotary(torch.arange(4), 4)
    assert cos.dtype == torch.float32
    # Made under inference_mode, and yet fit for a backward pass.
    x = torch.randn(4, 2, 16, requires_grad=True)
    rotate(x, *rotary(torch.arange(4), 4)).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_comes_back(dtype: torch.dtype) -> None:
    x = torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
    tables = Rotary(16, 10_000.0)(torch.arange(5), 5)
    turned = rotate(x, *tables)
    assert turned.dtype == dtype
    # Computed wide and rounded once.
    assert torch.equal(turned, rotate(x.to(torch.promote_types(dtype, torch.float32)), *tables).to(dtype))
