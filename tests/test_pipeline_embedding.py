"""Vectors: equal to the library's, to sums over windows done by hand, and the same in whatever company."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from model.batch import PackedBatch, pack
from model.embedder import Embedder
from model.errors import InputError
from model.folder import load_tokenizer
from pipeline.chunks import ChunkingConfig, plan_windows
from pipeline.columns import hash_texts
from pipeline.embedding import DEAD_KEY, STATISTICS_KEY, EmbedStage
from pipeline.table import table_schema
from pipeline.tokens import TokenizeStage
from pipeline.vectors import as_array, as_vectors

CLOSE = 1e-5
WHOLE = ChunkingConfig()
SHORT = [
    "x",
    "The quick brown fox jumps over the lazy dog.",
    "caf\xe9 \U0001f600 nul \x00 \u05e9\u05dc\u05d5\u05dd",
    "A cluster that grows and shrinks embeds long documents every night. " * 6,
]
LONG = "Vectors are versioned; a crash at three in the morning loses nothing. Attention sees a window. " * 60


def documents_of(texts: list[str]) -> pa.Table:
    text = pa.array(texts, pa.large_string())
    return pa.table(
        {
            "document_id": pa.array([f"d{i}" for i in range(len(texts))], pa.string()),
            "text": text,
            "text_hash": hash_texts(text),
            "source": pa.array(["s"] * len(texts), pa.string()),
            "error": pa.nulls(len(texts), pa.string()),
            "year": pa.array(range(len(texts)), pa.int64()),
        }
    )


def rows_of(
    folder: Path, texts: list[str], chunking: ChunkingConfig = WHOLE, prompt: str = "", **options: object
) -> pa.Table:
    tokens = TokenizeStage(folder, chunking, prompt)(documents_of(texts))
    stage = EmbedStage(folder, chunking=chunking, dtype="float32", device="cpu", **options)  # type: ignore[arg-type]
    return pa.concat_tables([part.rows for part in stage.embed(tokens)])


def vectors_of(rows: pa.Table) -> np.ndarray:
    return np.stack(rows["vector"].to_numpy())


@pytest.fixture(scope="module")
def embedder(tiny_model_folder: Path) -> Embedder:
    return Embedder(tiny_model_folder, dtype="float32", device="cpu")


@pytest.mark.parametrize("prompt", ["", "query: "])
@pytest.mark.parametrize("granularity", ["document", "both"])
@pytest.mark.parametrize("context", ["late", "none"])
def test_short_documents_equal_encode(
    tiny_model_folder: Path, embedder: Embedder, prompt: str, granularity: str, context: str
) -> None:
    chunking = ChunkingConfig(granularity, 24, context)  # type: ignore[arg-type]
    rows = rows_of(tiny_model_folder, SHORT, chunking, prompt)
    whole = rows.filter(pc.equal(rows["chunk"], -1))
    np.testing.assert_allclose(vectors_of(whole), embedder.encode(SHORT, prompt=prompt), atol=CLOSE)


def test_chunks_alone_equal_encode_of_their_text(tiny_model_folder: Path, embedder: Embedder) -> None:
    rows = rows_of(tiny_model_folder, [LONG, *SHORT], ChunkingConfig("chunk", 60, "none"))
    tokenizer = load_tokenizer(tiny_model_folder)
    compared = 0
    for row in rows.to_pylist():
        text = [LONG, *SHORT][row["year"]][row["char_start"] : row["char_end"]]
        if len(tokenizer.encode(text, add_special_tokens=False)) == row["token_end"] - row["token_start"]:
            np.testing.assert_allclose(row["vector"], embedder.encode(text), atol=CLOSE)
            compared += 1
    assert compared > 10


def test_a_document_of_one_chunk_has_one_vector(tiny_model_folder: Path) -> None:
    late = rows_of(tiny_model_folder, SHORT[:3], ChunkingConfig("both", 200, "late"))
    alone = rows_of(tiny_model_folder, SHORT[:3], ChunkingConfig("both", 200, "none"))
    assert late["chunk"].to_pylist() == [-1, 0] * 3
    vectors = vectors_of(late)
    np.testing.assert_allclose(vectors[0::2], vectors[1::2], atol=CLOSE)
    np.testing.assert_allclose(vectors, vectors_of(alone), atol=CLOSE)


def test_long_documents_add_up_over_windows(tiny_model_folder: Path, embedder: Embedder) -> None:
    """Late chunks and whole document against token vectors taken one window, one token at a time."""
    chunking = ChunkingConfig("both", 100, max_tokens=128, overlap_tokens=30)
    rows = rows_of(tiny_model_folder, [LONG], chunking, tokens_per_batch=300)
    encoding = load_tokenizer(tiny_model_folder).encode(LONG, add_special_tokens=False)
    n = len(encoding.ids)
    w = plan_windows(np.array([n]), 126, 30)
    assert len(w.unit) > 10
    token_vectors = []
    for i in range(len(w.unit)):
        batch = pack([[2, *encoding.ids[w.start[i] : w.end[i]], 3]])
        at = np.arange(batch.num_tokens)
        each, _ = embedder.embed_segments(batch, at, at + 1)
        low = 0 if i == 0 else w.keep_start[i] - w.start[i] + 1
        high = batch.num_tokens if i == len(w.unit) - 1 else w.keep_end[i] - w.start[i] + 1
        token_vectors.append(each[low:high])
    each = np.concatenate(token_vectors)
    assert len(each) == n + 2
    for row in rows.to_pylist():
        low = 0 if row["token_start"] == 0 else row["token_start"] + 1
        high = n + 2 if row["token_end"] == n else row["token_end"] + 1
        mean = each[low:high].mean(axis=0)
        np.testing.assert_allclose(row["vector"], mean / np.linalg.norm(mean), atol=CLOSE)
    chunks = rows.slice(1)
    assert chunks["token_start"].to_pylist() == [0, *chunks["token_end"].to_pylist()[:-1]]
    assert chunks["char_end"].to_pylist()[-1] == len(LONG)


def test_truncated_documents_equal_encode(tiny_model_folder: Path, embedder: Embedder) -> None:
    rows = rows_of(tiny_model_folder, [LONG, "x"], ChunkingConfig(long_documents="truncate"))
    np.testing.assert_allclose(vectors_of(rows), embedder.encode([LONG, "x"]), atol=CLOSE)


def test_company_does_not_matter(tiny_model_folder: Path) -> None:
    chunking = ChunkingConfig("both", 50, max_tokens=128)
    alone = vectors_of(rows_of(tiny_model_folder, [LONG], chunking))
    others = [text * k for text in SHORT for k in (1, 2, 3)]
    for texts in ([LONG, *others], [*others, LONG], [*others[:5], LONG, *others[5:]]):
        for budget, ahead in ((256, 300), (2048, 10_000)):
            rows = rows_of(tiny_model_folder, texts, chunking, tokens_per_batch=budget, look_ahead_tokens=ahead)
            mine = rows.filter(pc.equal(rows["year"], texts.index(LONG)))
            np.testing.assert_allclose(vectors_of(mine), alone, atol=CLOSE)
            # Rows are in the order of the documents, each document in one piece.
            assert (np.diff(rows["year"].to_numpy()) >= 0).all()


@pytest.mark.parametrize("pooling", ["cls", "last", "weighted_mean"])
def test_other_poolings_equal_encode(tiny_model_folder: Path, pooling: str, tmp_path: Path) -> None:
    folder = with_pooling(tiny_model_folder, tmp_path, pooling)
    embedder = Embedder(folder, dtype="float32", device="cpu")
    assert embedder.pooling == pooling
    rows = rows_of(folder, SHORT)
    np.testing.assert_allclose(vectors_of(rows), embedder.encode(SHORT), atol=CLOSE)
    long = rows_of(folder, [LONG], ChunkingConfig("both", 40, max_tokens=128))
    assert len(long) > 10
    assert np.isfinite(vectors_of(long)).all()
    assert len(np.unique(vectors_of(long).round(4), axis=0)) == len(long)


def with_pooling(folder: Path, to: Path, pooling: str, *, include_prompt: bool = True) -> Path:
    """A copy of a sentence-transformers folder with another pooling."""
    copy = Path(shutil.copytree(folder, to / "copy"))
    names = {"cls": "cls", "last": "lasttoken", "weighted_mean": "weightedmean", "mean": "mean"}
    kinds = {m["type"].rpartition(".")[2]: m["path"] for m in json.loads((copy / "modules.json").read_text())}
    path = copy / kinds["Pooling"] / "config.json"
    options = {k: v for k, v in json.loads(path.read_text()).items() if not k.startswith("pooling_mode")}
    path.write_text(json.dumps(options | {"pooling_mode": names[pooling], "include_prompt": include_prompt}))
    return copy


def test_a_prompt_that_is_kept_out_of_the_pooling(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = with_pooling(tiny_model_folder, tmp_path, "mean", include_prompt=False)
    rows = rows_of(folder, SHORT, prompt="query: ")
    expected = Embedder(folder, dtype="float32", device="cpu").encode(SHORT, prompt="query: ")
    np.testing.assert_allclose(vectors_of(rows), expected, atol=CLOSE)


def test_rows_fit_the_table_and_statistics_add_up(tiny_model_folder: Path) -> None:
    chunking = ChunkingConfig(max_tokens=128)
    tokens = TokenizeStage(tiny_model_folder, chunking)(documents_of([*SHORT, LONG]))
    stage = EmbedStage(tiny_model_folder, chunking=chunking, dtype="float32", device="cpu")
    (part,) = stage.embed(tokens)
    wanted = table_schema(64, "float32", [pa.field("year", pa.int64())])
    assert [(f.name, f.type) for f in wanted if f.name != "run"] == [(f.name, f.type) for f in part.rows.schema]
    s = part.statistics
    assert (s.documents, s.vectors, s.truncated_tokens, s.padding_tokens) == (5, 5, 0, 0)
    assert s.tokens == sum(len(t) for t in tokens["tokens"].to_pylist())
    assert s.model_tokens > s.tokens + 2 * s.sequences
    (rows,) = stage(tokens)
    assert json.loads(rows.schema.metadata[STATISTICS_KEY])["tokens"] == s.tokens
    assert json.loads(rows.schema.metadata[DEAD_KEY]) == []
    (nothing,) = stage.embed(tokens.slice(0, 0))
    assert len(nothing.rows) == 0
    assert nothing.rows.schema == part.rows.schema


def test_a_failing_document_is_dead_and_alone(tiny_model_folder: Path) -> None:
    """An id past the embedding makes the encoder itself fail, on whatever bin the document is in."""
    tokens = TokenizeStage(tiny_model_folder, ChunkingConfig(max_tokens=128))(documents_of([*SHORT, LONG, *SHORT]))
    values = [list(t) for t in tokens["tokens"].to_pylist()]
    values[1][3] = 60_000
    values[4][700] = 60_000
    at = tokens.column_names.index("tokens")
    poisoned = tokens.set_column(at, "tokens", pa.array(values, pa.list_(pa.uint16())))
    poisoned = poisoned.set_column(
        poisoned.column_names.index("error"), "error", pa.array([None] * 8 + ["line 9 is not JSON"], pa.string())
    )
    stage = EmbedStage(tiny_model_folder, chunking=ChunkingConfig(max_tokens=128), dtype="float32", device="cpu")
    parts = list(stage.embed(poisoned))
    dead = pa.concat_tables([part.dead for part in parts]).to_pylist()
    assert [(row["document_id"], row["stage"]) for row in dead] == [("d1", "embed"), ("d4", "embed"), ("d8", "tokens")]
    assert "index" in dead[0]["error"].lower()
    rows = pa.concat_tables([part.rows for part in parts]).filter(pc.less(pc.field("year"), 8))
    good = pa.concat_tables([part.rows for part in stage.embed(tokens)])
    keep = good.filter(~pc.field("year").isin([1, 4, 8]))
    np.testing.assert_allclose(vectors_of(rows), vectors_of(keep), atol=CLOSE)
    assert sum(part.statistics.documents for part in parts) == 6


def test_a_broken_encoder_blames_no_document(tiny_model_folder: Path) -> None:
    tokens = TokenizeStage(tiny_model_folder)(documents_of(SHORT))
    stage = EmbedStage(tiny_model_folder, dtype="float32", device="cpu")
    stage.cls_id = 60_000
    with pytest.raises(IndexError):
        list(stage.embed(tokens))


def with_memory_for(stage: EmbedStage, tokens: int, seen: list[int]) -> None:
    """Let the encoder of a stage run out of the device's memory on batches of more than so many tokens."""
    real = stage.embedder.embed_segments

    def embed_segments(batch: PackedBatch, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert sys.exc_info() == (None, None, None), "an exception that is handled still holds the memory of its frames"
        seen.append(batch.num_tokens)
        if batch.num_tokens > tokens:
            raise torch.OutOfMemoryError("the device is out of memory")
        return real(batch, starts, ends)

    stage.embedder.embed_segments = embed_segments


def test_a_device_out_of_memory_gets_smaller_batches(tiny_model_folder: Path) -> None:
    texts = [f"{i} {text}" for i in range(12) for text in SHORT]
    tokens = TokenizeStage(tiny_model_folder)(documents_of(texts))
    stage = EmbedStage(tiny_model_folder, dtype="float32", device="cpu", tokens_per_batch=2048, look_ahead_tokens=2500)
    expected = vectors_of(pa.concat_tables([part.rows for part in stage.embed(tokens)]))
    seen: list[int] = []
    with_memory_for(stage, 700, seen)
    parts = list(stage.embed(tokens))
    assert sum(len(part.dead) for part in parts) == 0
    np.testing.assert_allclose(vectors_of(pa.concat_tables([part.rows for part in parts])), expected, atol=CLOSE)
    assert seen[0] > 1024
    assert stage.tokens_per_batch < 1024
    # Later look-aheads begin with bins of that size: few or none of them fail.
    assert sum(size > 700 for size in seen) <= 4


def test_a_document_that_no_memory_is_enough_for(tiny_model_folder: Path) -> None:
    tokens = TokenizeStage(tiny_model_folder)(documents_of(SHORT))
    stage = EmbedStage(tiny_model_folder, dtype="float32", device="cpu")
    longest = max(len(row) for row in tokens["tokens"]) + 2
    with_memory_for(stage, longest - 1, [])
    (part,) = stage.embed(tokens)
    assert [row["document_id"] for row in part.dead.to_pylist()] == ["d3"]
    assert "out of memory" in part.dead["error"][0].as_py()
    assert part.statistics.documents == 3


def test_a_sequence_that_fails_once_is_tried_again(tiny_model_folder: Path) -> None:
    tokens = TokenizeStage(tiny_model_folder)(documents_of(SHORT[1:2]))
    stage = EmbedStage(tiny_model_folder, dtype="float32", device="cpu")
    seen: list[int] = []
    with_memory_for(stage, 10**6, seen)
    once = stage.embedder.embed_segments

    def fails_once(*arguments: object) -> tuple[np.ndarray, np.ndarray]:
        if not seen:
            seen.append(0)
            raise RuntimeError("once")
        return once(*arguments)

    stage.embedder.embed_segments = fails_once
    (part,) = stage.embed(tokens)
    assert (len(part.rows), len(part.dead)) == (1, 0)


@pytest.mark.parametrize(("vector_type", "tolerance"), [("float16", 1e-3), ("int8", 0.006)])
def test_vector_types(tiny_model_folder: Path, embedder: Embedder, vector_type: str, tolerance: float) -> None:
    rows = rows_of(tiny_model_folder, SHORT, vector_type=vector_type, truncate_dim=16)
    assert rows["vector"].type == table_schema(16, vector_type).field("vector").type
    expected = embedder.encode(SHORT, truncate_dim=16)
    np.testing.assert_allclose(as_vectors(rows["vector"], vector_type), expected, atol=tolerance)


def test_bits_are_the_signs(tiny_model_folder: Path, embedder: Embedder) -> None:
    rows = rows_of(tiny_model_folder, SHORT, vector_type="bits", truncate_dim=16)
    assert rows["vector"].type == table_schema(16, "bits").field("vector").type
    expected = embedder.encode(SHORT, truncate_dim=16)
    clear = np.abs(expected) > 1e-4  # a component at 0 may fall to either side
    assert np.array_equal((as_array(rows["vector"]) > 0)[clear], (expected > 0)[clear])


def test_bad_settings(tiny_model_folder: Path) -> None:
    with pytest.raises(InputError, match="vector type"):
        EmbedStage(tiny_model_folder, vector_type="float8")
    with pytest.raises(InputError, match="unit length"):
        EmbedStage(tiny_model_folder, vector_type="int8", normalize=False)
