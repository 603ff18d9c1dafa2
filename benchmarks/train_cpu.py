"""How fast does a CPU pretrain, beside Hugging Face's ModernBERT, on the same sequences under the same masks?

One process, peers interleaved round by round, medians. A step is what a trainer does: forward, loss over the masked
tokens of the global batch, backward, clipping, optimizer. Tokens are real ones: padding is work, not output. Losses and
gradient norms of the first step are compared before anything is timed. See benchmarks/README.md.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.embed_cpu import measure_ceiling
from benchmarks.peers import DTYPES
from benchmarks.setting import HOME, environment, keep, say
from model.batch import pack
from model.config import EncoderConfig, preset
from model.encoder import Encoder, init_weights
from model.flops import cost
from model.folder import load_tokenizer
from model.heads import MaskedLanguageModel
from model.losses import IGNORED, Pretraining
from model.optimizer import StableAdamW, gradient_norm, parameter_groups, scale_gradients
from pipeline.packing import fill_bins

ROOT = HOME.parent
RATE = 0.3
BATCH_SIZES = (4, 8, 16)
"""What Hugging Face is tried at in bfloat16; the best one is timed. As it comes, a Trainer takes 8."""


@dataclass(frozen=True)
class Sequence:
    """What the model reads, and what stood in the places to predict (elsewhere `IGNORED`)."""

    tokens: np.ndarray
    labels: np.ndarray


@dataclass
class Peer:
    """One way to take a step over a list of sequences."""

    name: str
    dtype: str
    step: Callable[[list[Sequence]], tuple[float, float]]
    """Loss and gradient norm before clipping."""
    computed: Callable[[list[Sequence]], int]
    """Tokens that a step computes, padding included."""
    batch_size: int = 0
    seconds: list[float] = field(default_factory=list)


def make_sequences(max_tokens: int, total: int) -> tuple[list[Sequence], int]:
    """Sequences of the bundled corpus, cut at `max_tokens` and masked as published; and the size of the vocabulary."""
    tokenizer = load_tokenizer(ROOT / "models" / "nightloom-small")
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    special = [vocab[f"[{name}]"] for name in ("PAD", "UNK", "CLS", "SEP", "MASK")]
    texts = pq.read_table(ROOT / "corpus" / "documents.parquet", columns=["text"])["text"].to_pylist()
    rng, body, sequences, used = np.random.default_rng(30), max_tokens - 2, [], 0
    ordinary = np.setdiff1d(np.arange(len(vocab)), special)
    for index in rng.permutation(len(texts)):
        ids = np.array(tokenizer.encode(texts[index], add_special_tokens=False).ids)
        for start in range(0, len(ids), body):
            clear = np.concatenate([[special[2]], ids[start : start + body], [special[3]]])
            draw, kind = rng.random(len(clear)), rng.random(len(clear))
            chosen = (draw < RATE) & ~np.isin(clear, special)
            tokens = np.where(chosen & (kind < 0.8), special[4], clear)
            tokens = np.where(chosen & (kind >= 0.9), rng.choice(ordinary, len(clear)), tokens)
            sequences.append(Sequence(tokens, np.where(chosen, clear, IGNORED)))
            used += len(tokens)
            if used >= total:
                return sequences, len(vocab)
    return sequences, len(vocab)


def global_batches(sequences: list[Sequence], tokens_per_step: int) -> list[list[Sequence]]:
    steps: list[list[Sequence]] = [[]]
    for sequence in sequences:
        if sum(len(s.tokens) for s in steps[-1]) >= tokens_per_step:
            steps.append([])
        steps[-1].append(sequence)
    return steps[:-1] if len(steps) > 1 else steps


def nightloom(config: EncoderConfig, state: dict[str, torch.Tensor], dtype: str, tokens_per_bin: int) -> Peer:
    language_model = MaskedLanguageModel(Encoder(config, dtype=DTYPES[dtype]))
    language_model.load_state_dict(state)
    model = Pretraining(language_model)
    optimizer = StableAdamW(parameter_groups(model, 1e-5), lr=1e-4)

    def step(sequences: list[Sequence]) -> tuple[float, float]:
        masked, total = sum(int((s.labels != IGNORED).sum()) for s in sequences), 0.0
        optimizer.zero_grad(set_to_none=True)
        for chosen in fill_bins(np.array([len(s.tokens) for s in sequences]), tokens_per_bin):
            batch = pack([sequences[i].tokens for i in chosen])
            labels = torch.from_numpy(np.concatenate([sequences[i].labels for i in chosen]))
            places = (labels != IGNORED).nonzero().flatten()
            none = torch.full((batch.num_sequences,), IGNORED)
            loss, _ = model(batch, places, labels[places], none, 1 / masked)
            loss.backward()
            total += float(loss.detach())
        norm = gradient_norm(model)
        scale_gradients(model, min(1.0, 1 / norm))
        optimizer.step()
        return total, norm

    return Peer(f"nightloom {dtype}", dtype, step, lambda sequences: sum(len(s.tokens) for s in sequences))


def hugging_face(
    config: EncoderConfig, state: dict[str, torch.Tensor], dtype: str, batch_size: int, *, best: bool
) -> Peer:
    """A Trainer's step on padded batches: mixed precision by autocast, the loss over the items of the global batch.

    Args:
        best: batches of like lengths and logits for masked tokens only; otherwise batches as they come and all logits.
    """
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    theirs = ModernBertConfig(**config.to_hf() | {"sparse_prediction": best})
    theirs._attn_implementation = "sdpa"
    model = ModernBertForMaskedLM(theirs).train()
    model.load_state_dict(state)
    model.tie_weights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-6, fused=True)

    def batches(sequences: list[Sequence]) -> Iterator[list[Sequence]]:
        ordered = sorted(sequences, key=lambda s: -len(s.tokens)) if best else sequences
        for start in range(0, len(ordered), batch_size):
            yield ordered[start : start + batch_size]

    def step(sequences: list[Sequence]) -> tuple[float, float]:
        masked, total = sum(int((s.labels != IGNORED).sum()) for s in sequences), 0.0
        optimizer.zero_grad(set_to_none=True)
        for some in batches(sequences):
            longest = max(len(s.tokens) for s in some)
            ids = torch.full((len(some), longest), config.pad_id or 0)
            labels = torch.full((len(some), longest), IGNORED)
            for row, s in enumerate(some):
                ids[row, : len(s.tokens)] = torch.from_numpy(s.tokens)
                labels[row, : len(s.tokens)] = torch.from_numpy(s.labels)
            attention = torch.zeros_like(ids)
            for row, s in enumerate(some):
                attention[row, : len(s.tokens)] = 1
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = model(
                    input_ids=ids, attention_mask=attention, labels=labels, num_items_in_batch=torch.tensor(masked)
                ).loss
            loss.backward()
            total += float(loss.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        return total, norm

    def computed(sequences: list[Sequence]) -> int:
        return sum(len(some) * max(len(s.tokens) for s in some) for some in batches(sequences))

    name = f"huggingface {dtype}" + (", best settings" if best else ", as it comes")
    return Peer(name, dtype, step, computed, batch_size)


def time_of(peer: Peer, sequences: list[Sequence]) -> float:
    started = time.perf_counter()
    peer.step(sequences)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset", default="ettin-17m", help="a preset of model.config; the vocabulary is the corpus's"
    )
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--tokens-per-step", type=int, default=16_384)
    parser.add_argument("--tokens-per-bin", type=int, default=4096, help="of nightloom")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="two layers, one round: tries the benchmark itself")
    parser.add_argument("--tag", default="", help="a word more in the record's name")
    parser.add_argument("--out", type=Path, default=HOME / "results")
    options = parser.parse_args()
    changes: dict[str, Any] = {"num_layers": 2} if options.quick else {}
    rounds = 1 if options.quick else options.rounds
    record: dict[str, Any] = {"benchmark": "train_cpu", "preset": options.preset, "environment": environment()}
    record["tag"] = "-".join(filter(None, [options.tag, "quick" if options.quick else ""]))
    record |= {name: getattr(options, name) for name in ("max_tokens", "tokens_per_step", "tokens_per_bin")}
    sequences, vocab_size = make_sequences(options.max_tokens, options.tokens_per_step * (rounds + 1) * 11 // 10)
    config = preset(options.preset, vocab_size=vocab_size, pad_id=0, cls_id=2, sep_id=3, **changes)
    steps = global_batches(sequences, options.tokens_per_step)
    origin = MaskedLanguageModel(Encoder(config))
    init_weights(origin, config, torch.Generator().manual_seed(0))
    state = origin.state_dict()

    tried = {}
    for size in BATCH_SIZES:
        peer = hugging_face(config, state, "bfloat16", size, best=True)
        time_of(peer, steps[0])
        tried[size] = round(time_of(peer, steps[0]), 2)
    say(f"huggingface in bfloat16 took {tried} s a step by batch size")
    peers = [
        nightloom(config, state, "bfloat16", options.tokens_per_bin),
        hugging_face(config, state, "bfloat16", min(tried, key=lambda size: tried[size]), best=True),
        nightloom(config, state, "float32", options.tokens_per_bin),
        hugging_face(config, state, "float32", 8, best=False),
    ]
    # The first step of each, from the same weights: the check, and the warm-up.
    first = {peer.name: peer.step(steps[0]) for peer in peers}
    loss, norm = first["nightloom float32"]
    for name, (its_loss, its_norm) in first.items():
        allowed = 0.02 if "bfloat16" in name else 1e-4
        if abs(its_loss - loss) > allowed or abs(its_norm - norm) > max(allowed, 0.02 * norm):
            raise RuntimeError(f"{name} has loss {its_loss} and gradient norm {its_norm}, not {loss} and {norm}")
    ceilings: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    for number in range(rounds):
        for dtype, values in ceilings.items():
            values.append(measure_ceiling(config, dtype, options.tokens_per_bin))
        for peer in peers:
            peer.seconds.append(time_of(peer, steps[1 + number]))
        say(f"round {number + 1}: " + ", ".join(f"{peer.name} {peer.seconds[-1]:.2f} s" for peer in peers))
    record["documents"] = {"sequences": len(sequences), "median": statistics.median(len(s.tokens) for s in sequences)}
    record["ceiling_tflops"] = {dtype: round(statistics.median(v) / 1e12, 3) for dtype, v in ceilings.items()}
    record["peers"] = {}
    for peer in peers:
        speeds, shares, padding = [], [], []
        for batch, seconds in zip(steps[1:], peer.seconds, strict=False):
            lengths = [len(s.tokens) for s in batch]
            masked = sum(int((s.labels != IGNORED).sum()) for s in batch)
            flops = cost(config, lengths, mode="training", predicted_tokens=masked).flops
            speeds.append(sum(lengths) / seconds)
            shares.append(flops / seconds / statistics.median(ceilings[peer.dtype]))
            padding.append(1 - sum(lengths) / peer.computed(batch))
        record["peers"][peer.name] = {
            "tokens_per_s": round(statistics.median(speeds)),
            "mfu": round(statistics.median(shares), 3),
            "padding": round(statistics.median(padding), 3),
            "batch_size": peer.batch_size,
            "seconds": [round(s, 3) for s in peer.seconds],
            "loss": round(first[peer.name][0], 5),
            "gradient_norm": round(first[peer.name][1], 4),
        }
    ours, theirs, plain = (record["peers"][peers[i].name]["tokens_per_s"] for i in (0, 1, 3))
    record["ratios"] = {
        "over huggingface, best": round(ours / theirs, 2),
        "over it as it comes": round(ours / plain, 2),
    }
    say(f"kept in {keep(record, options.out)}")
    print("| | real tokens/s | MFU | padding | first loss | gradient norm |\n|---|---:|---:|---:|---:|---:|")
    for name, r in record["peers"].items():
        shown = f"{r['tokens_per_s']:,} | {r['mfu']:.0%} | {r['padding']:.1%} | {r['loss']} | {r['gradient_norm']}"
        print(f"| {name} | {shown} |")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
