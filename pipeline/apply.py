"""Carry out a plan: read, tokenize, embed and write on workers, commit on the driver while it goes.

A worker's output counts only when it is committed here, once, whatever was retried or lost on the way; and only when
the worker has shown with the probes that it computes what the table holds.
"""

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.dead import Dead, DeadLetters
from pipeline.keys import KEY, Keys
from pipeline.measures import Meter, Silent, Timeline, add_lengths
from pipeline.probes import Probes, Vectors, from_bytes, is_canary, keep_canaries
from pipeline.quarantine import start_watch
from pipeline.single import ProcessDied, SingleProcess
from pipeline.survey import Plan
from pipeline.table import EmbeddingTable
from pipeline.work import Limit, WorkTable
from pipeline.workers import EmbedAndWrite, Job, Workers, read_and_tokenize

log = logging.getLogger(__name__)

PAUSE_S = 1.0
"""How often the driver looks whether a commit is due while no fragment arrives."""

SUMMED = ("chunks", "reused", "tokens", "truncated_tokens", "padding_tokens", "encoder_s", "chars")
"""Numbers of a fragment that add up to those of `Applied`."""

CPUS_OF_READER = 0.75
"""Not the 1 of an actor: Ray Data fuses stages of equal resources, and a fused actor would tokenize while its encoder
waits, and say nothing before all documents of a reading task are embedded."""


@dataclass(slots=True)
class Applied:
    """What has been committed."""

    documents: int = 0
    chunks: int = 0
    reused: int = 0
    """Those of them whose vectors needed no encoder."""
    tokens: int = 0
    truncated_tokens: int = 0
    padding_tokens: int = 0
    commits: int = 0
    missing: int = 0
    """Documents of the plan that no worker returned: they are dead, or their file changed since."""
    dead: dict[bytes, Dead] = field(default_factory=dict)
    """By the hashes of their ids, those for which a stage gave a reason."""
    probed: dict[str, dict[str, Any]] = field(default_factory=dict)
    """{gate: how far the vectors of the probes were from what they should be, over all workers}."""
    refused: str = ""
    """Why a gate ended the work before all was done."""
    stopped: str = ""
    """Which limit ended the work before all was done."""
    left: int = 0
    """Documents that were not reached then."""
    encoder_s: float = 0.0
    """Seconds that actors spent in the encoder, all together."""
    chars: int = 0
    lengths: list[int] = field(default_factory=list)
    """Documents by their tokens, in the buckets of `pipeline.measures`."""
    timeline: Timeline = field(default_factory=Timeline)
    actors: int = 1
    """How many there were."""
    wasted_tokens: int = 0
    """Tokens that were encoded for nothing: with workers and machines that were lost, or when a limit ended the run."""


class Refused(Exception):
    """A worker's probes came out wrong: nothing of it is committed, and the run ends."""


def apply(
    job: Job,
    plan: Plan,
    table: EmbeddingTable,
    keys: Keys,
    *,
    letters: DeadLetters | None = None,
    probes: Probes | None = None,
    off: Collection[str] = (),
    limit: Limit = Limit(),  # noqa: B008 (frozen)
    single: SingleProcess | None = None,
    workers: Callable[[], Workers] | None = None,
    advance: Callable[[int, int, int], None],
) -> Applied:
    """Embed what the plan says and commit it, at the latest `job.commit_every_s` after it arrived.

    Needs a Ray session, unless there is a `single` process. What arrived before something failed is committed before
    the error goes on.

    Args:
        letters: get an entry for every document that dies, and lose those of documents that are embedded now.
        probes: the documents of `job.probes`, and what is known of them.
        off: gates that refuse nothing.
        limit: ends the work before all is done; what has been begun by then is lost.
        single: does the work instead of Ray, which does the rest if it dies.
        workers: called for that rest: starts a Ray session and says how the work is spread there.
        advance: called with (documents, tokens, characters) of every fragment that arrives.

    Raises:
        InputError: another run writes to the table, or a worker found the model or a source unusable.
    """
    journal = Journal(table, keys, plan, job.run, letters, probes, off, job.meter(table.uri))
    left = list(plan.work)
    watch: Any = None
    try:
        if single is not None:
            try:
                journal.take(single.fragments(job, left), job.commit_every_s, limit, advance)
                left = []
            except ProcessDied as death:
                if workers is None:
                    raise
                log.warning("%s; Ray's workers do the rest", death)
                left, job = left[single.completed :], replace(job, workers=workers())
        if left:
            journal.meter.set(actors=job.workers.actors)
            journal.applied.actors = job.workers.actors
            watch = start_watch(job.workers.actors)
            journal.take(written_fragments(job, left, watch), job.commit_every_s, limit, advance)
    except Refused as refusal:
        journal.applied.refused = str(refusal)
    finally:
        journal.commit()
    applied = journal.applied
    if watch is not None:  # asked last: by then everything is committed, whatever became of Ray
        import ray

        applied.wasted_tokens = ray.get(watch.wasted.remote())
        journal.meter.add(wasted_tokens=applied.wasted_tokens)
    applied.missing = int((~journal.done).sum())
    if applied.stopped or applied.refused:
        applied.left = max(applied.missing - len(applied.dead), 0)
        applied.missing -= applied.left
        applied.stopped = applied.stopped if applied.left else ""
    return applied


def with_pauses(rows: Generator[dict[str, Any]], pause_s: float) -> Iterator[dict[str, Any] | None]:
    """The rows, and None whenever none came for `pause_s` seconds, so that a commit need not wait for the next.

    They are drawn in a thread of their own; what drawing them raises is raised here.
    """
    drawn: queue.Queue[dict[str, Any] | BaseException | None] = queue.Queue(maxsize=1)
    left = threading.Event()

    def offer(item: dict[str, Any] | BaseException | None) -> bool:
        while not left.is_set():
            with suppress(queue.Full):
                drawn.put(item, timeout=1)
                return True
        return False

    def draw() -> None:
        end: BaseException | None = None
        try:
            for row in rows:
                if not offer(row):
                    return
        except BaseException as error:
            end = error
        finally:
            # In this thread, where they are drawn: what is left of the work ends, and its actors with it.
            rows.close()
        offer(end)

    threading.Thread(target=draw, name="arrivals", daemon=True).start()
    try:
        while True:
            try:
                item = drawn.get(timeout=pause_s)
            except queue.Empty:
                yield None
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        left.set()


def written_fragments(job: Job, work: Sequence[WorkTable], watch: Any) -> Generator[dict[str, Any]]:
    """Yields a row for every fragment as soon as a worker has written it, in any order."""
    import ray

    if job.former:
        job = replace(job, former=job.former.shared())
    workers = job.workers
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Token tables of one block make a block, not of the default 128 MB: tokens are about half as many bytes as
    # characters.
    context.target_max_block_size = max(workers.block_chars // 2, 1)
    gpus = {"num_gpus": 1} if workers.device == "cuda" else {}
    with ray.data.DataContext.current(context):
        items = [ray.put(item.rows) if isinstance(item.rows, pa.Table) else item.rows for item in work]
        dataset = (
            ray.data.from_arrow_refs(items)
            .map_batches(
                read_and_tokenize,
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=CPUS_OF_READER * workers.share,
                fn_kwargs={"job": job, "watch": watch},
            )
            .map_batches(
                EmbedAndWrite,
                batch_size=None,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(
                    min_size=workers.least or workers.actors,
                    max_size=workers.actors,
                    initial_size=workers.first or workers.actors,
                ),
                fn_constructor_kwargs={"job": job, "watch": watch},
                num_cpus=workers.cpus * workers.share,
                **gpus,
            )
        )
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from batch.to_pylist()


@dataclass(slots=True)
class Journal:
    """Fragments that arrived, and which of the planned documents they complete."""

    table: EmbeddingTable
    keys: Keys
    plan: Plan
    run: str
    letters: DeadLetters | None = None
    probes: Probes | None = None
    off: Collection[str] = ()
    meter: Meter = field(default_factory=Silent)
    applied: Applied = field(default_factory=Applied)
    arrived: int = 0
    """Documents of the plan that have come."""
    taken_tokens: int = 0
    """Of all fragments that have come."""
    done: np.ndarray = field(init=False)
    """bool, for each position of the plan."""
    waiting: list[dict[str, Any]] = field(default_factory=list)
    died: list[Dead] = field(default_factory=list)
    """Documents that have no letter yet."""

    def __post_init__(self) -> None:
        self.done = np.zeros(self.plan.num_documents, dtype=bool)

    def take(
        self,
        rows: Generator[dict[str, Any]],
        commit_every_s: float,
        limit: Limit,
        advance: Callable[[int, int, int], None],
    ) -> None:
        """Add the fragments as they come, and commit them in time, to the last or to the limit."""
        waiting_since: float | None = None
        for row in with_pauses(rows, PAUSE_S):
            if row is not None:
                self.add(row)
                self.taken_tokens += row["tokens"]
                advance(len(row["ids"]) // KEY.itemsize, row["tokens"], row["chars"])
                waiting_since = waiting_since or time.monotonic()
            if waiting_since and time.monotonic() - waiting_since >= commit_every_s:
                self.commit()
                waiting_since = None
            if stopped := limit.reached(self.taken_tokens):
                self.applied.stopped = stopped
                break

    def add(self, row: dict[str, Any]) -> None:
        """Take a fragment into the next commit, unless its documents are there already.

        A task that was repeated after its first output had arrived brings the same documents again. All of them: then
        the fragment is an orphan. Some of them: then it cannot be used without doubling rows, and the run must start
        again.

        Raises:
            Refused: the probes of the worker that sends it came out wrong.
        """
        if row.get("probes") and self.probes is not None:
            self.verify(self.probes, from_bytes(row["probes"]))
        at = np.frombuffer(row["positions"], np.int64)
        self.died += [Dead.from_row(dead) for dead in json.loads(row["dead"])]
        if not len(at):
            return
        if self.done[at].all():
            log.info("a fragment came twice and is left out: %s", row["fragment"])
            return
        if self.done[at].any():
            raise RuntimeError("a worker returned documents for the second time; run again to embed what is missing")
        self.done[at] = True
        self.waiting.append(row)
        self.arrived += len(at)
        self.applied.timeline.add(len(row["ids"]) // KEY.itemsize, row["tokens"])
        self.show_queue()

    def show_queue(self) -> None:
        self.meter.set(waiting_documents=self.plan.num_documents - self.arrived, waiting_fragments=len(self.waiting))

    def verify(self, probes: Probes, found: Vectors) -> None:
        """Compare a worker's probes with what is known of them; the first canaries of a table are kept.

        Raises:
            Refused: one is farther off than rounding explains.
        """
        canaries = {key: vector for key, vector in found.items() if is_canary(key[0])}
        first = probes.canaries is None
        # Without earlier ones they are compared with themselves: so they must be finite at least.
        self.probes = replace(probes, canaries=canaries if first else probes.canaries)
        for gate, (distance, name) in self.probes.check(found).items():
            before = self.applied.probed.setdefault(gate, {"distance": 0.0, "bound": probes.bound})
            before["distance"] = max(before["distance"], distance)
            if distance > probes.bound and gate not in self.off:
                raise Refused(
                    f"{gate}: embedded again, {name!r} is {distance:.2g} from its vector in the table (1 - cosine; at "
                    f"most {probes.bound:.2g}): the model, its tokenizer or this machine computes something else"
                )
        if first and np.isfinite(np.concatenate(list(canaries.values()))).all():
            keep_canaries(self.table.uri, self.table.fingerprint, probes.texts, canaries)

    def commit(self) -> None:
        """Put the fragments that wait into the table, in place of the old rows of their documents.

        Dead letters come first: after a crash between the two a document has none, and is tried again.
        """
        rows, self.waiting = self.waiting, []
        # A repeated task brings its dead documents again: that is no second attempt.
        died = [letter for letter in self.died if letter.key not in self.applied.dead]
        self.died = []
        self.applied.dead |= {letter.key: letter for letter in died}
        self.meter.add(dead_documents=len(died))
        if self.letters is not None:
            self.letters.record(died, self.run)
        if not rows:
            return
        ids = np.concatenate([np.frombuffer(row["ids"], KEY) for row in rows])
        if self.letters is not None:
            self.letters.remove(ids)
        self.table.commit([row["fragment"] for row in rows], ids[self.keys.known(ids)], self.keys, run=self.run)
        done = self.applied
        done.commits += 1
        done.documents += len(ids)
        sums = {name: sum(row[name] for row in rows) for name in SUMMED}
        for name, value in sums.items():
            setattr(done, name, getattr(done, name) + value)
        done.lengths = add_lengths([done.lengths, *(row["lengths"] for row in rows)])
        counted = {name: sums[name] for name in ("tokens", "padding_tokens", "truncated_tokens")}
        self.meter.add(documents=len(ids), vectors=sums["chunks"], commits=1, **counted)
        self.show_queue()
        log.info("version %d: %d documents more", self.table.version, len(ids))
