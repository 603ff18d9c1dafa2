"""Dense modules after the pooling, against sentence-transformers; what is made of a folder keeps them; whitening."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SENTENCES

from model import Embedder
from model.batch import pack
from model.dense import ACTIVATIONS, Dense, load_dense
from model.encoder import Encoder
from model.errors import InputError
from model.folder import ACTIVATIONS as NAMES
from model.folder import read_folder, weights_hash
from model.gradcache import VectorModel
from model.weights import load_encoder, save_folder
from models.finish import whitening

TOLERANCE = 1e-5


def with_dense(folder: Path, out: Path, *layers: Dense, **changes: Any) -> Path:
    """A folder like another, with these modules."""
    said = read_folder(folder)
    options = said.sentence_options() | {"dense": layers} | changes
    return save_folder(load_encoder(said), out, tokenizer_from=folder, **options)


def random_dense(*sizes: int, **options: Any) -> Dense:
    torch.manual_seed(sum(sizes))
    return Dense(*sizes, **options)


LAYERS = {
    "identity": [random_dense(64, 64)],
    "wider, no bias": [random_dense(64, 96, bias=False)],
    "tanh": [random_dense(64, 24, activation="Tanh")],
    "two": [random_dense(64, 96, activation="GELU"), random_dense(96, 40, bias=False, activation="ReLU")],
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("normalize", [True, False])
def test_vectors_are_those_of_sentence_transformers(
    tiny_model_folder: Path, tmp_path: Path, name: str, normalize: bool
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = with_dense(tiny_model_folder, tmp_path / "m", *LAYERS[name], normalize=normalize)
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    ours = Embedder(folder, dtype="float32")
    for options in ({}, {"prompt_name": "query"}):
        got = ours.encode(SENTENCES, **options)
        assert got.shape == (len(SENTENCES), ours.dim) == (len(SENTENCES), LAYERS[name][-1].linear.out_features)
        np.testing.assert_allclose(got, theirs.encode(SENTENCES, **options), rtol=0, atol=TOLERANCE)


def test_a_folder_of_theirs_loads_here(tiny_model_folder: Path, tmp_path: Path) -> None:
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    from sentence_transformers import SentenceTransformer

    plain = SentenceTransformer(str(tiny_model_folder), device="cpu", local_files_only=True)
    torch.manual_seed(0)
    dense = modules.Dense(64, 32)  # tanh, where nothing is said
    theirs = SentenceTransformer(modules=[plain[0], plain[1], dense, modules.Normalize()], device="cpu")
    theirs.save(str(tmp_path / "st"))
    ours = Embedder(tmp_path / "st", dtype="float32")
    assert [layer.activation for layer in ours.folder.dense] == ["Tanh"]
    np.testing.assert_allclose(ours.encode(SENTENCES), theirs.encode(SENTENCES), rtol=0, atol=TOLERANCE)


def test_what_is_made_of_a_folder_keeps_its_modules(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = with_dense(tiny_model_folder, tmp_path / "a", *LAYERS["two"], truncate_dim=16)
    said = read_folder(folder)
    assert (said.width, said.dim) == (40, 16)
    again = save_folder(load_encoder(said), tmp_path / "b", tokenizer_from=folder, **said.sentence_options())
    np.testing.assert_array_equal(Embedder(again).encode(SENTENCES), Embedder(folder).encode(SENTENCES))
    assert weights_hash(again) == weights_hash(folder)
    half = with_dense(tiny_model_folder, tmp_path / "half", *LAYERS["two"], dtype=torch.float16)
    assert {module.linear.weight.dtype for module in load_dense(read_folder(half).dense, None)} == {torch.float16}
    assert Embedder(half, dtype="float32").encode(SENTENCES).dtype == np.float32


def test_the_hash_of_the_weights_covers_them(tiny_model_folder: Path, tmp_path: Path) -> None:
    dense = random_dense(64, 64)
    hashes = {weights_hash(tiny_model_folder), weights_hash(with_dense(tiny_model_folder, tmp_path / "a", dense))}
    with torch.no_grad():
        dense.linear.bias[3] += 1
    hashes.add(weights_hash(with_dense(tiny_model_folder, tmp_path / "b", dense)))
    config = tmp_path / "b" / "2_Dense" / "config.json"
    text = config.read_text()
    assert "torch.nn.modules.linear.Identity" in text
    config.write_text(text.replace("torch.nn.modules.linear.Identity", "torch.nn.modules.activation.Tanh"))
    hashes.add(weights_hash(tmp_path / "b"))
    assert len(hashes) == 4


def test_training_goes_through_them(tiny_model_folder: Path) -> None:
    """The vectors that are trained are those that are handed out, and the modules have gradients."""
    embedder, layers = Embedder(tiny_model_folder, dtype="float32"), LAYERS["two"]
    model = VectorModel(load_encoder(embedder.folder), dense=layers)
    sequences = [embedder.tokenizer.encode(text).ids for text in SENTENCES]
    batch = pack(sequences)
    ranges = batch.cu_seqlens.long()
    vectors = model(batch, ranges[:-1], ranges[1:])
    embedder.dense = torch.nn.Sequential(*layers)
    handed = embedder.finish(*embedder.embed_segments(batch, ranges[:-1].numpy(), ranges[1:].numpy()), normalize=False)
    np.testing.assert_allclose(vectors.detach().numpy(), handed, rtol=0, atol=TOLERANCE)
    assert model.width == vectors.shape[1] == 40
    vectors.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.dense.parameters())


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda f: f.write_bytes(b"nothing"), "cannot be read as safetensors"),
        (lambda f: shutil.copy(f.parent.parent / "model.safetensors", f), "does not fit its config.json"),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(
    tiny_model_folder: Path, tmp_path: Path, spoil: Any, said: str
) -> None:
    folder = with_dense(tiny_model_folder, tmp_path / "m", *LAYERS["tanh"])
    spoil(folder / "2_Dense" / "model.safetensors")
    with pytest.raises(InputError, match=said) as caught:
        Embedder(folder)
    assert "\n" not in str(caught.value)


def test_every_activation_has_its_module() -> None:
    assert tuple(ACTIVATIONS) == NAMES
    for name, kind in ACTIVATIONS.items():
        assert kind.__name__ == name


def test_modules_stand_where_sentence_transformers_looks(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = with_dense(tiny_model_folder, tmp_path / "m", *LAYERS["two"])
    modules = json.loads((folder / "modules.json").read_text())
    assert [m["path"] for m in modules] == ["", "1_Pooling", "2_Dense", "2_Dense1", "3_Normalize"]
    assert isinstance(load_encoder(read_folder(folder)), Encoder)


@pytest.mark.parametrize("power", [0.0, 0.3, 0.5])
def test_whitening_divides_by_a_power_of_the_covariance(power: float) -> None:
    torch.manual_seed(0)
    mixing = torch.randn(6, 6).double()
    vectors = torch.randn(500, 6).double() @ mixing
    weight = whitening(vectors, power).double()
    energy = (vectors @ weight).square().sum(dim=0)
    assert (energy.diff() <= 0).all()
    before, after = torch.linalg.eigvalsh(torch.cov(vectors.T)), torch.linalg.eigvalsh(torch.cov((vectors @ weight).T))
    ratio = (after.sort().values / before ** (1 - 2 * power)).log()
    assert (ratio - ratio.mean()).abs().max() < 0.02 + 0.2 * power
    assert (vectors @ weight).norm(dim=1).mean() == pytest.approx(1, rel=1e-5)
