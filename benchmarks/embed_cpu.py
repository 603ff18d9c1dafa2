"""How fast does a CPU embed, beside Hugging Face and sentence-transformers, with the same weights and the same vectors?

One process, peers interleaved round by round, medians. Tokens are real ones: padding is work, not output. A ceiling of
plain matrix products is measured in every round, so that a slow hour of the machine shows. See benchmarks/README.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.peers import DTYPES, NAMES, SPECIAL, Peer, Workload, make_peers, save_model
from benchmarks.setting import HOME, environment, keep, say, table
from model.config import EncoderConfig, preset
from model.flops import cost, linear_weights, share_of_ceiling

BATCH_SIZES = {"short": (8, 16, 32), "long": (1, 2, 4)}
"""What Hugging Face is tried at; the best one is timed."""
TINY = {"vocab_size": 2_000, "hidden_size": 64, "intermediate_size": 96, "num_layers": 4, "num_heads": 2}


def lengths_of(name: str, rng: np.random.Generator) -> list[int]:
    """Tokens per document. short: 512, log-normal, median 120, at most 512. long: 24, uniform from 1k to 8k."""
    if name == "short":
        return np.clip(rng.lognormal(np.log(120), 0.7, 512), 8, 512).astype(int).tolist()
    return rng.integers(1_000, 8_193, 24).tolist()


def build(name: str, config: EncoderConfig, scale: float, tokens_scale: float) -> Workload:
    """Documents of random words, one token a word, so that texts and ids say the same."""
    rng = np.random.default_rng(20)
    lengths = sorted(lengths_of(name, rng))
    if scale < 1:
        count = max(2, round(len(lengths) * scale))
        lengths = [lengths[int((i + 0.5) * len(lengths) / count)] for i in range(count)]
    lengths = [max(4, int(n * tokens_scale)) for n in rng.permutation(lengths)]
    words = [rng.integers(len(SPECIAL), config.vocab_size, n - 2).tolist() for n in lengths]
    return Workload(name, [" ".join(f"w{i}" for i in ids) for ids in words], [[1, *ids, 2] for ids in words])


@torch.inference_mode()
def measure_ceiling(config: EncoderConfig, dtype: str, num_tokens: int) -> float:
    """FLOP/s of `F.linear` (for int8 of `torch._int_mm`) at the shapes of one layer, each with `num_tokens` rows; best
    of three passes."""
    kind = DTYPES.get(dtype, torch.int8)

    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch._int_mm(x, weight.t()) if dtype == "int8" else F.linear(x, weight)

    operands = [
        ((40 * torch.randn(num_tokens, i)).to(kind), (40 * torch.randn(o, i)).to(kind))
        for i, o in linear_weights(config)
    ]
    flops = sum(2 * num_tokens * i * o for i, o in linear_weights(config))
    times = []
    for _ in range(4):  # the first pass warms up
        start = time.perf_counter()
        for x, weight in operands:
            product(x, weight)
        times.append(time.perf_counter() - start)
    return flops / min(times[1:])


def choose_batch_sizes(peers: list[Peer], workload: Workload) -> dict[int, float]:
    """Tokens per second of Hugging Face at each batch size, on a quarter of the documents; all its peers get the best.

    The first of them is tried (bfloat16 where it takes part): trying float32 too would take as long as measuring it.
    """
    theirs = [peer for peer in peers if peer.name.startswith("huggingface")]
    if not theirs:
        return {}
    tried = {}
    sample = workload.part(4)
    for size in BATCH_SIZES[workload.name]:
        start = time.perf_counter()
        theirs[0].embed(sample, size)
        tried[size] = round(sum(sample.lengths) / (time.perf_counter() - start), 1)
    for peer in theirs:
        peer.batch_size = max(tried, key=tried.__getitem__)
    say(f"{workload.name}: Hugging Face at batch size {theirs[0].batch_size}; tokens/s {tried}")
    return tried


def estimate_s(peers: list[Peer], workload: Workload, config: EncoderConfig, ceilings: dict[str, float]) -> float:
    """Rough seconds for a workload: padded tokens at 60 % of the ceiling, attention over every pair (ours: a third)."""
    total = 0.0
    keys = sum(n * n for n in workload.lengths) / sum(workload.lengths)
    for peer in peers:
        ours = peer.name.startswith("nightloom")
        attention = 4 * config.hidden_size * config.num_layers * keys * (0.35 if ours else 1)
        per_token = cost(config, [1]).linear_flops + attention
        trials = 0.75 if peer.name == "huggingface bfloat16" else 0
        total += (peer.repeats + trials) * peer.computed(workload.lengths) * per_token / (0.6 * ceilings[peer.dtype])
    return total


def run_workload(workload: Workload, peers: list[Peer], config: EncoderConfig, rows: int) -> dict[str, Any]:
    """Warm up, choose batch sizes, then rounds in which every peer that is not done has one turn."""
    warm = Workload(workload.name, workload.texts[:2], workload.ids[:2])
    for peer in peers:
        peer.seconds, peer.vectors = [], None
        peer.run(warm)
    tried = choose_batch_sizes(peers, workload)
    used = sorted({peer.dtype for peer in peers})
    ceilings: dict[str, list[float]] = {dtype: [measure_ceiling(config, dtype, rows)] for dtype in used}
    for turn in range(max(peer.repeats for peer in peers)):
        for dtype in used:
            ceilings[dtype].append(measure_ceiling(config, dtype, rows))
        for peer in peers:
            if turn < peer.repeats:
                start = time.perf_counter()
                peer.vectors = peer.run(workload)
                peer.seconds.append(time.perf_counter() - start)
                say(f"{workload.name}: round {turn + 1}, {peer.name} {peer.seconds[-1]:.1f} s")
    ceiling = {dtype: statistics.median(values) for dtype, values in ceilings.items()}
    return summarise(workload, peers, config, ceiling) | {"batch_sizes_tried": tried}


def summarise(
    workload: Workload, peers: list[Peer], config: EncoderConfig, ceiling: dict[str, float]
) -> dict[str, Any]:
    """Medians, shares of the ceiling, and each peer's vectors against the float32 reference."""
    reference = next((p for p in peers if p.name == "huggingface float32"), None)
    reference = reference or next((p for p in peers if p.dtype == "float32"), peers[0])
    assert reference.vectors is not None
    need = cost(config, workload.lengths)
    tokens, results = sum(workload.lengths), {}
    for peer in peers:
        assert peer.vectors is not None
        seconds = statistics.median(peer.seconds)
        results[peer.name] = {
            "tokens_per_s": round(tokens / seconds, 1),
            "seconds": [round(s, 3) for s in peer.seconds],
            "share_of_ceiling": round(share_of_ceiling(need, seconds, ceiling[peer.dtype]), 4),
            "batch_size": peer.batch_size,
            "padding": round(1 - tokens / peer.computed(workload.lengths), 4),
            **compare(peer.vectors, reference.vectors),
        }
    return {
        "documents": len(workload.ids),
        "tokens": tokens,
        "reference": reference.name,
        "ceiling_tflops": {dtype: round(value / 1e12, 4) for dtype, value in ceiling.items()},
        "peers": results,
    }


def compare(vectors: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Smallest cosine, plain and after the reference's mean is taken off both.

    Vectors of random weights lie close together, so the plain cosine forgives much; the centred one does not.
    """

    def smallest_cosine(a: np.ndarray, b: np.ndarray) -> float:
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        return round(float(((a * b).sum(axis=1) / norms).min()), 7)

    a, b = vectors.astype(np.float64), reference.astype(np.float64)
    centre = b.mean(axis=0)
    return {
        "cosine_min": smallest_cosine(a, b),
        "centred_cosine_min": smallest_cosine(a - centre, b - centre),
        "difference_max": float(f"{np.abs(a - b).max():.3g}"),
    }


def measure_memory(folder: Path, num_tokens: int) -> dict[str, Any]:
    """MiB that one document takes over the loaded, warmed model."""
    memory: dict[str, Any] = {"tokens": num_tokens}
    for dtype in DTYPES:
        for name in ("nightloom", "huggingface"):
            command = [sys.executable, "-m", "benchmarks.peers", str(folder), name, dtype, str(num_tokens)]
            run = subprocess.run(command, cwd=HOME.parent, capture_output=True, text=True, check=False)
            if run.returncode:
                raise RuntimeError(run.stderr)
            memory[f"{name} {dtype} MiB"] = float(run.stdout.split()[-1])
            say(f"memory: {name} {dtype} {memory[f'{name} {dtype} MiB']} MiB")
        memory[f"share {dtype}"] = round(memory[f"nightloom {dtype} MiB"] / memory[f"huggingface {dtype} MiB"], 3)
    return memory


def ratios(workloads: dict[str, Any]) -> dict[str, float]:
    """Our best against Hugging Face's best and against sentence-transformers as it comes."""
    result = {}
    for name, workload in workloads.items():
        best = {
            kind: max((v["tokens_per_s"] for k, v in workload["peers"].items() if k.startswith(kind)), default=0.0)
            for kind in ("nightloom", "huggingface", "sentence-transformers")
        }
        for kind in ("huggingface", "sentence-transformers"):
            if best[kind] and best["nightloom"]:
                result[f"{name} over {kind}"] = round(best["nightloom"] / best[kind], 2)
    return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset", default="base", help="a preset of model.config, or tiny (to try the benchmark itself)"
    )
    parser.add_argument("--workloads", nargs="+", default=["short", "long"], choices=["short", "long"])
    parser.add_argument("--peers", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--repeats", type=int, default=3, help="rounds of the bfloat16 peers")
    parser.add_argument("--slow-repeats", type=int, default=1, help="rounds of the float32 peers")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the documents, of the same distribution")
    parser.add_argument("--quick", action="store_true", help="the same as --scale 0.125 --repeats 1")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak of one 8,192-token document")
    parser.add_argument("--tag", default="", help="a word more in the record's name, e.g. for a run of some peers only")
    parser.add_argument("--out", type=Path, default=HOME / "results")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.scale, arguments.repeats = 0.125, 1
    return arguments


def main() -> None:
    arguments = parse()
    tiny = arguments.preset == "tiny"
    shape = TINY if tiny else {}
    config = preset("base" if tiny else arguments.preset, **shape, pad_id=0, cls_id=1, sep_id=2)
    rows = 512 if tiny else 4_096
    record: dict[str, Any] = {
        "benchmark": "embed_cpu",
        "preset": arguments.preset,
        "scale": arguments.scale,
        "tag": arguments.tag,
        "environment": environment(),
    }
    workloads = [build(name, config, arguments.scale, 0.1 if tiny else 1.0) for name in arguments.workloads]
    with tempfile.TemporaryDirectory(prefix="nightloom-bench-") as temporary:
        folder = Path(temporary) / "model"
        save_model(config, folder)
        if not arguments.no_memory:
            record["memory"] = measure_memory(folder, 512 if tiny else config.max_tokens)
        peers = list(make_peers(folder, arguments.peers, arguments.repeats, arguments.slow_repeats))
        ceilings = {dtype: measure_ceiling(config, dtype, rows) for dtype in sorted({p.dtype for p in peers})}
        minutes = {w.name: round(estimate_s(peers, w, config, ceilings) / 60, 1) for w in workloads}
        speeds = ", ".join(f"{dtype} {value / 1e12:.3f} TFLOP/s" for dtype, value in ceilings.items())
        say(f"about {sum(minutes.values()):.0f} minutes to come {minutes}, at ceilings of {speeds}")
        record["workloads"] = {}
        for workload in workloads:
            record["workloads"][workload.name] = run_workload(workload, peers, config, rows)
            record["ratios"] = ratios(record["workloads"])
            path = keep(record, arguments.out)  # after each: a process killed for memory loses one workload only
    say(f"kept in {path}")
    print(table(record))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
