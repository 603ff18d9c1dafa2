"""Little work without Ray: one process beside the driver reads, tokenizes, embeds and writes.

Ray takes longer to start than a process takes to embed what changed since yesterday. The functions are those of Ray's
workers and the driver commits what comes as it does theirs. A process of its own, because an encoder can be killed:
then the driver is still there, and the rest is done on Ray, whose quarantine finds the document that does it.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from model.errors import InputError
from pipeline.work import WorkTable
from pipeline.workers import EmbedAndWrite, Job, read_and_tokenize

NO_GPU = "compute.device is cuda, and there is no GPU here; set compute.device=cpu or auto"

DIED = "the process that embeds was killed"


class ProcessDied(Exception):
    """The process is gone in the middle of its work."""


@dataclass(frozen=True, slots=True)
class Device:
    """What the process embeds with."""

    name: str
    """cpu or cuda."""
    dtype: str
    """Which it multiplies fastest."""


class SingleProcess:
    """A process that ends with the block, or with this one. It starts when it is first asked for something."""

    def __init__(self) -> None:
        # Not forked: this process has threads. At most one call runs at a time, and none waits.
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, mp_context=context, initializer=follow_parent)
        self.pid: Future[int] | None = None
        self.completed = 0
        """Tables of work whose fragments have all been yielded."""

    def __enter__(self) -> "SingleProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it, whatever it is doing: what it has not handed over by now is not wanted any more."""
        pid, self.pid = self.pid, None
        if pid is not None and pid.done() and not pid.cancelled() and not pid.exception():
            with suppress(ProcessLookupError):
                os.kill(pid.result(), signal.SIGKILL)
        self.pool.shutdown(cancel_futures=True)

    def start(self) -> None:
        """Let it import what it needs, while this process goes on."""
        if self.pid is None:
            self.pid = self.pool.submit(os.getpid)
            self.pool.submit(import_torch)

    def device(self, asked: str) -> Device:
        """What it has; `asked` is auto, cpu or cuda.

        Raises:
            InputError: cuda, and there is none.
            ProcessDied: it died while it started.
        """
        self.start()
        try:
            return self.pool.submit(find_device, asked).result()
        except BrokenProcessPool:
            raise ProcessDied(DIED) from None

    def fragments(self, job: Job, work: Sequence[WorkTable]) -> Generator[dict[str, Any]]:
        """Carry out some work in turn; yields a row for every fragment.

        Args:
            work: tables that are in this process.

        Raises:
            ProcessDied: it died; the work from `completed` on has not been done.
            InputError: it found the model or a source unusable.
        """
        self.start()
        for table in work:
            try:
                rows = self.pool.submit(embed_work, job, table.load()).result()
            except BrokenProcessPool:
                raise ProcessDied(DIED) from None
            yield from rows
            self.completed += 1


# In the process


def follow_parent() -> None:
    """Leave Ctrl-C to the parent, and end when it does, however it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def import_torch() -> None:
    import pipeline.embedding  # noqa: F401


def find_device(asked: str) -> Device:
    import torch

    from model.embedder import choose_device

    if asked == "cuda" and not torch.cuda.is_available():
        raise InputError(NO_GPU)
    name = choose_device(asked).type
    return Device(name, best_dtype(name))


def best_dtype(device: str) -> str:
    """The dtype that a device multiplies fastest."""
    import torch

    from model.embedder import choose_dtype

    return str(choose_dtype("auto", torch.device(device))[0]).removeprefix("torch.")


EMBEDDERS: dict[str, EmbedAndWrite] = {}
"""The one of this process, by its run: made for the first table."""


def embed_work(job: Job, items: pa.Table) -> list[dict[str, Any]]:
    """What Ray's readers and actors do, one after the other; returns a row for every fragment."""
    if job.run not in EMBEDDERS:
        EMBEDDERS[job.run] = EmbedAndWrite(job, watch=None)
    written = []
    for tokens in read_and_tokenize(items, job=job, watch=None):
        written += EMBEDDERS[job.run](tokens).to_pylist()
    return written
