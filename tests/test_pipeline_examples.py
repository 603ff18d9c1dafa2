"""Rows of Parquet and JSON Lines as tokens and targets; what cannot be learned from is one line that says where."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from model.errors import InputError
from model.folder import load_tokenizer
from pipeline.examples import IGNORED, Examples, Reading, read_examples


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(tiny_tokenizer_folder)


def write_lines(folder: Path, *rows: dict[str, Any], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder / name)


def texts_of(examples: Examples, tokenizer: Tokenizer, number: int) -> list[str]:
    some = slice(examples.first_E[number], examples.first_E[number + 1])
    return [tokenizer.decode(examples.text(text).tolist()) for text in examples.text_N[some].tolist()]


def test_pairs_keep_equal_texts_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write_lines(
        tmp_path,
        {"query": "a fox?", "positive": "The fox.", "negatives": ["A dog.", "The night."]},
        {"query": "a dog?", "positive": "A dog."},
        {"query": "a fox?", "positive": "The lazy fox.", "negatives": None},
    )
    examples = read_examples(source, tokenizer, Reading("contrastive", 64))
    assert examples.num_examples == 3
    assert texts_of(examples, tokenizer, 0) == ["a fox?", "The fox.", "A dog.", "The night."]
    assert texts_of(examples, tokenizer, 2) == ["a fox?", "The lazy fox."]
    assert len(examples.offsets_U) - 1 == 6
    keys = examples.key_N.tolist()
    assert keys[0] == keys[6], "the same question"
    assert keys[2] == keys[5], "the negative of one is the positive of the other"
    assert len(set(keys[1:4] + keys[7:])) == 4


def test_ids_tell_documents_apart(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write_lines(
        tmp_path,
        {
            "query": "a",
            "positive": "one",
            "positive_id": "x",
            "negatives": ["two", "three"],
            "negative_ids": ["y", "x"],
        },
        {"query": "b", "positive": "four", "positive_id": "y", "negatives": ["one"]},
    )
    keys = read_examples(source, tokenizer, Reading("contrastive", 64)).key_N.tolist()
    assert keys[1] == keys[3]
    assert keys[2] == keys[5]
    assert keys[6] not in keys[:6], "without an id it is known by its text"


def test_prompts_stand_before_texts_and_may_be_left_out_of_the_pool(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write_lines(tmp_path, {"query": "a fox?", "positive": "a fox?"})
    reading = Reading("contrastive", 64, query_prompt="query: ", prompt="text: ", pool_prompt=False)
    examples = read_examples(source, tokenizer, reading)
    assert texts_of(examples, tokenizer, 0) == ["query: a fox?", "text: a fox?"]
    assert examples.skipped_U.tolist() == [len(tokenizer.encode(p).ids) - 1 for p in ("query: ", "text: ")]
    plain = read_examples(source, tokenizer, Reading("contrastive", 64, query_prompt="query: "))
    assert plain.skipped_U.tolist() == [0, 0]


def test_long_texts_are_cut_and_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write_lines(tmp_path, {"query": "fox", "positive": "the quick brown fox jumps over the lazy dog " * 9})
    examples = read_examples(source, tokenizer, Reading("contrastive", 16))
    assert examples.truncated == 1
    text = examples.text(1)
    assert (len(text), text[0], text[-1]) == (16, 2, 3)


def test_vectors_of_any_list_type(tmp_path: Path, tokenizer: Tokenizer) -> None:
    vectors = np.arange(12, dtype=np.float16).reshape(3, 4)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 4)
    pq.write_table(pa.table({"text": ["a", "b", "a"], "vector": column}), tmp_path / "a.parquet")
    examples = read_examples(str(tmp_path), tokenizer, Reading("distillation", 64))
    assert examples.targets.dtype == np.float32
    assert np.array_equal(examples.targets, vectors)
    source = write_lines(tmp_path, *({"text": "ab"[i], "vector": vectors[i].tolist()} for i in range(2)))
    assert np.array_equal(read_examples(source, tokenizer, Reading("distillation", 64)).targets, vectors[:2])


def test_labels_become_numbers_with_names(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write_lines(tmp_path, *({"text": t, "label": label} for t, label in zip("abc", "yxy", strict=True)))
    examples = read_examples(source, tokenizer, Reading("classification", 64))
    assert (examples.targets.tolist(), examples.names) == ([1, 0, 1], ("x", "y"))
    settled = read_examples(source, tokenizer, Reading("classification", 64, names=("y", "z", "x")))
    assert settled.targets.tolist() == [0, 2, 0]
    source = write_lines(tmp_path, *({"text": "a", "label": label} for label in (10, 2, 10)))
    examples = read_examples(source, tokenizer, Reading("classification", 64))
    assert (examples.targets.tolist(), examples.names) == ([1, 0, 1], ("2", "10"))
    examples = read_examples(source, tokenizer, Reading("regression", 64))
    assert (examples.targets.tolist(), examples.names) == ([10, 2, 10], ())


def test_a_tag_belongs_to_the_first_token_of_its_word(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write_lines(tmp_path, {"tokens": ["Attention", "xyzzy", "dog"], "tags": ["N", "O", "N"]})
    examples = read_examples(source, tokenizer, Reading("tagging", 64))
    assert examples.names == ("N", "O")
    tokens = [tokenizer.id_to_token(int(token)) for token in examples.text(0)]
    tagged = [(token, tag) for token, tag in zip(tokens, examples.tags_X.tolist(), strict=True) if tag != IGNORED]
    assert [tag for _, tag in tagged] == [0, 1, 0]
    first, second, third = (token for token, _ in tagged)
    assert "Attention".startswith(first)
    assert "xyzzy".startswith(second.removeprefix("\u0120"))
    assert "dog".startswith(third.removeprefix("\u0120"))
    assert len(tokens) > 5, "xyzzy has several tokens, one of them with a tag"


def test_the_fingerprint_sees_everything(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    reading = Reading("classification", 64)
    first = read_examples(write_lines(tmp_path, *rows), tokenizer, reading).fingerprint()
    assert first == read_examples(write_lines(tmp_path, *rows), tokenizer, reading).fingerprint()
    rows[0]["label"] = 1
    rows[1]["label"] = 0
    assert first != read_examples(write_lines(tmp_path, *rows), tokenizer, reading).fingerprint()


PAIR = {"query": "a", "positive": "b"}


@pytest.mark.parametrize(
    "task, rows, message",
    [
        ("contrastive", [{"query": "a", "text": "b"}], "has no column 'positive', which contrastive needs; it has"),
        ("contrastive", [PAIR, {"query": "a", "positive": " "}], "row 2: the positive is empty"),
        ("contrastive", [PAIR, {"query": None, "positive": "b"}], "row 2: the query is empty"),
        ("contrastive", [PAIR | {"negatives": ["c", ""]}], "row 1: a negative is empty"),
        ("contrastive", [PAIR | {"negatives": "c"}], "column 'negatives' is .*string, expected list"),
        (
            "contrastive",
            [PAIR | {"positive_id": "x", "negatives": ["c", "d"], "negative_ids": ["y"]}],
            "row 1: 2 negatives have 1 negative_ids",
        ),
        ("contrastive", [], "holds no row to learn from"),
        (
            "distillation",
            [{"text": "a", "vector": [1, 2]}, {"text": "b", "vector": [1]}],
            "row 2: the vector has 1 dim",
        ),
        ("distillation", [{"text": "a", "vector": "no"}], "column 'vector' is string, expected list"),
        ("classification", [{"text": "a", "label": "x"}, {"text": "b", "label": "x"}], "all labels are 'x'"),
        ("classification", [{"text": "a", "label": 0.5}], "the label 0.5 is neither a name nor a whole number"),
        ("classification", [{"text": "a", "label": "x"}, {"text": "b", "label": None}], "row 2: the label is missing"),
        ("regression", [{"text": "a", "label": "good"}], "column 'label' is string, expected double"),
        ("tagging", [{"tokens": ["a", "b"], "tags": ["X"]}], "row 1: 2 tokens have 1 tags"),
        ("tagging", [{"tokens": ["a", ""], "tags": ["X", "Y"]}], "row 1: there are no tokens, or one of them is empty"),
        ("masked", [{"body": "a"}], "has no column 'text', which masked needs; it has body"),
    ],
)
def test_what_cannot_be_learned_from(
    task: str, rows: list[dict[str, Any]], message: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    source = write_lines(tmp_path, *rows)
    with pytest.raises(InputError, match=message):
        read_examples(source, tokenizer, Reading(task, 64))


def test_labels_that_do_not_fit(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write_lines(tmp_path, {"text": "a", "label": "x"}, {"text": "b", "label": "w"})
    with pytest.raises(InputError, match=r"row 2: the label 'w' is none of the model's \(x, y\)"):
        read_examples(source, tokenizer, Reading("classification", 64, names=("x", "y")))


def test_a_vector_that_is_no_number(tmp_path: Path, tokenizer: Tokenizer) -> None:
    column = pa.array([[1.0, 2.0], [1.0, float("nan")]], pa.list_(pa.float32()))
    pq.write_table(pa.table({"text": ["a", "b"], "vector": column}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="row 2: the vector holds something that is no number"):
        read_examples(str(tmp_path), tokenizer, Reading("distillation", 64))
