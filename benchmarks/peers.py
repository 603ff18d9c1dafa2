"""The ways to embed that the benchmarks compare, each as its users run it, all with the same weights.

Run as a module, it prints the peak memory of one document: a high-water mark needs a process of its own.
"""

import argparse
import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from model.batch import pack
from model.config import EncoderConfig
from model.embedder import Embedder
from model.folder import read_folder
from model.quantized import quantize
from model.weights import load_encoder, save_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SPECIAL = ("[PAD]", "[CLS]", "[SEP]")
NAMES = (
    "nightloom int8",
    "nightloom bfloat16",
    "nightloom float32",
    "huggingface bfloat16",
    "huggingface float32",
    "sentence-transformers float32",
)


@dataclass(frozen=True)
class Workload:
    name: str
    texts: list[str]
    ids: list[list[int]]

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.ids]

    def part(self, every: int) -> "Workload":
        """Every n-th document by length, so that the distribution stays."""
        order = sorted(range(len(self.ids)), key=lambda i: len(self.ids[i]))[::every]
        return Workload(self.name, [self.texts[i] for i in order], [self.ids[i] for i in order])


@dataclass
class Peer:
    """One way to embed a list of documents, and what was measured of it."""

    name: str
    dtype: str
    embed: Callable[[Workload, int], np.ndarray]
    """Documents and a batch size to unit vectors, in the order of the documents."""
    repeats: int
    batch_size: int = 0
    """Documents per padded batch; 0 where nothing is padded."""
    seconds: list[float] = field(default_factory=list)
    vectors: np.ndarray | None = None

    def run(self, workload: Workload) -> np.ndarray:
        return self.embed(workload, self.batch_size)

    def computed(self, lengths: list[int]) -> int:
        """Tokens computed for documents of these lengths, padding included."""
        return padded(lengths, self.batch_size) if self.batch_size else sum(lengths)


def save_model(config: EncoderConfig, folder: Path) -> None:
    """Random weights by Hugging Face's own initialisation, with a tokenizer of one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import ModernBertConfig, ModernBertModel, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    ModernBertModel(ModernBertConfig(**config.to_hf())).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(SPECIAL)}
    vocabulary |= {f"w{i}": i for i in range(len(SPECIAL), config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=config.max_tokens,
    ).save_pretrained(folder)


def hugging_face(folder: Path, dtype: str) -> Any:
    from transformers import ModernBertModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return ModernBertModel.from_pretrained(folder, dtype=DTYPES[dtype], attn_implementation="sdpa").eval()


@torch.inference_mode()
def embed_hugging_face(model: Any, workload: Workload, batch_size: int) -> np.ndarray:
    """Sorted by length, padded to the longest of each batch, mean over real tokens, unit length."""
    order = sorted(range(len(workload.ids)), key=lambda i: -len(workload.ids[i]))
    vectors = np.empty((len(order), model.config.hidden_size), dtype=np.float32)
    for at in range(0, len(order), batch_size):
        rows = order[at : at + batch_size]
        longest = max(len(workload.ids[i]) for i in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for row, i in enumerate(rows):
            ids[row, : len(workload.ids[i])] = torch.tensor(workload.ids[i])
            mask[row, : len(workload.ids[i])] = 1
        hidden = model(input_ids=ids, attention_mask=None if mask.all() else mask).last_hidden_state.float()
        sums = (hidden * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        vectors[rows] = F.normalize(sums, dim=-1).numpy()
    return vectors


def padded(lengths: list[int], batch_size: int) -> int:
    """Tokens computed when documents are sorted by length and padded batch by batch."""
    order = sorted(lengths, reverse=True)
    return sum(order[at] * len(order[at : at + batch_size]) for at in range(0, len(order), batch_size))


def make_peers(folder: Path, names: list[str], repeats: int, slow_repeats: int) -> Iterator[Peer]:
    """The peers asked for, loaded. Those of Hugging Face get their batch size later, per workload."""
    if "nightloom int8" in names:
        plain = read_folder(folder)
        int8 = save_folder(
            quantize(load_encoder(plain)), folder.parent / "int8", tokenizer_from=folder, pooling=plain.pooling
        )
        yield _nightloom(int8, "int8", repeats)
    for dtype, rounds in (("bfloat16", repeats), ("float32", slow_repeats)):
        if f"nightloom {dtype}" in names:
            yield _nightloom(folder, dtype, rounds)
        if f"huggingface {dtype}" in names:
            yield _hugging_face(folder, dtype, rounds)
    if "sentence-transformers float32" in names:
        yield _sentence_transformers(folder, slow_repeats)


def _nightloom(folder: Path, dtype: str, repeats: int) -> Peer:
    embedder = Embedder(str(folder), device="cpu", dtype="auto" if dtype == "int8" else dtype)

    def embed(workload: Workload, batch_size: int) -> np.ndarray:
        return embedder.encode(workload.texts, normalize_embeddings=True)

    return Peer(f"nightloom {dtype}", dtype, embed, repeats)


def _hugging_face(folder: Path, dtype: str, repeats: int) -> Peer:
    model = hugging_face(folder, dtype)

    def embed(workload: Workload, batch_size: int) -> np.ndarray:
        return embed_hugging_face(model, workload, batch_size)

    return Peer(f"huggingface {dtype}", dtype, embed, repeats, batch_size=1)


def _sentence_transformers(folder: Path, repeats: int) -> Peer:
    from sentence_transformers import SentenceTransformer

    with quiet():
        model = SentenceTransformer(str(folder), device="cpu")

    def embed(workload: Workload, batch_size: int) -> np.ndarray:
        return model.encode(workload.texts, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False)

    return Peer("sentence-transformers float32", "float32", embed, repeats, batch_size=32)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """sentence-transformers says that it makes a mean pooling of a plain folder: that is what is wanted."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def status_kib(key: str) -> int:
    """A line of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def print_peak(name: str, dtype: str, folder: Path, num_tokens: int) -> None:
    """In the child: the high-water mark of one document, reset after loading (which reads weights twice over)."""
    ids = (np.arange(num_tokens) % 500 + len(SPECIAL)).tolist()
    if name == "nightloom":
        ours = Embedder(str(folder), device="cpu", dtype=dtype)

        def embed(tokens: list[int]) -> None:
            ours.embed_segments(pack([tokens]), np.array([0]), np.array([len(tokens)]))
    else:
        theirs = hugging_face(folder, dtype)

        def embed(tokens: list[int]) -> None:
            embed_hugging_face(theirs, Workload("one", [""], [tokens]), 1)

    embed(ids[:256])
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts anew
    baseline = status_kib("VmRSS")
    embed(ids)
    print(round((status_kib("VmHWM") - baseline) / 1024, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("peer", choices=["nightloom", "huggingface"])
    parser.add_argument("dtype", choices=list(DTYPES))
    parser.add_argument("tokens", type=int)
    arguments = parser.parse_args()
    print_peak(arguments.peer, arguments.dtype, arguments.folder, arguments.tokens)


if __name__ == "__main__":
    main()
