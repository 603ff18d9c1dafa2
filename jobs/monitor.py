"""What a person watches of a training: a line for every step, as JSON, as TensorBoard events and in the terminal, and a
plot of the losses at the end.

The first worker writes; the driver shows. Lines of steps that a resumed run takes again are dropped first, so that the
file holds each step once.
"""

import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pyarrow.fs import FileSelector, FileType, LocalFileSystem

from jobs.checkpoints import copy_file
from jobs.report import clock
from model.config import EncoderConfig
from model.flops import linear_weights
from pipeline import storage

LINES, EVENTS, PLOT = "metrics.jsonl", "tensorboard", "loss.svg"
SCALARS = (
    "loss",
    "accuracy",
    "cosine",
    "gradient_norm",
    "learning_rate",
    "tokens_per_s",
    "mfu",
    "padding",
    "data_wait",
    "heldout_loss",
    "heldout_accuracy",
    "ordering_accuracy",
)
"""Values of a line that are drawn over the steps."""


class Monitor:
    """Writes the lines of a run; made on the first worker only.

    Args:
        output: folder or s3:// prefix of the run. What goes to S3 is written on the local disk and copied by `mirror`.
        step: steps done already; lines after it are of steps that will be taken again.
        show: called with every line, beside the writing.
    """

    def __init__(self, output: str, step: int, show: Callable[[dict[str, Any]], None] | None = None) -> None:
        from tensorboardX import SummaryWriter

        self.files, self.path = storage.filesystem(output)
        self.show = show
        self.is_local = isinstance(self.files, LocalFileSystem)
        self.folder = Path(self.path if self.is_local else tempfile.mkdtemp(prefix="nightloom-metrics-"))
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.is_local:
            self._fetch()
        lines = [line for line in read_lines(self.folder / LINES) if line["step"] <= step]
        partial = self.folder / f".{LINES}"
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        partial.replace(self.folder / LINES)
        self.lines = (self.folder / LINES).open("a", encoding="utf-8", buffering=1)
        # Its own suffix is the second it was made in: two starts in one second would write one file.
        unique = f".{os.getpid()}-{step}"
        self.events = SummaryWriter(str(self.folder / EVENTS), purge_step=step + 1, filename_suffix=unique)

    def write(self, line: dict[str, Any]) -> None:
        """Add a step's line."""
        self.lines.write(json.dumps(line) + "\n")
        for name in SCALARS:
            if line.get(name) is not None:
                self.events.add_scalar(name, line[name], line["step"])
        if self.show:
            self.show(line)

    def mirror(self) -> None:
        """Bring what was written so far to S3; on a local disk it is there already."""
        self.events.flush()
        if self.is_local:
            return
        for file in self.folder.rglob("*"):
            if file.is_file():
                name = f"{self.path}/{file.relative_to(self.folder).as_posix()}"
                copy_file(LocalFileSystem(), str(file), self.files, name)

    def close(self, *, plot: bool = False) -> None:
        self.lines.close()
        if plot:
            plot_losses(read_lines(self.folder / LINES), self.folder / PLOT)
        self.events.close()
        self.mirror()
        if not self.is_local:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _fetch(self) -> None:
        info = self.files.get_file_info(f"{self.path}/{LINES}")
        if info.type == FileType.File:
            copy_file(self.files, info.path, LocalFileSystem(), str(self.folder / LINES))
        for info in self.files.get_file_info(FileSelector(f"{self.path}/{EVENTS}", allow_not_found=True)):
            (self.folder / EVENTS).mkdir(exist_ok=True)
            copy_file(self.files, info.path, LocalFileSystem(), str(self.folder / EVENTS / info.base_name))


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last one that was cut off by a crash is left out."""
    if not file.exists():
        return []
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def plot_losses(lines: Iterable[Mapping[str, Any]], file: Path) -> None:
    """Training and held-out loss over the tokens, and the learning rate, as SVG."""
    from matplotlib.figure import Figure

    taken = [line for line in lines if line.get("loss") is not None]
    if not taken:
        return
    tokens = [line["tokens"] for line in taken]
    losses = [line["loss"] for line in taken]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(tokens, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(tokens, smooth(losses), color="tab:blue", label="training, smoothed")
    held_out = [(line["tokens"], line["heldout_loss"]) for line in taken if line.get("heldout_loss") is not None]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="tab:red", marker="o", markersize=3, label="held out")
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats)")
    axes.legend(loc="upper right")
    axes.grid(alpha=0.3)
    rates = axes.twinx()
    rates.plot(tokens, [line["learning_rate"] for line in taken], color="gray", linewidth=0.8, linestyle=":")
    rates.set_ylabel("learning rate (dotted)")
    rates.set_ylim(bottom=0)
    figure.savefig(file, format="svg")


def smooth(values: list[float], memory: float = 0.97) -> list[float]:
    """A running mean that forgets; corrected for its beginning."""
    total, weight, means = 0.0, 0.0, []
    for value in values:
        total, weight = memory * total + value, memory * weight + 1
        means.append(total / weight)
    return means


class Display:
    """Shows lines in the terminal, on stderr: a bar in a terminal, now and then a line elsewhere."""

    EVERY_S = 30.0
    """Seconds between lines where stderr is not a terminal."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self.started = self.last_line = time.monotonic()
        self.first_step: int | None = None
        self.bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                TextColumn("{task.fields[phase]}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[values]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=Console(stderr=True),
            )
            self.task = self.bar.add_task("pretrain", total=total_steps, phase="starting", values="")
            self.bar.start()

    def show(self, line: Mapping[str, Any]) -> None:
        """Show the line of a step."""
        if self.first_step is None:  # before it, Ray and the workers were starting
            self.first_step, self.started = line["step"], time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=line["step"], phase=line["phase"], values=in_words(line))
            if line.get("heldout_loss") is not None:
                self.bar.print(f"step {line['step']:,}: held-out loss {line['heldout_loss']:.4f}")
        elif time.monotonic() - self.last_line >= self.EVERY_S or line.get("heldout_loss") is not None:
            self.last_line = time.monotonic()
            done = line["step"] - self.first_step
            left = (self.last_line - self.started) * (self.total_steps - line["step"]) / max(done, 1)
            where = f"{line['phase']} step {line['step']:,} of {self.total_steps:,}"
            ahead = f", about {clock(left)} left" if done else ""
            print(f"nightloom: {where}, {in_words(line)}{ahead}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def in_words(line: Mapping[str, Any]) -> str:
    """What matters of a line, short."""
    if line.get("skipped"):
        norm = line["gradient_norm"]
        why = "overflow" if norm is None else f"gradient norm {norm:.2f}"
        return f"skipped: loss {line['loss']:.3f}, {why}"
    parts = [f"loss {line['loss']:.3f}"]
    parts += [f"acc {line['accuracy']:.1%}"] if "accuracy" in line else []
    parts += [f"cosine {line['cosine']:.3f}"] if "cosine" in line else []
    parts += [f"norm {line['gradient_norm']:.2f}"]
    if line.get("heldout_loss") is not None:
        parts.append(f"held out {line['heldout_loss']:.3f}")
    parts += [f"lr {line['learning_rate']:.1e}", f"{line['tokens_per_s']:,.0f} tokens/s"]
    parts += [f"MFU {line['mfu']:.0%}", f"padding {line['padding']:.1%}", f"data wait {line['data_wait']:.1%}"]
    return ", ".join(parts)


class Ceiling:
    """The speed of plain matrix products, which MFU is a share of.

    It is measured when a worker starts, and so do its neighbours then: one that shared its cores read a fifth of what
    they can do, and 275 % of it later. A step that is faster has it measured again.
    """

    def __init__(self, measure: Callable[[], float]) -> None:
        self.measure = measure
        self.flops_per_s = measure()

    def share(self, flops_per_s: float) -> float:
        """MFU of a step, at most 1."""
        if flops_per_s > self.flops_per_s:
            self.flops_per_s = max(flops_per_s, self.measure())
        return flops_per_s / self.flops_per_s


def measure_ceiling(config: EncoderConfig, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of plain matrix products at a layer's shapes: what MFU is a share of. Takes about half a second."""
    rows = 16_384 if device.type == "cuda" else 2_048
    products = [
        (
            torch.randn(rows, inputs, device=device, dtype=dtype),
            torch.randn(outputs, inputs, device=device, dtype=dtype),
        )
        for inputs, outputs in linear_weights(config)
    ]
    flops = sum(2 * rows * weight.numel() for _, weight in products)

    def run() -> float:
        started = time.perf_counter()
        for x, weight in products:
            F.linear(x, weight)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    run()
    fastest, until = math.inf, time.perf_counter() + 0.4
    while time.perf_counter() < until:
        fastest = min(fastest, run())
    return flops / fastest
