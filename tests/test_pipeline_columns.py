"""What makes a document: templates, joined columns, hashes, and the types of carried columns."""

import hashlib

import pyarrow as pa
import pytest

from model.errors import InputError
from pipeline.columns import DocumentColumns, as_text, hash_texts, join_texts, plain_type, scrub, template_parts


def test_templates() -> None:
    assert template_parts("{a}: {b}.") == [("", "a"), (": ", "b"), (".", None)]
    assert DocumentColumns(template="{title} {text} {title}").text_columns() == ("title", "text")
    for template in ("{a", "{}", "{a!r}", "{a:3}", "none"):
        with pytest.raises(InputError):
            DocumentColumns(template=template).text_columns()


def test_columns_are_joined_by_a_blank_line_where_they_are_not_empty() -> None:
    parts = [pa.array(values, pa.large_string()) for values in (["a", "", None, "b"], ["x", "y", None, None])]
    assert join_texts(parts, DocumentColumns(text=("p", "q"))).to_pylist() == ["a\n\nx", "y", "", "b"]
    template = DocumentColumns(template="<{p}|{q}>")
    assert join_texts(parts, template).to_pylist() == ["<a|x>", "<|y>", "<|>", "<b|>"]


def test_anything_becomes_text() -> None:
    assert as_text(pa.array([1, None])).to_pylist() == ["1", None]
    assert as_text(pa.array([b"ok", b"\xff"])).to_pylist() == ["ok", "\ufffd"]
    assert as_text(pa.array(["a", "b", "a"]).dictionary_encode()).to_pylist() == ["a", "b", "a"]
    assert scrub("lone \ud800") == "lone \ufffd"


def test_hashes_of_a_slice_are_those_of_its_texts() -> None:
    texts = pa.array(["a", "", "\u00e9", "dd"], pa.large_string())
    expected = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in ("", "\u00e9")]
    assert hash_texts(texts.slice(1, 2)).to_pylist() == expected


def test_types_that_a_table_gives_to_carried_columns() -> None:
    assert plain_type(pa.dictionary(pa.int32(), pa.string())) == pa.string()
    assert plain_type(pa.null()) == pa.string()
    assert plain_type(pa.list_(pa.int8())) == pa.list_(pa.int8())
