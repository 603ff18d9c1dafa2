"""Following a job's log over connections that break: every line once, in order; an end where there is none to be had.

The server is a real one that speaks as much of the protocol as following needs, and breaks connections as told.
"""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest
from clusters import free_port

from cluster import submission
from cluster.submission import Follower, Unknown, Unreachable, connect


class Status(str):
    def is_terminal(self) -> bool:
        return self in ("SUCCEEDED", "FAILED")


class Server:
    """A job's log and how connections to it go: each gives so many pieces from the log's beginning, then breaks."""

    def __init__(self, log: str, connections: list[int | str]) -> None:
        self.log, self.connections = log, connections
        self.asked = 0

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        how = self.connections.pop(0) if self.connections else "all"
        pieces = [self.log[at : at + 7] for at in range(0, len(self.log), 7)]
        for piece in pieces if how in ("all", "closed early") else pieces[: int(how)]:
            yield piece
        if how != "all":
            raise ConnectionResetError(how)

    def get_job_info(self, job: str) -> SimpleNamespace:
        if job == "nothing":
            raise RuntimeError("Request failed with status code 404: there is none.")
        return SimpleNamespace(status=Status("RUNNING" if self.connections else "SUCCEEDED"))

    def get_job_logs(self, job: str) -> str:
        return self.log + "the last words"


LOG = "".join(f"line {number}\n" for number in range(20))


@pytest.mark.parametrize("connections", [[], [3], [1, 4, 4, 2], [0, 0, 9], ["closed early", 2]])
def test_every_character_is_shown_once(connections, monkeypatch):
    monkeypatch.setattr(submission, "LONGEST_PAUSE_S", 0.01)
    shown: list[str] = []
    follower = Follower(Server(LOG, list(connections)), "job", shown.append)
    assert follower.follow().status == "SUCCEEDED"
    assert "".join(shown) == LOG + "the last words"


def test_a_server_that_stays_away_ends_the_following_and_not_the_job(monkeypatch):
    monkeypatch.setattr(submission, "LONGEST_PAUSE_S", 0.01)

    class Away(Server):
        def get_job_info(self, job: str) -> SimpleNamespace:
            raise ConnectionError("nobody is there")

    with pytest.raises(Unreachable, match=r"may go on: nightloom attach job"):
        Follower(Away(LOG, []), "job", lambda piece: None, patience_s=0.5).follow()


def test_a_job_that_does_not_exist_is_not_waited_for():
    with pytest.raises(Unknown, match="nightloom jobs"):
        Follower(Server(LOG, []), "nothing", lambda piece: None).follow()


def test_nobody_answers(monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(Unreachable, match=r"no job server of Ray at http://127\.0\.0\.1"):
        connect(f"http://127.0.0.1:{free_port()}")


def test_a_connection_that_lasted_long_before_it_broke_is_made_again(monkeypatch):
    """Patience counts from when the server last said something."""
    monkeypatch.setattr(submission, "LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr(submission, "PAUSE_S", 0.01)

    class Slow(Server):
        async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
            async for piece in super().tail_job_logs(job):
                await asyncio.sleep(0.05)
                yield piece

    shown: list[str] = []
    assert Follower(Slow(LOG, [15]), "job", shown.append, patience_s=0.5).follow().status == "SUCCEEDED"
    assert "".join(shown) == LOG + "the last words"
