"""The bundled model's making: words that move to another vocabulary, a wider model that still says the same, pairs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer

from corpus.pairs import Pairs, write_units
from model import Embedder
from model.batch import pack
from model.config import EncoderConfig
from model.encoder import Encoder, init_weights
from model.pooling import normalize
from models.finish import average, whiten
from models.make_small import make_tokenizer, moved_embedding, save, soft_contrast, tune, widen, word_table

SHAPE = EncoderConfig(vocab_size=400, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, max_tokens=512)


def encoder_of(config: EncoderConfig) -> Encoder:
    encoder = Encoder(config)
    init_weights(encoder, config, torch.Generator().manual_seed(0))
    return encoder


@pytest.fixture(scope="module")
def sections(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every section is about three words of its own, so that a sentence tells which one it comes from."""
    rng = np.random.default_rng(0)
    syllables = ["fo", "da", "ni", "clu", "ve", "wi", "cra", "to", "la", "qui", "de", "tre"]
    rows = []
    for i in range(60):
        own = ["".join(rng.choice(syllables, 3)) for _ in range(3)]
        text = " ".join(f"The {' '.join(rng.choice(own, 6))}." for _ in range(6))
        rows.append({"source": "git-doc", "document": f"page {i}", "title": own[0], "heading": " ".join(own[:2])})
        rows[-1] |= {"text": text, "split": "train"}
    file = tmp_path_factory.mktemp("sections") / "sections.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


@pytest.fixture(scope="module")
def units(sections: Path, tiny_tokenizer_folder: Path) -> str:
    write_units(str(sections), str(tiny_tokenizer_folder), str(sections.parent / "units.npz"))
    return str(sections.parent / "units.npz")


def test_a_word_has_one_token_in_any_case(sections: Path, tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    make_tokenizer(str(sections), str(tiny_tokenizer_folder), str(tmp_path / "tokenizer"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    assert tokenizer.encode("The the").ids[1:-1] == tokenizer.encode("th\u00e9 THE").ids[1:-1]
    assert tokenizer.encode("the").tokens == ["[CLS]", "\u0120the", "[SEP]"]
    before = Tokenizer.from_file(str(tiny_tokenizer_folder / "tokenizer.json"))
    old = torch.randn(before.get_vocab_size(), 8)
    moved = moved_embedding(old, before, tokenizer)
    pieces = old[before.encode(" the", add_special_tokens=False).ids].mean(0)
    cosine = torch.cosine_similarity(moved[tokenizer.token_to_id("\u0120the")], pieces, dim=0)
    assert cosine > 0.6
    assert torch.equal(moved[2], old[2])


def test_a_wider_model_says_nearly_the_same() -> None:
    small = encoder_of(SHAPE)
    with torch.no_grad():
        small.embeddings.tok_embeddings.weight.normal_(generator=torch.Generator().manual_seed(1))
    words = torch.randn(400, 16, generator=torch.Generator().manual_seed(2))
    wide = widen(small, words)
    assert wide.config == replace(SHAPE, hidden_size=48, num_heads=3)
    batch = pack([np.arange(5, 60), np.arange(100, 130)])
    with torch.no_grad():
        before, after = small(batch), wide(batch)
    assert torch.cosine_similarity(before, after[:, :32], dim=1).min() > 0.9
    # The new dimensions are the words' own: nothing is written there yet.
    alone = torch.cosine_similarity(after[:, 32:], words[batch.tokens_T], dim=1)
    assert alone.min() > 0.9


def test_words_are_learned_as_bags(units: str, tiny_tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = word_table(Pairs(units, str(tiny_tokenizer_folder)), 400, steps=1)
    assert table.shape == (400, 128)
    assert '"step": 1' in capsys.readouterr().out


def test_a_teacher_pulls_towards_what_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    passages = normalize(torch.randn(12, 24, generator=generator))
    taught = normalize(torch.randn(12, 24, generator=generator)) @ passages.T
    questions = torch.randn(12, 24, generator=generator, requires_grad=True)
    losses = []
    for _ in range(400):
        loss = soft_contrast(normalize(questions), passages, taught)
        losses.append(float(loss.detach()))
        (gradient,) = torch.autograd.grad(loss, questions)
        with torch.no_grad():
            questions -= gradient
    assert losses[0] > 1
    assert 0 <= losses[-1] < 0.05


def test_a_tuning_that_was_cut_in_two_ends_the_same(units: str, tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = str(tiny_tokenizer_folder)
    save(encoder_of(SHAPE), str(tmp_path / "start"), tokenizer)
    settings = {"size": 8, "bag_steps": 1, "save_every": 2}
    paths = (str(tmp_path / "start"), tokenizer, units)
    tune(*paths, str(tmp_path / "whole"), steps=4, **settings)
    tune(*paths, str(tmp_path / "parts"), steps=4, stop_after=2, **settings)
    assert not (tmp_path / "parts").exists()
    tune(*paths, str(tmp_path / "parts"), steps=4, **settings)
    whole, parts = (Embedder(tmp_path / name).encoder.state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    begin = Embedder(tmp_path / "start").encoder.state_dict()
    assert not torch.equal(whole["layers.1.mlp.Wo.weight"].float(), begin["layers.1.mlp.Wo.weight"].float())


def test_a_tuning_goes_through_a_dense_module_and_leaves_it(
    units: str, tiny_tokenizer_folder: Path, tmp_path: Path
) -> None:
    tokenizer = str(tiny_tokenizer_folder)
    save(encoder_of(SHAPE), str(tmp_path / "plain"), tokenizer)
    whiten(str(tmp_path / "plain"), tokenizer, units, str(tmp_path / "white"))
    plain, white = (Embedder(tmp_path / name, dtype="float32") for name in ("plain", "white"))
    texts = ["the foda", "some words of no kind", "quila detre", "ni ni ni"]
    before, after = plain.encode(texts), white.encode(texts)
    assert abs(before @ before.T - after @ after.T).max() > 0.01
    tune(str(tmp_path / "white"), tokenizer, units, str(tmp_path / "tuned"), steps=2, size=8, bag_steps=1)
    tuned = Embedder(tmp_path / "tuned", dtype="float32")
    assert torch.equal(tuned.dense[0].linear.weight, white.dense[0].linear.weight)
    assert not torch.equal(tuned.encoder.layers[0].mlp.Wo.weight, white.encoder.layers[0].mlp.Wo.weight)


def test_an_average_lies_between(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    encoders = [encoder_of(SHAPE), encoder_of(SHAPE)]
    with torch.no_grad():
        encoders[1].layers[0].mlp.Wo.weight.add_(1.0)
    for name, encoder in zip(("one", "other"), encoders, strict=True):
        save(encoder, str(tmp_path / name), str(tiny_tokenizer_folder))
    average(*(str(tmp_path / name) for name in ("one", "other", "mean")))
    mean = Embedder(tmp_path / "mean", dtype="float32").encoder.state_dict()
    for name, tensor in encoders[0].state_dict().items():
        torch.testing.assert_close(mean[name], tensor + 0.5 * (name == "layers.0.mlp.Wo.weight"), atol=1e-3, rtol=1e-3)
