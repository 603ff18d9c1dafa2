"""What every benchmark's record has: the machine and versions it holds for, a table to read, one JSON line to parse."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

HOME = Path(__file__).resolve().parent
PACKAGES = (
    "torch",
    "transformers",
    "sentence-transformers",
    "tokenizers",
    "numpy",
    "xformers",
    "ray",
    "pylance",
    "pyarrow",
)
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")


def say(message: str) -> None:
    """Progress, on stderr: stdout is for the result."""
    print(message, file=sys.stderr, flush=True)


def environment() -> dict[str, Any]:
    """Processor, threads, load, versions, and the commit that was measured."""
    cpu: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        cpu[key.strip()] = value.strip()
    flags = cpu.get("flags", "").split()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu.get("model name", platform.processor()),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": _commit(),
    }


def keep(record: dict[str, Any], folder: Path) -> Path:
    """Keep a record as <date>-<benchmark>.json.

    A record of part of the documents, or of another shape than base, says so in its name and replaces no full one.
    """
    record["environment"]["load_after"] = round(os.getloadavg()[0], 2)
    parts = [record["environment"]["date"][:10], record["benchmark"].replace("_", "-")]
    parts += [record["preset"]] if record.get("preset", "base") != "base" else []
    parts += [f"scale{record['scale']:g}"] if record.get("scale", 1.0) != 1.0 else []
    parts += [record["tag"]] if record.get("tag") else []
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("-".join(parts) + ".json")
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    where = record["environment"]
    lines = [
        f"{where['cpu']}, {where['threads']} threads, {' '.join(where['flags'])}; torch {where['packages']['torch']}; "
        f"load {where['load_before']} before, {where['load_after']} after",
        "",
    ]
    for name, workload in record["workloads"].items():
        ceilings = ", ".join(f"{dtype} {value} TFLOP/s" for dtype, value in workload["ceiling_tflops"].items())
        lines += [
            f"*{name}*: {workload['documents']} documents, {workload['tokens']} tokens; ceiling {ceilings}",
            "",
            "| | real tokens/s | share of ceiling | padding | batch size | rounds | cosine to float32 | centred |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for peer, r in workload["peers"].items():
            lines.append(
                f"| {peer} | {r['tokens_per_s']:,.0f} | {r['share_of_ceiling']:.0%} | {r['padding']:.0%} | "
                f"{r['batch_size'] or ''} | {len(r['seconds'])} | {r['cosine_min']:.6f} | "
                f"{r['centred_cosine_min']:.6f} |"
            )
        lines.append("")
    if memory := record.get("memory"):
        values = "; ".join(f"{key} {value}" for key, value in memory.items() if key != "tokens")
        lines += [f"Peak memory of one document of {memory['tokens']} tokens: {values}", ""]
    for key, value in record.get("ratios", {}).items():
        lines.append(f"- {key}: {value} times")
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HOME, capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "unknown"
