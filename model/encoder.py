"""The ModernBERT encoder, whole, in one file: packed tokens in, one vector a token out.

Pre-norm, GeGLU, rotary positions, alternating global and sliding-window attention (arXiv 2412.13663). Parameter names
are Hugging Face's, so that a state dict needs no translation. The residual stream and the norms stay in float32
whatever the compute dtype: that costs little and brings bfloat16 ten times closer to float32. Shape suffixes: T
tokens, D width, N heads, H head size.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import differentiable, kernels
from model.attention import Plan, attend, choose_backend, prepare, strips
from model.batch import PackedBatch
from model.config import FULL, EncoderConfig
from model.patterns import Pattern
from model.rotary import Rotary


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input, whatever its weights are kept in.

    Weights already in that dtype are used as they are; float32 master weights are cast on the way (with a float32
    gradient).
    """

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class LayerNorm(nn.LayerNorm):
    """Layer norm in float32 (or wider, where the input is)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), bias, self.eps)


class Embeddings(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norm = LayerNorm(config)

    def forward(self, tokens_T: Tensor) -> Tensor:
        x_TD = self.tok_embeddings(tokens_T)
        return self.norm(x_TD.to(torch.promote_types(x_TD.dtype, torch.float32)))


class Attention(nn.Module):
    """Everything up to the output projection, which the layer applies together with what follows it row by row."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.num_heads, self.head_size = config.num_heads, config.head_size
        self.Wqkv = Linear(config.hidden_size, 3 * config.hidden_size, bias=config.attention_bias)
        self.Wo = Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)

    def forward(self, x_TD: Tensor, plan: Plan) -> Tensor:
        qkv = self.Wqkv(x_TD).view(-1, 3 * self.num_heads, self.head_size)
        q_TNH, k_TNH, v_TNH = qkv.split(self.num_heads, dim=1)
        return attend(q_TNH, k_TNH, v_TNH, plan).reshape(x_TD.shape)


class GeGLU(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.Wi = Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.Wo = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.Wo(differentiable.geglu(self.Wi(x_TD)))


class Layer(nn.Module):
    def __init__(self, config: EncoderConfig, index: int) -> None:
        super().__init__()
        # The embedding norm has just been applied before the first layer.
        self.attn_norm = nn.Identity() if index == 0 else LayerNorm(config)
        self.attn = Attention(config)
        self.mlp_norm = LayerNorm(config)
        self.mlp = GeGLU(config)

    def forward(self, x_TD: Tensor, plan: Plan, dtype: torch.dtype, select_M: Tensor | None = None) -> Tensor:
        """
        Args:
            select_M: tokens whose output is wanted; None: all. The others only serve these as keys and values.
        """
        attended_TD = self.attn(differentiable.norm(x_TD, self.attn_norm, dtype), plan)
        x_TD, attended_TD = rows(select_M, x_TD, attended_TD)
        x_TD, normed_TD = differentiable.add_norm(x_TD, self.attn.Wo(attended_TD), self.mlp_norm)
        return x_TD + self.mlp(normed_TD)

    def advance(
        self,
        x_TD: Tensor,
        normed_TD: Tensor,
        plan: Plan,
        next_norm: nn.LayerNorm | None,
        select_M: Tensor | None = None,
    ) -> Tensor:
        """The same without a gradient, in strips, and in place where all tokens are wanted.

        Args:
            x_TD: the residual stream; receives this layer's output.
            normed_TD: `attn_norm(x_TD)` in the dtype of products; receives `next_norm` of this layer's output, for the
                layer that follows.
            select_M: as in `forward`.

        Returns:
            The residual stream: `x_TD` itself, or its selected tokens.
        """
        x_TD, normed_TD, attended_TD = rows(select_M, x_TD, normed_TD, self.attn(normed_TD, plan))
        for x, normed, attended in strips(x_TD, normed_TD, attended_TD):
            kernels.add_norm(x, self.attn.Wo(attended), self.mlp_norm, normed)
            added = self.mlp.Wo(kernels.geglu(self.mlp.Wi(normed)))
            if next_norm is None:
                x += added
            else:
                kernels.add_norm(x, added, next_norm, normed)
        return x_TD


def rows(select_M: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The selected rows of each; without a selection the tensors themselves."""
    return tensors if select_M is None else tuple(tensor[select_M] for tensor in tensors)


class Encoder(nn.Module):
    """ModernBERT without a head.

    Args:
        config: the shape.
        attention: "auto", or a back-end's name (see `model.attention`).
        dtype: what matrix products and attention compute in; None takes the dtype of the weights. Weights in float32
            with a bfloat16 `dtype` train in mixed precision.
        device: where the weights will live; the attention back-end is chosen for it.
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        attention: str = "auto",
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = dtype
        with torch.device(device):
            self.embeddings = Embeddings(config)
            self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
            self.final_norm = LayerNorm(config)
        self.global_rotary = Rotary(config.head_size, config.global_theta)
        self.local_rotary = Rotary(config.head_size, config.local_theta)
        self.checkpoint_activations = False
        """Recompute each layer in the backward pass instead of keeping its activations."""
        self.attention, self.attention_reason = choose_backend(
            attention, device=torch.device(device), dtype=dtype or torch.float32, head_size=config.head_size
        )
        if self.attention != "reference" and (config.num_global_tokens or config.sparse_key_blocks is not None):
            self.attention_reason += "; blocks in layers with global tokens or selected blocks"

    def forward(
        self, batch: PackedBatch, layer_outputs: list[Tensor] | None = None, *, select_M: Tensor | None = None
    ) -> Tensor:
        """Encode a packed batch.

        Args:
            batch: on the encoder's device; sequences of at most `config.max_tokens` tokens (longer ones extrapolate).
            layer_outputs: if given, receives the embedding and then every layer's output, (T, D) each, the last
                before the final norm.
            select_M: int64 indices of the packed tokens whose output is wanted, in any order; None: all. The last layer
                does for these only what it does token by token, which is most of its work.

        Returns:
            hidden_TD in float32 (float64 where the weights are); (M, D) with a selection.
        """
        return self.through(batch.tokens_T, self._plans(batch), layer_outputs, select_M)

    @property
    def dtype(self) -> torch.dtype:
        """What matrix products and attention compute in."""
        return self.compute_dtype or self.embeddings.tok_embeddings.weight.dtype

    def through(
        self,
        tokens_T: Tensor,
        plans: Sequence[Any],
        layer_outputs: list[Tensor] | None = None,
        select_M: Tensor | None = None,
    ) -> Tensor:
        """The way through all layers, layer i attending as `plans[i]` says."""
        x_TD, dtype = self.embeddings(tokens_T), self.dtype
        if layer_outputs is not None:
            layer_outputs.append(x_TD.clone())
        normed_TD = None if torch.is_grad_enabled() else x_TD.to(dtype, copy=True)
        norms_after = [*(layer.attn_norm for layer in self.layers[1:]), None]
        for layer, plan, norm_after in zip(self.layers, plans, norms_after, strict=True):
            selected = select_M if norm_after is None else None
            if normed_TD is not None:
                x_TD = layer.advance(x_TD, normed_TD, plan, norm_after, selected)  # type: ignore[operator]
            elif self.checkpoint_activations:
                x_TD = checkpoint(layer, x_TD, plan, dtype, selected, use_reentrant=False)
            else:
                x_TD = layer(x_TD, plan, dtype, selected)
            if layer_outputs is not None:
                layer_outputs.append(x_TD.clone())
        return self.final_norm(x_TD)

    def _plans(self, batch: PackedBatch) -> list[Plan]:
        """How each layer attends in this batch."""
        positions_T = batch.positions_T()
        plans = {}
        for layer_type in sorted(set(self.config.layer_types)):
            pattern = self._pattern(layer_type)
            rotary = (self.global_rotary if layer_type == FULL else self.local_rotary)(positions_T, batch.max_seqlen)
            plans[layer_type] = prepare(self.attention, batch, pattern, dtype=self.dtype, rotary=rotary)
        return [plans[layer_type] for layer_type in self.config.layer_types]

    def _pattern(self, layer_type: str) -> Pattern:
        """What a token sees in layers of this kind."""
        config = self.config
        if layer_type == FULL:
            blocks, size = config.sparse_key_blocks, config.sparse_block_size
            return Pattern(None, config.causal, config.num_global_tokens, blocks, size)
        return Pattern(config.window, config.causal, config.num_global_tokens)


def init_weights(module: nn.Module, config: EncoderConfig, generator: torch.Generator | None = None) -> None:
    """Initialise an encoder, or a model with a head, as published.

    Truncated normal at +- `initializer_cutoff_factor` standard deviations, biases 0, norm weights 1:

        embeddings, Wqkv, Wi            initializer_range
        Wo, head.dense, decoder         initializer_range / sqrt(2 * num_layers)
        classifier                      hidden_size ** -0.5
    """
    narrow = config.initializer_range / math.sqrt(2.0 * config.num_layers)
    deviations = {"Wo": narrow, "dense": narrow, "decoder": narrow, "classifier": config.hidden_size**-0.5}
    for name, child in module.named_modules():
        if isinstance(child, nn.LayerNorm):
            nn.init.ones_(child.weight)
        # A tied decoder is the embedding, which has its own row in the table; its bias is the decoder's own.
        tied = name.endswith("decoder") and config.tie_word_embeddings
        if isinstance(child, nn.Linear | nn.Embedding) and not tied:
            std = deviations.get(name.rpartition(".")[2], config.initializer_range)
            cut = config.initializer_cutoff_factor * std
            nn.init.trunc_normal_(child.weight, std=std, a=-cut, b=cut, generator=generator)
        if getattr(child, "bias", None) is not None and isinstance(child.bias, Tensor):
            nn.init.zeros_(child.bias)
