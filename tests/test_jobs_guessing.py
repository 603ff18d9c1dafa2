"""Guessing: the sums are the training's own, classes tile all tokens, and nothing is measured on the wrong shards."""

from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.guessing import EDGES, cut, measure_guessing
from model.batch import PackedBatch
from model.config import EncoderConfig
from model.encoder import Encoder, init_weights
from model.errors import InputError
from model.folder import read_folder
from model.heads import MaskedLanguageModel
from model.losses import Pretraining
from model.weights import load_model, save_folder
from pipeline.masking import MaskingConfig
from pipeline.shards import TokenShards
from pipeline.stream import StreamConfig, TokenStream


@pytest.fixture(scope="module")
def folder(text_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights with a masked-token head, for the tokenizer of the shards."""
    manifest = TokenShards.open(str(text_shards)).manifest
    config = EncoderConfig(
        vocab_size=manifest.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=2,
        max_tokens=1_024,
        pad_id=manifest.pad_id,
        cls_id=manifest.cls_id,
        sep_id=manifest.sep_id,
        initializer_range=0.1,
    )
    model = MaskedLanguageModel(Encoder(config))
    init_weights(model, config, torch.Generator().manual_seed(0))
    place = tmp_path_factory.mktemp("guessing") / "model"
    return save_folder(model, place, tokenizer_from=text_shards / "tokenizer")


def test_the_sums_are_those_of_training(folder: Path, text_shards: Path) -> None:
    measured, fingerprint = measure_guessing("text", str(folder), str(text_shards), dtype="float32")
    shards = TokenShards.open(str(text_shards))
    assert fingerprint == shards.manifest.fingerprint
    model = load_model(read_folder(folder), dtype=torch.float32)
    assert isinstance(model, MaskedLanguageModel)
    training = Pretraining(model.float())
    sums, count = torch.zeros(5, dtype=torch.float64), 0
    config = StreamConfig(max_tokens=1_024, tokens_per_bin=16_384, masking=MaskingConfig(evaluation_rate=0.3))
    with torch.no_grad():
        for item in TokenStream(shards, config).evaluation():
            tokens, offsets, masked, targets, ordering = (
                torch.from_numpy(a)
                for a in (item.tokens_T, item.cu_seqlens, item.masked_M, item.targets_M, item.ordering_S)
            )
            sums += training(PackedBatch(tokens, offsets, item.max_seqlen), masked, targets, ordering)[1]
            count += len(masked)
    everything = {m.metric: float(m.statistic(np.arange(m.num_items)[None])[0]) for m in measured}
    assert everything["loss"] == pytest.approx(float(sums[0]) / count, rel=1e-5)
    assert everything["accuracy"] == pytest.approx(float(sums[2]) / count, abs=1e-6)
    assert measured[0].num_items == 12  # documents, not tokens
    assert {m.system for m in measured} == {"masked"}
    assert "loss position 0-127" in everything
    assert "accuracy length 512-1023" in everything


def test_classes_tile_the_tokens() -> None:
    values = np.array([0, 127, 128, 5_000, 600])
    found = cut(values)
    assert [label for label, _ in found] == ["0-127", "128-511", "512-1023", "4096+"]
    assert np.sum([chosen for _, chosen in found], axis=0).tolist() == [1] * 5
    assert EDGES[0] == 0


def test_what_cannot_be_measured_is_refused(folder: Path, text_shards: Path, tiny_model_folder: Path) -> None:
    with pytest.raises(InputError, match=r"has no masked-token head \(ModernBertModel\)"):
        measure_guessing("text", str(tiny_model_folder), str(text_shards))
    with pytest.raises(InputError, match="holds no token shards"):
        measure_guessing("text", str(folder), str(tiny_model_folder))
    with pytest.raises(InputError, match="no held-out token was masked"):
        measure_guessing("text", str(folder), str(text_shards), rate=1e-9)
