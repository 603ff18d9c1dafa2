"""When and what to strike: moments of a run seen from outside, and the processes of our own Ray that can be killed.

Other sessions on a machine run processes of the same names: only descendants of this process are ever touched.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nights import Truth

ENCODER = "EmbedAndWrite"
"""In the name of the Ray processes that embed."""


@dataclass(frozen=True, slots=True)
class Measure:
    """How far a run is, from outside."""

    records: int
    versions: int
    fragments: int
    published: int | None


class Watched(Protocol):
    """What a strike asks of a scene."""

    start: Measure
    leftover: set[int]

    def measure(self) -> Measure: ...

    def phase(self, now: Measure) -> str: ...


@dataclass(frozen=True, slots=True)
class Moment:
    """When to strike: so long after a measure of the run was reached."""

    what: str
    """start, records, fragments, versions, encoder (an embedding process is there) or published."""
    count: int
    """How many more than before the run."""
    delay_s: float

    def reached(self, scene: Watched, now: Measure) -> bool:
        if self.what == "start":
            return True
        if self.what == "encoder":
            return bool(set(encoders()) - scene.leftover)
        if self.what == "published":
            return now.published != scene.start.published
        return getattr(now, self.what) >= getattr(scene.start, self.what) + self.count

    def __str__(self) -> str:
        return f"{self.what} {self.count} + {self.delay_s * 1000:.0f} ms"


def draw_moment(draw: Any, truth: Truth, what: str) -> Moment:
    """A moment of this kind, anywhere in a run that makes as many fragments and versions as the undisturbed one."""
    most = {"fragments": truth.fragments, "versions": truth.versions}.get(what, 1)
    delay = draw.uniform(0, 4.0) if what == "start" else draw.uniform(0, 0.15)
    return Moment(what, draw.randint(1, max(1, most)), delay)


class Strike(threading.Thread):
    """Waits for its moment, does its harm, and knows afterwards in which phase it struck; `phase` is None if never."""

    def __init__(self, scene: Watched, moment: Moment, harm: Callable[[], None]) -> None:
        super().__init__(name="strike", daemon=True)
        self.scene, self.moment, self.harm = scene, moment, harm
        self.phase: str | None = None
        self.error: BaseException | None = None
        self.over = threading.Event()

    def run(self) -> None:
        try:
            while not self.moment.reached(self.scene, now := self.scene.measure()):
                if self.over.wait(0.01):
                    return
            if self.over.wait(self.moment.delay_s):
                return
            if self.moment.delay_s:
                now = self.scene.measure()
            self.harm()
            self.phase = self.scene.phase(now)
        except NothingToHarm:
            return
        except BaseException as error:
            self.error = error

    def finish(self) -> str | None:
        """The run is over: strike no more."""
        self.over.set()
        self.join(120)
        if self.error is not None:
            raise self.error
        return self.phase


class NothingToHarm(Exception):
    """What was to be struck is gone: the run is too far."""


def own_raylets() -> set[int]:
    """Process ids of the raylets that this process started; other sessions are none of our business."""
    found = set()
    for pid, line in processes():
        if line.split(b"\0")[0].endswith(b"raylet/raylet") and os.getpid() in ancestors(pid):
            found.add(pid)
    return found


def encoders() -> list[int]:
    """The embedding processes under our own raylets."""
    raylets = own_raylets()
    found = [pid for pid, line in processes() if ENCODER.encode() in line and line.startswith(b"ray::")]
    return [pid for pid in found if raylets & ancestors(pid)]


def single_process(driver: int) -> int:
    """The process beside a driver that embeds without Ray.

    Raises:
        NothingToHarm: it has none, or none any more.
    """
    for pid, line in processes():
        if b"multiprocessing.spawn" in line and ancestors(pid) & {driver}:
            return pid
    raise NothingToHarm


def processes() -> Iterator[tuple[int, bytes]]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                yield int(name), Path(f"/proc/{name}/cmdline").read_bytes()
            except OSError:
                continue


def ancestors(pid: int) -> set[int]:
    found: set[int] = set()
    while pid > 1 and pid not in found:
        found.add(pid)
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
    return found


def kill_encoder(scene: Watched) -> None:
    """SIGKILL to one embedding process of this run."""
    found = set(encoders()) - scene.leftover
    if not found:
        raise NothingToHarm
    os.kill(min(found), signal.SIGKILL)


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False
