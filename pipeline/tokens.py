"""Document table -> token table, in CPU processes: ids from the Rust tokenizer, and which vectors each document gets.

The text ends here: what flows on is tokens and offsets. A prompt is tokenized together with the text, as
sentence-transformers does, because the last token of the one can merge with the first of the other.
"""

import itertools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from model.folder import check_tokenizer, load_tokenizer, read_folder
from pipeline.chunks import WHOLE, ChunkingConfig, chunk_spans
from pipeline.storage import local_model

if TYPE_CHECKING:
    from tokenizers import Encoding


class TokenizeStage:
    """Tokenizes tables; made once in each worker process.

    Args:
        model_path: a model folder, local or s3://, or a hub id.
        chunking: which vectors a document gets.
        prompt: put before every document and window; the text itself, not its name.

    Raises:
        InputError: no tokenizer there, one that does not fit the weights, lengths that the model cannot take.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        chunking: ChunkingConfig = ChunkingConfig(),  # noqa: B008 (frozen)
        prompt: str = "",
    ) -> None:
        model_path = local_model(os.fspath(model_path))
        folder = read_folder(model_path)
        self.tokenizer = load_tokenizer(folder.path)
        check_tokenizer(self.tokenizer, folder.config, folder.path)
        self.prompt = prompt
        num_prompt = len(self.tokenizer.encode(prompt, add_special_tokens=False)) if prompt else 0
        self.chunking = chunking.settle(folder.max_tokens, num_prompt)
        self.content_tokens = (self.chunking.max_tokens or 0) - 2
        # Where a folder keeps the prompt out of the pooling, [CLS] stays out with it, as in sentence-transformers;
        # where [CLS] is the pooling, the token after the prompt takes its place.
        skips = bool(prompt) and not folder.include_prompt
        self.pool_start = 1 + num_prompt if skips else 0
        self.token_type = pa.uint16() if folder.config.vocab_size <= 1 << 16 else pa.int32()

    def __call__(self, documents: pa.Table) -> pa.Table:
        """Tokenize a document table.

        Returns:
            One row a document, in order; its text is gone, and in its place stand
            `error` (a dead row's; such a row has no tokens and no vectors), `num_chars`,
            `tokens` list<uint16|int32>: prompt and content without [CLS] and [SEP],
            `num_prompt` int32: how many of them are the prompt's,
            `pool_start` int32: the first token of the first sequence, [CLS] counted, that is pooled,
            `truncated_tokens` int64: content tokens that were cut off,
            `row_chunk` list<int32>, `row_char_start`, `row_char_end`, `row_token_start`, `row_token_end` list<int64>:
            the vectors wanted; tokens count from the content's first. Then the carried columns.
        """
        texts = documents["text"].to_pylist()
        errors = documents["error"].to_pylist()
        tokens: list[np.ndarray] = [np.empty(0, self.token_type.to_pandas_dtype())] * len(texts)
        rows: list[np.ndarray] = [np.empty((5, 0), np.int64)] * len(texts)
        num_prompt, truncated = np.zeros(len(texts), np.int32), np.zeros(len(texts), np.int64)
        alive = [i for i, error in enumerate(errors) if error is None]
        encodings = self._encode([self.prompt + texts[i] for i in alive], with_offsets=self.chunking.chunked)
        for i, encoding in zip(alive, encodings, strict=True):
            if isinstance(encoding, str):
                errors[i] = encoding
                continue
            tokens[i], num_prompt[i], truncated[i], rows[i] = self._document(texts[i], encoding)
        added = {
            "error": pa.array(errors, pa.string()),
            "num_chars": pa.array([len(text) for text in texts], pa.int64()),
            "tokens": list_array(tokens, self.token_type),
            "num_prompt": pa.array(num_prompt),
            "pool_start": pa.array(np.full(len(texts), self.pool_start, np.int32)),
            "truncated_tokens": pa.array(truncated),
            "row_chunk": list_array([row[0] for row in rows], pa.int32()),
        }
        for k, name in enumerate(("char_start", "char_end", "token_start", "token_end"), start=1):
            added[f"row_{name}"] = list_array([row[k] for row in rows], pa.int64())
        keys = ("document_id", "text_hash", "source")
        carried = [name for name in documents.column_names if name not in (*keys, "text", "error")]
        return pa.table({name: documents[name] for name in keys} | added | {n: documents[n] for n in carried})

    def _encode(self, texts: Sequence[str], *, with_offsets: bool) -> "list[Encoding | str]":
        """Encodings in order; for a text that the tokenizer refuses, why."""
        encode = self.tokenizer.encode_batch if with_offsets else self.tokenizer.encode_batch_fast
        try:
            return list(encode(list(texts), add_special_tokens=False))
        except Exception as error:  # the Rust library raises plain Exception
            if len(texts) == 1:
                return [f"cannot be tokenized: {str(error)[:200] or type(error).__name__}"]
            half = len(texts) // 2
            return [e for part in (texts[:half], texts[half:]) for e in self._encode(part, with_offsets=with_offsets)]

    def _document(self, text: str, encoding: "Encoding") -> tuple[np.ndarray, int, int, np.ndarray]:
        """(tokens, how many are the prompt's, how many were cut off, (5, R) rows) of one document."""
        ids = np.array(encoding.ids, dtype=self.token_type.to_pandas_dtype())
        cut = max(len(ids) - self.content_tokens, 0) if self.chunking.long_documents == "truncate" else 0
        offsets = np.empty((0, 2), np.int64)
        num_prompt = 0
        if self.prompt or cut or self.chunking.chunked:
            if not self.chunking.chunked:
                encoding = self.tokenizer.encode(self.prompt + text, add_special_tokens=False)
            offsets = offsets_of(encoding)
            # A token that begins in the prompt and ends in the text is the text's.
            num_prompt = int(np.searchsorted(np.maximum.accumulate(offsets[:, 1]), len(self.prompt), side="right"))
            num_prompt = num_prompt if self.prompt else 0
            offsets = np.clip(offsets[num_prompt:] - len(self.prompt), 0, None)
        if cut:
            ids = ids[: self.content_tokens]
            offsets = offsets[: len(ids) - num_prompt]
            text = text[: int(offsets[:, 1].max(initial=0))]
        return ids, num_prompt, cut, self._rows(text, offsets, len(ids) - num_prompt)

    def _rows(self, text: str, offsets: np.ndarray, num_tokens: int) -> np.ndarray:
        """The vectors that a document gets, (5, R): chunk, char_start, char_end, token_start, token_end."""
        whole = np.array([[WHOLE], [0], [len(text)], [0], [num_tokens]], dtype=np.int64)
        if not self.chunking.chunked:
            return whole
        tokens, chars = chunk_spans(text, offsets, self.chunking.chunk_tokens)
        chunks = np.stack([np.arange(len(tokens) - 1), chars[:-1], chars[1:], tokens[:-1], tokens[1:]])
        return chunks if self.chunking.granularity == "chunk" else np.concatenate([whole, chunks], axis=1)


def offsets_of(encoding: "Encoding") -> np.ndarray:
    """(N, 2) int64 character offsets. The library hands out tuples: this is the one place that pays for them."""
    flat = itertools.chain.from_iterable(encoding.offsets)
    return np.fromiter(flat, dtype=np.int64, count=2 * len(encoding)).reshape(-1, 2)


def list_array(parts: Sequence[np.ndarray], value_type: pa.DataType) -> pa.Array:
    """A list column out of one array a row."""
    ends = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64)
    values: Any = np.concatenate(parts) if parts else np.empty(0, value_type.to_pandas_dtype())
    return pa.ListArray.from_arrays(
        pa.array(ends.astype(np.int32)), pa.array(values.astype(value_type.to_pandas_dtype()))
    )


def combined(column: pa.ChunkedArray) -> pa.Array:
    """One array, also for a table without rows."""
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def list_offsets(column: pa.ChunkedArray) -> np.ndarray:
    """int64 offsets of a list column, counted from its own first value."""
    offsets = combined(column).offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0] if len(offsets) else np.zeros(1, np.int64)


def list_values(column: pa.ChunkedArray) -> np.ndarray:
    """The values of a list column, end to end."""
    return combined(column).flatten().to_numpy()
