"""The packed layout: offsets, positions, and the way there and back from padded batches."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.batch import PackedBatch, pack, pad, unpad

sequences = st.lists(st.lists(st.integers(0, 50_000), min_size=1, max_size=20), min_size=1, max_size=8)


def test_two_sequences_by_hand() -> None:
    batch = pack([[5, 6, 7], np.array([8, 9], dtype=np.uint16)])
    assert batch.tokens_T.tolist() == [5, 6, 7, 8, 9]
    assert batch.tokens_T.dtype == torch.int64
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert batch.cu_seqlens.dtype == torch.int32
    assert (batch.max_seqlen, batch.num_tokens, batch.num_sequences) == (3, 5, 2)
    assert batch.positions_T().tolist() == [0, 1, 2, 0, 1]
    assert batch.sequence_T().tolist() == [0, 0, 0, 1, 1]


@given(sequences)
@settings(deadline=None)
def test_pack_keeps_every_sequence(lists: list[list[int]]) -> None:
    batch = pack(lists)
    offsets = batch.cu_seqlens.tolist()
    assert batch.host_offsets() == tuple(offsets)
    assert [batch.tokens_T[a:b].tolist() for a, b in pairwise(offsets)] == lists
    assert batch.max_seqlen == max(map(len, lists))
    assert batch.positions_T().tolist() == [i for one in lists for i in range(len(one))]
    assert batch.sequence_T().tolist() == [s for s, one in enumerate(lists) for _ in one]


@given(sequences, st.booleans(), st.integers(0, 3))
@settings(deadline=None)
def test_padded_batches_come_and_go(lists: list[list[int]], left: bool, slack: int) -> None:
    length = max(map(len, lists)) + slack
    ids = torch.full((len(lists), length), -7)
    mask = torch.zeros(len(lists), length, dtype=torch.int64)
    for row, one in enumerate(lists):
        where = slice(length - len(one), length) if left else slice(0, len(one))
        ids[row, where], mask[row, where] = torch.tensor(one), 1
    batch, index_T = unpad(ids, mask)
    direct = pack(lists)
    assert torch.equal(batch.tokens_T, direct.tokens_T)
    assert torch.equal(batch.cu_seqlens, direct.cu_seqlens)
    assert (batch.max_seqlen, batch.host_offsets()) == (direct.max_seqlen, direct.host_offsets())
    assert torch.equal(pad(batch.tokens_T, index_T, *ids.shape), torch.where(mask.bool(), ids, 0))


def test_pad_keeps_trailing_dimensions() -> None:
    _, index_T = unpad(torch.tensor([[1, 0], [2, 3]]), torch.tensor([[1, 0], [1, 1]]))
    padded = pad(torch.arange(6.0).view(3, 2) + 1, index_T, 2, 2)
    assert padded.tolist() == [[[1, 2], [0, 0]], [[3, 4], [5, 6]]]


def test_offsets_are_read_from_the_tensor_where_none_were_given() -> None:
    batch = PackedBatch(torch.arange(5), torch.tensor([0, 3, 5], dtype=torch.int32), 3)
    assert batch.host_offsets() == (0, 3, 5)
    assert batch.to("cpu").offsets == (0, 3, 5)


def test_empty_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one sequence"):
        pack([])
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        pack([[1], [], [2]])
    with pytest.raises(ValueError, match="needs a real token"):
        unpad(torch.ones(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 0], [0, 0, 0]]))
