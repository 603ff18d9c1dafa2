"""Every attention back-end checked and timed on a GPU, in one call, with nothing but PyTorch and this checkout.

    python -m benchmarks.gpu --budget-s 540                    # everything, in this order, until the time is over
    python -m benchmarks.gpu --pieces check inference --presets base
    python -m benchmarks.gpu --device cpu --presets tiny --budget-s 60     # a dry run of the script itself

Pieces: *check* (each back-end against `reference` in float64, forward and gradient, in each dtype), *inference* and
*training* (tokens a second, share of the measured ceiling of matrix products, memory), *captured* (short batches as
a CUDA graph), *peers* (Hugging Face, where transformers can be imported). What the time did not reach is in the record
as skipped, and a wrong result makes the exit status 1. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_peers import hugging_face
from benchmarks.setting import HOME, environment, keep, say
from model.attention import BACKENDS, attend, choose_backend, prepare
from model.batch import PackedBatch
from model.config import EncoderConfig, preset
from model.encoder import Encoder, init_weights
from model.errors import InputError
from model.flops import Mode, cost, linear_weights, share_of_ceiling
from model.patterns import Pattern

PIECES = ("check", "inference", "training", "captured", "peers")
TINY: dict[str, Any] = {
    "vocab_size": 2_000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_layers": 4,
    "num_heads": 2,
}
TINY |= {"pad_id": 0, "cls_id": 1, "sep_id": 2}
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest error of attention, as a share of the largest value of the exact result. TensorFloat-32 stays off."""
CHECKED_LENGTHS = (1, 2, 63, 64, 65, 128, 129, 130, 257, 700)
SHORT = 512
"""Batches of this many tokens and fewer are captured: there the launch of kernels is most of the time."""


class Clock:
    """The time budget of the call, and what one case may take of it once it is warm."""

    def __init__(self, budget_s: float, case_s: float) -> None:
        self.started, self.budget_s, self.case_s = time.perf_counter(), budget_s, case_s

    def left_s(self) -> float:
        return self.budget_s - (time.perf_counter() - self.started)


def packed(lengths: list[int], config: EncoderConfig, device: torch.device) -> PackedBatch:
    """Random tokens of these lengths."""
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens = torch.randint(5, config.vocab_size, (sum(lengths),), generator=generator)
    offsets = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    return PackedBatch(tokens, cu_seqlens, max(lengths), tuple(offsets)).to(device)


def lengths_of(kind: str, length: int, num_tokens: int) -> list[int]:
    """Lengths that fill a batch. fixed: as many as fit; mixed: uniform from 1 to `length`, the last cut to fit."""
    if kind == "fixed":
        return [length] * max(1, num_tokens // length)
    generator, lengths, left = torch.Generator().manual_seed(length), [], max(num_tokens, length)
    while left:
        lengths.append(min(left, int(torch.randint(1, length + 1, (1,), generator=generator))))
        left -= lengths[-1]
    return lengths


def check_backends(device: torch.device, clock: Clock) -> Iterator[dict[str, Any]]:
    """One row for each back-end, dtype and pattern: errors against float64, or why it cannot run here."""
    for backend in (name for name in BACKENDS if name != "reference"):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            row: dict[str, Any] = {"backend": backend, "dtype": str(dtype).removeprefix("torch.")}
            try:
                choose_backend(backend, device=device, dtype=dtype, head_size=64)
            except InputError as error:
                yield row | {"refused": str(error)}
                continue
            for window in (None, 64):
                if clock.left_s() <= 0:
                    yield row | {"window": window, "skipped": "time"}
                    continue
                try:
                    errors = check_one(backend, dtype, window, device)
                    right = all(value <= TOLERANCE[dtype] for value in errors.values())  # NaN is wrong
                    yield row | {"window": window, "right": right} | errors
                except Exception as error:  # whatever a kernel says, the others are still to be looked at
                    yield row | {"window": window, "right": False, "error": f"{type(error).__name__}: {error}"[:300]}


def check_one(backend: str, dtype: torch.dtype, window: int | None, device: torch.device) -> dict[str, float]:
    """Largest errors of the output and of the three gradients, as shares of the largest exact value."""
    batch = packed(list(CHECKED_LENGTHS), preset("base"), device)
    generator = torch.Generator().manual_seed(0)
    rounded = [torch.randn(batch.num_tokens, 2, 64, generator=generator).to(device, dtype) for _ in range(4)]
    results = {}
    for name, kind in ((backend, dtype), ("reference", torch.float64)):
        q, k, v = (x.to(kind, copy=True).requires_grad_() for x in rounded[:3])
        out = attend(q, k, v, prepare(name, batch, Pattern(window), dtype=kind))
        out.backward(rounded[3].to(kind))
        results[name] = [out.detach(), q.grad, k.grad, v.grad]
        if name != "reference":
            with torch.no_grad():  # the kernels of inference may be others
                plan = prepare(name, batch, Pattern(window), dtype=kind)
                results["inference"] = [attend(rounded[0].clone(), rounded[1].clone(), rounded[2], plan)]
    exact = results["reference"]
    errors = {
        name: largest_share(ours, theirs)
        for name, ours, theirs in zip(("forward", "dq", "dk", "dv"), results[backend], exact, strict=True)
    }
    return errors | {"inference": largest_share(results["inference"][0], exact[0])}


def largest_share(ours: Tensor | None, exact: Tensor | None) -> float:
    assert ours is not None
    assert exact is not None
    return float(f"{((ours.double() - exact).abs().max() / exact.abs().max()).item():.3g}")


def seconds_of(run: Callable[[], object], device: torch.device, clock: Clock, share: float = 1.0) -> list[float]:
    """Seconds of each of 3 to 20 calls after two that warm up; the device is waited for."""

    def once() -> float:
        wait(device)
        began = time.perf_counter()
        run()
        wait(device)
        return time.perf_counter() - began

    once()
    expected = once()
    count = max(3, min(20, int(min(share * clock.case_s, clock.left_s() / 4) / max(expected, 1e-6))))
    return [once() for _ in range(count)]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_ceiling(config: EncoderConfig, dtype: torch.dtype, device: torch.device, clock: Clock) -> float:
    """FLOP/s of plain products at the shapes of one layer."""
    rows = 16_384 if device.type == "cuda" else 512
    operands = [
        (torch.randn(rows, i, device=device, dtype=dtype), torch.randn(o, i, device=device, dtype=dtype))
        for i, o in linear_weights(config)
    ]
    flops = sum(2 * rows * i * o for i, o in linear_weights(config))
    seconds = seconds_of(lambda: [x @ w.T for x, w in operands], device, clock, 0.25)
    return flops / min(seconds)


def make_encoder(config: EncoderConfig, dtype: torch.dtype, device: torch.device, mode: Mode) -> Encoder:
    """For inference weights in `dtype`, for training in float32."""
    encoder = Encoder(config, dtype=dtype, device=device)
    init_weights(encoder, config)
    if mode == "forward":
        encoder.requires_grad_(False)
        for module in encoder.modules():
            if isinstance(module, torch.nn.Linear):
                module.to(dtype)
    return encoder


def time_case(
    encoder: Encoder, lengths: list[int], mode: Mode, ceiling: float, device: torch.device, clock: Clock
) -> dict[str, Any]:
    """Tokens a second, share of the ceiling and peak memory of one batch."""
    batch = packed(lengths, encoder.config, device)

    def run() -> None:
        if mode == "forward":
            with torch.inference_mode():
                encoder(batch)
        else:
            encoder.zero_grad(set_to_none=True)
            encoder(batch).square().mean().backward()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = seconds_of(run, device, clock)
    took = statistics.median(seconds)
    row: dict[str, Any] = {
        "tokens": batch.num_tokens,
        "sequences": batch.num_sequences,
        "tokens_per_s": round(batch.num_tokens / took, 1),
        "share_of_ceiling": round(share_of_ceiling(cost(encoder.config, lengths, mode=mode), took, ceiling), 4),
        "seconds": [round(s, 5) for s in seconds],
    }
    if device.type == "cuda":
        row["peak_mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20)
    return row


def captured(encoder: Encoder, lengths: list[int], device: torch.device, clock: Clock) -> dict[str, Any]:
    """A batch as a CUDA graph against the same batch launched kernel by kernel, results compared."""
    batch = packed(lengths, encoder.config, device)
    with torch.inference_mode():
        plain = encoder(batch)
        launched = statistics.median(seconds_of(lambda: encoder(batch), device, clock, 0.25))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = encoder(batch)
        replayed = statistics.median(seconds_of(graph.replay, device, clock, 0.25))
        return {"launched_s": launched, "replayed_s": replayed, "same": bool(torch.equal(plain, out))}


def rows_of(options: argparse.Namespace, clock: Clock, device: torch.device, dtype: torch.dtype) -> Iterator[Any]:
    """Everything but the check, case by case: (piece, row)."""
    for name in options.presets:
        config = preset("base", **TINY) if name == "tiny" else preset(name)
        ceiling = measure_ceiling(config, dtype, device, clock)
        yield "ceilings", {"preset": name, "tflops": round(ceiling / 1e12, 3)}
        modes: tuple[Mode, ...] = ("forward", "training")
        encoders = {mode: make_encoder(config, dtype, device, mode) for mode in modes}
        for length in options.lengths:
            for kind in ("fixed", "mixed"):
                lengths = lengths_of(kind, length, options.tokens)
                case: dict[str, Any] = {"preset": name, "length": length, "kind": kind}
                for piece in (p for p in options.pieces if p not in ("check", "captured")):
                    yield piece, case | attempt(piece, encoders, lengths, ceiling, clock)
                if "captured" in options.pieces and length <= SHORT and device.type == "cuda":
                    short = lengths_of(kind, length, SHORT)
                    yield "captured", case | attempt("captured", encoders, short, ceiling, clock)


def attempt(
    piece: str, encoders: dict[Mode, Encoder], lengths: list[int], ceiling: float, clock: Clock
) -> dict[str, Any]:
    """A row, or why there is none: neither the lack of time nor of memory ends the script."""
    encoder = encoders["training" if piece == "training" else "forward"]
    device = encoder.final_norm.weight.device
    if clock.left_s() <= 0:
        return {"skipped": "time"}
    try:
        if piece == "captured":
            return captured(encoder, lengths, device, clock)
        if piece == "peers":
            batch = packed(lengths, encoder.config, device)
            return hugging_face(encoder, batch, timed=lambda run: seconds_of(run, device, clock), left_s=clock.left_s)
        return time_case(encoder, lengths, "training" if piece == "training" else "forward", ceiling, device, clock)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def device_of(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"name": device.type}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--presets", nargs="+", default=["base", "large"], help="presets of model.config, or tiny")
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 8_192, 128, 2_048])
    parser.add_argument("--tokens", type=int, default=32_768, help="of a batch")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"])
    parser.add_argument("--pieces", nargs="+", default=list(PIECES), choices=PIECES)
    parser.add_argument("--budget-s", type=float, default=540, help="no case begins after so many seconds")
    parser.add_argument("--case-s", type=float, default=2, help="seconds that a case is repeated for")
    parser.add_argument("--out", type=Path, default=HOME / "results")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    clock, device = Clock(options.budget_s, options.case_s), torch.device(options.device)
    dtype = torch.bfloat16
    if options.dtype != "auto":
        dtype = getattr(torch, options.dtype)
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        dtype = torch.float16
    record: dict[str, Any] = {"benchmark": "gpu", "environment": environment(), "device": device_of(device)}
    record |= {"dtype": str(dtype).removeprefix("torch."), "check": []}
    record["tag"] = "dry" if device.type == "cpu" else ""
    if "check" in options.pieces:
        for row in check_backends(device, clock):
            say(json.dumps(row))
            record["check"].append(row)
    for piece, row in rows_of(options, clock, device, dtype):
        say(f"{piece} {json.dumps(row)}")
        record.setdefault(piece, []).append(row)
        path = keep(record, options.out)  # after each: a machine that is taken away loses one case
    say(f"kept in {path}; {clock.left_s():.0f} s left")
    print(json.dumps(record))
    return int(any(row.get("right") is False for row in record["check"]))


if __name__ == "__main__":
    sys.exit(main())
