"""`nightloom prepare`: the same shards from any number of workers, after any crash, on a disk and on S3."""

import hashlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.cli import main
from jobs.configuration import PrepareConfiguration
from jobs.prepare import run_prepare
from model.errors import InputError
from model.folder import load_tokenizer, tokenizer_hash
from pipeline.columns import DocumentColumns
from pipeline.preparation import write_shards
from pipeline.shards import MANIFEST, TokenShards, list_names, read_file, write_file
from pipeline.stream import StreamConfig, TokenStream
from pipeline.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 documents in two files, ten of them there twice, one empty, one broken."""
    folder = tmp_path_factory.mktemp("source")
    texts = [f"Number {i} has a text. " + f"It says {i * i} and then {i * 7}. " * (i % 40) for i in range(150)]
    rows = pa.table({"id": [f"a{i}" for i in range(100)], "text": texts[:99] + [" \n"]})
    pq.write_table(rows, folder / "a.parquet")
    lines = [json.dumps({"id": f"b{i}", "text": text}) for i, text in enumerate(texts[89:])]
    (folder / "b.jsonl").write_text("\n".join([*lines[:30], "{not json", *lines[30:]]))
    return folder


def configuration(source: Path, tokens: object, **changes: object) -> PrepareConfiguration:
    settings = {"train_tokenizer": 400, "heldout": 0.1, "shard_bytes": 20_000, **changes}
    return PrepareConfiguration(source=str(source), tokens=str(tokens), **settings)  # type: ignore[arg-type]


def contents(uri: str) -> dict[str, str]:
    """Hashes of the files that matter, by name."""
    names = [name for name in list_names(uri) if not name.startswith("_runs/")]
    return {name: hashlib.sha256(read_file(uri, name) or b"").hexdigest() for name in names}


@pytest.fixture(scope="module")
def place(source: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """The corpus prepared without disturbance."""
    folder = tmp_path_factory.mktemp("tokens") / "place"
    report = run_prepare(configuration(source, folder))
    assert report.status == "prepared"
    assert (report.read, report.empty, report.dead, report.duplicate) == (162, 1, 1, 10)
    assert report.train + report.heldout == 150
    assert report.shards >= 5
    return folder


def test_what_is_prepared_is_ready_to_train_on(source: Path, place: Path) -> None:
    shards = TokenShards.open(str(place))
    manifest = shards.manifest
    assert manifest.counts["train"] == manifest.num_documents() == sum(manifest.lengths["train"].values())
    tokenizer = load_tokenizer(shards.tokenizer_folder())
    stream = TokenStream(shards, StreamConfig(max_tokens=2048, tokens_per_bin=4096, tokens_per_step=4096))
    with closing(stream.steps()) as steps:
        [one] = next(steps).bins
    first = slice(one.cu_seqlens[0] + 1, one.cu_seqlens[1] - 1)
    tokens = one.tokens_T.copy()
    tokens[one.masked_M] = one.targets_M
    texts = {row["text"] for row in pq.read_table(source / "a.parquet").to_pylist()}
    texts |= {json.loads(x)["text"] for x in (source / "b.jsonl").read_text().splitlines() if x.endswith("}")}
    assert tokenizer.decode(tokens[first].tolist()) in texts
    [record] = [json.loads(p.read_text()) for p in (place / "_runs").iterdir()]
    assert record["report"]["train"] == manifest.num_documents()
    assert record["dead"][0]["stage"] == "read"


def test_a_second_run_does_nothing_and_another_corpus_is_refused(source: Path, place: Path, tmp_path: Path) -> None:
    before = contents(str(place))
    report = run_prepare(configuration(source, place))
    assert report.status == "unchanged"
    assert "Nothing to do" in report.summary()
    for changed in ({"heldout": 0.2}, {"train_tokenizer": 300}):
        with pytest.raises(InputError, match="another corpus, or made with other settings"):
            run_prepare(configuration(source, place, **changed))
    (tmp_path / "x.txt").write_text("Another text.")
    with pytest.raises(InputError, match="another corpus"):
        run_prepare(configuration(tmp_path, place))
    assert contents(str(place)) == before


def test_an_unfinished_run_goes_on(source: Path, place: Path, tmp_path: Path) -> None:
    """What a killed run leaves: some shards with their records, a shard without, a stray one, no manifest."""
    names = sorted(name for name in list_names(str(place)) if name.endswith(".arrow"))
    manifest = TokenShards.open(str(place)).manifest
    entries = {entry.name: entry for some in manifest.shards.values() for entry in some}
    for name in [*list_names(str(place)), "train-00999.arrow"]:
        if name != MANIFEST and not name.startswith("_runs"):
            write_file(str(tmp_path), name, b"half a sha" if name == names[-1] else read_file(str(place), name) or b"")
    for name in names[:2]:
        record = {
            "fingerprint": manifest.corpus,
            "tokenizer": manifest.tokenizer,
            "entry": {
                field: getattr(entries[name], field) for field in ("name", "documents", "tokens", "bytes", "hash")
            },
            "lengths": {"99": 1},
        }
        write_file(str(tmp_path), f"parts/{name}.json", json.dumps(record).encode())
    kept = os.stat(tmp_path / names[0]).st_mtime_ns
    report = run_prepare(configuration(source, tmp_path))
    after = contents(str(tmp_path))
    expected = contents(str(place))
    assert {**after, MANIFEST: ""} == {**expected, MANIFEST: ""}
    assert os.stat(tmp_path / names[0]).st_mtime_ns == kept, "a finished shard is not made again"
    assert report.tokens == manifest.num_tokens()
    # Only the lengths, which the records above made up, tell that they were believed.
    assert read_file(str(tmp_path), MANIFEST) != read_file(str(place), MANIFEST)
    assert TokenShards.open(str(tmp_path)).manifest.shards == manifest.shards
    assert not (tmp_path / "parts").exists()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["disk", "s3"])
def test_a_killed_run_is_repeated(
    where: str, source: Path, place: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """kill -9 of the driver and all its workers, then a second run: the bytes of the undisturbed one, which had another
    Ray. Each run has its own, as it has where there is no cluster."""
    uri = str(tmp_path / "tokens")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with pytest.MonkeyPatch.context() as patch:
        if where == "s3":
            uri = f"s3://bucket/{tmp_path.name}/tokens"
            for name, value in request.getfixturevalue("s3_server").items():
                patch.setenv(name, value)
                environment[name] = value
        command = [sys.executable, "-m", "jobs.cli", "prepare", str(source), uri, "--train-tokenizer", "400"]
        command += ["--set", "heldout=0.1", "--set", "shard_bytes=20000", "--json"]
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, start_new_session=True
        ) as run:
            limit = time.monotonic() + 120
            while not any(name.startswith("parts/") for name in list_names(uri)):
                assert run.poll() is None
                assert time.monotonic() < limit
                time.sleep(0.01)
            os.killpg(run.pid, signal.SIGKILL)
        assert read_file(uri, MANIFEST) is None, "it was killed while it wrote"
        again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=240, check=True)
        assert json.loads(again.stdout)["status"] == "prepared"
        assert contents(uri) == contents(str(place))


def test_s3_holds_the_same_bytes(
    source: Path, place: Path, s3_server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Ray, whose workers were started before there was a server; with it in the test above."""
    for name, value in {**s3_server, "NIGHTLOOM_CACHE": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("jobs.prepare.written_shards", written_here)
    uri = f"s3://bucket/{tmp_path.name}/tokens"
    assert run_prepare(configuration(source, uri)).status == "prepared"
    assert run_prepare(configuration(source, uri)).status == "unchanged"
    assert contents(uri) == contents(str(place))
    config = StreamConfig(max_tokens=512, tokens_per_bin=2048, tokens_per_step=4096, window_shards=2)

    def digests(uri: str) -> list[str]:
        with closing(TokenStream(TokenShards.open(uri), config).steps()) as steps:
            return [b.digest() for step in itertools.islice(steps, 12) for b in step.bins]

    assert digests(uri) == digests(str(place))
    assert len(list((tmp_path / "tokens").rglob("*.arrow"))) >= 4, "copies in the cache"


@pytest.mark.parametrize("max_tokens", [1024, 8192])
def test_the_bundled_corpus_fills_its_bins(bundled: TokenShards, max_tokens: int) -> None:
    """Under 1 % of the bins' budget is not used, in every epoch; no plan has fewer bins."""
    stream = TokenStream(bundled, StreamConfig(max_tokens=max_tokens, tokens_per_bin=8192, tokens_per_step=8192))
    epochs: dict[int, list[int]] = {}
    with closing(stream.steps()) as steps:
        for step in itertools.takewhile(lambda step: step.bins[0].epoch < 3, steps):
            epochs.setdefault(step.bins[0].epoch, []).append(step.num_tokens)
    for sizes in epochs.values():
        assert len(sizes) > 60
        assert sum(sizes) > 0.99 * 8192 * len(sizes)
        assert len(sizes) == math.ceil(sum(sizes) / 8192)


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> TokenShards:
    uri = str(tmp_path_factory.mktemp("bundled") / "tokens")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.prepare.written_shards", written_here)
        tokenizer = str(ROOT / "tests" / "golden" / "tokenizer")
        run_prepare(PrepareConfiguration(source=str(ROOT / "corpus"), tokens=uri, tokenizer=tokenizer, heldout=0.0))
    return TokenShards.open(uri)


def written_here(
    tasks: list[pa.Table], uri: str, columns: DocumentColumns, vocabulary: Vocabulary, fingerprint: str
) -> Iterator[dict[str, Any]]:
    for task in tasks:
        for table in write_shards(
            task,
            uri=uri,
            columns=columns,
            tokenizer_hash=vocabulary.hash,
            vocab_size=vocabulary.size,
            fingerprint=fingerprint,
        ):
            yield from map(json.loads, table["record"].to_pylist())


def test_a_given_tokenizer(source: Path, tmp_path: Path, tiny_model_folder: Path, ray_session: None) -> None:
    run_prepare(configuration(source, tmp_path / "t", train_tokenizer=None, tokenizer=str(tiny_model_folder)))
    expected = tokenizer_hash(tiny_model_folder)
    shards = TokenShards.open(str(tmp_path / "t"), tokenizer=expected)
    assert tokenizer_hash_of(shards) == expected
    with pytest.raises(InputError, match="another tokenizer"):
        TokenShards.open(str(tmp_path / "t"), tokenizer="0" * 32)


def tokenizer_hash_of(shards: TokenShards) -> str:
    raw = (Path(shards.tokenizer_folder()) / "tokenizer.json").read_bytes()
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


def test_what_is_wrong_is_one_line_and_status_2(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def complaint(*arguments: object) -> str:
        assert main(["prepare", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    full, empty = tmp_path / "full", tmp_path / "empty"
    full.mkdir()
    empty.mkdir()
    (full / "training.arrow").write_text("x")
    (empty / "a.txt").write_text("  \n")
    train = ("--train-tokenizer", 400)
    assert "--tokenizer FOLDER, or have one trained" in complaint(source, tmp_path / "t")
    assert "--tokenizer FOLDER, or have one trained" in complaint(source, tmp_path / "t", "--tokenizer", full, *train)
    assert "is not empty: it holds training.arrow" in complaint(source, full, *train)
    assert "holds no text to train on; read 1" in complaint(empty, tmp_path / "t", *train)
    assert "no tokenizer.json" in complaint(source, tmp_path / "t", "--tokenizer", full)
    assert "at least 261" in complaint(source, tmp_path / "t", "--train-tokenizer", 200)
    assert "the nearest is 'heldout'" in complaint(source, tmp_path / "t", *train, "--set", "held_out=0.1")
    assert "heldout is 1.5" in complaint(source, tmp_path / "t", *train, "--set", "heldout=1.5")
