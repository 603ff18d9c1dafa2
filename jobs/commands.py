"""The commands of `nightloom` that work on embedding tables, and what all commands share.

A command is a parser with a `run` that takes the parsed options and returns a report. `run` imports what it needs, so
that `--help` and mistakes are answered at once.
"""

import argparse
import os
from pathlib import Path
from typing import Any, NoReturn, Protocol

from model.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
MODEL_VARIABLE = "NIGHTLOOM_MODEL"
Commands = Any
"""What `add_subparsers` returns: argparse has no public name for it."""


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


class ShowSettings(argparse.Action):
    """`--settings`: every key of a configuration, named as `module:class`, its default and what it means."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        import importlib

        from jobs.configuration import describe

        module, name = str(self.const).split(":")
        print("\n".join(describe(getattr(importlib.import_module(module), name))))
        parser.exit()


def add_command(commands: Commands, name: str, sentence: str) -> argparse.ArgumentParser:
    """A command with the options that all of them have; the caller gives it arguments and a `run`."""
    command = commands.add_parser(name, help=sentence, description=sentence)
    command.add_argument("--json", action="store_true", help="print the report as one JSON line")
    command.add_argument("-v", "--verbose", action="store_true", help="say more on stderr")
    return command


def add_settings(command: argparse.ArgumentParser, kind: str, *, file: str = "--config", **options: Any) -> None:
    """`--set` and `--settings` for a configuration `module:class`, read from `--config FILE` or from an argument, which
    may have `options` of its own.
    """
    meaning = "TOML file with settings (jobs/configs has some for training)"
    command.add_argument(file, metavar=file.strip("-").upper(), help=meaning, **options)
    command.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="one setting; wins over the file"
    )
    command.add_argument(
        "--settings",
        action=ShowSettings,
        nargs=0,
        const=kind,
        help="list all settings and exit",
    )


def default_model() -> str:
    """The model that comes with the checkout, unless the environment names another."""
    return os.environ.get(MODEL_VARIABLE) or str(ROOT / "models" / "nightloom-small")


def add_table_commands(commands: Commands) -> None:
    """embed, plan, search, export; runs, versions, rollback, dead, report; nightly."""
    embed = add_command(
        commands,
        "embed",
        "bring a table up to date with a source: new and changed documents are embedded, the rest is left",
    )
    plan = add_command(commands, "plan", "say what embed would do; writes nothing")
    for command in (embed, plan):
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
        add_settings(command, "jobs.configuration:EmbedConfiguration")
    embed.add_argument(
        "--retry-dead", action="store_true", default=None, help="try documents again that failed with the same text"
    )
    embed.add_argument(
        "--migrate", action="store_true", default=None, help="take the table over to another recipe (see the settings)"
    )
    embed.add_argument(
        "--budget-tokens", metavar="N", type=int, help="stop when the encoder has seen so many; the next run goes on"
    )
    embed.add_argument("--deadline", metavar="HH:MM", help="stop at this time of day; the next run goes on")
    embed.set_defaults(run=run_embed)
    plan.add_argument(
        "--price-per-hour", metavar="PRICE", type=float, help="of the machines that embed: say what a run would cost"
    )
    plan.set_defaults(run=run_embed)
    search = add_command(commands, "search", "find the documents nearest to a question")
    search.add_argument("table", metavar="TABLE")
    search.add_argument("query", metavar="QUERY", help="the question, in quotes")
    search.add_argument("-k", type=int, default=10, help="number of answers (default: 10)")
    search.add_argument("--model", help="where the model of the table lies now (default: where it was)")
    search.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    search.set_defaults(run=run_search)
    export = add_command(commands, "export", "write the published version to a Parquet or Arrow file")
    export.add_argument("table", metavar="TABLE")
    export.add_argument("destination", metavar="DESTINATION", help="file, local or s3://")
    export.add_argument("--format", choices=("parquet", "arrow"), default="parquet")
    export.set_defaults(run=run_export)
    runs = add_command(commands, "runs", "list the runs that wrote to a table")
    runs.add_argument("table", metavar="TABLE")
    runs.add_argument("--last", metavar="N", type=int, default=20, help="how many (default: 20)")
    runs.set_defaults(run=run_runs)
    versions = add_command(commands, "versions", "list the versions that readers see or could go back to")
    versions.add_argument("table", metavar="TABLE")
    versions.set_defaults(run=run_versions)
    rollback = add_command(commands, "rollback", "let readers see a version that was published before")
    rollback.add_argument("table", metavar="TABLE")
    rollback.add_argument("version", metavar="VERSION", type=int, nargs="?", help="default: the one before theirs")
    rollback.set_defaults(run=run_rollback)
    dead = add_command(commands, "dead", "list the documents that could not be embedded")
    dead.add_argument("table", metavar="TABLE")
    dead.set_defaults(run=run_dead)
    report = add_command(commands, "report", "write a page for people about a table: its nights, its vectors")
    report.add_argument("table", metavar="TABLE")
    report.add_argument("out", metavar="OUT.html", nargs="?", help="local or s3:// (default: beside the table)")
    report.set_defaults(run=run_report)
    nightly = add_command(commands, "nightly", "bring tables up to date, from a scheduler: safe to start at any time")
    add_settings(nightly, "jobs.nightly:NightlyConfiguration", file="config")
    nightly.set_defaults(run=run_nightly)


def run_embed(options: argparse.Namespace) -> Report:
    """embed and plan: the same configuration, carried out or only said."""
    from jobs.configuration import EmbedConfiguration, load

    names = ("source", "table", "model", "delete_missing", "retry_dead", "migrate", "budget_tokens", "deadline")
    configuration = load(
        EmbedConfiguration,
        file=options.config,
        sets=options.set,
        given={name: getattr(options, name, None) for name in names},
        defaults={"model": default_model()},
    )
    if options.command == "plan":
        from jobs.plan import run_plan

        return run_plan(configuration, price_per_hour=options.price_per_hour)
    if configuration.migrate:
        from jobs.migrate import run_migrate

        return run_migrate(configuration)
    from jobs.embed import run_embed

    return run_embed(configuration)


def run_search(options: argparse.Namespace) -> Report:
    from jobs.search import run_search

    return run_search(
        options.table,
        options.query,
        k=options.k,
        model=options.model,
        elsewhere=[default_model()],
        device=options.device,
    )


def run_export(options: argparse.Namespace) -> Report:
    from jobs.export import run_export

    return run_export(options.table, options.destination, format=options.format)


def run_runs(options: argparse.Namespace) -> Report:
    from jobs.history import run_runs

    return run_runs(options.table, last=options.last)


def run_versions(options: argparse.Namespace) -> Report:
    from jobs.history import run_versions

    return run_versions(options.table)


def run_rollback(options: argparse.Namespace) -> Report:
    from jobs.history import run_rollback

    return run_rollback(options.table, options.version)


def run_dead(options: argparse.Namespace) -> Report:
    from jobs.dead import run_dead

    return run_dead(options.table)


def run_report(options: argparse.Namespace) -> Report:
    from jobs.page import run_report

    return run_report(options.table, options.out)


def run_nightly(options: argparse.Namespace) -> Report:
    from jobs.configuration import load
    from jobs.nightly import NightlyConfiguration, run_nightly

    return run_nightly(load(NightlyConfiguration, file=options.config, sets=options.set, given={}))
