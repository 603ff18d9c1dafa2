"""Checkpoints of a training: folders of safetensors and JSON, local or on S3, each whole or not there.

A checkpoint says nothing of the number of workers: tensors are whole, and the stream's state is a few integers. It is
written in a thread while training goes on, under a name that counts only when the last file is there.
"""

import contextlib
import errno
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.errors import InputError
from pipeline import storage

FOLDER = "checkpoints"
TENSORS, RECORD = "tensors.safetensors", "state.json"
FORMAT = 1
COPY_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is known at a step."""

    step: int
    tensors: Mapping[str, Tensor]
    """On the host."""
    record: Mapping[str, Any]
    """Everything else, as JSON has it."""


class Checkpoints:
    """The checkpoints of a run.

    Args:
        output: folder or s3:// prefix of the run.
        keep: how many of the latest stay.
    """

    def __init__(self, output: str, keep: int = 2) -> None:
        self.keep = keep
        self.files, path = storage.filesystem(output)
        self.path = f"{path.rstrip('/')}/{FOLDER}"
        self.thread: threading.Thread | None = None
        self.failure: BaseException | None = None

    @property
    def is_local(self) -> bool:
        return isinstance(self.files, LocalFileSystem)

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, oldest first."""
        found = self.files.get_file_info(FileSelector(self.path, allow_not_found=True, recursive=True))
        # The record is written last: what has none is a write that was cut off.
        names = [
            info.path.removeprefix(self.path).strip("/").split("/") for info in found if info.type == FileType.File
        ]
        return sorted(int(n[0].removeprefix("step-")) for n in names if n[0].startswith("step-") and n[-1] == RECORD)

    def read_record(self, step: int) -> dict[str, Any]:
        """A checkpoint's record.

        Raises:
            InputError: it cannot be read, or is of another version.
        """
        name = f"{self._folder(step)}/{RECORD}"
        try:
            with self.files.open_input_stream(name) as stream:
                record = json.loads(stream.read())
        except (OSError, ValueError) as error:
            raise InputError(f"the checkpoint {name} cannot be read: {storage.first_words(error)}") from None
        if record.get("format") != FORMAT:
            raise InputError(f"the checkpoint {name} has format {record.get('format')}, not {FORMAT}; start a new run")
        return record

    def load(self, step: int) -> Checkpoint:
        """A checkpoint, whole.

        Raises:
            InputError: it cannot be read.
        """
        record, name = self.read_record(step), f"{self._folder(step)}/{TENSORS}"
        try:
            with self._local_copy(name) as file:
                tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise InputError(f"the checkpoint {name} cannot be read: {storage.first_words(error)}") from None
        return Checkpoint(step, tensors, record)

    def save(self, checkpoint: Checkpoint) -> None:
        """Begin to write; waits only for the one before. Its tensors must not change any more.

        Raises:
            OSError: the one before could not be written.
        """
        self.wait()
        self.thread = threading.Thread(target=self._write_quietly, args=(checkpoint,), name="checkpoint")
        self.thread.start()

    def wait(self) -> None:
        """Until what was begun is written.

        Raises:
            InputError: the disk is full.
            OSError: it could not be written for another reason.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.failure is not None:
            failure, self.failure = self.failure, None
            if os.strerror(errno.ENOSPC) in str(failure):  # from Python or from safetensors
                raise InputError(f"{self.path}: the disk is full; the checkpoint before is whole") from failure
            raise failure

    def _write_quietly(self, checkpoint: Checkpoint) -> None:
        try:
            self._write(checkpoint)
        except BaseException as error:  # raised again by whoever waits
            self.failure = error

    def _write(self, checkpoint: Checkpoint) -> None:
        target = self._folder(checkpoint.step)
        record = json.dumps({"format": FORMAT, "step": checkpoint.step, **checkpoint.record}, indent=1).encode()
        if self.is_local:
            partial = Path(f"{self.path}/.partial-step-{checkpoint.step:09}")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_file(dict(checkpoint.tensors), partial / TENSORS)
            (partial / RECORD).write_bytes(record)
            for file in (partial / TENSORS, partial / RECORD, partial):
                synchronize(file)
            shutil.rmtree(target, ignore_errors=True)
            os.rename(partial, target)
            synchronize(Path(self.path))
        else:
            with tempfile.TemporaryDirectory(prefix="nightloom-checkpoint-") as folder:
                save_file(dict(checkpoint.tensors), Path(folder) / TENSORS)
                copy_file(LocalFileSystem(), f"{folder}/{TENSORS}", self.files, f"{target}/{TENSORS}")
            with self.files.open_output_stream(f"{target}/{RECORD}") as stream:
                stream.write(record)
        for step in self.steps()[: -self.keep]:
            self._delete(step)

    def _delete(self, step: int) -> None:
        """The record first: half a checkpoint must not look like one."""
        folder = self._folder(step)
        with contextlib.suppress(FileNotFoundError):
            self.files.delete_file(f"{folder}/{RECORD}")
        with contextlib.suppress(FileNotFoundError):
            self.files.delete_dir(folder)

    def _folder(self, step: int) -> str:
        return f"{self.path}/step-{step:09}"

    @contextlib.contextmanager
    def _local_copy(self, name: str) -> Any:
        if self.is_local:
            yield name
            return
        with tempfile.TemporaryDirectory(prefix="nightloom-checkpoint-") as folder:
            copy_file(self.files, name, LocalFileSystem(), f"{folder}/{TENSORS}")
            yield f"{folder}/{TENSORS}"

    def check_space(self, num_bytes: int) -> None:
        """See that one checkpoint more than are kept fits on the disk, beside those that lie there already.

        Raises:
            InputError: it does not.
        """
        if not self.is_local:
            return
        place = Path(self.path)
        present = sum(file.stat().st_size for file in place.rglob("*") if file.is_file()) if place.is_dir() else 0
        while not place.exists():
            place = place.parent
        wanted, free = (self.keep + 1) * num_bytes - present, shutil.disk_usage(place).free
        if wanted > free:
            raise InputError(
                f"{self.path} needs {megabytes(wanted)} for checkpoints and the disk has {megabytes(free)} left; "
                "free some, keep fewer (keep.checkpoints), or write to another place"
            )


def synchronize(path: Path) -> None:
    """Have a file, or the names in a folder, reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def copy_file(source: FileSystem, path: str, target: FileSystem, name: str) -> None:
    """Copy a file to where it is whole or not there.

    Closing a stream to S3 makes an object of whatever was written, and a stream cannot be given up: so the object of a
    copy that failed is taken away.
    """
    with source.open_input_stream(path) as stream:
        out = target.open_output_stream(name)
        try:
            while chunk := stream.read(COPY_BYTES):
                out.write(chunk)
        except BaseException:
            with contextlib.suppress(OSError):  # a store that is gone has made no object either
                out.close()
                target.delete_file(name)
            raise
        out.close()


def megabytes(count: int) -> str:
    return f"{max(count, 0) / 1e6:,.0f} MB"


def on_host(tensor: Tensor) -> Tensor:
    """A copy that later steps do not change."""
    return tensor.detach().to("cpu", copy=True).contiguous()
