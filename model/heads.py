"""What stands on an encoder: masked-token prediction, sequence and token classification, with Hugging Face's
parameter names.

Shape suffixes: T tokens, M selected tokens, S sequences, D width, V vocabulary, L labels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.batch import PackedBatch
from model.config import EncoderConfig
from model.encoder import Encoder, LayerNorm, Linear
from model.pooling import encode_pooled


class PredictionHead(nn.Module):
    """Dense, GELU, norm; shared by all heads."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=config.classifier_bias)
        self.norm = LayerNorm(config)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        hidden = F.gelu(self.dense(x.to(dtype)))
        return self.norm(hidden.to(torch.promote_types(hidden.dtype, torch.float32))).to(dtype)


class Headed(nn.Module):
    """An encoder with a head: what the classes below have in common."""

    model: Encoder

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.model = encoder
        self.head = PredictionHead(encoder.config)

    @property
    def dtype(self) -> torch.dtype:
        """What the head computes in: as the encoder does."""
        return self.model.dtype


class MaskedLanguageModel(Headed):
    """Encoder and masked-token decoder (`ModernBertForMaskedLM`)."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder)
        config = encoder.config
        self.decoder = Linear(config.hidden_size, config.vocab_size, bias=config.decoder_bias)
        if config.tie_word_embeddings:
            self.decoder.weight = encoder.embeddings.tok_embeddings.weight

    def forward(self, batch: PackedBatch, select_M: Tensor | None = None) -> Tensor:
        """Logits over the vocabulary in the compute dtype.

        Args:
            select_M: indices of the packed tokens to predict; None predicts all. Only these pass the head and the
                decoder, which at 30 % masking saves most of the largest product of the model, and most of the last
                layer.

        Returns:
            (M, V), or (T, V) without a selection.
        """
        return self.decoder(self.head(self.model(batch, select_M=select_M), self.dtype))


class SequenceClassifier(Headed):
    """Encoder, pooling (`classifier_pooling`), head, classifier (`ModernBertForSequenceClassification`)."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder)
        self.classifier = Linear(encoder.config.hidden_size, encoder.config.num_labels)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Logits (S, L)."""
        pooled_SD = encode_pooled(self.model, batch, self.model.config.classifier_pooling)
        return self.classifier(self.head(pooled_SD, self.dtype))


class TokenClassifier(Headed):
    """Encoder, head, classifier for every token (`ModernBertForTokenClassification`)."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder)
        self.classifier = Linear(encoder.config.hidden_size, encoder.config.num_labels)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Logits (T, L)."""
        return self.classifier(self.head(self.model(batch), self.dtype))


HEADS: dict[str, type[Headed] | None] = {
    "ModernBertModel": None,
    "ModernBertForMaskedLM": MaskedLanguageModel,
    "ModernBertForSequenceClassification": SequenceClassifier,
    "ModernBertForTokenClassification": TokenClassifier,
}
"""Hugging Face's name of an architecture, as `config.json` states it, and the class here; None is the bare encoder."""
