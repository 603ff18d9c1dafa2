"""The shape of a ModernBERT encoder or decoder, from and to both generations of Hugging Face's `config.json`.

The first generation (transformers 4.48) says `global_attn_every_n_layers`, `global_rope_theta`, `local_rope_theta`;
the second (transformers 5) says `layer_types` and `rope_parameters`. What we write carries both, so that either loads
it. Loads no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from model.errors import InputError

LayerType = Literal["full_attention", "sliding_attention"]
FULL: LayerType = "full_attention"
SLIDING: LayerType = "sliding_attention"
QUERY_BLOCK = 32
"""Queries per block in windowed layers (`model.patterns`). Keys per block are QUERY_BLOCK + 2 * window. At base size in
bfloat16 on two cores 2,048 tokens took a layer 16 ms at 32, 21 at 64, 23 at 128, 29 at 256: what is computed in vain
grows. Here, because the plan of a GPU's memory needs it without torch."""


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """Everything that decides the shape and the arithmetic of an encoder. The defaults are ModernBERT-base."""

    vocab_size: int = 50368
    hidden_size: int = 768
    """Width D of the residual stream."""
    intermediate_size: int = 1152
    """Width of the gated hidden layer; `Wi` has twice as many outputs."""
    num_layers: int = 22
    num_heads: int = 12
    max_tokens: int = 8192
    """Longest sequence, special tokens included (`max_position_embeddings`)."""
    local_attention: int = 128
    """Total width of the sliding window: token i sees j with |i - j| <= local_attention // 2."""
    layer_types: tuple[LayerType, ...] = ()
    """One entry a layer; empty means every third layer is global, beginning with the first."""
    global_theta: float = 160_000.0
    local_theta: float = 10_000.0
    norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    classifier_bias: bool = False
    """Bias of the dense layer in the prediction head."""
    decoder_bias: bool = True
    """Bias of the masked-token decoder."""
    tie_word_embeddings: bool = True
    classifier_pooling: Literal["cls", "mean"] = "cls"
    num_labels: int = 2
    initializer_range: float = 0.02
    initializer_cutoff_factor: float = 2.0
    num_global_tokens: int = 0
    """The first so many tokens of a sequence see, and are seen by, all of it, in local layers too. This and the next
    two are ours: Hugging Face ignores them, so they are written only where they change something."""
    sparse_key_blocks: int | None = None
    """Blocks of keys that a block of queries selects in global layers, see `model.sparse`; None attends to all."""
    sparse_block_size: int = 64
    """Tokens of such a block."""
    causal: bool = False
    """A decoder (`model_type` "modernbert-decoder"): no token sees a later one."""
    sliding_window: int | None = None
    """Decoders only: keys that a token sees in local layers, its own included; None means local_attention // 2.

    Two conventions are about. Hugging Face computes 64 keys from a `local_attention` of 128. Ettin was trained with
    FlashAttention's window of 64 to the left, which leaves the token's own key uncounted: 65. The default is what
    Hugging Face computes, so that logits agree; 65 here, or in config.json, is as trained, for Hugging Face too.
    """
    pad_id: int | None = 50283
    cls_id: int | None = 50281
    sep_id: int | None = 50282
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Keys of a `config.json` that decide nothing here (labels, names, dropout); written back as they came."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise InputError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_heads}"
            )
        if self.head_size % 2:
            raise InputError(f"head size {self.head_size} is odd; rotary positions need an even one")
        if not self.layer_types:
            object.__setattr__(self, "layer_types", alternate(self.num_layers, 3))
        if len(self.layer_types) != self.num_layers:
            raise InputError(
                f"layer_types names {len(self.layer_types)} layers, num_hidden_layers is {self.num_layers}"
            )
        if self.causal and self.window < 0:
            raise InputError(
                "a decoder's local layers see no key: local_attention must be 2 or sliding_window 1 at least"
            )
        if self.num_global_tokens < 0 or self.sparse_block_size < 1:
            raise InputError("num_global_tokens is below 0 or sparse_block_size below 1")
        if self.sparse_key_blocks is not None:
            if self.causal:
                raise InputError(
                    "sparse_key_blocks selects by later tokens too, which a decoder must not see; leave it out"
                )
            least = 1 + -(-self.num_global_tokens // self.sparse_block_size)
            if self.sparse_key_blocks < least:
                raise InputError(
                    f"sparse_key_blocks is {self.sparse_key_blocks}; a block selects itself and those of the global "
                    f"tokens, so {least} at least"
                )
        if unknown := set(self.layer_types) - {FULL, SLIDING}:
            raise InputError(f"layer_types has {sorted(unknown)[0]!r}; known are {FULL!r} and {SLIDING!r}")

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def window(self) -> int:
        """Reach of local attention, in tokens: to each side, and of a decoder to the left."""
        if self.causal:
            return (self.local_attention // 2 if self.sliding_window is None else self.sliding_window) - 1
        return self.local_attention // 2

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Parameters of the encoder without a head."""
        d, m = self.hidden_size, self.intermediate_size
        norms = d * (2 if self.norm_bias else 1)
        layer = 4 * d * d + 3 * m * d + 2 * norms
        layer += (4 * d if self.attention_bias else 0) + (2 * m + d if self.mlp_bias else 0)
        # The first layer has no attention norm (the embedding norm takes its place); the final norm evens the count.
        body = self.num_layers * layer + norms
        return body + (self.vocab_size * d if embeddings else 0)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "EncoderConfig":
        """Read a Hugging Face `config.json` of either generation.

        Raises:
            InputError: another architecture, an activation or a rotary variant that is not implemented, a malformed
                value.
        """
        kind = hf.get("model_type")
        if kind not in MODEL_TYPES:
            raise InputError(f"config.json has model_type {kind!r}; only 'modernbert' and its decoder are supported")
        for key in ("hidden_activation", "classifier_activation"):
            if hf.get(key, "gelu") != "gelu":
                raise InputError(f"config.json has {key} {hf[key]!r}; only 'gelu' is supported")
        rest = dict(hf)
        values = {ours: rest.pop(theirs) for ours, theirs in HF_NAMES.items() if theirs in rest}
        rope = rest.pop("rope_parameters", None) or {}
        every = rest.pop("global_attn_every_n_layers", 3)
        global_theta = rest.pop("global_rope_theta", 160_000.0)
        local_theta = rest.pop("local_rope_theta", 10_000.0)
        if rest.pop("rope_scaling", None):
            raise InputError("config.json has rope_scaling; only the default rotary positions are supported")
        for layer_type in (FULL, SLIDING):
            variant = (rope.get(layer_type) or {}).get("rope_type", "default")
            if variant != "default":
                raise InputError(f"config.json has rope_type {variant!r}; only 'default' is supported")
        values["global_theta"] = (rope.get(FULL) or {}).get("rope_theta", global_theta)
        # In the first generation a null local theta means: the global one.
        local_default = global_theta if local_theta is None else local_theta
        values["local_theta"] = (rope.get(SLIDING) or {}).get("rope_theta", local_default)
        layers = values.get("num_layers", 22)
        if not isinstance(layers, int) or layers < 1 or not isinstance(every, int) or every < 1:
            raise InputError("config.json: num_hidden_layers and global_attn_every_n_layers must be positive integers")
        values["layer_types"] = tuple(values.get("layer_types") or alternate(layers, every))
        values.setdefault("num_labels", len(rest["id2label"]) if rest.get("id2label") else 2)
        if MODEL_TYPES[kind]:
            values |= {"causal": True, "sliding_window": rest.pop("sliding_window", None)}
        for key in ("model_type", "hidden_activation", "classifier_activation", "reference_compile"):
            rest.pop(key, None)
        for ours, value in values.items():
            default = getattr(DEFAULTS, ours)
            expected = int if default is None else type(default)
            if ours in NULLABLE and value is None:
                continue
            if expected is float and isinstance(value, int):
                values[ours] = value = float(value)
            if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
                raise InputError(f"config.json: {HF_NAMES.get(ours, ours)} is {value!r}; expected {expected.__name__}")
        return cls(**values, extra=rest)

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of a Hugging Face folder, in the words of both generations."""
        hf = dict(self.extra)
        for ours, theirs in HF_NAMES.items():
            if ours not in OURS or getattr(self, ours) != getattr(DEFAULTS, ours):
                hf[theirs] = getattr(self, ours)
        hf["layer_types"] = list(self.layer_types)
        if len(hf.get("id2label") or {}) == self.num_labels:
            hf.pop("num_labels")  # transformers derives it from the labels
        hf.setdefault("bos_token_id", self.cls_id)
        hf.setdefault("eos_token_id", self.sep_id)
        hf["model_type"] = next(kind for kind, causal in MODEL_TYPES.items() if causal == self.causal)
        if self.causal:
            hf.pop("classifier_pooling")
            if self.sliding_window is not None:
                hf["sliding_window"] = self.sliding_window
        hf["hidden_activation"] = hf["classifier_activation"] = "gelu"
        hf["global_rope_theta"], hf["local_rope_theta"] = self.global_theta, self.local_theta
        hf["rope_parameters"] = {
            FULL: {"rope_type": "default", "rope_theta": self.global_theta},
            SLIDING: {"rope_type": "default", "rope_theta": self.local_theta},
        }
        for every in range(1, self.num_layers + 1):
            if self.layer_types == alternate(self.num_layers, every):
                hf["global_attn_every_n_layers"] = every
                break
        return dict(sorted(hf.items()))


def alternate(num_layers: int, every: int) -> tuple[LayerType, ...]:
    """One global layer in `every`, the first included. alternate(4, 3) is (full, sliding, sliding, full)."""
    return tuple(SLIDING if i % every else FULL for i in range(num_layers))


MODEL_TYPES = {"modernbert": False, "modernbert-decoder": True}
"""Hugging Face's name of an architecture, and whether it is causal."""
HF_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_tokens": "max_position_embeddings",
    "local_attention": "local_attention",
    "layer_types": "layer_types",
    "norm_eps": "norm_eps",
    "norm_bias": "norm_bias",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "classifier_bias": "classifier_bias",
    "decoder_bias": "decoder_bias",
    "tie_word_embeddings": "tie_word_embeddings",
    "classifier_pooling": "classifier_pooling",
    "num_labels": "num_labels",
    "initializer_range": "initializer_range",
    "initializer_cutoff_factor": "initializer_cutoff_factor",
    "pad_id": "pad_token_id",
    "cls_id": "cls_token_id",
    "sep_id": "sep_token_id",
    "num_global_tokens": "num_global_tokens",
    "sparse_key_blocks": "sparse_key_blocks",
    "sparse_block_size": "sparse_block_size",
}
OURS = ("num_global_tokens", "sparse_key_blocks", "sparse_block_size")
NULLABLE = ("pad_id", "cls_id", "sep_id", "sliding_window", "sparse_key_blocks")
DEFAULTS = EncoderConfig()

# ModernBERT: arXiv 2412.13663, table 4. Ettin: arXiv 2507.11412, table 1; its sizes use one theta in local and global
# layers.
PRESETS: dict[str, EncoderConfig] = {
    "base": DEFAULTS,
    "large": EncoderConfig(hidden_size=1024, intermediate_size=2624, num_layers=28, num_heads=16),
}
for _name, _width, _inner, _layers, _heads in (
    ("ettin-17m", 256, 384, 7, 4),
    ("ettin-32m", 384, 576, 10, 6),
    ("ettin-68m", 512, 768, 19, 8),
    ("ettin-150m", 768, 1152, 22, 12),
    ("ettin-400m", 1024, 2624, 28, 16),
):
    PRESETS[_name] = EncoderConfig(
        hidden_size=_width,
        intermediate_size=_inner,
        num_layers=_layers,
        num_heads=_heads,
        local_theta=160_000.0,
    )


def preset(name: str, **changes: Any) -> EncoderConfig:
    """A published shape by name, with fields changed: `preset("base", num_layers=4)`.

    Raises:
        InputError: an unknown name or field.
    """
    if name not in PRESETS:
        raise InputError(f"no preset is called {name!r}; known are {', '.join(PRESETS)}")
    known = {f.name for f in fields(EncoderConfig)}
    if unknown := set(changes) - known:
        raise InputError(f"the configuration has no field {sorted(unknown)[0]!r}; it has {', '.join(sorted(known))}")
    if "num_layers" in changes:
        changes.setdefault("layer_types", ())
    return replace(PRESETS[name], **changes)
