"""Checkpoints: whole or not there, the latest few kept, on a disk and on S3, and one line where there is no room."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pyarrow.fs import FileSelector, LocalFileSystem, SubTreeFileSystem

from jobs.checkpoints import COPY_BYTES, RECORD, TENSORS, Checkpoint, Checkpoints, copy_file, on_host
from model.errors import InputError
from pipeline.storage import filesystem


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {"weights.a": torch.full((3, 4), float(step)), "b": torch.arange(5)}, {"tokens": step * 10})


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    if request.param == "local":
        return lambda: str(tmp_path / "run")
    for name, value in request.getfixturevalue("s3_server").items():
        monkeypatch.setenv(name, value)
    return lambda: f"s3://bucket/{tmp_path.name}/run"


def test_what_is_saved_comes_back_and_the_oldest_go(output: Callable[[], str]) -> None:
    checkpoints = Checkpoints(output(), keep=2)
    assert checkpoints.steps() == []
    for step in (5, 10, 15):
        checkpoints.save(checkpoint(step))
    checkpoints.wait()
    assert Checkpoints(output()).steps() == [10, 15]
    loaded = Checkpoints(output()).load(15)
    assert torch.equal(loaded.tensors["weights.a"], torch.full((3, 4), 15.0))
    assert torch.equal(loaded.tensors["b"], torch.arange(5))
    assert (loaded.step, loaded.record["tokens"], loaded.record["step"]) == (15, 150, 15)


def test_a_write_that_was_cut_off_is_no_checkpoint(output: Callable[[], str]) -> None:
    """Its tensors are there, its record is not: as a killed process leaves it on S3; on a disk it has another name."""
    checkpoints = Checkpoints(output())
    checkpoints.save(checkpoint(5))
    checkpoints.wait()
    for name in ("step-000000010", ".partial-step-000000010"):
        if checkpoints.is_local:
            Path(f"{checkpoints.path}/{name}").mkdir()
        with checkpoints.files.open_output_stream(f"{checkpoints.path}/{name}/{TENSORS}") as stream:
            stream.write(b"half")
    assert checkpoints.steps() == [5]
    checkpoints.save(checkpoint(10))
    checkpoints.wait()
    assert checkpoints.steps() == [5, 10]
    assert checkpoints.load(10).record["tokens"] == 100


class Interrupted(SubTreeFileSystem):
    """Files of which a first piece can be read."""

    def open_input_stream(self, path: str) -> Any:  # type: ignore[override]
        first = [b"x" * 1000]

        def read(count: int) -> bytes:
            assert count == COPY_BYTES
            if not first:
                raise KeyboardInterrupt
            return first.pop()

        return contextlib.nullcontext(SimpleNamespace(read=read))


def test_a_copy_that_is_interrupted_leaves_nothing(output: Callable[[], str], tmp_path: Path) -> None:
    """On S3 too, where a stream that is closed in the middle makes an object."""
    files, path = filesystem(output())
    files.create_dir(path)
    (tmp_path / "whole").write_bytes(b"abc")
    copy_file(LocalFileSystem(), str(tmp_path / "whole"), files, f"{path}/whole")
    with pytest.raises(KeyboardInterrupt):
        copy_file(Interrupted("/", LocalFileSystem()), "a", files, f"{path}/cut")
    found = files.get_file_info(FileSelector(path))
    assert [(info.base_name, info.size) for info in found if info.is_file] == [("whole", 3)]


def test_writing_goes_on_beside_training(tmp_path: Path) -> None:
    """What is handed over is a copy: a step after `save` does not change what is written."""
    weights = torch.zeros(1000)
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(Checkpoint(1, {"w": on_host(weights)}, {}))
    weights += 1
    checkpoints.wait()
    assert not checkpoints.load(1).tensors["w"].any()


def test_a_write_that_fails_is_raised_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(checkpoint(1))
    with pytest.raises(OSError):
        checkpoints.wait()


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """As /dev/full says it, which takes no byte."""
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(checkpoint(1))
    checkpoints.wait()
    with pytest.raises(OSError) as caught, open("/dev/full", "wb", buffering=0) as full:
        full.write(b"x")
    checkpoints.failure = caught.value
    with pytest.raises(InputError, match="the disk is full"):
        checkpoints.wait()
    assert checkpoints.steps() == [1]


def test_damaged_ones_are_one_line(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    for step in (1, 2):
        checkpoints.save(checkpoint(step))
    checkpoints.wait()
    folder = Path(checkpoints.path)
    (folder / "step-000000001" / TENSORS).write_bytes(b"not tensors")
    record = json.loads((folder / "step-000000002" / RECORD).read_text())
    (folder / "step-000000002" / RECORD).write_text(json.dumps(record | {"format": 99}))
    for step, message in ((1, "cannot be read"), (2, "format 99")):
        with pytest.raises(InputError, match=message):
            checkpoints.load(step)


def test_too_little_disk_is_one_line(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path / "not" / "there" / "yet"), keep=2)
    checkpoints.check_space(1000)
    with pytest.raises(InputError, match=r"needs .* MB for checkpoints and the disk has .* MB left"):
        checkpoints.check_space(1 << 50)
