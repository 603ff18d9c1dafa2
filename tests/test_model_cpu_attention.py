"""Attention for training on a CPU against PyTorch's own, values and gradients, in strips too."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import cpu_attention
from model.cpu_attention import attend_dense, overlapping


def gradients(out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    return torch.autograd.grad((out * weight).sum(), inputs)


def make(dtype: torch.dtype, length: int = 37, keys: int = 37) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((3, 2, length, 16), (3, 2, keys, 16), (3, 2, keys, 16))
    return tuple(torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)


@pytest.mark.parametrize("strip", [1 << 22, 1000])
@pytest.mark.parametrize("kind", ["full", "causal", "bias"])
def test_gradients_are_pytorchs(kind: str, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "STRIP", strip)
    q, k, v = make(torch.float64, keys=50 if kind == "bias" else 37)
    bias = None
    if kind == "bias":
        bias = torch.where(torch.rand(3, 1, 37, 50) < 0.3, -torch.inf, 0.0).double()
        bias[..., 0] = 0
    causal = kind == "causal"
    mine = attend_dense(q, k, v, bias, causal=causal)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)
    torch.testing.assert_close(mine, theirs)
    for a, b in zip(gradients(mine, q, k, v), gradients(theirs, q, k, v), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_bfloat16_is_nearer_to_the_truth_than_pytorchs() -> None:
    exact = make(torch.float64)
    rounded = tuple(x.detach().to(torch.bfloat16).requires_grad_() for x in exact)
    truth = tuple(x.detach().double().requires_grad_() for x in rounded)
    right = gradients(F.scaled_dot_product_attention(*truth), *truth)
    mine = gradients(attend_dense(*rounded, None), *rounded)
    theirs = gradients(F.scaled_dot_product_attention(*rounded), *rounded)
    for a, b, c in zip(mine, theirs, right, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - c).abs().max() <= 1.1 * (b - c).abs().max()


@pytest.mark.parametrize("before, after", [(8, 8), (8, 0), (0, 0), (6, 6), (3, 0)])
@pytest.mark.parametrize("total", [1, 4, 29])
def test_overlapping_blocks_and_their_gradient(total: int, before: int, after: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(total, 2, 3, dtype=torch.float64, requires_grad=True)
    blocks = overlapping(x, 4, before, after)
    assert blocks.shape == (-(-total // 4), 4 + before + after, 2, 3)
    for number, block in enumerate(blocks):
        for place, row in enumerate(block):
            token = number * 4 - before + place
            assert torch.equal(row, x[token] if 0 <= token < total else torch.zeros_like(row))
    with torch.no_grad():
        plain = overlapping(x, 4, before, after)
    assert torch.equal(plain, blocks)
    weight = torch.randn(blocks.shape, dtype=torch.float64)
    (mine,) = torch.autograd.grad((blocks * weight).sum(), x)
    sums = torch.zeros_like(x)
    for number in range(len(blocks)):
        for place in range(blocks.shape[1]):
            token = number * 4 - before + place
            if 0 <= token < total:
                sums[token] += weight[number, place]
    torch.testing.assert_close(mine, sums)
