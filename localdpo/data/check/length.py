"""Whether the longer (or the shorter) answer of a pair is the chosen one too often.

DPO is known to lengthen answers when chosen ones are longer (Park et al. 2024, "Disentangling Length from Quality in
Direct Preference Optimization"). Figures count every prompt once, however many pairs it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from localdpo.data.check.chance import MIN_PROMPTS, Share, sign_test, wilson
from localdpo.data.check.findings import Finding, Severity, found

__all__ = ["LengthFigures", "length_figures", "length_findings"]

_Ints = npt.NDArray[np.int64]
_SURE, _NOTICED = 0.70, 0.55
_RATIO = 1.3
_NAMED = 10


@dataclass(frozen=True, slots=True)
class LengthFigures:
    """Lengths of chosen and rejected answers beside each other; `unit` is what was counted.

    `median_*`: medians. `ratio`: the median over pairs of chosen / rejected. `correlation`: Pearson's, of the log
    length with being chosen, over both answers of all pairs. `accuracy`: how many prompts a classifier gets right that
    knows nothing but which answer is longer, ties as a half; `longer_chosen` says which way it decides.
    """

    unit: str
    median_chosen: float
    median_rejected: float
    ratio: float
    correlation: float
    accuracy: Share
    longer_chosen: bool
    p_value: float

    def to_json(self) -> dict[str, Any]:
        """Return the figures by name."""
        return {
            "unit": self.unit,
            "median_chosen": self.median_chosen,
            "median_rejected": self.median_rejected,
            "median_ratio": round(self.ratio, 3),
            "correlation": round(self.correlation, 4),
            "accuracy": round(self.accuracy.value, 4),
            "accuracy_interval": [round(self.accuracy.low, 4), round(self.accuracy.high, 4)],
            "longer_is_chosen": self.longer_chosen,
            "p_value": self.p_value,
            "prompts": int(self.accuracy.n),
        }


def length_figures(chosen: _Ints, rejected: _Ints, groups: _Ints, unit: str = "words") -> LengthFigures:
    """Compare lengths, int64 [pairs] each, of at least one pair; `groups` numbers the prompts of the pairs from 0."""
    votes = np.sign(chosen - rejected).astype(float)
    sizes = np.bincount(groups)
    mean_vote = np.bincount(groups, votes) / np.maximum(sizes, 1)
    mean_vote = mean_vote[sizes > 0]
    prompts = len(mean_vote)
    leaning = float(mean_vote.mean())
    ahead = int((mean_vote > 0).sum()), int((mean_vote < 0).sum())
    lengths = np.log1p(np.concatenate((chosen, rejected)).astype(float))
    label = np.repeat((1.0, 0.0), len(chosen))
    spread = float(lengths.std())
    correlation = float(np.mean((lengths - lengths.mean()) * (label - 0.5)) / (spread * 0.5)) if spread > 0 else 0.0
    return LengthFigures(
        unit,
        float(np.median(chosen)),
        float(np.median(rejected)),
        float(np.median((chosen + 1) / (rejected + 1))),
        correlation,
        wilson(0.5 + abs(leaning) / 2, prompts),
        leaning >= 0,
        sign_test(*ahead),
    )


def length_findings(
    figures: LengthFigures, chosen: _Ints, rejected: _Ints, lines: _Ints, explained: str = ""
) -> Iterator[Finding]:
    """Yield the finding that the figures amount to, if any.

    `explained` names what is taught on purpose and separates the pairs at least as well: then the length comes along
    with it and is told as information.
    """
    if figures.accuracy.n < MIN_PROMPTS or figures.p_value > 0.01 or figures.accuracy.low < _NOTICED:
        return
    strong = figures.accuracy.low >= _SURE and not 1 / _RATIO < figures.ratio < _RATIO
    severity = Severity.WARNING if strong and not explained else Severity.INFO
    which = "longer" if figures.longer_chosen else "shorter"
    message = (
        f"the {which} answer is the chosen one in {figures.accuracy} of {int(figures.accuracy.n):,} prompts, which is "
        f"what a classifier scores that sees nothing but length (chance is 50%). Median {figures.unit}: chosen "
        f"{figures.median_chosen:,.0f}, rejected {figures.median_rejected:,.0f}; correlation of length and being "
        f"chosen {figures.correlation:+.2f}. DPO tends to make all answers {which}"
    )
    if explained:
        message += f", but {explained} tells these pairs apart as well: the length may just come with it"
    gap = np.log((chosen + 1) / (rejected + 1)) * (1 if figures.longer_chosen else -1)
    telling = [int(lines[i]) for i in np.argsort(-gap, kind="stable")[:_NAMED] if gap[i] > 0]
    yield found("length_bias", message, telling, severity=severity, **figures.to_json())
