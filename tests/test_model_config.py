"""Both generations of Hugging Face's config.json, read and written; presets; what is refused."""

import json
import subprocess
import sys
from typing import Any

import pytest

from model.config import FULL, PRESETS, SLIDING, EncoderConfig, alternate, preset
from model.errors import InputError

# As transformers 4.48 wrote ModernBERT-base, shortened to what decides something, and given uneven values.
FIRST_GENERATION: dict[str, Any] = {
    "architectures": ["ModernBertForMaskedLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 50281,
    "classifier_activation": "gelu",
    "classifier_bias": False,
    "classifier_dropout": 0.0,
    "classifier_pooling": "mean",
    "cls_token_id": 50281,
    "decoder_bias": True,
    "deterministic_flash_attn": False,
    "eos_token_id": 50282,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "hidden_activation": "gelu",
    "hidden_size": 768,
    "initializer_cutoff_factor": 2.0,
    "initializer_range": 0.02,
    "intermediate_size": 1152,
    "layer_norm_eps": 1e-05,
    "local_attention": 128,
    "local_rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "modernbert",
    "norm_bias": False,
    "norm_eps": 1e-05,
    "num_attention_heads": 12,
    "num_hidden_layers": 22,
    "pad_token_id": 50283,
    "position_embedding_type": "absolute",
    "sep_token_id": 50282,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "transformers_version": "4.48.0",
    "vocab_size": 50368,
}


def test_first_generation_is_base() -> None:
    config = EncoderConfig.from_hf(FIRST_GENERATION)
    assert config == preset("base", classifier_pooling="mean")
    assert config.layer_types == alternate(22, 3)
    assert config.extra["torch_dtype"] == "float32"


@pytest.mark.parametrize("every", [1, 2, 3, 5, 22, 30])
def test_global_layers_of_the_first_generation(every: int) -> None:
    config = EncoderConfig.from_hf(FIRST_GENERATION | {"global_attn_every_n_layers": every})
    assert [i for i, kind in enumerate(config.layer_types) if kind == FULL] == list(range(0, 22, every))


@pytest.mark.parametrize(
    "thetas, expected",
    [
        ({}, (160_000.0, 10_000.0)),
        ({"global_rope_theta": 80_000}, (80_000.0, 10_000.0)),
        ({"local_rope_theta": 5_000.0}, (160_000.0, 5_000.0)),
        # A null local theta means the global one.
        ({"local_rope_theta": None}, (160_000.0, 160_000.0)),
        ({"local_rope_theta": None, "global_rope_theta": 80_000.0}, (80_000.0, 80_000.0)),
    ],
)
def test_thetas_of_the_first_generation(thetas: dict[str, Any], expected: tuple[float, float]) -> None:
    config = EncoderConfig.from_hf(FIRST_GENERATION | thetas)
    assert (config.global_theta, config.local_theta) == expected


def test_second_generation() -> None:
    hf = {k: v for k, v in FIRST_GENERATION.items() if "rope_theta" not in k and k != "global_attn_every_n_layers"}
    kinds = [SLIDING, FULL, SLIDING, SLIDING]
    hf |= {
        "num_hidden_layers": 4,
        "layer_types": kinds,
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": 70_000.0},
            SLIDING: {"rope_type": "default", "rope_theta": 9_000.0},
        },
    }
    config = EncoderConfig.from_hf(hf)
    assert config.layer_types == tuple(kinds)
    assert (config.global_theta, config.local_theta) == (70_000.0, 9_000.0)


def test_layer_types_win_over_the_older_key() -> None:
    hf = FIRST_GENERATION | {"num_hidden_layers": 3, "layer_types": [FULL, FULL, SLIDING]}
    assert EncoderConfig.from_hf(hf).layer_types == (FULL, FULL, SLIDING)


@pytest.mark.parametrize(
    "config",
    [
        *PRESETS.values(),
        EncoderConfig(num_layers=5, layer_types=(SLIDING, FULL, SLIDING, SLIDING, FULL)),
        EncoderConfig(num_layers=2, layer_types=(SLIDING, SLIDING), pad_id=None, num_labels=7, norm_bias=True),
    ],
    ids=[*PRESETS, "uneven", "local"],
)
def test_what_is_written_is_read_the_same(config: EncoderConfig) -> None:
    written = json.loads(json.dumps(config.to_hf()))
    assert EncoderConfig.from_hf(written) == config
    # By the words of either generation alone.
    second = {k: v for k, v in written.items() if k not in ("global_attn_every_n_layers",) and "rope_theta" not in k}
    assert EncoderConfig.from_hf(second) == config
    if "global_attn_every_n_layers" in written:
        first = {k: v for k, v in written.items() if k not in ("layer_types", "rope_parameters")}
        assert EncoderConfig.from_hf(first) == config


def test_transformers_reads_what_is_written() -> None:
    transformers = pytest.importorskip("transformers")
    kinds = (SLIDING, FULL, SLIDING, SLIDING, FULL)
    config = EncoderConfig(num_layers=5, layer_types=kinds, global_theta=70_000.0, local_theta=9_000.0, num_labels=5)
    theirs = transformers.ModernBertConfig(**config.to_hf())
    assert theirs.layer_types == list(kinds)
    assert theirs.rope_parameters[FULL]["rope_theta"] == 70_000.0
    assert theirs.rope_parameters[SLIDING]["rope_theta"] == 9_000.0
    assert (theirs.num_labels, theirs.pad_token_id, theirs.hidden_size) == (5, 50283, 768)
    assert EncoderConfig.from_hf(theirs.to_dict()) == config


def test_unknown_keys_are_kept() -> None:
    labels = {"0": "no", "1": "yes", "2": "perhaps"}
    config = EncoderConfig.from_hf(FIRST_GENERATION | {"id2label": labels, "classifier_dropout": 0.1})
    assert config.num_labels == 3
    assert config.to_hf()["id2label"] == labels
    assert config.to_hf()["classifier_dropout"] == 0.1


@pytest.mark.parametrize(
    "change, said",
    [
        ({"model_type": "bert"}, "model_type 'bert'"),
        ({"model_type": None}, "only 'modernbert' and its decoder are supported"),
        ({"hidden_activation": "silu"}, "hidden_activation 'silu'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"rope_parameters": {FULL: {"rope_type": "yarn", "rope_theta": 1e4}}}, "rope_type 'yarn'"),
        ({"num_hidden_layers": 0}, "must be positive integers"),
        ({"global_attn_every_n_layers": 0}, "must be positive integers"),
        ({"num_hidden_layers": "22"}, "must be positive integers"),
        ({"hidden_size": "768"}, "hidden_size is '768'; expected int"),
        ({"hidden_size": True}, "hidden_size is True; expected int"),
        ({"norm_bias": 1}, "norm_bias is 1; expected bool"),
        ({"num_attention_heads": 7}, "not a multiple of num_attention_heads 7"),
        ({"hidden_size": 36}, "head size 3 is odd"),
        ({"layer_types": [FULL]}, "layer_types names 1 layers"),
        ({"layer_types": ["chunked"] * 22}, "layer_types has 'chunked'"),
        ({"num_global_tokens": -1}, "num_global_tokens is below 0"),
        ({"sparse_key_blocks": 0}, "sparse_key_blocks is 0"),
        ({"sparse_key_blocks": 2, "num_global_tokens": 65}, "so 3 at least"),
        ({"sparse_key_blocks": 2, "model_type": "modernbert-decoder"}, "a decoder must not see"),
    ],
    ids=str,
)
def test_bad_configurations_are_refused_in_one_line(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        EncoderConfig.from_hf(FIRST_GENERATION | change)
    assert "\n" not in str(caught.value)


def test_patterns_are_written_only_where_they_change_something() -> None:
    """What was written before they were known reads the same, and its hash, part of a recipe, stays."""
    ours = {"num_global_tokens", "sparse_key_blocks", "sparse_block_size"}
    assert not ours & set(preset("base").to_hf())
    config = preset("base", num_global_tokens=3, sparse_key_blocks=8, sparse_block_size=32)
    written = json.loads(json.dumps(config.to_hf()))
    assert {key: written[key] for key in ours} == dict(zip(sorted(ours), (3, 32, 8), strict=True))
    assert EncoderConfig.from_hf(written) == config
    assert EncoderConfig.from_hf(written | {"sparse_key_blocks": None}).sparse_key_blocks is None


def test_presets_have_the_published_sizes() -> None:
    assert preset("base").num_parameters() == pytest.approx(149e6, rel=0.01)
    assert preset("large").num_parameters() == pytest.approx(395e6, rel=0.01)
    for name in ("ettin-17m", "ettin-32m", "ettin-68m", "ettin-150m", "ettin-400m"):
        assert preset(name).num_parameters() == pytest.approx(float(name[6:-1]) * 1e6, rel=0.05)


def test_preset_with_changes() -> None:
    config = preset("base", num_layers=4, vocab_size=500)
    assert (config.num_layers, config.vocab_size, config.hidden_size) == (4, 500, 768)
    assert config.layer_types == (FULL, SLIDING, SLIDING, FULL)
    assert config.window == 64
    with pytest.raises(InputError, match="no preset is called 'huge'; known are base"):
        preset("huge")
    with pytest.raises(InputError, match="no field 'depth'"):
        preset("base", depth=3)


def test_configuration_loads_without_torch() -> None:
    code = "import sys, model.config, model.errors, model.folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("sliding_window, window", [(None, 63), (64, 63), (65, 64)])
def test_a_decoders_window_in_both_conventions(sliding_window: int | None, window: int) -> None:
    """`sliding_window` counts keys, the token's own included; from 128 Hugging Face makes 64."""
    decoder = preset("ettin-32m", causal=True, sliding_window=sliding_window)
    assert decoder.window == window
    hf = decoder.to_hf()
    assert (hf["model_type"], hf.get("sliding_window")) == ("modernbert-decoder", sliding_window)
    again = EncoderConfig.from_hf(hf)
    assert again == decoder
    assert again.to_hf() == hf
    # An encoder's is none of ours: it is written back as it came.
    assert EncoderConfig.from_hf(FIRST_GENERATION | {"sliding_window": 64}).window == 64
    assert "sliding_window" not in preset("ettin-32m").to_hf()
