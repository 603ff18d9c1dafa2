"""Carry out a plan: read, tokenize, embed and write on workers, commit on the driver while it goes.

A worker's output counts only when it is committed here, once, whatever was retried or lost on the way. Fragments are
written in the actor that embeds, not in a stage of their own: Ray Data cuts blocks by size between stages, and a
document's rows must not be cut.
"""

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.chunks import ChunkingConfig
from pipeline.documents import DocumentColumns
from pipeline.survey import Plan, read_work, work_tables
from pipeline.table import KEY, EmbeddingTable, Keys, hash_ids, is_among, write_fragment
from pipeline.tokens import TokenizeStage

log = logging.getLogger(__name__)

CHARS_PER_TASK = 16_000_000
"""Most text that one reading task goes through: small enough that a lost task is soon repeated."""

PAUSE_S = 1.0
"""How often the driver looks whether a commit is due while no fragment arrives."""

CPUS_OF_READER = 0.75
"""Not the 1 of an actor: Ray Data fuses stages of equal resources, and a fused actor would tokenize while its encoder
waits, and say nothing before all documents of a reading task are embedded."""


@dataclass(frozen=True, slots=True)
class Workers:
    """How the work is spread."""

    actors: int
    """Processes that hold the encoder."""
    device: str
    """cpu or cuda; an actor takes one GPU."""
    threads: int
    """Threads of one actor on CPUs."""
    tokens_per_batch: int | None
    """Token budget of a forward pass; None leaves it to the device."""
    block_chars: int


@dataclass(frozen=True, slots=True)
class Job:
    """How a run embeds: everything that its workers and its driver are told beside the plan."""

    uri: str
    """The table."""
    run: str
    columns: DocumentColumns
    chunking: ChunkingConfig
    prompt: str
    embedding: dict[str, Any]
    """Arguments of `EmbedStage`."""
    workers: Workers
    commit_every_s: float
    """Longest time that a written fragment waits for its commit."""


@dataclass(slots=True)
class Applied:
    """What has been committed."""

    documents: int = 0
    chunks: int = 0
    tokens: int = 0
    truncated_tokens: int = 0
    padding_tokens: int = 0
    commits: int = 0
    missing: int = 0
    """Documents of the plan that no worker returned: they could not be tokenized, or their file changed since."""
    dead: list[dict[str, str]] = field(default_factory=list)
    """id, source, stage and error of those among them for which a stage gave a reason."""
    encoder_s: float = 0.0
    """Seconds that actors spent in the encoder, all together."""


@lru_cache(maxsize=1)
def tokenizer_of(model: str, chunking: ChunkingConfig, prompt: str) -> TokenizeStage:
    """The tokenizer of this process: tasks come and go, their process stays."""
    return TokenizeStage(model, chunking, prompt)


def read_and_tokenize(
    items: pa.Table, *, columns: DocumentColumns, model: str, chunking: ChunkingConfig, prompt: str, block_chars: int
) -> Iterator[pa.Table]:
    """Work items -> token tables, each of about `block_chars` characters."""
    stage = tokenizer_of(model, chunking, prompt)
    for documents in read_work(items, columns, block_chars):
        yield stage(documents)


class EmbedAndWrite:
    """Ray Data actor: token table -> one row that says which fragment holds its vectors, and what it cost."""

    def __init__(self, uri: str, run: str, threads: int, **embedding: Any) -> None:
        import torch  # here, because the driver of a run that finds nothing to do needs none of it

        from pipeline.embedding import EmbedStage

        if embedding["device"] == "cpu":
            torch.set_num_threads(threads)
        self.uri, self.run = uri, run
        self.stage = EmbedStage(**embedding)

    def __call__(self, tokens: pa.Table) -> pa.Table:
        parts = list(self.stage.embed(tokens))
        rows = pa.concat_tables([part.rows for part in parts])
        dead = [
            row for part in parts for row in part.dead.select(["document_id", "source", "stage", "error"]).to_pylist()
        ]
        statistics = [part.statistics for part in parts]
        written = {
            "fragment": write_fragment(self.uri, rows, self.run) if len(rows) else "",
            "ids": np.unique(hash_ids(rows["document_id"].unique())).tobytes(),
            "dead": json.dumps(dead),
            "chunks": len(rows),
            "chars": pc.sum(tokens["num_chars"]).as_py() or 0,
            "tokens": sum(s.model_tokens for s in statistics),
            "padding_tokens": sum(s.padding_tokens for s in statistics),
            "truncated_tokens": sum(s.truncated_tokens for s in statistics),
            "encoder_s": float(sum(s.seconds for s in statistics)),
        }
        return pa.table({name: [value] for name, value in written.items()})


def apply(
    job: Job, plan: Plan, table: EmbeddingTable, keys: Keys, *, advance: Callable[[int, int, int], None]
) -> Applied:
    """Embed what the plan says and commit it, at the latest `job.commit_every_s` after it arrived.

    Needs a Ray session. What arrived before something failed is committed before the error goes on.

    Args:
        advance: called with (documents, tokens, characters) of every fragment that arrives.

    Raises:
        InputError: another run writes to the table, or a worker found the model or a source unusable.
    """
    journal = Journal(table, keys, plan, job.run)
    waiting_since: float | None = None
    try:
        for row in with_pauses(written_fragments(job, plan), PAUSE_S):
            if row is not None:
                journal.add(row)
                advance(len(row["ids"]) // KEY.itemsize, row["tokens"], row["chars"])
                waiting_since = waiting_since or time.monotonic()
            if waiting_since and time.monotonic() - waiting_since >= job.commit_every_s:
                journal.commit()
                waiting_since = None
    finally:
        journal.commit()
    journal.applied.missing = int((~journal.done).sum())
    return journal.applied


def with_pauses(rows: Iterator[dict[str, Any]], pause_s: float) -> Iterator[dict[str, Any] | None]:
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


def written_fragments(job: Job, plan: Plan) -> Iterator[dict[str, Any]]:
    """The distributed part: yields a row for every fragment as soon as it is written, in any order."""
    import ray

    workers = job.workers
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Token tables of one block make a block, not of the default 128 MB: tokens are about half as many bytes as
    # characters.
    context.target_max_block_size = max(workers.block_chars // 2, 1)
    gpus = {"num_gpus": 1} if workers.device == "cuda" else {}
    with ray.data.DataContext.current(context):
        spread = max(workers.block_chars, min(CHARS_PER_TASK, plan.chars // 8))
        dataset = (
            ray.data.from_arrow(work_tables(plan.work, spread))
            .map_batches(
                read_and_tokenize,
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=CPUS_OF_READER,
                fn_kwargs={
                    "columns": job.columns,
                    "model": job.embedding["model_path"],
                    "chunking": job.chunking,
                    "prompt": job.prompt,
                    "block_chars": workers.block_chars,
                },
            )
            .map_batches(
                EmbedAndWrite,
                batch_size=None,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=workers.actors),
                fn_constructor_kwargs={
                    "uri": job.uri,
                    "run": job.run,
                    "threads": workers.threads,
                    "device": workers.device,
                    "tokens_per_batch": workers.tokens_per_batch,
                    "chunking": job.chunking,
                    **job.embedding,
                },
                num_cpus=1,
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
    applied: Applied = field(default_factory=Applied)
    done: np.ndarray = field(init=False)
    """bool, for each of `plan.embedded`."""
    waiting: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.done = np.zeros(len(self.plan.embedded), dtype=bool)

    def add(self, row: dict[str, Any]) -> None:
        """Take a fragment into the next commit, unless its documents are there already.

        A task that was repeated after its first output had arrived brings the same documents again. All of them: then
        the fragment is an orphan. Some of them: then it cannot be used without doubling rows, and the run must start
        again.
        """
        ids = np.frombuffer(row["ids"], KEY)
        self.applied.dead += json.loads(row["dead"])
        if not is_among(ids, self.plan.embedded).all():
            raise RuntimeError("a worker returned documents that were not planned; nothing of it is committed")
        if not len(ids):
            return
        at = np.searchsorted(self.plan.embedded, ids)
        if self.done[at].all():
            log.info("a fragment came twice and is left out: %s", row["fragment"])
            return
        if self.done[at].any():
            raise RuntimeError("a worker returned documents for the second time; run again to embed what is missing")
        self.done[at] = True
        self.waiting.append(row)

    def commit(self) -> None:
        """Put the fragments that wait into the table, in place of the old rows of their documents."""
        rows, self.waiting = self.waiting, []
        if not rows:
            return
        ids = np.concatenate([np.frombuffer(row["ids"], KEY) for row in rows])
        self.table.commit([row["fragment"] for row in rows], ids[self.keys.known(ids)], self.keys, run=self.run)
        done = self.applied
        done.commits += 1
        done.documents += len(ids)
        for name in ("chunks", "tokens", "truncated_tokens", "padding_tokens", "encoder_s"):
            setattr(done, name, getattr(done, name) + sum(row[name] for row in rows))
        log.info("version %d: %d documents more", self.table.version, len(ids))
