"""The trapezoid at its corners, and what counts as a spike."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import InputError
from model.schedule import SpikeGuard, Trapezoid


def test_factors_of_the_docstring() -> None:
    schedule = Trapezoid(2.0, tokens=100, warmup_tokens=20, decay_tokens=20)
    factors = [schedule.factor(at, at + 10) for at in range(0, 100, 10)]
    assert factors == pytest.approx([0.5, *[1.0] * 8, 1 - math.sqrt(0.5)])
    assert schedule.rate(0, 10) == pytest.approx(1.0)


def test_a_flat_schedule_is_flat() -> None:
    schedule = Trapezoid(1e-3, tokens=1000)
    assert {schedule.rate(at, at + 7) for at in range(0, 1000, 7)} == {1e-3}


@given(st.integers(0, 500), st.integers(0, 500), st.integers(1, 97))
def test_a_rate_is_never_zero_and_never_above_the_peak(warmup: int, decay: int, size: int) -> None:
    schedule = Trapezoid(1.0, tokens=1000, warmup_tokens=warmup, decay_tokens=decay)
    factors = [schedule.factor(at, at + size) for at in range(0, 1000, size)]
    assert all(0 < f <= 1 for f in factors)
    peak = factors.index(max(factors))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def test_parts_that_do_not_fit_are_one_line() -> None:
    with pytest.raises(InputError, match="longer together"):
        Trapezoid(1.0, tokens=10, warmup_tokens=6, decay_tokens=5)
    with pytest.raises(InputError, match="positive length"):
        Trapezoid(1.0, tokens=0)


def quiet(guard: SpikeGuard, steps: int, seed: int = 0) -> None:
    """A loss that falls slowly with some noise: no step of it is a spike."""
    noise = random.Random(seed)
    for step in range(steps):
        assert guard.accepts(5.0 - 0.01 * step + noise.gauss(0, 0.05), math.exp(noise.gauss(0, 0.2)))


def test_spikes_of_the_loss_and_of_the_norm_are_skipped() -> None:
    guard = SpikeGuard()
    quiet(guard, 60)
    assert not guard.accepts(8.0, 1.0)
    assert not guard.accepts(4.4, 200.0)
    assert guard.skipped == 2
    assert guard.accepts(4.4, 1.0)
    assert guard.skipped == 0
    assert len(guard.losses or []) == 61, "a skipped step does not move the mean"


def test_the_first_steps_are_never_spikes() -> None:
    guard = SpikeGuard()
    assert all(guard.accepts(10.0 * step, 1.0) for step in range(guard.least))


def test_a_new_level_is_accepted_in_the_end() -> None:
    guard = SpikeGuard(most_in_a_row=3)
    quiet(guard, 40)
    assert [guard.accepts(9.0, 1.0) for _ in range(5)] == [False, False, False, True, True]


def test_zero_deviations_turn_it_off() -> None:
    guard = SpikeGuard(deviations=0.0)
    quiet(guard, 40)
    assert guard.accepts(1e9, 1e9)


def test_a_guard_that_was_saved_goes_on_as_it_was() -> None:
    guard = SpikeGuard()
    quiet(guard, 50)
    copy = SpikeGuard(losses=list(guard.losses or []), norms=list(guard.norms or []), skipped=guard.skipped)
    for loss, norm in ((4.6, 1.0), (7.0, 1.0), (4.5, 1.1), (4.5, 90.0)):
        assert guard.accepts(loss, norm) == copy.accepts(loss, norm)
    assert guard == copy
