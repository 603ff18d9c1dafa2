"""Faults, and what a table and its readers see of them: a place where nights run, a watch over it, a moment to strike.

Everything is looked at from outside: files below the table, versions, the tag. A `Scene` has last night's undisturbed
table and tonight's corpus; `disturb` runs between them while a `Strike` does its harm, and again to the end;
`Scene.verify` then holds the table against the undisturbed one.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lance
from nights import (
    NOTHING,
    SETS,
    Truth,
    corpus_of,
    differences,
    hashes_of,
    partial_documents,
    rows_of,
    upload_corpus,
    write_corpus,
)
from seaweed import BUCKET, Proxy, Seaweed
from strikes import Measure, Moment, Strike, encoders

from jobs.configuration import EmbedConfiguration, load
from jobs.embed import run_embed
from jobs.report import EmbedReport
from pipeline.table import PUBLISHED

ROOT = Path(__file__).resolve().parent.parent
LOG_VARIABLE = "NIGHTLOOM_FAULTS_LOG"
"""A file to which every disturbed run adds a JSON line; benchmarks/faults.py counts them."""
RERUNS = 3
"""Most runs after the disturbed one until the table is published; the first should do, unless the fault goes on."""


@dataclass
class Yard:
    """One folder, one model, one Ray, perhaps one S3 server, and the undisturbed tables of all nights."""

    folder: Path
    model: Path
    server: Seaweed | None = None
    proxy: Proxy | None = None
    address: str | None = None
    truths: dict[int, Truth] = field(default_factory=dict)

    def truth(self, night: int) -> Truth:
        """What the table of a night must hold; made by an undisturbed run when it is first asked for."""
        if night < 0:
            return NOTHING
        if night not in self.truths:
            before = self.truth(night - 1)
            scene = Scene(self, night, on_s3=False, name=f"undisturbed-{night}")
            start = scene.measure()
            report = scene.run("compute.commit_every_s=0")
            assert report.status == "published", report
            assert report.read == report.embedded + report.unchanged + report.empty + report.duplicate + report.dead
            after = scene.measure()
            dataset = scene.dataset(PUBLISHED)
            truth = Truth.read(dataset, after.versions - start.versions, after.fragments - start.fragments)
            assert {name: rows[0][-1] for name, rows in truth.rows.items()} == hashes_of(corpus_of(night))
            assert before.rows != truth.rows
            self.truths[night] = truth
            shutil.copytree(scene.table, self.folder / f"night-{night}.lance")
        return self.truths[night]


class Scene:
    """Last night's table, tonight's corpus, and runs between them."""

    def __init__(self, yard: Yard, night: int, *, on_s3: bool, name: str) -> None:
        self.yard, self.night, self.on_s3 = yard, night, on_s3
        self.before, self.after = yard.truth(night - 1), NOTHING
        if not name.startswith("undisturbed"):
            self.after = yard.truth(night)
        if on_s3:
            assert yard.server is not None
            self.client = yard.server.client()
            self.source, self.table = f"s3://{BUCKET}/source", f"s3://{BUCKET}/{name}.lance"
            upload_corpus(corpus_of(night), self.client, f"{BUCKET}/source")
            if night:
                self.client.put(f"{yard.folder}/night-{night - 1}.lance/", self.path + "/", recursive=True)
        else:
            # One place for the corpus of all nights, so that files that did not change are known as such.
            self.source, self.table = str(yard.folder / "source"), str(yard.folder / f"{name}.lance")
            write_corpus(corpus_of(night), yard.folder / "source")
            if night:
                shutil.copytree(yard.folder / f"night-{night - 1}.lance", self.table)
        self.leftover = set(encoders())
        """Embedding processes of the run before that are still on their way out."""
        self.start = self.measure()
        self.first_version = self.dataset().version + 1 if night else 1
        self.faults: list[str] = []
        self.inspected: set[int] = set()

    @property
    def path(self) -> str:
        return self.table.removeprefix("s3://")

    def dataset(self, version: int | str | None = None) -> lance.LanceDataset:
        """The table as a reader sees it, straight from the server."""
        options = None
        if self.on_s3:
            assert self.yard.server is not None
            keys = self.yard.server.environment()
            options = {"aws_access_key_id": keys["AWS_ACCESS_KEY_ID"], "aws_region": keys["AWS_REGION"]}
            options |= {
                "aws_secret_access_key": keys["AWS_SECRET_ACCESS_KEY"],
                "aws_endpoint": keys["AWS_ENDPOINT_URL"],
            }
            options |= {"allow_http": "true", "aws_virtual_hosted_style_request": "false"}
        return lance.dataset(self.table, version=version, storage_options=options)

    def sets(self, *more: str) -> list[str]:
        return [*SETS, "delete_missing=true", *more]

    def run(self, *sets: str) -> EmbedReport:
        """A run in this process, within the Ray that it is connected to."""
        given = {"source": self.source, "table": self.table, "model": str(self.yard.model)}
        return run_embed(load(EmbedConfiguration, file=None, sets=self.sets(*sets), given=given))

    def command(self, *sets: str) -> list[str]:
        """The same on the command line, connected to the yard's Ray where it has an address, else with its own."""
        command = [sys.executable, "-m", "jobs.cli", "embed", self.source, self.table, "--json"]
        command += ["--model", str(self.yard.model)]
        address = [f"compute.address={self.yard.address}"] if self.yard.address else []
        for item in self.sets(*address, *sets):
            command += ["--set", item]
        return command

    def listing(self) -> list[str]:
        """Paths below the table."""
        if self.on_s3:
            return [path.removeprefix(self.path) for path in self.client.find(self.path)]
        return [path.removeprefix(self.path) for path in scan(self.path)]

    def measure(self) -> Measure:
        paths = self.listing()
        tag = next((path for path in paths if path.endswith(f"/{PUBLISHED}.json")), None)
        version = None
        if tag:
            raw = self.client.cat_file(self.path + tag) if self.on_s3 else Path(self.path + tag).read_bytes()
            version = json.loads(raw)["version"] if raw else None
        return Measure(
            records=sum(path.startswith("/_runs/") for path in paths),
            versions=sum(path.startswith("/_versions/") and path.endswith(".manifest") for path in paths),
            fragments=sum(path.startswith("/data/") for path in paths),
            published=version,
        )

    def phase(self, now: Measure) -> str:
        """What the run was about when it was struck."""
        start = self.start
        if now.published != start.published:
            return "published"
        if now.versions > max(start.versions, 1):
            return "between commits"
        if now.fragments > start.fragments:
            return "fragments written, none committed"
        if now.records > start.records:
            return "run recorded, nothing written"
        return "before the run is recorded"

    @contextmanager
    def readers(self) -> Iterator[None]:
        """Read every version that appears and every state that is published, and note what no reader should see."""
        done, seen = threading.Event(), set()

        def read() -> None:
            while not done.wait(0.15):
                self.inspect()
                try:
                    version = self.measure().published
                    if version is None or version in seen:
                        continue
                    rows = rows_of(self.dataset(version))
                except Exception as error:
                    # The server may be away; on a disk a published version must open, unless the tag moved meanwhile.
                    if not self.on_s3 and self.measure().published == version:
                        self.faults.append(f"published version {version} cannot be read: {error}")
                    continue
                seen.add(version)
                if rows not in (self.before.rows, self.after.rows):
                    self.faults.append(f"published version {version} is neither last night's nor tonight's table")

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(30)

    def inspect(self) -> None:
        """Read the versions of tonight that nobody has read yet, and note documents that are partial or doubled."""
        try:
            versions = [entry["version"] for entry in self.dataset().versions()]
        except Exception:  # no table yet, or no server
            return
        for version in versions:
            if version < self.first_version or version in self.inspected:
                continue
            try:
                rows = rows_of(self.dataset(version))
            except Exception:  # cleared away meanwhile
                continue
            self.inspected.add(version)
            partial = partial_documents(rows, self.before, self.after)
            self.faults += [f"version {version}: {name} is partial or doubled" for name in partial]

    def verify(self) -> tuple[int, list[str]]:
        """Hold the table against the undisturbed one.

        Returns:
            How many versions were looked at; every difference, partial document and bad state that a reader saw.
        """
        self.inspect()
        faults = list(self.faults)
        faults += differences(self.dataset(PUBLISHED), self.after)
        newest = self.dataset()
        faults += [f"newest version: {fault}" for fault in differences(newest, self.after)]
        assert newest.version in self.inspected
        return len(self.inspected), faults


def scan(folder: str) -> Iterator[str]:
    """Files below a folder that is being written to."""
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_dir():
            yield from scan(entry.path)
        else:
            yield entry.path


def bring_to_the_end(scene: Scene) -> int:
    """Run until the table is up to date; returns how many runs it took."""
    for attempt in range(1, RERUNS + 1):
        try:
            report = scene.run()
        except Exception:
            if attempt == RERUNS:
                raise
            time.sleep(1)
            continue
        assert report.read == report.embedded + report.unchanged + report.empty + report.duplicate + report.dead
        break
    # And once more: nothing is left to do.
    last = scene.run()
    assert (last.status, last.embedded, last.deleted) == ("unchanged", 0, 0)
    return attempt


def disturb(scene: Scene, kind: str, seed: int, moment: Moment, harm: Callable[[], None], *sets: str) -> None:
    """A run in this process, struck while it goes; then the end, the comparison, and a line in the log."""
    begun = time.monotonic()
    outcome = "failed"
    with scene.readers():
        strike = Strike(scene, moment, harm)
        strike.start()
        try:
            outcome = scene.run(*sets).status
        except Exception as error:
            outcome = f"failed: {type(error).__name__}"
        finally:
            phase = strike.finish()
        scene.inspect()
        reruns = bring_to_the_end(scene)
    conclude(scene, kind, seed, moment, phase, outcome, reruns, begun)


def conclude(
    scene: Scene, kind: str, seed: int, moment: Moment, phase: str | None, outcome: str, reruns: int, begun: float
) -> None:
    """Compare, keep a line of it, and fail where there is a difference."""
    versions, found = scene.verify()
    log_run(
        fault=kind,
        seed=seed,
        place="s3" if scene.on_s3 else "disk",
        night=scene.night,
        moment=str(moment),
        phase=phase,
        outcome=outcome,
        reruns=reruns,
        versions=versions,
        differences=len(found),
        seconds=round(time.monotonic() - begun, 1),
    )
    assert not found, "\n".join(found)


def log_run(**fields: Any) -> None:
    """Add a line to the log of disturbed runs, where one is kept, and say it."""
    line = json.dumps(fields)
    print(line)
    if path := os.environ.get(LOG_VARIABLE):
        with open(path, "a", encoding="utf-8") as log:
            log.write(line + "\n")


def start(command: list[str]) -> subprocess.Popen[bytes]:
    """A driver in a process of its own."""
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
