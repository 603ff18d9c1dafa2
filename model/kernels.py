"""Loads the library that `kernels*.cpp` were built into at installation, and hands tensors over to it.

Every function does the same with or without the library: where it is missing, or the processor lacks what it was
written for, PyTorch's own operators do the work (slower by a factor of about two at base size). Backward passes are
called by `model.differentiable`. Shape suffixes: T tokens, D width, N heads, H head size, I intermediate size, R rows,
V vocabulary.
"""

import ctypes
import logging
import os
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

log = logging.getLogger(__name__)

VARIABLE = "NIGHTLOOM_KERNELS"
"""Environment variable; "off" leaves everything to PyTorch."""
NEEDED = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "fma"})
NEEDED_BY_TILES = frozenset({"amx_tile", "amx_bf16"})
HEAD_SIZES = (32, 64)
LANES = 16
"""float32 values in a register: row lengths are multiples of it."""
ATTENTION = (c_int64, *[c_void_p] * 2, c_int64, c_void_p, *[c_int] * 7)
"""Strides, tables, sequences, shape, bounds, threads."""
ARGUMENTS: dict[str, tuple[type, ...]] = {
    "nightloom_add_norm": (c_void_p, c_void_p, c_void_p, c_void_p, c_float, c_void_p, c_int64, c_int, c_int),
    "nightloom_geglu": (c_void_p, c_void_p, c_int64, c_int, c_int),
    "nightloom_quantize_rows": (c_void_p, c_void_p, c_void_p, c_int64, c_int, c_int),
    "nightloom_scale_sums": (*[c_void_p] * 4, c_int64, c_int, c_int),
    "nightloom_attend": (*[c_void_p] * 5, *ATTENTION),
    "nightloom_attend_backward": (*[c_void_p] * 5, *ATTENTION, *[c_void_p] * 4, c_int64),
    "nightloom_norm_backward": (c_void_p, c_void_p, c_float, *[c_void_p] * 6, c_int64, c_int, c_int),
    "nightloom_geglu_backward": (*[c_void_p] * 3, c_int64, c_int, c_int),
    "nightloom_cross_entropy": (*[c_void_p] * 5, c_int64, c_int, c_float, c_int, c_int),
}


def processor_flags() -> frozenset[str]:
    """What the processor can do, in the words of Linux; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


@cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why there is none."""
    if os.environ.get(VARIABLE) == "off":
        return None, f"{VARIABLE} is off"
    if missing := NEEDED - processor_flags():
        return None, f"the processor lacks {min(missing)}"
    built = sorted(Path(__file__).parent.glob("_kernels*.so"))
    if not built:
        return None, "kernels.cpp was not built at installation (no C++ compiler?)"
    try:
        loaded = ctypes.CDLL(str(built[0]))
        for name, arguments in ARGUMENTS.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = arguments, None
    except (OSError, AttributeError) as error:
        return None, f"{built[0].name} cannot be loaded ({error}); install again"
    return loaded, "AVX-512 with bfloat16"


@cache
def attention_refusal(head_size: int) -> str | None:
    """Why `attend` cannot be called; None where it can."""
    loaded, why = library()
    if loaded is None:
        return why
    return None if head_size in HEAD_SIZES else f"the head size is {head_size}, not one of {HEAD_SIZES}"


@cache
def uses_tiles() -> bool:
    """Whether attention multiplies on AMX tiles: the processor has them and the system lets this process use them."""
    loaded, _ = library()
    return loaded is not None and processor_flags() >= NEEDED_BY_TILES and bool(loaded.nightloom_request_amx())


def serves(*tensors: Tensor) -> bool:
    """Whether there is a library, and all tensors lie on the CPU, row after row without gaps."""
    return library()[0] is not None and all(t.device.type == "cpu" and t.is_contiguous() for t in tensors)


def add_norm(x_TD: Tensor, added_TD: Tensor, norm: nn.LayerNorm, out_TD: Tensor) -> Tensor:
    """x += added in place; then out = norm(x), in the dtype of `out_TD`, which is returned.

    Args:
        x_TD: the residual stream, float32 or wider.
        added_TD: what a layer adds to it, in the dtype of products.
    """
    width = x_TD.shape[-1]
    served = x_TD.dtype == torch.float32 and added_TD.dtype == out_TD.dtype == torch.bfloat16 and not width % LANES
    if not served or not serves(x_TD, added_TD, out_TD):
        x_TD += added_TD
        out_TD.copy_(norm(x_TD))
        return out_TD
    bias = None if norm.bias is None else norm.bias.float()
    return add_and_norm(x_TD, added_TD, norm.weight.float(), bias, norm.eps, out_TD)


def add_and_norm(
    x_TD: Tensor,
    added_TD: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor | None,
    eps: float,
    out_TD: Tensor | None = None,
) -> Tensor:
    """x += added in place, where something is; then its layer norm in bfloat16. No PyTorch: see `serves`."""
    loaded, why = library()
    assert loaded is not None, why
    out_TD = torch.empty_like(x_TD, dtype=torch.bfloat16) if out_TD is None else out_TD
    loaded.nightloom_add_norm(
        x_TD.data_ptr(),
        None if added_TD is None else added_TD.data_ptr(),
        weight_D.data_ptr(),
        None if bias_D is None else bias_D.data_ptr(),
        eps,
        out_TD.data_ptr(),
        *x_TD.shape,
        torch.get_num_threads(),
    )
    return out_TD


def geglu(x_T2I: Tensor) -> Tensor:
    """gelu(first half of each row) times the second half: (T, I)."""
    loaded, _ = library()
    width = x_T2I.shape[-1] // 2
    if loaded is None or x_T2I.dtype != torch.bfloat16 or width % LANES or not serves(x_T2I):
        value_TI, gate_TI = x_T2I.chunk(2, dim=-1)
        return F.gelu(value_TI) * gate_TI
    out_TI = x_T2I.new_empty(x_T2I.shape[0], width)
    loaded.nightloom_geglu(x_T2I.data_ptr(), out_TI.data_ptr(), x_T2I.shape[0], width, torch.get_num_threads())
    return out_TI


@cache
def multiplies_int8() -> bool:
    """Whether the processor has int8 products into int32 (VNNI); older ones saturate or are slow."""
    return bool(processor_flags() & {"avx512_vnni", "avx_vnni", "amx_int8"})


def quantize_rows(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Each row as int8 (T, D) and the float32 that one step stands for (T,): its largest size is 127 steps.

    A row that is not finite gets a scale that is not, so that what is made of it shows.
    """
    loaded, _ = library()
    rows, width = x_TD.shape
    if loaded is None or x_TD.dtype != torch.bfloat16 or width % (2 * LANES) or not serves(x_TD):
        scale_T = x_TD.abs().amax(dim=1).float() / 127
        scale_T = torch.where(scale_T == 0, 1.0, scale_T)
        return (x_TD.float() / scale_T[:, None]).round_().nan_to_num_(0).to(torch.int8), scale_T
    out_TD, scale_T = torch.empty(rows, width, dtype=torch.int8), torch.empty(rows)
    loaded.nightloom_quantize_rows(
        x_TD.data_ptr(), out_TD.data_ptr(), scale_T.data_ptr(), rows, width, torch.get_num_threads()
    )
    return out_TD, scale_T


def scale_sums(sums_TO: Tensor, scale_T: Tensor, scale_O: Tensor, dtype: torch.dtype) -> Tensor:
    """int32 sums times the scales of their row and of their column, in `dtype`: (T, O)."""
    loaded, _ = library()
    rows, width = sums_TO.shape
    if loaded is None or dtype != torch.bfloat16 or width % LANES or not serves(sums_TO, scale_T, scale_O):
        return (sums_TO.float().mul_(scale_T[:, None]).mul_(scale_O)).to(dtype)
    out_TO = torch.empty(rows, width, dtype=dtype)
    loaded.nightloom_scale_sums(
        *(x.data_ptr() for x in (sums_TO, scale_T, scale_O, out_TO)), rows, width, torch.get_num_threads()
    )
    return out_TO


def attend(
    q_TNH: Tensor,
    k_TNH: Tensor,
    v_TNH: Tensor,
    cu_seqlens: Tensor,
    bounds: tuple[int, int],
    tables: tuple[Tensor | None, Tensor | None] = (None, None),
    kept_TN: Tensor | None = None,
) -> Tensor:
    """Attention within each sequence, queries and keys turned by `tables` (see `model.rotary`) on the way.

    Args:
        q_TNH, k_TNH, v_TNH: bfloat16 of equal strides, as views of one projection have them.
        cu_seqlens: int32 on the CPU.
        bounds: how many keys before and after itself a query sees; negative ones are no bound.
        kept_TN: float32; receives log2 of each softmax's sum, for `attend_backward`.

    Returns:
        (T, N, H), bfloat16.
    """
    loaded, why = library()
    assert loaded is not None, why
    assert q_TNH.stride() == k_TNH.stride() == v_TNH.stride()
    out_TNH = q_TNH.new_empty(q_TNH.shape)
    loaded.nightloom_attend(
        *(x.data_ptr() for x in (q_TNH, k_TNH, v_TNH, out_TNH)),
        None if kept_TN is None else kept_TN.data_ptr(),
        *_attention_arguments(q_TNH, cu_seqlens, bounds, tables),
    )
    return out_TNH


def attend_backward(
    d_out_TNH: Tensor,
    q_TNH: Tensor,
    k_TNH: Tensor,
    v_TNH: Tensor,
    out_TNH: Tensor,
    kept_TN: Tensor,
    cu_seqlens: Tensor,
    cos_T1H: Tensor | None,
    sin_T1H: Tensor | None,
    back: int,
    ahead: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values, given that of what `attend` returned; the rest as there."""
    loaded, why = library()
    assert loaded is not None, why
    gradients, d_out_TNH = [q_TNH.new_empty(q_TNH.shape) for _ in range(3)], d_out_TNH.contiguous()
    loaded.nightloom_attend_backward(
        *(x.data_ptr() for x in (q_TNH, k_TNH, v_TNH, out_TNH, kept_TN)),
        *_attention_arguments(q_TNH, cu_seqlens, (back, ahead), (cos_T1H, sin_T1H)),
        *(x.data_ptr() for x in (d_out_TNH, *gradients)),
        gradients[0].stride(0),
    )
    return gradients[0], gradients[1], gradients[2]


def _attention_arguments(
    q_TNH: Tensor, cu_seqlens: Tensor, bounds: tuple[int, int], tables: tuple[Tensor | None, Tensor | None]
) -> tuple[int | None, ...]:
    """As `ATTENTION` lists them."""
    _, num_heads, head_size = q_TNH.shape
    assert q_TNH.stride()[1:] == (head_size, 1)
    assert cu_seqlens.dtype == torch.int32
    cos = sin = table_stride = None
    cos_T, sin_T = tables
    if cos_T is not None and sin_T is not None:
        # Both hold their half twice; the sine's second half has the sign of the formula.
        cos, sin = cos_T.data_ptr(), sin_T.data_ptr() + head_size // 2 * sin_T.element_size()
        table_stride = cos_T.stride(0)
    shape = (cu_seqlens.shape[0] - 1, num_heads, head_size)
    places = (q_TNH.stride(0), cos, sin, table_stride or 0, cu_seqlens.data_ptr())
    return *places, *shape, *bounds, uses_tiles(), torch.get_num_threads()


def norm_backward(
    d_normed_TD: Tensor, d_rest_TD: Tensor | None, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients through a layer norm of x in bfloat16.

    Args:
        d_normed_TD: bfloat16, of the norm's result.
        d_rest_TD: float32, of x on its other ways; None where there are none.
        weight_D, bias_D: float32.

    Returns:
        Of x in float32; the same in bfloat16, for what was added to x (empty without `d_rest_TD`: nothing was); of the
        weight; of the bias (empty where there is none).
    """
    loaded, why = library()
    assert loaded is not None, why
    threads = torch.get_num_threads()
    d_normed_TD, d_rest_TD = d_normed_TD.contiguous(), None if d_rest_TD is None else d_rest_TD.contiguous()
    d_x_TD, none = torch.empty_like(x_TD), x_TD.new_empty(0)
    d_added_TD = none.bfloat16() if d_rest_TD is None else torch.empty_like(d_normed_TD)
    d_weight = x_TD.new_zeros(threads, x_TD.shape[1])
    d_bias = none if bias_D is None else torch.zeros_like(d_weight)
    loaded.nightloom_norm_backward(
        x_TD.data_ptr(),
        weight_D.data_ptr(),
        eps,
        d_normed_TD.data_ptr(),
        None if d_rest_TD is None else d_rest_TD.data_ptr(),
        d_x_TD.data_ptr(),
        None if d_rest_TD is None else d_added_TD.data_ptr(),
        d_weight.data_ptr(),
        None if bias_D is None else d_bias.data_ptr(),
        *x_TD.shape,
        threads,
    )
    return d_x_TD, d_added_TD, d_weight.sum(0), d_bias if bias_D is None else d_bias.sum(0)


def geglu_backward(d_out_TI: Tensor, x_T2I: Tensor) -> Tensor:
    """The gradient of what `geglu` was given; all bfloat16."""
    loaded, why = library()
    assert loaded is not None, why
    d_out_TI, d_x_T2I = d_out_TI.contiguous(), torch.empty_like(x_T2I)
    loaded.nightloom_geglu_backward(
        *(x.data_ptr() for x in (x_T2I, d_out_TI, d_x_T2I)), *d_out_TI.shape, torch.get_num_threads()
    )
    return d_x_T2I


def cross_entropy(
    logits_RV: Tensor, targets_R: Tensor, z_weight: float, *, learning: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses of rows of logits, and their slopes on the way.

    Args:
        logits_RV: may be overwritten.
        targets_R: int64.

    Returns:
        -log p(target) and log Z, (R,), in float32 (float64 where logits are); how many targets have no logit above
        them; and, if `learning`, the gradient of loss + z_weight log(Z)^2, (R, V), in the dtype of the logits.
    """
    loaded, _ = library()
    rows, width = logits_RV.shape
    if loaded is None or logits_RV.dtype != torch.bfloat16 or not serves(logits_RV, targets_R):
        wide, target_R1 = torch.promote_types(logits_RV.dtype, torch.float32), targets_R[:, None]
        logit_R1 = logits_RV.gather(1, target_R1).to(wide)
        p_RV = logits_RV.softmax(dim=1, dtype=wide)
        p_R1 = p_RV.gather(1, target_R1)
        # Below the smallest float the loss stays at its largest value, 87 in float32.
        loss_R1 = -p_R1.clamp(min=torch.finfo(wide).tiny).log()
        log_z_R1, correct = logit_R1 + loss_R1, (p_R1 >= p_RV.amax(dim=1, keepdim=True)).sum()
        if learning:  # p (1 + 2 z_weight log Z) - onehot, in place of p
            p_RV = p_RV.mul_(1 + 2 * z_weight * log_z_R1) if z_weight else p_RV
            p_RV.scatter_add_(1, target_R1, torch.full_like(p_R1, -1.0))
        return loss_R1[:, 0], log_z_R1[:, 0], correct, p_RV.to(logits_RV.dtype) if learning else logits_RV
    loss_R, log_z_R = torch.empty(rows), torch.empty(rows)
    correct_R = torch.empty(rows, dtype=torch.bool)
    loaded.nightloom_cross_entropy(
        *(x.data_ptr() for x in (logits_RV, targets_R, loss_R, log_z_R, correct_R)),
        rows,
        width,
        z_weight,
        learning,
        torch.get_num_threads(),
    )
    return loss_R, log_z_R, correct_R.sum(), logits_RV
