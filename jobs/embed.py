"""`nightloom embed`: from a corpus to a published table.

First, nightly and resumed runs are the same code: survey, apply, publish. Where there is nothing to embed, neither Ray
nor torch is started; where there is little, no Ray.
"""

import logging
import time
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from cluster.metrics import RayMeter, is_collected
from jobs.configuration import EmbedConfiguration
from jobs.plan import (
    Corpus,
    Model,
    is_small,
    list_corpus,
    make_recipe,
    open_table,
    pinned,
    read_columns,
    read_model,
    survey_corpus,
)
from jobs.publish import Publication, publish, settle_letters
from jobs.report import EmbedReport, Progress
from jobs.spread import Place
from model.errors import InputError
from pipeline import storage
from pipeline.apply import Applied, apply
from pipeline.dead import DeadLetters
from pipeline.lease import Lease
from pipeline.ledger import RECORDS_OF_PACE, new_run, past_pace, read_records, recorded, tokens_per
from pipeline.measures import Silent, shown_lengths
from pipeline.probes import make_probes
from pipeline.reuse import Former
from pipeline.table import EmbeddingTable
from pipeline.upkeep import clean_up, compact
from pipeline.work import Limit
from pipeline.workers import Job

log = logging.getLogger(__name__)

MOST_DEAD_KEPT = 1000
"""Dead documents that the record of a run lists, with their reasons; all of them are counted."""


def run_embed(
    configuration: EmbedConfiguration, *, job: str = "embed", run: str | None = None, begun: datetime | None = None
) -> EmbedReport:
    """Bring a table up to date with a source, and publish it.

    Args:
        job, run: how the ledger names what happens.
        begun: the deadline is the first one after it; by default after now.

    Raises:
        InputError: the source, the model, the table or the configuration is wrong, or another run is writing.
    """
    limit = limit_of(configuration, begun)
    files = list_corpus(configuration)
    configuration = pinned(configuration)
    model = read_model(configuration)
    table = open_table(configuration, model)  # refuses before anything is written
    run, settings = run or new_run(), configuration.model_dump(mode="json")
    with (
        Lease.take(configuration.table, run) as lease,
        recorded(configuration.table, run, job, configuration=settings) as entry,
        Place(configuration.compute) as place,
    ):
        table = own_table(configuration, model, table, lease)
        small = is_small(files, read_columns(configuration.columns), table)
        if not small:
            place.start_ray()
        elif table is None:
            place.start(sum(file.size for file in files))  # while the survey runs here
        letters = DeadLetters(table).keys() if table and not configuration.retry_dead else None
        corpus = survey_corpus(configuration, files, table, in_process=small, keep=True, letters=letters)
        if corpus.plan.work or table is None:
            place.start(corpus.plan.chars)
        if table is None:
            table = create_table(configuration, model, corpus, place)
            table.lease = lease
        before, seen_before = table.version, table.published_version()
        entry.set(recipe=asdict(table.recipe), fingerprint=table.fingerprint)
        entry.set(version_before=before, published_before=seen_before, planned=foresee(corpus))

        began = time.monotonic()
        applied = embed_documents(configuration, model, corpus, table, run, limit, place)
        entry.set(embedding_s=round(time.monotonic() - began, 3) if applied.tokens else 0.0)
        table.commit([], corpus.plan.deleted, corpus.plan.removals, run=run)
        settle_letters(table, corpus, applied, complete=configuration.delete_missing, run=run)
        publication = publish_or_wait(configuration, corpus, table, applied, run, place)
        status = publication.status

        report = make_report(corpus, table, applied, status, entry.seconds())
        entry.set(
            status=status,
            reasons=publication.reasons,
            gates=publication.measured,
            report=asdict(report),
            version=table.version,
            published=table.published_version(),
            tokens=applied.tokens,
            wasted_tokens=applied.wasted_tokens,
            encoder_s=round(applied.encoder_s, 3),
            chars=applied.chars,
            lengths=shown_lengths(applied.lengths),
            timeline=applied.timeline.shown(),
            actors=applied.actors,
            commits=applied.commits,
            dead=[*corpus.plan.dead, *(letter.shown() for letter in applied.dead.values())][:MOST_DEAD_KEPT],
        )
        if table.published_version() == table.version != seen_before:
            entry.set(rows=table.dataset.count_rows(), documents=table.count_documents())
        if table.version != before or lease.crashed:
            tidy(table, configuration.keep_versions)
    return report


def foresee(corpus: Corpus) -> dict[str, Any]:
    """What a run is about to do: counts out of the survey, tokens and seconds as past runs of the table had them."""
    plan = corpus.plan
    counts = {name: plan.counts[name] for name in ("new", "changed")}
    planned: dict[str, Any] = {"documents": plan.num_documents, "chars": plan.chars, "deleted": len(plan.deleted)}
    planned |= {**counts, "tokens": None, "seconds": None}
    records = read_records(corpus.table.uri, last=RECORDS_OF_PACE) if corpus.table and plan.work else []
    if density := tokens_per(records, "chars"):
        planned["tokens"] = round(density * plan.chars)
        if pace := past_pace(records):
            planned["seconds"] = round(pace[0] + density * plan.chars / pace[1], 1)
    return planned


def own_table(
    configuration: EmbedConfiguration, model: Model, table: EmbeddingTable | None, lease: Lease
) -> EmbeddingTable | None:
    """The table as it is now that this run is its only writer."""
    if table is None or table.dataset.latest_version != table.version:
        table = open_table(configuration, model)  # another run came in between
    if table is not None:
        table.lease = lease
        if lease.crashed and not lease.crashed.is_dead():
            table.claim(lease.owner.run)
    return table


def create_table(configuration: EmbedConfiguration, model: Model, corpus: Corpus, place: Place) -> EmbeddingTable:
    """The empty table of a first run. `place` has started: it knows what the vectors' precision is to be."""
    vectors = configuration.vectors
    dtype = vectors.dtype if vectors.dtype != "auto" else place.device_and_dtype()[1]
    recipe = make_recipe(model, vectors, dtype=dtype)
    return EmbeddingTable.create(
        configuration.table, recipe, model=lasting_name(configuration.model), carried=corpus.carried
    )


def embed_documents(
    configuration: EmbedConfiguration,
    model: Model,
    corpus: Corpus,
    table: EmbeddingTable,
    run: str,
    limit: Limit,
    place: Place,
) -> Applied:
    """Embed and commit what the plan says, if it says anything; `place` has started then."""
    if not corpus.plan.work:
        return Applied()
    probes = make_probes(table.uri, table.recipe, table.dataset, corpus.files, corpus.columns, run)
    job = Job(
        uri=table.uri,
        run=run,
        columns=corpus.columns,
        chunking=model.chunking,
        prompt=model.prompt,
        embedding={
            "model_path": model.path,
            "dtype": table.recipe.dtype,
            "normalize": model.normalize,
            "truncate_dim": model.dim,
            "vector_type": table.recipe.vector_type,
        },
        workers=place.workers(),
        commit_every_s=configuration.compute.commit_every_s,
        probes=probes.documents,
        former=Former.of(table, corpus.plan.removals),
        meter=RayMeter if is_collected(configuration.compute.address) else Silent,
    )
    with Progress(corpus.plan.num_documents, corpus.plan.chars) as progress:
        return apply(
            job,
            corpus.plan,
            table,
            corpus.plan.removals,
            letters=DeadLetters(table),
            probes=probes,
            off=configuration.gates.off,
            limit=limit,
            single=place.single,
            workers=place.retreat,
            advance=progress.advance,
        )


def publish_or_wait(
    configuration: EmbedConfiguration,
    corpus: Corpus,
    table: EmbeddingTable,
    applied: Applied,
    run: str,
    place: Place,
) -> Publication:
    """Publish what there is. A first version that readers see has the whole corpus; in later ones some documents may be
    a night behind.
    """
    if applied.stopped:
        log.warning("%s: %d documents are left for the next run", applied.stopped, applied.left)
        if table.published_version() is None:
            return Publication("partial")
    counts = corpus.plan.counts
    publication = publish(
        configuration,
        table,
        applied,
        dead=counts["dead"] + applied.missing,
        read=counts["read"],
        run=run,
        compact=lambda: compact(table, run, each=place.each),
    )
    if applied.stopped and publication.status != "unpublished":
        publication.status = "partial"
    return publication


def tidy(table: EmbeddingTable, keep_versions: int) -> None:
    """Clean up. The run has done its work by then: what is left behind is for the next."""
    try:
        clean_up(table, keep_versions=keep_versions)
    except Exception as error:
        log.warning("the clean-up of %s is left to the next run: %s", table.uri, storage.first_words(error))


def make_report(corpus: Corpus, table: EmbeddingTable, applied: Applied, status: str, seconds: float) -> EmbedReport:
    """Account for every document."""
    counts = corpus.plan.counts
    return EmbedReport(
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
        deleted=len(corpus.plan.deleted),
        chunks=applied.chunks,
        tokens=applied.tokens,
        truncated_tokens=applied.truncated_tokens,
        padding=applied.padding_tokens / max(applied.tokens + applied.padding_tokens, 1),
        seconds=round(seconds, 3),
        tokens_per_s=round(applied.tokens / max(seconds, 1e-9), 1),
        left=applied.left,
        reused=applied.reused,
        published=table.published_version(),
        wasted_tokens=applied.wasted_tokens,
    )


def limit_of(configuration: EmbedConfiguration, now: datetime | None = None) -> Limit:
    """The limits of a run that starts now.

    Raises:
        InputError: the deadline is no time of day.
    """
    if configuration.deadline is None:
        return Limit(configuration.budget_tokens)
    now = now or datetime.now()
    try:
        wanted = datetime.strptime(configuration.deadline, "%H:%M").time()
    except ValueError:
        raise InputError(f"the deadline {configuration.deadline!r} is no time of day; write it as in 06:00") from None
    end = datetime.combine(now.date(), wanted)
    end = end if end > now else end + timedelta(days=1)
    return Limit(configuration.budget_tokens, end.timestamp())


def lasting_name(model: str) -> str:
    """A model's name as it is found again from another working directory."""
    return str(Path(model).absolute()) if Path(model).is_dir() else model
