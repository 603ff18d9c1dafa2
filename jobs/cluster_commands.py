"""The commands of `nightloom` that deal with a cluster: submit, attach, jobs, stop."""

import argparse

from jobs.commands import Commands, Report, add_command


def add_cluster_commands(commands: Commands) -> None:
    """submit, attach, jobs, stop."""
    submit = add_command(commands, "submit", "run a command as a job on a Ray cluster, and follow it to its end")
    submit.add_argument("--detach", action="store_true", help="come back as soon as the cluster has the job")
    submit.add_argument(
        "--attach", action="store_true", help="where the job of this night runs already, follow it instead"
    )
    submit.add_argument(
        "--install", action="store_true", help="install the checkout's pinned packages on the cluster before the job"
    )
    submit.add_argument(
        "--exclude", metavar="PATH", action="append", default=[], help="part of the checkout that is not uploaded"
    )
    submit.add_argument(
        "--env",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a variable of the job's environment; no secrets: the dashboard shows it",
    )
    submit.add_argument("words", metavar="-- COMMAND ...", nargs=argparse.REMAINDER, help="as without submit")
    submit.set_defaults(run=run_submit)
    attach = add_command(commands, "attach", "follow a job that was submitted, from the beginning of its log")
    jobs = add_command(commands, "jobs", "list the jobs of a cluster")
    jobs.add_argument("--last", metavar="N", type=int, default=20, help="how many (default: 20)")
    jobs.set_defaults(run=run_jobs)
    stop = add_command(commands, "stop", "end a job; what it has committed stays")
    for command in (attach, stop):
        command.add_argument("job", metavar="ID", help="as `nightloom jobs` lists it")
    attach.set_defaults(run=run_attach)
    stop.set_defaults(run=run_stop)
    for command in (submit, attach, jobs, stop):
        command.add_argument(
            "--address",
            metavar="URL",
            help="of the job server, as http://head:8265 (default: $RAY_API_SERVER_ADDRESS, or this machine's cluster)",
        )


def run_submit(options: argparse.Namespace) -> Report:
    from jobs.submit import Request, run_submit

    words = options.words[1:] if options.words[:1] == ["--"] else options.words
    request = Request(
        words=words,
        address=options.address,
        detach=options.detach,
        attach=options.attach,
        install=options.install,
        excludes=options.exclude,
        env=options.env,
    )
    return run_submit(request)


def run_attach(options: argparse.Namespace) -> Report:
    from jobs.follow import run_attach

    return run_attach(options.job, options.address)


def run_jobs(options: argparse.Namespace) -> Report:
    from jobs.follow import run_jobs

    return run_jobs(options.address, last=options.last)


def run_stop(options: argparse.Namespace) -> Report:
    from jobs.follow import run_stop

    return run_stop(options.job, options.address)
