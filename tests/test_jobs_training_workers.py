"""The same learning on one worker, on two, and 2 -> 1 -> 2 with whole and with split weights: processes joined by gloo,
without Ray.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_jobs_training import configuration

from jobs.checkpoints import Checkpoints
from jobs.monitor import LINES, read_lines
from jobs.pretrain import go_on
from jobs.replicas import Replicas
from jobs.training import Signals


def be_one_of_two(rank: int, tokens: Path, output: Path, meeting: str, strategy: str, sets: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        go_on(configuration(tokens, output, *sets), Replicas(rank, 2, strategy=strategy), Signals())
    finally:
        dist.destroy_process_group()


def on_two(tokens: Path, output: Path, strategy: str, *sets: str, join: bool = True) -> Any:
    meeting = f"{output}-{strategy}-{time.monotonic_ns()}"
    return mp.spawn(be_one_of_two, (tokens, output, meeting, strategy, sets), nprocs=2, join=join)


def on_one(tokens: Path, output: Path, *sets: str) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    go_on(configuration(tokens, output, *sets), Replicas(), Signals())
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def on_one_worker(text_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    output = tmp_path_factory.mktemp("one") / "run"
    on_one(text_shards, output)
    return read_lines(output / LINES)


def same_learning(output: Path, whole: list[dict[str, Any]]) -> list[int]:
    """Compares every step; how many workers took each."""
    lines = read_lines(output / LINES)
    assert [item["step"] for item in lines] == [item["step"] for item in whole]
    for mine, theirs in zip(lines, whole, strict=True):
        assert mine["digest"] == theirs["digest"], "the same bins under the same masks, bit for bit"
        assert (mine["masked"], mine["tokens"]) == (theirs["masked"], theirs["tokens"])
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert mine.get("heldout_loss") == pytest.approx(theirs.get("heldout_loss"), abs=1e-4)
    return [item["workers"] for item in lines]


@pytest.mark.slow
def test_two_one_two(on_one_worker: list[dict[str, Any]], text_shards: Path, tmp_path: Path) -> None:
    """Two with whole weights, one, and two with split weights, which write the model. Some steps have a single bin."""
    output = tmp_path / "run"
    on_two(text_shards, output, "ddp", "stop_after=6")
    on_one(text_shards, output, "stop_after=12")
    on_two(text_shards, output, "fsdp")
    assert same_learning(output, on_one_worker) == [2] * 6 + [1] * 6 + [2] * 8
    assert (output / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_killed_worker_costs_no_step(on_one_worker: list[dict[str, Any]], text_shards: Path, tmp_path: Path) -> None:
    """`kill -9` of the second of two between checkpoints; the first one fails with it, and both begin again."""
    output = tmp_path / "run"
    context = on_two(text_shards, output, "ddp", join=False)
    until = time.monotonic() + 120
    while len(read_lines(output / LINES)) < 8 and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(context.pids()[1], signal.SIGKILL)
    with pytest.raises(mp.ProcessExitedException):
        context.join()
    assert Checkpoints(str(output)).steps()[-1] in (5, 10, 15)
    on_two(text_shards, output, "ddp")
    assert set(same_learning(output, on_one_worker)) == {2}
