"""From a corpus to token shards: which documents go into which shard, and the stage that tokenizes and writes them.

Which document is where follows from the source alone, in its order: a shard's bytes do not depend on how many workers
there are, nor on which of them was killed and repeated. Of equal texts the first counts. A document is held out or not
by the hash of its id, so that it stays where it is when a corpus grows.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from model.errors import InputError
from pipeline.chunks import boundary_ranks
from pipeline.columns import DocumentColumns
from pipeline.documents import read_documents
from pipeline.keys import KEY, as_keys
from pipeline.packing import look_ahead
from pipeline.shards import HELD_OUT_SPLIT, TRAIN, shard_table, write_file, write_shard
from pipeline.sources import DEAD, EMPTY, TEXT, Holding
from pipeline.storage import SourceFile
from pipeline.tokens import list_array, offsets_of
from pipeline.vocabulary import corpus_tokenizer

PARTS = "parts"
"""Folder with a record of every finished shard, until the manifest replaces them all."""
MOST_SCANS = 8
"""Tasks that a file of lines may be spread over: every one of them has to scan the file up to its last row."""
BYTES_AT_ONCE = 1 << 20
"""Text that is tokenized together: encodings take some hundred times a token's size while they live."""
SENTENCE_RANK = 3
"""From this rank of `boundary_ranks` on a sentence or a paragraph begins."""


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents of a corpus that are kept, in the order of the source."""

    file_D: np.ndarray
    """int64, number of the file."""
    row_D: np.ndarray
    """int64, row in the file."""
    id_D: np.ndarray
    hash_D: np.ndarray
    """S16, of the id and of the text."""
    bytes_D: np.ndarray
    """int64, of the text."""
    held_out_D: np.ndarray
    """bool."""
    counts: dict[str, int]
    """Documents read, by what becomes of them."""
    dead: list[dict[str, str]]

    def fingerprint(self, settings: dict[str, Any]) -> str:
        """A hash of the documents and of the settings with which they are prepared."""
        digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
        digest.update(self.id_D.tobytes() + self.hash_D.tobytes())
        return digest.hexdigest()


def choose_documents(holdings: Sequence[Holding], held_out: float) -> Documents:
    """Drop what is empty, dead or there already, and hold a share out.

    Args:
        holdings: of all files, in any order.
        held_out: share of the documents, 0 to under 1.
    """
    ordered = sorted(holdings, key=lambda holding: (holding.number, holding.first_row))
    files = [np.full(len(h.kinds), h.number, np.int64) for h in ordered]
    rows = [h.first_row + np.arange(len(h.kinds)) for h in ordered]
    nothing = np.empty(0, np.int64)
    file, row = np.concatenate([nothing, *files]), np.concatenate([nothing, *rows])
    ids, hashes = (
        np.concatenate([np.empty(0, KEY), *(getattr(h, name) for h in ordered)]) for name in ("ids", "hashes")
    )
    kinds = np.concatenate([np.empty(0, np.uint8), *(h.kinds for h in ordered)])
    sizes = np.concatenate([nothing, *(h.chars.astype(np.int64) for h in ordered)])
    texts = np.flatnonzero(kinds == TEXT)
    # np.unique's first occurrence is the first in the order of the source: its sort is stable.
    kept = np.sort(texts[np.unique(hashes[texts], return_index=True)[1]])
    out = ids[kept].view(np.uint64)[::2] < np.uint64(round(held_out * 2**64))
    counts = {
        "read": len(kinds),
        TRAIN: int((~out).sum()),
        HELD_OUT_SPLIT: int(out.sum()),
        "empty": int((kinds == EMPTY).sum()),
        "duplicate": len(texts) - len(kept),
        "dead": int((kinds == DEAD).sum()),
    }
    dead = [{**item, "stage": "read"} for holding in ordered for item in holding.dead]
    return Documents(file[kept], row[kept], ids[kept], hashes[kept], sizes[kept], out, counts, dead)


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """Which documents a shard is made of."""

    name: str
    places: np.ndarray
    """int64, ascending: indices into `Documents`."""
    bytes: int
    """Of text."""


def plan_shards(documents: Documents, bytes_per_shard: int) -> list[ShardPlan]:
    """Cut each split, in the order of the source, into shards of about so many bytes of text."""
    plans = []
    for split, chosen in ((TRAIN, ~documents.held_out_D), (HELD_OUT_SPLIT, documents.held_out_D)):
        places = np.flatnonzero(chosen)
        for number, part in enumerate(look_ahead(documents.bytes_D[places], bytes_per_shard)):
            here = places[part]
            plans.append(ShardPlan(f"{split}-{number:05d}.arrow", here, int(documents.bytes_D[here].sum())))
    return plans


TASK = pa.schema(
    [
        ("shard", pa.string()),
        ("file", pa.string()),
        ("rows", pa.large_binary()),
        ("hashes", pa.large_binary()),
    ]
)
"""Rows of a task: parts of shards, in their order, each from one file."""


def make_tasks(plans: Sequence[ShardPlan], documents: Documents, files: Sequence[SourceFile]) -> list[pa.Table]:
    """The work as tables of TASK: a shard each, or several where a large file of lines must not be scanned for each."""
    tables: list[pa.Table] = []
    waiting: list[dict[str, object]] = []
    size = least = 0
    for plan in plans:
        bounds = np.flatnonzero(np.diff(documents.file_D[plan.places], prepend=-1, append=-1)).tolist()
        for begin, end in itertools.pairwise(bounds):
            places = plan.places[begin:end]
            file = files[int(documents.file_D[places[0]])]
            least = max(least, 0 if file.format == "parquet" else file.size // MOST_SCANS)
            part = {"file": json.dumps(asdict(file)), "rows": documents.row_D[places].tobytes()}
            waiting.append({"shard": plan.name, **part, "hashes": documents.hash_D[places].tobytes()})
        size += plan.bytes
        if size >= least:
            tables.append(pa.Table.from_pylist(waiting, schema=TASK))
            waiting, size, least = [], 0, 0
    return tables + ([pa.Table.from_pylist(waiting, schema=TASK)] if waiting else [])


def read_parts(parts: Sequence[dict[str, Any]], columns: DocumentColumns) -> Iterator[pa.Table]:
    """The documents of some parts (rows of TASK), in tables of bounded size.

    Raises:
        InputError: a file cannot be read, or holds other texts than when it was looked at.
    """
    for part in parts:
        file = SourceFile(**json.loads(part["file"]))
        rows, hashes = np.frombuffer(part["rows"], np.int64), np.frombuffer(part["hashes"], KEY)
        done = 0
        for table in read_documents(file, columns, rows=rows, with_carried=False):
            if not np.array_equal(as_keys(table["text_hash"]), hashes[done : done + len(table)]):
                break
            done += len(table)
            yield table
        if done != len(rows):
            raise InputError(f"{file.path} changed while it was being prepared; run the same command again")


@lru_cache(maxsize=1)
def tokenizer_of(uri: str, tokenizer_hash: str) -> Any:
    """The tokenizer of this process: tasks come and go, their process stays."""
    return corpus_tokenizer(uri)


def write_shards(
    task: pa.Table, *, uri: str, columns: DocumentColumns, tokenizer_hash: str, vocab_size: int, fingerprint: str
) -> Iterator[pa.Table]:
    """Ray Data task: rows of TASK -> shards, and for each a row that describes it, as JSON.

    Args:
        uri: where shards and tokenizer lie.
        fingerprint: of corpus and settings, for the record of the shard.
    """
    # As many tasks run as there are processors: threads within them would only be in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = tokenizer_of(uri, tokenizer_hash)
    for name, parts in itertools.groupby(task.to_pylist(), key=lambda part: part["shard"]):
        pieces = [
            tokenize(piece, tokenizer, vocab_size)
            for table in read_parts(list(parts), columns)
            for piece in (table.slice(s.start, s.stop - s.start) for s in cut_texts(table))
        ]
        rows = pa.concat_tables(pieces)
        num_tokens = pc.list_value_length(rows["tokens"]).to_numpy()
        lengths, counts = np.unique(np.frexp(np.maximum(num_tokens, 1) - 1)[1], return_counts=True)
        entry = write_shard(uri, name, rows)
        record = {
            "fingerprint": fingerprint,
            "tokenizer": tokenizer_hash,
            "entry": asdict(entry),
            "lengths": {str(1 << int(e)): int(n) for e, n in zip(lengths, counts, strict=True)},
        }
        described = json.dumps(record, sort_keys=True)
        write_file(uri, f"{PARTS}/{name}.json", described.encode())
        yield pa.table({"record": [described]})


def cut_texts(table: pa.Table) -> Iterator[slice]:
    return look_ahead(pc.binary_length(table["text"]).to_numpy(), BYTES_AT_ONCE)


def tokenize(documents: pa.Table, tokenizer: Any, vocab_size: int) -> pa.Table:
    """A document table as rows of a shard."""
    texts = documents["text"].to_pylist()
    tokens, sentences = [], []
    for text, encoding in zip(texts, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
        offsets = np.maximum.accumulate(offsets_of(encoding), axis=0)
        starts = boundary_ranks(text, offsets[:, 0], offsets[:, 1]) >= SENTENCE_RANK
        starts[:1] = True
        tokens.append(np.array(encoding.ids))
        sentences.append(np.flatnonzero(starts))
    return shard_table(
        documents["document_id"].combine_chunks(),
        as_keys(documents["text_hash"]).view(np.uint64)[::2].copy(),
        list_array(tokens, pa.uint16() if vocab_size <= 1 << 16 else pa.int32()),
        list_array(sentences, pa.int32()),
    )
