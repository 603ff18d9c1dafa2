"""Configuration: defaults, TOML, options and --set in that order; a wrong key or value is one helpful line."""

import pytest
from pydantic import ValidationError

from jobs.configuration import ComputeSettings, EmbedConfiguration, Settings, describe, keys, load
from model.errors import InputError

GIVEN = {"source": "corpus", "table": "table", "model": "models/m"}


def embed(*sets: str, file=None, **given) -> EmbedConfiguration:
    return load(EmbedConfiguration, file=file, sets=sets, given=GIVEN | given)


@pytest.fixture
def toml(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "run.toml").write_text(text)
        return str(tmp_path / "run.toml")

    return write


def test_later_wins(toml):
    file = toml(
        'delete_missing = true\n[chunking]\ngranularity = "both"\nchunk_tokens = 100\n[columns]\ncarry = ["a"]\n'
    )
    made = embed("chunking.chunk_tokens=64", "vectors.prompt=query: ", file=file, delete_missing=None)
    assert (made.chunking.granularity, made.chunking.chunk_tokens, made.delete_missing) == ("both", 64, True)
    assert made.columns.carry == ("a",)
    assert made.vectors.prompt == "query:"
    assert embed(file=file, delete_missing=False).delete_missing is False
    assert embed().chunking.chunk_tokens == 256


@pytest.mark.parametrize(
    "item, value",
    [
        ("vectors.normalize=true", True),
        ("vectors.normalize=none", None),
        ("chunking.context=none", "none"),
        ("compute.commit_every_s=5", 5.0),
        ("columns.text=['a', 'b']", ("a", "b")),
        ("columns.text=body", ("body",)),
        ("columns.template={title} {body}", "{title} {body}"),
        ("columns.id = url", "url"),
    ],
)
def test_values_are_read_as_toml_or_text(item, value):
    group, name = item.partition("=")[0].strip().split(".")
    assert getattr(getattr(embed(item), group), name) == value


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("chunk_tokens", "chunking.chunk_tokens"),
        ("vectors.chunk_tokens", "chunking.chunk_tokens"),
        ("chunking.chunk_token", "chunking.chunk_tokens"),
        ("delete_mising", "delete_missing"),
        ("vector.dtype", "vectors.dtype"),
    ],
)
def test_unknown_key_names_the_nearest(toml, key, nearest):
    with pytest.raises(InputError, match=f"there is no key '{key}'; the nearest is '{nearest}'"):
        embed(f"{key}=1")
    with pytest.raises(InputError, match=rf"run\.toml: there is no key '{key.split('.')[0]}"):
        embed(file=toml(f"{key} = 1"))


@pytest.mark.parametrize(
    "item, message",
    [
        ("chunking.chunk_tokens=many", "chunking.chunk_tokens is 'many': input should be a valid integer"),
        ("chunking.chunk_tokens=1.5", "chunking.chunk_tokens is 1.5: input should be a valid integer"),
        ("chunking.chunk_tokens=0", "chunking.chunk_tokens is 0: input should be greater than 0"),
        ("chunking.granularity=page", "input should be 'document', 'chunk' or 'both'"),
        ("delete_missing=1", "delete_missing is 1: input should be a valid boolean"),
        ("columns.text=[]", "columns.text"),
        ("delete_missing", "has no value; write --set key=value"),
    ],
)
def test_wrong_values_are_named(item, message):
    with pytest.raises(InputError, match=r"^[^\n]*$") as caught:
        embed(item)
    assert message in str(caught.value)


def test_unreadable_files(toml, tmp_path):
    with pytest.raises(InputError, match="there is no configuration file"):
        embed(file=str(tmp_path / "no.toml"))
    for text in ("a = ", "chunking = 3", "[chunking.deeper]\na = 1"):
        with pytest.raises(InputError, match=r"run\.toml"):
            embed(file=toml(text))


def test_is_frozen_and_round_trips_as_json():
    made = embed("columns.carry=['a']")
    with pytest.raises(ValidationError):
        made.table = "other"
    assert EmbedConfiguration.model_validate_json(made.model_dump_json()) == made


def test_every_setting_says_what_it_is():
    assert [key for key, sentence in keys(EmbedConfiguration) if len(sentence) < 20 or not sentence.endswith(".")] == []
    lines = list(describe(EmbedConfiguration))
    assert "chunking.granularity = document  (document, chunk, both)" in lines
    assert all(len(line) < 120 for line in lines)


class Leg(Settings):
    length: int = 1
    """How long this part of the way is."""


class Way(Settings):
    legs: dict[str, Leg]
    """The parts of the way, in the order of the file."""


def test_groups_of_any_name_keep_their_order(toml):
    file = toml("[legs.second]\nlength = 2\n[legs.first]\n")
    way = load(Way, file=file, sets=["legs.first.length=5", "legs.third.length=7"], given={})
    assert [(name, leg.length) for name, leg in way.legs.items()] == [("second", 2), ("first", 5), ("third", 7)]
    assert list(describe(Way)) == ["legs.NAME.length = 1", "    How long this part of the way is."]
    for text, key in (
        ("[legs.a]\nlenght = 2", "legs.a.lenght"),
        ("legs = 3", "legs"),
        ("[leg.a]\nlength = 1", "leg"),
    ):
        with pytest.raises(InputError, match=rf"no key '{key}.*nearest is 'legs\.\*\.length'"):
            load(Way, file=toml(text), sets=[], given={})


def test_actors_are_a_number_or_a_range():
    def actors(value: object) -> object:
        return ComputeSettings.model_validate({"actors": value}).actors

    assert [actors(value) for value in (4, "4", "2:16", [2, 16], None)] == [(4, 4), (4, 4), (2, 16), (2, 16), None]
    for wrong in (0, "0:4", "4:2", "a", "1:2:3", "2:"):
        with pytest.raises(ValueError, match="the fewest and the most as in 2:16"):
            actors(wrong)
