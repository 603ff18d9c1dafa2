"""Phases: steps counted as the stream deals them, the configurations that come along, and what cannot be reached."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.configuration import describe, keys, load
from jobs.phases import PretrainConfiguration, count_steps, plan_phases
from model.errors import InputError
from pipeline.stream import StreamConfig

CONFIGS = [
    file
    for file in sorted((Path(__file__).resolve().parent.parent / "jobs" / "configs").glob("*.toml"))
    if not file.stem.startswith("finetune-")
]
"""Those of `nightloom finetune` are tested in test_jobs_tuning.py."""
GIVEN = {"tokens": "tokens", "output": "run"}


def configuration(*sets: str, **phases: dict[str, Any]) -> PretrainConfiguration:
    phases = phases or {"stable": {"tokens": 1_000_000}}
    items = [f"phases.{name}.{key}={value}" for name, settings in phases.items() for key, value in settings.items()]
    return load(PretrainConfiguration, file=None, sets=[*items, *sets], given=GIVEN)


@given(
    st.integers(0, 3_000_000),
    st.sampled_from([512, 1000, 4096]),
    st.sampled_from([1000, 16_384, 50_000]),
    st.sampled_from([None, 512, 900]),
    st.sampled_from([0, 1, 200_000, 10_000_000]),
)
def test_steps_are_counted_as_they_are_dealt(
    tokens: int, per_bin: int, per_step: int, first: int | None, warmup: int
) -> None:
    stream = StreamConfig(
        max_tokens=256,
        tokens_per_bin=per_bin,
        tokens_per_step=per_step,
        first_tokens_per_step=first,
        warmup_tokens=warmup,
    )
    bins = steps = 0
    while (bins + stream.bins_at(bins)) * per_bin <= tokens:
        bins, steps = bins + stream.bins_at(bins), steps + 1
    assert count_steps(stream, tokens) == steps


def test_every_phase_has_its_own_order_and_schedule() -> None:
    plan = plan_phases(
        configuration(
            "seed=7",
            stable={"tokens": 10_000_000, "max_tokens": 1024, "warmup_tokens": 1_000_000},
            extension={"tokens": 5_000_000, "max_tokens": 8192, "learning_rate": 3e-4, "global_theta": 160_000},
            decay={"tokens": 2_000_000, "decay_tokens": 2_000_000},
        )
    )
    assert [phase.name for phase in plan] == ["stable", "extension", "decay"]
    assert len({phase.stream.seed for phase in plan}) == 3
    assert [phase.stream.max_tokens for phase in plan] == [1024, 8192, 1024]
    assert plan[0].rate_at(0) == pytest.approx(8e-4 * 131_072 / 1_000_000)
    assert plan[1].rate_at(0) == 3e-4
    assert not plan[1].is_decaying(10**6)
    assert plan[2].is_decaying(0)
    last = plan[2].rate_at((plan[2].num_steps - 1) * 8)
    assert 0 < last < 0.1 * 8e-4


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_configurations_that_come_along_can_be_trained(file: Path) -> None:
    made = load(PretrainConfiguration, file=str(file), sets=[], given={})
    assert all(phase.num_steps > 1 for phase in plan_phases(made))


def test_published_numbers() -> None:
    """arXiv 2412.13663, table 3: batches are given there in sequences of 1,024, here in tokens."""
    folder = CONFIGS[0].parent
    base = load(PretrainConfiguration, file=str(folder / "base.toml"), sets=[], given={})
    stable, extension, decay = base.phases.values()
    assert (stable.tokens, stable.learning_rate, stable.warmup_tokens) == (1_719_000_000_000, 8e-4, 3_000_000_000)
    assert (stable.tokens_per_step, stable.first_tokens_per_step) == (4608 * 1024, 768 * 1024)
    assert (stable.global_theta, extension.global_theta, extension.max_tokens) == (10_000, 160_000, 8192)
    assert (extension.tokens, extension.learning_rate) == (250_000_000_000, 3e-4)
    assert decay.tokens == decay.decay_tokens == 50_000_000_000
    large = load(PretrainConfiguration, file=str(folder / "large.toml"), sets=[], given={})
    assert [phase.learning_rate for phase in large.phases.values()] == [5e-4, 5e-5, 5e-5, 5e-5]
    assert [phase.weight_decay for phase in large.phases.values()] == [1e-5, 1e-6, 1e-6, 1e-6]
    assert large.model.tile_from is not None


@pytest.mark.parametrize(
    "phase, message",
    [
        ({"tokens": 1000}, "never reached"),
        ({"tokens": 10**6, "max_tokens": 20_000}, "a sequence must fit"),
        ({"tokens": 10**6, "warmup_tokens": 6 * 10**5, "decay_tokens": 6 * 10**5}, "longer together"),
        ({"tokens": 10**6, "first_tokens_per_step": 10**6}, "first_tokens_per_step"),
    ],
)
def test_what_cannot_be_trained_names_its_phase(phase: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"phase 'late': .*{message}"):
        plan_phases(configuration(stable={"tokens": 10**6}, late=phase))


def test_a_wrong_key_of_a_phase_names_one_of_a_phase() -> None:
    with pytest.raises(InputError, match=r"the nearest is 'phases\.\*\.tokens'"):
        configuration("phases.stable.tokns=5")


def test_every_setting_says_what_it_is() -> None:
    wrong = [key for key, text in keys(PretrainConfiguration) if len(text) < 15 or not text.endswith(".")]
    assert wrong == []
    assert "phases.NAME.max_tokens = 1024" in list(describe(PretrainConfiguration))
