"""One writer for a table: a lease that lies in the table's folder, kept alive by a heartbeat, ending with its owner.

`TABLE/_lease/` holds one small object for each epoch, made by a create that fails where the object exists (a hard
link, or S3's If-None-Match). The highest epoch is the lease; only its owner rewrites it. Whether an owner lives is told
by whether its heartbeat is seen to move, never by comparing clocks. What a writer tries that has lost its lease without
noticing is refused by the table itself, whose commits exclude each other.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from model.errors import InputError
from pipeline import storage

log = logging.getLogger(__name__)

LEASE = "_lease"
"""Folder in the table. Lance leaves folders alone that it does not know."""
SINCE = "%Y-%m-%d %H:%M:%S UTC"
BEAT_S = 2.0
"""Seconds between heartbeats."""
LIMIT_S = 60.0
"""A heartbeat that was seen standing still for so long has no owner any more: a store that stands still for 20 s, or
answers errors, is outlived."""
REQUEST_S = 10
"""Longest wait for one answer of S3: some attempts fit into LIMIT_S."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds a lease: what its object says."""

    epoch: int
    run: str
    host: str
    pid: int
    process: str
    """The machine's boot, the namespace of its process ids, the start of the process: with the pid, one process for
    ever. Empty where the system does not say these."""
    since: str
    """When it was taken, by the owner's clock; for people."""
    token: str
    """Tells this lease from all others, whoever made them."""
    beat: int = 0
    """Counts up while the owner lives."""
    released: bool = False

    def hours(self) -> float:
        """How long it has had the lease, by two clocks that may differ a little."""
        since = datetime.strptime(self.since, SINCE).replace(tzinfo=UTC)
        return (datetime.now(UTC) - since).total_seconds() / 3600

    def __str__(self) -> str:
        return f"run {self.run} since {self.since} (process {self.pid} on {self.host})"

    def is_dead(self) -> bool:
        """Whether the owner was a process of this machine that is gone. False means: not known from here."""
        here = boot()
        if not here or not self.process.startswith(f"{here} "):
            return False
        return self.process != f"{here} {started(self.pid)}"


def boot() -> str:
    """The running system and the namespace of its process ids; empty where that is not known."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def started(pid: int) -> str:
    """When a process was started, in ticks since boot; empty if there is none. A zombie is none."""
    try:
        # The name in parentheses may hold anything, blanks and parentheses too.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]


class Busy(InputError):
    """Another run is writing to the table."""

    def __init__(self, uri: str, owner: Owner) -> None:
        super().__init__(f"another run is writing to {uri}: {owner}; let it finish, then run again")
        self.owner = owner


class Lease:
    """The right to write to a table, for as long as the block lasts. `take` gets it, or refuses."""

    def __init__(
        self,
        place: "Place",
        owner: Owner,
        *,
        crashed: Owner | None,
        taken: datetime,
        beat_s: float,
        limit_s: float,
    ) -> None:
        self.place, self.owner = place, owner
        self.crashed = crashed
        """The owner before, if it never gave the lease back."""
        self.taken = taken
        """When it was taken, by the clock of the store: files that are older are of earlier runs."""
        self.beat_s, self.limit_s = beat_s, limit_s
        self.confirmed = now()
        self.lost_to: Owner | None = None
        self.left = threading.Event()
        self.busy = threading.Lock()
        self.heart = threading.Thread(target=self._beat, name="lease", daemon=True)
        self.heart.start()

    @classmethod
    def take(cls, uri: str, run: str, *, beat_s: float = BEAT_S, limit_s: float = LIMIT_S) -> "Lease":
        """Become the only writer of a table; it need not exist yet.

        At once where nobody is, or where the last owner was a process of this machine that is dead. Otherwise the
        owner's heartbeat is watched: where it moves, this run is refused; where it stands still for `limit_s`, the
        lease is taken over.

        Raises:
            Busy: another run is writing.
            InputError: the place cannot be written.
        """
        place = place_of(uri)
        try:
            while True:
                last = place.newest()
                if last is not None and not (last.released or last.is_dead()):
                    last = watch(place, last, uri, limit_s)
                mine = Owner(
                    epoch=last.epoch + 1 if last else 1,
                    run=run,
                    host=socket.gethostname(),
                    pid=os.getpid(),
                    process=f"{boot()} {started(os.getpid())}" if boot() else "",
                    since=datetime.now(UTC).strftime(SINCE),
                    token=uuid.uuid4().hex,
                )
                if not place.create(mine):
                    continue
                # One that looked long ago may make an epoch that had come and gone: the highest counts.
                newest = place.newest()
                if newest is not None and newest.epoch > mine.epoch:
                    place.delete(mine.epoch)
                    continue
                taken = place.modified(mine.epoch)
                place.delete_below(mine.epoch)
                crashed = last if last and not last.released else None
                if crashed:
                    log.warning("%s did not end: its lease on %s is taken over", crashed, uri)
                return cls(place, mine, crashed=crashed, taken=taken, beat_s=beat_s, limit_s=limit_s)
        except InputError:
            raise
        except Exception as error:  # botocore's own errors have no common base that we import
            raise InputError(f"the table {uri} cannot be written: {storage.first_words(error)}") from None

    @property
    def epoch(self) -> int:
        return self.owner.epoch

    def check(self) -> None:
        """Make sure that the lease is still held; call before anything that others will see.

        Raises:
            InputError: it was taken over.
        """
        if self.lost_to is None and now() - self.confirmed > self.limit_s / 2:
            self._confirm()
        if self.lost_to is not None:
            raise InputError(
                f"this run stood still for too long, and {self.lost_to} writes to {self.place.uri} now; let it finish"
            )

    def release(self) -> None:
        """Give the lease back. What goes wrong here is only logged: the next run then waits, or sees a dead process."""
        self.left.set()
        self.heart.join(timeout=REQUEST_S)
        if self.lost_to is None:
            try:
                with self.busy:
                    self.place.replace(replace(self.owner, released=True))
            except Exception as error:
                log.warning("the lease on %s is not given back: %s", self.place.uri, storage.first_words(error))

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _beat(self) -> None:
        while not self.left.wait(self.beat_s) and self.lost_to is None:
            try:
                self._confirm()
            except Exception as error:
                log.info("the lease on %s was not renewed: %s", self.place.uri, storage.first_words(error))

    def _confirm(self) -> None:
        """Renew the lease, then look whether someone has taken it."""
        with self.busy:
            if self.left.is_set():
                return
            begun = now()
            self.owner = replace(self.owner, beat=self.owner.beat + 1)
            self.place.replace(self.owner)
            newest = self.place.newest()
            if newest is not None and newest.epoch > self.epoch:
                self.lost_to = newest
            else:
                self.confirmed = begun


def watch(place: "Place", owner: Owner, uri: str, limit_s: float) -> Owner | None:
    """Return when the lease of `owner` can be taken: the newest lease as it is then.

    Raises:
        Busy: its heartbeat moves.
    """
    begun = now()
    told = False
    while (waited := now() - begun) < limit_s:
        seen = place.newest()
        if seen is None or seen.released or seen.is_dead():
            return seen
        if (seen.epoch, seen.beat) != (owner.epoch, owner.beat):
            raise Busy(uri, seen)
        if waited > 2 * BEAT_S and not told:
            told = True
            log.warning("%s gives no sign of life; its lease on %s ends in %.0f s", owner, uri, limit_s - waited)
        time.sleep(min(BEAT_S, limit_s) / 4)
    return owner


def holder(uri: str) -> Owner | None:
    """Who writes to a table now, as far as can be told at once; None where nobody does."""
    newest = place_of(uri).newest()
    return None if newest is None or newest.released or newest.is_dead() else newest


def now() -> float:
    """Seconds; goes on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Place:
    """The folder of a lease on a local disk. Epochs are its files: `0000000007.json`."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.folder = f"{storage.filesystem(uri)[1].rstrip('/')}/{LEASE}"

    def newest(self) -> Owner | None:
        """What the highest epoch says; one that cannot be read says nothing about its owner."""
        while numbers := self.numbers():
            try:
                text = self.read(self.path(max(numbers)))
            except FileNotFoundError:  # deleted since, for a higher one
                continue
            try:
                return Owner(**json.loads(text))
            except (ValueError, TypeError):
                return Owner(max(numbers), "?", "?", 0, "", "?", "", beat=-len(text))
        return None

    def path(self, epoch: int) -> str:
        return f"{self.folder}/{epoch:010}.json"

    def numbers(self) -> list[int]:
        return [int(stem) for name in self.names() if (stem := name.removesuffix(".json")).isdigit()]

    def delete_below(self, epoch: int) -> None:
        for number in self.numbers():
            if number < epoch:
                self.delete(number)

    def modified(self, epoch: int) -> datetime:
        """When the object of an epoch was written, by the store's clock."""
        files, _ = storage.filesystem(self.uri)
        return files.get_file_info(self.path(epoch)).mtime

    def names(self) -> list[str]:
        try:
            return os.listdir(self.folder)
        except FileNotFoundError:
            return []

    def read(self, path: str) -> bytes:
        return Path(path).read_bytes()

    def create(self, owner: Owner) -> bool:
        """Make the object of an epoch, whole; False where it exists."""
        os.makedirs(self.folder, exist_ok=True)
        draft = Path(self._draft(owner))
        try:
            os.link(draft, self.path(owner.epoch))
        except (FileExistsError, FileNotFoundError):  # another was first, and may have swept the draft away
            return False
        finally:
            draft.unlink(missing_ok=True)
        return True

    def replace(self, owner: Owner) -> None:
        os.replace(self._draft(owner), self.path(owner.epoch))

    def delete(self, epoch: int) -> None:
        """Delete an epoch, and what a process left of it that was killed while it wrote."""
        for path in (Path(self.path(epoch)), *Path(self.folder).glob(f".{epoch:010}.*")):
            path.unlink(missing_ok=True)

    def _draft(self, owner: Owner) -> str:
        draft = f"{self.folder}/.{owner.epoch:010}.{owner.token}"
        Path(draft).write_bytes(json.dumps(asdict(owner)).encode())
        return draft


class S3Place(Place):
    """The same on S3."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.s3: Any = storage.s3fs_filesystem(
            config_kwargs={
                "connect_timeout": REQUEST_S / 2,
                "read_timeout": REQUEST_S,
                "retries": {"max_attempts": 1},
            }
        )

    def names(self) -> list[str]:
        try:
            return [path.rpartition("/")[2] for path in self.s3.ls(self.folder, detail=False, refresh=True)]
        except FileNotFoundError:
            return []

    def read(self, path: str) -> bytes:
        return self.s3.cat_file(path)

    def create(self, owner: Owner) -> bool:
        path, body = self.path(owner.epoch), json.dumps(asdict(owner)).encode()
        try:
            self.s3.pipe_file(path, body, mode="create")
        except OSError:
            # Refused, or done and the answer was lost: what lies there tells.
            try:
                return self.read(path) == body
            except FileNotFoundError:
                pass
            raise
        return True

    def replace(self, owner: Owner) -> None:
        self.s3.pipe_file(self.path(owner.epoch), json.dumps(asdict(owner)).encode())

    def delete(self, epoch: int) -> None:
        with suppress(FileNotFoundError):
            self.s3.rm_file(self.path(epoch))


def place_of(uri: str) -> Place:
    return S3Place(uri) if storage.is_s3(uri) else Place(uri)
