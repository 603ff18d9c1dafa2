"""The lines of a run: each step once, whatever was taken again; events, a plot, and what the terminal shows."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from jobs.monitor import LINES, PLOT, Ceiling, Display, Monitor, in_words, measure_ceiling, read_lines, smooth
from model.config import preset


def line(step: int, **more: Any) -> dict[str, Any]:
    values = {"step": step, "phase": "stable", "loss": 9 - step / 10, "accuracy": 0.01 * step, "gradient_norm": 1.0}
    values |= {"learning_rate": 1e-3, "tokens": 1000 * step, "tokens_per_s": 5000.0, "mfu": 0.25, "padding": 0.001}
    return values | {"data_wait": 0.002, "skipped": False} | more


def test_steps_taken_again_stand_once(tmp_path: Path) -> None:
    monitor = Monitor(str(tmp_path), 0)
    for step in range(1, 8):
        monitor.write(line(step))
    monitor.lines.write('{"step": 8, "lo')  # cut off by a crash
    monitor.close()
    resumed = Monitor(str(tmp_path), 5)
    for step in range(6, 11):
        resumed.write(line(step, again=True, heldout_loss=8.5 if step == 10 else None))
    resumed.close(plot=True)
    lines = read_lines(tmp_path / LINES)
    assert [item["step"] for item in lines] == list(range(1, 11))
    assert [item["step"] for item in lines if item.get("again")] == list(range(6, 11))
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_the_plot_is_svg_with_both_losses(tmp_path: Path) -> None:
    monitor = Monitor(str(tmp_path), 0)
    for step in range(1, 30):
        monitor.write(line(step, heldout_loss=9.0 if step % 10 == 0 else None))
    monitor.close(plot=True)
    root = ElementTree.parse(tmp_path / PLOT).getroot()
    assert root.tag.endswith("svg")
    text = (tmp_path / PLOT).read_text()
    assert "held out" in text
    assert "training, smoothed" in text


def test_events_can_be_read_back(tmp_path: Path) -> None:
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import RecordWriter  # noqa: F401  (the format that is read below)

    monitor = Monitor(str(tmp_path), 0)
    monitor.write(line(3, heldout_loss=8.25))
    monitor.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, values, at = file.read_bytes(), {}, 0
    while at < len(data):  # length (8 bytes), its checksum (4), the event, its checksum (4)
        size = int.from_bytes(data[at : at + 8], "little")
        event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
        values |= {value.tag: (event.step, round(value.simple_value, 6)) for value in event.summary.value}
        at += 16 + size
    assert values["heldout_loss"] == (3, 8.25)
    assert values["loss"] == (3, 8.7)
    assert values["mfu"] == (3, 0.25)


def test_on_s3_what_was_mirrored_is_found_by_the_next(
    s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    output = f"s3://bucket/{tmp_path.name}/run"
    monitor = Monitor(output, 0)
    monitor.write(line(1))
    monitor.write(line(2))
    monitor.mirror()
    monitor.write(line(3))  # lost with the process
    monitor.lines.close()
    resumed = Monitor(output, 2)
    resumed.write(line(3, again=True))
    resumed.close(plot=True)
    with resumed.files.open_input_stream(f"{resumed.path}/{LINES}") as stream:
        lines = [json.loads(text) for text in stream.read().decode().splitlines()]
    assert [(item["step"], item.get("again")) for item in lines] == [(1, None), (2, None), (3, True)]
    assert resumed.files.get_file_info(f"{resumed.path}/{PLOT}").is_file
    assert not resumed.folder.exists()


def test_terminal_lines_say_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(100)
    display.EVERY_S = 0.0  # type: ignore[misc]
    display.show(line(7, heldout_loss=8.125))
    display.close()
    shown = capsys.readouterr().err
    for part in ("stable step 7 of 100", "loss 8.300", "held out 8.125", "5,000 tokens/s", "MFU 25%", "data wait 0.2%"):
        assert part in shown
    assert "skipped: loss 8.300, gradient norm 1.00" in in_words(line(7, skipped=True))
    assert in_words(line(7, skipped=True, gradient_norm=None)) == "skipped: loss 8.300, overflow"


def test_a_running_mean_begins_at_the_first_value() -> None:
    assert smooth([4.0]) == [4.0]
    assert smooth([4.0, 2.0], memory=0.5) == [4.0, pytest.approx(8 / 3)]


def test_a_ceiling_that_was_measured_in_company_is_measured_again() -> None:
    speeds = iter([20.0, 100.0, 90.0])
    ceiling = Ceiling(lambda: next(speeds))
    assert ceiling.share(10) == 0.5
    assert ceiling.share(55) == 0.55  # faster than it was thought possible: the second measurement counts
    assert ceiling.share(60) == 0.6
    assert ceiling.share(110) == 1.0  # and where even that is too low, the step itself
    assert ceiling.share(55) == 0.5


def test_a_ceiling_is_a_speed() -> None:
    config = preset("ettin-17m", num_layers=1, vocab_size=64)
    assert 1e8 < measure_ceiling(config, torch.float32, torch.device("cpu")) < 1e14
