"""Train a small encoder to give the vectors of a larger one: the first step of the chain towards fine-tuning.

Passages with their teacher's vectors come as Parquet (columns `text`, `vector`). The teacher's space is rotated so
that its leading dimensions hold most of it, and cut to the student's width: a dot product of two students then stands
for one of two teachers. Batches are packed, and a pure function of (seed, step); a run that was killed goes on from
its last checkpoint.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from jobs.configuration import Settings
from model.batch import PackedBatch, pack
from model.config import EncoderConfig
from model.encoder import Encoder, init_weights
from model.errors import InputError
from model.folder import load_tokenizer
from model.pooling import normalize, pool_segments
from model.weights import save_folder


class DistillConfiguration(Settings):
    """Everything that decides a distilled model."""

    teacher: str
    """Folder of Parquet files with columns `text` and `vector` (fixed-size list, unit length)."""
    tokenizer: str
    """Folder with tokenizer.json and its companions; its special tokens are [PAD], [UNK], [CLS], [SEP], [MASK]."""
    output: str
    """Model folder to write; checkpoints go beside it, with the ending .checkpoint.pt."""
    token_vectors: str | None = None
    """.npy file (vocabulary, teacher's width): the teacher's vector of every token's text, where embeddings start."""
    hidden_size: int = 256
    intermediate_size: int = 384
    num_layers: int = 6
    num_heads: int = 4
    max_tokens: int = 8192
    steps: int = 1200
    tokens_per_batch: int = 16_384
    """Tokens of an optimizer step."""
    long_share: float = 0.25
    """Share of the tokens that come in long sequences of many passages, each passage pooled by itself: so that
    positions beyond
    a passage are trained, and a chunk's vector stands for the chunk whatever surrounds it."""
    long_tokens: int = 3072
    """Longest of these sequences."""
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    """Share of the steps with a rising rate."""
    decay: float = 0.4
    """Share of the steps, at the end, with a rate falling as 1 - sqrt."""
    dtype: str = "bfloat16"
    seed: int = 0
    checkpoint_every: int = 100
    prompts: dict[str, str] = Field(default_factory=dict)


class Passages:
    """Tokenized passages and their targets, all in memory.

    Args:
        rotation: (teacher's width, student's width).
    """

    def __init__(self, files: Sequence[Path], tokenizer_folder: str, dim: int) -> None:
        tokenizer = load_tokenizer(tokenizer_folder)
        self.ids: list[np.ndarray] = []
        targets = []
        for file in files:
            table = pq.read_table(file, columns=["text", "vector"])
            encoded = tokenizer.encode_batch_fast(table["text"].to_pylist(), add_special_tokens=False)
            self.ids += [np.asarray(e.ids, dtype=np.int32) for e in encoded]
            vectors = table["vector"].combine_chunks()
            targets.append(vectors.values.to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(vectors), -1))
        teacher = np.concatenate(targets)
        # Uncentred: dot products, not variances, are what must survive the cut.
        _, vectors = np.linalg.eigh(teacher.T @ teacher)
        self.rotation = np.ascontiguousarray(vectors[:, ::-1][:, :dim])
        self.kept = float(np.square(teacher @ self.rotation).sum(1).mean())
        self.targets = torch.from_numpy(teacher @ self.rotation)
        self.lengths = np.array([len(i) for i in self.ids])
        self.usable = np.flatnonzero(self.lengths > 0)
        vocab = tokenizer.get_vocab()
        self.cls_id, self.sep_id, self.pad_id = vocab["[CLS]"], vocab["[SEP]"], vocab["[PAD]"]
        self.vocab_size = tokenizer.get_vocab_size()


def batches(
    passages: Passages, config: DistillConfiguration, first: int
) -> Iterator[tuple[PackedBatch, Tensor, Tensor, Tensor]]:
    """From step `first` on: (batch, range starts, range ends, target indices), the same whatever came before."""
    epoch, order, cursor, step = -1, np.empty(0, dtype=np.int64), 0, 0
    while True:
        rng = np.random.default_rng((config.seed, 1, step))
        sequences: list[np.ndarray] = []
        ranges: list[tuple[int, int, int]] = []
        used = 0
        while used < config.tokens_per_batch:
            # A long sequence takes many passages, a short one a single passage with its special tokens.
            is_long = used < config.long_share * config.tokens_per_batch
            limit = int(rng.integers(256, config.long_tokens)) if is_long else 0
            body = [np.array([passages.cls_id])]
            size = 1
            while True:
                if cursor == len(order):
                    epoch += 1
                    order, cursor = np.random.default_rng((config.seed, 0, epoch)).permutation(passages.usable), 0
                index = int(order[cursor])
                cursor += 1
                ids = passages.ids[index]
                ranges.append((used + size, used + size + len(ids), index))
                body.append(ids)
                size += len(ids)
                if size >= limit:
                    break
            body.append(np.array([passages.sep_id]))
            size += 1
            if not is_long:
                # Alone, a passage is pooled as `Embedder.encode` does it, special tokens included.
                ranges[-1] = (used, used + size, ranges[-1][2])
            sequences.append(np.concatenate(body))
            used += size
        if step >= first:
            starts, ends, indices = torch.tensor(ranges).unbind(1)
            yield pack(sequences), starts, ends, indices
        step += 1


def loss_of(vectors_RD: Tensor, targets_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to the teacher, vector by vector and in the similarities among the batch; and the mean cosine."""
    student, teacher = normalize(vectors_RD), normalize(targets_RD)
    cosine = (student * teacher).sum(-1).mean()
    spread = teacher @ teacher.T
    # Ranking is decided among near neighbours: the softmax at a low temperature puts the weight there.
    log_student = F.log_softmax((student @ student.T).fill_diagonal_(-math.inf) / 0.05, dim=-1)
    weights = F.softmax(spread.fill_diagonal_(-math.inf) / 0.05, dim=-1)
    ranking = -(weights * log_student.masked_fill(weights == 0, 0)).sum(-1).mean()
    return (1 - cosine) * 4 + 0.25 * ranking, cosine.detach()


def rate_at(step: int, config: DistillConfiguration) -> float:
    """Trapezoid: linear rise, plateau, fall as 1 - sqrt; a factor in (0, 1]."""
    progress = (step + 1) / config.steps
    if progress < config.warmup:
        return progress / config.warmup
    if progress <= 1 - config.decay:
        return 1.0
    return max(1 - math.sqrt((progress - 1 + config.decay) / config.decay), 1e-3)


def build(passages: Passages, config: DistillConfiguration) -> Encoder:
    """A new student, its embedding taken from the teacher's vectors of the tokens where they are given."""
    shape = EncoderConfig(
        vocab_size=passages.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        max_tokens=config.max_tokens,
        pad_id=passages.pad_id,
        cls_id=passages.cls_id,
        sep_id=passages.sep_id,
    )
    encoder = Encoder(shape, dtype=getattr(torch, config.dtype))
    init_weights(encoder, shape, torch.Generator().manual_seed(config.seed))
    if config.token_vectors:
        rotated = np.load(config.token_vectors).astype(np.float32) @ passages.rotation
        known = np.abs(rotated).sum(1) > 0
        weight = encoder.embeddings.tok_embeddings.weight
        with torch.no_grad():
            weight[torch.from_numpy(known)] = torch.from_numpy(rotated[known])
    return encoder


def distill(
    config: DistillConfiguration, *, log_every: int = 20, on_step: Callable[[int], None] | None = None
) -> dict[str, float]:
    """Train, checkpointing; write the model folder at the end. Returns the report.

    Args:
        on_step: called with the number of steps done, after each and after its checkpoint.

    Raises:
        InputError: no teacher files, or a tokenizer that is missing.
    """
    files = sorted(Path(config.teacher).glob("*.parquet"))
    if not files:
        raise InputError(
            f"no Parquet file with teacher vectors in {config.teacher}; write `text` and `vector` columns there first"
        )
    passages = Passages(files, config.tokenizer, config.hidden_size)
    print(
        f"{len(passages.ids)} passages, {passages.lengths.sum()} tokens, {passages.kept:.4f} of the teacher kept",
        flush=True,
    )
    encoder = build(passages, config)
    decayed = [p for p in encoder.parameters() if p.ndim > 1]
    plain = [p for p in encoder.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=True)
    checkpoint = Path(f"{config.output}.checkpoint.pt")
    first, tokens, seconds = 0, 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        encoder.load_state_dict(state["encoder"])
        optimizer.load_state_dict(state["optimizer"])
        first, tokens, seconds = state["step"], state["tokens"], state["seconds"]
    started, cosines = time.perf_counter() - seconds, []
    stream = batches(passages, config, first)
    for step in range(first, config.steps):
        batch, starts, ends, indices = next(stream)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate_at(step, config)
        sums, weights = pool_segments(encoder(batch), starts, ends, "mean")
        loss, cosine = loss_of(sums / weights[:, None], passages.targets[indices])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        tokens += batch.num_tokens
        cosines.append(float(cosine))
        if (step + 1) % log_every == 0:
            spent = time.perf_counter() - started
            mean = float(np.mean(cosines[-log_every:]))
            line = {"step": step + 1, "loss": round(float(loss.detach()), 4), "cosine": round(mean, 4)}
            print(json.dumps(line | {"tokens": tokens, "seconds": round(spent)}), flush=True)
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            state = {"encoder": encoder.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            state |= {"tokens": tokens, "seconds": time.perf_counter() - started}
            torch.save(state, f"{checkpoint}.partial")
            os.replace(f"{checkpoint}.partial", checkpoint)
        if on_step:
            on_step(step + 1)
    save_folder(
        encoder,
        config.output,
        tokenizer_from=config.tokenizer,
        pooling="mean",
        normalize=True,
        prompts=config.prompts,
        dtype=torch.float16,
    )
    seconds = time.perf_counter() - started
    return {
        "steps": config.steps,
        "tokens": tokens,
        "seconds": seconds,
        "cosine": float(np.mean(cosines[-log_every:] or [0])),
    }


if __name__ == "__main__":
    import sys

    from jobs.configuration import load

    print(json.dumps(distill(load(DistillConfiguration, file=sys.argv[1], sets=sys.argv[2:], given={}))))
