"""Tokenizers: the same corpus trains the same one, transformers reads it, and what is missing is one line."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import SENTENCES

from model.errors import InputError
from model.folder import load_tokenizer
from pipeline.shards import hash_bytes
from pipeline.vocabulary import copy_tokenizer, corpus_tokenizer, read_vocabulary, train_tokenizer

TEXTS = [
    f"{sentence} {word}" for sentence in SENTENCES for word in ("caf\u00e9", "na\u00efve", "\U0001f98a fox", "42")
] * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train_tokenizer(iter(TEXTS), 400, folder)
    return folder


def test_training_is_repeatable(folder: Path, tmp_path: Path) -> None:
    train_tokenizer(iter(TEXTS), 400, tmp_path)
    for file in folder.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_a_trained_tokenizer_has_what_training_needs(folder: Path) -> None:
    vocabulary = read_vocabulary(folder)
    assert vocabulary.size == 400
    assert vocabulary.hash == hash_bytes((folder / "tokenizer.json").read_bytes())
    assert (vocabulary.pad_id, vocabulary.unk_id, vocabulary.cls_id) == (0, 1, 2)
    assert (vocabulary.sep_id, vocabulary.mask_id) == (3, 4)
    assert vocabulary.special_ids == (0, 1, 2, 3, 4)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("Any \u4e2d text").ids) == "Any \u4e2d text"
    assert tokenizer.encode("x", "y").tokens == ["[CLS]", "x", "[SEP]", "y", "[SEP]"]


def test_transformers_reads_it(folder: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    assert (theirs.cls_token_id, theirs.sep_token_id, theirs.mask_token_id, theirs.pad_token_id) == (2, 3, 4, 0)
    text = "The quick brown fox."
    assert theirs(text)["input_ids"] == load_tokenizer(folder).encode(text).ids


def test_text_that_spells_a_special_token_stays_text(folder: Path, tmp_path: Path) -> None:
    copy_tokenizer(folder, str(tmp_path))
    tokenizer = corpus_tokenizer(str(tmp_path))
    ids = tokenizer.encode("fox [MASK] [CLS]", add_special_tokens=False).ids
    assert not {0, 1, 2, 3, 4} & set(ids)
    assert tokenizer.decode(ids) == "fox [MASK] [CLS]"


def test_names_of_special_tokens_come_from_the_folder(folder: Path, tmp_path: Path) -> None:
    tree = json.loads((folder / "tokenizer.json").read_text())
    renamed = json.dumps(tree).replace("[CLS]", "<s>").replace("[SEP]", "</s>")
    (tmp_path / "tokenizer.json").write_text(renamed)
    with pytest.raises(InputError, match=r"has no token \[CLS\]; training needs"):
        read_vocabulary(tmp_path)
    named = {"cls_token": "<s>", "sep_token": {"content": "</s>", "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    vocabulary = read_vocabulary(tmp_path)
    assert (vocabulary.cls_id, vocabulary.sep_id, vocabulary.mask_id) == (2, 3, 4)


def test_what_is_wrong_is_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 261"):
        train_tokenizer(TEXTS, 200, tmp_path)
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        read_vocabulary(tmp_path)
    shutil.copy(folder / "tokenizer.json", tmp_path)
    (tmp_path / "special_tokens_map.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        read_vocabulary(tmp_path)
