"""Jobs on a cluster through Ray's job server: connecting to it, and following a job to its end.

A submission id that is taken is refused by the server, whoever asks first; that is what keeps two jobs of one name
apart. The log is the job's stdout and stderr in one; a connection that is lost is made again, and what was shown before
is not shown twice.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable
from typing import Any

ADDRESS = "RAY_API_SERVER_ADDRESS"
"""Ray's variable with the address of the job server; it wins over what its client is told."""
PATIENCE_S = 600.0
"""How long a lost connection is tried again before following ends; the job goes on without us."""
SILENCE_S = 30.0
"""After so long without a line the connection is made anew: a dead one is as silent as a job that computes."""
PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
SETTLE_S = 0.2
"""Between the end of a log and the question whether the job has ended."""

log = logging.getLogger(__name__)


class Unreachable(ConnectionError):
    """There is no job server at the address, or it lets nobody in: one line that says which."""


class Unknown(LookupError):
    """The server has no such job."""


def connect(address: str | None) -> Any:
    """A `JobSubmissionClient`. A token of Ray's goes along where the environment says so (RAY_AUTH_MODE=token), and
    where the server wants one and this user has one: Ray makes one at the first local session, and from then on every
    `ray start` wants it.

    Args:
        address: of the job server, as in http://head:8265; None: $RAY_API_SERVER_ADDRESS, or a cluster of this machine.

    Raises:
        Unreachable: nobody answers there.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in ("sdk", "dashboard_sdk"):
        for module in ("ray.dashboard.modules", "ray.dashboard.modules.job"):
            logging.getLogger(f"{module}.{name}").setLevel(logging.ERROR)
    before = os.environ.get(ADDRESS)
    where = address or before or "this machine"
    os.environ[ADDRESS] = where if address else before or ""
    try:
        try:
            return JobSubmissionClient(address)
        except AuthenticationError:
            if not use_own_token():
                raise
            return JobSubmissionClient(address)
    except AuthenticationError:
        raise Unreachable(
            f"the job server at {where} wants a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Unreachable(f"no job server of Ray at {where}: {reason}") from None
    finally:
        os.environ.pop(ADDRESS)
        if before is not None:
            os.environ[ADDRESS] = before


def use_own_token() -> bool:
    """Send the token of ~/.ray from now on, as `ray.init` does, unless the environment says what to do; whether there
    is one.
    """
    from ray._private.authentication import authentication_token_setup as tokens

    logging.getLogger(tokens.__name__).setLevel(logging.ERROR)
    return tokens.AUTH_MODE_ENV_VAR not in os.environ and tokens.maybe_enable_token_auth_if_token_available(False)


def find_job(client: Any, job: str) -> Any:
    """What the server knows of a job.

    Raises:
        Unknown: nothing.
    """
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        if "404" in str(error):
            raise Unknown(f"there is no job {job!r}; `nightloom jobs` lists them") from None
        raise


class Follower:
    """Shows a job's log as it grows, each piece once, over as many connections as it takes.

    Args:
        show: called with pieces of the log, in order.
        patience_s: how long a server that does not answer is waited for.
    """

    def __init__(self, client: Any, job: str, show: Callable[[str], None], *, patience_s: float = PATIENCE_S) -> None:
        self.client, self.job, self.show, self.patience_s = client, job, show, patience_s
        self.seen = 0
        """Characters of the log that were shown."""
        self.answered = time.monotonic()
        """When the server last said something."""

    def follow(self) -> Any:
        """Show the log to the end of the job; what the server knows of it then.

        Raises:
            Unknown: there is no such job.
            Unreachable: the server did not answer for `patience_s`.
        """
        self.answered, pause_s = time.monotonic(), PAUSE_S
        while True:
            begun = time.monotonic()
            try:
                # Asked first: the server takes seconds to say the whole log of a job that has ended piece by piece.
                info = find_job(self.client, self.job)
                self.answered = time.monotonic()
                if info.status.is_terminal():
                    self._show_from(0, self.client.get_job_logs(self.job))
                    return info
                asyncio.run(self._tail())
                time.sleep(SETTLE_S)
            except Unknown:
                raise
            except Exception as error:  # requests, aiohttp and Ray raise what they like when a server goes away
                if time.monotonic() - self.answered > self.patience_s:
                    raise Unreachable(
                        f"the job server has not answered for {self.patience_s:.0f} s; {self.job} may go on: "
                        f"nightloom attach {self.job}"
                    ) from error
                log.warning("the connection to %s was lost (%s), trying again", self.job, type(error).__name__)
                if self.answered > begun:
                    pause_s = PAUSE_S  # it was there: only a server that stays away is asked less and less often
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _tail(self) -> None:
        """Show what one connection brings, until the log ends or is silent."""
        position = 0
        pieces = self.client.tail_job_logs(self.job)
        try:
            while True:
                piece = await asyncio.wait_for(anext(pieces), SILENCE_S)
                self.answered = time.monotonic()
                self._show_from(position, piece)
                position += len(piece)
        except (StopAsyncIteration, TimeoutError):
            pass
        finally:
            await pieces.aclose()

    def _show_from(self, position: int, piece: str) -> None:
        """Show what of a piece, which begins at this character of the log, was not shown."""
        if position + len(piece) > self.seen:
            self.show(piece[max(self.seen - position, 0) :])
            self.seen = position + len(piece)
