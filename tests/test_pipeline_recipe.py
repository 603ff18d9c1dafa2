"""The recipe: its fingerprint is stable, sees what matters, and is blind to what does not."""

from dataclasses import fields, replace

import pytest

from model.errors import InputError
from pipeline.recipe import Recipe

RECIPE = Recipe(
    weights="a" * 32,
    tokenizer="b" * 32,
    pooling="mean",
    normalize=True,
    prompt="",
    granularity="both",
    max_tokens=8192,
    long_documents="window",
    overlap_tokens=1024,
    chunk_tokens=256,
    context="late",
    dtype="float32",
    vector_type="float32",
    dim=384,
)


def test_fingerprint_is_frozen():
    # A change of this value makes every table in the world start over: it must be meant.
    assert RECIPE.fingerprint() == "63cfbaf2839009413a7d81336e4b0ad6"
    assert replace(RECIPE).fingerprint() == RECIPE.fingerprint()


@pytest.mark.parametrize("name", [f.name for f in fields(Recipe)])
def test_every_field_counts(name):
    value = getattr(RECIPE, name)
    other = (
        ("bits",)
        if value == ()
        else not value
        if isinstance(value, bool)
        else value + 1
        if isinstance(value, int)
        else value + "x"
    )
    changed = replace(RECIPE, **{name: other})
    assert changed.fingerprint() != RECIPE.fingerprint()
    assert [line.split(":")[0] for line in RECIPE.difference(changed)] == [name]


def test_settings_that_cannot_matter_do_not_count():
    whole = replace(RECIPE, granularity="document")
    assert whole.fingerprint() == replace(whole, chunk_tokens=99, context="none").fingerprint()
    assert whole.difference(replace(whole, chunk_tokens=99)) == []
    cut = replace(RECIPE, long_documents="truncate")
    assert cut.fingerprint() == replace(cut, overlap_tokens=None).fingerprint()


def test_json_round_trip():
    assert Recipe.from_json(RECIPE.to_json()) == RECIPE
    assert Recipe.from_json(RECIPE.settled().to_json().encode()).fingerprint() == RECIPE.fingerprint()


@pytest.mark.parametrize("text", ["not json", "[]", "{}", RECIPE.to_json().replace('"dim"', '"width"')])
def test_json_of_another_version_is_refused(text):
    with pytest.raises(InputError, match="recipe of the table"):
        Recipe.from_json(text)


def test_difference_shortens_hashes():
    assert RECIPE.difference(replace(RECIPE, weights="c" * 32, dim=3)) == [
        "weights: aaaaaaaaaaaa -> cccccccccccc",
        "dim: 384 -> 3",
    ]


def test_tables_made_before_cheaper_forms_are_still_read():
    """The JSON of a recipe without them is what it was, and so is its fingerprint."""
    assert '"also"' not in RECIPE.to_json()
    assert Recipe.from_json(RECIPE.to_json()) == RECIPE
    more = replace(RECIPE, also=("int8", "bits"))
    assert Recipe.from_json(more.to_json()) == more
    assert RECIPE.difference(more) == ["also: none -> int8, bits"]
