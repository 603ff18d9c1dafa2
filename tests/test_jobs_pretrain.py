"""Pretraining under Ray Train: the same bins, masks and losses on one worker, on two, on a number that changes, and
after `kill -9` of a worker and of the driver at random steps. What needs no worker is in the quick part.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.configuration import load
from jobs.monitor import LINES, read_lines
from jobs.phases import PretrainConfiguration
from jobs.pretrain import check, go_on
from jobs.replicas import Replicas
from jobs.state import begin, save_model
from jobs.training import Signals
from model.errors import InputError
from model.folder import read_folder
from pipeline.shards import MANIFEST, TokenShards

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "pretrain-60.json"
STEPS = 60
CONFIG = """
tokens = "{tokens}"
output = "{output}"
[model]
hidden_size = 32
intermediate_size = 48
num_layers = 3
num_heads = 2
[work]
dtype = "float32"
cpus_per_worker = 1
resize_every_s = 2.0
[keep]
checkpoint_every = 5
evaluate_every = 20
evaluation_bins = 3
[phases.stable]
tokens = 61_440
max_tokens = 128
tokens_per_bin = 512
tokens_per_step = 1536
learning_rate = 4e-3
warmup_tokens = 15_360
global_theta = 10_000
[phases.decay]
tokens = 30_720
max_tokens = 512
tokens_per_bin = 512
tokens_per_step = 1536
learning_rate = 4e-3
decay_tokens = 30_720
average_every = 5
global_theta = 160_000
"""
"""Sixty steps of three bins: two workers have two and one."""


def write_config(tokens: Path, folder: Path, name: str = "run") -> Path:
    file = folder / f"{name}.toml"
    file.write_text(CONFIG.format(tokens=tokens, output=folder / name))
    return file


def configuration(tokens: Path, folder: Path, *sets: str) -> PretrainConfiguration:
    return load(PretrainConfiguration, file=str(write_config(tokens, folder)), sets=sets, given={})


# What the driver sees before any worker starts.


def test_good_settings_pass(text_shards: Path, tmp_path: Path) -> None:
    phases = check(configuration(text_shards, tmp_path))
    assert sum(phase.num_steps for phase in phases) == STEPS


@pytest.mark.parametrize(
    "sets, message",
    [
        (["tokens=nowhere"], "nowhere holds no token shards"),
        (["model.start=nowhere/at/all"], "no model folder at"),
        (["model.preset=huge"], "no preset is called 'huge'"),
        (["work.min_workers=3", "work.workers=2"], "min_workers 3 is more than work.workers 2"),
        (["model.start=a/b/c", "model.tile_from=d/e/f"], "both given"),
        (["phases.last.tokens=100"], "phase 'last': its 100 tokens"),
        (["model.hidden_size=100000", "model.num_layers=500", "model.num_heads=1000"], "needs .* MB for checkpoints"),
    ],
)
def test_what_is_wrong_is_one_line(sets: list[str], message: str, text_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        check(configuration(text_shards, tmp_path, *sets))


def test_shards_of_another_tokenizer(text_shards: Path, tmp_path: Path, tiny_model_folder: Path) -> None:
    with pytest.raises(InputError, match="made with another tokenizer"):
        check(configuration(text_shards, tmp_path, f"model.start={json.dumps(str(tiny_model_folder))}"))


@pytest.fixture(scope="module")
def small_model(text_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the configuration's model may grow out of, its tokenizer included."""
    folder = tmp_path_factory.mktemp("small")
    made = configuration(text_shards, folder, "model.num_layers=2")
    manifest = TokenShards.open(str(text_shards)).manifest
    save_model(begin(made, manifest, Replicas()), str(folder), str(text_shards / "tokenizer"), first=True)
    return folder / "model"


@pytest.mark.parametrize(
    "sets, message",
    [
        ([], None),
        (["model.tile_from=nowhere/at/all"], "no model folder at"),
        (['objective.task="causal"'], "tile_from is for encoders"),
        (["model.num_heads=4"], "head_size 8 cannot grow out of one with 16"),
        (["model.num_layers=1"], "num_layers 1 cannot grow out of a larger one, of 2"),
        (["tokens=OTHER"], "made with another tokenizer"),
    ],
)
def test_what_cannot_grow_is_one_line(
    sets: list[str], message: str | None, small_model: Path, text_shards: Path, tmp_path: Path
) -> None:
    """On the driver, before a weight is read."""
    manifest = json.loads((text_shards / MANIFEST).read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / MANIFEST).write_text(json.dumps(manifest | {"tokenizer": "f" * 32}))
    sets = [item.replace("OTHER", json.dumps(str(tmp_path / "other"))) for item in sets]
    made = configuration(text_shards, tmp_path, f"model.tile_from={json.dumps(str(small_model))}", *sets)
    if message is None:
        check(made)
        return
    with pytest.raises(InputError, match=message):
        check(made)


def test_a_bare_encoder_grows_into_nothing(text_shards: Path, tmp_path: Path, tiny_model_folder: Path) -> None:
    with pytest.raises(InputError, match=r"has no masked-token head \(ModernBertModel\)"):
        check(configuration(text_shards, tmp_path, f"model.tile_from={json.dumps(str(tiny_model_folder))}"))


def test_a_changed_manifest_under_a_resumed_run(text_shards: Path, tmp_path: Path) -> None:
    """And a checkpoint of another architecture, through the command, with its status and its line."""
    import shutil

    from jobs.cli import main

    tokens = tmp_path / "tokens"
    shutil.copytree(text_shards, tokens)
    settings = configuration(tokens, tmp_path, "stop_after=1")
    assert go_on(settings, Replicas(), Signals())["status"] == "stopped"
    assert main(["pretrain", str(tmp_path / "run.toml"), "--set", "model.num_layers=4"]) == 2
    manifest = json.loads((tokens / "manifest.json").read_text())
    manifest["corpus"] = "another"
    (tokens / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="not those that this run began with"):
        check(settings)
    assert main(["pretrain", str(tmp_path / "run.toml")]) == 2


# Under Ray. Each run is a process of its own with a Ray of its own, as a user starts it.


class Command:
    """`nightloom pretrain` in a process group of its own, so that everything it started can be ended with it."""

    def __init__(self, config: Path, *sets: str) -> None:
        self.output = config.with_suffix("")
        arguments = [sys.executable, "-m", "jobs.cli", "pretrain", str(config), "--json"]
        for item in sets:
            arguments += ["--set", item]
        env = os.environ | {"OMP_NUM_THREADS": "1", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
        self.process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )

    def steps(self) -> int:
        lines = read_lines(self.output / LINES)
        return lines[-1]["step"] if lines else 0

    def wait_for(self, step: int, timeout_s: float = 1200) -> None:
        until = time.monotonic() + timeout_s
        while self.steps() < step:
            assert self.process.poll() is None, self.process.stderr.read() if self.process.stderr else ""
            assert time.monotonic() < until, f"only {self.steps()} steps"
            time.sleep(0.05)

    def wait_for_workers(self, count: int, timeout_s: float = 1200) -> None:
        """Until steps are taken by so many."""
        until = time.monotonic() + timeout_s
        while not (lines := read_lines(self.output / LINES)) or lines[-1]["workers"] != count:
            assert self.process.poll() is None, self.process.stderr.read() if self.process.stderr else ""
            assert time.monotonic() < until, f"the group is not of {count} workers"
            time.sleep(0.05)

    def workers(self) -> list[int]:
        """Process ids of the training workers of this command."""
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    name = (folder / "cmdline").read_bytes()
                    session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
                except (OSError, ValueError):
                    continue
                if b"RayTrainWorker" in name and session == os.getsid(self.process.pid):
                    found.append(int(folder.name))
        return found

    def finish(self, timeout_s: float = 1200) -> dict[str, Any]:
        out, err = self.process.communicate(timeout=timeout_s)
        assert self.process.returncode == 0, err
        return json.loads(out)

    def kill(self) -> None:
        """The driver, and with it everything it started, at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def golden() -> list[dict[str, Any]]:
    """Steps of the configuration above on one worker, in one process: `test_golden_losses_of_sixty_steps` has them."""
    return json.loads(GOLDEN.read_text())


def kept(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What of the lines does not depend on where they were computed, but for the last digits of losses."""
    names = ("step", "digest", "masked", "loss", "heldout_loss")
    return [{name: item[name] for name in names if name in item} for item in lines]


def same_learning(output: Path) -> list[dict[str, Any]]:
    """Every step once, each with the golden bins and masks bit for bit, and the golden losses to 1e-4."""
    lines = read_lines(output / LINES)
    assert [item["step"] for item in lines] == list(range(1, STEPS + 1))
    for mine, theirs in zip(kept(lines), golden(), strict=True):
        assert mine == {name: pytest.approx(value, abs=1e-4) for name, value in theirs.items() if name != "digest"} | {
            "digest": theirs["digest"]
        }
    return lines


def test_golden_losses_of_sixty_steps(text_shards: Path, tmp_path: Path) -> None:
    """Without Ray. After an intended change: delete the file, run the test, look at the difference, commit it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert go_on(configuration(text_shards, tmp_path), Replicas(), Signals())["status"] == "done"
    torch.set_num_threads(threads)
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(kept(read_lines(tmp_path / "run" / LINES)), indent=1) + "\n")
    same_learning(tmp_path / "run")


@pytest.mark.slow
def test_one_worker_under_ray_learns_the_same(text_shards: Path, tmp_path: Path) -> None:
    command = Command(write_config(text_shards, tmp_path))
    report = command.finish()
    assert (report["status"], report["steps"]) == ("done", STEPS)
    assert read_folder(command.output / "model").config.global_theta == 160_000.0
    same_learning(command.output)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_workers_learn_what_one_learns(strategy: str, text_shards: Path, tmp_path: Path) -> None:
    command = Command(write_config(text_shards, tmp_path), "work.workers=2", f"work.strategy={strategy}")
    assert command.finish()["status"] == "done"
    lines = same_learning(command.output)
    assert {item["workers"] for item in lines} == {2}


@pytest.mark.slow
def test_killed_workers_and_drivers_change_nothing(text_shards: Path, tmp_path: Path) -> None:
    """A worker of two at a random step, the driver with everything at another; then the command on one worker."""
    chance = random.Random(os.getpid())
    first, second = sorted(chance.sample(range(6, 50), 2))
    print("killing a worker after step", first, "and the driver after step", max(second, first + 6))
    config = write_config(text_shards, tmp_path)
    command = Command(config, "work.workers=2")
    command.wait_for(first)
    victims = command.workers()
    assert len(victims) == 2
    os.kill(chance.choice(victims), signal.SIGKILL)
    command.wait_for(max(second, first + 6))
    command.kill()
    again = Command(config)
    assert again.finish()["status"] == "done"
    lines = same_learning(command.output)
    assert {item["workers"] for item in lines} == {1, 2}


@pytest.mark.slow
def test_sigterm_writes_a_checkpoint_first(text_shards: Path, tmp_path: Path) -> None:
    config = write_config(text_shards, tmp_path)
    command = Command(config, "keep.checkpoint_every=1000")
    command.wait_for(3)
    command.process.send_signal(signal.SIGTERM)
    command.process.communicate(timeout=200)
    assert command.process.returncode == 130
    checkpoints = sorted((command.output / "checkpoints").iterdir())
    assert len(checkpoints) == 1
    assert int(checkpoints[0].name.removeprefix("step-")) == command.steps() >= 3
