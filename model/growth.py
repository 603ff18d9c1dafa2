"""How an encoder grows out of a trained one: longer by another theta, wider and deeper by tiling.

Both keep what was learned. Context extension changes the rotary positions of the global layers only (arXiv
2412.13663, section 2.2.1); tiling starts a large encoder from a small one's weights (appendix A.2 there).
"""

from dataclasses import replace

import torch
from torch import Tensor

from model.config import EncoderConfig
from model.encoder import Encoder
from model.errors import InputError
from model.heads import MaskedLanguageModel
from model.rotary import Rotary


def extend_context(encoder: Encoder, *, max_tokens: int, global_theta: float) -> None:
    """Let an encoder read sequences of `max_tokens`, with another theta in its global layers.

    The rotary table is made anew, and the configuration says so too: what is saved afterwards loads with this theta.
    """
    encoder.config = replace(encoder.config, max_tokens=max_tokens, global_theta=global_theta)
    encoder.global_rotary = Rotary(encoder.config.head_size, global_theta)


@torch.no_grad()
def tile(small: MaskedLanguageModel, large: MaskedLanguageModel) -> None:
    """Fill a large model from a small one: centred, wrapped around the edges, layers stretched.

    Every matrix of the small model stands in the middle of the large one's, and its rows and columns repeat around it;
    heads stay whole. Layer i of L comes from layer i * l // L (Gopher's scaling, arXiv 2112.11446, appendix G.3.3),
    so that order is kept and every layer is used.

    Raises:
        InputError: another vocabulary, head size or set of parameters, or a large model that is smaller somewhere.
    """
    before, after = small.model.config, large.model.config
    check(before, after)
    source = dict(small.named_parameters())
    for name, parameter in large.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            parts[2] = str(int(parts[2]) * before.num_layers // after.num_layers)
        origin = ".".join(parts)
        # A first layer has no attention norm; where it is repeated, the next layer's stands in.
        origin = origin.replace("layers.0.attn_norm.", "layers.1.attn_norm.")
        parameter.copy_(_tiled(name, source[origin], parameter, before, after))


def check(before: EncoderConfig, after: EncoderConfig) -> None:
    biases = ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias", "decoder_bias")
    for name in ("vocab_size", "head_size", *biases, "tie_word_embeddings"):
        if getattr(before, name) != getattr(after, name):
            raise InputError(
                f"a model with {name} {getattr(after, name)} cannot grow out of one with {getattr(before, name)}"
            )
    if before.num_layers == 1 < after.num_layers:
        raise InputError("a model of one layer has no attention norm that those of a deeper one could come from")
    for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads"):
        if getattr(before, name) > getattr(after, name):
            raise InputError(
                f"a model of {name} {getattr(after, name)} cannot grow out of a larger one, of {getattr(before, name)}"
            )


def _tiled(name: str, old: Tensor, new: Tensor, before: EncoderConfig, after: EncoderConfig) -> Tensor:
    """`old` in the shape of `new`: the same rows and columns, some of them repeated."""
    width = centred(before.hidden_size, after.hidden_size)
    inner = centred(before.intermediate_size, after.intermediate_size)
    heads = centred(before.num_heads, after.num_heads)
    features = (heads[:, None] * before.head_size + torch.arange(before.head_size)).flatten()
    rows, columns = width, width
    if ".Wqkv." in name:  # queries, keys and values stacked
        rows = torch.cat([features + part * before.hidden_size for part in range(3)])
    elif ".Wi." in name:  # value and gate stacked
        rows = torch.cat([inner + part * before.intermediate_size for part in range(2)])
    elif name.endswith("tok_embeddings.weight") or name.startswith("decoder."):
        rows = torch.arange(before.vocab_size)
    elif name.endswith("attn.Wo.weight"):
        columns = features
    elif name.endswith("mlp.Wo.weight"):
        columns = inner
    return old[rows][:, columns] if new.ndim == 2 else old[rows]


def centred(old: int, new: int) -> Tensor:
    """Which old index each new one repeats: centred(3, 7) is [1, 2, 0, 1, 2, 0, 1]."""
    return (torch.arange(new) - (new - old) // 2) % old
