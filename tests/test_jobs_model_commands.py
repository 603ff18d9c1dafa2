"""The options of commands that make and try models arrive where they are meant for."""

import pytest

from jobs.cli import make_parser
from model.errors import InputError


def test_generate_takes_greedy_decoding_unless_told():
    options = make_parser().parse_args(["generate", "m", "Once"])
    assert (options.temperature, options.top_k, options.top_p, options.max_new_tokens) == (0.0, 0, 1.0, 128)


def test_pretrain_needs_a_configuration():
    with pytest.raises(InputError, match="CONFIG"):
        make_parser().parse_args(["pretrain"])
