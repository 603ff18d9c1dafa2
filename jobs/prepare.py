"""`nightloom prepare`: a corpus becomes token shards to train on.

The corpus is looked at first (ids and hashes of texts), so that what is where is settled before a worker writes; then
Ray Data tasks read, tokenize and write shards; the manifest comes last. A run that was killed goes on where it was; one
that finds the same corpus prepared already does nothing; one that finds another corpus there refuses.
"""

import json
import logging
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.session import local_cpus, session
from jobs.configuration import PrepareConfiguration
from jobs.plan import is_small, read_columns
from jobs.report import Progress, clock, line
from model.errors import InputError
from pipeline.columns import DocumentColumns
from pipeline.documents import check_source
from pipeline.ledger import RECORDS, keep_record, new_run
from pipeline.preparation import (
    PARTS,
    Documents,
    ShardPlan,
    choose_documents,
    make_tasks,
    plan_shards,
    read_parts,
    write_shards,
)
from pipeline.shards import (
    FORMAT,
    HELD_OUT_SPLIT,
    MANIFEST,
    TRAIN,
    Manifest,
    ShardEntry,
    list_names,
    read_file,
    read_manifest,
    remove,
    write_file,
)
from pipeline.sources import Holding, read_part, split_files
from pipeline.storage import SourceFile, filesystem, is_s3, list_sources, local_model
from pipeline.vocabulary import FOLDER, Vocabulary, copy_tokenizer, read_vocabulary, train_tokenizer

log = logging.getLogger(__name__)

SHARD = re.compile(rf"({TRAIN}|{HELD_OUT_SPLIT})-\d+\.arrow")
TRAINING_BYTES = 256_000_000
"""Text that a tokenizer is trained on, at most: merges do not change any more with more."""
MOST_DEAD_KEPT = 1000
"""Dead documents that the record of a run lists; all of them are counted."""


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What `nightloom prepare` did."""

    job: str
    status: str
    """prepared, or unchanged: the place held these shards already."""
    place: str
    fingerprint: str
    """Of the manifest."""
    read: int
    train: int
    heldout: int
    empty: int
    duplicate: int
    dead: int
    tokens: int
    heldout_tokens: int
    vocab_size: int
    shards: int
    bytes: int
    seconds: float
    tokens_per_s: float
    """Of those that this run tokenized."""

    def __post_init__(self) -> None:
        accounted = self.train + self.heldout + self.empty + self.duplicate + self.dead
        if accounted != self.read:
            raise RuntimeError(f"{self.read} documents were read, {accounted} are accounted for: {asdict(self)}")

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def summary(self) -> str:
        head = f"{self.train:,} documents prepared for training in {self.place}."
        if self.status == "unchanged":
            head = f"Nothing to do: {self.place} holds these {self.train:,} documents already."
        rows = [line("read", f"{self.read:,} documents")]
        rows += [line(n, f"{v:,}") for n in ("heldout", "empty", "duplicate", "dead") if (v := getattr(self, n))]
        speed = f" at {self.tokens_per_s:,.0f} a second" if self.tokens_per_s else ""
        rows.append(line("tokens", f"{self.tokens:,} to train on, {self.heldout_tokens:,} held out{speed}"))
        rows.append(line("vocabulary", f"{self.vocab_size:,}"))
        rows.append(line("shards", f"{self.shards:,}, {self.bytes:,} bytes"))
        return "\n".join([head, "", *rows, line("time", clock(self.seconds))])


def run_prepare(configuration: PrepareConfiguration) -> PrepareReport:
    """Bring token shards of a corpus into a place.

    Raises:
        InputError: the source, the place, the tokenizer or the configuration is wrong.
    """
    started, run = time.monotonic(), new_run()
    uri = configuration.tokens.rstrip("/") if is_s3(configuration.tokens) else filesystem(configuration.tokens)[1]
    settings = settings_of(configuration)
    columns = read_columns(configuration.columns)
    files = list_files(configuration.source, uri, columns)
    small = is_small(files, columns)
    found = read_manifest(uri)
    with ExitStack() as stack:
        if not small:
            stack.enter_context(session(configuration.compute.address, num_cpus=local_cpus()))
        documents = choose_documents(look_at(files, columns, in_process=small), configuration.heldout)
        fingerprint = documents.fingerprint(settings)
        if found is not None:
            if found.corpus != fingerprint:
                raise InputError(
                    f"{uri} holds token shards of another corpus, or made with other settings; name another place, "
                    "or remove it first"
                )
            return report_of(found, uri, "unchanged", started, 0)
        check_place(uri)
        if not documents.counts[TRAIN]:
            raise InputError(f"{configuration.source} holds no text to train on; {described(documents.counts)}")
        vocabulary = settle_tokenizer(configuration, uri, documents, files, columns)
        if small:
            stack.enter_context(session(configuration.compute.address, num_cpus=local_cpus()))
        keep_record(uri, run, {"job": "prepare", "status": "running", "configuration": configuration.model_dump()})
        plans = plan_shards(documents, configuration.shard_bytes)
        done = finished(uri, plans, fingerprint, vocabulary)
        if done:
            log.info("%d of %d shards are there from a run before", len(done), len(plans))
        tokenized = 0
        with Progress(len(documents.file_D), sum(plan.bytes for plan in plans), "preparing") as progress:
            sizes = {plan.name: plan.bytes for plan in plans}
            todo = make_tasks([plan for plan in plans if plan.name not in done], documents, files)
            for record in written_shards(todo, uri, columns, vocabulary, fingerprint):
                entry = record["entry"]
                done[entry["name"]] = record
                tokenized += entry["tokens"]
                progress.advance(entry["documents"], entry["tokens"], sizes[entry["name"]])
    manifest = make_manifest(plans, done, vocabulary, documents, settings, fingerprint)
    write_file(uri, MANIFEST, manifest.to_bytes())
    tidy(uri, manifest)
    report = report_of(manifest, uri, "prepared", started, tokenized)
    kept = {"job": "prepare", "status": report.status, "configuration": configuration.model_dump()}
    keep_record(uri, run, {**kept, "report": asdict(report), "dead": documents.dead[:MOST_DEAD_KEPT]})
    return report


def settings_of(configuration: PrepareConfiguration) -> dict[str, Any]:
    """What decides shards beside the documents.

    Raises:
        InputError: no tokenizer, two of them, or one that cannot be used.
    """
    if (configuration.tokenizer is None) == (configuration.train_tokenizer is None):
        raise InputError("name a tokenizer with --tokenizer FOLDER, or have one trained with --train-tokenizer SIZE")
    settings = {"format": FORMAT, "heldout": configuration.heldout, "shard_bytes": configuration.shard_bytes}
    if configuration.tokenizer is not None:
        return {**settings, "tokenizer": read_vocabulary(local_model(configuration.tokenizer)).hash}
    return {**settings, "train_tokenizer": configuration.train_tokenizer}


def list_files(source: str, uri: str, columns: DocumentColumns) -> list[SourceFile]:
    """The files of a source, without what lies in the place of the shards.

    Raises:
        InputError: nothing there that can be read, or the first file lacks a column.
    """
    files = [file for file in list_sources(source) if not file.path.startswith(uri + "/")]
    if not files:
        raise InputError(f"{source} holds no documents beside the token shards themselves")
    check_source(files[0], columns)
    return files


def look_at(files: Sequence[SourceFile], columns: DocumentColumns, *, in_process: bool) -> list[Holding]:
    """Ids and hashes of all documents; by Ray tasks unless `in_process`."""
    parts = split_files(enumerate(files), columns)
    if in_process:
        return [read_part(part, columns) for part in parts]
    import ray

    task = ray.remote(read_part)
    return ray.get([task.remote(part, columns) for part in parts])


def check_place(uri: str) -> None:
    """Refuse a place that holds something else than an unfinished run."""
    for name in list_names(uri):
        ours = SHARD.fullmatch(name) or name.startswith((f"{PARTS}/", f"{FOLDER}/", f"{RECORDS}/"))
        if not ours and not Path(name).name.startswith("."):
            raise InputError(f"{uri} is not empty: it holds {name}; name another place for the token shards")


def settle_tokenizer(
    configuration: PrepareConfiguration,
    uri: str,
    documents: Documents,
    files: Sequence[SourceFile],
    columns: DocumentColumns,
) -> Vocabulary:
    """Put the tokenizer beside the shards: the one that was named, or one trained on what is not held out."""
    if configuration.tokenizer is not None:
        folder = local_model(configuration.tokenizer)
        copy_tokenizer(folder, uri)
        return read_vocabulary(folder)
    with tempfile.TemporaryDirectory() as folder:
        log.info("training a tokenizer")
        texts = sample_texts(documents, files, columns)
        train_tokenizer(texts, configuration.train_tokenizer or 0, Path(folder))
        copy_tokenizer(folder, uri)
        return read_vocabulary(folder)


def sample_texts(documents: Documents, files: Sequence[SourceFile], columns: DocumentColumns) -> Iterator[str]:
    """Texts to train on, all or every so many-th, in the order of the source."""
    [everything] = plan_shards(documents, int(documents.bytes_D.sum()))[:1]
    stride = -(-everything.bytes // TRAINING_BYTES)
    plan = ShardPlan("", everything.places[::stride], 0)
    for task in make_tasks([plan], documents, files):
        for table in read_parts(task.to_pylist(), columns):
            yield from table["text"].to_pylist()


def finished(
    uri: str, plans: Sequence[ShardPlan], fingerprint: str, vocabulary: Vocabulary
) -> dict[str, dict[str, Any]]:
    """Records of the shards that an earlier run of the same corpus, settings and tokenizer left, by name."""
    names, done = set(list_names(uri)), {}
    for plan in plans:
        if plan.name in names and f"{PARTS}/{plan.name}.json" in names:
            record = json.loads(read_file(uri, f"{PARTS}/{plan.name}.json") or b"{}")
            if (record.get("fingerprint"), record.get("tokenizer")) == (fingerprint, vocabulary.hash):
                done[plan.name] = record
    return done


def written_shards(
    tasks: list[Any], uri: str, columns: DocumentColumns, vocabulary: Vocabulary, fingerprint: str
) -> Iterator[dict[str, Any]]:
    """The distributed part: yields the record of every shard as it is written, in any order."""
    if not tasks:
        return
    import ray

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    with ray.data.DataContext.current(context):
        dataset = ray.data.from_arrow(tasks).map_batches(
            write_shards,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=1,
            fn_kwargs={
                "uri": uri,
                "columns": columns,
                "tokenizer_hash": vocabulary.hash,
                "vocab_size": vocabulary.size,
                "fingerprint": fingerprint,
            },
        )
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from map(json.loads, batch["record"].to_pylist())


def make_manifest(
    plans: Sequence[ShardPlan],
    records: dict[str, dict[str, Any]],
    vocabulary: Vocabulary,
    documents: Documents,
    settings: dict[str, Any],
    fingerprint: str,
) -> Manifest:
    """Put what the shards say of themselves together."""
    shards: dict[str, list[ShardEntry]] = {TRAIN: [], HELD_OUT_SPLIT: []}
    lengths: dict[str, dict[str, int]] = {TRAIN: {}, HELD_OUT_SPLIT: {}}
    for plan in plans:
        split, record = plan.name.partition("-")[0], records[plan.name]
        shards[split].append(ShardEntry(**record["entry"]))
        for upto, number in record["lengths"].items():
            lengths[split][upto] = lengths[split].get(upto, 0) + number
    return Manifest(
        tokenizer=vocabulary.hash,
        vocab_size=vocabulary.size,
        cls_id=vocabulary.cls_id,
        sep_id=vocabulary.sep_id,
        mask_id=vocabulary.mask_id,
        pad_id=vocabulary.pad_id,
        unk_id=vocabulary.unk_id,
        special_ids=vocabulary.special_ids,
        corpus=fingerprint,
        settings=settings,
        counts=documents.counts,
        lengths=lengths,
        shards={split: tuple(entries) for split, entries in shards.items()},
    )


def tidy(uri: str, manifest: Manifest) -> None:
    """Remove what unfinished runs left; the manifest has it all."""
    named = {entry.name for entries in manifest.shards.values() for entry in entries}
    for name in list_names(uri):
        if (SHARD.fullmatch(name) and name not in named) or name.startswith("."):
            remove(uri, name)
    remove(uri, PARTS)


def described(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in counts.items())


def report_of(manifest: Manifest, uri: str, status: str, started: float, tokenized: int) -> PrepareReport:
    seconds = time.monotonic() - started
    entries = [entry for entries in manifest.shards.values() for entry in entries]
    return PrepareReport(
        job="prepare",
        status=status,
        place=uri,
        fingerprint=manifest.fingerprint,
        tokens=manifest.num_tokens(),
        heldout_tokens=manifest.num_tokens(HELD_OUT_SPLIT),
        vocab_size=manifest.vocab_size,
        shards=len(entries),
        bytes=sum(entry.bytes for entry in entries),
        seconds=round(seconds, 3),
        tokens_per_s=round(tokenized / max(seconds, 1e-9), 1),
        **manifest.counts,
    )
