"""Models as an evaluation sees them: texts in, unit vectors out, by the stages that embed a table.

Documents are tokenized, cut, packed and pooled by `TokenizeStage` and `EmbedStage`, questions by `Embedder` under the
prompt that `nightloom search` takes: what is measured is what the product gives. Other libraries' models stand beside,
through sentence-transformers where it is installed.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch

from model.embedder import Embedder
from model.encoder import Encoder, init_weights
from model.errors import InputError
from model.folder import read_folder
from model.weights import save_folder
from pipeline.chunks import WHOLE, ChunkingConfig
from pipeline.columns import COLUMNS
from pipeline.embedding import EmbedStage
from pipeline.storage import local_model
from pipeline.tokens import TokenizeStage

MODES = ("document", "chunk-late", "chunk-none")
"""One vector a document; one a chunk, pooled in its context; one a chunk, encoded alone."""
TEXTS_AT_ONCE = 4_096

Rows = tuple[np.ndarray, np.ndarray]
"""Vectors (R, D) and the first row of each document (N,), ascending."""


class TextModel(Protocol):
    """What turns texts into vectors."""

    modes: Sequence[str]
    dim: int

    def documents(self, texts: Sequence[str], mode: str = "document") -> Rows: ...

    def queries(self, texts: Sequence[str]) -> np.ndarray: ...


class ProductModel:
    """A model folder as `nightloom embed` and `nightloom search` use it.

    Args:
        model: folder (s3:// too) or hub id.
        chunk_tokens: of the chunk modes.

    Raises:
        InputError: no model there, or settings that it cannot meet.
    """

    modes: Sequence[str] = MODES

    def __init__(self, model: str, *, device: str = "auto", dtype: str = "auto", chunk_tokens: int = 256) -> None:
        self.path, self.device, self.dtype, self.chunk_tokens = local_model(model), device, dtype, chunk_tokens
        self.embedder = Embedder(self.path, device=device, dtype=dtype)
        self.dim = self.embedder.dim

    def documents(self, texts: Sequence[str], mode: str = "document") -> Rows:
        """The rows that a table would have, in the order of the texts."""
        granularity, _, context = mode.partition("-")
        chunking = ChunkingConfig(
            granularity=granularity,  # type: ignore[arg-type]
            context=context or "late",  # type: ignore[arg-type]
            chunk_tokens=self.chunk_tokens,
        )
        prompt = self.embedder.prompt_text()
        tokenize = TokenizeStage(self.path, chunking, prompt)
        embed = EmbedStage(self.path, chunking=tokenize.chunking, device=self.device, dtype=self.dtype)
        vectors: list[np.ndarray] = []
        owners: list[np.ndarray] = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            for part in embed.embed(tokenize(document_table(texts[start : start + TEXTS_AT_ONCE], start))):
                if len(part.dead):
                    first = part.dead.slice(0, 1).to_pylist()[0]
                    raise RuntimeError(f"text {first['document_id']} cannot be embedded: {first['error']}")
                rows = part.rows.combine_chunks()
                values = rows["vector"].combine_chunks().values.to_numpy()
                vectors.append(values.reshape(len(rows), -1))
                owners.append(rows["document_id"].cast(pa.int64()).to_numpy())
                assert granularity == "chunk" or (rows["chunk"].to_numpy() == WHOLE).all()
        owner_R = np.concatenate(owners)
        first_N = np.searchsorted(owner_R, np.arange(len(texts)))
        return np.concatenate(vectors), first_N

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        return self.embedder.encode_query(list(texts))


class OtherModel:
    """A model of another architecture as sentence-transformers uses it, long texts cut where it cuts them."""

    modes: Sequence[str] = MODES[:1]

    def __init__(self, folder: str) -> None:
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(folder, device="cuda" if torch.cuda.is_available() else "cpu")
        self.dim = int(self.model.get_embedding_dimension())

    def documents(self, texts: Sequence[str], mode: str = "document") -> Rows:
        return self.model.encode_document(list(texts), show_progress_bar=False), np.arange(len(texts))

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        return self.model.encode_query(list(texts), show_progress_bar=False)


def open_model(model: str, *, device: str = "auto", dtype: str = "auto", chunk_tokens: int = 256) -> TextModel:
    """A model to compare with: one of ours if it can be, else by sentence-transformers where that is installed.

    Raises:
        InputError: neither can read it.
    """
    try:
        read_folder(local_model(model))
    except InputError:
        try:
            return OtherModel(model)
        except ImportError:
            pass
        except (OSError, ValueError) as error:
            raise InputError(f"{model} cannot be read by sentence-transformers either: {error}") from None
        raise
    return ProductModel(model, device=device, dtype=dtype, chunk_tokens=chunk_tokens)


@contextmanager
def random_twin(model: str, *, seed: int = 0) -> Iterator[str]:
    """A folder with the same architecture, tokenizer and pooling and with random weights, for as long as the block
    lasts: what tokenizer and shape do alone. Dense modules are left out: those were made for the trained weights.
    """
    folder = read_folder(local_model(model))
    encoder = Encoder(folder.config)
    init_weights(encoder, folder.config, torch.Generator().manual_seed(seed))
    with tempfile.TemporaryDirectory(prefix="nightloom-random-") as place:
        yield str(
            save_folder(
                encoder,
                Path(place) / "model",
                tokenizer_from=folder.path,
                **folder.sentence_options() | {"dense": ()},
            )
        )


def document_table(texts: Sequence[str], first: int = 0) -> pa.Table:
    """A document table of texts, their numbers for ids."""
    count = len(texts)
    columns = {
        "document_id": [str(first + i) for i in range(count)],
        "text": list(texts),
        "text_hash": [bytes(16)] * count,
        "source": [os.devnull] * count,
        "error": [None] * count,
    }
    return pa.table(columns, schema=COLUMNS)
