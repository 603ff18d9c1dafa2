"""How near to float16's largest number (65,504) do a model's values come, layer by layer, on real and on hostile input?

    python -m benchmarks.ranges [MODEL] [--sequences 10000]

The values are taken in float32 and the largest of each product is kept; then the same sequences go through float16,
where nothing may be infinite or NaN. Hostile are one token repeated, random ids, a single token, two tokens in turn,
special tokens only, and some of the greatest length. The last line is JSON.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from benchmarks.setting import HOME, environment, keep, say
from model.batch import PackedBatch, pack
from model.config import EncoderConfig
from model.embedder import Embedder
from model.encoder import Encoder

LARGEST = torch.finfo(torch.float16).max
LONG_EVERY = 1_000
"""One hostile sequence in so many has the greatest length."""
KINDS = ("repeated", "random", "one", "alternating", "special")


def hostile(count: int, config: EncoderConfig, seed: int = 0) -> Iterator[np.ndarray]:
    """So many sequences, of 1 to 128 tokens, some of them of `max_tokens`."""
    rng = np.random.default_rng(seed)
    special = [token for token in (config.cls_id, config.sep_id, config.pad_id) if token is not None]
    for i in range(count):
        kind = KINDS[i % len(KINDS)]
        length = config.max_tokens if i % LONG_EVERY == LONG_EVERY - 1 else int(rng.integers(1, 129))
        if kind == "one" and length < config.max_tokens:
            length = 1
        few = rng.integers(0, config.vocab_size, 2 if kind == "alternating" else 1)
        if kind == "random":
            yield rng.integers(0, config.vocab_size, length)
        elif kind == "special":
            yield rng.choice(special or [0], length)
        else:
            yield np.resize(few, length)


def bins(sequences: Iterator[np.ndarray], num_tokens: int = 8_192) -> Iterator[PackedBatch]:
    """Packed as they come."""
    held: list[np.ndarray] = []
    for sequence in sequences:
        if held and sum(map(len, held)) + len(sequence) > num_tokens:
            yield pack(held)
            held = []
        held.append(sequence)
    if held:
        yield pack(held)


class Probe:
    """Keeps the largest size of what every product of an encoder takes and gives, while it is attached."""

    def __init__(self, encoder: Encoder) -> None:
        self.largest: dict[str, float] = {}
        self.hooks = [
            module.register_forward_hook(self._keep(name))
            for name, module in encoder.named_modules()
            if isinstance(module, nn.Linear | nn.LayerNorm)
        ]

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            for side, value in (("in", inputs[0]), ("out", output)):
                key = f"{name} {side}"
                self.largest[key] = max(self.largest.get(key, 0.0), value.abs().max().item())

        return hook

    def detach(self) -> None:
        for hook in self.hooks:
            hook.remove()


@torch.no_grad()
def largest_values(encoder: Encoder, batches: Iterator[PackedBatch]) -> dict[str, float]:
    probe = Probe(encoder)
    for batch in batches:
        encoder(batch)
    probe.detach()
    return probe.largest


@torch.no_grad()
def not_finite(encoder: Encoder, batches: Iterator[PackedBatch]) -> tuple[int, int]:
    """(sequences with a value that is not finite, all sequences)."""
    bad = total = 0
    for batch in batches:
        finite_T = encoder(batch).isfinite().all(dim=1)
        for start, stop in zip(batch.host_offsets(), batch.host_offsets()[1:], strict=False):
            bad += not bool(finite_T[start:stop].all())
        total += batch.num_sequences
    return bad, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(HOME.parent / "models" / "nightloom-small"))
    parser.add_argument("--sequences", type=int, default=10_000, help="hostile ones")
    parser.add_argument("--out", type=Path, default=HOME / "results")
    options = parser.parse_args()
    exact = Embedder(options.model, device="cpu", dtype="float32")
    texts = pq.read_table(HOME.parent / "corpus" / "documents.parquet")["text"].to_pylist()
    real = [np.array(e.ids[: exact.max_tokens]) for e in exact.tokenizer.encode_batch_fast(texts)]
    record: dict[str, Any] = {"benchmark": "ranges", "model": Path(options.model).name, "environment": environment()}
    for name, make in (
        ("real", lambda: bins(iter(real))),
        ("hostile", lambda: bins(hostile(options.sequences, exact.config))),
    ):
        largest = largest_values(exact.encoder, make())
        record[name] = {key: round(value, 3) for key, value in largest.items()}
        worst = max(largest, key=largest.__getitem__)
        say(f"{name}: largest {largest[worst]:.1f} ({largest[worst] / LARGEST:.2%} of float16's) at {worst}")
        half = Embedder(options.model, device="cpu", dtype="float16")
        record[f"{name} float16"] = dict(
            zip(("not_finite", "sequences"), not_finite(half.encoder, make()), strict=True)
        )
        say(f"{name}: {record[f'{name} float16']}")
    say(f"kept in {keep(record, options.out)}")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
