"""Three nights of an uneven corpus, and what a table must hold after each: for tests that disturb the runs between.

Documents have 1 to 900 words, so chunks make one to some twenty rows of them, and windows cut the longest. Between
nights documents are added, changed, taken away, moved to another file, and changed back. A file whose content stays
keeps its time. `Truth` is what an undisturbed run made; a state of a disturbed table is compared with it row for row.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SENTENCE = "the quick brown fox jumps over a lazy dog while vectors are embedded every night in long documents"
WORDS = SENTENCE.split()
NUM_NIGHTS = 3
FILES = ("a.parquet", "b.parquet", "c.jsonl", "d/e.parquet")
SETS = (
    "vectors.dtype=float32",
    "chunking.granularity=chunk",
    "chunking.chunk_tokens=48",
    "compute.block_chars=5000",
    "compute.actors=1",
)
BATCH_INVARIANCE = 1e-5
"""Largest difference of a component of a unit vector that company in a batch may make: docs/numerics.md, float32."""

Corpus = dict[str, dict[str, str]]
"""{file: {document: text}}; a name that ends with .txt is a file of one document, named like it."""
Rows = dict[str, tuple[tuple[Any, ...], ...]]
"""{document: (chunk, four offsets, hash of the text) of each row, in order}."""


def text_of(seed: int) -> str:
    draw = np.random.default_rng(seed)
    count = min(900, 1 + int(draw.lognormal(4.6, 1.1)))
    words = draw.choice(WORDS, count).tolist()
    words[11::12] = [word + "." for word in words[11::12]]
    return f"Text {seed}. " + " ".join(words)


def corpus_of(night: int, documents: int = 60) -> Corpus:
    """The corpus of a night, a pure function of its number."""
    corpus: Corpus = {file: {} for file in FILES}
    for number in range(documents):
        corpus[FILES[number % len(FILES)]][f"doc-{number:03}"] = text_of(number)
    for number in range(6):
        corpus[f"texts/{number}.txt"] = {f"texts/{number}.txt": text_of(500 + number)}
    for turn in range(1, night + 1):
        draw = np.random.default_rng(turn)
        present = sorted((file, name) for file, held in corpus.items() for name in held if file in FILES)
        picked = [present[i] for i in draw.permutation(len(present))[:26]]
        for file, name in picked[:12]:
            back = corpus[file][name] != text_of(int(name[4:]))
            corpus[file][name] = text_of(int(name[4:])) if back else text_of(1000 * turn + int(name[4:]))
        for file, name in picked[12:20]:
            del corpus[file][name]
        for file, name in picked[20:24]:
            corpus[FILES[(FILES.index(file) + 1) % len(FILES)]][name] = corpus[file].pop(name)
        for number in range(9):
            corpus[FILES[number % 2]][f"doc-{100 * turn + number}"] = text_of(100 * turn + number)
        corpus["texts/0.txt"] = {"texts/0.txt": text_of(600 + turn)}
        corpus.pop(f"texts/{turn}.txt")
        corpus["c.jsonl"] |= {"twice": text_of(700), "blank": " "}
        corpus["d/e.parquet"] |= {"twice": text_of(701)}
    return corpus


def hashes_of(corpus: Corpus) -> dict[str, bytes]:
    """{document: hash of its text}: the first in the order of files counts, blank ones do not."""
    found: dict[str, bytes] = {}
    for file in sorted(corpus):
        for name, text in corpus[file].items():
            if text.strip():
                found.setdefault(name, hashlib.blake2b(text.encode(), digest_size=16).digest())
    return found


def content_of(file: str, documents: dict[str, str]) -> bytes:
    """A file of the corpus as bytes."""
    if file.endswith(".txt"):
        return next(iter(documents.values())).encode()
    if file.endswith(".jsonl"):
        return "".join(json.dumps({"id": k, "text": v}) + "\n" for k, v in documents.items()).encode()
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": list(documents), "text": list(documents.values())}), sink, row_group_size=8)
    return sink.getvalue().to_pybytes()


def write_corpus(corpus: Corpus, folder: Path) -> None:
    """Make a folder hold exactly this corpus; files that hold it already stay untouched."""
    wanted = {folder / file: content_of(file, documents) for file, documents in corpus.items()}
    for path in [path for path in folder.rglob("*") if path.is_file() and path not in wanted]:
        path.unlink()
    for path, content in wanted.items():
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.part")
            part.write_bytes(content)
            # Nights follow each other within a second here; to be seen as changed a file needs another time.
            stamp = int.from_bytes(hashlib.blake2b(content, digest_size=4).digest(), "big")
            os.utime(part, (stamp, stamp))
            part.rename(path)


def upload_corpus(corpus: Corpus, client: Any, prefix: str) -> None:
    """The same below bucket/prefix on S3."""
    wanted = {f"{prefix}/{file}": content_of(file, documents) for file, documents in corpus.items()}
    for path in client.find(prefix):
        if path not in wanted:
            client.rm_file(path)
    for path, content in wanted.items():
        if not client.exists(path) or client.cat_file(path) != content:
            client.pipe_file(path, content)


def rows_of(dataset: lance.LanceDataset) -> Rows:
    """What a version holds; the same chunk of a document twice stands there twice."""
    offsets = ["char_start", "char_end", "token_start", "token_end"]
    table = dataset.to_table(columns=["document_id", "chunk", *offsets, "text_hash"])
    table = table.sort_by([("document_id", "ascending"), ("chunk", "ascending")])
    names, *columns = (table[name].to_pylist() for name in table.column_names)
    found: dict[str, list[tuple[Any, ...]]] = {}
    for name, *row in zip(names, *columns, strict=True):
        found.setdefault(name, []).append(tuple(row))
    return {name: tuple(rows) for name, rows in found.items()}


def vectors_of(dataset: lance.LanceDataset) -> tuple[list[tuple[str, int]], np.ndarray]:
    """The keys of all rows in order, and their vectors, float32 of shape (rows, dim)."""
    table = dataset.to_table(columns=["document_id", "chunk", "vector"])
    table = table.sort_by([("document_id", "ascending"), ("chunk", "ascending")])
    keys = list(zip(table["document_id"].to_pylist(), table["chunk"].to_pylist(), strict=True))
    flat = table["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return keys, flat.reshape(len(keys), -1).astype(np.float32)


@dataclass(frozen=True)
class Truth:
    """What a table must hold after a night."""

    rows: Rows
    keys: list[tuple[str, int]]
    vectors: np.ndarray
    versions: int
    """Versions and fragments that the undisturbed run of this night made: moments to kill at are drawn from them."""
    fragments: int

    @classmethod
    def read(cls, dataset: lance.LanceDataset, versions: int, fragments: int) -> "Truth":
        return cls(rows_of(dataset), *vectors_of(dataset), versions, fragments)


NOTHING = Truth({}, [], np.empty((0, 0), np.float32), 0, 0)


def partial_documents(rows: Rows, before: Truth, after: Truth) -> list[str]:
    """Documents of a state that are neither what they were before the night nor what they are after it."""
    return [name for name, found in rows.items() if found not in (before.rows.get(name), after.rows.get(name))]


def differences(dataset: lance.LanceDataset, truth: Truth) -> list[str]:
    """How a table differs from the truth; empty where it does not."""
    rows = rows_of(dataset)
    found = [f"{name} is missing" for name in truth.rows.keys() - rows.keys()]
    found += [f"{name} should not be there" for name in rows.keys() - truth.rows.keys()]
    found += [f"{name} has other rows" for name in truth.rows.keys() & rows.keys() if rows[name] != truth.rows[name]]
    if found:
        return sorted(found)
    keys, vectors = vectors_of(dataset)
    assert keys == truth.keys
    distance = np.abs(vectors - truth.vectors).max(axis=1, initial=0)
    return [f"the vector of {keys[i]} is {distance[i]:.1e} away" for i in np.flatnonzero(distance > BATCH_INVARIANCE)]
