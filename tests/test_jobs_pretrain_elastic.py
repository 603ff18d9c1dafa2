"""Machines that leave and come while a pretraining goes: a real cluster, its raylets side by side. The same bins, masks
and losses, whatever the number of workers was.
"""

import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from strikes import ancestors, own_raylets, processes, wait_until
from test_jobs_pretrain import STEPS, Command, same_learning, write_config

from jobs.checkpoints import Checkpoints
from jobs.monitor import LINES, read_lines

pytestmark = pytest.mark.slow

PAUSE_S = 1.0
"""Workers stand still for so long after every step that is seen: sixty tiny ones must outlast what a cluster takes to
notice. They start unhindered.
"""


class Machines:
    """A head with one place for a worker, and another machine with one, which comes and goes."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self.other = self.cluster.add_node(num_cpus=1)
        self.lines: Path | None = None
        """Where the run writes its steps."""
        self.ending = threading.Event()
        self.throttle = threading.Thread(target=self._hold_back)
        self.throttle.start()

    def lose(self) -> None:
        """The other machine, without a word."""
        self.cluster.remove_node(self.other, allow_graceful=False)

    def gain(self) -> None:
        self.other = self.cluster.add_node(num_cpus=1)

    def announce(self, after_s: float) -> None:
        """That the other machine will be taken away, as a cloud does."""
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        deadline_ms = int((time.time() + after_s) * 1000)
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        client = GcsClient(address=self.cluster.address)
        accepted, why = client.drain_node(self.other.node_id, reason, "the machine goes", deadline_ms)
        assert accepted, why

    def workers(self) -> list[int]:
        raylets = own_raylets()
        return [pid for pid, line in processes() if b"RayTrainWorker" in line and raylets & ancestors(pid)]

    def _hold_back(self) -> None:
        seen = 0
        while not self.ending.is_set():
            size = self.lines.stat().st_size if self.lines and self.lines.exists() else 0
            if size == seen:
                time.sleep(0.02)
                continue
            seen, workers = size, self.workers()
            for number, pause in ((signal.SIGSTOP, PAUSE_S), (signal.SIGCONT, 0.0)):
                for pid in workers:
                    with suppress(ProcessLookupError):
                        os.kill(pid, number)
                time.sleep(pause)

    def stop_holding_back(self) -> None:
        self.ending.set()
        self.throttle.join()

    def end(self) -> None:
        self.stop_holding_back()
        self.cluster.shutdown()


@pytest.fixture
def machines() -> Iterator[Machines]:
    made = Machines()
    try:
        yield made
    finally:
        made.end()


@pytest.fixture
def start(machines: Machines, text_shards: Path, tmp_path: Path) -> Iterator[Any]:
    commands = []

    def begin(*sets: str) -> Command:
        address = f"work.address={json.dumps(machines.cluster.address)}"
        config = write_config(text_shards, tmp_path)
        commands.append(Command(config, "work.workers=2", "work.min_workers=1", address, *sets))
        machines.lines = commands[0].output / LINES
        return commands[0]

    yield begin
    for command in commands:
        if command.process.poll() is None:
            command.kill()


def sizes(lines: list[dict[str, Any]]) -> list[int]:
    return [size for size, _ in itertools.groupby(item["workers"] for item in lines)]


def test_a_group_that_shrinks_and_grows_learns_the_same(machines: Machines, start: Any) -> None:
    """2 -> 1 -> 2: a machine vanishes, and another one comes."""
    command = start()
    command.wait_for(8)
    lost = time.monotonic()
    machines.lose()
    command.wait_for_workers(1)
    print(f"goes on with one worker after {time.monotonic() - lost:.0f} s")
    # What it learns after its last checkpoint is taken again by the group that follows.
    kept = Checkpoints(str(command.output))
    before = max(kept.steps(), default=0)
    assert wait_until(lambda: max(kept.steps(), default=0) > before, 120)
    gained = time.monotonic()
    machines.gain()
    command.wait_for_workers(2)
    print(f"goes on with two workers after {time.monotonic() - gained:.0f} s")
    machines.stop_holding_back()
    report = command.finish(900)
    assert report["status"] == "done"
    assert 0 < report["repeated_steps"] < STEPS
    assert 0 < report["wasted_tokens"] < report["tokens"]
    print(f"{report['repeated_steps']} steps were taken again")
    assert sizes(same_learning(command.output)) == [2, 1, 2]


def test_a_machine_that_is_announced_to_go_costs_no_checkpoint_interval(machines: Machines, start: Any) -> None:
    """Checkpoints come only where a machine is about to be taken away; the run goes on from that one."""
    command = start("keep.checkpoint_every=1000")
    command.wait_for(3)
    machines.announce(after_s=30)
    kept = Checkpoints(str(command.output))
    until = time.monotonic() + 60
    while not kept.steps() and time.monotonic() < until:
        time.sleep(0.1)
    saved = kept.steps()
    assert saved, "a notice was given and no checkpoint is there"
    machines.lose()
    command.wait_for_workers(1)
    again = read_lines(command.output / LINES)
    assert next(item["step"] for item in again if item["workers"] == 1) == saved[0] + 1
    machines.stop_holding_back()
    assert command.finish(900)["status"] == "done"
    assert sizes(same_learning(command.output)) == [2, 1]


def test_a_machine_that_comes_costs_no_checkpoint_interval(machines: Machines, start: Any) -> None:
    """The small group writes a checkpoint when it sees that it will be replaced by a larger one."""
    machines.lose()
    command = start("keep.checkpoint_every=1000", "work.resize_every_s=20")
    command.wait_for(3)
    machines.gain()
    command.wait_for_workers(2)
    machines.stop_holding_back()
    report = command.finish(900)
    assert report["status"] == "done"
    print(f"{report['repeated_steps']} steps were taken again")
    assert sizes(same_learning(command.output)) == [1, 2]
