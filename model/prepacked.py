"""Weights in the layout that oneDNN's products read: put in order once, and not again in every product.

For inference on a CPU in bfloat16, where `F.linear` brings the weight into that layout each time: on AVX-512 bfloat16
4 to 15 % of a product of ModernBERT-base, the more the shorter the batch. The products are the same bit for bit, and
`prepack` looks at that before it keeps anything. The operators are those that torch's compiler emits for frozen CPU
graphs (torch/_inductor/fx_passes/mkldnn_fusion.py). Shape suffixes: T tokens, I inputs, O outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.encoder import Encoder, Layer, Linear
from model.quantized import PROJECTIONS

TRIED = (1, 37, 256)
"""Tokens of the products that are compared."""


class PrepackedLinear(nn.Module):
    """y = x W^T + b with a weight that is laid out for batches of about `tokens` tokens; no gradients.

    What is copied, pickled, moved, cast or loaded goes through the dense weight, and is laid out anew where it ends up.
    Where that cannot be (another device or dtype, a processor or a torch without these products), it stays dense.
    """

    def __init__(self, linear: nn.Linear, tokens: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.tokens = tokens
        self._keep(linear)

    def _keep(self, linear: nn.Linear) -> None:
        # Neither parameters nor buffers: an opaque tensor has no storage that could be moved, cast or saved.
        self.bias = None if linear.bias is None else linear.bias.detach()
        dense_OI = linear.weight.detach()
        self.packed = lay_out(dense_OI, self.tokens)
        self.dense = dense_OI if self.packed is None else None

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features), a copy where it is laid out."""
        if self.packed is None:
            assert self.dense is not None
            return self.dense
        weight_OI: Tensor = self.packed.to_dense()
        return weight_OI

    def linear(self) -> Linear:
        """The same layer with its dense weight."""
        made = Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        made.weight = nn.Parameter(self.weight, requires_grad=False)
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias, requires_grad=False)
        return made

    def forward(self, x_TI: Tensor) -> Tensor:
        if self.packed is None:
            return Linear.forward(self, x_TI)  # type: ignore[arg-type]  # weight and bias are all that it asks for
        y_TO: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, self.packed, self.bias, "none", [], "")
        return y_TO

    def _apply(self, fn: Any, recurse: bool = True) -> "PrepackedLinear":
        self._keep(self.linear()._apply(fn, recurse))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias

    def _load_from_state_dict(self, *arguments: Any) -> None:
        linear = self.linear()
        linear._load_from_state_dict(*arguments)
        self._keep(linear)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"packed": None, "dense": self.weight}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._keep(self.linear())


def lay_out(weight_OI: Tensor, tokens: int) -> Tensor | None:
    """The weight as the products read it; None where there are no such products."""
    if not is_packable(weight_OI):
        return None
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI, tokens)
        torch.ops.mkldnn._linear_pointwise(weight_OI[:1], packed, None, "none", [], "")
    except (RuntimeError, AttributeError):  # operators that this build of torch has not, or not for this processor
        return None
    return packed


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
    packed = [PrepackedLinear(linear, tokens) for linear in linears]
    if any(made.packed is None for made in packed):
        return False
    if not all(gives_the_same(*pair) for pair in zip(packed[: len(PROJECTIONS)], linears, strict=False)):
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
