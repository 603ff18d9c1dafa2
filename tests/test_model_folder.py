"""What a model folder says of itself, in every spelling, and one line for each way in which it can be wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.config import EncoderConfig
from model.errors import InputError
from model.folder import check_tokenizer, load_tokenizer, read_folder, tokenizer_hash, weights_hash

FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
}


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


def rewrite(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    value = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def test_a_sentence_transformers_folder(folder: Path) -> None:
    rewrite(folder / "config_sentence_transformers.json", default_prompt_name="query", truncate_dim=24)
    said = read_folder(folder)
    assert said.path == folder
    assert said.config.hidden_size == 64
    assert said.architecture == "ModernBertModel"
    assert (said.pooling, said.normalize, said.include_prompt) == ("mean", True, True)
    assert said.prompts == {"query": "query: ", "document": ""}
    assert said.default_prompt_name == "query"
    assert (said.max_tokens, said.truncate_dim, said.dim) == (512, 24, 24)
    assert said.weight_files == (folder / "model.safetensors",)


def test_a_plain_hugging_face_folder_is_a_mean_not_normalised(folder: Path) -> None:
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        (folder / name).unlink()
    said = read_folder(str(folder))
    assert (said.pooling, said.normalize, said.prompts, said.dim) == ("mean", False, {}, 64)


@pytest.mark.parametrize("flag", FLAGS)
def test_pooling_as_flags(folder: Path, flag: str) -> None:
    flags = {name: name == flag for name in FLAGS}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **flags}))
    assert read_folder(folder).pooling == FLAGS[flag]


@pytest.mark.parametrize(
    "mode, expected",
    [
        ("mean", "mean"),
        ("cls", "cls"),
        ("lasttoken", "last"),
        ("weightedmean", "weighted_mean"),
        (["cls"], "cls"),
    ],
)
def test_pooling_by_name(folder: Path, mode: Any, expected: str) -> None:
    options = {"embedding_dimension": 64, "pooling_mode": mode, "include_prompt": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(options))
    said = read_folder(folder)
    assert (said.pooling, said.include_prompt) == (expected, False)


def test_the_transformer_may_lie_in_a_folder_of_its_own(folder: Path) -> None:
    inner = folder / "0_Transformer"
    inner.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).rename(inner / name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    said = read_folder(folder)
    assert said.path == inner
    assert (said.normalize, said.prompts["query"]) == (True, "query: ")


@pytest.mark.parametrize(
    "stated, tokenizer, theirs, ours",
    [
        (400, 77, 400, 400),  # a stated limit, whatever the tokenizer's
        (77, 400, 77, 77),
        (None, 77, 77, 77),
        (None, 1000, 512, 512),  # the configuration's
        (1000, 77, 1000, 512),  # never beyond it, where sentence-transformers goes on
    ],
)
def test_which_limit_counts(folder: Path, stated: int | None, tokenizer: int, theirs: int, ours: int) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    rewrite(folder / "sentence_bert_config.json", max_seq_length=stated)
    rewrite(folder / "tokenizer_config.json", model_max_length=tokenizer)
    assert read_folder(folder).max_tokens == ours
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    assert model.max_seq_length == theirs


def test_how_vectors_are_compared(folder: Path) -> None:
    assert read_folder(folder).similarity_fn_name == "cosine"
    rewrite(folder / "config_sentence_transformers.json", similarity_fn_name="dot")
    assert read_folder(folder).similarity_fn_name == "dot"
    rewrite(folder / "config_sentence_transformers.json", similarity_fn_name=None)
    assert read_folder(folder).similarity_fn_name == "cosine"


def test_a_tokenizer_without_a_limit(folder: Path) -> None:
    """transformers writes 1e30 for 'none'."""
    rewrite(folder / "tokenizer_config.json", model_max_length=1000000000000000019884624838656)
    rewrite(folder / "sentence_bert_config.json", max_seq_length=None)
    assert read_folder(folder).max_tokens == 512


def shards(folder: Path, *names: str) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    weight_map = {f"tensor{i}": name for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def pooling(**options: Any) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / "1_Pooling" / "config.json", **options)


def module(kind: str, place: int = 2, weights: bool = True, **options: Any) -> Callable[[Path], None]:
    """One more module, by default between Pooling and Normalize."""

    def spoil(folder: Path) -> None:
        modules = json.loads((folder / "modules.json").read_text())
        modules.insert(place, {"name": kind, "path": f"9_{kind}", "type": f"sentence_transformers.models.{kind}"})
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / f"9_{kind}").mkdir()
        said = {"in_features": 64, "out_features": 8, "activation_function": "torch.nn.modules.linear.Identity"}
        (folder / f"9_{kind}" / "config.json").write_text(json.dumps(said | options))
        if weights:
            (folder / f"9_{kind}" / "model.safetensors").write_bytes(b"")

    return spoil


def write(name: str, text: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_text(text)

    return spoil


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (remove("config.json"), "holds no model: config.json is missing"),
    "another architecture": (lambda f: rewrite(f / "config.json", model_type="bert"), "model_type 'bert'"),
    "broken config": (write("config.json", "{"), "cannot be read as JSON"),
    "config is no object": (write("config.json", "[]"), "config.json holds a JSON list, expected a dict"),
    "modules are no list": (write("modules.json", "{}"), "modules.json holds a JSON dict, expected a list"),
    "broken modules": (write("modules.json", "oh"), "modules.json cannot be read as JSON"),
    "no weights": (remove("model.safetensors"), "has no weights: model.safetensors is missing; convert"),
    "pickle only": (pickled, "pickled weights are not read; convert the model to safetensors"),
    "shard outside": (lambda f: shards(f, "../elsewhere.safetensors"), "names a file outside the folder"),
    "absolute shard": (lambda f: shards(f, "/etc/x.safetensors"), "names a file outside the folder"),
    "pickled shard": (lambda f: shards(f, "model.bin"), "of another kind; only"),
    "missing shard": (lambda f: shards(f, "model-00002-of-00002.safetensors"), "is named by .* and missing"),
    "max pooling": (pooling(pooling_mode_mean_tokens=False, pooling_mode_max_tokens=True), "pooling max is not"),
    "two poolings": (pooling(pooling_mode_cls_token=True), r"pooling cls\+mean is not supported"),
    "unknown pooling": (pooling(pooling_mode="attention"), "pooling attention is not supported"),
    "another module": (module("LSTM"), "has a LSTM module; supported are Transformer, Pooling, Dense, Normalize"),
    "dense after all": (module("Dense", 3), "a Dense module elsewhere than between Pooling and Normalize"),
    "dense before pooling": (module("Dense", 1), "a Dense module elsewhere than between Pooling and Normalize"),
    "dense of another width": (module("Dense", in_features=65), "takes vectors of 65 dimensions, and 64 come from"),
    "dense without sizes": (module("Dense", out_features=None), "must say in_features and out_features"),
    "unknown activation": (
        module("Dense", activation_function="torch.nn.modules.activation.Softsign"),
        "activation Softsign is not supported; known are Identity, Tanh, ReLU, GELU",
    ),
    "dense residual": (module("Dense", use_residual=True), "from vector to vector, without a residual"),
    "dense of tokens": (module("Dense", module_input_name="token_embeddings"), "from vector to vector"),
    "dense without weights": (module("Dense", weights=False), "has no weights: model.safetensors is missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_folder_is_refused_in_one_line(folder: Path, case: str) -> None:
    spoil, said = BAD[case]
    spoil(folder)
    with pytest.raises(InputError, match=said) as caught:
        read_folder(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "nothing-of-the-kind", "a/b/c"])
def test_a_missing_folder(name: str) -> None:
    with pytest.raises(InputError, match="no model folder at"):
        read_folder(name)


def test_a_hub_id_that_is_not_there() -> None:
    """The tests are offline, so the answer comes from the local cache."""
    with pytest.raises(InputError, match="nor on the hub") as caught:
        read_folder("nobody-at-all/no-such-model")
    assert "\n" not in str(caught.value)


def test_tokenizer_neither_pads_nor_truncates(folder: Path) -> None:
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    spec["padding"] = {
        "strategy": {"Fixed": 16},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
    }
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("one two three four").ids
    assert (ids[0], ids[-1]) == (2, 3)
    assert len(ids) > 4
    assert len(tokenizer.encode("").ids) == 2


@pytest.mark.parametrize(
    "spoil, said",
    [
        (remove("tokenizer.json"), "has no tokenizer.json"),
        (write("tokenizer.json", "{}"), "tokenizer.json cannot be read"),
    ],
    ids=["missing", "broken"],
)
def test_a_bad_tokenizer(folder: Path, spoil: Callable[[Path], None], said: str) -> None:
    spoil(folder)
    with pytest.raises(InputError, match=said) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_does_not_fit(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    size = tokenizer.get_vocab_size()
    check_tokenizer(tokenizer, EncoderConfig(vocab_size=size, pad_id=0, cls_id=2, sep_id=3), folder)
    with pytest.raises(InputError, match=f"ids up to {size - 1}, the weights have {size - 1} rows"):
        check_tokenizer(tokenizer, EncoderConfig(vocab_size=size - 1, pad_id=0, cls_id=2, sep_id=3), folder)


def test_hashes_follow_what_decides_a_vector(folder: Path) -> None:
    weights, tokenizer = weights_hash(folder), tokenizer_hash(folder)
    assert (len(weights), len(tokenizer)) == (32, 32)
    rewrite(folder / "config.json", transformers_version="9.9.9")
    rewrite(folder / "config_sentence_transformers.json", prompts={})
    assert weights_hash(folder) == weights
    rewrite(folder / "config.json", local_attention=64)
    assert weights_hash(folder) != weights
    rewrite(folder / "config.json", local_attention=128)
    assert weights_hash(folder) == weights
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    assert weights_hash(folder) != weights
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n")
    assert tokenizer_hash(folder) != tokenizer
