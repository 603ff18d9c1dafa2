"""What fine-tuning on labels minimises: classes or numbers of sequences, tags of tokens.

A loss is a sum over this batch times a weight that the caller chose, because the mean is one over a whole global batch.
Shape suffixes: M rows with a target, S sequences, T tokens, L labels.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.batch import PackedBatch
from model.config import EncoderConfig
from model.encoder import Encoder, init_weights
from model.heads import Headed, SequenceClassifier, TokenClassifier


class Supervised(nn.Module):
    """A model with a classifier that returns losses.

    Args:
        model: of sequences or of tokens; saved by itself at the end.
        regression: whether its single output is a number to come near to, instead of logits.
    """

    SUMS = ("loss", "correct")
    """What `forward` reports, summed over the batch; of numbers there is no correct one."""

    def __init__(self, model: SequenceClassifier | TokenClassifier, *, regression: bool = False) -> None:
        super().__init__()
        self.model, self.regression = model, regression

    @property
    def encoder(self) -> Encoder:
        return self.model.model

    def forward(
        self, batch: PackedBatch, rows_M: Tensor, targets_M: Tensor, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """The weighted loss, for a backward pass, and the two unweighted `SUMS`, without a gradient.

        Args:
            rows_M: int64, the sequences or tokens that have a target; may be empty.
            targets_M: int64 labels, or numbers.
            scale: what the summed loss is multiplied by.
        """
        logits = self.model(batch)
        logits_ML = logits[rows_M].to(torch.promote_types(logits.dtype, torch.float32))
        if self.regression:
            loss = F.mse_loss(logits_ML[:, 0], targets_M.to(logits_ML.dtype), reduction="sum")
            correct = loss.new_zeros(())
        else:
            loss = F.cross_entropy(logits_ML, targets_M, reduction="sum")
            correct = (logits_ML.argmax(dim=1) == targets_M).sum()
        return loss * scale, torch.stack([loss.detach(), correct]).double()


def labelled(
    config: EncoderConfig, names: Sequence[str], *, pooling: Literal["cls", "mean"] | None = None
) -> EncoderConfig:
    """A configuration with these labels as Hugging Face writes them; no name means one number (regression).

    Args:
        pooling: of sequences, "cls" or "mean"; None leaves the configuration's.
    """
    extra = {key: value for key, value in config.extra.items() if key not in ("id2label", "label2id", "problem_type")}
    shown = list(names) or ["value"]
    extra["id2label"] = {str(number): name for number, name in enumerate(shown)}
    extra["label2id"] = {name: number for number, name in enumerate(shown)}
    extra["problem_type"] = "single_label_classification" if names else "regression"
    return replace(config, num_labels=len(shown), classifier_pooling=pooling or config.classifier_pooling, extra=extra)


def put_classifier(
    kind: type[SequenceClassifier] | type[TokenClassifier],
    encoder: Encoder,
    config: EncoderConfig,
    generator: torch.Generator,
    *,
    trained: Headed | None = None,
) -> SequenceClassifier | TokenClassifier:
    """A new classifier on an encoder.

    Args:
        config: as `labelled` gives it; becomes the encoder's.
        trained: a model whose prediction head is taken instead of a random one.
    """
    encoder.config = config
    model = kind(encoder)
    init_weights(model.head, config, generator)
    init_weights(nn.ModuleDict({"classifier": model.classifier}), config, generator)
    if trained is not None:
        model.head.load_state_dict(trained.head.state_dict())
    return model
