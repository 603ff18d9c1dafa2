"""The steps of a fine-tuning: examples -> packed bins, a pure function of (examples, seed, step).

A step takes the same number of examples from one source, in an order that an epoch shuffles, with a hash of where it
stands; what it takes is the same for any number of workers, and all that a checkpoint keeps is the number of the step.
All texts of the global batch are packed together and the bins dealt to workers. Nothing is padded. Loads no torch.
"""

import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np

from model.errors import InputError
from pipeline.examples import Examples
from pipeline.packing import deal_bins, fill_bins, gather
from pipeline.permutation import below, draws, key_of, permute
from pipeline.stream import StreamState, ahead

SOURCES, EXAMPLES, HELD_OUT, JOINED = 11, 12, 13, 14
"""Words of keys that say what is drawn."""
STEPS_AHEAD = 2
BEGINNING = StreamState()
LEAST_JOINED = 256
"""Shortest goal of a joined sequence, in tokens."""


@dataclass(frozen=True, slots=True)
class ExampleStreamConfig:
    """What the steps of a fine-tuning are made of."""

    examples_per_step: int
    tokens_per_bin: int
    """Most tokens of a bin, which is what goes through the model at once."""
    num_steps: int
    seed: int = 0
    heldout: float = 0.0
    """Share of the examples that is never trained on, by a hash of their first text."""
    joined_share: float = 0.0
    """Share of a step's texts that stand in longer sequences together, each pooled by itself."""
    joined_tokens: int = 0
    """Longest of these sequences."""


@dataclass(frozen=True, slots=True)
class TextBin:
    """Texts end to end. T tokens, S sequences, R texts, one range of tokens each."""

    tokens_T: np.ndarray
    """int64 ids."""
    cu_seqlens: np.ndarray
    """int32, S + 1 offsets of the sequences."""
    starts_R: np.ndarray
    ends_R: np.ndarray
    """int64 ranges of tokens that are pooled."""
    texts_R: np.ndarray
    """int64: which of the batch's texts they are."""
    tags_T: np.ndarray
    """int64 targets of the tokens; empty where the examples have none."""
    name: str
    """Which bin this is, for people."""

    @property
    def num_tokens(self) -> int:
        return len(self.tokens_T)

    @property
    def max_seqlen(self) -> int:
        return int(np.diff(self.cu_seqlens).max())

    def digest(self) -> str:
        """A hash of what the model is given."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.tokens_T, self.cu_seqlens, self.starts_R, self.ends_R, self.texts_R, self.tags_T):
            digest.update(array.tobytes() + b"|")
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class ExampleBatch:
    """A global batch, and one worker's share of its bins. B examples, N texts."""

    step: int
    source: int
    """Which of the sources it is from."""
    epoch: int
    examples_B: np.ndarray
    """int64 numbers of the examples in their source."""
    example_N: np.ndarray
    """int64: which of this batch's examples each text belongs to, from 0, ascending."""
    place_N: np.ndarray
    """int64: its place in the example; 0 the query, 1 the positive, from 2 negatives."""
    key_N: np.ndarray
    """int64: equal for texts of one document."""
    text_N: np.ndarray
    """int64: equal for equal texts."""
    bins: tuple[TextBin, ...]
    """Of this worker; none where there are fewer bins than workers."""
    num_bins: int
    max_bins: int
    """Of all workers together, and the most that one has."""
    num_tokens: int
    """Of all workers together."""
    capacity: int
    """Tokens that its bins could hold."""
    after: StreamState
    """What to resume with when this step is done."""


class ExampleStream:
    """Steps out of the examples of one source or several.

    Args:
        sources: each a task's; a step is of one of them.
        shares: how often each is chosen; by default as often as it has examples.
        joined: whether the texts of a source may stand in longer sequences together.
        cls_id, sep_id: what a joined sequence begins and ends with.

    Raises:
        InputError: a text that is longer than a bin, or a source of which everything is held out.
    """

    def __init__(
        self,
        sources: Sequence[Examples],
        config: ExampleStreamConfig,
        *,
        shares: Sequence[float] | None = None,
        joined: Sequence[bool] | None = None,
        cls_id: int = 0,
        sep_id: int = 0,
    ) -> None:
        self.sources, self.config, self.cls_id, self.sep_id = sources, config, cls_id, sep_id
        self.joined = tuple(joined or [False] * len(sources))
        self.held_out = [self._held_out(examples) for examples in sources]
        self.taught = [np.flatnonzero(~held_out) for held_out in self.held_out]
        for number, (examples, taught) in enumerate(zip(sources, self.taught, strict=True)):
            if not len(taught):
                raise InputError(f"source {number} has no example left to train on: heldout is {config.heldout}")
            longest = max(int(np.diff(examples.offsets_U).max()), config.joined_tokens if self.joined[number] else 0)
            if longest > config.tokens_per_bin:
                raise InputError(
                    f"tokens_per_bin is {config.tokens_per_bin}, and a sequence has {longest} tokens; it must fit: "
                    "raise it, or lower max_tokens"
                )
        weights = np.array(shares if shares is not None else [len(taught) for taught in self.taught], np.float64)
        # Which source each step is of, and how many steps were of that source before.
        bits = draws(np.full(config.num_steps, key_of(SOURCES, config.seed), np.uint64), np.arange(config.num_steps))
        bounds = np.cumsum(weights)[:-1] / weights.sum() * 2.0**32
        self.source_of = np.searchsorted(bounds, below(bits, 1 << 32).astype(np.float64), side="right")
        self.turn_of = np.empty(config.num_steps, np.int64)
        for number in range(len(sources)):
            mine = self.source_of == number
            self.turn_of[mine] = np.arange(mine.sum())

    def _held_out(self, examples: Examples) -> np.ndarray:
        """By the first text, so that a question stands on one side, wherever it occurs."""
        if not self.config.heldout:
            return np.zeros(examples.num_examples, dtype=bool)
        firsts = np.unique(examples.text_N[examples.first_E[:-1]])
        hashes = np.array([hash_tokens(examples.text(text)) for text in firsts.tolist()], np.uint64)
        chosen = firsts[hashes < np.uint64(int(self.config.heldout * 2.0**64))]
        return np.isin(examples.text_N[examples.first_E[:-1]], chosen)

    def steps(
        self, state: StreamState = BEGINNING, *, rank: int = 0, num_workers: int = 1
    ) -> Generator[ExampleBatch, None, None]:
        """The steps from a state to the last one; they are made ready in a thread, which ends when this is closed."""
        return ahead(self._steps(state, rank, num_workers), STEPS_AHEAD)

    def _steps(self, state: StreamState, rank: int, num_workers: int) -> Generator[ExampleBatch, None, None]:
        while state.step < self.config.num_steps:
            number = int(self.source_of[state.step])
            taught, size = self.taught[number], self.config.examples_per_step
            first = int(self.turn_of[state.step]) * size
            chosen, epoch = [], first // len(taught)
            places = np.arange(first, first + size)
            for turn in np.unique(places // len(taught)).tolist():
                within = places[places // len(taught) == turn] % len(taught)
                key = key_of(EXAMPLES, self.config.seed, number, turn)
                chosen.append(taught[permute(within, len(taught), key)])
            after = StreamState(step=state.step + 1, epoch=epoch, bins=state.step + 1)
            yield self._batch(np.concatenate(chosen), number, state.step, epoch, after, rank, num_workers)
            state = after

    def evaluation(self, *, rank: int = 0, num_workers: int = 1, max_bins: int | None = None) -> list[ExampleBatch]:
        """Batches of the held-out examples, the same whenever they are asked for; a last one may be smaller.

        Args:
            max_bins: no batch of a source is begun when it has so many bins; None: all there are.
        """
        batches: list[ExampleBatch] = []
        for number, held_out in enumerate(self.held_out):
            rows, bins = np.flatnonzero(held_out), 0
            rows = rows[permute(np.arange(len(rows)), len(rows), key_of(HELD_OUT, number))] if len(rows) else rows
            for start in range(0, len(rows), self.config.examples_per_step):
                some = rows[start : start + self.config.examples_per_step]
                if len(some) > 1 and (max_bins is None or bins < max_bins):
                    batches.append(self._batch(some, number, len(batches), -1, StreamState(), rank, num_workers))
                    bins += batches[-1].num_bins
        return batches

    def _batch(
        self, chosen: np.ndarray, number: int, step: int, epoch: int, after: StreamState, rank: int, num_workers: int
    ) -> ExampleBatch:
        examples = self.sources[number]
        starts, ends = examples.first_E[chosen], examples.first_E[chosen + 1]
        counts = ends - starts
        example_N = np.repeat(np.arange(len(chosen)), counts)
        place_N = np.arange(len(example_N)) - np.repeat(np.cumsum(counts) - counts, counts)
        text_N = gather(examples.text_N, starts, ends)
        length_N = np.diff(examples.offsets_U)[text_N]
        sequences = self._sequences(length_N, number, step) if self.joined[number] and epoch >= 0 else None
        if sequences is None:
            sequences, length_S = [[n] for n in range(len(text_N))], length_N
        else:
            length_S = np.array([join_length(length_N[some]) for some in sequences])
        bins = fill_bins(length_S, self.config.tokens_per_bin)
        squares = np.square(length_S)
        dealt = deal_bins(np.array([squares[some].sum() for some in bins]), num_workers)
        where = f"source {number}, " + ("held out" if epoch < 0 else f"epoch {epoch}") + f", step {step}"
        return ExampleBatch(
            step=step,
            source=number,
            epoch=epoch,
            examples_B=chosen,
            example_N=example_N,
            place_N=place_N,
            key_N=gather(examples.key_N, starts, ends),
            text_N=text_N,
            bins=tuple(
                self._build(examples, text_N, [sequences[s] for s in bins[b].tolist()], f"{where}, bin {b}")
                for b in dealt[rank].tolist()
            ),
            num_bins=len(bins),
            max_bins=max(map(len, dealt)),
            num_tokens=int(length_S.sum()),
            capacity=len(bins) * self.config.tokens_per_bin,
            after=after,
        )

    def _sequences(self, length_N: np.ndarray, number: int, step: int) -> list[list[int]]:
        """Texts that stand together: the first so many in sequences of random length, the others each alone."""
        stop = round(len(length_N) * self.config.joined_share)
        goals = draws(np.full(stop, key_of(JOINED, self.config.seed, number, step), np.uint64), np.arange(stop))
        least = min(LEAST_JOINED, self.config.joined_tokens)
        goals = least + below(goals, self.config.joined_tokens - least + 1)
        sequences: list[list[int]] = []
        used = 0
        for text, length in enumerate(length_N[:stop].tolist()):
            # Without the special tokens of its own; the sequence has two.
            if not sequences or used + length - 2 > goals[len(sequences) - 1] - 2:
                sequences.append([])
                used = 0
            sequences[-1].append(text)
            used += length - 2
        return sequences + [[text] for text in range(stop, len(length_N))]

    def _build(self, examples: Examples, text_N: np.ndarray, sequences: list[list[int]], name: str) -> TextBin:
        parts: list[np.ndarray] = []
        tags: list[np.ndarray] = []
        ranges: list[tuple[int, int, int]] = []
        offsets, at = [0], 0
        for texts in sequences:
            together = len(texts) > 1
            if together:
                parts.append(np.array([self.cls_id], np.int32))
                at += 1
            for text in texts:
                number = int(text_N[text])
                tokens = examples.text(number)
                skipped = int(examples.skipped_U[number])
                if together:
                    # Alone, a text is pooled as `Embedder` does it, special tokens included.
                    tokens = tokens[1:-1]
                    skipped = min(max(skipped - 1, 0), len(tokens) - 1)
                ranges.append((at + skipped, at + len(tokens), text))
                parts.append(tokens)
                at += len(tokens)
                if len(examples.tags_X):
                    tags.append(examples.tags_X[examples.offsets_U[number] : examples.offsets_U[number + 1]])
            if together:
                parts.append(np.array([self.sep_id], np.int32))
                at += 1
            offsets.append(at)
        starts, ends, texts_R = np.array(ranges, np.int64).T
        return TextBin(
            tokens_T=np.concatenate(parts).astype(np.int64),
            cu_seqlens=np.array(offsets, np.int32),
            starts_R=starts,
            ends_R=ends,
            texts_R=texts_R,
            tags_T=np.concatenate(tags) if tags else np.empty(0, np.int64),
            name=name,
        )


def join_length(lengths: np.ndarray) -> int:
    """Tokens of a sequence of these texts: of several, with two special tokens for all instead of two for each."""
    return int(lengths.sum()) - 2 * (len(lengths) - 1)


def hash_tokens(tokens: np.ndarray) -> int:
    """64 bits that follow from the tokens alone."""
    return int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest(), "little")
