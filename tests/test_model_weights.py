"""Folders saved here load in transformers and sentence-transformers with the same vectors, and the other way round."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from safetensors.torch import load_file, save_file
from torch import nn

from model.batch import pack
from model.config import FULL, SLIDING, EncoderConfig
from model.embedder import Embedder
from model.encoder import Encoder
from model.errors import InputError
from model.folder import read_folder
from model.heads import HEADS, MaskedLanguageModel
from model.weights import load_encoder, load_model, save_folder

TEXTS = [*SENTENCES, "", "x", " ".join(SENTENCES * 8)]
TOLERANCE = 1e-5
IDS = [[2, *range(5, 5 + length), 3] for length in (1, 60, 200)]


def shape(**changes: Any) -> EncoderConfig:
    values: dict[str, Any] = {
        "vocab_size": 400,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 5,
        "num_heads": 2,
        "max_tokens": 512,
        "pad_id": 0,
        "cls_id": 2,
        "sep_id": 3,
        "num_labels": 3,
    }
    return EncoderConfig(**values | changes)


def randomise(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = 0.15 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + ("norm" in name and name.endswith("weight")))
    return module.eval()


def hugging_face(name: str, config: EncoderConfig) -> Any:
    transformers = pytest.importorskip("transformers")
    return randomise(getattr(transformers, name)(transformers.ModernBertConfig(**config.to_hf())))


def sentence_transformer(folder: Path) -> Any:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu", local_files_only=True)


@torch.inference_mode()
def assert_same_output(ours: nn.Module, theirs: Any) -> None:
    """Logits, or hidden states, of three sequences."""
    packed = ours(pack(IDS))
    parts = []
    for ids in IDS:
        out = theirs(torch.tensor([ids]))
        parts.append(out.logits if "logits" in out else out.last_hidden_state)
    expected = torch.cat([p.reshape(-1, p.shape[-1]) for p in parts])
    assert (packed - expected).abs().max() < TOLERANCE * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(
    "changes", [{}, {"layer_types": (SLIDING, FULL, SLIDING, SLIDING, FULL), "norm_bias": True}], ids=str
)
def test_saved_here_loads_in_transformers(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    encoder = Encoder(shape(**changes))
    kind = HEADS[name]
    model = randomise(encoder if kind is None else kind(encoder))
    save_folder(model, tmp_path / "ours")
    theirs, report = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_same_output(model, theirs.eval())
    again = load_model(read_folder(tmp_path / "ours"))
    assert type(again) is type(model)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
def test_saved_by_transformers_loads_here(tmp_path: Path, name: str, max_shard_size: str) -> None:
    theirs = hugging_face(name, shape())
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size)
    folder = read_folder(tmp_path / "theirs")
    assert folder.architecture == name
    assert (len(folder.weight_files) > 1) == (max_shard_size == "100KB")
    assert_same_output(load_model(folder), theirs)
    # Whatever the head, the encoder under it loads by itself.
    encoder = load_encoder(folder)
    bare = theirs if name == "ModernBertModel" else theirs.model
    assert_same_output(encoder, bare)


def test_untied_decoder(tmp_path: Path) -> None:
    model = MaskedLanguageModel(Encoder(shape(tie_word_embeddings=False)))
    randomise(model)
    save_folder(model, tmp_path / "ours")
    again = load_model(read_folder(tmp_path / "ours"))
    assert isinstance(again, MaskedLanguageModel)
    assert torch.equal(again.decoder.weight, model.decoder.weight)
    assert not torch.equal(again.decoder.weight, again.model.embeddings.tok_embeddings.weight)


def test_tied_decoder_stays_tied(tmp_path: Path) -> None:
    save_folder(randomise(MaskedLanguageModel(Encoder(shape()))), tmp_path / "ours")
    assert "decoder.weight" not in load_file(tmp_path / "ours" / "model.safetensors")
    again = load_model(read_folder(tmp_path / "ours"))
    assert isinstance(again, MaskedLanguageModel)
    assert again.decoder.weight is again.model.embeddings.tok_embeddings.weight


@pytest.mark.parametrize("local_theta", [5_000.0, None])
def test_first_generation_folder_loads_here_and_there(tmp_path: Path, local_theta: float | None) -> None:
    """config.json as transformers 4.48 wrote it, by hand; None as local theta means the global one."""
    transformers = pytest.importorskip("transformers")
    config = shape(num_layers=6, layer_types=(), global_theta=80_000.0, local_theta=local_theta or 80_000.0)
    folder = save_folder(randomise(Encoder(config)), tmp_path / "old")
    hf = json.loads((folder / "config.json").read_text())
    for key in ("layer_types", "rope_parameters", "dtype"):
        hf.pop(key)
    hf |= {
        "global_attn_every_n_layers": 3,
        "global_rope_theta": 80_000.0,
        "local_rope_theta": local_theta,
        "torch_dtype": "float32",
        "transformers_version": "4.48.0",
    }
    (folder / "config.json").write_text(json.dumps(hf))
    ours = load_encoder(read_folder(folder))
    assert ours.config.layer_types == (FULL, SLIDING, SLIDING) * 2
    assert (ours.config.global_theta, ours.config.local_theta) == (80_000.0, local_theta or 80_000.0)
    if local_theta is None:
        # transformers 5 puts its own default where the first generation said null; the meaning is 4.48's.
        hf["local_rope_theta"] = 80_000.0
        (folder / "config.json").write_text(json.dumps(hf))
    assert_same_output(ours, transformers.ModernBertModel.from_pretrained(folder).eval())


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "weighted_mean"])
@pytest.mark.parametrize("normalize", [True, False])
def test_saved_here_loads_in_sentence_transformers(
    tmp_path: Path, tiny_tokenizer_folder: Path, pooling: str, normalize: bool
) -> None:
    folder = save_folder(
        randomise(Encoder(shape())),
        tmp_path / "ours",
        tokenizer_from=tiny_tokenizer_folder,
        pooling=pooling,
        normalize=normalize,
        prompts={"query": "find: ", "document": ""},
        max_tokens=100,
    )
    theirs, ours = sentence_transformer(folder), Embedder(folder, dtype="float32")
    assert theirs.max_seq_length == ours.max_tokens == 100
    assert theirs.prompts == ours.prompts
    for options in ({}, {"prompt_name": "query"}):
        expected = theirs.encode(TEXTS, **options)
        np.testing.assert_allclose(ours.encode(TEXTS, **options), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("pooling", ["mean", None])
@pytest.mark.parametrize("max_tokens", [1000, None])
def test_a_folder_reads_as_long_texts_as_it_was_told(
    tmp_path: Path, tiny_tokenizer_folder: Path, pooling: str | None, max_tokens: int | None
) -> None:
    """Its tokenizer was made for a model of 512."""
    encoder = randomise(Encoder(shape(max_tokens=2048)))
    options = {"tokenizer_from": tiny_tokenizer_folder, "pooling": pooling, "max_tokens": max_tokens}
    folder = save_folder(encoder, tmp_path / "m", **options)
    assert read_folder(folder).max_tokens == sentence_transformer(folder).max_seq_length == (max_tokens or 2048)
    copied = json.loads((folder / "tokenizer_config.json").read_text())
    original = json.loads((tiny_tokenizer_folder / "tokenizer_config.json").read_text())
    assert copied == original | {"model_max_length": max_tokens or 2048}


def test_what_a_folder_says_of_sentences_goes_on(tmp_path: Path, tiny_tokenizer_folder: Path) -> None:
    """As another folder is made of one: with int8 weights, after tuning, at random weights."""
    told = {"pooling": "cls", "normalize": True, "prompts": {"query": "find: "}, "default_prompt_name": "query"}
    told |= {"include_prompt": False, "max_tokens": 77, "truncate_dim": 16, "similarity_fn_name": "dot"}
    first = save_folder(randomise(Encoder(shape())), tmp_path / "a", tokenizer_from=tiny_tokenizer_folder, **told)
    options = read_folder(first).sentence_options()
    assert options == told | {"dense": ()}
    second = save_folder(load_encoder(read_folder(first)), tmp_path / "b", tokenizer_from=first, **options)
    assert read_folder(second).sentence_options() == options
    np.testing.assert_array_equal(Embedder(second).encode(TEXTS), Embedder(first).encode(TEXTS))


@pytest.mark.parametrize(
    "pooling, include_prompt",
    [
        ("mean", True),
        ("cls", True),
        ("lasttoken", True),
        ("weightedmean", True),
        ("mean", False),
        ("cls", False),
        ("lasttoken", False),
        ("weightedmean", False),
    ],
)
def test_saved_by_sentence_transformers_loads_here(
    tmp_path: Path, tiny_tokenizer_folder: Path, pooling: str, include_prompt: bool
) -> None:
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    from sentence_transformers import SentenceTransformer

    hugging_face("ModernBertModel", shape()).save_pretrained(tmp_path / "hf")
    shutil.copytree(tiny_tokenizer_folder, tmp_path / "hf", dirs_exist_ok=True)
    theirs = SentenceTransformer(
        modules=[
            modules.Transformer(str(tmp_path / "hf")),
            modules.Pooling(64, pooling, include_prompt=include_prompt),
            modules.Normalize(),
        ],
        prompts={"query": "find this: "},
        default_prompt_name="query",
        truncate_dim=48,
        device="cpu",
    )
    theirs.save(str(tmp_path / "st"))
    ours = Embedder(tmp_path / "st", dtype="float32")
    assert ours.folder.include_prompt == include_prompt
    assert ours.default_prompt_name == "query"
    for options in ({}, {"prompt": "another one: "}, {"prompt": ""}):
        expected = theirs.encode(TEXTS, truncate_dim=48, **options)
        got = ours.encode(TEXTS, truncate_dim=48, **options)
        assert got.shape == (len(TEXTS), 48)
        # sentence-transformers truncates after its Normalize module; here what is handed out has unit length.
        np.testing.assert_allclose(got, unit(expected), rtol=0, atol=TOLERANCE)


def test_dtype_of_a_saved_folder(tmp_path: Path) -> None:
    encoder = randomise(Encoder(shape()))
    save_folder(encoder, tmp_path / "half", dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = load_encoder(read_folder(tmp_path / "half"))
    for key, value in encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[key].float(), value.bfloat16().float())


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = save_folder(randomise(Encoder(shape())), tmp_path / "m", pooling="cls")
    (folder / "stale").write_text("x")
    save_folder(randomise(Encoder(shape(num_layers=2))), folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_a_save_that_fails_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = save_folder(randomise(Encoder(shape())), tmp_path / "m")
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(KeyError):
        save_folder(randomise(Encoder(shape(num_layers=2))), folder, pooling="no such mode")
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def other_width(folder: Path) -> None:
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf | {"intermediate_size": 128}))


def fewer_layers(folder: Path) -> None:
    hf = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 4}
    hf["layer_types"] = hf["layer_types"][:4]
    (folder / "config.json").write_text(json.dumps(hf))


def without_a_norm(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["final_norm.weight"]
    save_file(tensors, folder / "model.safetensors")


def cut_short(folder: Path) -> None:
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[: len(raw) // 2])


def noise(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x00not safetensors at all")


@pytest.mark.parametrize(
    "spoil, said",
    [
        (other_width, "has shape .* config.json wants"),
        (fewer_layers, "the weights have 'layers.4"),
        (without_a_norm, "the weights lack 'final_norm.weight' .1 missing"),
        (cut_short, "cannot be read as safetensors"),
        (noise, "cannot be read as safetensors"),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path: Path, spoil: Any, said: str) -> None:
    folder = save_folder(randomise(Encoder(shape())), tmp_path / "m")
    spoil(folder)
    with pytest.raises(InputError, match=said) as caught:
        load_encoder(read_folder(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_an_unknown_head_is_refused(tmp_path: Path) -> None:
    folder = save_folder(randomise(Encoder(shape())), tmp_path / "m")
    with pytest.raises(InputError, match="architecture 'ModernBertForQuestionAnswering' is not implemented"):
        load_model(read_folder(folder), "ModernBertForQuestionAnswering")
    with pytest.raises(InputError, match="the weights lack"):
        load_model(read_folder(folder), "ModernBertForMaskedLM")
