"""Fine-tuning on several workers: two are one, and under Ray a run whose driver is killed goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_jobs_finetune import configuration, train, write_rows

from jobs.finetune import check, go_on
from jobs.monitor import LINES, read_lines
from jobs.replicas import Replicas
from jobs.training import Signals
from jobs.tuning import FinetuneConfiguration


def be_one_of_two(rank: int, folder: str, model: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    try:
        for task in ("contrastive", "tagging"):
            settings = two_workers(Path(folder), Path(model), task, "two")
            assert go_on(settings, check(settings)[1], Replicas(rank, 2), Signals())["status"] == "done"
    finally:
        dist.destroy_process_group()


def two_workers(folder: Path, model: Path, task: str, name: str) -> FinetuneConfiguration:
    sets = ("schedule.steps=3", "schedule.tokens_per_bin=128", "heldout=0.2")
    return configuration(model, folder / f"{name}-{task}", {task: folder / f"{task}.jsonl"}, *sets)


def test_two_workers_are_one(tiny_masked_folder: Path, tmp_path: Path) -> None:
    """The same bins; losses, norms and held-out losses up to the order of sums in float32."""
    for task in ("contrastive", "tagging"):
        write_rows(tmp_path, task, 60)
    mp.spawn(be_one_of_two, (str(tmp_path), str(tiny_masked_folder)), nprocs=2)
    for task in ("contrastive", "tagging"):
        alone = train(two_workers(tmp_path, tiny_masked_folder, task, "one"))
        together = read_lines(tmp_path / f"two-{task}" / LINES)
        assert [line["digest"] for line in together] == [line["digest"] for line in alone]
        for key in ("loss", "gradient_norm", "accuracy"):
            assert [line[key] for line in together] == pytest.approx([line[key] for line in alone], rel=1e-4)
        assert together[-1]["heldout_loss"] == pytest.approx(alone[-1]["heldout_loss"], rel=1e-4)


@pytest.mark.slow
def test_the_command_trains_on_two_workers_and_goes_on_after_a_kill(tiny_masked_folder: Path, tmp_path: Path) -> None:
    """The driver is killed with SIGKILL at a step and the command run again; beside it a run that was left alone."""
    rows = write_rows(tmp_path, "contrastive", 240)
    text = """
output = "{output}"
[model]
start = "{model}"
[data.contrastive]
path = "{rows}"
task = "contrastive"
[schedule]
steps = 40
examples_per_step = 16
tokens_per_bin = 256
learning_rate = 2e-3
[work]
workers = 2
cpus_per_worker = 1
dtype = "float32"
[keep]
checkpoint_every = 5
"""
    for name in ("whole", "killed"):
        file = tmp_path / f"{name}.toml"
        file.write_text(text.format(output=tmp_path / name, model=tiny_masked_folder, rows=rows), encoding="utf-8")
    command = [sys.executable, "-m", "jobs.cli", "finetune"]
    subprocess.run([*command, str(tmp_path / "whole.toml")], check=True, timeout=600)
    process = subprocess.Popen([*command, str(tmp_path / "killed.toml")], start_new_session=True)
    until = time.monotonic() + 300
    while time.monotonic() < until and len(read_lines(tmp_path / "killed" / LINES)) < 12:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run([*command, str(tmp_path / "killed.toml")], check=True, timeout=600)
    whole, killed = (read_lines(tmp_path / name / LINES) for name in ("whole", "killed"))
    assert [line["digest"] for line in killed] == [line["digest"] for line in whole]
    assert [line["loss"] for line in killed] == pytest.approx([line["loss"] for line in whole], rel=1e-3)
