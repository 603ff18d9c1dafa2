"""Intervals: they cover what they should, are the same each time, and pair what is compared."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.intervals import Interval, Measured, difference, interval, make_figures, mean_of, ratio_of, resamples
from model.errors import InputError

ITEMS = np.random.default_rng(3)


def test_the_mean_of_a_known_spread() -> None:
    values = ITEMS.normal(5.0, 2.0, 400)
    found = interval(mean_of(values), 400, samples=4_000)
    assert found.value == pytest.approx(values.mean())
    # 1.96 standard errors to each side, within the noise of 4,000 resamples
    error = values.std() / 20
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


@given(
    st.lists(st.floats(-1e3, 1e3, allow_nan=False), min_size=1, max_size=30),
    st.integers(0, 5),
)
def test_the_same_seed_gives_the_same_interval_around_the_value(values: list[float], seed: int) -> None:
    statistic = mean_of(np.array(values))
    first = interval(statistic, len(values), seed=seed, samples=200)
    assert first == interval(statistic, len(values), seed=seed, samples=200)
    assert min(values) - 1e-9 <= first.low <= first.high <= max(values) + 1e-9


def test_a_difference_is_paired() -> None:
    # Hard and easy items differ by far more than the systems do; every single item is 0.01 better.
    values = ITEMS.uniform(0, 1, 100)
    a = Measured("set", "a", "m", 100, mean_of(values + 0.01))
    b = Measured("set", "b", "m", 100, mean_of(values))
    paired = difference(a, b)
    assert paired.low == pytest.approx(0.01)
    assert paired.high == pytest.approx(0.01)
    alone = interval(a.statistic, 100)
    assert alone.high - alone.low > 0.05


def test_a_ratio_resamples_whole_items() -> None:
    # Two kinds of documents, all tokens of one alike: tokens by themselves would make the interval far too narrow.
    counts = np.full(40, 1_000)
    losses = np.repeat([1.0, 3.0], 20) * counts
    found = interval(ratio_of(losses, counts), 40)
    assert found.value == pytest.approx(2.0)
    assert found.high - found.low > 0.4


def test_resamples_come_in_blocks_of_the_same_draw() -> None:
    drawn = np.concatenate(list(resamples(7, seed=1, samples=50)))
    assert drawn.shape == (50, 7)
    assert drawn.min() == 0
    assert drawn.max() == 6
    assert not np.array_equal(drawn, np.concatenate(list(resamples(7, seed=2, samples=50))))


def test_figures_are_named_and_compared_within_their_set() -> None:
    values = np.array([0.0, 1.0, 1.0])
    measured = [
        Measured(set, system, "ndcg@10", 3, mean_of(values * factor))
        for set, system, factor in (("one", "document", 1.0), ("one", "bm25", 0.5), ("two", "bm25", 0.5))
    ]
    first, second, third = make_figures(measured, against={"bm25": "document"}, samples=200)
    assert (first.name, first.difference) == ("one/document/ndcg@10", None)
    assert second.against == "document"
    assert second.difference is not None
    assert second.difference.value == pytest.approx(-1 / 3)
    assert third.difference is None  # its set has nothing to compare with
    assert str(Interval(0.5, 0.25, 0.75)) == "0.500 (0.250 to 0.750)"


def test_an_undefined_baseline_is_left_out_and_an_undefined_model_refused(caplog: pytest.LogCaptureFixture) -> None:
    values = np.array([0.0, 1.0, 1.0])

    def none(picks: np.ndarray) -> np.ndarray:
        return np.full(len(picks), np.nan)

    systems = {"document": mean_of(values), "tf-idf": none, "random": mean_of(values / 2)}
    measured = [Measured("pairs", system, "spearman", 3, statistic) for system, statistic in systems.items()]
    against, baselines = {"tf-idf": "document", "random": "document"}, ("tf-idf", "random")
    figures = make_figures(measured, against=against, baselines=baselines, samples=200)
    assert [(figure.system, figure.against) for figure in figures] == [("document", None), ("random", "document")]
    assert "pairs/tf-idf/spearman is undefined" in caplog.text
    measured[0] = Measured("pairs", "document", "spearman", 3, none)
    with pytest.raises(InputError, match=r"pairs/document/spearman is undefined: .*; leave the set pairs out"):
        make_figures(measured, against=against, baselines=baselines, samples=200)


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(InputError, match="an empty set has no figures"):
        interval(mean_of(np.empty(0)), 0)
    with pytest.raises(InputError, match="undefined"):
        interval(lambda picks: np.full(len(picks), np.nan), 3)
