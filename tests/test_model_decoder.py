"""The decoder against Hugging Face's ModernBertDecoderForCausalLM with the same random weights, in both window
conventions; its folders; what a token can see.
"""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.batch import PackedBatch, pack
from model.config import FULL, SLIDING, EncoderConfig
from model.decoder import CausalLanguageModel, Decoder
from model.encoder import init_weights
from model.errors import InputError
from model.folder import read_folder
from model.weights import load_decoder, load_encoder, save_folder

LENGTHS = (1, 2, 63, 64, 65, 66, 129, 200, 300)
TOLERANCE = 1e-5
"""On the largest difference of a logit, as a share of the logits' root mean square."""
CONVENTIONS = {"64-keys": None, "65-keys": 65}


def shape(**changes: Any) -> EncoderConfig:
    values: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 4,
        "num_heads": 2,
        "max_tokens": 1024,
        "layer_types": (FULL, SLIDING, SLIDING, FULL),
        "causal": True,
        "pad_id": 0,
        "cls_id": 1,
        "sep_id": 2,
    }
    return EncoderConfig(**values | changes)


def randomise(module: nn.Module, num_layers: int = 4) -> Any:
    """Wide weights, so that attention is far from uniform, and norms and biases away from 1 and 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = 0.15 * torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(noise + ("norm" in name and name.endswith("weight")))
            else:
                parameter.copy_(noise / (math.sqrt(2 * num_layers) if "Wo" in name else 1))
    return module.eval()


def random_decoder(dtype: torch.dtype = torch.float32, **changes: Any) -> CausalLanguageModel:
    return randomise(CausalLanguageModel(Decoder(shape(**changes)))).to(dtype)


def random_sequences(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(3, 300, length) for length in lengths]


def hugging_face(model: CausalLanguageModel) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.ModernBertDecoderConfig(**model.model.config.to_hf())
    theirs = transformers.ModernBertDecoderForCausalLM(config)
    theirs.load_state_dict(model.state_dict())
    return theirs.eval()


@torch.inference_mode()
def worst_difference(model: CausalLanguageModel, theirs: Any) -> float:
    """Of any logit of sequences packed together here, one by one there."""
    sequences = random_sequences()
    batch = pack(sequences)
    logits, worst = model(batch), 0.0
    for (start, stop), sequence in zip(pairwise(batch.host_offsets()), sequences, strict=True):
        expected = theirs(torch.tensor(sequence)[None]).logits[0]
        worst = max(worst, ((logits[start:stop] - expected).abs().max() / expected.square().mean().sqrt()).item())
    return worst


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sliding_window": 65},
        {"tie_word_embeddings": False, "decoder_bias": False},
        {"classifier_bias": True, "norm_bias": True, "attention_bias": True, "mlp_bias": True},
        {"layer_types": (SLIDING, FULL, SLIDING, SLIDING), "local_attention": 32, "local_theta": 160_000.0},
    ],
    ids=str,
)
def test_logits_are_hugging_faces(changes: dict[str, Any]) -> None:
    model = random_decoder(**changes)
    assert worst_difference(model, hugging_face(model)) < TOLERANCE


def test_parity_tells_the_conventions_apart() -> None:
    """64 keys as Hugging Face computes, 65 as trained: one key more is far above the tolerance."""
    model = random_decoder()
    theirs = hugging_face(model)
    assert theirs.config.sliding_window == 64
    assert worst_difference(random_decoder(sliding_window=65), theirs) > 100 * TOLERANCE


@pytest.mark.parametrize("sliding_window, keys", [(None, 64), (65, 65), (64, 64)])
def test_a_local_layer_sees_so_many_keys(sliding_window: int | None, keys: int) -> None:
    model = random_decoder(torch.float64, num_layers=1, layer_types=(SLIDING,), sliding_window=sliding_window)
    batch = pack(random_sequences((50, 400, 50)))
    tokens = batch.tokens_T.clone()
    tokens[50 + 180] = 3 + (tokens[50 + 180] - 2) % 297
    with torch.inference_mode():
        changed = (model.model(batch) != model.model(PackedBatch(tokens, batch.cu_seqlens, 400))).any(dim=1)
    assert (changed.nonzero().flatten() - 50).tolist() == list(range(180, 180 + keys))


def gradients(attention: str) -> tuple[Tensor, dict[str, Tensor]]:
    model = randomise(CausalLanguageModel(Decoder(shape(), attention=attention))).double()
    logits = model(pack(random_sequences((1, 200, 65, 130))), torch.tensor([0, 100, 200, 390]))
    logits.square().sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_blocks_and_reference_agree_with_gradients() -> None:
    (ours, slopes), (expected, wanted) = gradients("blocks"), gradients("reference")
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    assert slopes.keys() == wanted.keys() == dict(random_decoder().named_parameters()).keys()
    for name in slopes:
        torch.testing.assert_close(slopes[name], wanted[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 65}, {"tie_word_embeddings": False}], ids=str)
def test_folders_go_both_ways(tmp_path: Path, changes: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    model = random_decoder(**changes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(save_folder(model, tmp_path / "ours")).eval()
    assert type(theirs).__name__ == "ModernBertDecoderForCausalLM"
    assert worst_difference(model, theirs) < TOLERANCE
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        loaded = load_decoder(read_folder(tmp_path / folder, causal=True)).eval()
        assert loaded.model.config.window == model.model.config.window
        assert (loaded.decoder.weight is loaded.model.embeddings.tok_embeddings.weight) == ("tie" not in str(changes))
        state = loaded.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_wrong_kind_is_refused_in_one_line(tmp_path: Path, tiny_model_folder: Path) -> None:
    folder = save_folder(random_decoder(), tmp_path / "decoder")
    with pytest.raises(InputError, match=r"holds a decoder .ModernBertDecoderForCausalLM.; give the folder of an enc"):
        load_encoder(read_folder(folder))
    with pytest.raises(InputError, match=r"holds an encoder .ModernBertModel.; give the folder of a decoder"):
        read_folder(tiny_model_folder, causal=True)
    with pytest.raises(InputError, match="an encoder's"):
        Decoder(shape(causal=False))
    with pytest.raises(InputError, match="no global tokens in local layers"):
        Decoder(shape(num_global_tokens=1))
    with pytest.raises(InputError, match="see no key"):
        shape(sliding_window=0)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": "64"}))
    with pytest.raises(InputError, match="sliding_window is '64'; expected int"):
        read_folder(folder, causal=True)


def test_initialisation_is_as_published() -> None:
    config = shape(vocab_size=2000, hidden_size=256, intermediate_size=384, tie_word_embeddings=False)
    model = CausalLanguageModel(Decoder(config))
    init_weights(model, config, torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            narrow = any(part in name for part in ("Wo", "dense", "decoder"))
            expected = 0.8796 * 0.02 / (math.sqrt(8) if narrow else 1)
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
