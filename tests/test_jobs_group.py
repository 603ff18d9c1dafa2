"""What a job that trains says at its end, and how a group of workers is told to stop. Whole runs under Ray are in
test_jobs_pretrain.py.
"""

import json
import os
import signal

import pytest

from jobs.group import Repeats, TrainingReport, anchored, stop_wishes


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


def test_one_signal_is_a_wish_and_a_second_an_interrupt() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_wishes() as wishes:
        assert not wishes.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert wishes.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before
