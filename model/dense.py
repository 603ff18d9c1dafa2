"""Dense modules of sentence-transformers: linear maps of a pooled vector, each with an activation.

A mean of token vectors and a linear map may change places, so that what is pooled over several windows goes through the
maps once, at the end. Computed in float32 whatever the encoder computes in: it costs nothing beside it. Shape suffixes:
R rows, D width before, E width after.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.errors import InputError
from model.folder import SINGLE, DenseLayer, write_json

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "Identity": nn.Identity,
    "Tanh": nn.Tanh,
    "ReLU": nn.ReLU,
    "GELU": nn.GELU,
}
"""By the names of `model.folder.ACTIVATIONS`."""


class Dense(nn.Module):
    """activation(x W^T + b), with sentence-transformers' parameter names."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, activation: str = "Identity") -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x_RD: Tensor) -> Tensor:
        """(R, E), in the dtype of the weights."""
        return self.activation(self.linear(x_RD.to(self.linear.weight.dtype)))


def load_dense(layers: Sequence[DenseLayer], dtype: torch.dtype | None = torch.float32) -> list[Dense]:
    """The modules of a folder, on the CPU.

    Args:
        dtype: None keeps what is in the file.

    Raises:
        InputError: weights that are unreadable, or not those that the configuration says.
    """
    modules = []
    for layer in layers:
        module = Dense(layer.in_features, layer.out_features, bias=layer.bias, activation=layer.activation)
        try:
            state = load_file(layer.file)
            if dtype is None:
                module.to(next(iter(state.values())).dtype)
            module.load_state_dict(state)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{layer.file} cannot be read as safetensors: {error}; save the model again") from error
        except (RuntimeError, StopIteration) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{layer.file} does not fit its config.json: {reason}; save the model again") from error
        modules.append(module)
    return modules


def save_dense(module: Dense, path: Path, dtype: torch.dtype | None = None) -> None:
    """A Dense module's folder, as sentence-transformers writes it.

    Args:
        dtype: of the saved tensors; None keeps theirs.
    """
    path.mkdir()
    kind = type(module.activation)
    said: dict[str, Any] = {
        "in_features": module.linear.in_features,
        "out_features": module.linear.out_features,
        "bias": module.linear.bias is not None,
        "activation_function": f"{kind.__module__}.{kind.__name__}",
    }
    write_json(path / "config.json", said)
    tensors = {k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in module.state_dict().items()}
    save_file(tensors, path / SINGLE, metadata={"format": "pt"})
    (path / SINGLE).chmod(0o644)  # safetensors writes it for its owner alone
