"""Losses of labels, numbers and tags: sums over chosen rows; and configurations that carry names."""

import pytest
import torch
import torch.nn.functional as F

from model.batch import pack
from model.config import EncoderConfig
from model.encoder import Encoder, init_weights
from model.heads import MaskedLanguageModel, SequenceClassifier, TokenClassifier
from model.supervised import Supervised, labelled, put_classifier

CONFIG = EncoderConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2)
BATCH = pack([[5, 6, 7], [8, 9], [1, 2, 3, 4]])


def make(kind: type[SequenceClassifier] | type[TokenClassifier], names: list[str]) -> Supervised:
    encoder = Encoder(CONFIG)
    generator = torch.Generator().manual_seed(0)
    init_weights(encoder, CONFIG, generator)
    model = put_classifier(kind, encoder, labelled(CONFIG, names, pooling="mean"), generator)
    return Supervised(model, regression=not names)


def test_labels() -> None:
    model = make(SequenceClassifier, ["a", "b", "c"])
    rows, targets = torch.tensor([0, 2]), torch.tensor([1, 2])
    loss, sums = model(BATCH, rows, targets, 0.5)
    logits = model.model(BATCH)[rows].detach()
    expected = F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(loss.detach(), expected / 2)
    assert float(sums[0]) == pytest.approx(float(expected))
    assert int(sums[1]) == int((logits.argmax(1) == targets).sum())


def test_numbers() -> None:
    model = make(SequenceClassifier, [])
    loss, sums = model(BATCH, torch.arange(3), torch.tensor([0.5, 1.0, -1.0]))
    expected = ((model.model(BATCH)[:, 0].detach() - torch.tensor([0.5, 1.0, -1.0])) ** 2).sum()
    torch.testing.assert_close(loss.detach(), expected)
    assert sums.tolist() == pytest.approx([float(expected), 0])


def test_tags_of_chosen_tokens() -> None:
    model = make(TokenClassifier, ["x", "y"])
    rows, targets = torch.tensor([1, 4, 8]), torch.tensor([0, 1, 1])
    loss, _ = model(BATCH, rows, targets)
    torch.testing.assert_close(loss, F.cross_entropy(model.model(BATCH)[rows], targets, reduction="sum"))


def test_nothing_to_learn_reaches_every_parameter() -> None:
    """A blank batch of one worker must not leave a gradient out that another has."""
    for kind, names in ((SequenceClassifier, ["a", "b"]), (TokenClassifier, ["a", "b"]), (SequenceClassifier, [])):
        model = make(kind, names)  # type: ignore[arg-type]
        nothing = torch.empty(0, dtype=torch.int64)
        loss, sums = model(BATCH, nothing, nothing)
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() == 0 for p in model.parameters())
        assert sums.tolist() == [0, 0]


def test_names_stand_in_the_configuration() -> None:
    hf = labelled(CONFIG, ["no", "yes"], pooling="mean").to_hf()
    assert hf["id2label"] == {"0": "no", "1": "yes"}
    assert hf["label2id"] == {"no": 0, "yes": 1}
    assert (hf["problem_type"], hf["classifier_pooling"]) == ("single_label_classification", "mean")
    again = labelled(EncoderConfig.from_hf(hf), [])
    assert (again.num_labels, again.to_hf()["problem_type"], again.classifier_pooling) == (1, "regression", "mean")


def test_a_trained_head_is_kept() -> None:
    trained = MaskedLanguageModel(Encoder(CONFIG))
    init_weights(trained, CONFIG, torch.Generator().manual_seed(5))
    config = labelled(CONFIG, ["a", "b"])
    model = put_classifier(SequenceClassifier, trained.model, config, torch.Generator().manual_seed(1), trained=trained)
    torch.testing.assert_close(model.head.dense.weight, trained.head.dense.weight)
    assert model.model.config.num_labels == 2
    assert model.classifier.weight.abs().max() > 0
