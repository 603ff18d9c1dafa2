"""Probes: documents whose vectors are known, embedded again by every worker before anything of its work is accepted.

Canaries are fixed texts; their vectors are kept beside the table by the run that embeds first. A sample of documents
that the table holds unchanged joins them, where their texts are at hand. Between them they notice what the recipe does
not: another tokenizer library, weights swapped under one name, a machine whose arithmetic is off.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
from pyarrow.fs import FileSystem, FileType, LocalFileSystem

from model.errors import InputError
from pipeline import storage
from pipeline.columns import COLUMNS, DocumentColumns, hash_texts
from pipeline.documents import read_documents
from pipeline.recipe import Recipe
from pipeline.storage import SourceFile
from pipeline.vectors import as_array

log = logging.getLogger(__name__)

FOLDER = "_canaries"
"""In the table's folder, one file for each recipe."""

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "x",
    "A cluster that grows and shrinks embeds long documents every night; what was committed before a crash stays.",
    "def collapse(vectors):\n    return (vectors - vectors.mean(axis=0)).std() < 1e-3  # {'a': [1, 2.5e-3]}",
    "Caf\u00e9 \u00dcbergr\u00f6\u00dfe \u0440\u0443\u0441 \u65e5\u672c\u8a9e \u05e9\u05dc\u05d5\u05dd \U0001f319",
    "12,345.67 kg; 2024-02-29T23:59:60Z; https://example.org/a?b=c#d; \t tabs  and   spaces \n\n new paragraph",
    "WHEREAS the parties agree as follows: (a) nothing is lost; (b) nothing is doubled; (c) everything is counted.",
    "Night after night the loom draws its thread through the same warp, and the pattern grows by a row. " * 12,
)

ARITHMETIC = {"float32": 1e-6, "bfloat16": 1e-3, "float16": 1e-4}
STORAGE = {"float32": 0.0, "float16": 1e-6, "int8": 1e-3, "bits": 0.05}
"""Largest 1 - cosine between a vector and its repetition, by the precision of the arithmetic and of the stored vector;
docs/numerics.md says where they come from."""

MOST_ROWS, MOST_FILES, MOST_SAMPLED = 64, 8, 8
MOST_BYTES = 32_000_000
"""Source text that is read for the sake of the sample."""
MOST_CHARS = 16_000
"""Length of the sample: every worker embeds it."""

Vectors = dict[tuple[str, int], np.ndarray]
"""By name of the probe and number of the chunk."""


@dataclass(frozen=True, slots=True)
class Probes:
    """Documents to embed again, and what is known of their vectors."""

    texts: Sequence[str]
    """Of the canaries."""
    documents: pa.Table
    """A document table; its ids are the names of the probes."""
    canaries: Vectors | None
    """None before a first run has embedded them."""
    sample: Vectors
    names: dict[str, str]
    """What the sample's documents are called in the table."""
    bound: float
    """Largest 1 - cosine that rounding explains."""

    def check(self, found: Vectors) -> dict[str, tuple[float, str]]:
        """{gate: (largest 1 - cosine, of which document)}; a vector that is missing or too many counts as 2."""
        worst: dict[str, tuple[float, str]] = {}
        for gate, known in (("canaries", self.canaries), ("sample", self.sample)):
            compared = [(distance(vector, found.get(key)), key[0]) for key, vector in (known or {}).items()]
            if gate == "canaries" and known is not None:
                compared += [(2.0, name) for name, chunk in found if is_canary(name) and (name, chunk) not in known]
            if compared:
                far, name = max(compared)
                worst[gate] = (far, self.names.get(name, name))
        return worst


def is_canary(name: str) -> bool:
    return name.startswith("canary-")


def distance(vector: np.ndarray, other: np.ndarray | None) -> float:
    """1 - cosine; 2 where there is nothing to compare with, or no direction."""
    if other is None or other.shape != vector.shape:
        return 2.0
    a, b = vector.astype(np.float64), other.astype(np.float64)
    length = np.linalg.norm(a) * np.linalg.norm(b)
    return 1.0 - float(a @ b) / float(length) if np.isfinite(length) and length > 0 else 2.0


def make_probes(
    table: str,
    recipe: Recipe,
    dataset: lance.LanceDataset,
    files: Iterable[SourceFile],
    columns: DocumentColumns,
    run: str,
) -> Probes:
    """The canaries of a table, and some documents of it.

    Args:
        files: of this run's source; texts of the sample come from them.
        run: decides which documents.
    """
    texts, canaries = read_canaries(table, recipe.fingerprint())
    sampled, sample, names = draw_sample(dataset, {file.path: file for file in files}, columns, run)
    documents = document_table([f"canary-{i}" for i in range(len(texts))] + list(names), [*texts, *sampled])
    return Probes(texts, documents, canaries, sample, names, ARITHMETIC[recipe.dtype] + STORAGE[recipe.vector_type])


def document_table(names: Sequence[str], texts: Sequence[str]) -> pa.Table:
    """A document table, without the columns that are carried along: nobody looks at a probe's."""
    text = pa.array(texts, pa.large_string())
    arrays = [pa.array(names, pa.string()), text, hash_texts(text)]
    arrays += [pa.array(["probe"] * len(names), pa.string()), pa.nulls(len(names), pa.string())]
    return pa.table(arrays, schema=COLUMNS)


def draw_sample(
    dataset: lance.LanceDataset, files: dict[str, SourceFile], columns: DocumentColumns, run: str
) -> tuple[list[str], Vectors, dict[str, str]]:
    """(texts, vectors, names) of a few documents of the table whose texts still stand in the source as they were."""
    texts: list[str] = []
    sample: Vectors = {}
    names: dict[str, str] = {}
    count = dataset.count_rows()
    if not count:
        return texts, sample, names
    draw = np.random.default_rng(list(hashlib.blake2b(run.encode(), digest_size=16).digest()))
    at = np.unique(draw.integers(0, count, MOST_ROWS)).tolist()
    rows = dataset.take(at, columns=["document_id", "chunk", "text_hash", "source", "vector"])
    vectors = as_array(rows["vector"])
    drawn: dict[tuple[str, bytes], list[tuple[int, np.ndarray]]] = {}
    for row, vector in zip(rows.drop_columns("vector").to_pylist(), vectors, strict=True):
        drawn.setdefault((row["document_id"], row["text_hash"]), []).append((row["chunk"], vector))
    sources = [path for path in draw.permutation(rows["source"].unique().to_pylist()).tolist() if path in files]
    left_bytes, left_chars = MOST_BYTES, MOST_CHARS
    for file in [files[path] for path in sources[:MOST_FILES]]:
        if file.size > left_bytes:
            continue
        left_bytes -= file.size
        for document in find_documents(file, columns, rows["text_hash"]):
            chunks = drawn.pop((document["document_id"], document["text_hash"]), [])
            if chunks and len(texts) < MOST_SAMPLED and len(document["text"]) <= left_chars:
                name = f"sample-{len(texts)}"
                left_chars -= len(document["text"])
                texts.append(document["text"])
                names[name] = document["document_id"]
                sample |= {(name, chunk): vector for chunk, vector in chunks}
    return texts, sample, names


def find_documents(file: SourceFile, columns: DocumentColumns, hashes: pa.ChunkedArray) -> Iterator[dict[str, Any]]:
    """The documents of a file whose texts have one of these hashes; none where it cannot be read any more."""
    try:
        for part in read_documents(file, columns):
            found = part.filter(pc.is_in(part["text_hash"], value_set=hashes.combine_chunks()))
            yield from found.select(["document_id", "text_hash", "text"]).to_pylist()
    except InputError as error:
        log.info("not sampled: %s", error)


def to_bytes(rows: pa.Table) -> bytes:
    """The vectors of probes as a worker sends them."""
    sink = pa.BufferOutputStream()
    chosen = rows.select(["document_id", "chunk", "vector"])
    with pa.ipc.new_stream(sink, chosen.schema) as writer:
        writer.write_table(chosen)
    return sink.getvalue().to_pybytes()


def from_bytes(raw: bytes) -> Vectors:
    """What `to_bytes` wrote."""
    rows = pa.ipc.open_stream(raw).read_all()
    keys = zip(rows["document_id"].to_pylist(), rows["chunk"].to_pylist(), strict=True)
    return dict(zip(keys, as_array(rows["vector"]), strict=True))


def canary_file(table: str, fingerprint: str) -> tuple[FileSystem, str]:
    files, path = storage.filesystem(table)
    return files, f"{path.rstrip('/')}/{FOLDER}/{fingerprint}.json"


def read_canaries(table: str, fingerprint: str) -> tuple[Sequence[str], Vectors | None]:
    """(texts, vectors) of the canaries beside a table; vectors are None where none were kept yet.

    Raises:
        InputError: the file is not one of ours.
    """
    files, path = canary_file(table, fingerprint)
    if files.get_file_info(path).type == FileType.NotFound:
        return TEXTS, None
    try:
        with files.open_input_stream(path) as stream:
            kept = json.loads(stream.read())
        vectors = {(row["name"], row["chunk"]): np.array(row["vector"]) for row in kept["vectors"]}
        return kept["texts"], vectors
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"the canaries {path} cannot be read ({error}); restore the file, or remove it") from None


def keep_canaries(table: str, fingerprint: str, texts: Sequence[str], found: Vectors) -> None:
    """Keep the canaries' vectors beside the table. The file is there whole or not at all."""
    files, path = canary_file(table, fingerprint)
    rows = [
        {"name": name, "chunk": chunk, "vector": vector.tolist()}
        for (name, chunk), vector in found.items()
        if is_canary(name)
    ]
    local = isinstance(files, LocalFileSystem)  # an object appears whole
    target = f"{path}.{uuid4().hex[:8]}" if local else path
    if local:
        files.create_dir(path.rpartition("/")[0], recursive=True)
    with files.open_output_stream(target) as stream:
        stream.write(json.dumps({"texts": list(texts), "vectors": rows}).encode())
    if local:
        files.move(target, path)
