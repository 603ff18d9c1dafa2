"""Typed configuration: models with a sentence for every field <- a TOML file <- `--set a.b=c`.

A key that no model has is an error that names the nearest known one, and a value of the wrong kind is never converted
silently: a job that runs all night must not run on a setting that nobody meant.
"""

import difflib
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from model.errors import InputError


def as_names(value: Any) -> Any:
    """One name stands for a list of one."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def none_as_word(value: Any) -> Any:
    """For a setting of which `none` is a choice: elsewhere `--set key=none` takes a value away."""
    return "none" if value is None else value


Names = Annotated[tuple[str, ...], BeforeValidator(as_names)]


class Settings(BaseModel):
    """A group of settings: frozen, strict, closed."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)


class ColumnSettings(Settings):
    """Which columns of Parquet and JSON Lines make a document. Plain text and Markdown files are one document each."""

    id: str | None = None
    """Column with the document's id; by default `id` where there is one, else the file's path and the row number."""
    text: Names = Field(default=("text",), min_length=1)
    """Columns with the text, joined by a blank line."""
    template: str | None = None
    """How to put several columns together, as in "{title}\\n\\n{body}"; replaces `text`."""
    carry: Names = ()
    """Source columns that are copied into the table."""


class ChunkingSettings(Settings):
    """Which vectors a document gets, and what happens to a long one."""

    granularity: Literal["document", "chunk", "both"] = "document"
    """One vector for a document, one for each of its chunks, or both."""
    chunk_tokens: int = Field(default=256, gt=0)
    """About how long a chunk is, in tokens; it ends with a sentence where it can."""
    context: Annotated[Literal["late", "none"], BeforeValidator(none_as_word)] = "late"
    """late: a chunk is pooled after the whole window went through the encoder; none: it is embedded alone."""
    overlap_tokens: int | None = Field(default=None, ge=0)
    """Tokens that neighbouring windows of a long document share; by default an eighth of `max_tokens`."""
    max_tokens: int | None = Field(default=None, gt=2)
    """Longest sequence, special tokens included; by default the model's."""
    long_documents: Literal["window", "truncate"] = "window"
    """A document longer than that is cut into overlapping windows, or truncated (and what is lost is counted)."""


class VectorSettings(Settings):
    """What a vector is."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the arithmetic; auto: what the table was begun with, or what the device multiplies fastest."""
    type: Literal["float32", "float16", "int8", "bits"] = "float32"
    """How vectors are stored; int8 has 127 for a vector's largest component, bits the signs of its components."""
    also: Annotated[tuple[Literal["int8", "bits"], ...], BeforeValidator(as_names)] = ()
    """Cheaper forms to keep in columns of their own, for a search to choose by."""
    dim: int | None = Field(default=None, gt=0)
    """Keep the first dimensions only (Matryoshka); by default all that the model gives."""
    normalize: bool | None = None
    """Whether vectors get unit length; by default what the model folder says."""
    prompt: str | None = None
    """Text put before every document; wins over `prompt_name`."""
    prompt_name: str | None = None
    """Name of a prompt that the model folder defines; by default its default, or none."""


def as_range(value: Any) -> Any:
    """4 and "4" are (4, 4), "2:16" is (2, 16); a list of two comes out of a record."""
    if value is None:
        return None
    parts = value if isinstance(value, list | tuple) else str(value).split(":")
    try:
        numbers = [int(str(part)) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not 1 <= numbers[0] <= numbers[-1]:
        raise ValueError("write a number of actors, or the fewest and the most as in 2:16")
    return numbers[0], numbers[-1]


class ComputeSettings(Settings):
    """Where the work is done, and in what portions."""

    address: str | None = None
    """Ray cluster to use ("auto" for the one this machine belongs to); by default a local one is started."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the encoder runs."""
    actors: Annotated[tuple[int, int] | None, BeforeValidator(as_range)] = None
    """Processes that hold the encoder: a number, or "2:16" for a pool between the two; by default what fits."""
    tokens_per_batch: int | None = Field(default=None, gt=0)
    """Token budget of one forward pass (a longer sequence goes alone); by default what suits the device."""
    block_chars: int | None = Field(default=None, gt=0)
    """Characters of text in one unit of work (more packs better, less commits sooner); by default by device."""
    single_chars: int = Field(default=4_000_000, ge=0)
    """Bytes of text up to which one process does it all, without Ray, where no cluster is named; 0: always Ray."""
    commit_every_s: float = Field(default=120.0, ge=0)
    """Seconds between commits: what a crash can cost at most."""


class GateSettings(Settings):
    """What is looked at before readers see a new version."""

    off: Annotated[tuple[Literal["canaries", "sample", "vectors", "collapse"], ...], BeforeValidator(as_names)] = ()
    """Gates that refuse nothing: canaries, sample (vectors embedded again), vectors (finite, length), collapse."""


class EmbedConfiguration(Settings):
    """Everything that `nightloom embed` and `nightloom plan` can be told."""

    source: str
    """File, folder, glob or s3:// prefix of Parquet, JSON Lines, text or Markdown."""
    table: str
    """Folder or s3:// prefix of the table."""
    model: str
    """Model folder or hub id; by default the model that comes with nightloom."""
    delete_missing: bool = False
    """Remove documents from the table that the source does not hold any more."""
    retry_dead: bool = False
    """Try documents again that failed before with the same text."""
    max_dead: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Dead documents that a published version may have: a count, or below 1 a share of the corpus (but at least 10)."""
    keep_versions: int = Field(default=7, gt=0)
    """Versions that stay after they were published, the newest included: so far `nightloom rollback` can go back."""
    migrate: bool = False
    """Take a table over to another recipe: fill it beside the old vectors, which readers see until all is embedded."""
    budget_tokens: int | None = Field(default=None, gt=0)
    """Stop when the encoder has seen so many tokens: changed documents go first, then new ones."""
    deadline: str | None = None
    """Stop at this time of day, as in "06:00" (local time; the next one after the start)."""
    columns: ColumnSettings = ColumnSettings()
    chunking: ChunkingSettings = ChunkingSettings()
    vectors: VectorSettings = VectorSettings()
    compute: ComputeSettings = ComputeSettings()
    gates: GateSettings = GateSettings()


class PrepareCompute(Settings):
    """Where the work is done."""

    address: str | None = None
    """Ray cluster to use ("auto" for the one this machine belongs to); by default a local one is started."""


class PrepareConfiguration(Settings):
    """Everything that `nightloom prepare` can be told."""

    source: str
    """File, folder, glob or s3:// prefix of Parquet, JSON Lines, text or Markdown."""
    tokens: str
    """Folder or s3:// prefix of the token shards."""
    tokenizer: str | None = None
    """Folder with tokenizer.json (an s3:// model folder too), where one is given."""
    train_tokenizer: int | None = Field(default=None, gt=0)
    """Entries of a tokenizer that is trained on the corpus, where none is given."""
    heldout: float = Field(default=0.01, ge=0, lt=1)
    """Share of the documents that is kept for evaluation, by the hash of their ids."""
    shard_bytes: int = Field(default=16_000_000, gt=0)
    """About how much text goes into a shard; a token takes two to four bytes of it."""
    columns: ColumnSettings = ColumnSettings()
    compute: PrepareCompute = PrepareCompute()


Model = TypeVar("Model", bound=BaseModel)


def load(
    kind: type[Model],
    *,
    file: str | None,
    sets: Sequence[str],
    given: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> Model:
    """Build a configuration; later wins: defaults, then the TOML `file`, then `given` options, then `sets`.

    Args:
        defaults: values for keys that nothing else sets, by name.
        given: values of the command line's own options by dotted key; None means not given.
        sets: `key=value` each; the value is read as TOML, and as plain text where that fails.

    Raises:
        InputError: an unreadable file, an unknown key (naming the nearest known one), a value of the wrong kind.
    """
    tree = read_toml(file) if file else {}
    known = dict(keys(kind))
    for key in flatten(tree, known):
        check_key(key, known, where=str(file))
    for key, value in given.items():
        if value is not None:
            place(tree, key, value)
    for item in sets:
        key, equals, text = item.partition("=")
        if not equals:
            raise InputError(f"--set {item!r} has no value; write --set key=value")
        check_key(key.strip(), known, where="--set")
        place(tree, key.strip(), parse_value(text.strip()))
    try:
        return kind.model_validate({**(defaults or {}), **tree})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(f"configuration: {key} is {first['input']!r}: {lower_first(first['msg'])}") from None


def group_of(annotation: Any) -> tuple[type[BaseModel] | None, str]:
    """The model behind a group of settings, or None, and how its keys go on: `dict[str, Group]` has groups of any name.

    group_of(ColumnSettings) is (ColumnSettings, "."), group_of(dict[str, ColumnSettings]) is (ColumnSettings, ".*.").
    """
    many = get_origin(annotation) is dict
    inner = get_args(annotation)[1] if many else annotation
    is_group = isinstance(inner, type) and issubclass(inner, BaseModel)
    return (inner if is_group else None), (".*." if many else ".")


def keys(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, description) of every setting of a model; a part that may have any name is `*`."""
    for name, field in kind.model_fields.items():
        group, joint = group_of(field.annotation)
        if group is not None:
            yield from keys(group, f"{prefix}{name}{joint}")
        else:
            yield f"{prefix}{name}", field.description or ""


def describe(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Lines for `--help`: every key with its default, its choices and its sentence."""
    for name, field in kind.model_fields.items():
        group, joint = group_of(field.annotation)
        if group is not None:
            yield from describe(group, f"{prefix}{name}{joint.replace('*', 'NAME')}")
        elif not field.is_required():
            default = "none" if field.default is None else field.default
            choices = [
                str(c) for part in members(field.annotation) if get_origin(part) is Literal for c in get_args(part)
            ]
            yield f"{prefix}{name} = {default}" + (f"  ({', '.join(choices)})" if choices else "")
            yield f"    {field.description}"
        elif prefix:  # what a command needs is an argument of its own; what a group needs is not
            yield f"{prefix}{name}"
            yield f"    {field.description}"


def members(annotation: Any) -> list[Any]:
    """The alternatives of a union, or the annotation itself."""
    return list(get_args(annotation)) if get_origin(annotation) in (Union, types.UnionType) else [annotation]


def check_key(key: str, known: Mapping[str, str], *, where: str) -> None:
    """Raise an InputError that names the nearest of the `known` keys, unless `key` is one of them."""
    if any(fits(key, name) for name in known):
        return

    def likeness(name: str) -> tuple[float, float]:
        # The right name in a wrong group, or in none, is near; among equals the one in the right group is nearer.
        last = difflib.SequenceMatcher(None, key.rpartition(".")[2], name.rpartition(".")[2]).ratio()
        whole = difflib.SequenceMatcher(None, key, name).ratio()
        return max(last, whole), whole

    raise InputError(f"{where}: there is no key {key!r}; the nearest is {max(known, key=likeness)!r}")


def fits(key: str, name: str) -> bool:
    """Whether a dotted key is the known `name`, in which `*` stands for one part of any name."""
    parts, wanted = key.split("."), name.split(".")
    return len(parts) == len(wanted) and all(w in ("*", p) for p, w in zip(parts, wanted, strict=True))


def flatten(tree: Mapping[str, Any], known: Mapping[str, str], prefix: str = "") -> Iterator[str]:
    """The dotted keys of a tree; a group that no known key is in counts as a key itself."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and not any(fits(key, other) for other in known):
            depth = key.count(".") + 1
            if not any(fits(key, ".".join(other.split(".")[:depth])) for other in known):
                yield key
            yield from flatten(value, known, f"{key}.")
        else:
            yield key


def place(tree: dict[str, Any], key: str, value: Any) -> None:
    *groups, last = key.split(".")
    for group in groups:
        tree = tree.setdefault(group, {})
    tree[last] = value


def parse_value(text: str) -> Any:
    """Numbers, booleans, lists and quoted text as TOML reads them; `none` for no value; anything else is plain text."""
    if text == "none":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def read_toml(file: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"there is no configuration file {file}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"the configuration file {file} cannot be read: {error}") from None


def lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
