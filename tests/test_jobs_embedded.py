"""What an evaluation embeds is what the product embeds."""

from pathlib import Path

import numpy as np
import pytest

from jobs.embedded import MODES, ProductModel, document_table, open_model, random_twin
from model import Embedder
from model.errors import InputError
from model.folder import read_folder, tokenizer_hash, weights_hash
from pipeline.columns import COLUMNS

TEXTS = ["A cluster grows.", "Vectors are versioned; a crash loses nothing. " * 30, "", "The lazy dog."]


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> ProductModel:
    return ProductModel(str(tiny_model_folder), dtype="float32", chunk_tokens=40)


def test_documents_are_those_of_the_embedder(model: ProductModel, tiny_model_folder: Path) -> None:
    vectors, first = model.documents(TEXTS)
    assert first.tolist() == [0, 1, 2, 3]
    short = [0, 2, 3]  # encode truncates, a table takes windows
    expected = Embedder(tiny_model_folder, dtype="float32").encode([TEXTS[i] for i in short])
    assert vectors[short] == pytest.approx(expected, abs=1e-5)


def test_chunks_follow_their_document(model: ProductModel) -> None:
    late, first = model.documents(TEXTS, "chunk-late")
    alone, first_alone = model.documents(TEXTS, "chunk-none")
    assert first.tolist() == first_alone.tolist()
    assert first[1] == 1
    assert first[2] > 5
    assert len(late) == first[3] + 1
    assert model.modes == MODES
    whole, _ = model.documents(TEXTS)
    assert late[0] == pytest.approx(whole[0], abs=1e-5)  # one chunk is the document
    assert np.abs(late[1 : first[2]] - alone[1 : first[2]]).max() > 1e-3  # the others know their context, or do not


def test_queries_have_the_prompt_of_search(model: ProductModel, tiny_model_folder: Path) -> None:
    expected = Embedder(tiny_model_folder, dtype="float32").encode(["a question"], prompt_name="query")
    assert model.queries(["a question"]) == pytest.approx(expected, abs=1e-6)


def test_another_architecture_goes_through_sentence_transformers(tmp_path: Path, model: ProductModel) -> None:
    from transformers import BertConfig, BertModel, BertTokenizerFast

    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]), encoding="utf-8")
    config = BertConfig(vocab_size=15, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(config).save_pretrained(tmp_path / "bert")
    BertTokenizerFast(vocab=str(vocabulary)).save_pretrained(tmp_path / "bert")
    other = open_model(str(tmp_path / "bert"))
    vectors, first = other.documents(["a b", "c d e"])
    assert vectors.shape == (2, 16) == (len(other.queries(["a", "b"])), other.dim)
    assert first.tolist() == [0, 1]
    assert other.modes == ("document",)
    assert isinstance(open_model(model.path), ProductModel)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="cannot be read by sentence-transformers either"):
        open_model(str(tmp_path / "empty"))


def test_a_random_twin_differs_in_weights_only(tiny_model_folder: Path) -> None:
    with random_twin(str(tiny_model_folder), seed=7) as twin:
        one, other = read_folder(tiny_model_folder), read_folder(twin)
        assert one.config.to_hf() == other.config.to_hf()
        assert (one.pooling, one.normalize, one.prompts, one.max_tokens) == (
            other.pooling,
            other.normalize,
            other.prompts,
            other.max_tokens,
        )
        assert tokenizer_hash(twin) == tokenizer_hash(tiny_model_folder)
        assert weights_hash(twin) != weights_hash(tiny_model_folder)
    assert not Path(twin).exists()


def test_a_document_table_has_the_columns_of_one() -> None:
    table = document_table(["a", "b"], first=5)
    assert table.schema == COLUMNS
    assert table["document_id"].to_pylist() == ["5", "6"]
