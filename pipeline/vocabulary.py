"""Tokenizers for training: what a given one says of its special tokens, and training one on a corpus.

A trained one is byte-level BPE, so that every text has tokens, with the special tokens and the template that
ModernBERT's has, in files that transformers reads.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import InputError
from model.folder import load_tokenizer
from pipeline.shards import hash_bytes, read_file, write_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ROLES = ("pad", "unk", "cls", "sep", "mask")
FOLDER = "tokenizer"
"""Where the tokenizer lies beside the shards that it made."""
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SMALLEST = 256 + len(ROLES)
"""Every byte has a token."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What training has to know of a tokenizer."""

    hash: str
    """blake2b-128 of tokenizer.json, in hex."""
    size: int
    """The largest id and one."""
    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    special_ids: tuple[int, ...]
    """These, and all others that the tokenizer calls special; ascending."""


def read_vocabulary(folder: str | os.PathLike[str]) -> Vocabulary:
    """Read a tokenizer's folder: tokenizer.json, and the names of its special tokens where there are other files.

    Raises:
        InputError: no tokenizer there, or one that lacks a special token.
    """
    tokenizer = load_tokenizer(folder)
    names = {role: f"[{role.upper()}]" for role in ROLES}
    for file in FILES[1:]:
        path = Path(folder) / file
        if path.is_file():
            try:
                named = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(f"{path} cannot be read as JSON: {error}") from None
            for role in ROLES:
                given = named.get(f"{role}_token")
                names[role] = (given.get("content") if isinstance(given, dict) else given) or names[role]
    entries = tokenizer.get_vocab(with_added_tokens=True)
    if absent := [names[role] for role in ROLES if names[role] not in entries]:
        raise InputError(
            f"the tokenizer in {folder} has no token {absent[0]}; training needs {', '.join(names.values())}"
        )
    ids = {role: entries[name] for role, name in names.items()}
    added = tokenizer.get_added_tokens_decoder()
    special = set(ids.values()) | {number for number, token in added.items() if token.special}
    return Vocabulary(
        hash=hash_bytes((Path(folder) / FILES[0]).read_bytes()),
        size=max(entries.values()) + 1,
        special_ids=tuple(sorted(special)),
        pad_id=ids["pad"],
        unk_id=ids["unk"],
        cls_id=ids["cls"],
        sep_id=ids["sep"],
        mask_id=ids["mask"],
    )


def copy_tokenizer(folder: str | os.PathLike[str], uri: str) -> None:
    """Keep a tokenizer beside its shards."""
    for file in FILES:
        if (Path(folder) / file).is_file():
            write_file(uri, f"{FOLDER}/{file}", (Path(folder) / file).read_bytes())


def corpus_tokenizer(uri: str) -> "Tokenizer":
    """The tokenizer beside the shards, for tokenizing a corpus: what spells a special token in a text is text."""
    from tokenizers import Tokenizer

    raw = read_file(uri, f"{FOLDER}/{FILES[0]}")
    assert raw is not None, "the tokenizer is copied before the corpus is tokenized"
    tokenizer = Tokenizer.from_str(raw.decode())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def train_tokenizer(texts: Iterable[str], size: int, folder: Path) -> None:
    """Train byte-level BPE and write its files. The same texts give the same tokenizer.

    Args:
        size: entries, special ones included; fewer where the texts do not hold so many pairs.
        folder: is made.

    Raises:
        InputError: a size that has no room for single bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    if size < SMALLEST:
        raise InputError(f"a tokenizer of {size} entries cannot be trained; every byte needs one: at least {SMALLEST}")
    names = {role: f"[{role.upper()}]" for role in ROLES}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(names.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bounds = [(names[role], tokenizer.token_to_id(names[role])) for role in ("cls", "sep")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=bounds
    )
    named = {f"{role}_token": name for role, name in names.items()}
    config = {**named, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config["model_input_names"] = ["input_ids", "attention_mask"]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / FILES[0]))
    for file, content in zip(FILES[1:], (config, named), strict=True):
        (folder / file).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
