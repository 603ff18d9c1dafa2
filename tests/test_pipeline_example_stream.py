"""Steps of examples: the same for any number of workers, resumable at any, each example once an epoch."""

from contextlib import closing
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import InputError
from pipeline.example_stream import BEGINNING, ExampleBatch, ExampleStream, ExampleStreamConfig, TextBin
from pipeline.examples import Examples
from pipeline.stream import StreamState

CLS, SEP = 2, 3


def make_examples(count: int, *, seed: int = 0, texts: int = 2, tagged: bool = False) -> Examples:
    """Texts of 3 to 40 tokens, each its own number in the middle."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 41, count * texts)
    parts = [np.concatenate([[CLS], np.full(n - 2, 100 + i), [SEP]]) for i, n in enumerate(lengths)]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    none, order = np.empty(0, np.int64), np.arange(count * texts)
    return Examples(
        tokens_X=np.concatenate(parts).astype(np.int32),
        offsets_U=offsets,
        skipped_U=np.zeros(count * texts, np.int32),
        first_E=np.arange(count + 1) * texts,
        text_N=order,
        key_N=order,
        targets=none,
        tags_X=np.arange(offsets[-1]) if tagged else none,
    )


def stream_of(*sources: Examples, joined: bool = False, **changes: object) -> ExampleStream:
    options = {"examples_per_step": 8, "tokens_per_bin": 64, "num_steps": 20, **changes}
    config = ExampleStreamConfig(**options)  # type: ignore[arg-type]
    return ExampleStream(sources, config, joined=[joined] * len(sources), cls_id=CLS, sep_id=SEP)


def draw(stream: ExampleStream, count: int, state: StreamState = BEGINNING, **where: int) -> list[ExampleBatch]:
    with closing(stream.steps(state, **where)) as steps:
        return list(islice(steps, count))


def content(item: TextBin) -> tuple[bytes, ...]:
    return tuple(array.tobytes() for array in (item.tokens_T, item.cu_seqlens, item.starts_R, item.texts_R))


def test_an_epoch_has_each_example_once() -> None:
    stream = stream_of(make_examples(40))
    steps = draw(stream, 10)
    first, second = (np.concatenate([s.examples_B for s in part]) for part in (steps[:5], steps[5:]))
    assert sorted(first) == sorted(second) == list(range(40))
    assert first.tolist() != second.tolist()
    assert [s.epoch for s in steps] == [0] * 5 + [1] * 5
    assert len(draw(stream, 100)) == 20


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), workers=st.integers(1, 5), step=st.integers(0, 18), joined=st.booleans())
def test_workers_share_one_batch(seed: int, workers: int, step: int, joined: bool) -> None:
    stream = stream_of(make_examples(11, seed=seed), seed=seed, joined=joined, joined_share=0.5, joined_tokens=60)
    state = draw(stream, step)[-1].after if step else StreamState()
    (alone,) = draw(stream, 1, state)
    shares = [draw(stream, 1, state, rank=rank, num_workers=workers)[0] for rank in range(workers)]
    assert sorted(content(b) for s in shares for b in s.bins) == sorted(content(b) for b in alone.bins)
    assert all(np.array_equal(s.examples_B, alone.examples_B) for s in shares)
    assert max(len(s.bins) for s in shares) == shares[0].max_bins
    assert sorted(np.concatenate([b.texts_R for b in alone.bins])) == list(range(16)), "each text is in one bin"
    assert alone.num_tokens == sum(b.num_tokens for b in alone.bins)


def test_resuming_is_going_on() -> None:
    stream = stream_of(make_examples(30), make_examples(50, seed=1))
    steps = draw(stream, 20)
    for at in (1, 7, 19):
        again = draw(stream, 20, steps[at - 1].after)
        assert len(again) == 20 - at
        assert [content(b) for b in again[0].bins] == [content(b) for b in steps[at].bins]


def test_a_range_is_its_text() -> None:
    stream = stream_of(make_examples(20), joined=True, joined_share=0.5, joined_tokens=60)
    shares = []
    for batch in draw(stream, 5):
        for item in batch.bins:
            assert item.num_tokens <= 64
            assert item.tokens_T[item.cu_seqlens[:-1]].tolist() == [CLS] * (len(item.cu_seqlens) - 1)
            assert item.tokens_T[item.cu_seqlens[1:] - 1].tolist() == [SEP] * (len(item.cu_seqlens) - 1)
            for start, end, text in zip(item.starts_R, item.ends_R, item.texts_R, strict=True):
                number = batch.examples_B[batch.example_N[text]] * 2 + batch.place_N[text]
                inner = item.tokens_T[start:end]
                assert set(inner[(inner != CLS) & (inner != SEP)]) == {100 + number}
                alone = inner[0] == CLS
                length = stream.sources[0].offsets_U[number + 1] - stream.sources[0].offsets_U[number]
                assert len(inner) == (length if alone else length - 2)
                shares.append(alone)
    assert 0.5 <= np.mean(shares) < 0.8, "half are joined, or stand alone where nothing fitted beside them"


def test_tags_stay_with_their_tokens() -> None:
    examples = make_examples(20, texts=1, tagged=True)
    for batch in draw(stream_of(examples), 3):
        for item in batch.bins:
            assert np.array_equal(examples.tokens_X[item.tags_T], item.tokens_T)


def test_sources_come_in_their_shares_and_never_mix() -> None:
    sources = [make_examples(30), make_examples(90, seed=1)]
    config = ExampleStreamConfig(examples_per_step=8, tokens_per_bin=64, num_steps=2000)
    by_size, by_share = ExampleStream(sources, config), ExampleStream(sources, config, shares=[3, 1])
    assert np.mean(by_size.source_of == 0) == pytest.approx(0.25, abs=0.04)
    assert np.mean(by_share.source_of == 0) == pytest.approx(0.75, abs=0.04)
    seen: dict[int, list[int]] = {0: [], 1: []}
    for batch in draw(by_size, 60):
        seen[batch.source] += batch.examples_B.tolist()
    for source, size in ((0, 30), (1, 90)):
        assert sorted(seen[source][:size]) == list(range(size))


def test_held_out_examples_are_never_trained_on() -> None:
    stream = stream_of(make_examples(60), heldout=0.3)
    evaluation = stream.evaluation()
    held_out = np.concatenate([batch.examples_B for batch in evaluation])
    assert 5 < len(held_out) < 35
    trained = np.concatenate([batch.examples_B for batch in draw(stream, 20)])
    assert not set(held_out) & set(trained)
    again = stream_of(make_examples(60), heldout=0.3, seed=5).evaluation()
    assert [content(b) for e in again for b in e.bins] == [content(b) for e in evaluation for b in e.bins]
    shares = [b for rank in range(2) for e in stream.evaluation(rank=rank, num_workers=2) for b in e.bins]
    assert sorted(map(content, shares)) == sorted(content(b) for e in evaluation for b in e.bins)
    assert len(stream.evaluation(max_bins=1)) == 1


def test_each_source_is_evaluated_whatever_the_others_have() -> None:
    stream = stream_of(make_examples(300), make_examples(30, seed=1), heldout=0.3)
    some = stream.evaluation(max_bins=4)
    assert {batch.source for batch in some} == {0, 1}
    assert sum(batch.num_bins for batch in some if batch.source == 0) < 4 + 16, "no batch is begun beyond"


def test_what_does_not_fit() -> None:
    with pytest.raises(InputError, match="tokens_per_bin is 20, and a sequence has 40 tokens"):
        stream_of(make_examples(40), tokens_per_bin=20)
    with pytest.raises(InputError, match="source 0 has no example left to train on"):
        stream_of(make_examples(4), heldout=0.999999)
