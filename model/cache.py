"""Keys and values that a decoder keeps between steps: a ring in local layers, growing pages in global ones.

No page is mapped through a table: all sequences of a batch take a step together, so a page of generated tokens is one
tensor with a row a sequence, and a page of prompts has a row for every prompt that reaches it. Pages are few, because
every step goes through all of them: one ends where a prompt does, and two full ones of the same size become one. Keys
are kept turned by their positions. Shape suffixes: T packed tokens, S sequences, N heads, R keys of a ring, P tokens of
a page, K all keys of the pages, H head size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import PackedBatch
from model.config import FULL, EncoderConfig

PAGE = 64
"""Pages are multiples of so many tokens."""


class Ring:
    """The last R keys and values of every sequence: position p lies in slot p % R."""

    def __init__(self, num_sequences: int, size: int, config: EncoderConfig, like: Tensor) -> None:
        shape = (num_sequences, config.num_heads, size, config.head_size)
        self.keys_SNRH, self.values_SNRH = like.new_zeros(shape), like.new_zeros(shape)
        self.size = size

    def fill(self, k_TNH: Tensor, v_TNH: Tensor, batch: PackedBatch) -> None:
        """Keep the ends of the prompts."""
        position_T, sequence_T = batch.positions_T(), batch.sequence_T()
        kept_T = (position_T >= batch.cu_seqlens.diff()[sequence_T] - self.size).nonzero().squeeze(1)
        row, slot = sequence_T[kept_T], position_T[kept_T] % self.size
        self.keys_SNRH[row, :, slot], self.values_SNRH[row, :, slot] = k_TNH[kept_T], v_TNH[kept_T]

    def attend(self, q_SNH: Tensor, k_SNH: Tensor, v_SNH: Tensor, position_S: Tensor) -> Tensor:
        """Keep one more key and value a sequence, at these positions; then attend to all that are kept: (S, N, H)."""
        row_S, slot_S = torch.arange(len(position_S), device=position_S.device), position_S % self.size
        self.keys_SNRH[row_S, :, slot_S], self.values_SNRH[row_S, :, slot_S] = k_SNH, v_SNH
        seen_SR = torch.arange(self.size, device=position_S.device) <= position_S[:, None]
        return F.scaled_dot_product_attention(
            q_SNH[:, :, None], self.keys_SNRH, self.values_SNRH, attn_mask=seen_SR[:, None, None]
        ).squeeze(2)

    def keep(self, rows_S: Tensor) -> None:
        self.keys_SNRH, self.values_SNRH = self.keys_SNRH[rows_S], self.values_SNRH[rows_S]

    def tensors(self) -> list[Tensor]:
        return [self.keys_SNRH, self.values_SNRH]


@dataclass
class _Page:
    """Consecutive tokens of some sequences, as many of each as `used_S` says."""

    rows_S: Tensor
    used_S: Tensor
    keys_SNPH: Tensor
    values_SNPH: Tensor

    @property
    def size(self) -> int:
        return self.keys_SNPH.shape[2]

    def keep(self, rows_S: Tensor) -> "_Page":
        """Only these sequences of the batch, under their new numbers."""
        # Where each row that stays lies in the page, if it is there.
        found_SS = rows_S[:, None] == self.rows_S
        here_S, index_S = found_SS.any(dim=1).nonzero().squeeze(1), found_SS.nonzero()[:, 1]
        return _Page(here_S, self.used_S[index_S], self.keys_SNPH[index_S], self.values_SNPH[index_S])


class Pages:
    """All keys and values of every sequence."""

    def __init__(self, num_sequences: int, config: EncoderConfig, like: Tensor) -> None:
        self.num_sequences, self.like = num_sequences, like
        self.config = config
        self.prompts: list[_Page] = []
        self.steps_taken: list[_Page] = []
        """Pages of generated tokens, all sequences in each; only the last has room."""
        self.steps = 0

    def _new(self, rows_S: Tensor, size: int) -> _Page:
        shape = (len(rows_S), self.config.num_heads, size, self.config.head_size)
        return _Page(rows_S, torch.zeros_like(rows_S), self.like.new_zeros(shape), self.like.new_zeros(shape))

    def fill(self, k_TNH: Tensor, v_TNH: Tensor, batch: PackedBatch) -> None:
        """Keep the prompts."""
        length_S, position_T, sequence_T = batch.cu_seqlens.diff(), batch.positions_T(), batch.sequence_T()
        start = 0
        for end in (-(-length_S // PAGE) * PAGE).unique().tolist():
            page = self._new((length_S > start).nonzero().squeeze(1), end - start)
            page.used_S = (length_S[page.rows_S] - start).clamp(max=end - start)
            token = ((position_T >= start) & (position_T < end)).nonzero().squeeze(1)
            row, slot = torch.searchsorted(page.rows_S, sequence_T[token]), position_T[token] - start
            page.keys_SNPH[row, :, slot], page.values_SNPH[row, :, slot] = k_TNH[token], v_TNH[token]
            self.prompts.append(page)
            start = end

    def _room(self, device: torch.device) -> _Page:
        """The page that the next token goes into. Full pages of one size become one: so there are few, and what lies in
        one was copied as often as its size doubled.
        """
        pages = self.steps_taken
        if self.steps % PAGE:
            return pages[-1]
        while len(pages) > 1 and pages[-1].size == pages[-2].size:
            before, last = pages[-2:]
            keys = torch.cat([before.keys_SNPH, last.keys_SNPH], dim=2)
            values = torch.cat([before.values_SNPH, last.values_SNPH], dim=2)
            pages[-2:] = [_Page(last.rows_S, before.used_S + last.used_S, keys, values)]
        pages.append(self._new(torch.arange(self.num_sequences, device=device), PAGE))
        return pages[-1]

    def attend(self, q_SNH: Tensor, k_SNH: Tensor, v_SNH: Tensor, position_S: Tensor) -> Tensor:
        """Keep one more key and value a sequence; then attend to all that are kept: (S, N, H)."""
        last, slot = self._room(q_SNH.device), self.steps % PAGE
        last.keys_SNPH[:, :, slot], last.values_SNPH[:, :, slot] = k_SNH, v_SNH
        last.used_S += 1
        self.steps += 1
        pages = [*self.prompts, *self.steps_taken]
        sizes = [page.size for page in pages]

        q_SN1H = (q_SNH / math.sqrt(q_SNH.shape[-1]))[:, :, None]
        wide = torch.promote_types(q_SNH.dtype, torch.float32)
        scores_SNK = torch.full((*q_SNH.shape[:2], sum(sizes)), -math.inf, dtype=wide, device=q_SNH.device)
        slots_P = torch.arange(max(sizes), device=q_SNH.device)
        for page, scores_SNP in zip(pages, scores_SNK.split(sizes, dim=2), strict=True):
            score = (q_SN1H[page.rows_S] @ page.keys_SNPH.transpose(2, 3)).squeeze(2).to(wide)
            unused_SP = slots_P[: page.size] >= page.used_S[:, None]
            scores_SNP[page.rows_S] = score.masked_fill_(unused_SP[:, None], -math.inf)
        weights_SNK = scores_SNK.softmax(dim=2).to(q_SNH.dtype)
        out_SNH = torch.zeros(q_SNH.shape, dtype=wide, device=q_SNH.device)
        for page, weights_SNP in zip(pages, weights_SNK.split(sizes, dim=2), strict=True):
            part_SNH = (weights_SNP[page.rows_S][:, :, None] @ page.values_SNPH).squeeze(2)
            out_SNH.index_add_(0, page.rows_S, part_SNH.to(wide))
        return out_SNH.to(q_SNH.dtype)

    def keep(self, rows_S: Tensor) -> None:
        self.num_sequences = len(rows_S)
        self.prompts = [page for page in (page.keep(rows_S) for page in self.prompts) if len(page.rows_S)]
        self.steps_taken = [page.keep(rows_S) for page in self.steps_taken]

    def tensors(self) -> list[Tensor]:
        return [tensor for page in (*self.prompts, *self.steps_taken) for tensor in (page.keys_SNPH, page.values_SNPH)]


class Cache:
    """What a decoder has seen of a batch of sequences, in the order of the batch.

    Args:
        config: of the decoder.
        num_sequences: how many there will be.
        like: a tensor of the dtype and on the device of keys and values.
    """

    def __init__(self, config: EncoderConfig, num_sequences: int, like: Tensor) -> None:
        self.layers: list[Ring | Pages] = [
            Pages(num_sequences, config, like)
            if layer_type == FULL
            else Ring(num_sequences, config.window + 1, config, like)
            for layer_type in config.layer_types
        ]
        self.length_S = torch.zeros(num_sequences, dtype=torch.int64, device=like.device)
        """Tokens seen of each sequence."""
        self.longest = 0
        """The largest of them, or a little more, on the host."""

    def keep(self, rows: Sequence[int]) -> None:
        """Only these sequences go on; rows in rising order."""
        rows_S = torch.tensor(rows, dtype=torch.int64, device=self.length_S.device)
        self.length_S = self.length_S[rows_S]
        for layer in self.layers:
            layer.keep(rows_S)

    def nbytes(self) -> int:
        """Bytes of the storage behind keys and values."""
        return sum(tensor.untyped_storage().nbytes() for layer in self.layers for tensor in layer.tensors())


def bytes_per_token(config: EncoderConfig, dtype: torch.dtype) -> int:
    """What one more token of a sequence takes, once its ring is full: a key and a value in every global layer."""
    return 2 * config.hidden_size * dtype.itemsize * config.layer_types.count(FULL)


def cache_bytes(config: EncoderConfig, prompt_lengths: Sequence[int], steps: int, dtype: torch.dtype) -> int:
    """Bytes of a `Cache` after prompts of these lengths and so many steps: whole pages, and a ring a local layer.

    ModernBERT-base in bfloat16: 24 kB a token, and 2.8 MB a sequence for its rings.
    """
    pages = sum(-(-length // PAGE) for length in prompt_lengths) + len(prompt_lengths) * -(-steps // PAGE)
    local_layers = len(config.layer_types) - config.layer_types.count(FULL)
    rings = len(prompt_lengths) * local_layers * (config.window + 1)
    return pages * PAGE * bytes_per_token(config, dtype) + rings * 2 * config.hidden_size * dtype.itemsize
