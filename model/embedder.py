"""The front door of the library: texts in, vectors out, with the names that sentence-transformers' users know.

`encode` packs texts by token budget, longest first, so that nothing is padded; pipelines use `embed_segments` on
batches of their own. Shape suffixes: T tokens, S sequences, R ranges, D width.
"""

import ctypes
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.batch import PackedBatch, pack
from model.config import EncoderConfig
from model.dense import load_dense
from model.errors import InputError
from model.folder import check_tokenizer, load_tokenizer, read_folder, tokenizer_hash, weights_hash
from model.memory import fitting_tokens
from model.pooling import encode_segments
from model.pooling import normalize as normalize_rows
from model.prepacked import prepack
from model.protocols import Protocols, check_left, prompt_names, texts_of
from model.weights import load_encoder

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENS_PER_BATCH = {"cpu": 2_048, "cuda": 65_536}
"""Token budget of one forward pass, at most. On a CPU small batches stay in the cache: at base size in bfloat16 on two
cores, short documents took 14 % less time than at 8,192 tokens."""

LEAST_TOKENS = 2_048
"""However little memory a GPU says it has: a batch that does not fit is halved, by `encode` and by the pipeline."""


def choose_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype to compute in, and why in a few words.

    Raises:
        InputError: an unknown name.
    """
    if name in DTYPES:
        return DTYPES[name], "asked for"
    if name != "auto":
        raise InputError(f"dtype {name!r} is not known; use auto, {', '.join(DTYPES)}")
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, "the GPU multiplies bfloat16 natively"
        return torch.float16, "the GPU is older than compute capability 8.0"
    if device.type == "cpu":
        if torch.cpu._is_amx_tile_supported():
            return torch.bfloat16, "the CPU has AMX"
        if torch.cpu._is_avx512_bf16_supported():
            return torch.bfloat16, "the CPU has AVX-512 bfloat16 products"
    return torch.float32, f"no native bfloat16 on this {device.type}"


class Embedder(Protocols):
    """A sentence embedder read from a Hugging Face or sentence-transformers folder.

    Args:
        folder_or_id: a local folder, or a hub id.
        device: "auto" (CUDA where there is one), or a torch device.
        dtype: "auto", "float32", "bfloat16" or "float16". Norms and the residual stream stay in float32.

    Raises:
        InputError: no model there, one of another architecture, a tokenizer that does not fit the weights, no such
            device.
    """

    def __init__(self, folder_or_id: str | os.PathLike[str], *, device: str = "auto", dtype: str = "auto") -> None:
        self.folder = read_folder(folder_or_id)
        self.config = self.folder.config
        self.device = choose_device(device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.dtype, self.dtype_reason = choose_dtype(dtype, self.device)
        self.tokenizer = load_tokenizer(self.folder.path)
        check_tokenizer(self.tokenizer, self.config, self.folder.path)
        encoder = load_encoder(self.folder, device=self.device, dtype=self.dtype)
        encoder.to(self.device).eval().requires_grad_(False)
        for module in encoder.modules():
            # Products in the compute dtype; embeddings and norms in float32, whatever the folder was saved in.
            is_product = isinstance(module, torch.nn.Linear)
            if is_product or isinstance(module, torch.nn.LayerNorm | torch.nn.Embedding):
                module.to(self.dtype if is_product else torch.float32)
        self.tokens_per_batch = default_tokens(self.config, self.device, self.dtype)
        prepack(encoder, self.tokens_per_batch)
        self.encoder, self.dense = encoder, torch.nn.Sequential(*load_dense(self.folder.dense))
        self.attention_name = encoder.attention
        self.pooling, self.normalize = self.folder.pooling, self.folder.normalize
        self.prompts, self.default_prompt_name = self.folder.prompts, self.folder.default_prompt_name
        self.max_tokens, self.dim = self.folder.max_tokens, self.folder.dim
        self.similarity_fn_name = self.folder.similarity_fn_name
        kind = ("int8 weights, " if self.folder.int8 else "") + str(self.dtype).removeprefix("torch.")
        log.info("%s on %s, %s (%s)", self.folder.path, self.device, kind, self.dtype_reason)
        log.info("attention %s (%s)", encoder.attention, encoder.attention_reason)

    @cached_property
    def weights_hash(self) -> str:
        return weights_hash(self.folder.path)

    @cached_property
    def tokenizer_hash(self) -> str:
        return tokenizer_hash(self.folder.path)

    def prompt_text(self, prompt_name: str | None = None, prompt: str | None = None) -> str:
        """The prompt to put before a text: `prompt` itself, else the one named, else the folder's default, else none.

        Raises:
            InputError: a name that the folder does not define.
        """
        if prompt is not None:
            return prompt
        name = prompt_name or self.default_prompt_name
        if name is None:
            return ""
        if name not in self.prompts:
            known = ", ".join(sorted(self.prompts)) or "none"
            raise InputError(f"{self.folder.path} has no prompt {name!r}; it has {known}")
        return self.prompts[name]

    def encode(
        self,
        texts: Sequence[str] | str | Iterable[Mapping[str, Sequence[str]]],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        normalize_embeddings: bool | None = None,
        truncate_dim: int | None = None,
        tokens_per_batch: int | None = None,
        prompt_type: Any = None,
        convert_to_tensor: bool = False,
        **left: Any,
    ) -> np.ndarray:
        """Embed texts; those over `max_tokens` are truncated, as sentence-transformers does.

        Args:
            texts: any number, of any length; a single string gives a single vector. Or mteb's batches.
            prompt_name, prompt: see `prompt_text`.
            normalize_embeddings: unit length; None and False do what the folder says, as in sentence-transformers,
                where False is the default and a Normalize module acts all the same. Set `normalize` to change it.
            truncate_dim: keep the first dimensions only (Matryoshka), before normalising.
            tokens_per_batch: token budget of a forward pass.
            prompt_type: mteb's "query" or "document"; takes the folder's prompt of that name.
            convert_to_tensor: a torch tensor instead of an array.
            left: see `model.protocols.LEFT`.

        Returns:
            float32 of shape (len(texts), dim), in the order of `texts`.
        """
        check_left(left)
        options = {"prompt_name": prompt_name, "prompt": prompt}
        prompt_name = self.prompt_option(prompt_names(prompt_type), options).get("prompt_name", prompt_name)
        if isinstance(texts, str):
            return self.encode(
                [texts],
                prompt_name=prompt_name,
                prompt=prompt,
                normalize_embeddings=normalize_embeddings,
                truncate_dim=truncate_dim,
                tokens_per_batch=tokens_per_batch,
                convert_to_tensor=convert_to_tensor,
            )[0]
        prefix = self.prompt_text(prompt_name, prompt)
        clean = [scrub(prefix + t) for t in texts_of(texts)]
        sequences = [self._truncate(e.ids) for e in self.tokenizer.encode_batch_fast(clean)]
        skip = 0
        if prefix and not self.folder.include_prompt:
            skip = len(self.tokenizer.encode(prefix).ids) - 1  # [CLS] and the prompt's tokens, without its [SEP]
        dim = min(truncate_dim or self.dim, self.dim)
        vectors = np.empty((len(sequences), dim), dtype=np.float32)
        budget = tokens_per_batch or self.tokens_per_batch
        lengths = np.array([len(s) for s in sequences], dtype=np.int64)
        order = np.argsort(-lengths, kind="stable")
        before = np.concatenate([[0], np.cumsum(lengths[order])])  # tokens of all texts that come earlier
        first = 0
        while first < len(order):
            # A text over the budget goes alone.
            last = max(first + 1, int(np.searchsorted(before, before[first] + budget, side="right")) - 1)
            batch = pack([sequences[i] for i in order[first:last]])
            offsets = np.asarray(batch.host_offsets(), dtype=np.int64)
            starts = np.minimum(offsets[:-1] + skip, offsets[1:] - 1)
            pooled = self._embed_if_it_fits(batch, starts, offsets[1:])
            if pooled is None:
                budget = batch.num_tokens // 2
                continue
            vectors[order[first:last]] = self.finish(
                *pooled, normalize=normalize_embeddings or None, truncate_dim=truncate_dim
            )
            first = last
        return torch.from_numpy(vectors) if convert_to_tensor else vectors  # type: ignore[return-value]

    def _truncate(self, ids: list[int]) -> list[int]:
        """The first `max_tokens` tokens, the closing special token kept."""
        return ids if len(ids) <= self.max_tokens else ids[: self.max_tokens - 1] + ids[-1:]

    def _embed_if_it_fits(
        self, batch: PackedBatch, starts_R: np.ndarray, ends_R: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """`embed_segments`; None where several texts together do not fit into the device's memory."""
        try:
            return self.embed_segments(batch, starts_R, ends_R)
        except torch.OutOfMemoryError:
            if len(starts_R) == 1:
                raise
        # Out here, because an exception keeps alive what its frames hold, and with it the device's memory.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        log.warning("a batch of %d tokens does not fit into the device's memory and is halved", batch.num_tokens)
        return None

    @torch.inference_mode()
    def embed_segments(
        self, batch: PackedBatch, starts_R: np.ndarray, ends_R: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode a batch and pool ranges of its tokens, see `model.pooling.pool_segments`.

        Returns:
            sums (R, D) and weights (R,), float32; `finish` makes vectors of them.
        """
        batch = batch.to(self.device)
        starts, ends = (torch.as_tensor(x, dtype=torch.int64, device=self.device) for x in (starts_R, ends_R))
        sums_RD, weights_R = encode_segments(self.encoder, batch, starts, ends, self.pooling)
        return sums_RD.float().cpu().numpy(), weights_R.float().cpu().numpy()

    @torch.inference_mode()
    def finish(
        self,
        sums_RD: np.ndarray,
        weights_R: np.ndarray,
        *,
        normalize: bool | None = None,
        truncate_dim: int | None = None,
    ) -> np.ndarray:
        """Divide, go through Dense modules, keep the leading dimensions, normalise: (R, dim) float32."""
        vectors: Tensor = torch.from_numpy(sums_RD) / torch.from_numpy(weights_R)[:, None]
        vectors = self.dense(vectors)
        vectors = vectors[:, : min(truncate_dim or self.dim, self.dim)]
        if self.normalize if normalize is None else normalize:
            vectors = normalize_rows(vectors)
        return vectors.numpy()


def default_tokens(config: EncoderConfig, device: torch.device, dtype: torch.dtype) -> int:
    """Token budget of a forward pass: what suits the kind of device, and fits into the memory that a GPU has free."""
    budget = TOKENS_PER_BATCH.get(device.type, 2_048)
    if device.type != "cuda":
        return budget
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return max(LEAST_TOKENS, min(budget, fitting_tokens(config, free_bytes, bytes_per_value=dtype.itemsize)))


@cache
def keep_freed_memory() -> bool:
    """Have glibc keep what a forward pass frees for the next one, up to 32 MB a piece, instead of handing it back.

    By default every large tensor is new memory, whose first touch costs a page fault for each 4 kB: without, a
    base-size encoder on two cores ran 1.12 times as fast. It holds for the whole process.

    Returns:
        Whether it could be set.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
    settings = {mmap_threshold: 32 << 20, trim_threshold: 2**31 - 1, top_pad: 64 << 20}
    return all(mallopt(name, value) == 1 for name, value in settings.items())


def scrub(text: str) -> str:
    """Replace lone surrogates, which are no Unicode text and which the Rust tokenizer refuses, by U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def choose_device(name: str) -> torch.device:
    """A torch device by name; "auto" is CUDA where there is one.

    Raises:
        InputError: no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device {name!r} is not known; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r} was asked for and torch sees no CUDA device; use cpu or auto")
    return device
