"""How well a model guesses masked tokens of held-out text: loss and accuracy, by place in the document and by length.

The bins and masks are those that training evaluates on, the same every time. An item is a document: its tokens share
their subject, so an interval over tokens would be far too narrow.
"""

import numpy as np
import torch

from jobs.intervals import Measured, ratio_of
from model.batch import PackedBatch
from model.embedder import choose_device, choose_dtype
from model.errors import InputError
from model.folder import read_folder, tokenizer_hash
from model.heads import MaskedLanguageModel
from model.weights import load_model
from pipeline.masking import MaskingConfig
from pipeline.shards import HELD_OUT_SPLIT, TokenShards
from pipeline.storage import local_model
from pipeline.stream import Bin, StreamConfig, TokenStream

ARCHITECTURE = "ModernBertForMaskedLM"
EDGES = (0, 128, 512, 1_024, 2_048, 4_096)
"""Where classes of positions and of lengths begin, in tokens."""
ROWS = 1_024
"""Masked tokens whose logits are held at once: a vocabulary is wide."""


def measure_guessing(
    name: str,
    model: str,
    tokens: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    rate: float = 0.3,
    max_bins: int | None = None,
) -> tuple[list[Measured], str]:
    """Loss (nats) and accuracy of a model's masked-token head on the held-out share of token shards.

    Args:
        name: of the set.
        tokens: where `nightloom prepare` put the shards.
        rate: share of the tokens that is masked.
        max_bins: of 16,384 tokens or the model's `max_tokens`, whatever is more; None: all there are.

    Returns:
        What was measured: over all, by position of the token in its document, by length of its sequence; and the
        fingerprint of the shards.

    Raises:
        InputError: a model without a head, shards of another tokenizer, none held out.
    """
    path = local_model(model)
    folder = read_folder(path)
    if folder.architecture != ARCHITECTURE:
        raise InputError(f"{model} has no masked-token head ({folder.architecture}); leave masked out for this model")
    shards = TokenShards.open(tokens, tokenizer=tokenizer_hash(path))
    if not shards.manifest.num_tokens(HELD_OUT_SPLIT):
        raise InputError(f"{tokens} holds no held-out text; prepare it with heldout above 0")
    where = choose_device(device)
    options = {"device": where, "dtype": choose_dtype(dtype, where)[0]}
    head = load_model(folder, ARCHITECTURE, **options)
    assert isinstance(head, MaskedLanguageModel)
    head.float().to(where).eval()
    longest = folder.max_tokens
    config = StreamConfig(
        max_tokens=longest,
        tokens_per_bin=max(longest, 16_384),
        masking=MaskingConfig(evaluation_rate=rate),
    )
    parts = [guess(head, item) for item in TokenStream(shards, config).evaluation(max_bins=max_bins)]
    document_M, position_M, length_M, loss_M, correct_M = (np.concatenate(arrays) for arrays in zip(*parts))
    if not len(document_M):
        raise InputError(f"{tokens}: no held-out token was masked; prepare more text or raise the rate")
    _, item_M = np.unique(document_M, return_inverse=True)
    measured = []
    for what, values_M in (("loss", loss_M), ("accuracy", correct_M)):
        classes: list[tuple[str, np.ndarray]] = [(what, np.ones(len(item_M), dtype=bool))]
        classes += [(f"{what} position {label}", chosen) for label, chosen in cut(position_M)]
        classes += [(f"{what} length {label}", chosen) for label, chosen in cut(length_M)]
        for metric, chosen_M in classes:
            items, item_of = np.unique(item_M[chosen_M], return_inverse=True)
            sums_N = np.bincount(item_of, weights=values_M[chosen_M])
            measured.append(Measured(name, "masked", metric, len(items), ratio_of(sums_N, np.bincount(item_of))))
    return measured, shards.manifest.fingerprint


@torch.no_grad()
def guess(model: MaskedLanguageModel, item: Bin) -> tuple[np.ndarray, ...]:
    """For each masked token of a bin: key of its document, position in it, length of its sequence, loss, whether the
    likeliest token is the right one.
    """
    device = next(model.parameters()).device
    batch = PackedBatch(
        torch.from_numpy(item.tokens_T),
        torch.from_numpy(item.cu_seqlens),
        item.max_seqlen,
        tuple(item.cu_seqlens.tolist()),
    ).to(device)
    losses, hits = [np.empty(0)], [np.empty(0, dtype=bool)]
    masked_M, targets_M = (torch.from_numpy(array).to(device) for array in (item.masked_M, item.targets_M))
    hidden_MD = model.model(batch, select_M=masked_M)
    for start in range(0, len(masked_M), ROWS):
        targets = targets_M[start : start + ROWS]
        logits_RV = model.decoder(model.head(hidden_MD[start : start + ROWS], model.dtype)).float()
        losses.append(torch.nn.functional.cross_entropy(logits_RV, targets, reduction="none").cpu().numpy())
        hits.append((logits_RV.argmax(dim=1) == targets).cpu().numpy())
    sequence_T = np.repeat(np.arange(item.num_sequences), np.diff(item.cu_seqlens))
    sequence_M = sequence_T[item.masked_M]
    return (
        item.documents_S[sequence_M],
        item.positions_T[item.masked_M],
        np.diff(item.cu_seqlens)[sequence_M],
        np.concatenate(losses),
        np.concatenate(hits).astype(np.float64),
    )


def cut(values_M: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """The classes of EDGES that have values in them, with a label: ("0-127", mask), ("4096+", mask)."""
    found = []
    for low, high in zip(EDGES, [*EDGES[1:], None]):
        chosen = (values_M >= low) & (values_M < (high if high is not None else np.inf))
        if chosen.any():
            found.append((f"{low}-{high - 1}" if high is not None else f"{low}+", chosen))
    return found
