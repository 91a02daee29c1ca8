"""How sure a share or an accuracy is: intervals and tests that small files may be trusted to."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["MIN_PROMPTS", "Share", "sign_test", "wilson"]

MIN_PROMPTS = 12
"""With fewer prompts no bias is spoken of: even a perfect one could hardly be told from luck among so many words."""

_Z95 = 1.959964


@dataclass(frozen=True, slots=True)
class Share:
    """A share of `n` independent cases with its 95 % interval."""

    value: float
    low: float
    high: float
    n: float

    def __str__(self) -> str:
        return f"{self.value:.0%} (95% interval {self.low:.0%} to {self.high:.0%})"


def wilson(share: float, n: float, z: float = _Z95) -> Share:
    """Return a share of `n` cases with Wilson's score interval; any share from 0 to 1, half cases too.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if n <= 0:
        return Share(share, 0.0, 1.0, 0.0)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Share(share, max(0.0, centre - half), min(1.0, centre + half), n)


def sign_test(first: int, second: int) -> float:
    """Return the two-sided p-value of `first` against `second` cases, were both equally likely."""
    n, low = first + second, min(first, second)
    if n == 0:
        return 1.0
    if n > 1000:  # the normal limit, with its continuity correction
        return min(1.0, math.erfc(max(0.0, abs(first - second) - 1) / math.sqrt(2 * n)))
    tail = sum(math.comb(n, k) for k in range(low + 1))
    return float(min(1.0, 2 * tail / 2**n))
