"""A file of pairs in figures: how many, how long, with which tags and in which languages.

One pass, some twenty bytes a pair. It judges nothing; `localdpo.data.check` does.
"""

from __future__ import annotations

from array import array
from collections import Counter as Tally
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from localdpo.data.check.tokens import Counter, estimate_counts
from localdpo.data.jsonl import ProblemLog, Progress
from localdpo.data.language import guess_language
from localdpo.data.pairs import PreferencePair, Skipped, prompt_key, scan_pairs

__all__ = ["FIELDS", "Histogram", "Lengths", "Stats", "file_stats"]

FIELDS = ("prompt", "chosen", "rejected")
_LANGUAGE_SAMPLE = 600
_MOST_TAGS = 10_000


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts by length: `counts[i]` of `edges[i]` to `edges[i + 1] - 1` tokens."""

    edges: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, values: Sequence[int]) -> Histogram:
        """Count values into bins that double in width, from the first that is needed to the last."""
        if not len(values):
            return cls((), ())
        numbers = np.asarray(values, np.int64)
        # bin k is [2^(k-1), 2^k), and 0 has one of its own
        bins = np.ceil(np.log2(numbers + 1)).astype(int)
        first, last = int(bins.min()), int(bins.max())
        counts = np.bincount(bins - first, minlength=last - first + 1)
        edges = [0 if k == 0 else 1 << (k - 1) for k in range(first, last + 2)]
        return cls(tuple(edges), tuple(int(count) for count in counts))


@dataclass(frozen=True, slots=True)
class Lengths:
    """The token counts of one field."""

    total: int
    low: int
    median: float
    mean: float
    p95: float
    high: int
    histogram: Histogram

    @classmethod
    def of(cls, values: Sequence[int]) -> Lengths:
        """Sum up at least one value."""
        numbers = np.asarray(values, np.int64)
        median, p95 = np.percentile(numbers, (50, 95))
        return cls(
            int(numbers.sum()),
            int(numbers.min()),
            float(median),
            float(numbers.mean()),
            float(p95),
            int(numbers.max()),
            Histogram.of(values),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the figures by name."""
        histogram = {"edges": list(self.histogram.edges), "counts": list(self.histogram.counts)}
        figures = {"total": self.total, "min": self.low, "median": self.median, "mean": round(self.mean, 2)}
        return {**figures, "p95": self.p95, "max": self.high, "histogram": histogram}


@dataclass(slots=True)
class Stats:
    """A file's figures. `broken` counts problems, which are not pairs; `tokens` is empty without pairs.

    `prompt` tokens are with the chat template, answers with their end of turn. `estimated` says that no tokenizer was
    asked.
    """

    file: str
    estimated: bool
    pairs: int = 0
    skipped: int = 0
    broken: int = 0
    prompts: int = 0
    multi_turn: int = 0
    with_system: int = 0
    with_tools: int = 0
    retained: int = 0
    weighted: int = 0
    untagged: int = 0
    chosen_longer: int = 0
    rejected_longer: int = 0
    tags: dict[str, int] = field(default_factory=dict)
    languages: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, Lengths] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the figures as `localdpo pairs stats --json` writes them."""
        plain = {name: getattr(self, name) for name in self.__slots__ if name != "tokens"}
        return {**plain, "tokens": {name: lengths.to_json() for name, lengths in self.tokens.items()}}


def file_stats(path: Path, counter: Counter | None = None, progress: Progress | None = None) -> Stats:
    """Read a file once; without `counter` tokens are estimated. Raises `InputError` when it cannot be read."""
    log = ProblemLog()
    gathered = _Gathered(Stats(str(path), counter is None), counter or estimate_counts)
    for row in scan_pairs(path, log, progress):
        if isinstance(row, Skipped):
            gathered.stats.skipped += 1
        else:
            gathered.add(row)
    gathered.stats.broken = log.total
    return gathered.closed()


@dataclass(slots=True)
class _Gathered:
    stats: Stats
    counter: Counter
    prompts: set[bytes] = field(default_factory=set)
    tags: Tally[str] = field(default_factory=Tally)
    languages: Tally[str] = field(default_factory=Tally)
    lengths: dict[str, array[int]] = field(default_factory=lambda: {name: array("i") for name in FIELDS})

    def add(self, pair: PreferencePair) -> None:
        stats, counts = self.stats, self.counter(pair)
        stats.pairs += 1
        stats.multi_turn += sum(turn["role"] == "user" for turn in pair.prompt) > 1
        stats.with_system += any(turn["role"] == "system" for turn in pair.prompt)
        stats.with_tools += bool(pair.tools)
        stats.retained += pair.kind == "retain"
        stats.weighted += pair.weight != 1.0
        stats.untagged += not pair.tags
        stats.chosen_longer += counts.chosen > counts.rejected
        stats.rejected_longer += counts.chosen < counts.rejected
        self.prompts.add(prompt_key(pair.prompt)[:8])
        for tag in pair.tags:
            if tag in self.tags or len(self.tags) < _MOST_TAGS:
                self.tags[tag] += 1
        sample = f"{pair.prompt[-1]['content'][:_LANGUAGE_SAMPLE]}\n{pair.chosen[:_LANGUAGE_SAMPLE]}"
        self.languages[guess_language(sample) or "unknown"] += 1
        for column, count in zip(self.lengths.values(), counts, strict=True):
            column.append(count)

    def closed(self) -> Stats:
        stats = self.stats
        stats.prompts = len(self.prompts)
        stats.tags, stats.languages = dict(self.tags.most_common()), dict(self.languages.most_common())
        if stats.pairs:
            stats.tokens = {name: Lengths.of(column) for name, column in self.lengths.items()}
        return stats
