"""The one seam for attention: `prepare` once a forward pass and pattern, `attend` once a layer, whatever the back-end.

Every back-end takes the same packed queries, keys and values and is exact under packing: no document sees another.
The name xformers appears in this file only. Shape suffixes: T tokens, N heads, H head size, S sequences, B query
block, K key block, C blocks.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model import differentiable, kernels
from model.batch import PackedBatch
from model.config import QUERY_BLOCK
from model.errors import InputError
from model.patterns import Pattern, first_tokens, visible, window_bias
from model.rotary import rotate
from model.sparse import attend_selected, selected_mask

ROWS = 2048
"""Without a gradient, what works row by row goes through in strips of about so many tokens, in place: a long document
costs little memory then."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a back-end derives from a batch before the first layer; made by `prepare`, read by `attend`."""

    backend: str
    batch: PackedBatch
    pattern: Pattern
    bias: Any = None
    """Dense mask, block mask or xformers bias, as the back-end wants it; None where it needs none."""
    rotary: tuple[Tensor, Tensor] | None = None
    """Tables of `model.rotary` by which queries and keys are turned first; None where they are to be taken as they
    are."""


def prepare(
    backend: str,
    batch: PackedBatch,
    pattern: Pattern,
    *,
    dtype: torch.dtype,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Plan:
    """Derive once what every layer with this pattern needs.

    Args:
        backend: a key of `BACKENDS`.
        dtype: of the queries to come; masks are made in it.
        rotary: tables by which `attend` turns queries and keys.
    """
    pattern = pattern.settled(batch.max_seqlen)
    if backend != "reference" and (pattern.num_global or pattern.key_blocks is not None):
        backend = "blocks"  # the only fast one that knows these
    bias = BACKENDS[backend].bias(batch, pattern, dtype)
    return Plan(backend, batch, pattern, bias, rotary)


def attend(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, plan: Plan) -> Tensor:
    """softmax(q k^T / sqrt(H) + mask) v for every sequence of the batch by itself.

    Args:
        q_TNH, k_TNH, v_TNH: packed, of one dtype, the last dimension contiguous. Without a gradient, queries and keys
            that the plan has turned may be turned in place.

    Returns:
        (T, N, H), of the same dtype.
    """
    backend = BACKENDS[plan.backend]
    if plan.rotary is not None and not backend.turns:
        q_TNH, k_TNH = (_turned(x_TNH, plan.rotary) for x_TNH in (q_TNH, k_TNH))
    return backend.attend(q_TNH, k_TNH, v_TNH, plan)


def _turned(x_TNH: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    if torch.is_grad_enabled():
        return rotate(x_TNH, *rotary)
    for rows, cos, sin in strips(x_TNH, *rotary):
        rows.copy_(rotate(rows, cos, sin))
    return x_TNH


def strips(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Equal parts of tensors of as many rows each, of about ROWS rows.

    Between 768 and 1,280 rows oneDNN's bfloat16 product onto 768 columns runs at half its speed (two threads of a
    Sapphire Rapids: 1.1 TFLOP/s, against 1.9 at 512 and 2.3 at 2,048): such a part is halved.
    """
    total = tensors[0].shape[0]
    count = max(1, round(total / ROWS))
    if 768 <= total / count <= 1280:
        count *= 2
    return zip(*(tensor.chunk(count) for tensor in tensors), strict=True)


def _reference_bias(batch: PackedBatch, pattern: Pattern, dtype: torch.dtype) -> Tensor:
    return visible(batch, pattern)


def _reference_attend(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, plan: Plan) -> Tensor:
    """Quadratic in the whole batch; in any dtype; written so that it can be checked by reading."""
    pattern, mask = plan.pattern, plan.bias
    if pattern.key_blocks is not None:
        offsets = plan.batch.host_offsets()
        mask = selected_mask(q_TNH, k_TNH, offsets, pattern.key_blocks, pattern.block_size, pattern.num_global)
    scores_NTT = torch.einsum("qnh,knh->nqk", q_TNH, k_TNH) / math.sqrt(q_TNH.shape[-1])
    weights_NTT = scores_NTT.masked_fill(~mask, -math.inf).softmax(dim=-1)
    return torch.einsum("nqk,knh->qnh", weights_NTT, v_TNH)


def _to_blocks(x_TNH: Tensor, before: int, after: int) -> Tensor:
    """Overlapping key blocks (C, K, N, H), zeros beyond the ends."""
    if torch.is_grad_enabled() and (before + after) % QUERY_BLOCK == 0:
        return _Overlapping.apply(x_TNH, before, after)
    return _unfolded(x_TNH, before, after)


def _unfolded(x_TNH: Tensor, before: int, after: int) -> Tensor:
    """A view of one padded copy."""
    width = QUERY_BLOCK + before + after
    padded = F.pad(x_TNH, (0, 0, 0, 0, before, -x_TNH.shape[0] % QUERY_BLOCK + after))
    return padded.unfold(0, width, QUERY_BLOCK).permute(0, 3, 1, 2)


class _Overlapping(torch.autograd.Function):
    """As `_unfolded`, with a gradient that is added up block by block. PyTorch's own goes value by value: 14 ms where
    this takes 2, for 4,096 tokens of width 256 in bfloat16 on one thread of an EPYC.
    """

    @staticmethod
    def forward(ctx: Any, x_TNH: Tensor, before: int, after: int) -> Tensor:
        ctx.sizes = before, x_TNH.shape[0]
        return _unfolded(x_TNH, before, after)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (before, total), block = ctx.sizes, QUERY_BLOCK
        g_CKNH = gradients[0]
        count, width, heads, size = g_CKNH.shape
        sums = g_CKNH.new_zeros(count + width // block - 1, block, heads, size)
        for number in range(width // block):
            sums[number : number + count] += g_CKNH[:, number * block : (number + 1) * block]
        return sums.flatten(0, 1)[before : before + total], None, None


def _blocks_attend(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, plan: Plan) -> Tensor:
    pattern, window = plan.pattern, plan.pattern.window
    if window is None:
        parts = [_attend_run(q, k, v, pattern) for _, q, k, v in _runs(q_TNH, k_TNH, v_TNH, plan.batch)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    q_CBNH = _to_blocks(q_TNH, 0, 0)
    k_CKNH, v_CKNH = _to_blocks(k_TNH, window, window), _to_blocks(v_TNH, window, window)
    if pattern.num_global:
        first_CG, _ = first_tokens(plan.batch, pattern.num_global, window)
        k_CKNH, v_CKNH = (torch.cat([x, y[first_CG]], dim=1) for x, y in ((k_CKNH, k_TNH), (v_CKNH, v_TNH)))
    out_CNBH = F.scaled_dot_product_attention(
        q_CBNH.transpose(1, 2), k_CKNH.transpose(1, 2), v_CKNH.transpose(1, 2), attn_mask=plan.bias
    )
    out_TNH = out_CNBH.transpose(1, 2).reshape(-1, *q_TNH.shape[1:])[: q_TNH.shape[0]]
    if not pattern.num_global or pattern.causal:  # causal: what a first token sees are first tokens
        return out_TNH
    tokens, parts = [], []
    for first, q, k, v in _runs(q_TNH, k_TNH, v_TNH, plan.batch):
        count, length = q.shape[0], q.shape[2]
        index_SG = torch.arange(min(pattern.num_global, length), device=q.device)
        tokens.append((first + length * torch.arange(count, device=q.device)[:, None] + index_SG).flatten())
        parts.append(_attend_run(q[:, :, : pattern.num_global], k, v, Pattern()))
    return out_TNH.index_copy(0, torch.cat(tokens), torch.cat(parts))


def _runs(
    q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, batch: PackedBatch
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Neighbours of equal length, which go through a kernel together: sorted batches have long runs.

    Yields:
        The first token of a run; its queries, keys and values, (S, N, L, H).
    """
    runs = equal_runs(batch.host_offsets())
    # One split, whose gradient is one concatenation; a slice a sequence would fill a gradient of the whole batch each.
    sizes = [count * length for _, count, length in runs]
    for (first, count, length), *qkv in zip(runs, *(x.split(sizes) for x in (q_TNH, k_TNH, v_TNH)), strict=True):
        q, k, v = (x.view(count, length, *x.shape[1:]).transpose(1, 2) for x in qkv)
        yield first, q, k, v


def _attend_run(q_SNLH: Tensor, k_SNLH: Tensor, v_SNLH: Tensor, pattern: Pattern) -> Tensor:
    """Attention without a window in sequences of one length, packed again: (S * L, N, H)."""
    if pattern.key_blocks is not None and q_SNLH.shape[2] > pattern.key_blocks * pattern.block_size:
        out = attend_selected(q_SNLH, k_SNLH, v_SNLH, pattern.key_blocks, pattern.block_size, pattern.num_global)
    else:
        out = F.scaled_dot_product_attention(q_SNLH, k_SNLH, v_SNLH, is_causal=pattern.causal)
    return out.transpose(1, 2).flatten(0, 1)


def equal_runs(offsets: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Runs of neighbouring sequences of one length, as (first token, sequences, length).

    equal_runs((0, 3, 6, 8)) is [(0, 2, 3), (6, 1, 2)].
    """
    runs: list[tuple[int, int, int]] = []
    for start, stop in pairwise(offsets):
        length = stop - start
        if runs and runs[-1][2] == length:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, length)
        else:
            runs.append((start, 1, length))
    return runs


def _xformers_bias(batch: PackedBatch, pattern: Pattern, dtype: torch.dtype) -> Any:
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask, BlockDiagonalMask

    if pattern.window is not None:
        return window_bias(batch, pattern, dtype)
    lengths = [b - a for a, b in pairwise(batch.host_offsets())]
    kind = BlockDiagonalCausalMask if pattern.causal else BlockDiagonalMask
    return kind.from_seqlens(lengths, device=batch.device)


def _xformers_attend(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, plan: Plan) -> Tensor:
    """Global layers: a block-diagonal bias. Local layers: the blocks of `window_bias` with a tensor bias.

    xformers' own windowed biases are causal (BlockDiagonalMask.make_local_attention), leak between packed documents
    (LocalAttentionFromBottomRightMask), or have no backward (BlockDiagonalLocalAttentionPaddedKeysMask).
    """
    from xformers.ops import memory_efficient_attention

    window = plan.pattern.window
    if window is None:
        return memory_efficient_attention(q_TNH[None], k_TNH[None], v_TNH[None], attn_bias=plan.bias)[0]
    q_CBNH = _to_blocks(q_TNH, 0, 0).contiguous()
    k_CKNH, v_CKNH = (_to_blocks(x, window, window).contiguous() for x in (k_TNH, v_TNH))
    bias_CNBK = plan.bias.expand(-1, q_TNH.shape[1], -1, -1)
    out_CBNH = memory_efficient_attention(q_CBNH, k_CKNH, v_CKNH, attn_bias=bias_CNBK)
    return out_CBNH.reshape(-1, *q_TNH.shape[1:])[: q_TNH.shape[0]]


def _varlen_attend(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, plan: Plan) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    batch, window = plan.batch, plan.pattern.window
    reach = -1 if window is None else window
    out_TNH = varlen_attn(
        q_TNH,
        k_TNH,
        v_TNH,
        batch.cu_seqlens,
        batch.cu_seqlens,
        batch.max_seqlen,
        batch.max_seqlen,
        window_size=(reach, 0 if plan.pattern.causal else reach),
    )
    assert isinstance(out_TNH, Tensor)  # a pair only where auxiliary output is asked for
    return out_TNH


def _native_attend(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, plan: Plan) -> Tensor:
    back = -1 if plan.pattern.window is None else plan.pattern.window
    bounds, tables = (back, 0 if plan.pattern.causal else back), plan.rotary or (None, None)
    call = differentiable.attend if torch.is_grad_enabled() else kernels.attend
    return call(q_TNH, k_TNH, v_TNH, plan.batch.cu_seqlens, bounds, tables)


def _no_bias(batch: PackedBatch, pattern: Pattern, dtype: torch.dtype) -> None:
    return None


@dataclass(frozen=True, slots=True)
class _Backend:
    bias: Callable[[PackedBatch, Pattern, torch.dtype], Any]
    attend: Callable[[Tensor, Tensor, Tensor, Plan], Tensor]
    turns: bool = False
    """Whether it turns queries and keys by `plan.rotary` itself."""


BACKENDS = {
    "reference": _Backend(_reference_bias, _reference_attend),
    "blocks": _Backend(window_bias, _blocks_attend),
    "xformers": _Backend(_xformers_bias, _xformers_attend),
    "varlen": _Backend(_no_bias, _varlen_attend),
    "native": _Backend(_no_bias, _native_attend, turns=True),
}


def choose_backend(name: str, *, device: torch.device, dtype: torch.dtype, head_size: int) -> tuple[str, str]:
    """Pick the back-end for a device once, when the encoder is built.

    Args:
        name: "auto", or a back-end to insist on.

    Returns:
        The back-end's name and, in a few words, why it was taken.

    Raises:
        InputError: an unknown name, or a back-end that cannot run here.
    """
    if name != "auto" and name not in BACKENDS:
        raise InputError(f"no attention back-end is called {name!r}; known are auto, {', '.join(BACKENDS)}")
    reasons = {back: _refusal(back, device, dtype, head_size) for back in ("varlen", "xformers", "native", "blocks")}
    if name in reasons and (refusal := reasons[name]):
        raise InputError(f"attention back-end {name!r} cannot run here: {refusal}; use auto")
    if name != "auto":
        return name, "asked for"
    chosen = next(back for back, refusal in reasons.items() if refusal is None)
    passed = "; ".join(f"{back}: {refusal}" for back, refusal in reasons.items() if refusal)
    return chosen, f"best available on {device.type}" + (f" ({passed})" if passed else "")


def _varlen_knows_windows() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "window_size" in inspect.signature(varlen_attn).parameters


def _refusal(backend: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Why a back-end cannot serve; None where it can."""
    if backend == "blocks":
        return None
    if backend == "native":
        if device.type != "cpu":
            return "needs a CPU"
        return "needs bfloat16" if dtype != torch.bfloat16 else kernels.attention_refusal(head_size)
    if device.type != "cuda":
        return "needs CUDA"
    capability = torch.cuda.get_device_capability(device)
    if backend == "varlen":
        if capability < (8, 0):
            return "needs compute capability 8.0"
        if dtype not in (torch.float16, torch.bfloat16):
            return "needs float16 or bfloat16"
        if head_size % 8 or head_size > 256:
            return "needs a head size that is a multiple of 8, at most 256"
        return (
            None if _varlen_knows_windows() else "needs torch.nn.attention.varlen with window_size (torch 2.13 has it)"
        )
    # What follows is of xformers 0.0.35: `not_supported_reasons` of its cutlass operator, which alone takes the tensor
    # biases of windowed layers.
    if not (7, 5) <= capability <= (9, 0):
        return "needs compute capability 7.5 to 9.0"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return "needs float32, float16 or bfloat16"
    if dtype == torch.bfloat16 and capability < (8, 0):
        return "needs compute capability 8.0 for bfloat16"
    if head_size % (16 // dtype.itemsize):
        return f"needs a head size that is a multiple of {16 // dtype.itemsize}"
    try:
        import xformers.ops  # noqa: F401
    except ImportError:
        return "xformers is not installed"
    return None
