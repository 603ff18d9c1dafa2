"""The recipe: everything that decides a vector, and its fingerprint.

Two vectors may stand in one table only if their recipes have the same fingerprint. Settings that cannot matter (the
chunk length when there are no chunks) are dropped before hashing, so that changing them does not start a table over.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from model.errors import InputError

CODE_VERSION = 1
"""Raised when a change of this code changes vectors by more than rounding; every table then has to be made anew."""
CODE_VERSIONS = {"int8": 2}
"""The same for how vectors of one type are stored: 2 scales each int8 vector by its largest component."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides a vector."""

    weights: str
    """Hash of the weight files and of the model's configuration."""
    tokenizer: str
    """Hash of `tokenizer.json`."""
    pooling: str
    """mean, cls, last or weighted_mean."""
    normalize: bool
    """Whether vectors have unit length."""
    prompt: str
    """Text put before every document; empty for none."""
    granularity: str
    """document, chunk or both: which vectors a document gets."""
    max_tokens: int
    """Longest sequence the encoder sees, special tokens included."""
    long_documents: str
    """window or truncate: what happens to a document that is longer than that."""
    overlap_tokens: int | None
    """Tokens that neighbouring windows share; None where documents are truncated."""
    chunk_tokens: int | None
    """Length of a chunk; None where there are no chunks."""
    context: str | None
    """late or none: whether a chunk's vector knows the rest of its document; None where there are no chunks."""
    dtype: str
    """float32, bfloat16 or float16: the precision of the arithmetic."""
    vector_type: str
    """float32, float16, int8 or bits: how vectors are stored."""
    dim: int
    """Length of a vector."""
    code: int = CODE_VERSION
    also: tuple[str, ...] = ()
    """Cheaper forms of the vectors that are kept beside them; left out of the JSON where there are none, as it was
    before there could be."""

    def settled(self) -> "Recipe":
        """The same recipe without the settings that cannot matter."""
        changes: dict[str, Any] = {}
        if self.granularity == "document":
            changes |= {"chunk_tokens": None, "context": None}
        if self.long_documents == "truncate":
            changes["overlap_tokens"] = None
        return replace(self, **changes)

    def fingerprint(self) -> str:
        """32 hex digits: blake2b-128 of the settled recipe as JSON with sorted keys."""
        return hashlib.blake2b(self.settled().to_json().encode(), digest_size=16).hexdigest()

    def difference(self, other: "Recipe") -> list[str]:
        """What differs, as "field: this -> other"; empty when both have the same fingerprint."""
        mine, theirs = asdict(self.settled()), asdict(other.settled())
        return [f"{name}: {shown(mine[name])} -> {shown(theirs[name])}" for name in mine if mine[name] != theirs[name]]

    def to_json(self) -> str:
        values = asdict(self)
        if not self.also:
            del values["also"]
        return json.dumps(values, sort_keys=True, ensure_ascii=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Recipe":
        """Read what `to_json` wrote.

        Raises:
            InputError: not JSON, or fields that this version does not know or misses.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise InputError(f"the recipe of the table is not JSON ({error})") from None
        known = {f.name for f in fields(cls)}
        if not isinstance(values, dict) or set(values) | {"also"} != known:
            odd = sorted(set(values) ^ known) if isinstance(values, dict) else [type(values).__name__]
            raise InputError(f"the recipe of the table was written by another version of nightloom (field {odd[0]})")
        return cls(**values | {"also": tuple(values.get("also", ()))})


def shown(value: object) -> str:
    """A value as an error message shows it: long hashes shortened, text quoted."""
    if isinstance(value, str):
        return value[:12] if len(value) >= 32 and all(c in "0123456789abcdef" for c in value) else repr(value)
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
