"""Loads the library that `kernels*.cpp` were built into at installation, and hands tensors over to it.

Every function does the same with or without the library: where it is missing, or the processor lacks what it was
written for, PyTorch's own operators do the work (slower by a factor of about two at base size). No gradients here.
Shape suffixes: T tokens, D width, N heads, H head size, I intermediate size.
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
ARGUMENTS: dict[str, tuple[type, ...]] = {
    "nightloom_add_norm": (c_void_p, c_void_p, c_void_p, c_void_p, c_float, c_void_p, c_int64, c_int, c_int),
    "nightloom_geglu": (c_void_p, c_void_p, c_int64, c_int, c_int),
    "nightloom_quantize_rows": (c_void_p, c_void_p, c_void_p, c_int64, c_int, c_int),
    "nightloom_scale_sums": (*[c_void_p] * 4, c_int64, c_int, c_int),
    "nightloom_attend": (*[c_void_p] * 4, c_int64, *[c_void_p] * 2, c_int64, c_void_p, *[c_int] * 6),
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


def add_norm(x_TD: Tensor, added_TD: Tensor, norm: nn.LayerNorm, out_TD: Tensor) -> Tensor:
    """x += added in place; then out = norm(x), in the dtype of `out_TD`, which is returned.

    Args:
        x_TD: the residual stream, float32 or wider.
        added_TD: what a layer adds to it, in the dtype of products.
    """
    loaded, _ = library()
    width = x_TD.shape[-1]
    served = x_TD.dtype == torch.float32 and added_TD.dtype == out_TD.dtype == torch.bfloat16 and not width % LANES
    if loaded is None or not served or not _in_rows(x_TD, added_TD, out_TD):
        x_TD += added_TD
        out_TD.copy_(norm(x_TD))
        return out_TD
    weight, bias = norm.weight.float(), None if norm.bias is None else norm.bias.float()
    loaded.nightloom_add_norm(
        x_TD.data_ptr(),
        added_TD.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        norm.eps,
        out_TD.data_ptr(),
        x_TD.shape[0],
        width,
        torch.get_num_threads(),
    )
    return out_TD


def geglu(x_T2I: Tensor) -> Tensor:
    """gelu(first half of each row) times the second half: (T, I)."""
    loaded, _ = library()
    width = x_T2I.shape[-1] // 2
    if loaded is None or x_T2I.dtype != torch.bfloat16 or width % LANES or not _in_rows(x_T2I):
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
    if loaded is None or x_TD.dtype != torch.bfloat16 or width % (2 * LANES) or not _in_rows(x_TD):
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
    if loaded is None or dtype != torch.bfloat16 or width % LANES or not _in_rows(sums_TO, scale_T, scale_O):
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
    window: int | None,
    rotary: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Attention within each sequence, queries and keys turned by `rotary` (see `model.rotary`) on the way.

    Args:
        q_TNH, k_TNH, v_TNH: bfloat16 of equal strides, as views of one projection have them.
        cu_seqlens: int32 on the CPU.

    Returns:
        (T, N, H), bfloat16.
    """
    loaded, why = library()
    assert loaded is not None, why
    num_tokens, num_heads, head_size = q_TNH.shape
    assert q_TNH.stride() == k_TNH.stride() == v_TNH.stride()
    assert q_TNH.stride()[1:] == (head_size, 1)
    assert cu_seqlens.dtype == torch.int32
    out_TNH = torch.empty(num_tokens, num_heads, head_size, dtype=torch.bfloat16)
    cos = sin = table_stride = None
    if rotary is not None:
        cos_T, sin_T = rotary
        # Both hold their half twice; the sine's second half has the sign of the formula.
        cos, sin = cos_T.data_ptr(), sin_T.data_ptr() + head_size // 2 * sin_T.element_size()
        table_stride = cos_T.stride(0)
    loaded.nightloom_attend(
        q_TNH.data_ptr(),
        k_TNH.data_ptr(),
        v_TNH.data_ptr(),
        out_TNH.data_ptr(),
        q_TNH.stride(0),
        cos,
        sin,
        table_stride or 0,
        cu_seqlens.data_ptr(),
        cu_seqlens.shape[0] - 1,
        num_heads,
        head_size,
        -1 if window is None else window,
        uses_tiles(),
        torch.get_num_threads(),
    )
    return out_TNH


def _in_rows(*tensors: Tensor) -> bool:
    """Whether all lie on the CPU, row after row without gaps."""
    return all(t.device.type == "cpu" and t.is_contiguous() for t in tensors)
