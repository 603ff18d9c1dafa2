"""Token table -> finished rows: windows, bins, the encoder, vectors.

A document's vectors come out of sums over its windows' token ranges, whatever bins those windows were in; that is why
neither order nor company matters to a vector. A document is whole in one output, or dead with a reason.

A short document's vector is the pool over all its tokens, [CLS] and [SEP] included, as in sentence-transformers. Of a
document in windows the first [CLS] and the last [SEP] are pooled. A document's first chunk has the [CLS] with its own
tokens, its last the [SEP]: so a document of one chunk has the same vector as document, as chunk, and as chunk alone.
Pooling "cls" or "last" averages the windows' [CLS] or [SEP] for a whole document, and takes a
chunk's first or last token.
"""

import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import torch

from model.batch import PackedBatch
from model.embedder import Embedder
from model.errors import InputError
from pipeline.chunks import WHOLE, ChunkingConfig, Windows, plan_windows
from pipeline.measures import count_lengths
from pipeline.packing import gather, look_ahead, plan_bins
from pipeline.storage import local_model
from pipeline.tokens import list_offsets, list_values
from pipeline.vectors import check_type, vector_array

log = logging.getLogger(__name__)

STATISTICS_KEY, DEAD_KEY = b"nightloom.statistics", b"nightloom.dead"
LOOK_AHEAD_BATCHES = 32
"""Bins are planned over so many batches' worth of tokens at a time."""
FEWEST_TOKENS = 256
"""Where a bin of more runs out of the device's memory, later ones get half its tokens."""

DEAD_SCHEMA = pa.schema(
    [
        ("document_id", pa.string()),
        ("text_hash", pa.binary(16)),
        ("source", pa.string()),
        ("stage", pa.string()),
        ("error", pa.string()),
    ]
)
NOT_CARRIED = {
    *("document_id", "text_hash", "source", "error", "num_chars", "tokens", "num_prompt", "pool_start"),
    *("truncated_tokens", "row_chunk", "row_char_start", "row_char_end", "row_token_start", "row_token_end"),
}


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a piece of work was and took."""

    documents: int = 0
    """Embedded ones; dead ones are in `Embedded.dead`."""
    vectors: int = 0
    tokens: int = 0
    """Content tokens of the documents, each counted once."""
    model_tokens: int = 0
    """Tokens that the encoder saw: with special tokens, prompts and the overlaps of windows."""
    padding_tokens: int = 0
    """Always 0: nothing is padded."""
    truncated_tokens: int = 0
    sequences: int = 0
    bins: int = 0
    seconds: float = 0.0
    lengths: tuple[int, ...] = ()
    """Documents by their content tokens, in the buckets of `pipeline.measures`."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """Some consecutive documents of a token table, each whole."""

    rows: pa.Table
    """document_id, chunk, char_start, char_end, token_start, token_end, text_hash, source, vector, carried columns."""
    dead: pa.Table
    """DEAD_SCHEMA; `stage` is "tokens" for rows that came with an error, "embed" for those that failed here."""
    statistics: Statistics


@dataclass(frozen=True, slots=True)
class Layout:
    """Which sequences the encoder sees, and which token ranges of them make up which vector.

    A *unit* is what is cut into windows: a document, or a chunk that is encoded alone. Arrays over windows (W), over
    pieces (P), which are ranges of one sequence that add to one row, and over rows (R).
    """

    windows: Windows
    document_W: np.ndarray
    content_start_W: np.ndarray
    content_end_W: np.ndarray
    """Where the window's content lies in the flat token array."""
    length_W: np.ndarray
    """Tokens of the sequence: [CLS], prompt, content, [SEP]."""
    window_P: np.ndarray
    row_P: np.ndarray
    start_P: np.ndarray
    end_P: np.ndarray
    """The range in its sequence; pieces are in the order of their windows."""
    document_R: np.ndarray


class EmbedStage:
    """Embeds token tables; made once in each worker process, also as a Ray Data actor.

    Args:
        model_path: a model folder, local or s3://, or a hub id.
        chunking: the same as `TokenizeStage`'s.
        device, dtype: see `Embedder`.
        tokens_per_batch: token budget of one forward pass; None: what suits the device.
        look_ahead_tokens: bins are planned over so many tokens at a time; None: 32 batches.
        normalize: unit length; None does what the folder says. int8 and bits need it.
        truncate_dim: keep the first dimensions only, before normalising.
        vector_type: how vectors are stored, see `pipeline.vectors`.

    Raises:
        InputError: the model cannot be loaded, or the settings contradict each other.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        chunking: ChunkingConfig = ChunkingConfig(),  # noqa: B008 (frozen)
        device: str = "auto",
        dtype: str = "auto",
        tokens_per_batch: int | None = None,
        look_ahead_tokens: int | None = None,
        normalize: bool | None = None,
        truncate_dim: int | None = None,
        vector_type: str = "float32",
    ) -> None:
        model_path = local_model(os.fspath(model_path))
        self.embedder = Embedder(model_path, device=device, dtype=dtype)
        self.chunking = chunking.settle(self.embedder.max_tokens)
        self.tokens_per_batch = tokens_per_batch or self.embedder.tokens_per_batch
        self.look_ahead_tokens = look_ahead_tokens or LOOK_AHEAD_BATCHES * self.tokens_per_batch
        self.normalize = self.embedder.normalize if normalize is None else normalize
        self.truncate_dim, self.vector_type = truncate_dim, vector_type
        self.dim = min(truncate_dim or self.embedder.dim, self.embedder.dim)
        check_type(vector_type, self.dim, normalize=self.normalize)
        special = self.embedder.tokenizer.encode("").ids
        if len(special) != 2:
            raise InputError(
                f"the tokenizer of {model_path} adds {len(special)} special tokens; [CLS] .. [SEP] is supported"
            )
        self.cls_id, self.sep_id = special

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """The rows of `embed`, statistics and dead documents as JSON in the schema's metadata."""
        for part in self.embed(table):
            dead = part.dead.drop_columns(["text_hash"]).to_pylist()
            metadata = {STATISTICS_KEY: json.dumps(asdict(part.statistics)), DEAD_KEY: json.dumps(dead)}
            yield part.rows.replace_schema_metadata(metadata)

    def embed(self, table: pa.Table) -> Iterator[Embedded]:
        """Embed the documents of a token table, a bounded number of tokens at a time; at least one part comes out.

        Raises:
            Exception: whatever the encoder raises when it fails even on an empty document. What it raises on some
                document only makes that document dead.
        """
        if not len(table):
            yield self._embed(table)
        sizes = np.diff(list_offsets(table["tokens"]))
        for part in look_ahead(sizes, self.look_ahead_tokens):
            yield self._embed(table.slice(part.start, part.stop - part.start))

    def _embed(self, table: pa.Table) -> Embedded:
        begun = time.perf_counter()
        table = table.combine_chunks()
        layout = plan_layout(table, self.chunking, self.embedder.pooling)
        rows = len(layout.document_R)
        sums_RD = np.zeros((rows, self.embedder.config.hidden_size), np.float32)
        weights_R = np.zeros(rows, np.float32)
        failed: dict[int, str] = {}
        tokens = list_values(table["tokens"])
        bins = plan_bins(layout.length_W, self.tokens_per_batch)
        for chosen in bins:
            self._forward(chosen, layout, table, tokens, sums_RD, weights_R, failed)
        for row in np.flatnonzero(~np.isfinite(sums_RD).all(axis=1)).tolist():
            failed.setdefault(int(layout.document_R[row]), "the encoder gave a vector that is not finite")
        good_R = ~np.isin(layout.document_R, list(failed))
        if good_R.any():
            vectors = self.embedder.finish(
                sums_RD[good_R], weights_R[good_R], normalize=self.normalize, truncate_dim=self.truncate_dim
            )
        else:
            vectors = np.empty((0, self.dim), np.float32)
        errors = table["error"].to_pylist()
        alive = np.array([error is None and i not in failed for i, error in enumerate(errors)], dtype=bool)
        lengths = (np.diff(list_offsets(table["tokens"])) - table["num_prompt"].to_numpy())[alive]
        statistics = Statistics(
            documents=int(alive.sum()),
            vectors=len(vectors),
            tokens=int(lengths.sum()),
            model_tokens=int(layout.length_W.sum()),
            truncated_tokens=int(table["truncated_tokens"].to_numpy()[alive].sum()),
            sequences=len(layout.length_W),
            bins=len(bins),
            seconds=time.perf_counter() - begun,
            lengths=tuple(count_lengths(lengths)),
        )
        return Embedded(self._rows(table, layout, good_R, vectors), _dead(table, errors, failed), statistics)

    def _forward(
        self,
        chosen: np.ndarray,
        layout: Layout,
        table: pa.Table,
        tokens: np.ndarray,
        sums_RD: np.ndarray,
        weights_R: np.ndarray,
        failed: dict[int, str],
        *,
        again: bool = False,
    ) -> None:
        """Encode a bin's sequences and add up their pieces; one that fails is halved, a single sequence tried again."""
        batch = self._pack(chosen, layout, table, tokens)
        base_W = np.asarray(batch.host_offsets()[:-1], np.int64)
        first, last = np.searchsorted(layout.window_P, chosen), np.searchsorted(layout.window_P, chosen, side="right")
        pieces = gather(np.arange(len(layout.window_P)), first, last)
        base_P = np.repeat(base_W, last - first)
        failure = ""
        try:
            sums, weights = self.embedder.embed_segments(
                batch, base_P + layout.start_P[pieces], base_P + layout.end_P[pieces]
            )
        except Exception as error:
            failure = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            if isinstance(error, torch.OutOfMemoryError):
                self.tokens_per_batch = min(self.tokens_per_batch, max(batch.num_tokens // 2, FEWEST_TOKENS))
        if not failure:
            np.add.at(sums_RD, layout.row_P[pieces], sums)
            np.add.at(weights_R, layout.row_P[pieces], weights)
            return
        # Out here, because an exception keeps alive what its frames hold, and with it the device's memory.
        if self.embedder.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(chosen) > 1:
            log.warning("a bin of %d sequences failed and is halved: %s", len(chosen), failure)
            for half in np.array_split(chosen, 2):
                self._forward(half, layout, table, tokens, sums_RD, weights_R, failed)
        elif not again:
            self._forward(chosen, layout, table, tokens, sums_RD, weights_R, failed, again=True)
        else:
            self._probe()
            failed[int(layout.document_W[chosen[0]])] = failure

    def _probe(self) -> None:
        """Raise what the encoder raises when it fails on an empty document too: then no document is to blame."""
        ids = torch.tensor([self.cls_id, self.sep_id])
        batch = PackedBatch(ids, torch.tensor([0, 2], dtype=torch.int32), 2, (0, 2))
        self.embedder.embed_segments(batch, np.array([0]), np.array([2]))

    def _pack(self, chosen: np.ndarray, layout: Layout, table: pa.Table, tokens: np.ndarray) -> PackedBatch:
        """[CLS] prompt content [SEP] for each chosen window, end to end."""
        documents = layout.document_W[chosen]
        prompt_start = list_offsets(table["tokens"])[documents]
        prompt_end = prompt_start + table["num_prompt"].to_numpy()[documents]
        lengths = layout.length_W[chosen]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        inside = np.ones(offsets[-1], dtype=bool)
        inside[offsets[:-1]] = inside[offsets[1:] - 1] = False
        ids = np.empty(offsets[-1], dtype=np.int64)
        ids[offsets[:-1]], ids[offsets[1:] - 1] = self.cls_id, self.sep_id
        # Prompt and content of a window are two ranges of one flat array, taken in turn.
        starts = np.stack([prompt_start, layout.content_start_W[chosen]], axis=1).ravel()
        ends = np.stack([prompt_end, layout.content_end_W[chosen]], axis=1).ravel()
        ids[inside] = gather(tokens, starts, ends)
        cu_seqlens = torch.from_numpy(offsets.astype(np.int32))
        return PackedBatch(torch.from_numpy(ids), cu_seqlens, int(lengths.max()), tuple(offsets.tolist()))

    def _rows(self, table: pa.Table, layout: Layout, good_R: np.ndarray, vectors: np.ndarray) -> pa.Table:
        kept = pa.array(layout.document_R[good_R])

        def of_document(name: str) -> pa.ChunkedArray:
            return table[name].take(kept)

        columns = {
            "document_id": of_document("document_id"),
            "chunk": pa.array(list_values(table["row_chunk"])[good_R]),
        }
        for name in ("char_start", "char_end", "token_start", "token_end"):
            columns[name] = pa.array(list_values(table[f"row_{name}"])[good_R])
        columns |= {"text_hash": of_document("text_hash"), "source": of_document("source")}
        columns["vector"] = vector_array(vectors, self.vector_type)
        columns |= {name: of_document(name) for name in table.column_names if name not in NOT_CARRIED}
        return pa.table(columns)


def plan_layout(table: pa.Table, chunking: ChunkingConfig, pooling: str) -> Layout:
    """Plan the sequences and pieces of a token table, without a loop over documents.

    Positions inside a unit count [CLS] as 0, its n content tokens as 1 to n, [SEP] as n + 1; so every unit has a token,
    and what windows keep tiles it.

    Args:
        chunking: settled.
    """
    assert chunking.max_tokens is not None
    assert chunking.overlap_tokens is not None
    num_prompt_D = table["num_prompt"].to_numpy()
    flat_start_D = list_offsets(table["tokens"])[:-1] + num_prompt_D
    length_D = np.diff(list_offsets(table["tokens"])) - num_prompt_D
    document_R = np.repeat(np.arange(len(table)), np.diff(list_offsets(table["row_chunk"])))
    chunk_R, low_R, high_R = (list_values(table[f"row_{n}"]) for n in ("chunk", "token_start", "token_end"))
    if chunking.context == "none" and chunking.chunked:
        # Every row is a unit of its own, and all of it.
        document_U, low_U, high_U = document_R, low_R, high_R
        unit_R = np.arange(len(document_R))
    else:
        document_U, unit_R = np.unique(document_R, return_inverse=True)
        low_U, high_U = np.zeros(len(document_U), np.int64), length_D[document_U]
    size_U = high_U - low_U
    budget_U = chunking.max_tokens - 2 - num_prompt_D[document_U]
    windows = plan_windows(size_U, budget_U, chunking.overlap_tokens)
    unit_W = windows.unit
    document_W = document_U[unit_W]
    prompt_W = num_prompt_D[document_W].astype(np.int64)
    length_W = windows.end - windows.start + prompt_W + 2
    is_first_W, is_last_W = windows.start == 0, windows.end == size_U[unit_W]

    # Ranges of rows and of what windows keep, on one line on which the units lie end to end.
    base_U = np.cumsum(size_U + 2) - (size_U + 2)
    keep_low_W = base_U[unit_W] + np.where(is_first_W, 0, windows.keep_start + 1)
    keep_high_W = base_U[unit_W] + np.where(is_last_W, size_U[unit_W] + 2, windows.keep_end + 1)
    inner_low_R, inner_high_R = low_R - low_U[unit_R], high_R - low_U[unit_R]
    row_low_R = base_U[unit_R] + np.where(inner_low_R == 0, 0, inner_low_R + 1)
    row_high_R = base_U[unit_R] + np.where(inner_high_R == size_U[unit_R], size_U[unit_R] + 2, inner_high_R + 1)
    first_R = np.searchsorted(keep_low_W, row_low_R, side="right") - 1
    last_R = np.searchsorted(keep_low_W, row_high_R - 1, side="right") - 1
    count_R = last_R - first_R + 1
    row_P = np.repeat(np.arange(len(document_R)), count_R)
    window_P = gather(np.arange(len(length_W)), first_R, last_R + 1)
    low_P = np.maximum(row_low_R[row_P], keep_low_W[window_P]) - base_U[unit_W[window_P]]
    high_P = np.minimum(row_high_R[row_P], keep_high_W[window_P]) - base_U[unit_W[window_P]]
    # From positions in the unit to positions in the sequence, which has its prompt after the [CLS].
    shift_P = prompt_W[window_P] - windows.start[window_P]
    start_P = np.where(low_P == 0, 0, low_P + shift_P)
    start_P = np.where(low_P == 0, np.maximum(start_P, table["pool_start"].to_numpy()[document_W[window_P]]), start_P)
    end_P = high_P + shift_P
    start_P = np.minimum(start_P, end_P - 1)
    if pooling in ("cls", "last"):
        whole_P = (chunk_R[row_P] == WHOLE) | ((row_low_R == base_U[unit_R]) & (inner_high_R == size_U[unit_R]))[row_P]
        first_pooled_P = table["pool_start"].to_numpy()[document_W[window_P]]
        start_P = np.where(whole_P, first_pooled_P, start_P) if pooling == "cls" else start_P
        end_P = np.where(whole_P, length_W[window_P], end_P)
        start_P = np.minimum(start_P, end_P - 1)
        speaks_P = window_P == (first_R if pooling == "cls" else last_R)[row_P]
        used = whole_P | speaks_P
        row_P, window_P, start_P, end_P = row_P[used], window_P[used], start_P[used], end_P[used]
    order = np.argsort(window_P, kind="stable")
    return Layout(
        windows=windows,
        document_W=document_W,
        content_start_W=flat_start_D[document_W] + low_U[unit_W] + windows.start,
        content_end_W=flat_start_D[document_W] + low_U[unit_W] + windows.end,
        length_W=length_W,
        window_P=window_P[order],
        row_P=row_P[order],
        start_P=start_P[order],
        end_P=end_P[order],
        document_R=document_R,
    )


def _dead(table: pa.Table, errors: list[str | None], failed: dict[int, str]) -> pa.Table:
    rows = {i: ("tokens", error) for i, error in enumerate(errors) if error is not None}
    rows |= {i: ("embed", error) for i, error in failed.items()}
    order = sorted(rows)
    columns = [table[name].take(pa.array(order, pa.int64())) for name in ("document_id", "text_hash", "source")]
    columns += [pa.array([rows[i][k] for i in order], pa.string()) for k in (0, 1)]
    return pa.table(columns, schema=DEAD_SCHEMA)
