"""The training stream: token shards -> masked, packed bins, a pure function of (manifest, seed, epoch, step).

An epoch takes the shards in a shuffled order, some at a time (a *window*); all sequences of a window are shuffled and
packed together, and its bins shuffled again. Everything random is a hash of where it stands, so the state is five whole
numbers, and resuming costs one window. The global batch of a step is the same for any number of workers: each plans the
whole window and builds its own share of the bins. Nothing is padded; bins are only not quite full.
"""

import hashlib
import math
import queue
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from model.errors import InputError
from pipeline.masking import HELD_OUT, Masker, MaskingConfig
from pipeline.packing import deal_bins, fill_bins
from pipeline.permutation import key_of, permute
from pipeline.sequences import cut, cut_pairs, lay_out
from pipeline.shards import HELD_OUT_SPLIT, TRAIN, ShardEntry, TokenShards

Item = TypeVar("Item")

SHARDS, SEQUENCES, BINS = 4, 5, 6
"""Words of keys that say what is shuffled."""
STEPS_AHEAD = 2
"""Steps that wait ready while the device works."""


@dataclass(frozen=True, slots=True)
class StreamConfig:
    """What the steps of a run, or of one phase of it, are made of."""

    max_tokens: int = 1024
    """Longest sequence, [CLS] and [SEP] included."""
    tokens_per_bin: int = 8192
    """Most tokens of a bin, which is what goes through the model at once."""
    tokens_per_step: int = 65_536
    """Tokens of the global batch: so many bins as come nearest, at least one."""
    first_tokens_per_step: int | None = None
    """Tokens of the global batch at the beginning; None: `tokens_per_step` from the first step on."""
    warmup_tokens: int = 0
    """Tokens over which the global batch grows from the one to the other in a straight line, bins counted as full."""
    seed: int = 0
    num_steps: int = 0
    """Steps of the run, over which the rate of masking changes; needed only where it does."""
    window_shards: int = 8
    """Shards that are shuffled together."""
    ordering: bool = False
    """Make pairs of segments, half of them swapped, for sentence ordering."""
    causal: bool = False
    """Every token but the last of its sequence predicts the next one; nothing is masked."""
    masking: MaskingConfig = field(default_factory=MaskingConfig)

    def __post_init__(self) -> None:
        if self.max_tokens < 4:
            raise InputError(f"max_tokens is {self.max_tokens}; special tokens and a token need at least 4")
        if self.tokens_per_bin < self.max_tokens:
            raise InputError(
                f"tokens_per_bin is {self.tokens_per_bin}, less than max_tokens {self.max_tokens}; a sequence must fit"
            )
        first = self.tokens_per_step if self.first_tokens_per_step is None else self.first_tokens_per_step
        if not 0 < first <= self.tokens_per_step:
            raise InputError(f"first_tokens_per_step is {first}; it must be from 1 to {self.tokens_per_step}")
        if self.warmup_tokens < 0 or self.window_shards < 1:
            raise InputError("warmup_tokens must be 0 or more, window_shards 1 or more")
        if self.masking.final_rate is not None and self.num_steps < 1:
            raise InputError("masking.final_rate needs num_steps: the rate changes over them")

    def bins_at(self, bins_done: int) -> int:
        """Bins of the global batch after so many bins."""
        first = self.tokens_per_step if self.first_tokens_per_step is None else self.first_tokens_per_step
        done = min(bins_done * self.tokens_per_bin, self.warmup_tokens)
        risen = (self.tokens_per_step - first) * done // self.warmup_tokens if self.warmup_tokens else math.inf
        tokens = min(first + risen, self.tokens_per_step)
        return max(1, round(tokens / self.tokens_per_bin))


@dataclass(frozen=True, slots=True)
class StreamState:
    """Where a stream stands; what a checkpoint keeps of it."""

    step: int = 0
    """Steps done."""
    epoch: int = 0
    window: int = 0
    bin: int = 0
    """The next bin: its epoch, its window in the epoch, its number in the window."""
    bins: int = 0
    """Bins done, in all epochs."""


@dataclass(frozen=True, slots=True)
class Bin:
    """Sequences end to end, masked: what goes through the model at once. T tokens, S sequences, M to predict."""

    tokens_T: np.ndarray
    """int64 ids as the model sees them."""
    cu_seqlens: np.ndarray
    """int32, S + 1 offsets of the sequences."""
    max_seqlen: int
    masked_M: np.ndarray
    """int64, ascending: where something is to be predicted. There may be none."""
    targets_M: np.ndarray
    """int64 ids: what it is: the masked token there, or the next one."""
    ordering_S: np.ndarray
    """int64: 0 segments in their order, 1 swapped, -100 no pair."""
    documents_S: np.ndarray
    """uint64 keys of the sequences' documents."""
    starts_S: np.ndarray
    """int64: where the sequence begins in its document."""
    positions_T: np.ndarray
    """int32: where the token stands in its document, -1 for special ones."""
    epoch: int
    name: str
    """Which bin this is, for people."""

    @property
    def num_tokens(self) -> int:
        return len(self.tokens_T)

    @property
    def num_sequences(self) -> int:
        return len(self.documents_S)

    def digest(self) -> str:
        """A hash of what the model is given and of what it has to say."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.tokens_T, self.cu_seqlens, self.masked_M, self.targets_M, self.ordering_S):
            digest.update(array.tobytes() + b"|")
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Step:
    """One worker's share of a global batch."""

    step: int
    bins: tuple[Bin, ...]
    """Bins of this worker; none where there are fewer bins than workers."""
    num_bins: int
    """Of all workers together."""
    num_tokens: int
    """Of all workers together."""
    max_bins: int
    """Most bins that a worker has: those with one less may have to keep in step."""
    capacity: int
    """Tokens that all its bins could hold."""
    epoch: int
    """Of its last bin."""
    after: StreamState
    """What to resume with when this step is done."""


class Window:
    """The plan of some shards: which sequences are in which bin. Tokens stay on disk until a bin is built.

    Args:
        key: (seed, epoch) or (HELD_OUT,), and the number of the window.
    """

    def __init__(self, shards: TokenShards, entries: tuple[ShardEntry, ...], config: StreamConfig, *key: int) -> None:
        opened = [shards.shard(entry) for entry in entries]
        self.tokens_D = [
            shard.tokens_N[start:end]
            for shard in opened
            for start, end in zip(shard.offsets_D[:-1].tolist(), shard.offsets_D[1:].tolist(), strict=True)
        ]
        self.keys_D = np.concatenate([shard.keys_D for shard in opened])
        lengths_D = np.concatenate([np.diff(shard.offsets_D) for shard in opened]).astype(np.int64)
        if config.ordering:
            counts_D = np.concatenate([np.diff(shard.sentence_offsets_D) for shard in opened])
            sentences = np.concatenate([shard.sentences for shard in opened])
            sentences = sentences + np.repeat(np.cumsum(lengths_D) - lengths_D, counts_D)
            self.sequences = cut_pairs(lengths_D, config.max_tokens, self.keys_D, sentences, *key[:-1])
        else:
            self.sequences = cut(lengths_D, config.max_tokens)
        length_S = self.sequences.length_S
        order = permute(np.arange(len(length_S)), len(length_S), key_of(SEQUENCES, *key))
        bins = fill_bins(length_S[order], config.tokens_per_bin)
        self.bins = [order[bins[i]] for i in permute(np.arange(len(bins)), len(bins), key_of(BINS, *key)).tolist()]
        self.tokens_B = np.array([length_S[chosen].sum() for chosen in self.bins])
        self.cost_B = np.array([np.square(length_S[chosen]).sum() for chosen in self.bins])


class TokenStream:
    """Steps out of token shards.

    Raises:
        InputError: an empty corpus, or a vocabulary of special tokens only.
    """

    def __init__(self, shards: TokenShards, config: StreamConfig) -> None:
        manifest = shards.manifest
        if not manifest.num_tokens():
            raise InputError(f"the token shards in {shards.uri} hold no text to train on; prepare them from a corpus")
        self.shards, self.config = shards, config
        self.masker = Masker(
            config.masking,
            seed=config.seed,
            mask_id=manifest.mask_id,
            special_ids=manifest.special_ids,
            vocab_size=manifest.vocab_size,
        )
        self.num_windows = -(-len(manifest.shards[TRAIN]) // config.window_shards)

    def steps(
        self, state: StreamState = StreamState(), *, rank: int = 0, num_workers: int = 1
    ) -> Generator[Step, None, None]:
        """The steps from a state on, without end; they are made ready in a thread, which ends when this is closed.

        Raises:
            InputError: a shard is missing or changed.
        """
        assert 0 <= rank < num_workers
        return ahead(self._steps(state, rank, num_workers), STEPS_AHEAD)

    def _steps(self, state: StreamState, rank: int, num_workers: int) -> Generator[Step, None, None]:
        with ThreadPoolExecutor(1, thread_name_prefix="window") as planner:
            plans: dict[tuple[int, int], Future[Window]] = {}
            while True:
                wanted = self.config.bins_at(state.bins)
                picked: list[tuple[tuple[int, int], Window, int]] = []
                here, at = (state.epoch, state.window), state.bin
                while len(picked) < wanted:
                    # The next window is planned while this one is used; what lies behind is forgotten.
                    near = (here, self._following(here))
                    plans = {place: plans.get(place) or planner.submit(self._plan, place) for place in near}
                    window = plans[here].result()
                    stop = min(at + wanted - len(picked), len(window.bins))
                    picked += [(here, window, i) for i in range(at, stop)]
                    here, at = (here, stop) if stop < len(window.bins) else (self._following(here), 0)
                after = StreamState(state.step + 1, *here, at, state.bins + wanted)
                dealt = deal_bins(np.array([w.cost_B[i] for _, w, i in picked]), num_workers)
                rate = self.config.masking.rate_at(state.step / max(self.config.num_steps, 1))
                mine = [picked[i] for i in dealt[rank].tolist()]
                built = tuple(self._build(window, i, place, rate) for place, window, i in mine)
                tokens = sum(int(w.tokens_B[i]) for _, w, i in picked)
                most, capacity = max(map(len, dealt)), wanted * self.config.tokens_per_bin
                yield Step(state.step, built, wanted, tokens, most, capacity, picked[-1][0][0], after)
                state = after

    def _following(self, place: tuple[int, int]) -> tuple[int, int]:
        """The window after (epoch, number in the epoch)."""
        epoch, number = place
        return (epoch, number + 1) if number + 1 < self.num_windows else (epoch + 1, 0)

    def _plan(self, place: tuple[int, int]) -> Window:
        return Window(self.shards, self._entries(*place), self.config, self.config.seed, *place)

    def _entries(self, epoch: int, number: int) -> tuple[ShardEntry, ...]:
        """The shards of a window; those of an epoch's windows are all shards, in an order of the epoch's own."""
        entries = self.shards.manifest.shards[TRAIN]
        bounds = np.arange(self.num_windows + 1) * len(entries) // self.num_windows
        places = np.arange(bounds[number], bounds[number + 1])
        order = permute(places, len(entries), key_of(SHARDS, self.config.seed, epoch))
        return tuple(entries[i] for i in order.tolist())

    def _build(self, window: Window, number: int, place: tuple[int, int], rate: float) -> Bin:
        epoch, window_number = place
        chosen, manifest = window.bins[number], self.shards.manifest
        clear_T, cu_seqlens, positions_T = lay_out(
            window.sequences, chosen, window.tokens_D, cls_id=manifest.cls_id, sep_id=manifest.sep_id
        )
        documents_S = window.keys_D[window.sequences.document_S[chosen]]
        if self.config.causal:
            tokens_T, masked_M = clear_T, np.delete(np.arange(len(clear_T)), cu_seqlens[1:] - 1)
            targets_M = clear_T[masked_M + 1]
        else:
            tokens_T, masked_M = self.masker(clear_T, documents_S, cu_seqlens, positions_T, epoch=epoch, rate=rate)
            targets_M = clear_T[masked_M]
        where = "held-out" if epoch == HELD_OUT else f"epoch {epoch}"
        return Bin(
            tokens_T=tokens_T,
            cu_seqlens=cu_seqlens,
            max_seqlen=int(np.diff(cu_seqlens).max()),
            masked_M=masked_M,
            targets_M=targets_M,
            ordering_S=window.sequences.label_S[chosen],
            documents_S=documents_S,
            starts_S=window.sequences.start_S[chosen],
            positions_T=positions_T,
            epoch=epoch,
            name=f"{where} window {window_number} bin {number}",
        )

    def evaluation(self, *, rank: int = 0, num_workers: int = 1, max_bins: int | None = None) -> Iterator[Bin]:
        """The held-out share: the same bins under the same masks whenever it is asked, each for one of the workers.

        Args:
            max_bins: of all workers together; None: all there are.
        """
        entries = self.shards.manifest.shards[HELD_OUT_SPLIT]
        given = 0
        for number, first in enumerate(range(0, len(entries), self.config.window_shards)):
            some = entries[first : first + self.config.window_shards]
            window = Window(self.shards, some, self.config, HELD_OUT, number)
            for i in range(len(window.bins)):
                if max_bins is not None and given == max_bins:
                    return
                if given % num_workers == rank:
                    yield self._build(window, i, (HELD_OUT, number), self.config.masking.evaluation_rate)
                given += 1


def ahead(items: Generator[Item, None, None], count: int) -> Generator[Item, None, None]:
    """The items, drawn in a thread up to `count` before they are asked for; what drawing raises is raised here."""
    drawn: queue.Queue[Item | BaseException] = queue.Queue(maxsize=count)
    left = threading.Event()

    def offer(item: Item | BaseException) -> bool:
        while not left.is_set():
            with suppress(queue.Full):
                drawn.put(item, timeout=0.2)
                return True
        return False

    def draw() -> None:
        with closing(items):
            try:
                for item in items:
                    if not offer(item):
                        return
                offer(StopIteration())
            except BaseException as error:
                offer(error)

    thread = threading.Thread(target=draw, name="stream", daemon=True)
    thread.start()
    try:
        while True:
            item = drawn.get()
            if isinstance(item, StopIteration):
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        left.set()
        thread.join(timeout=60)
