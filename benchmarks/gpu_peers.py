"""Hugging Face beside us in `benchmarks/gpu.py`: the same weights, padded sequences, each of its ways to attend."""

import statistics
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import PackedBatch
from model.encoder import Encoder

WAYS = ("sdpa", "flash_attention_2", "eager", "compiled")


def hugging_face(
    encoder: Encoder,
    batch: PackedBatch,
    *,
    timed: Callable[[Callable[[], object]], list[float]],
    left_s: Callable[[], float],
) -> dict[str, Any]:
    """Real tokens a second of each way, and the smallest cosine of its token vectors to ours; or why there is none."""
    try:
        import transformers
    except ImportError:
        return {"skipped": "transformers is not installed"}
    device, dtype = batch.device, encoder.dtype
    lengths = [b - a for a, b in pairwise(batch.host_offsets())]
    with torch.inference_mode():
        ours = encoder(batch)
    ids, mask = padded(batch.tokens_T, lengths)
    rows: dict[str, Any] = {}
    for way in WAYS if device.type == "cuda" else ("sdpa", "eager"):
        if left_s() <= 0:
            rows[way] = {"skipped": "time"}
            continue
        try:
            attention = "sdpa" if way == "compiled" else way
            config = transformers.ModernBertConfig(**encoder.config.to_hf(), attn_implementation=attention)
            model = transformers.ModernBertModel(config).to(device)
            model.load_state_dict(encoder.state_dict())
            model = model.to(dtype).eval()
            run = torch.compile(model) if way == "compiled" else model
            with torch.inference_mode():
                hidden = run(input_ids=ids, attention_mask=mask).last_hidden_state
                seconds = timed(partial(run, input_ids=ids, attention_mask=mask))
            cosine = F.cosine_similarity(hidden[mask.bool()].float(), ours.float(), dim=-1).min()
            rows[way] = {
                "tokens_per_s": round(sum(lengths) / statistics.median(seconds), 1),
                "cosine_min": round(cosine.item(), 5),
            }
        except Exception as error:  # flash attention is rarely installed, compiling needs a compiler
            rows[way] = {"error": f"{type(error).__name__}: {error}"[:200]}
    return rows


def padded(tokens_T: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Ids and mask, (sequences, longest): padded([1, 2, 3], [2, 1]) is ([[1, 2], [3, 0]], [[1, 1], [1, 0]])."""
    place = torch.arange(max(lengths), device=tokens_T.device)
    mask = place[None] < torch.tensor(lengths, device=tokens_T.device)[:, None]
    ids = torch.zeros(mask.shape, dtype=tokens_T.dtype, device=tokens_T.device)
    ids[mask] = tokens_T
    return ids, mask.long()
