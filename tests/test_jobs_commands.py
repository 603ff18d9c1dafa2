"""What all commands share: a sentence, the common options, a `run`, settings where there is a configuration."""

import argparse

import pytest

from jobs.cli import make_parser
from model.errors import InputError


def commands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (action for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(action.choices)


@pytest.mark.parametrize("name", commands())
def test_command_says_what_it_does_and_has_a_run(name):
    command = commands()[name]
    assert command.description
    assert callable(command.get_default("run"))
    assert {"--json", "--verbose", "--help"} <= set(command._option_string_actions)


@pytest.mark.parametrize(
    "name", [name for name, command in commands().items() if "--settings" in command.format_help()]
)
def test_settings_are_listed_by_their_dotted_keys(name, capsys):
    with pytest.raises(SystemExit) as left:
        make_parser().parse_args([name, "--settings"])
    assert left.value.code == 0
    assert " = " in capsys.readouterr().out


def test_an_unknown_command_is_one_line():
    with pytest.raises(InputError, match="invalid choice: 'embde'"):
        make_parser().parse_args(["embde"])
