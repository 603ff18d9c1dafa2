"""What runs on workers: tasks that read and tokenize, actors that embed and write.

Fragments are written in the actor that embeds, not in a stage of their own: Ray Data cuts blocks by size between
stages, and a document's rows must not be cut. No document takes others along: one that fails is dead with a reason,
one that kills its worker goes into quarantine.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.chunks import ChunkingConfig
from pipeline.columns import DocumentColumns
from pipeline.keys import hash_ids
from pipeline.measures import Meter, Silent, add_lengths
from pipeline.probes import to_bytes
from pipeline.quarantine import MOST_DEATHS_ALONE, QUARANTINED, Guard
from pipeline.reuse import FOUND, HASHES, Former, put_back, take_found
from pipeline.table import write_fragment
from pipeline.tokens import TokenizeStage
from pipeline.work import POSITION, read_work

NAMES = ["document_id", "text_hash", "source"]
DEVICE_LOST = "AcceleratorError"
"""What torch raises on everything in this process once a kernel failed on the GPU. Another process can go on, and the
quarantine finds the document that does it."""


@dataclass(frozen=True, slots=True)
class Workers:
    """How the work is spread."""

    actors: int
    """Processes that hold the encoder, at most."""
    device: str
    """cpu or cuda; an actor takes one GPU."""
    threads: int | Callable[[], int]
    """Threads of one actor on CPUs, or what finds that out on the actor's machine."""
    tokens_per_batch: int | None
    """Token budget of a forward pass; None leaves it to the device."""
    block_chars: int
    share: float = 1.0
    """How much of the CPUs below an actor takes: less than 1 where there are too few for actors and readers."""
    cpus: int = 1
    """Logical CPUs of one actor."""
    least: int | None = None
    """Actors that are kept while there is little to do; None: all."""
    first: int | None = None
    """Actors to begin with; None: all."""


@lru_cache(maxsize=1)
def cached_tokenizer(model: str, chunking: ChunkingConfig, prompt: str) -> TokenizeStage:
    """The tokenizer of this process: tasks come and go, their process stays."""
    return TokenizeStage(model, chunking, prompt)


def tokenizer_of(job: "Job") -> Callable[[pa.Table], pa.Table]:
    """Document table -> token table."""
    return cached_tokenizer(job.embedding["model_path"], job.chunking, job.prompt)


def encoder_of(job: "Job") -> Any:
    """The `EmbedStage` of a job."""
    import torch  # here, because the driver of a run that finds nothing to do needs none of it

    from pipeline.embedding import EmbedStage

    workers = job.workers
    if workers.device == "cpu":
        torch.set_num_threads(workers.threads() if callable(workers.threads) else workers.threads)
    return EmbedStage(
        **job.embedding, chunking=job.chunking, device=workers.device, tokens_per_batch=workers.tokens_per_batch
    )


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
    probes: pa.Table | None = None
    """Documents that every worker embeds before its first table; their vectors come back with it."""
    former: Former | None = None
    """Where chunks of changed documents may be found again; None: all are encoded."""
    tokenizer: Callable[["Job"], Callable[[pa.Table], pa.Table]] = tokenizer_of
    """Makes the stage that tokenizes, in a task."""
    encoder: Callable[["Job"], Any] = encoder_of
    """Makes the stage that embeds, in an actor; it has the `embed` of `EmbedStage`."""
    meter: Callable[[str], Meter] = Silent
    """Makes what counts for a metrics system, in the driver and in every actor."""


def read_and_tokenize(items: pa.Table, *, job: Job, watch: Any) -> Iterator[pa.Table]:
    """Work items -> token tables, each of about `block_chars` characters."""
    stage, guard = job.tokenizer(job), Guard(watch, "tokenize")
    for documents in read_work(items, job.columns, job.workers.block_chars):
        tokens = pa.concat_tables(guard.run(documents, stage, lambda one: stage(without_text(one))))
        guard.end(documents)
        yield take_found(tokens, job.former) if job.former else tokens


def without_text(documents: pa.Table) -> pa.Table:
    """The same documents, dead: nothing of their text is looked at again."""
    for name, value in (("text", ""), ("error", QUARANTINED)):
        field = documents.schema.field(name)
        values = pa.array([value] * len(documents), field.type)
        documents = documents.set_column(documents.column_names.index(name), field, values)
    return documents


class Departure:
    """What a worker knows of the end of its machine. Ray sends nothing new to one that is being drained; what waits
    there already is run if there is time, and otherwise handed back by leaving: Ray gives it to another worker.
    """

    def __init__(self) -> None:
        self.longest_s = 0.0
        """The longest time that a unit of work took here."""

    def time_left_s(self) -> float:
        """Until this machine is taken away."""
        import ray

        me = ray.get_runtime_context().get_node_id()
        deadline_ms = ray._private.state.state.get_draining_nodes().get(me, 0)
        return deadline_ms / 1000 - time.time() if deadline_ms else math.inf

    def leave_if_late(self) -> None:
        """End this process before a unit of work that could not be finished here."""
        if self.time_left_s() < self.longest_s * 1.5:
            os._exit(1)

    def took(self, seconds: float) -> None:
        self.longest_s = max(self.longest_s, seconds)


class EmbedAndWrite:
    """Ray Data actor: token table -> one row that says which fragment holds its vectors, and what it cost."""

    def __init__(self, job: Job, watch: Any) -> None:
        self.job, self.guard = job, Guard(watch, "embed")
        self.departure = Departure() if watch is not None else None
        self.guard.start()
        self.stage = job.encoder(job)
        self.meter = job.meter(job.uri)
        self.probes = b""
        if job.probes is not None:
            parts = self.stage.embed(job.tokenizer(job)(job.probes))
            self.probes = to_bytes(pa.concat_tables([part.rows for part in parts]))

    def __call__(self, tokens: pa.Table) -> pa.Table:
        if self.departure:
            self.departure.leave_if_late()
        began = time.monotonic()
        given_up: list[pa.Table] = []

        def embed(table: pa.Table) -> list[Any]:
            try:
                return list(self.stage.embed(table))
            except Exception as error:
                if type(error).__name__ == DEVICE_LOST:
                    os._exit(1)
                raise

        def give_up(table: pa.Table) -> list[Any]:
            given_up.append(table)
            return embed(table.slice(0, 0))

        encoded = tokens.drop_columns([name for name in (HASHES, FOUND) if name in tokens.column_names])
        parts = [part for found in self.guard.run(encoded, embed, give_up) for part in found]
        rows = pa.concat_tables([part.rows for part in parts])
        dead = [letter(row) for part in parts for row in part.dead.to_pylist()]
        quarantined = {"stage": "quarantine", "error": QUARANTINED}
        dead += [letter({**row, **quarantined}) for table in given_up for row in table.select(NAMES).to_pylist()]
        reused = 0
        if self.job.former:
            rows, reused = put_back(rows, tokens, [row["document_id"] for row in dead])
        statistics = [part.statistics for part in parts]
        written = {
            "fragment": write_fragment(self.job.uri, rows, self.job.run) if len(rows) else "",
            "ids": np.unique(hash_ids(rows["document_id"].unique())).tobytes(),
            "positions": np.unique(rows[POSITION].to_numpy()).tobytes(),
            "dead": json.dumps(dead),
            "probes": self.probes,  # with every output: which of them arrives first is not known
            "chunks": len(rows),
            "reused": reused,
            "chars": pc.sum(tokens["num_chars"]).as_py() or 0,
            "tokens": sum(s.model_tokens for s in statistics),
            "padding_tokens": sum(s.padding_tokens for s in statistics),
            "truncated_tokens": sum(s.truncated_tokens for s in statistics),
            "encoder_s": float(sum(s.seconds for s in statistics)),
            "lengths": add_lengths(s.lengths for s in statistics),
        }
        self.guard.end(tokens)
        seconds = time.monotonic() - began
        if self.departure:
            self.departure.took(seconds)
        self.meter.add(encoded_tokens=written["tokens"], encoder_seconds=written["encoder_s"])
        self.meter.observe(block_seconds=seconds)
        return pa.table({name: [value] for name, value in written.items()})


def letter(row: dict[str, Any]) -> dict[str, Any]:
    """What the driver is told of a dead document; `pipeline.dead.Dead` is made of it."""
    if row["error"] == QUARANTINED:
        row = {**row, "stage": "quarantine", "attempts": MOST_DEATHS_ALONE}
    return {**row, "text_hash": row["text_hash"].hex()}
