"""Weights in int8: a quarter of the memory of float32, and on CPUs with int8 products faster ones.

Every output channel of a projection has a float32 scale, and so has every row of the embedding; norms stay as they are.
On a CPU activations are quantized too, each token by its own largest value, and the products are exact (int32,
`torch._int_mm`). Elsewhere only the weights are int8: they are multiplied in the dtype of the activations, which holds
them exactly, and the scale comes after; in float16 a part of it before. No gradients. Shape suffixes: T tokens, I
inputs, O outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import kernels
from model.encoder import Encoder, Layer

LARGEST = 127
"""-128 is not used, so that a value and its negative are quantized alike."""
HALF_STEP = 2.0**-10
"""What a step of a weight is in a float16 product: sums of whole steps pass 65,504 where an activation is large, as
happens in trained encoders. A power of two, so that the weights stay exact."""
PROJECTIONS = (("attn", "Wqkv"), ("attn", "Wo"), ("mlp", "Wi"), ("mlp", "Wo"))


class QuantizedLinear(nn.Module):
    """y = x W^T + b with int8 weights, in the dtype of x."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, dtype=torch.int8), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.ones(outputs), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(outputs), requires_grad=False) if bias else None

    def forward(self, x_TI: Tensor) -> Tensor:
        if x_TI.device.type == "cpu" and kernels.multiplies_int8():
            quantized_TI, scale_T = kernels.quantize_rows(x_TI)
            sums_TO = torch._int_mm(quantized_TI, self.weight.t())
            y_TO = kernels.scale_sums(sums_TO, scale_T, self.weight_scale, x_TI.dtype)
        else:
            step, weight_OI = 1.0, self.weight.to(x_TI.dtype)
            if x_TI.dtype == torch.float16:
                step, weight_OI = HALF_STEP, weight_OI.mul_(HALF_STEP)
            y_TO = F.linear(x_TI, weight_OI) * (self.weight_scale / step).to(x_TI.dtype)
        return y_TO if self.bias is None else y_TO + self.bias.to(x_TI.dtype)


class QuantizedEmbedding(nn.Module):
    """Rows of int8 and their scales; gives float32."""

    def __init__(self, entries: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(entries, width, dtype=torch.int8), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.ones(entries), requires_grad=False)

    def forward(self, tokens_T: Tensor) -> Tensor:
        return self.weight[tokens_T].float() * self.weight_scale[tokens_T][:, None]


def quantize(encoder: Encoder) -> Encoder:
    """Replace the projections and the embedding of an encoder, in place, by int8 ones; returned for convenience.

    On the meta device the result has the shapes of a saved one, to load weights into.
    """
    embeddings = encoder.embeddings
    embeddings.tok_embeddings = _embedding(embeddings.tok_embeddings)  # type: ignore[assignment]
    for layer in encoder.layers:
        assert isinstance(layer, Layer)
        for part, name in PROJECTIONS:
            module = getattr(layer, part)
            setattr(module, name, _linear(getattr(module, name)))
    return encoder


def quantize_weight(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Each row as int8 and the float32 that one step stands for: the largest of [-2.0, 0.5] becomes -127 steps.

    A row of zeros has a scale of 1.
    """
    weight_OI = weight_OI.detach().float()
    scale_O = weight_OI.abs().amax(dim=1) / LARGEST
    scale_O = torch.where(scale_O > 0, scale_O, 1.0)
    return (weight_OI / scale_O[:, None]).round().to(torch.int8), scale_O


def _linear(linear: nn.Linear) -> QuantizedLinear:
    with torch.device(linear.weight.device):
        made = QuantizedLinear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    made.weight.data, made.weight_scale.data = quantize_weight(linear.weight)
    if linear.bias is not None and made.bias is not None:
        made.bias.data = linear.bias.detach().float()
    return made


def _embedding(embedding: nn.Embedding) -> QuantizedEmbedding:
    with torch.device(embedding.weight.device):
        made = QuantizedEmbedding(embedding.num_embeddings, embedding.embedding_dim)
    made.weight.data, made.weight_scale.data = quantize_weight(embedding.weight)
    return made
