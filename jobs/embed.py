"""`nightloom embed`: from a corpus to a published table.

First, nightly and resumed runs are the same code: survey, apply, publish. When there is nothing to embed, neither Ray
nor torch is started.
"""

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.session import SPARE_CPUS, local_cpus, physical_cores, session
from jobs.configuration import EmbedConfiguration
from jobs.plan import (
    Corpus,
    Model,
    carried_fields,
    is_small,
    list_corpus,
    make_recipe,
    open_table,
    read_model,
    survey_corpus,
)
from jobs.report import EmbedReport, Progress, keep_record, new_run
from model.errors import InputError
from pipeline.apply import Applied, Workers, apply
from pipeline.table import EmbeddingTable

log = logging.getLogger(__name__)

CORES_PER_ACTOR = 8
"""On CPUs, one encoder process for so many cores: more threads than that do not make one batch faster."""
BLOCK_CHARS = {"cpu": 400_000, "cuda": 8_000_000}
"""Characters in one unit of work: some seconds of an encoder's time, and enough documents to fill its batches."""
MOST_DEAD_KEPT = 1000
"""Dead documents that the record of a run lists, with their reasons; all of them are counted."""


def run_embed(configuration: EmbedConfiguration) -> EmbedReport:
    """Bring a table up to date with a source, and publish it.

    Raises:
        InputError: the source, the model, the table or the configuration is wrong.
    """
    started = time.monotonic()
    files = list_corpus(configuration)
    model = read_model(configuration)
    table = open_table(configuration, model)
    address = configuration.compute.address
    cpus = local_cpus(configuration.compute.actors or 1)
    if table is not None and is_small(files):
        corpus = survey_corpus(configuration, files, table, in_process=True)
        if not corpus.plan.work:
            return finish(configuration, corpus, table, Applied(), started, new_run())
        with session(address, num_cpus=cpus):
            return embed(configuration, model, corpus, table, started)
    # In this order, and in one thread: Ray starts its workers while the survey runs here, and a process that forks (Ray
    # does, to start itself) while another of its threads imports torch can hang.
    with session(address, num_cpus=cpus):
        corpus = survey_corpus(configuration, files, table, in_process=is_small(files))
        return embed(configuration, model, corpus, table, started)


def embed(
    configuration: EmbedConfiguration, model: Model, corpus: Corpus, table: EmbeddingTable | None, started: float
) -> EmbedReport:
    """Apply the plan within a Ray session, publish, report."""
    run = new_run()
    device = choose_device(configuration.compute.device)
    vectors = configuration.vectors
    if table is None:
        dtype = vectors.dtype if vectors.dtype != "auto" else dtype_of_workers(configuration.compute.address, device)
        recipe = make_recipe(model, dtype=dtype, vector_type=vectors.type)
        table = EmbeddingTable.create(
            configuration.table, recipe, model=lasting_name(configuration.model), carried=carried_fields(corpus)
        )
    keep_record(table.uri, run, record(configuration, table, "running"))
    applied = Applied()
    if corpus.plan.work:
        with Progress(len(corpus.plan.embedded), corpus.plan.chars) as progress:
            applied = apply(
                corpus.plan,
                table,
                corpus.keys,
                run=run,
                columns=corpus.columns,
                chunking=model.chunking,
                prompt=model.prompt,
                embedding={
                    "model_path": model.path,
                    "dtype": table.recipe.dtype,
                    "normalize": model.normalize,
                    "truncate_dim": model.dim,
                    "vector_type": vectors.type,
                },
                workers=plan_workers(configuration, device),
                commit_every_s=configuration.compute.commit_every_s,
                advance=progress.advance,
            )
    return finish(configuration, corpus, table, applied, started, run)


def finish(
    configuration: EmbedConfiguration,
    corpus: Corpus,
    table: EmbeddingTable,
    applied: Applied,
    started: float,
    run: str,
) -> EmbedReport:
    """Remove what is to be removed, move the tag, account for every document, keep the record."""
    plan, counts = corpus.plan, corpus.plan.counts
    table.commit([], plan.deleted, corpus.keys, run=run)
    status = "unchanged" if table.published_version() == table.version else "published"
    if status == "published":
        table.publish()
    seconds = time.monotonic() - started
    report = EmbedReport(
        job="embed",
        status=status,
        table=table.uri,
        version=table.version,
        fingerprint=table.fingerprint,
        read=counts["read"],
        embedded=applied.documents,
        unchanged=counts["unchanged"],
        empty=counts["empty"],
        duplicate=counts["duplicate"],
        dead=counts["dead"] + applied.missing,
        deleted=len(plan.deleted),
        chunks=applied.chunks,
        tokens=applied.tokens,
        truncated_tokens=applied.truncated_tokens,
        padding=applied.padding_tokens / max(applied.tokens + applied.padding_tokens, 1),
        seconds=round(seconds, 3),
        tokens_per_s=round(applied.tokens / max(seconds, 1e-9), 1),
    )
    kept = {
        **record(configuration, table, status),
        "report": asdict(report),
        "encoder_s": round(applied.encoder_s, 3),
        "commits": applied.commits,
        "dead": (plan.dead + applied.dead)[:MOST_DEAD_KEPT],
    }
    keep_record(table.uri, run, kept)
    return report


def record(configuration: EmbedConfiguration, table: EmbeddingTable, status: str) -> dict[str, Any]:
    """What is kept of a run: enough to repeat it. Credentials are no part of a configuration."""
    return {
        "job": "embed",
        "status": status,
        "configuration": configuration.model_dump(mode="json"),
        "recipe": asdict(table.recipe),
        "fingerprint": table.fingerprint,
        "version": table.version,
    }


def lasting_name(model: str) -> str:
    """A model's name as it is found again from another working directory."""
    return str(Path(model).absolute()) if Path(model).is_dir() else model


def choose_device(asked: str) -> str:
    """cpu or cuda for the actors of this session; "auto" takes GPUs where the session has any.

    Raises:
        InputError: GPUs are asked for and there are none.
    """
    import ray

    gpus = ray.cluster_resources().get("GPU", 0)
    if asked == "cuda" and not gpus:
        raise InputError("compute.device is cuda, and there is no GPU here; set compute.device=cpu or auto")
    return asked if asked != "auto" else "cuda" if gpus else "cpu"


def best_dtype(device: str) -> str:
    """The dtype that a device multiplies fastest."""
    import torch

    from model.embedder import choose_dtype

    return str(choose_dtype("auto", torch.device(device))[0]).removeprefix("torch.")


def dtype_of_workers(address: str | None, device: str) -> str:
    """`best_dtype` where the work is done: here, or on a machine of the cluster."""
    if address is None:
        return best_dtype(device)
    import ray

    task = ray.remote(best_dtype).options(num_gpus=1 if device == "cuda" else 0)
    return ray.get(task.remote(device))


def plan_workers(configuration: EmbedConfiguration, device: str) -> Workers:
    """How many actors there are, and how many threads each has.

    Raises:
        InputError: more actors than the session has processors for.
    """
    import ray

    compute, resources = configuration.compute, ray.cluster_resources()
    if device == "cuda":
        most = int(resources["GPU"])
        actors = compute.actors or most
        unit = "GPUs"
    else:
        most = max(1, int(resources.get("CPU", 1)) - SPARE_CPUS)
        cores = physical_cores() if compute.address is None else int(resources.get("CPU", 1))
        actors = compute.actors or min(most, max(1, cores // CORES_PER_ACTOR))
        unit = f"CPUs, {SPARE_CPUS} of them kept free"
    if actors > most:
        raise InputError(f"compute.actors is {actors}, this session has room for {most} ({unit})")
    return Workers(
        actors=actors,
        device=device,
        threads=max(1, physical_cores() // actors),
        tokens_per_batch=compute.tokens_per_batch,
        block_chars=compute.block_chars or BLOCK_CHARS[device],
    )
