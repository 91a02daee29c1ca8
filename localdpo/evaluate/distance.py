"""How far pairs are from what the model would say: log-probs per token under the base, and the rows far off.

An answer that is much less likely than the others is garbled, in another language or format, or simply hard to learn
from: DPO pushes such tokens hardest. The log-probs are those that training would compute, and are kept in the same
cache. This module judges nothing but distance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from localdpo.core.losses import pair_logps
from localdpo.core.reference import ReferenceCache
from localdpo.data.check.findings import Finding, Severity, found
from localdpo.data.encode import encode_pairs
from localdpo.data.jsonl import ProblemLog
from localdpo.data.pairs import PreferencePair, listed, scan_pairs
from localdpo.dpo.scorer import make_scorer
from localdpo.model.load import LoadedModel
from localdpo.paths import cache_dir
from localdpo.recipe import Truncation
from localdpo.steps import Steps

__all__ = ["Distances", "distance_findings", "measure_distances"]

FAR_Z = -4.0
"""Robust z-scores below this are far off: 1 of 30,000 rows, were they normally distributed."""
_LEAST_PAIRS = 12
_LEAST_SPREAD = 0.25  # nats a token: among very even rows a small difference is no outlier
_UNLIKE = -1.0

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Distances:
    """Log-probs per token in nats under the base, [pairs] each, with the pairs' lines."""

    lines: npt.NDArray[np.int64]
    chosen: _Floats
    rejected: _Floats
    model: str


def measure_distances(
    path: Path,
    loaded: LoadedModel,
    *,
    max_length: int = 1024,
    truncation: Truncation = "keep_start",
    progress: Callable[[int, int], None] | None = None,
) -> Distances:
    """Score every readable pair of a file with the base model. Raises `InputError` when none can be encoded."""
    pairs = [row for row in scan_pairs(path, ProblemLog()) if isinstance(row, PreferencePair)]
    if not pairs:
        none = np.zeros(0)
        return Distances(np.zeros(0, np.int64), none, none, loaded.spec)
    encoding = encode_pairs(pairs, loaded.tokenizer, max_length, truncation)
    cache = ReferenceCache(cache_dir() / "reference", loaded.fingerprint, loaded.device)
    steps = Steps(cache.fill(make_scorer(loaded.model), encoding.pairs))
    for done, total in steps:
        if progress is not None:
            progress(done, total)
    logps = pair_logps(encoding.pairs, steps.result)
    return Distances(
        np.array([pair.line for pair in encoding.pairs], np.int64),
        np.asarray(logps.chosen, np.float64) / np.maximum(1, logps.chosen_tokens),
        np.asarray(logps.rejected, np.float64) / np.maximum(1, logps.rejected_tokens),
        loaded.spec,
    )


def robust_z(values: _Floats) -> _Floats:
    """Return how many deviations each value is from the median; the deviation is estimated from the median too.

    1.4826 times the median absolute deviation is a normal distribution's standard deviation.
    """
    median = np.median(values)
    spread = max(_LEAST_SPREAD, 1.4826 * float(np.median(np.abs(values - median))))
    return (values - median) / spread


def distance_findings(distances: Distances) -> Iterator[Finding]:
    """Yield the rows far off, and whether chosen answers as a whole are unlike the model."""
    if len(distances.lines) < _LEAST_PAIRS:
        return
    for name, values in (("chosen", distances.chosen), ("rejected", distances.rejected)):
        far = _far(values)
        if far:
            yield _far_finding(name, values, far, distances)
    chosen, rejected = float(np.median(distances.chosen)), float(np.median(distances.rejected))
    message = (
        f"under {distances.model} a token of a chosen answer has a log-prob of {chosen:.2f} (median), of a rejected "
        f"one {rejected:.2f}"
    )
    unlike = chosen - rejected < _UNLIKE
    if unlike:
        message += ": the model would hardly say the chosen answers, and is asked to move far"
    yield found(
        "distance",
        message,
        fix=None if unlike else "",
        chosen_logp_per_token=round(chosen, 4),
        rejected_logp_per_token=round(rejected, 4),
        pairs=len(distances.lines),
    )


def _far(values: _Floats) -> list[int]:
    scores = robust_z(values)
    return sorted(np.flatnonzero(scores < FAR_Z).tolist(), key=lambda i: float(scores[i]))


def _far_finding(name: str, values: _Floats, far: Sequence[int], distances: Distances) -> Finding:
    lines = [int(distances.lines[i]) for i in far]
    one = f"the {name} answer of 1 pair is" if len(far) == 1 else f"the {name} answers of {len(far):,} pairs are"
    message = (
        f"{one} far less likely under {distances.model} than the others: {values[far[0]]:.2f} a token at "
        f"{listed(lines[:1])}, where the median is {np.median(values):.2f}"
    )
    return found(
        "far",
        message,
        lines,
        severity=None if name == "chosen" else Severity.INFO,
        answer=name,
        logp_per_token=[round(float(values[i]), 3) for i in far],
        z=[round(float(z), 2) for z in robust_z(values)[far]],
    )
