"""The native kernels that have a gradient, as operators that autograd and torch.compile know: what a CPU trains with.

Each serves bfloat16 products beside a float32 residual stream, where `model.kernels` could load its library; anything
else goes to PyTorch's own operators, one by one. Shape suffixes: T tokens, D width, N heads, H head size, I
intermediate size.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import kernels


def norm(x_TD: Tensor, layer_norm: nn.Module, dtype: torch.dtype) -> Tensor:
    """`layer_norm(x)` in the dtype of products.

    Args:
        x_TD: the residual stream.
        layer_norm: a layer norm, or the identity.
    """
    if not _norm_served(x_TD, layer_norm, dtype):
        return layer_norm(x_TD).to(dtype)
    return _norm(x_TD, layer_norm.weight, layer_norm.bias, layer_norm.eps)


def add_norm(x_TD: Tensor, added_TD: Tensor, layer_norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """x + added, and `layer_norm` of it in the dtype of `added_TD`, which is that of products."""
    if added_TD.dtype != torch.bfloat16 or not _norm_served(x_TD, layer_norm, added_TD.dtype):
        x_TD = x_TD + added_TD
        return x_TD, layer_norm(x_TD).to(added_TD.dtype)
    return _add_norm(x_TD, added_TD, layer_norm.weight, layer_norm.bias, layer_norm.eps)


def geglu(x_T2I: Tensor) -> Tensor:
    """gelu(first half of each row) times the second half: (T, I)."""
    if x_T2I.dtype != torch.bfloat16 or x_T2I.shape[1] % (2 * kernels.LANES) or not _served(x_T2I):
        value_TI, gate_TI = x_T2I.chunk(2, dim=-1)
        return F.gelu(value_TI) * gate_TI
    return _geglu(x_T2I)


def attend(
    q_TNH: Tensor,
    k_TNH: Tensor,
    v_TNH: Tensor,
    cu_seqlens: Tensor,
    bounds: tuple[int, int],
    tables: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    """`kernels.attend` with a gradient."""
    return _attend(q_TNH, k_TNH, v_TNH, cu_seqlens, *bounds, *tables)[0]


def _norm_served(x_TD: Tensor, layer_norm: nn.Module, dtype: torch.dtype) -> bool:
    if not isinstance(layer_norm, nn.LayerNorm) or layer_norm.weight.dtype != torch.float32:
        return False
    served = x_TD.dtype == torch.float32 and dtype == torch.bfloat16 and not x_TD.shape[-1] % kernels.LANES
    return served and _served(x_TD)


def _served(x: Tensor) -> bool:
    """What stands between products is left to the compiler where there is one: it fuses that itself."""
    return not torch.compiler.is_compiling() and kernels.serves(x)


def _has_gradient(
    operator: torch.library.CustomOpDef, keep: Callable[..., None]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the gradient of an operator; `keep` takes down what it needs (`setup_context`)."""

    def declare(gradient: Callable[..., Any]) -> Callable[..., Any]:
        operator.register_autograd(gradient, setup_context=keep)
        return gradient

    return declare


@torch.library.custom_op("nightloom::norm", mutates_args=())
def _norm(x_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
    return kernels.add_and_norm(x_TD, None, weight_D, bias_D, eps)


@_norm.register_fake
def _(x_TD: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x_TD, dtype=torch.bfloat16)


@torch.library.custom_op("nightloom::add_norm", mutates_args=())
def _add_norm(
    x_TD: Tensor, added_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    x_TD = x_TD.clone()
    return x_TD, kernels.add_and_norm(x_TD, added_TD, weight_D, bias_D, eps)


@_add_norm.register_fake
def _(x_TD: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_TD), torch.empty_like(x_TD, dtype=torch.bfloat16)


_norm_backward = torch.library.custom_op("nightloom::norm_backward", kernels.norm_backward, mutates_args=())


@_norm_backward.register_fake
def _(
    d_normed_TD: Tensor, d_rest_TD: Tensor | None, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_added_TD = d_normed_TD.new_empty(0) if d_rest_TD is None else torch.empty_like(d_normed_TD)
    d_bias_D = weight_D.new_empty(0) if bias_D is None else torch.empty_like(bias_D)
    return torch.empty_like(x_TD), d_added_TD, torch.empty_like(weight_D), d_bias_D


def _keep_for_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """For both: the norm alone, whose input is x, and with an addition, whose first output is."""
    *_, weight_D, bias_D, ctx.eps = inputs
    ctx.save_for_backward(output[0] if isinstance(output, tuple) else inputs[0], weight_D, bias_D)


@_has_gradient(_norm, _keep_for_norm)
def _norm_gradients(ctx: Any, d_normed_TD: Tensor) -> tuple[Tensor | None, ...]:
    x_TD, weight_D, bias_D = ctx.saved_tensors
    d_x, _, d_weight, d_bias = _norm_backward(d_normed_TD, None, x_TD, weight_D, bias_D, ctx.eps)
    return d_x, d_weight, None if bias_D is None else d_bias, None


@_has_gradient(_add_norm, _keep_for_norm)
def _add_norm_gradients(ctx: Any, d_rest_TD: Tensor, d_normed_TD: Tensor) -> tuple[Tensor | None, ...]:
    x_TD, weight_D, bias_D = ctx.saved_tensors
    d_x, d_added, d_weight, d_bias = _norm_backward(d_normed_TD, d_rest_TD, x_TD, weight_D, bias_D, ctx.eps)
    return d_x, d_added, d_weight, None if bias_D is None else d_bias, None


_geglu = torch.library.custom_op("nightloom::geglu", kernels.geglu, mutates_args=())


@_geglu.register_fake
def _(x_T2I: Tensor) -> Tensor:
    return x_T2I.new_empty(x_T2I.shape[0], x_T2I.shape[1] // 2)


_geglu_backward = torch.library.custom_op("nightloom::geglu_backward", kernels.geglu_backward, mutates_args=())


@_geglu_backward.register_fake
def _(d_out_TI: Tensor, x_T2I: Tensor) -> Tensor:
    return torch.empty_like(x_T2I)


@_has_gradient(_geglu, lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
def _geglu_gradients(ctx: Any, d_out_TI: Tensor) -> Tensor:
    return _geglu_backward(d_out_TI, *ctx.saved_tensors)


@torch.library.custom_op("nightloom::attend", mutates_args=())
def _attend(
    q_TNH: Tensor,
    k_TNH: Tensor,
    v_TNH: Tensor,
    cu_seqlens: Tensor,
    back: int,
    ahead: int,
    cos_T1H: Tensor | None,
    sin_T1H: Tensor | None,
) -> tuple[Tensor, Tensor]:
    kept_TN = q_TNH.new_empty(q_TNH.shape[:2], dtype=torch.float32)
    return kernels.attend(q_TNH, k_TNH, v_TNH, cu_seqlens, (back, ahead), (cos_T1H, sin_T1H), kept_TN), kept_TN


@_attend.register_fake
def _(q_TNH: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q_TNH.new_empty(q_TNH.shape), q_TNH.new_empty(q_TNH.shape[:2], dtype=torch.float32)


_attend_backward = torch.library.custom_op("nightloom::attend_backward", kernels.attend_backward, mutates_args=())


@_attend_backward.register_fake
def _(d_out_TNH: Tensor, q_TNH: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q_TNH.new_empty(q_TNH.shape), q_TNH.new_empty(q_TNH.shape), q_TNH.new_empty(q_TNH.shape)


def _keep_for_attend(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_TNH, k_TNH, v_TNH, cu_seqlens, *ctx.bounds, cos_T1H, sin_T1H = inputs
    ctx.save_for_backward(q_TNH, k_TNH, v_TNH, *output, cu_seqlens, cos_T1H, sin_T1H)


@_has_gradient(_attend, _keep_for_attend)
def _attend_gradients(ctx: Any, d_out_TNH: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return *_attend_backward(d_out_TNH, *ctx.saved_tensors, *ctx.bounds), *[None] * 5
