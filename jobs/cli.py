"""The command line, `nightloom COMMAND`: what every command does before it runs and after it has ended.

The commands stand in `jobs/commands.py` and its siblings. Exit status: 0 done; 2 the user's input or configuration is
wrong, said in one line; 3 finished but not published; 1 a fault.
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout

from jobs.cluster_commands import add_cluster_commands
from jobs.commands import Parser, add_table_commands
from jobs.follow import REPORTING, VERSIONS, Ended, mark
from jobs.model_commands import add_model_commands
from jobs.report import BAD_ENDS
from model.errors import InputError

DONE, FAULT, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130

log = logging.getLogger(__name__)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="nightloom", description="Embed corpora of long documents into versioned tables.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    add_table_commands(commands)
    add_model_commands(commands)
    add_cluster_commands(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    verbose = False
    try:
        options = make_parser().parse_args(arguments)
        verbose = options.verbose
        with nullcontext() if verbose else native_messages_hidden():
            set_up_messages(verbose)
            if pins := os.environ.pop(VERSIONS, ""):
                from jobs.submit import check_versions

                check_versions(pins)
            # What a command means to be on stdout, it writes there; nothing else gets there: Ray prints that a machine
            # is lost.
            options.stdout = sys.stdout
            with redirect_stdout(sys.stderr):
                report = options.run(options)
    except KeyboardInterrupt:
        return complain("interrupted; what was committed stays, run again to go on", INTERRUPTED)
    except BrokenPipeError:
        return FAULT
    except Ended as end:
        return complain(str(end), end.status)
    except Exception as error:  # the last place that can turn it into a line and a status
        if wrong := find_input_error(error):
            return complain(str(wrong), WRONG_INPUT)
        log.debug("traceback", exc_info=True)
        if verbose:
            raise
        lines = str(error).strip().splitlines() or [""]
        return complain(f"{type(error).__name__}: {lines[-1]} (-v shows where)", FAULT)
    shown = report.to_json() if options.json else report.summary()
    print(mark(report) if os.environ.get(REPORTING) else shown, flush=True)
    return BAD_ENDS.get(report.status, DONE)


@contextmanager
def native_messages_hidden() -> Iterator[None]:
    """Point file descriptor 2 at nothing while `sys.stderr` goes on to the terminal.

    Ray's C++ core writes what it calls errors straight to the descriptor, about states that it then handles itself.
    """
    visible, own = os.dup(2), sys.stderr
    nothing = os.open(os.devnull, os.O_WRONLY)
    own.flush()
    os.dup2(nothing, 2)
    sys.stderr = os.fdopen(visible, "w", buffering=1, encoding=own.encoding, errors="backslashreplace")
    try:
        yield
    finally:
        shown, sys.stderr = sys.stderr, own
        os.dup2(shown.fileno(), 2)
        shown.close()
        os.close(nothing)


def find_input_error(error: BaseException | None) -> InputError | None:
    """The InputError behind an exception: Ray wraps what a worker raised, sometimes more than once."""
    seen: set[int] = set()
    queue = [error]
    while queue:
        current = queue.pop(0)
        if isinstance(current, InputError) and getattr(current, "cause", None) is None:
            return current
        if current is not None and id(current) not in seen:
            seen.add(id(current))
            queue += [getattr(current, "cause", None), current.__cause__]
    return None


def complain(message: str, status: int) -> int:
    print(f"nightloom: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return status


def set_up_messages(verbose: bool) -> None:
    """Our own log on stderr; other libraries' only where something is wrong with them."""
    logging.basicConfig(format="nightloom: %(message)s", level=logging.WARNING, stream=sys.stderr, force=True)
    for name in ("model", "pipeline", "jobs", "cluster"):
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.WARNING)
    os.environ.setdefault("LANCE_LOG", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", message="lance is not fork-safe")  # Ray forks only to run another program
    if not verbose:
        warnings.simplefilter("ignore")


if __name__ == "__main__":
    sys.exit(main())
