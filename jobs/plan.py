"""`nightloom plan`: what a run would do. `nightloom embed` begins with the same steps.

The survey runs in this process while a corpus is small, and as Ray tasks when it is not: the second run on an unchanged
folder then answers in seconds, because neither Ray nor torch is started.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.session import local_cpus, session
from jobs.configuration import ColumnSettings, EmbedConfiguration
from jobs.report import line
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
from pipeline.documents import check_source, document_schema
from pipeline.recipe import Recipe
from pipeline.storage import SourceFile, is_s3, list_sources, local_model
from pipeline.survey import FileSurvey, Plan, make_plan, read_work, survey_file, work_tables
from pipeline.table import EmbeddingTable, Keys
from pipeline.tokens import TokenizeStage

SMALL_CORPUS_BYTES = 64_000_000
"""Up to here the survey takes about as long as starting Ray would."""
EXACT_CHARS = 4_000_000
"""Text up to which `plan` counts every token; beyond, it counts a sample of about this much."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Everything that is known before work begins."""

    files: list[SourceFile]
    columns: DocumentColumns
    table: EmbeddingTable | None
    keys: Keys
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
    if vectors.type == "int8" and not normalize:
        raise InputError("vectors.type int8 needs unit vectors; set vectors.normalize=true")
    name = vectors.prompt_name or folder.default_prompt_name
    if vectors.prompt is None and name is not None and name not in folder.prompts:
        raise InputError(f"{folder.path} has no prompt {name!r}; it has {', '.join(sorted(folder.prompts)) or 'none'}")
    prompt = vectors.prompt if vectors.prompt is not None else folder.prompts[name] if name else ""
    prompt_tokens = len(tokenizer.encode(prompt, add_special_tokens=False).ids) if prompt else 0
    chunking = ChunkingConfig(**configuration.chunking.model_dump()).settle(folder.max_tokens, prompt_tokens)
    path = configuration.model if is_s3(configuration.model) else folder_path
    return Model(path, folder, chunking, prompt, normalize, vectors.dim or folder.dim)


def make_recipe(model: Model, *, dtype: str, vector_type: str) -> Recipe:
    """The recipe of a model so used."""
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
        vector_type=vector_type,
        dim=model.dim,
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
    table.require(make_recipe(model, dtype=dtype, vector_type=vectors.type))
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
    configuration: EmbedConfiguration, files: list[SourceFile], table: EmbeddingTable | None, *, in_process: bool
) -> Corpus:
    """Read every source file once and compare it with the table; in Ray tasks unless `in_process`.

    Raises:
        InputError: a file that cannot be read, a column that is missing.
    """
    columns = read_columns(configuration.columns)
    keys = table.keys() if table else Keys.empty()
    if in_process:
        surveys = [survey_file(file, columns, keys) for file in files]
    else:
        surveys = survey_with_ray(files, columns, keys)
    return Corpus(files, columns, table, keys, make_plan(surveys, keys, delete_missing=configuration.delete_missing))


def survey_with_ray(files: list[SourceFile], columns: DocumentColumns, keys: Keys) -> list[FileSurvey]:
    """`survey_file` over all files as Ray tasks; the keys lie in the object store once for each node."""
    import ray

    @ray.remote
    def survey(part: list[SourceFile], keys: Keys) -> list[FileSurvey]:
        return [survey_file(file, columns, keys) for file in part]

    shared = ray.put(keys)
    parts: list[list[SourceFile]] = [[]]
    size = 0
    for file in files:
        parts[-1].append(file)
        size += file.size
        if size >= SMALL_CORPUS_BYTES // 4:
            parts.append([])
            size = 0
    return [survey for part in ray.get([survey.remote(part, shared) for part in parts if part]) for survey in part]


def list_corpus(configuration: EmbedConfiguration) -> list[SourceFile]:
    """The files of the source, without those of the table where that lies within it.

    Raises:
        InputError: no such source, nothing in it that can be read, or a column that its first file lacks.
    """
    table = configuration.table if is_s3(configuration.table) else str(Path(configuration.table).absolute())
    inside = table.rstrip("/") + "/"
    files = [file for file in list_sources(configuration.source) if not file.path.startswith(inside)]
    if not files:
        raise InputError(f"{configuration.source} holds no documents beside the table itself")
    check_source(files[0], read_columns(configuration.columns))
    return files


def is_small(files: Sequence[SourceFile]) -> bool:
    return sum(file.size for file in files) <= SMALL_CORPUS_BYTES


def carried_fields(corpus: Corpus) -> list[pa.Field]:
    """The carried columns, with the types that they have in the first file."""
    if not corpus.columns.carry:
        return []
    schema = document_schema(corpus.files[0], corpus.columns)
    return [schema.field(name) for name in corpus.columns.carry]


def count_tokens(corpus: Corpus, model: Model) -> tuple[int, bool]:
    """(tokens of the text to embed, whether that is exact); beyond EXACT_CHARS it goes by a sample over the files."""
    work = corpus.plan.work
    stride = max(1, -(-corpus.plan.chars // EXACT_CHARS))
    stage = TokenizeStage(model.path, model.chunking, model.prompt)
    tokens = bytes_read = 0
    for items in work_tables(work, EXACT_CHARS // 8)[::stride]:
        for documents in read_work(items, corpus.columns, EXACT_CHARS // 8):
            bytes_read += documents["text"].nbytes
            tokens += sum(len(row) for row in stage(documents)["tokens"])
            if stride > 1 and bytes_read >= EXACT_CHARS:
                return round(tokens * corpus.plan.chars / bytes_read), False
    if stride > 1:
        return round(tokens * corpus.plan.chars / max(bytes_read, 1)), False
    return tokens, True


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
        return "\n".join([head, "", *rows, line("tokens", f"{about}{self.tokens:,}")])


def run_plan(configuration: EmbedConfiguration) -> PlanReport:
    """Compare the source with the table and count tokens. Writes nothing."""
    files = list_corpus(configuration)
    model = read_model(configuration)
    table = open_table(configuration, model)
    if is_small(files):
        corpus = survey_corpus(configuration, files, table, in_process=True)
    else:
        with session(configuration.compute.address, num_cpus=local_cpus()):
            corpus = survey_corpus(configuration, files, table, in_process=False)
    counts: dict[str, Any] = dict(corpus.plan.counts)
    tokens, exact = count_tokens(corpus, model) if corpus.plan.work else (0, True)
    return PlanReport(
        job="plan",
        status="done",
        table=configuration.table,
        deleted=len(corpus.plan.deleted),
        files=len(files),
        chars=corpus.plan.chars,
        tokens=tokens,
        tokens_exact=exact,
        **counts,
    )
