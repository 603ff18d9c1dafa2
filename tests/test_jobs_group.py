"""What a job that trains says at its end, and how a group of workers is told to stop. Whole runs under Ray are in
test_jobs_pretrain.py.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import group
from jobs.group import Board, Repeats, TrainingReport, anchored, fit, stop_wishes
from jobs.monitor import Display
from jobs.phases import PretrainConfiguration


def test_the_report_says_what_to_do_next() -> None:
    report = TrainingReport("pretrain", "stopped", "out", 12, 34_567, 5.5, None, 3.0)
    assert "the same command goes on" in report.summary()
    assert json.loads(report.to_json())["tokens"] == 34_567


def test_steps_that_are_taken_again_are_counted_with_their_tokens() -> None:
    """Up to 5, from 4 again, and once more."""
    repeats = Repeats()
    for step in (1, 2, 3, 4, 5, 4, 5, 6, 4, 5, 6, 7):
        repeats.add({"step": step, "tokens": step * 100})
    assert (repeats.steps, repeats.tokens) == (2 + 3, 500)
    assert [step for step, _ in repeats.taken] == list(range(1, 8))
    report = TrainingReport("pretrain", "done", "out", 7, 700, 5.5, None, 3.0, repeats.steps, repeats.tokens)
    assert "5 steps, 41.7% of all tokens" in report.summary()
    assert "repeated" not in TrainingReport("pretrain", "done", "out", 7, 700, 5.5, None, 3.0).summary()


def test_the_first_line_of_a_run_may_be_taken_again() -> None:
    repeats = Repeats()
    for step in (11, 11, 12):
        repeats.add({"step": step, "tokens": step * 100})
    assert (repeats.steps, repeats.tokens) == (1, 0)


def test_workers_find_what_the_driver_named(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    settings = {
        "output": "build/run",
        "tokens": "s3://bucket/tokens",
        "model": {"start": "models", "tile_from": None, "preset": "models"},
        "data": {"pairs": {"path": "answerdotai/ModernBERT-base", "share": 1.0}},
        "phases": {"stable": {"tokens": 4096}},
    }
    assert anchored(settings) == settings | {
        "output": str(tmp_path / "build" / "run"),
        "model": {"start": str(tmp_path / "models"), "tile_from": None, "preset": "models"},
    }


class Trainer:
    """Instead of Ray Train's: does what a test says, for twenty seconds at most."""

    does: Callable[[], Any]

    def __init__(self, *given: Any, **options: Any) -> None:
        pass

    def fit(self) -> Any:
        type(self).does()
        return SimpleNamespace(return_value={"status": "done", "step": 1})


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    """A board in this process, where `fit` has an actor."""
    import ray.train.torch

    made = Board()
    remote = SimpleNamespace(**{name: SimpleNamespace(remote=getattr(made, name)) for name in ("take", "stop")})
    node = SimpleNamespace(get_node_id=lambda: "0" * 56)
    fake = SimpleNamespace(
        remote=lambda **options: lambda kind: SimpleNamespace(remote=lambda: remote),
        get=lambda value: value,
        kill=lambda actor: None,
        get_runtime_context=lambda: node,
    )
    monkeypatch.setattr(group, "ray", fake)
    monkeypatch.setattr(ray.train.torch, "TorchTrainer", Trainer)
    return made


def watch(display: Any) -> tuple[dict[str, Any], Repeats]:
    repeats = Repeats()
    settings = PretrainConfiguration.model_validate({"output": "o", "tokens": "t", "phases": {"a": {"tokens": 1}}})
    return fit(lambda job: {}, settings, display, repeats), repeats


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)


def test_a_line_that_cannot_be_shown_ends_no_run(
    board: Board, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Display):
        def show(self, line: Any) -> None:
            raise TypeError("unsupported format string")

    board.post({"step": 1, "tokens": 100})
    monkeypatch.setattr(Trainer, "does", staticmethod(lambda: until(lambda: not board.lines)), raising=False)
    result, repeats = watch(Broken(10))
    assert result["status"] == "done"
    assert repeats.taken == [(1, 100)]
    assert "the line of step 1 cannot be shown" in caplog.text


def test_a_second_signal_does_not_wait_for_the_training(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def train() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        until(lambda: board.stopping)
        os.kill(os.getpid(), signal.SIGINT)
        over.wait(20)

    monkeypatch.setattr(Trainer, "does", staticmethod(train), raising=False)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        watch(Display(10))
    assert board.stopping, "the first one asks for a checkpoint"
    assert time.monotonic() - started < 10
    over.set()


def test_what_a_training_raises_is_raised(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("no place for a worker")

    monkeypatch.setattr(Trainer, "does", staticmethod(fail), raising=False)
    with pytest.raises(RuntimeError, match="no place"):
        watch(Display(10))


def test_one_signal_is_a_wish_and_a_second_an_interrupt() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_wishes() as wishes:
        assert not wishes.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert wishes.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before
