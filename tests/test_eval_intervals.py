"""Intervals: worked cases, another program's numbers, and how often they hold what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from localdpo.evaluate.intervals import Figure, bootstrap, figure_from_json, mean, share


def test_a_share_has_wilson_s_interval():
    # Newcombe 1998, table I: 81 of 263, method 3.
    figure = share(81, 263)
    assert figure is not None
    assert (round(figure.low, 4), round(figure.high, 4)) == (0.2553, 0.3662)  # type: ignore[arg-type]
    assert share(0, 0) is None
    assert share(8, 8).low == pytest.approx(0.6756, abs=1e-4)  # type: ignore[union-attr]


def test_the_bootstrap_of_a_normal_sample_is_near_its_t_interval():
    values = np.random.default_rng(3).normal(5.0, 2.0, 200)
    half = 1.9720 * values.std(ddof=1) / np.sqrt(200)
    for method in ("bca", "percentile"):
        figure = mean(values, resamples=4000, method=method)  # type: ignore[arg-type]
        assert figure is not None
        assert figure.value == pytest.approx(values.mean())
        assert figure.low == pytest.approx(values.mean() - half, abs=0.03)
        assert figure.high == pytest.approx(values.mean() + half, abs=0.03)


def test_a_skewed_sample_is_corrected_as_scipy_corrects_it():
    # scipy 1.17: stats.bootstrap((x,), np.mean, n_resamples=200_000, method=..., rng=0)
    values = np.array([0.1, 0.2, 0.2, 0.3, 0.4, 0.5, 0.7, 1.1, 1.9, 6.0])
    expected = {"percentile": (0.36, 2.34), "bca": (0.47, 3.0696)}
    for method, (low, high) in expected.items():
        figure = mean(values, resamples=40_000, method=method)  # type: ignore[arg-type]
        assert figure is not None
        assert (figure.low, figure.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.04))


def test_intervals_cover_what_they_should():
    random = np.random.default_rng(1)
    held = [mean(random.exponential(1.0, 40), resamples=300, seed=n) for n in range(200)]
    covered = np.mean([figure.low <= 1.0 <= figure.high for figure in held])  # type: ignore[union-attr, operator]
    assert 0.87 <= covered <= 0.99


def test_a_ratio_of_sums_is_a_statistic_like_any_other():
    rows = np.array([[1.0, 2.0], [3.0, 2.0], [5.0, 6.0], [2.0, 1.0]])
    figure = bootstrap(rows, lambda sums: sums[:, 0] / sums[:, 1])
    assert figure.value == pytest.approx(1.0)
    assert figure.low is not None
    assert figure.high is not None
    assert 0.5 <= figure.low < 1.0 < figure.high <= 2.0


def test_rows_of_one_group_are_drawn_together():
    # Forty rows that are four values ten times over tell as much as the four.
    values = np.repeat([0.0, 1.0, 2.0, 3.0], 10)
    alone, together = mean(values), mean(values, groups=np.repeat([0, 1, 2, 3], 10).tolist())
    four = mean(np.array([0.0, 1.0, 2.0, 3.0]))
    assert alone is not None
    assert together is not None
    assert together == four
    assert together.high - together.low > 2 * (alone.high - alone.low)  # type: ignore[operator]


def test_the_same_seed_gives_the_same_interval():
    values = np.arange(20.0)
    assert mean(values, seed=4) == mean(values, seed=4)
    assert mean(values, seed=4) != mean(values, seed=5)


@pytest.mark.parametrize(
    ("values", "figure"), [([], None), ([2.0], Figure(2.0)), ([2.0, 2.0, 2.0], Figure(2.0, 2.0, 2.0))]
)
def test_where_there_is_nothing_to_draw(values: list[float], figure: Figure | None):
    assert mean(values) == figure


def test_a_statistic_of_nothing_is_refused():
    with pytest.raises(ValueError, match="nothing to draw"):
        bootstrap(np.zeros((0, 1)), lambda sums: sums[:, 0])


@pytest.mark.parametrize("data", [None, 3, {}, {"value": "1"}, {"value": float("nan")}, {"value": True}])
def test_what_is_no_figure_is_none(data: object):
    assert figure_from_json(data) is None


def test_a_figure_comes_back_from_json():
    for figure in (Figure(0.5, 0.25, 0.75), Figure(3.0)):
        assert figure_from_json(figure.to_json()) == figure
    assert figure_from_json({"value": 1, "low": 0.5}) == Figure(1.0)
