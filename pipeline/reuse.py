"""Chunk vectors that a changed document had before, for those of its chunks that are the same as before.

Only where every chunk is encoded alone (context "none"): its vector is a function of the tokens that the encoder sees
then, and the table keeps a hash of these beside it. The reading tasks look the hashes up among the rows that are about
to be replaced, and take what they find out of the token table; the encoder sees the rest, and the writer joins both.
Offsets are always the new ones.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.chunks import WHOLE
from pipeline.keys import KEY, Keys, as_keys, hash_ids, is_among
from pipeline.table import CHUNK_HASH, EmbeddingTable
from pipeline.tokens import combined, list_offsets, list_values
from pipeline.vectors import as_array

OFFSETS = ("chunk", "char_start", "char_end", "token_start", "token_end")
HASHES, FOUND = "nightloom.chunk_hashes", "nightloom.found"
"""Columns of a token table on its way to the encoder: list<binary> of the rows that are left in it, and list<struct>
of those that need no encoder, with their vectors."""


@dataclass(frozen=True, slots=True)
class Former:
    """The rows of a table that a run replaces."""

    uri: str
    version: int
    """The one that the run began with."""
    keys: Any
    """`Keys` of the documents whose rows go, or a reference to them in Ray's object store."""
    vector: pa.DataType

    @classmethod
    def of(cls, table: EmbeddingTable, removals: Keys) -> "Former | None":
        """None where the table keeps no hashes of chunks."""
        if CHUNK_HASH not in table.schema.names or CHUNK_HASH in table.carried:
            return None
        return cls(table.uri, table.version, removals, table.schema.field("vector").type)

    def shared(self) -> "Former":
        """The same with its keys in Ray's object store, once for each node."""
        import ray

        return replace(self, keys=ray.put(self.keys))

    def chunks_of(self, ids: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
        """(ascending hashes, vectors) of the chunks that these documents have in the table; none for new documents."""
        keys = self.keys
        if not isinstance(keys, Keys):
            import ray

            keys = ray.get(keys)
        parts = [pa.table({CHUNK_HASH: pa.array([], pa.binary(16)), "vector": pa.array([], self.vector)})]
        if fragments := keys.fragments_of(hash_ids(ids)):
            dataset = lance.dataset(self.uri, version=self.version, storage_options=storage.lance_options(self.uri))
            for number in sorted(fragments):
                fragment = dataset.get_fragment(number)
                names = fragment.to_table(columns=["document_id"])["document_id"]
                at = np.flatnonzero(pc.is_in(names, value_set=combined(ids)).to_numpy())
                rows = fragment.take(at.tolist(), columns=[CHUNK_HASH, "vector"])
                parts.append(rows.filter(pc.is_valid(rows[CHUNK_HASH])).cast(parts[0].schema))
        found = pa.concat_tables(parts)
        if not len(found):
            return np.empty(0, KEY), combined(found["vector"])
        found = found.filter(pa.array(np.isfinite(as_array(found["vector"])).all(axis=1)))
        hashes, first = np.unique(as_keys(found[CHUNK_HASH]), return_index=True)
        return hashes, combined(found["vector"]).take(pa.array(first))


def take_found(table: pa.Table, former: Former) -> pa.Table:
    """A token table without the rows whose vectors are known, which go into the column FOUND; the others' hashes are
    in HASHES.
    """
    table = table.combine_chunks()
    rows = {name: list_values(table[f"row_{name}"]) for name in OFFSETS}
    document_R = rows_to_documents(table["row_chunk"])
    hashes = hash_chunks(table, document_R, rows["token_start"], rows["token_end"])
    known, vectors = former.chunks_of(table["document_id"])
    is_chunk_R = rows["chunk"] != WHOLE
    found_R = is_among(hashes, known) & is_chunk_R
    hash_R = pa.Array.from_buffers(pa.binary(KEY.itemsize), len(hashes), [None, pa.py_buffer(hashes)])
    hash_R = pc.if_else(pa.array(is_chunk_R), hash_R, pa.scalar(None, hash_R.type))
    left_R = pa.array(~found_R)
    for name, values in rows.items():
        column = as_lists(pa.array(values).filter(left_R), document_R[~found_R], len(table))
        table = table.set_column(table.column_names.index(f"row_{name}"), f"row_{name}", column)
    taken = {name: pa.array(values[found_R]) for name, values in rows.items()}
    taken[CHUNK_HASH] = hash_R.filter(pa.array(found_R))
    taken["vector"] = vectors.take(pa.array(np.searchsorted(known, hashes[found_R])))
    structs = pa.StructArray.from_arrays(list(taken.values()), names=list(taken))
    table = table.append_column(HASHES, as_lists(hash_R.filter(left_R), document_R[~found_R], len(table)))
    return table.append_column(FOUND, as_lists(structs, document_R[found_R], len(table)))


def put_back(rows: pa.Table, tokens: pa.Table, dead: Iterable[str]) -> tuple[pa.Table, int]:
    """Join what the encoder made of a table with what was taken out of it, in the order of documents and chunks.

    Args:
        tokens: from `take_found`.
        dead: ids of documents that could not be embedded; what is known of them is left out too.

    Returns:
        The rows, with the column CHUNK_HASH, and how many of them needed no encoder.
    """
    tokens = tokens.combine_chunks()
    document_R = pc.index_in(rows["document_id"], value_set=combined(tokens["document_id"])).to_numpy()
    place_R = places(document_R, rows["chunk"].to_numpy())
    sent = places(rows_to_documents(tokens["row_chunk"]), list_values(tokens["row_chunk"]))
    hashes = combined(tokens[HASHES]).flatten().take(pa.array(np.searchsorted(sent, place_R)))
    rows = rows.append_column(CHUNK_HASH, hashes)

    found = pa.Table.from_struct_array(combined(tokens[FOUND]).flatten())
    document_F = rows_to_documents(tokens[FOUND])
    gone = pc.is_in(tokens["document_id"], value_set=pa.array(list(dead), pa.string())).to_numpy()
    alive = np.flatnonzero(~gone[document_F])
    found, document_F = found.take(pa.array(alive)), document_F[alive]
    columns = {
        name: found[name] if name in found.column_names else tokens[name].take(pa.array(document_F))
        for name in rows.column_names
    }
    reused = pa.table({name: column.cast(rows.schema.field(name).type) for name, column in columns.items()})
    order = np.argsort(np.concatenate([place_R, places(document_F, found["chunk"].to_numpy())]))
    return pa.concat_tables([rows, reused]).take(pa.array(order)), len(reused)


def hash_chunks(table: pa.Table, document_R: np.ndarray, start_R: np.ndarray, end_R: np.ndarray) -> np.ndarray:
    """A 128-bit hash (S16) of what the encoder sees of each row: how long the prompt is, prompt, content."""
    begin_D, prompt_D = list_offsets(table["tokens"])[:-1], table["num_prompt"].to_numpy().astype(np.int64)
    raw = memoryview(list_values(table["tokens"]).astype("<u4").tobytes())
    digests = []
    for document, start, end in zip(document_R.tolist(), start_R.tolist(), end_R.tolist(), strict=True):
        begin, prompt = int(begin_D[document]), int(prompt_D[document])
        content = begin + prompt
        digest = hashlib.blake2b(prompt.to_bytes(4, "little"), digest_size=KEY.itemsize)
        digest.update(raw[4 * begin : 4 * content])
        digest.update(raw[4 * (content + start) : 4 * (content + end)])
        digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), dtype=KEY)


def rows_to_documents(lists: pa.ChunkedArray) -> np.ndarray:
    """For each value of a list column which row of the table it is in."""
    sizes = np.diff(list_offsets(lists))
    return np.repeat(np.arange(len(sizes)), sizes)


def places(document_R: np.ndarray, chunk_R: np.ndarray) -> np.ndarray:
    """One number (int64) for a document and a chunk of it; they ascend as the rows of a table do."""
    return (document_R.astype(np.int64) << 32) + chunk_R - WHOLE


def as_lists(values: pa.Array, document_R: np.ndarray, num_documents: int) -> pa.Array:
    """A list column of values that stand in the order of their documents."""
    ends = np.cumsum(np.bincount(document_R, minlength=num_documents))
    return pa.ListArray.from_arrays(pa.array(np.append(0, ends), pa.int32()), values)
