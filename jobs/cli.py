"""The command line: `nightloom embed|plan|search|export|prepare`.

argparse, and heavy imports only in the command that needs them, so that `--help` and mistakes are answered at once.
Exit status: 0 done; 2 the user's input or configuration is wrong, said in one line; 3 finished but not published; 1 a
fault.
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

from model.errors import InputError

DONE, FAULT, WRONG_INPUT, UNPUBLISHED, INTERRUPTED = 0, 1, 2, 3, 130
ROOT = Path(__file__).resolve().parent.parent
MODEL_VARIABLE = "NIGHTLOOM_MODEL"

log = logging.getLogger(__name__)


class Report(Protocol):
    """What every job returns."""

    @property
    def status(self) -> str: ...

    def summary(self) -> str: ...

    def to_json(self) -> str: ...


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are like all others: an InputError, one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")


def default_model() -> str:
    """The model that comes with the checkout, unless the environment names another."""
    return os.environ.get(MODEL_VARIABLE) or str(ROOT / "models" / "nightloom-small")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="nightloom", description="Embed corpora of long documents into versioned tables.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for name, sentence in (
        ("embed", "bring a table up to date with a source: new and changed documents are embedded, the rest is left"),
        ("plan", "say what embed would do; writes nothing"),
    ):
        command = commands.add_parser(name, help=sentence, description=sentence)
        command.add_argument(
            "source", metavar="SOURCE", help="file, folder, glob or s3:// prefix of Parquet, JSON Lines or text"
        )
        command.add_argument("table", metavar="TABLE", help="folder or s3:// prefix of the table")
        command.add_argument(
            "--model", help=f"model folder (s3:// too) or hub id (default: ${MODEL_VARIABLE}, else the bundled model)"
        )
        command.add_argument(
            "--delete-missing", action="store_true", default=None, help="remove documents that the source no longer has"
        )
    commands.choices["embed"].add_argument(
        "--retry-dead", action="store_true", default=None, help="try documents again that failed with the same text"
    )
    commands.choices["embed"].add_argument(
        "--migrate", action="store_true", default=None, help="take the table over to another recipe (see the settings)"
    )
    commands.choices["embed"].add_argument(
        "--budget-tokens", metavar="N", type=int, help="stop when the encoder has seen so many; the next run goes on"
    )
    commands.choices["embed"].add_argument(
        "--deadline", metavar="HH:MM", help="stop at this time of day; the next run goes on"
    )
    commands.choices["plan"].add_argument(
        "--price-per-hour", metavar="PRICE", type=float, help="of the machines that embed: say what a run would cost"
    )
    command = commands.add_parser("search", help="find the documents nearest to a question")
    command.add_argument("table", metavar="TABLE")
    command.add_argument("query", metavar="QUERY", help="the question, in quotes")
    command.add_argument("-k", type=int, default=10, help="number of answers (default: 10)")
    command.add_argument("--model", help="where the model of the table lies now (default: where it was)")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command = commands.add_parser("export", help="write the published version to a Parquet or Arrow file")
    command.add_argument("table", metavar="TABLE")
    command.add_argument("destination", metavar="DESTINATION", help="file, local or s3://")
    command.add_argument("--format", choices=("parquet", "arrow"), default="parquet")
    command = commands.add_parser("prepare", help="turn a corpus into token shards to train on")
    command.add_argument("source", metavar="SOURCE", help="as for embed")
    command.add_argument("tokens", metavar="TOKENS", help="folder or s3:// prefix of the token shards")
    command.add_argument("--tokenizer", metavar="FOLDER", help="folder with tokenizer.json")
    command.add_argument("--train-tokenizer", metavar="SIZE", type=int, help="train a tokenizer of so many entries")
    command = commands.add_parser("pretrain", help="train an encoder on token shards, or go on with training")
    command.add_argument("config", metavar="CONFIG", help="TOML file with settings; jobs/configs has some")
    command = commands.add_parser("generate", help="go on from a prompt with a decoder; the text appears as it comes")
    command.add_argument("model", metavar="MODEL", help="model folder (s3:// too) or hub id of a decoder")
    command.add_argument("prompt", metavar="PROMPT", help="the beginning of a text, in quotes")
    for name, kind, default, meaning in (
        ("max-new-tokens", int, 128, "how many at most"),
        ("temperature", float, 0.0, "what logits are divided by; 0 takes the likeliest token"),
        ("top-k", int, 0, "choose among so many of the likeliest; 0 for all"),
        ("top-p", float, 1.0, "choose among the likeliest that together reach this share"),
        ("seed", int, 0, "the same seed gives the same text"),
    ):
        command.add_argument(
            f"--{name}", metavar="N", type=kind, default=default, help=f"{meaning} (default: {default})"
        )
    command = commands.add_parser("runs", help="list the runs that wrote to a table")
    command.add_argument("table", metavar="TABLE")
    command.add_argument("--last", metavar="N", type=int, default=20, help="how many (default: 20)")
    command = commands.add_parser("dead", help="list the documents that could not be embedded")
    command.add_argument("table", metavar="TABLE")
    command = commands.add_parser("versions", help="list the versions that readers see or could go back to")
    command.add_argument("table", metavar="TABLE")
    command = commands.add_parser("rollback", help="let readers see a version that was published before")
    command.add_argument("table", metavar="TABLE")
    command.add_argument("version", metavar="VERSION", type=int, nargs="?", help="default: the one before theirs")
    for name in ("embed", "plan", "prepare", "pretrain"):
        command = commands.choices[name]
        if name != "pretrain":
            command.add_argument("--config", metavar="FILE", help="TOML file with settings")
        command.add_argument(
            "--set", metavar="KEY=VALUE", action="append", default=[], help="one setting; wins over the file"
        )
        command.add_argument("--settings", action=ShowSettings, nargs=0, const=name, help="list all settings and exit")
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print the report as one JSON line")
        command.add_argument("-v", "--verbose", action="store_true", help="say more on stderr")
    return parser


class ShowSettings(argparse.Action):
    """`--settings`: every key, its default and what it means."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from jobs.configuration import EmbedConfiguration, PrepareConfiguration, Settings, describe
        from jobs.phases import PretrainConfiguration

        others: dict[str, type[Settings]] = {"prepare": PrepareConfiguration, "pretrain": PretrainConfiguration}
        print("\n".join(describe(others.get(str(self.const), EmbedConfiguration))))
        parser.exit()


def run(options: argparse.Namespace) -> Report:
    """Carry out a command."""
    if options.command == "search":
        from jobs.search import run_search

        return run_search(
            options.table,
            options.query,
            k=options.k,
            model=options.model,
            elsewhere=[default_model()],
            device=options.device,
        )
    if options.command == "generate":
        from jobs.generate import run_generate

        names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
        show = None if options.json else partial(print, end="", flush=True)
        return run_generate(
            options.model, options.prompt, show=show, **{name: getattr(options, name) for name in names}
        )
    if options.command == "pretrain":
        from jobs.configuration import load
        from jobs.phases import PretrainConfiguration
        from jobs.pretrain import run_pretrain

        return run_pretrain(load(PretrainConfiguration, file=options.config, sets=options.set, given={}))
    if options.command == "export":
        from jobs.export import run_export

        return run_export(options.table, options.destination, format=options.format)
    if options.command == "dead":
        from jobs.dead import run_dead

        return run_dead(options.table)
    if options.command in ("runs", "versions", "rollback"):
        from jobs.history import run_rollback, run_runs, run_versions

        if options.command == "runs":
            return run_runs(options.table, last=options.last)
        if options.command == "versions":
            return run_versions(options.table)
        return run_rollback(options.table, options.version)
    from jobs.configuration import EmbedConfiguration, PrepareConfiguration, load

    if options.command == "prepare":
        from jobs.prepare import run_prepare

        named = {name: getattr(options, name) for name in ("source", "tokens", "tokenizer", "train_tokenizer")}
        return run_prepare(load(PrepareConfiguration, file=options.config, sets=options.set, given=named))
    given = {
        "source": options.source,
        "table": options.table,
        "model": options.model,
        "delete_missing": options.delete_missing,
        "retry_dead": getattr(options, "retry_dead", None),
        "migrate": getattr(options, "migrate", None),
        "budget_tokens": getattr(options, "budget_tokens", None),
        "deadline": getattr(options, "deadline", None),
    }
    configuration = load(
        EmbedConfiguration, file=options.config, sets=options.set, given=given, defaults={"model": default_model()}
    )
    if options.command == "plan":
        from jobs.plan import run_plan

        return run_plan(configuration, price_per_hour=options.price_per_hour)
    if configuration.migrate:
        from jobs.migrate import run_migrate

        return run_migrate(configuration)
    from jobs.embed import run_embed

    return run_embed(configuration)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    verbose = False
    try:
        options = make_parser().parse_args(arguments)
        verbose = options.verbose
        with nullcontext() if verbose else native_messages_hidden():
            set_up_messages(verbose)
            report = run(options)
    except KeyboardInterrupt:
        return complain("interrupted; what was committed stays, run again to go on", INTERRUPTED)
    except BrokenPipeError:
        return FAULT
    except Exception as error:  # the last place that can turn it into a line and a status
        if wrong := find_input_error(error):
            return complain(str(wrong), WRONG_INPUT)
        log.debug("traceback", exc_info=True)
        if verbose:
            raise
        lines = str(error).strip().splitlines() or [""]
        return complain(f"{type(error).__name__}: {lines[-1]} (-v shows where)", FAULT)
    print(report.to_json() if options.json else report.summary(), flush=True)
    return UNPUBLISHED if report.status == "unpublished" else DONE


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
        if isinstance(current, InputError) and type(current) is InputError:
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
