"""Figures with 95 % intervals: shares by Wilson's score interval, means and ratios by a seeded bootstrap.

A share gets Wilson's interval because a bootstrap of 8 right of 8 draws nothing but 8 right of 8 and would claim
[1, 1]. Everything else gets the bias-corrected and accelerated bootstrap (B. Efron, "Better Bootstrap Confidence
Intervals", JASA 82, 1987, pp. 171-185; acceleration from the jackknife, eq. 6.6 there), or the plain percentile
one. Rows that belong together, such as pairs of one prompt, are drawn together. This module knows numbers only;
numpy is loaded by what needs it, so that a verdict can be read without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal

from localdpo.evaluate.blind import wilson_interval

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Figure", "bootstrap", "figure_from_json", "mean", "share"]

RESAMPLES = 2000
_CONFIDENCE = 0.95
_BLOCK = 1 << 22  # draws held at once


@dataclass(frozen=True, slots=True)
class Figure:
    """A value and its 95 % interval; ``low`` and ``high`` are None where there is none, as for a single row."""

    value: float
    low: float | None = None
    high: float | None = None

    def to_json(self) -> dict[str, float | None]:
        """``{"value", "low", "high"}``."""
        return asdict(self)


def figure_from_json(data: Any) -> Figure | None:
    """The figure that ``to_json`` described; None for anything else, as a file may come from anywhere."""
    if not isinstance(data, dict) or not _is_number(data.get("value")):
        return None
    low, high = (float(data[end]) if _is_number(data.get(end)) else None for end in ("low", "high"))
    return Figure(float(data["value"]), *((low, high) if low is not None and high is not None else (None, None)))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def share(successes: float, trials: int) -> Figure | None:
    """``successes`` (halves allowed) of ``trials`` with Wilson's interval; None without a trial."""
    if trials == 0:
        return None
    low, high = wilson_interval(successes, trials)
    return Figure(successes / trials, low, high)


def mean(
    values: Sequence[float] | npt.NDArray[np.float64],
    *,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    method: Literal["bca", "percentile"] = "bca",
) -> Figure | None:
    """The mean of ``values`` with its bootstrap interval; None without a value. See :func:`bootstrap`."""
    import numpy as np

    column = np.asarray(values, np.float64).reshape(-1, 1)
    if not len(column):
        return None
    columns = np.hstack([column, np.ones_like(column)])
    return bootstrap(
        columns, lambda sums: sums[:, 0] / sums[:, 1], groups=groups, seed=seed, resamples=resamples, method=method
    )


def bootstrap(
    rows: npt.NDArray[np.float64],
    statistic: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]],
    *,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    method: Literal["bca", "percentile"] = "bca",
) -> Figure:
    """A statistic of column sums with its 95 % bootstrap interval.

    ``rows`` are [n, k]; ``statistic`` maps sums [m, k] to values [m], so that means, ratios and differences of means
    are all written as functions of sums. Rows with equal ``groups`` are drawn together. Without two groups there is
    no interval. The same seed gives the same interval. Raises ValueError without a row.
    """
    import numpy as np

    rows = np.asarray(rows, np.float64)
    if not len(rows):
        raise ValueError("nothing to draw from")
    units = _by_group(rows, groups)
    total = units.sum(axis=0, keepdims=True)
    value = float(statistic(total)[0])
    if len(units) < 2:
        return Figure(value)
    drawn = _drawn(units, statistic, seed, resamples)
    tails = ((1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2)
    if method == "bca":
        tails = _bca_tails(value, drawn, statistic(total - units), tails)
    low, high = np.quantile(drawn, tails)
    return Figure(value, float(low), float(high))


def _by_group(rows: npt.NDArray[np.float64], groups: Sequence[Hashable] | None) -> npt.NDArray[np.float64]:
    """Sums of the rows of each group, [groups, k], in order of first appearance."""
    import numpy as np

    if groups is None:
        return rows
    numbers: dict[Hashable, int] = {}
    index = [numbers.setdefault(group, len(numbers)) for group in groups]
    sums = np.zeros((len(numbers), rows.shape[1]))
    np.add.at(sums, index, rows)
    return sums


def _drawn(
    units: npt.NDArray[np.float64],
    statistic: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]],
    seed: int,
    resamples: int,
) -> npt.NDArray[np.float64]:
    """The statistic of each of ``resamples`` draws of as many units as there are, with replacement."""
    import numpy as np

    random = np.random.default_rng(seed)
    values, block = [], max(1, _BLOCK // len(units))
    for start in range(0, resamples, block):
        draws = min(block, resamples - start)
        # How often each unit is drawn, not which: a product of counts and units is all that is needed.
        counts = random.multinomial(len(units), np.full(len(units), 1 / len(units)), size=draws)
        values.append(statistic(counts @ units))
    return np.concatenate(values)


def _bca_tails(
    value: float, drawn: npt.NDArray[np.float64], left_one_out: npt.NDArray[np.float64], tails: tuple[float, float]
) -> tuple[float, float]:
    """The quantiles to read in place of ``tails``, corrected for bias and skew."""
    import numpy as np

    normal = NormalDist()
    below = (np.sum(drawn < value) + 0.5 * np.sum(drawn == value)) / len(drawn)
    if not 0 < below < 1:  # every draw on one side: there is no bias to correct by
        return tails
    bias = normal.inv_cdf(float(below))
    influence = left_one_out.mean() - left_one_out
    spread = float(np.sum(influence**2))
    acceleration = float(np.sum(influence**3)) / (6 * spread**1.5) if spread > 0 else 0.0

    def corrected(tail: float) -> float:
        shifted = bias + normal.inv_cdf(tail)
        return normal.cdf(bias + shifted / (1 - acceleration * shifted))

    return corrected(tails[0]), corrected(tails[1])
