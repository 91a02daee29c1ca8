"""Count what is left out, by reason: nothing that is read and not kept may go unsaid.

Memory is bounded whatever the input: some reasons, and some lines of each, are kept; all are counted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from localdpo.data.pairs import listed
from localdpo.text import sanitise

__all__ = ["LeftOut", "Reason"]

_REASONS = 40
_LINES = 1000
_NUMBER = re.compile(r"\d[\d,.]*")
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")


@dataclass(slots=True)
class Reason:
    """One reason, in the words of its first row, how many rows it left out, and the first lines of them."""

    text: str
    count: int = 0
    lines: list[int] = field(default_factory=list)


@dataclass(slots=True)
class LeftOut:
    """The rows left out so far. `what` names one of them: row, prompt, answer; `place` what it is found by."""

    what: str = "row"
    place: str = "line"
    total: int = 0
    reasons: dict[str, Reason] = field(default_factory=dict)

    def add(self, line: int, reason: str, count: int = 1) -> None:
        """Count rows of `line` (0: none to name) under `reason`; those that differ in numbers or names are one."""
        self.total += count
        key = _NUMBER.sub("0", _QUOTED.sub("''", reason))
        if key not in self.reasons and len(self.reasons) >= _REASONS:
            key, reason = "", "other reasons"
        found = self.reasons.setdefault(key, Reason(reason))
        found.count += count
        if line and len(found.lines) < _LINES:
            found.lines.append(line)

    def sentences(self) -> list[str]:
        """A sentence a reason, the most frequent first, fit to be shown."""
        found = sorted(self.reasons.values(), key=lambda reason: -reason.count)
        return [self._sentence(reason) for reason in found]

    def _sentence(self, reason: Reason) -> str:
        lines = list(dict.fromkeys(reason.lines))
        where = f" ({_listed(lines, reason.count, self.place)})" if lines else ""
        number = f"{reason.count:,} {self.what}{'' if reason.count == 1 else 's'}"
        return sanitise(f"{number}: {reason.text}{where}")

    def to_json(self) -> list[dict[str, Any]]:
        """A list of objects with `reason`, `count` and the first `lines`, for programs."""
        found = sorted(self.reasons.values(), key=lambda reason: -reason.count)
        return [{"reason": reason.text, "count": reason.count, "lines": reason.lines} for reason in found]


def _listed(lines: list[int], count: int, place: str) -> str:
    if count <= len(lines):
        return listed(lines, place=place)
    return f"{place}s {', '.join(map(str, lines[:10]))} and more" if len(lines) > 1 else f"{place} {lines[0]}"
