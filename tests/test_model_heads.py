"""The heads against Hugging Face's classes with the same weights; selection of masked tokens; padded batches."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.batch import PackedBatch, pack, unpad
from model.config import EncoderConfig
from model.encoder import Encoder
from model.heads import HEADS, Headed, MaskedLanguageModel, SequenceClassifier, TokenClassifier

LENGTHS = (1, 2, 63, 64, 65, 129, 300)
TOLERANCE = 1e-5
"""On the largest difference of a logit, as a share of the logits' root mean square."""


def shape(**changes: Any) -> EncoderConfig:
    values: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 4,
        "num_heads": 2,
        "pad_id": 0,
        "cls_id": 1,
        "sep_id": 2,
        "num_labels": 5,
    }
    return EncoderConfig(**values | changes)


def random_model(kind: type[Headed], config: EncoderConfig) -> Headed:
    """Wide weights, so that attention is far from uniform, and norms and biases away from 1 and 0."""
    model = kind(Encoder(config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.15 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + ("norm" in name and name.endswith("weight")))
    return model.eval()


def random_batch(lengths: tuple[int, ...] = LENGTHS) -> PackedBatch:
    generator = np.random.default_rng(0)
    return pack([generator.integers(3, 300, length) for length in lengths])


def hugging_face(name: str, model: Headed) -> Any:
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, name)(transformers.ModernBertConfig(**model.model.config.to_hf()))
    theirs.load_state_dict(model.state_dict())
    return theirs.eval()


def assert_same_logits(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    worst = (ours - theirs).abs().max() / theirs.square().mean().sqrt()
    assert worst < TOLERANCE, worst


CASES = [
    ("ModernBertForMaskedLM", {}),
    ("ModernBertForMaskedLM", {"tie_word_embeddings": False, "decoder_bias": False}),
    ("ModernBertForMaskedLM", {"classifier_bias": True, "norm_bias": True}),
    ("ModernBertForSequenceClassification", {"classifier_pooling": "cls"}),
    ("ModernBertForSequenceClassification", {"classifier_pooling": "mean", "classifier_bias": True}),
    ("ModernBertForTokenClassification", {}),
]


@pytest.mark.parametrize("name, changes", CASES, ids=lambda x: str(x))
@torch.inference_mode()
def test_logits_are_hugging_faces(name: str, changes: dict[str, Any]) -> None:
    kind = HEADS[name]
    assert kind is not None
    model, batch = random_model(kind, shape(**changes)), random_batch()
    theirs = hugging_face(name, model)
    logits = [theirs(batch.tokens_T[None, a:b]).logits[0] for a, b in pairwise(batch.host_offsets())]
    assert_same_logits(model(batch), torch.stack(logits) if kind is SequenceClassifier else torch.cat(logits))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@torch.inference_mode()
def test_logits_of_a_padded_batch(pooling: str) -> None:
    model = random_model(SequenceClassifier, shape(classifier_pooling=pooling))
    ids = torch.randint(3, 300, (3, 150), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(150) < torch.tensor([[150], [1], [70]])).long()
    packed, _ = unpad(ids, mask)
    theirs = hugging_face("ModernBertForSequenceClassification", model)
    assert_same_logits(model(packed), theirs(ids, attention_mask=mask).logits)


def test_selected_tokens_have_the_logits_of_all() -> None:
    model, batch = random_model(MaskedLanguageModel, shape()).double(), random_batch()
    select = torch.tensor([3, 0, 400, 3])
    every, some = model(batch), model(batch, select)
    torch.testing.assert_close(some, every[select], rtol=0, atol=1e-12)
    assert model(batch, select[:0]).shape == (0, 300)


def test_selection_takes_the_same_gradient() -> None:
    model, batch = random_model(MaskedLanguageModel, shape()).double(), random_batch()
    select = torch.tensor([5, 90, 200])
    gradients = []
    for logits in (lambda: model(batch, select), lambda: model(batch)[select]):
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits(), torch.tensor([7, 8, 9])).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == dict(model.named_parameters()).keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("kind", [MaskedLanguageModel, SequenceClassifier, TokenClassifier])
def test_master_weights_stay_float32(kind: type[Headed]) -> None:
    model, batch = random_model(kind, shape()), random_batch()
    exact = model(batch)
    model.model.compute_dtype = torch.bfloat16
    logits = model(batch)
    assert logits.dtype == torch.bfloat16
    assert torch.cosine_similarity(logits.float().flatten(), exact.flatten(), dim=0) > 0.995
    logits.float().square().mean().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_tied_decoder_shares_memory() -> None:
    model = MaskedLanguageModel(Encoder(shape()))
    assert model.decoder.weight is model.model.embeddings.tok_embeddings.weight
    assert len(list(model.parameters())) == len(set(model.parameters()))
