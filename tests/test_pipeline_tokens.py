"""Tokens and offsets: the same ids as in one call of the tokenizer, offsets in characters, the vectors asked for."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from model.errors import InputError
from model.folder import load_tokenizer
from pipeline.chunks import ChunkingConfig
from pipeline.columns import hash_texts
from pipeline.tokens import TokenizeStage, list_array, offsets_of

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "",
    "caf\xe9 \U0001f600\U0001f600 \u05e9\u05dc\u05d5\u05dd nul \x00 end",
    "Vectors are versioned; a crash at three in the morning loses nothing. " * 40,
]


def documents_of(texts: list[str], **carried: Any) -> pa.Table:
    text = pa.array(texts, pa.large_string())
    return pa.table(
        {
            "document_id": pa.array([f"d{i}" for i in range(len(texts))], pa.string()),
            "text": text,
            "text_hash": hash_texts(text),
            "source": ["s"] * len(texts),
            "error": pa.nulls(len(texts), pa.string()),
        }
        | carried
    )


def test_ids_are_the_tokenizers_and_the_rest_is_carried(tiny_model_folder: Path) -> None:
    tokens = TokenizeStage(tiny_model_folder)(documents_of(TEXTS, year=[1, 2, 3, 4]))
    tokenizer = load_tokenizer(tiny_model_folder)
    assert tokens["tokens"].to_pylist() == [tokenizer.encode(t, add_special_tokens=False).ids for t in TEXTS]
    assert tokens["tokens"].type == pa.list_(pa.uint16())
    assert tokens["num_chars"].to_pylist() == [len(t) for t in TEXTS]
    assert tokens["year"].to_pylist() == [1, 2, 3, 4]
    assert tokens["row_chunk"].to_pylist() == [[-1]] * 4
    assert tokens["row_char_end"].to_pylist() == [[len(t)] for t in TEXTS]
    assert tokens["row_token_end"].to_pylist() == [[len(t)] for t in tokens["tokens"].to_pylist()]
    assert "text" not in tokens.column_names


@pytest.mark.parametrize("prompt", ["", "query: ", "\xe9 "])
def test_chunks_carry_character_offsets(tiny_model_folder: Path, prompt: str) -> None:
    chunking = ChunkingConfig(granularity="both", chunk_tokens=20)
    table = TokenizeStage(tiny_model_folder, chunking, prompt)(documents_of(TEXTS))
    tokenizer = load_tokenizer(tiny_model_folder)
    for text, row in zip(TEXTS, table.to_pylist(), strict=True):
        assert row["tokens"] == tokenizer.encode(prompt + text, add_special_tokens=False).ids
        content = row["tokens"][row["num_prompt"] :]
        assert row["row_chunk"] == list(range(-1, len(row["row_chunk"]) - 1))
        assert row["row_char_start"][1:] == [0, *row["row_char_end"][1:-1]]
        assert row["row_char_end"][-1] == len(text)
        assert row["row_token_end"][-1] == len(content)
        # Tokenizing a chunk's characters alone gives its tokens, up to the space that the cut took.
        for k in range(1, len(row["row_chunk"])):
            piece = text[row["row_char_start"][k] : row["row_char_end"][k]]
            own = content[row["row_token_start"][k] : row["row_token_end"][k]]
            assert "".join(tokenizer.decode(own).split()) == "".join(piece.split())
    assert len(table["row_chunk"].to_pylist()[3]) > 20


def test_truncation_is_counted_and_its_offsets_are_true(tiny_model_folder: Path) -> None:
    for granularity in ("document", "chunk"):
        stage = TokenizeStage(
            tiny_model_folder, ChunkingConfig(granularity, 16, max_tokens=32, long_documents="truncate")
        )
        row = stage(documents_of(TEXTS)).to_pylist()[3]
        whole = load_tokenizer(tiny_model_folder).encode(TEXTS[3], add_special_tokens=False)
        assert row["tokens"] == whole.ids[:30]
        assert row["truncated_tokens"] == len(whole.ids) - 30
        assert row["row_char_end"][-1] == whole.offsets[29][1]
        assert row["num_chars"] == len(TEXTS[3])


def test_dead_rows_pass_through(tiny_model_folder: Path) -> None:
    documents = documents_of(["good", ""])
    documents = documents.set_column(4, "error", pa.array([None, "line 2 is not JSON"]))
    rows = TokenizeStage(tiny_model_folder)(documents).to_pylist()
    assert rows[1]["error"] == "line 2 is not JSON"
    assert rows[1]["row_chunk"] == rows[1]["tokens"] == []
    assert len(TokenizeStage(tiny_model_folder)(documents.slice(0, 0))) == 0


def test_five_megabytes_in_one_document(tiny_model_folder: Path) -> None:
    text = TEXTS[3] * 1800
    assert len(text) > 5_000_000
    stage = TokenizeStage(tiny_model_folder, ChunkingConfig(granularity="chunk", chunk_tokens=256))
    row = stage(documents_of([text]))
    starts = row["row_char_start"].to_pylist()[0]
    # The sentence has about 40 tokens: every chunk of up to 256 ends with one.
    assert all(text[s : s + 20].lstrip().startswith("Vectors are") for s in starts)


def test_a_model_is_required(tiny_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no model"):
        TokenizeStage(tmp_path)
    with pytest.raises(InputError, match="max_tokens is 513"):
        TokenizeStage(tiny_model_folder, ChunkingConfig(max_tokens=513))


def test_arrays(tiny_tokenizer_folder: Path) -> None:
    encoding = load_tokenizer(tiny_tokenizer_folder).encode("\U0001f600 dog")
    assert offsets_of(encoding).tolist() == [list(pair) for pair in encoding.offsets]
    assert list_array([np.array([1, 2]), np.array([], int)], pa.int32()).to_pylist() == [[1, 2], []]
    assert list_array([], pa.int32()).to_pylist() == []
