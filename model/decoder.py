"""The causal variant of ModernBERT (Ettin, arXiv 2507.11412): the encoder's layers, looking back only, and a cache.

What differs from `model.encoder` is here and nothing else: three projections where the encoder has one (Hugging Face's
names, so that a state dict needs no translation), a causal pattern, and a way through the layers that keeps keys and
values. Shape suffixes: T packed tokens, S sequences, D width, N heads, H head size, M selected tokens, V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from model.attention import Plan, attend
from model.batch import PackedBatch
from model.cache import Cache, Pages, Ring
from model.config import FULL, EncoderConfig
from model.encoder import Encoder, Linear
from model.errors import InputError
from model.heads import PredictionHead
from model.rotary import rotate

TABLE_STEP = 512
"""Tables of rotary angles grow by so many positions, not by one a token."""


@dataclass(frozen=True, slots=True)
class CachedPlan:
    """How a layer attends when it keeps keys and values."""

    store: Ring | Pages
    rotary: tuple[Tensor, Tensor]
    position_S: Tensor
    """Where the tokens of a step stand in their sequences."""
    prompts: Plan | None = None
    """How prompts see themselves; None in a step of one token a sequence. Queries and keys come turned."""

    def attend(self, q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor) -> Tensor:
        q_TNH, k_TNH = rotate(q_TNH, *self.rotary), rotate(k_TNH, *self.rotary)
        if self.prompts is None:
            return self.store.attend(q_TNH, k_TNH, v_TNH, self.position_S)
        self.store.fill(k_TNH, v_TNH, self.prompts.batch)
        return attend(q_TNH, k_TNH, v_TNH, self.prompts)


class CausalAttention(nn.Module):
    """As `model.encoder.Attention`, with queries, keys and values projected apart."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.attention_bias
        self.head_size = config.head_size
        self.q_proj, self.k_proj, self.v_proj, self.Wo = (Linear(width, width, bias=bias) for _ in range(4))

    def forward(self, x_TD: Tensor, plan: Plan | CachedPlan) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(x_TD).unflatten(1, (-1, self.head_size)) for project in projections)
        out_TNH = attend(q, k, v, plan) if isinstance(plan, Plan) else plan.attend(q, k, v)
        return out_TNH.reshape(x_TD.shape)


class Decoder(Encoder):
    """ModernBERT without a head, causal. `forward` takes a packed batch and keeps nothing, in training too.

    Args:
        config: with `causal` set.
        options: as for `Encoder`.
    """

    def __init__(self, config: EncoderConfig, *, device: torch.device | str = "cpu", **options: Any) -> None:
        if not config.causal:
            raise InputError("this configuration is an encoder's; a decoder's has causal = True")
        if config.num_global_tokens:
            raise InputError("a decoder's cache keeps no global tokens in local layers; num_global_tokens must be 0")
        super().__init__(config, device=device, **options)
        with torch.device(device):
            for layer in self.layers:
                layer.attn = CausalAttention(config)

    def new_cache(self, num_sequences: int) -> Cache:
        like = torch.empty(0, dtype=self.dtype, device=self.embeddings.tok_embeddings.weight.device)
        return Cache(self.config, num_sequences, like)

    def prefill(self, batch: PackedBatch, cache: Cache) -> Tensor:
        """Read the prompts into a new cache; no gradient.

        Args:
            batch: one sequence for each of the cache's.

        Returns:
            hidden_TD, as `forward` gives it.
        """
        assert cache.longest == 0
        cache.length_S, cache.longest = batch.cu_seqlens.diff().long(), batch.max_seqlen
        with torch.no_grad():
            plans = []
            for store, plan in zip(cache.layers, self._plans(batch), strict=True):
                assert plan.rotary is not None
                plans.append(CachedPlan(store, plan.rotary, cache.length_S, replace(plan, rotary=None)))
            return self.through(batch.tokens_T, plans)

    def step(self, tokens_S: Tensor, cache: Cache) -> Tensor:
        """One more token of every sequence; no gradient.

        Args:
            tokens_S: int64.

        Returns:
            hidden_SD.
        """
        position_S, positions = cache.length_S, -(-(cache.longest + 1) // TABLE_STEP) * TABLE_STEP
        full, local = self.global_rotary(position_S, positions), self.local_rotary(position_S, positions)
        plans = [
            CachedPlan(store, full if layer_type == FULL else local, position_S)
            for store, layer_type in zip(cache.layers, self.config.layer_types, strict=True)
        ]
        cache.length_S, cache.longest = position_S + 1, cache.longest + 1
        with torch.no_grad():
            return self.through(tokens_S, plans)


class CausalLanguageModel(nn.Module):
    """Decoder and next-token head (`ModernBertDecoderForCausalLM`)."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        config = model.config
        self.model = model
        self.lm_head = PredictionHead(config)
        self.decoder = Linear(config.hidden_size, config.vocab_size, bias=config.decoder_bias)
        if config.tie_word_embeddings:
            self.decoder.weight = model.embeddings.tok_embeddings.weight

    def forward(self, batch: PackedBatch, select_M: Tensor | None = None) -> Tensor:
        """Logits for the token after each, in the compute dtype.

        Args:
            select_M: indices of the packed tokens to go on from; None takes all.

        Returns:
            (M, V), or (T, V) without a selection.
        """
        return self.predict(self.model(batch, select_M=select_M))

    def predict(self, hidden_MD: Tensor) -> Tensor:
        """The head alone: (M, V)."""
        return self.decoder(self.lm_head(hidden_MD, self.model.dtype))
