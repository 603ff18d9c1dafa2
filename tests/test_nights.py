"""Nights at random against a model of what the table must hold: hypothesis seeks an order of events that breaks it.

Between runs documents are added, changed, taken away, doubled, emptied, and poisoned (no JSON; or the encoder fails on
them). A run ends well, or breaks at a random moment inside a fragment, a commit or the publication, or meets a second
run that is started meanwhile; readers are taken back to an earlier version. Everything but Ray is real: the workers'
functions run in this process, on a tiny encoder.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lance
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from nights import rows_of

from jobs.configuration import EmbedConfiguration, load
from jobs.embed import run_embed
from model.errors import InputError
from pipeline import apply, workers
from pipeline.lease import Lease
from pipeline.table import PUBLISHED, EmbeddingTable

FILES = ("a.parquet", "b.parquet", "c.jsonl")
NO_JSON = None
"""Stands for a line that cannot be read."""
POISON = "poison"
"""A word on which the encoder fails."""
EDITS = ("add or double", "change", "change", "take away", "empty", "poison the encoder", "break the line")
SETS = (
    "vectors.dtype=float32",
    "chunking.granularity=chunk",
    "chunking.chunk_tokens=8",
    "compute.block_chars=60",
    "compute.actors=1",
    "compute.commit_every_s=0",
)

names = st.sampled_from([f"doc-{number}" for number in range(12)])
texts = st.integers(1, 12).flatmap(lambda count: st.integers(0, 99).map(lambda seed: f"text {seed} word. " * count))
files = st.sampled_from(FILES)


class PowerCut(BaseException):
    """The end of a run that nothing catches."""


@lru_cache(maxsize=1)
def encoder(model: str, settings: str) -> Any:
    """The stage that embeds, loaded once, failing on documents with the poison in them."""
    from pipeline.embedding import EmbedStage

    stage = EmbedStage(model, **LOADED[settings])
    bad = stage.embedder.tokenizer.encode(POISON).ids[1:-1]
    embed = stage.embedder.embed_segments

    def embed_segments(batch: Any, *rest: Any) -> Any:
        ids = batch.tokens_T.tolist()
        if any(ids[at : at + len(bad)] == bad for at in range(len(ids))):
            raise RuntimeError("poisoned")
        return embed(batch, *rest)

    stage.embedder.embed_segments = embed_segments
    return stage


LOADED: dict[str, dict[str, Any]] = {}


def encoder_of(job: workers.Job) -> Any:
    options = {**job.embedding, "chunking": job.chunking, "device": "cpu", "tokens_per_batch": 64}
    model = options.pop("model_path")
    LOADED[repr(options)] = options
    return encoder(model, repr(options))


def in_process(job: workers.Job, work: Any, watch: Any = None) -> Iterator[dict[str, Any]]:
    """`written_fragments` without Ray: the same functions on the same tables, one after the other."""
    embed_and_write = workers.EmbedAndWrite(replace(job, encoder=encoder_of), watch=None)
    for item in work:
        for tokens in workers.read_and_tokenize(item.rows, job=job, watch=None):
            yield from embed_and_write(tokens).to_pylist()


class Calm:
    """A watch over nothing: no process dies here, so none has worked for nothing."""

    def __init__(self, workers: int) -> None:
        import ray

        self.wasted = SimpleNamespace(remote=lambda: ray.put(0))


class Nights(RuleBasedStateMachine):
    """`corpus` is what lies on disk; `held` and `shown` are what the newest and the published version must hold."""

    model: Path

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="nights-"))
        self.table = self.folder / "table.lance"
        self.corpus: dict[str, list[tuple[str, str | None]]] = {file: [] for file in FILES}
        self.held: dict[str, str] = {}
        self.shown: dict[str, str] | None = None
        self.history: dict[int, dict[str, str]] = {}
        """What each published version held."""
        self.texts: dict[bytes, str] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    # What happens to the corpus

    @initialize(names=st.lists(names, min_size=3, max_size=6, unique=True), text=texts)
    def begin(self, names: list[str], text: str) -> None:
        for number, name in enumerate(names):
            self.corpus[FILES[number % 3]].append((name, f"{text} {number}"))
        self.write()

    @rule(
        edits=st.lists(
            st.tuples(st.sampled_from(EDITS), files, names, texts, st.integers(0, 99)), min_size=1, max_size=4
        )
    )
    def day(self, edits: list[tuple[str, str, str, str, int]]) -> None:
        """What people do to the corpus between two nights."""
        for kind, file, name, text, at in edits:
            held = self.corpus[file]
            if kind == "add or double" or not held:
                held.append((name, text))
                continue
            at %= len(held)
            old, _ = held[at]
            new: dict[str, list[tuple[str, str | None]]] = {
                "change": [(old, text)],
                "take away": [],
                "empty": [(old, " ")],
                "poison the encoder": [(old, f"{text} {POISON}")],
                "break the line": [(old, NO_JSON if file.endswith(".jsonl") else text)],
            }
            held[at : at + 1] = new[kind]
        self.write()

    def write(self) -> None:
        source = self.folder / "corpus"
        source.mkdir(exist_ok=True)
        for file, rows in self.corpus.items():
            if file.endswith(".parquet"):
                columns = {"id": [name for name, _ in rows], "text": [text for _, text in rows]}
                schema = pa.schema([("id", pa.string()), ("text", pa.string())])
                pq.write_table(pa.table(columns, schema=schema), source / file)
            else:
                lines = ["{" if text is NO_JSON else json.dumps({"id": name, "text": text}) for name, text in rows]
                (source / file).write_text("".join(f"{line}\n" for line in lines))

    # What the model expects

    def expected(self, *, delete: bool) -> tuple[dict[str, str], dict[str, int]]:
        """What the table holds after a run, and what the run reports."""
        counts = dict.fromkeys(("read", "embedded", "unchanged", "empty", "duplicate", "dead"), 0)
        claimed: dict[str, str] = {}
        emptied, seen = set(), set()
        for file in sorted(self.corpus):
            for name, text in self.corpus[file]:
                counts["read"] += 1
                if text is NO_JSON:
                    counts["dead"] += 1
                    continue
                seen.add(name)
                if not text.strip():
                    counts["empty"] += 1
                    emptied.add(name)
                elif name in claimed:
                    counts["duplicate"] += 1
                else:
                    claimed[name] = text
        held = dict(self.held)
        for name, text in claimed.items():
            kind = "unchanged" if held.get(name) == text else "dead" if POISON in text else "embedded"
            counts[kind] += 1
            if kind == "embedded":
                held[name] = text
        gone = {name for name in held if (name in emptied and name not in claimed) or (delete and name not in seen)}
        return {name: text for name, text in held.items() if name not in gone}, counts

    # What happens to the table

    def configuration(self, delete: bool) -> EmbedConfiguration:
        given = {"source": str(self.folder / "corpus"), "table": str(self.table), "model": str(self.model)}
        return load(EmbedConfiguration, file=None, sets=SETS, given=given | {"delete_missing": delete})

    @rule(delete=st.booleans())
    def night(self, delete: bool) -> None:
        self.finish(delete)

    def finish(self, delete: bool) -> None:
        wanted, counts = self.expected(delete=delete)
        report = run_embed(self.configuration(delete))
        assert {name: getattr(report, name) for name in counts} == counts
        self.settle(wanted)

    def settle(self, wanted: dict[str, str]) -> None:
        """A run ended well: the newest version holds `wanted`; one that changed nothing did not move the tag."""
        self.held = wanted
        published = EmbeddingTable.open(str(self.table)).published_version()
        if published in self.history:
            self.shown = self.history[published]
        else:
            self.shown = self.history[published] = wanted

    @rule(
        delete=st.booleans(),
        moment=st.sampled_from(["fragment", "commit", "committed", "tag", "tagged"]),
        at=st.integers(0, 6),
    )
    def power_cut(self, delete: bool, moment: str, at: int) -> None:
        """A run that breaks at a moment, if it gets there. What it committed before stays."""
        wanted, _ = self.expected(delete=delete)
        with pytest.MonkeyPatch.context() as patch:
            cut(patch, moment, at)
            try:
                run_embed(self.configuration(delete))
            except PowerCut:
                pass
            else:
                self.settle(wanted)
                return
        table = EmbeddingTable.find(str(self.table))
        if table is None:
            assert self.shown is None
            return
        newest = self.read(None)
        for name in {*newest, *self.held, *wanted}:
            assert newest.get(name) in (self.held.get(name), wanted.get(name)), name
        self.held = newest
        published = table.published_version()
        if published is not None and published not in self.history:
            assert moment in ("tag", "tagged")
            assert self.held == wanted
            self.shown = self.history[published] = wanted

    @rule(delete=st.booleans())
    def two_at_once(self, delete: bool) -> None:
        """A second run that is started while one goes is refused, and changes nothing."""
        wanted, counts = self.expected(delete=delete)
        refused = []

        def meanwhile(job: workers.Job, work: Any, watch: Any) -> Iterator[dict[str, Any]]:
            for row in in_process(job, work):
                if not refused:
                    before = lance.dataset(str(self.table)).version
                    with pytest.raises(InputError, match="another run is writing"):
                        run_embed(self.configuration(delete))
                    refused.append(before)
                    assert lance.dataset(str(self.table)).version == before
                yield row

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(apply, "written_fragments", meanwhile)
            report = run_embed(self.configuration(delete))
        assert {name: getattr(report, name) for name in counts} == counts
        assert len(refused) == bool(counts["embedded"] or refused)
        self.settle(wanted)

    @precondition(lambda self: len(self.history) > 1)
    @rule(draw=st.integers(0, 99))
    def roll_back(self, draw: int) -> None:
        """Readers go to a version that was published before."""
        table = EmbeddingTable.open(str(self.table))
        kept = [version for version in table.kept_versions() if version in self.history]
        version = kept[draw % len(kept)]
        roll_back(str(self.table), version)
        self.shown = self.history[version]

    # What must hold at any time

    def read(self, version: int | str | None) -> dict[str, str]:
        """{document: text} of a version; every document is whole, once, and of a text that it had."""
        for rows in self.corpus.values():
            self.texts |= {digest(text): text for _, text in rows if text}
        found = {}
        for name, rows in rows_of(lance.dataset(str(self.table), version=version)).items():
            assert [row[0] for row in rows] == list(range(len(rows))), f"{name} is partial or doubled"
            assert len({row[-1] for row in rows}) == 1
            found[name] = self.texts[rows[0][-1]]
            assert rows[-1][2] == len(found[name].rstrip()) or rows[-1][2] == len(found[name]), f"{name} has no end"
        return found

    @invariant()
    def table_is_what_the_model_says(self) -> None:
        if EmbeddingTable.find(str(self.table)) is None:
            assert not self.held
            return
        assert self.read(None) == self.held
        if self.shown is None:
            assert EmbeddingTable.open(str(self.table)).published_version() is None
        else:
            assert self.read(PUBLISHED) == self.shown


def digest(text: str) -> bytes:
    import hashlib

    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def roll_back(table: str, version: int) -> None:
    """`nightloom rollback`."""
    from jobs.history import run_rollback

    run_rollback(table, version)


def cut(patch: pytest.MonkeyPatch, moment: str, at: int) -> None:
    """Break the run at the `at`-th fragment, before or after the `at`-th commit, before or after the tag moved."""
    passed = 0

    def due() -> None:
        nonlocal passed
        if passed == at:
            raise PowerCut
        passed += 1

    def fragments(job: workers.Job, work: Any, watch: Any) -> Iterator[dict[str, Any]]:
        for row in in_process(job, work):
            due()
            yield row

    def around(method: Callable[..., Any], *, before: bool) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            if before:
                due()
            result = method(*arguments, **named)
            if not before:
                due()
            return result

        return wrapped

    if moment == "fragment":
        patch.setattr(apply, "written_fragments", fragments)
    elif moment in ("commit", "committed"):
        patch.setattr(EmbeddingTable, "_transact", around(EmbeddingTable._transact, before=moment == "commit"))
    else:
        at = 0
        patch.setattr(EmbeddingTable, "publish", around(EmbeddingTable.publish, before=moment == "tag"))


@pytest.fixture
def nights(ray_session, tiny_model_folder, monkeypatch) -> type[Nights]:
    """Ray is there for what the driver asks of it; nothing runs in it."""
    monkeypatch.setattr(apply, "written_fragments", in_process)
    monkeypatch.setattr(apply, "start_watch", Calm)
    take = Lease.take
    monkeypatch.setattr(Lease, "take", lambda uri, run: take(uri, run, beat_s=0.05))
    monkeypatch.setattr("pipeline.lease.BEAT_S", 0.1)
    monkeypatch.setattr(Nights, "model", tiny_model_folder, raising=False)
    return Nights


EVENTS = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, print_blob=True)


def test_some_nights(nights):
    run_state_machine_as_test(nights, settings=settings(EVENTS, max_examples=6, stateful_step_count=15))


@pytest.mark.slow
def test_many_nights(nights):
    run_state_machine_as_test(nights, settings=settings(EVENTS, max_examples=40, stateful_step_count=30))
