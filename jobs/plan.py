"""`nightloom plan`: what a run would do. `nightloom embed` begins with the same steps.

The survey runs in this process while a corpus is small, and as Ray tasks when it is not: the second run on an unchanged
folder then answers in seconds, because neither Ray nor torch is started.
"""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.session import local_cpus, session
from jobs.configuration import ColumnSettings, EmbedConfiguration, VectorSettings
from jobs.report import clock, line
from model.errors import InputError
from model.folder import (
    ModelFolder,
    check_tokenizer,
    load_tokenizer,
    read_folder,
    resolve_folder,
    tokenizer_hash,
    weights_hash,
)
from pipeline.chunks import ChunkingConfig
from pipeline.columns import DocumentColumns
from pipeline.dead import DeadLetters
from pipeline.documents import check_source, document_schema, estimate_documents
from pipeline.keys import Keys
from pipeline.ledger import RECORDS_OF_PACE, past_pace, read_records
from pipeline.recipe import CODE_VERSION, CODE_VERSIONS, Recipe
from pipeline.storage import SourceFile, is_s3, list_sources, local_model, promoted_model
from pipeline.survey import Options, Plan, RayTasks, Tasks, make_plan
from pipeline.table import NEXT, EmbeddingTable
from pipeline.tokens import TokenizeStage
from pipeline.vectors import check_also, check_type
from pipeline.work import read_work

SMALL_CORPUS_BYTES = 64_000_000
"""Up to here the survey takes about as long as starting Ray would."""
SMALL_CORPUS_DOCUMENTS = 200_000
"""And up to here it takes 60 MB at most of this process's memory, at some 300 bytes a document."""
FILES_LOOKED_INTO = 8
"""To estimate how many documents there are."""
EXACT_CHARS = 4_000_000
"""Bytes of text up to which `plan` counts every token; beyond, it counts a sample of about this much."""
SAMPLES = 16
"""Places that the sample is taken from."""
LEAST_CHARS = 400_000
"""Bytes of text that one reading task gets at least, unless compute.block_chars says something else."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Everything that is known before work begins."""

    files: list[SourceFile]
    columns: DocumentColumns
    carried: list[pa.Field]
    """The carried columns as the table has them, or is to have them."""
    table: EmbeddingTable | None
    plan: Plan


@dataclass(frozen=True, slots=True)
class Model:
    """A model folder, and how it is used."""

    path: str
    """Where workers find it: an s3:// folder as it was named (each machine keeps a copy), else the local folder."""
    folder: ModelFolder
    chunking: ChunkingConfig
    prompt: str
    normalize: bool
    dim: int


def pinned(configuration: EmbedConfiguration) -> EmbedConfiguration:
    """The configuration with the folder that counts in the place of a place where models are promoted: that is what a
    table and the ledger remember, whatever is promoted tomorrow.
    """
    return configuration.model_copy(update={"model": promoted_model(configuration.model)})


def read_model(configuration: EmbedConfiguration) -> Model:
    """Check the model folder and settle what the configuration leaves to it. Loads no weights.

    Raises:
        InputError: no model there, a tokenizer that does not fit, settings that the model cannot meet.
    """
    folder_path = str(resolve_folder(local_model(configuration.model)).absolute())
    folder = read_folder(folder_path)
    tokenizer = load_tokenizer(folder.path)
    check_tokenizer(tokenizer, folder.config, folder.path)
    if not folder.weight_files:
        raise InputError(f"{folder.path} holds no model: model.safetensors is missing")
    vectors = configuration.vectors
    if vectors.dim is not None and vectors.dim > folder.dim:
        raise InputError(f"vectors.dim is {vectors.dim}, the model gives {folder.dim}")
    normalize = folder.normalize if vectors.normalize is None else vectors.normalize
    dim = vectors.dim or folder.dim
    check_type(vectors.type, dim, normalize=normalize)
    check_also(vectors.also, vectors.type, dim, normalize=normalize)
    name = vectors.prompt_name or folder.default_prompt_name
    if vectors.prompt is None and name is not None and name not in folder.prompts:
        raise InputError(f"{folder.path} has no prompt {name!r}; it has {', '.join(sorted(folder.prompts)) or 'none'}")
    prompt = vectors.prompt if vectors.prompt is not None else folder.prompts[name] if name else ""
    prompt_tokens = len(tokenizer.encode(prompt, add_special_tokens=False).ids) if prompt else 0
    chunking = ChunkingConfig(**configuration.chunking.model_dump()).settle(folder.max_tokens, prompt_tokens)
    path = configuration.model if is_s3(configuration.model) else folder_path
    return Model(path, folder, chunking, prompt, normalize, dim)


def make_recipe(model: Model, vectors: VectorSettings, *, dtype: str) -> Recipe:
    """The recipe of a model so used; `dtype` says what an "auto" in the settings stands for."""
    chunking = model.chunking
    pooled = model.folder.pooling
    if model.prompt and not model.folder.include_prompt:
        pooled += " without prompt"
    return Recipe(
        weights=weights_hash(model.folder.path),
        tokenizer=tokenizer_hash(model.folder.path),
        pooling=pooled,
        normalize=model.normalize,
        prompt=model.prompt,
        granularity=chunking.granularity,
        max_tokens=chunking.max_tokens or model.folder.max_tokens,
        long_documents=chunking.long_documents,
        overlap_tokens=chunking.overlap_tokens,
        chunk_tokens=chunking.chunk_tokens,
        context=chunking.context,
        dtype=dtype,
        vector_type=vectors.type,
        dim=model.dim,
        code=CODE_VERSIONS.get(vectors.type, CODE_VERSION),
        also=check_also(vectors.also, vectors.type, model.dim, normalize=model.normalize),
    ).settled()


def read_columns(settings: ColumnSettings) -> DocumentColumns:
    return DocumentColumns(
        id=settings.id or "auto", text=settings.text, template=settings.template, carry=settings.carry
    )


def open_table(configuration: EmbedConfiguration, model: Model) -> EmbeddingTable | None:
    """The table as it is, if it is there and the configuration continues it.

    Raises:
        InputError: it was written under another recipe, or carries other columns.
    """
    table = EmbeddingTable.find(configuration.table)
    if table is None:
        return None
    vectors = configuration.vectors
    dtype = table.recipe.dtype if vectors.dtype == "auto" else vectors.dtype
    table.require(make_recipe(model, vectors, dtype=dtype))
    carry = list(configuration.columns.carry)
    if sorted(table.carried) != sorted(carry):
        raise InputError(
            f"the table {table.uri} carries the columns {shown(table.carried)}, columns.carry asks for {shown(carry)}: "
            "use the same, or name a new table"
        )
    return table


def shown(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def survey_corpus(
    configuration: EmbedConfiguration,
    files: list[SourceFile],
    table: EmbeddingTable | None,
    *,
    in_process: bool,
    keep: bool = False,
    letters: Keys | None = None,
) -> Corpus:
    """Compare every source file with the table, reading those that changed; in Ray tasks unless `in_process`.

    Args:
        keep: whether to record beside the table what the files hold, so that they need not be read again.
        letters: documents that failed before, and the text they failed with.

    Raises:
        InputError: a file that cannot be read, a column that is missing.
    """
    columns = read_columns(configuration.columns)
    fields = carried_fields(files, columns, table)
    columns = replace(columns, carry_types=tuple(field.type for field in fields))
    options = Options(
        delete_missing=configuration.delete_missing,
        letters=letters or Keys.empty(),
        backfill=outdated_keys(configuration),
    )
    plan = make_plan(
        files,
        columns,
        configuration.table,
        table,
        options,
        Tasks() if in_process else RayTasks(),
        least_chars=configuration.compute.block_chars or LEAST_CHARS,
        keep=keep,
    )
    return Corpus(files, columns, fields, table, plan)


def outdated_keys(configuration: EmbedConfiguration) -> Keys:
    """In a migration, the documents that readers have under the recipe they see until it is complete."""
    uri, _, name = configuration.table.rpartition("/")
    if name != NEXT:
        return Keys.empty()
    table = EmbeddingTable.open(uri)
    return EmbeddingTable.open(uri, table.published_version()).keys()


def list_corpus(configuration: EmbedConfiguration) -> list[SourceFile]:
    """The files of the source, without those of the table where that lies within it.

    Raises:
        InputError: no such source, nothing in it that can be read, or a column that its first file lacks.
    """
    table = configuration.table if is_s3(configuration.table) else str(Path(configuration.table).absolute())
    inside = table.rstrip("/").removesuffix(f"/{NEXT}") + "/"
    files = [file for file in list_sources(configuration.source) if not file.path.startswith(inside)]
    if not files:
        raise InputError(f"{configuration.source} holds no documents beside the table itself")
    check_source(files[0], read_columns(configuration.columns))
    return files


def is_small(files: Sequence[SourceFile], columns: DocumentColumns, table: EmbeddingTable | None = None) -> bool:
    """Whether the survey is to run in this process: few bytes, and few documents.

    How many documents there are goes by the table, or before the first run by some of the files: a night without a
    change opens none of them.

    Raises:
        InputError: one of the files cannot be read, or lacks a column.
    """
    size = sum(file.size for file in files)
    if size > SMALL_CORPUS_BYTES:
        return False
    if table is not None:
        most = SMALL_CORPUS_DOCUMENTS
        return table.dataset.count_rows() <= most or table.count_documents() <= most
    some = files[:: -(-len(files) // FILES_LOOKED_INTO)]
    found = sum(estimate_documents(file, columns) for file in some)
    return found * size <= SMALL_CORPUS_DOCUMENTS * sum(file.size for file in some)


def carried_fields(
    files: Sequence[SourceFile], columns: DocumentColumns, table: EmbeddingTable | None
) -> list[pa.Field]:
    """The carried columns, with the types of the table, or those of the first file where there is none yet."""
    if not columns.carry:
        return []
    schema = table.schema if table else document_schema(files[0], columns)
    return [schema.field(name) for name in columns.carry]


def count_tokens(corpus: Corpus, model: Model) -> tuple[int, bool]:
    """(tokens of the text to embed, whether that is exact); beyond EXACT_CHARS it goes by a sample over the files."""
    work, chars = corpus.plan.work, corpus.plan.chars
    exact = chars <= EXACT_CHARS
    stage = TokenizeStage(model.path, model.chunking, model.prompt)
    # The beginnings of some tables all over the plan.
    chosen = work if exact else work[:: -(-len(work) // SAMPLES)]
    most = EXACT_CHARS // len(chosen)
    tokens = bytes_read = 0
    for item in chosen:
        here = 0
        for documents in read_work(item.load(), corpus.columns, most):
            here += documents["text"].nbytes
            tokens += sum(len(row) for row in stage(documents)["tokens"])
            if not exact and here >= most:
                break
        bytes_read += here
    return (tokens, True) if exact else (round(tokens * chars / max(bytes_read, 1)), False)


@dataclass(frozen=True, slots=True)
class PlanReport:
    """What `nightloom plan` found."""

    job: str
    status: str
    table: str
    read: int
    new: int
    changed: int
    unchanged: int
    empty: int
    duplicate: int
    dead: int
    deleted: int
    files: int
    chars: int
    """Bytes of text to embed."""
    tokens: int
    tokens_exact: bool
    seconds: float | None
    """What embedding would take as fast as past runs embedded; None before there was one."""
    cost: float | None
    """That time at the price that was given."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def summary(self) -> str:
        todo = self.new + self.changed
        head = f"{todo:,} of {self.read:,} documents would be embedded into {self.table}."
        if not todo and not self.deleted:
            head = f"Nothing to do: {self.table} is up to date with {self.read:,} documents."
        rows = [line(name, f"{getattr(self, name):,}") for name in ("new", "changed", "unchanged")]
        rows += [line(n, f"{v:,}") for n in ("empty", "duplicate", "dead", "deleted") if (v := getattr(self, n))]
        about = "" if self.tokens_exact else "about "
        rows.append(line("tokens", f"{about}{self.tokens:,}"))
        if self.seconds is not None:
            rows.append(line("time", f"about {clock(self.seconds)}, as fast as past runs"))
        elif self.tokens:
            rows.append(line("time", "not known before a run has embedded something"))
        if self.cost is not None:
            rows.append(line("cost", f"about {self.cost:,.2f}"))
        return "\n".join([head, "", *rows])


def run_plan(configuration: EmbedConfiguration, *, price_per_hour: float | None = None) -> PlanReport:
    """Compare the source with the table, count tokens, and say how long past runs would have taken. Writes nothing.

    Args:
        price_per_hour: of all machines that embed, in any currency.
    """
    if price_per_hour is not None and not 0 <= price_per_hour < float("inf"):
        raise InputError(f"--price-per-hour is {price_per_hour}; it must be a price, 0 or more")
    files = list_corpus(configuration)
    configuration = pinned(configuration)
    model = read_model(configuration)
    table = open_table(configuration, model)
    small = is_small(files, read_columns(configuration.columns), table)
    with nullcontext() if small else session(configuration.compute.address, num_cpus=local_cpus()):
        letters = DeadLetters(table).keys() if table and not configuration.retry_dead else None
        corpus = survey_corpus(configuration, files, table, in_process=small, letters=letters)
        tokens, exact = count_tokens(corpus, model) if corpus.plan.work else (0, True)
    counts: dict[str, Any] = dict(corpus.plan.counts)
    records = read_records(configuration.table, last=RECORDS_OF_PACE)
    pace, seconds = past_pace(records), None
    if pace:
        # The encoder sees [CLS] and [SEP] too.
        seen = tokens + 2 * corpus.plan.num_documents
        seconds = pace[0] + seen / pace[1] if seen else 0.0
    cost = None if seconds is None or price_per_hour is None else round(seconds * price_per_hour / 3600, 4)
    return PlanReport(
        job="plan",
        status="done",
        table=configuration.table,
        deleted=len(corpus.plan.deleted),
        files=len(files),
        chars=corpus.plan.chars,
        tokens=tokens,
        tokens_exact=exact,
        seconds=None if seconds is None else round(seconds, 1),
        cost=cost,
        **counts,
    )
