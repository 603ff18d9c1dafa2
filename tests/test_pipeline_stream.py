"""The stream: nothing lost or doubled over an epoch, whatever the workers, wherever it is cut; errors are one line."""

import gc
import itertools
import threading
import time
import tracemalloc
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import InputError
from pipeline.masking import MaskingConfig
from pipeline.permutation import mix64
from pipeline.shards import MANIFEST, Manifest, TokenShards, shard_table, write_file, write_shard
from pipeline.stream import Bin, Step, StreamConfig, StreamState, TokenStream
from pipeline.tokens import list_array

PAD, UNK, CLS, SEP, MASK, VOCAB = 0, 1, 2, 3, 4, 60_000
CALM = settings(max_examples=25, deadline=None)


def write_shards(folder: Path, lengths_of_shards: list[list[int]], heldout: int = 2) -> TokenShards:
    """Shards in which no token occurs twice; the last so many are held out."""
    entries, start = [], 5
    for number, lengths in enumerate(lengths_of_shards):
        tokens = [np.arange(start + end - n, start + end) for n, end in zip(lengths, np.cumsum(lengths), strict=True)]
        start += sum(lengths)
        keys_D = mix64(np.arange(len(lengths), dtype=np.uint64) + np.uint64(1000 * number + 1))
        sentences = list_array([np.arange(0, n, 7) for n in lengths], pa.int32())
        ids = pa.array([f"{number}/{i}" for i in range(len(lengths))])
        table = shard_table(ids, keys_D, list_array(tokens, pa.uint16()), sentences)
        entries.append(write_shard(str(folder), f"{number}.arrow", table))
    assert start <= VOCAB
    train = len(entries) - heldout
    manifest = Manifest(
        tokenizer="t" * 32,
        vocab_size=VOCAB,
        cls_id=CLS,
        sep_id=SEP,
        mask_id=MASK,
        pad_id=PAD,
        unk_id=UNK,
        special_ids=(0, 1, 2, 3, 4),
        corpus="c" * 32,
        settings={},
        counts={},
        lengths={},
        shards={"train": tuple(entries[:train]), "heldout": tuple(entries[train:])},
    )
    write_file(str(folder), MANIFEST, manifest.to_bytes())
    return TokenShards.open(str(folder))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    """Seven shards and two held-out ones, 55,000 tokens; documents of 1 to 3,000 tokens, most of them short."""
    rng = np.random.default_rng(0)
    lengths = [np.clip(rng.lognormal(4, 1.4, 45).astype(int), 1, 3000).tolist() for _ in range(9)]
    return write_shards(tmp_path_factory.mktemp("shards"), lengths)


configs = st.builds(
    StreamConfig,
    max_tokens=st.sampled_from([16, 128, 500]),
    tokens_per_bin=st.sampled_from([500, 1024, 2048]),
    tokens_per_step=st.sampled_from([2048, 5000, 20_000]),
    first_tokens_per_step=st.sampled_from([None, 500, 2000]),
    warmup_tokens=st.sampled_from([0, 1, 30_000]),
    seed=st.integers(0, 2**40),
    window_shards=st.sampled_from([1, 2, 3, 7, 100]),
    ordering=st.booleans(),
)


def take(stream: TokenStream, count: int, state: StreamState = StreamState(), **worker: int) -> list[Step]:  # noqa: B008 (frozen)
    with closing(stream.steps(state, **worker)) as steps:
        return list(itertools.islice(steps, count))


def epoch_of(stream: TokenStream, epoch: int = 0) -> list[Bin]:
    """All bins of an epoch."""
    bins: list[Bin] = []
    with closing(stream.steps(StreamState(epoch=epoch))) as steps:
        for step in steps:
            bins += [b for b in step.bins if b.epoch == epoch]
            if step.after.epoch > epoch:
                return bins
    raise AssertionError("a stream does not end")


def clear(one: Bin) -> np.ndarray:
    tokens = one.tokens_T.copy()
    tokens[one.masked_M] = one.targets_M
    return tokens


def digests(steps: list[Step]) -> list[list[str]]:
    """For each step the bins of all workers, sorted: who has which is not compared."""
    return [sorted(b.digest() + b.name for b in step.bins) for step in steps]


@CALM
@given(config=configs, epoch=st.integers(0, 3))
def test_an_epoch_has_every_token_once_in_bins_within_the_budget(
    shards: TokenShards, config: StreamConfig, epoch: int
) -> None:
    bins = epoch_of(TokenStream(shards, config), epoch)
    text = np.concatenate([clear(b)[b.positions_T >= 0] for b in bins])
    assert np.array_equal(np.sort(text), np.arange(5, 5 + shards.manifest.num_tokens()))
    assert len({b.name for b in bins}) == len(bins)
    for b in bins:
        lengths = np.diff(b.cu_seqlens)
        assert lengths.min() >= 3
        assert lengths.max() == b.max_seqlen <= config.max_tokens
        assert b.num_tokens == b.cu_seqlens[-1] <= config.tokens_per_bin
        tokens, first = clear(b), b.cu_seqlens[:-1]
        assert (tokens[first] == CLS).all()
        assert (tokens[b.cu_seqlens[1:] - 1] == SEP).all()
        ordered = b.ordering_S != 1
        assert np.array_equal(b.positions_T[first + 1][ordered], b.starts_S[ordered])
        assert np.array_equal((tokens == CLS) | (tokens == SEP), b.positions_T < 0)
        assert (b.positions_T[b.masked_M] >= 0).all()
        assert config.ordering or (b.ordering_S == -100).all()


@CALM
@given(config=configs, num_workers=st.integers(1, 6), steps=st.integers(1, 8))
def test_the_global_batch_is_the_same_for_any_number_of_workers(
    shards: TokenShards, config: StreamConfig, num_workers: int, steps: int
) -> None:
    stream = TokenStream(shards, config)
    alone = take(stream, steps)
    shares = [take(stream, steps, rank=rank, num_workers=num_workers) for rank in range(num_workers)]
    for step, *parts in zip(alone, *shares, strict=True):
        counts = [len(part.bins) for part in parts]
        assert sum(counts) == step.num_bins == len(step.bins)
        assert max(counts) - min(counts) <= 1
        assert {(p.step, p.num_bins, p.num_tokens, p.max_bins, p.after) for p in parts} == {
            (step.step, step.num_bins, step.num_tokens, max(counts), step.after)
        }
        assert sum(b.num_tokens for b in step.bins) == step.num_tokens
        assert sorted(b.digest() for part in parts for b in part.bins) == sorted(b.digest() for b in step.bins)


@CALM
@given(config=configs, cut=st.integers(0, 30), num_workers=st.integers(1, 3))
def test_a_stream_resumed_at_any_step_is_the_stream(
    shards: TokenShards, config: StreamConfig, cut: int, num_workers: int
) -> None:
    """Also with another number of workers, by a new process that knows five whole numbers."""
    whole = take(TokenStream(shards, config), cut + 4)
    state = StreamState(**asdict(whole[cut - 1].after)) if cut else StreamState()
    stream = TokenStream(TokenShards.open(shards.uri), config)
    resumed = [take(stream, 4, state, rank=rank, num_workers=num_workers) for rank in range(num_workers)]
    together = [replace(parts[0], bins=sum((p.bins for p in parts), ())) for parts in zip(*resumed, strict=True)]
    assert digests(together) == digests(whole[cut:])
    assert [s.after for s in together] == [s.after for s in whole[cut:]]


def test_epochs_and_seeds_differ_in_bins_and_in_masks(shards: TokenShards) -> None:
    config = StreamConfig(max_tokens=256, tokens_per_bin=1024, window_shards=3)

    def seen(seed: int, epoch: int) -> tuple[set[frozenset[int]], set[int]]:
        bins = epoch_of(TokenStream(shards, replace(config, seed=seed)), epoch)
        company = {frozenset(b.documents_S.tolist()) for b in bins}
        return company, {int(t) for b in bins for t in b.targets_M}

    company, masked = seen(0, 0)
    assert seen(0, 0) == (company, masked)
    for other_company, other_masked in (seen(0, 1), seen(1, 0)):
        assert len(company & other_company) < 0.2 * len(company)
        # Two independent choices of 30 % have 9 % of all tokens in common.
        common = len(masked & other_masked) / shards.manifest.num_tokens()
        assert common == pytest.approx(0.09, abs=0.01)


def test_two_workers_never_share_a_mask_stream(shards: TokenShards) -> None:
    """At no step do masks of two workers agree place by place, as they do where ranks share a seed."""
    config = StreamConfig(max_tokens=500, tokens_per_bin=2048, tokens_per_step=4096)
    stream = TokenStream(shards, config)
    for one, two in zip(*(take(stream, 8, rank=rank, num_workers=2) for rank in range(2)), strict=True):
        (a,), (b,) = one.bins, two.bins
        size = min(a.num_tokens, b.num_tokens)
        masks = [np.isin(np.arange(size), x.masked_M) for x in (a, b)]
        assert np.mean(masks[0] & masks[1]) == pytest.approx(0.09, abs=0.04)


def test_the_global_batch_grows_with_the_tokens(shards: TokenShards) -> None:
    config = StreamConfig(
        max_tokens=128, tokens_per_bin=500, tokens_per_step=4000, first_tokens_per_step=1000, warmup_tokens=20_000
    )
    steps = take(TokenStream(shards, config), 14)
    sizes = [step.num_bins for step in steps]
    assert sizes[0] == 2
    assert sizes == sorted(sizes)
    assert sizes[-1] == 8
    done = np.cumsum([0, *sizes]) * 500
    assert sizes[5] == round((1000 + 3000 * done[5] / 20_000) / 500)
    assert [s.after.bins * 500 for s in steps] == done[1:].tolist()


def test_work_is_balanced_between_workers(shards: TokenShards) -> None:
    config = StreamConfig(max_tokens=2048, tokens_per_bin=2048, tokens_per_step=24 * 2048, window_shards=100)
    stream = TokenStream(shards, config)
    costs = [
        sum(int(np.square(np.diff(b.cu_seqlens)).sum()) for b in take(stream, 1, rank=rank, num_workers=4)[0].bins)
        for rank in range(4)
    ]
    assert max(costs) < 1.1 * np.mean(costs)


def test_held_out_bins_never_change(shards: TokenShards) -> None:
    def evaluate(seed: int, **worker: int) -> list[str]:
        config = StreamConfig(max_tokens=256, tokens_per_bin=1024, seed=seed, window_shards=1)
        return [b.digest() for b in TokenStream(shards, config).evaluation(**worker)]

    bins = evaluate(0)
    assert bins == evaluate(7)
    assert len(bins) >= 4
    shares = [evaluate(0, rank=rank, num_workers=3) for rank in range(3)]
    assert [shares[i % 3][i // 3] for i in range(len(bins))] == bins
    assert evaluate(0, max_bins=3) == bins[:3]
    config = StreamConfig(max_tokens=256, tokens_per_bin=1024)
    text = np.concatenate([clear(b)[b.positions_T >= 0] for b in TokenStream(shards, config).evaluation()])
    first = 5 + shards.manifest.num_tokens()
    assert np.array_equal(np.sort(text), np.arange(first, first + shards.manifest.num_tokens("heldout")))


def test_the_rate_of_masking_follows_the_steps(shards: TokenShards) -> None:
    masking = MaskingConfig(rate=0.5, final_rate=0.1)
    config = StreamConfig(tokens_per_bin=2048, tokens_per_step=10_000, num_steps=4, masking=masking)
    rates = [
        sum(len(b.masked_M) for b in step.bins) / sum((b.positions_T >= 0).sum() for b in step.bins)
        for step in take(TokenStream(shards, config), 6)
    ]
    assert rates == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1, 0.1], abs=0.03)


def test_a_closed_stream_leaves_no_thread(shards: TokenShards) -> None:
    before = threading.active_count()
    steps = TokenStream(shards, StreamConfig()).steps()
    next(steps)
    assert threading.active_count() > before
    steps.close()
    assert threading.active_count() == before


def test_memory_does_not_grow_with_the_steps(shards: TokenShards) -> None:
    config = StreamConfig(max_tokens=256, tokens_per_bin=1024, tokens_per_step=4096, window_shards=2)
    held = {}
    tracemalloc.start()
    try:
        with closing(TokenStream(shards, config).steps()) as steps:
            for number, _ in enumerate(itertools.islice(steps, 400)):
                if number in (100, 399):
                    time.sleep(0.3)  # both times with all steps that are made ahead
                    gc.collect()
                    held[number] = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held[399] < held[100] + 500_000, "a step has 100 kB, a window 20 kB, and the epochs 120 windows"


def test_what_is_wrong_is_one_line(shards: TokenShards, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a sequence must fit"):
        StreamConfig(max_tokens=1024, tokens_per_bin=512)
    with pytest.raises(InputError, match="at least 4"):
        StreamConfig(max_tokens=3)
    with pytest.raises(InputError, match="first_tokens_per_step is 9000"):
        StreamConfig(tokens_per_step=8192, first_tokens_per_step=9000)
    with pytest.raises(InputError, match="needs num_steps"):
        StreamConfig(masking=MaskingConfig(final_rate=0.1))
    with pytest.raises(InputError, match="hold no text"):
        TokenStream(write_shards(tmp_path, [[5]], heldout=1), StreamConfig())
    # A shard that goes missing, or changes, is noticed in the thread and said here.
    broken = write_shards(tmp_path, [[5, 6, 7], [100]], heldout=1)
    (tmp_path / "0.arrow").unlink()
    with pytest.raises(InputError, match=r"lacks the shard 0\.arrow"):
        take(TokenStream(broken, StreamConfig()), 1)
