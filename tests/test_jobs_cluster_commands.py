"""The parsers of the cluster's commands: what follows `--` belongs to the job, whatever it looks like."""

from pathlib import Path

import pytest

from jobs.cli import main, make_parser


def test_everything_after_the_dashes_is_the_job():
    words = ["--address", "http://h:1", "--detach", "--exclude", "data", "--env", "A=b", "--", "embed", "a", "--json"]
    options = make_parser().parse_args(["submit", *words])
    assert (options.address, options.detach, options.exclude, options.env) == ("http://h:1", True, ["data"], ["A=b"])
    assert options.words[-3:] == ["embed", "a", "--json"]
    assert not options.json


@pytest.mark.parametrize("words", [["submit"], ["submit", "--"], ["submit", "--", "stop", "x"], ["attach"], ["stop"]])
def test_a_command_that_makes_no_sense_is_refused_at_once(words, capsys):
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("words", [["jobs"], ["attach", "x"], ["stop", "x"]])
def test_no_server_is_one_line(words, capsys):
    assert main([*words, "--address", "http://127.0.0.1:1"]) == 2
    assert "no job server of Ray at http://127.0.0.1:1" in capsys.readouterr().err


def test_every_command_is_in_the_readme():
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    for name in ("submit", "attach", "jobs", "stop"):
        assert name in readme
