"""Attention for training on a CPU: PyTorch's kernel forward, plain matrix products backward.

The backward pass of `F.scaled_dot_product_attention` on a CPU was a quarter of a training step in bfloat16; products of
whole strips in float32 take a fraction of that, and are more exact. Weights are not kept: they are computed again, in
strips. Shape suffixes: S sequences or blocks, N heads, L queries, K keys, H head size, C blocks, R rows of a strip.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

STRIP = 1 << 22
"""Weights held at once, in values: 16 MB in float32."""


def serves(q: Tensor) -> bool:
    """Whether queries are to have this backward pass."""
    return q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad


def attend_dense(
    q_SNLH: Tensor, k_SNKH: Tensor, v_SNKH: Tensor, bias: Tensor | None, *, causal: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(H) + bias) v, as `F.scaled_dot_product_attention` has it.

    Args:
        bias: additive, (S, 1, L, K), or None.
        causal: key j is seen by queries from j on; as many keys as queries then.
    """
    if not serves(q_SNLH):
        return F.scaled_dot_product_attention(q_SNLH, k_SNKH, v_SNKH, attn_mask=bias, is_causal=causal)
    return _Attention.apply(q_SNLH, k_SNKH, v_SNKH, bias, causal)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)
        ctx.save_for_backward(q, k, v, bias, out)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """With weights p and the gradient g of the output: dv = p^T g, dp = g v^T, ds = p (dp - sum(g out)),
        dq = ds k, dk = ds^T q (q and ds with the scale).
        """
        q_SNLH, k_SNKH, v_SNKH, bias, out_SNLH = ctx.saved_tensors
        wide = torch.promote_types(q_SNLH.dtype, torch.float32)
        g_SNLH, out_SNLH = gradients[0].to(wide), out_SNLH.to(wide)
        q, k, v = (x.to(wide).contiguous() for x in (q_SNLH, k_SNKH, v_SNKH))
        q = q * (1 / math.sqrt(q.shape[-1]))
        slope_q, slope_k, slope_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        count, heads, length, _ = q.shape
        rows = max(1, STRIP // (count * heads * k.shape[2]))
        for start in range(0, length, rows):
            strip = slice(start, min(start + rows, length))
            seen = slice(0, strip.stop if ctx.causal else k.shape[2])
            q_R, g_R, k_K, v_K = q[:, :, strip], g_SNLH[:, :, strip], k[:, :, seen], v[:, :, seen]
            scores_RK = q_R @ k_K.mT
            if bias is not None:
                scores_RK += bias[:, :, strip, seen]
            if ctx.causal:
                later = torch.arange(seen.stop)[None, :] > torch.arange(strip.start, strip.stop)[:, None]
                scores_RK.masked_fill_(later, -math.inf)
            p_RK = scores_RK.softmax(dim=-1)
            slope_v[:, :, seen] += p_RK.mT @ g_R
            slope_RK = g_R @ v_K.mT
            slope_RK -= (g_R * out_SNLH[:, :, strip]).sum(dim=-1, keepdim=True)
            slope_RK *= p_RK
            slope_q[:, :, strip] = slope_RK @ k_K
            slope_k[:, :, seen] += slope_RK.mT @ q_R
        slope_q *= 1 / math.sqrt(q.shape[-1])
        dtype = q_SNLH.dtype
        return slope_q.to(dtype), slope_k.to(dtype), slope_v.to(dtype), None, None


def overlapping(x_TNH: Tensor, block: int, before: int, after: int) -> Tensor:
    """Blocks (C, before + block + after, N, H) around every `block` tokens, zeros beyond the ends."""
    if (before + after) % block or not (x_TNH.device.type == "cpu" and torch.is_grad_enabled()):
        return _unfolded(x_TNH, block, before, after)
    return _Overlapping.apply(x_TNH, block, before, after)


def _unfolded(x_TNH: Tensor, block: int, before: int, after: int) -> Tensor:
    padded = F.pad(x_TNH, (0, 0, 0, 0, before, -x_TNH.shape[0] % block + after))
    return padded.unfold(0, block + before + after, block).permute(0, 3, 1, 2)


class _Overlapping(torch.autograd.Function):
    """A view of one padded copy, whose gradient is added up block by block: PyTorch's own goes value by value."""

    @staticmethod
    def forward(ctx: Any, x_TNH: Tensor, block: int, before: int, after: int) -> Tensor:
        ctx.sizes = block, before, x_TNH.shape[0]
        return _unfolded(x_TNH, block, before, after)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        block, before, total = ctx.sizes
        g_CKNH = gradients[0]
        count, width, heads, size = g_CKNH.shape
        sums = g_CKNH.new_zeros(count + width // block - 1, block, heads, size)
        for number in range(width // block):
            sums[number : number + count] += g_CKNH[:, number * block : (number + 1) * block]
        return sums.flatten(0, 1)[before : before + total], None, None, None
