"""What `localdpo doctor` finds, and how it is told. Knows nothing of where findings come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from localdpo.errors import LocalDPOError
from localdpo.text import sanitise

Level = Literal["ok", "advice", "broken"]
_SIGNS: dict[Level, str] = {"ok": "ok    ", "advice": "advice", "broken": "BROKEN"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; ``advice`` is empty when there is nothing to do."""

    name: str
    level: Level
    value: str
    advice: str = ""


def gathered(checks: Iterable[Callable[[], Iterator[Finding]]]) -> list[Finding]:
    """Run all checks; one that fails itself is a finding too, as a doctor that crashes helps nobody."""
    return [finding for check in checks for finding in _guarded(check)]


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    name = getattr(check, "__name__", "check").removeprefix("_")
    try:
        yield from check()
    except LocalDPOError as error:
        for problem in error.problems[:5]:
            yield Finding(name, "broken", f"{problem.where}: {problem.message}", problem.fix)
    except Exception as error:
        yield Finding(name, "broken", f"{type(error).__name__}: {error}", "Install localdpo again and compare versions")


def lines(findings: Sequence[Finding]) -> list[str]:
    """Return the findings for people, one or two lines each."""
    shown = []
    for finding in findings:
        shown.append(f"{_SIGNS[finding.level]}  {finding.name:9} {_line(finding.value)}")
        if finding.advice:
            shown.append(f"{'':18}{_line(finding.advice).rstrip('.')}.")
    return shown


def _line(text: str) -> str:
    return " ".join(sanitise(text).split())
