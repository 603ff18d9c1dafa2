"""Weights in the layout that oneDNN's products read: put in order once, and not again in every product.

For inference on a CPU in bfloat16, where `F.linear` brings the weight into that layout each time: on AVX-512 bfloat16
4 to 15 % of a product of ModernBERT-base, the more the shorter the batch. The products are the same bit for bit, and
`prepack` looks at that before it keeps anything. The operators are those that torch's compiler emits for frozen CPU
graphs (torch/_inductor/fx_passes/mkldnn_fusion.py).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.encoder import Encoder, Layer
from model.quantized import PROJECTIONS

TRIED = (1, 37, 256)
"""Tokens of the products that are compared."""


class PrepackedLinear(nn.Module):
    """y = x W^T + b with a weight that is laid out for batches of about `tokens` tokens; no gradients."""

    def __init__(self, linear: nn.Linear, tokens: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # Neither parameter nor buffer: an opaque tensor has no storage that could be moved, cast or saved.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), tokens)
        self.bias = None if linear.bias is None else linear.bias.detach()

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features), a copy."""
        dense: Tensor = self.packed.to_dense()
        return dense

    def forward(self, x_TI: Tensor) -> Tensor:
        y_TO: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, self.packed, self.bias, "none", [], "")
        return y_TO

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias


def prepack(encoder: Encoder, tokens: int) -> bool:
    """Replace the projections of an encoder, in place; False, and all as it was, where that cannot be.

    Args:
        tokens: of a usual batch; others give the same numbers.
    """
    places = [
        (getattr(layer, part), name)
        for layer in encoder.layers
        if isinstance(layer, Layer)
        for part, name in PROJECTIONS
    ]
    linears = [getattr(module, name) for module, name in places]
    if not all(isinstance(linear, nn.Linear) and is_packable(linear.weight) for linear in linears):
        return False
    try:
        packed = [PrepackedLinear(linear, tokens) for linear in linears]
        if not all(gives_the_same(*pair) for pair in zip(packed[: len(PROJECTIONS)], linears, strict=False)):
            return False
    except (RuntimeError, AttributeError):  # operators that this build of torch has not, or not for this processor
        return False
    for (module, name), made in zip(places, packed, strict=True):
        setattr(module, name, made)
    return True


def is_packable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()


def gives_the_same(packed: PrepackedLinear, linear: nn.Linear) -> bool:
    """Whether products of a few sizes are the same bit for bit."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for tokens in TRIED:
            x_TI = torch.randn(tokens, linear.in_features, generator=generator).to(linear.weight.dtype)
            if not torch.equal(packed(x_TI), F.linear(x_TI, linear.weight, linear.bias)):
                return False
        return torch.equal(packed.weight, linear.weight)
