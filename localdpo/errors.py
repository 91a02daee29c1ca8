"""One tree of exceptions for everything a user can cause, each with its exit code.

A `Problem` says where, what, and how to put it right; an error carries all problems found at once. Errors
of the program itself stay ordinary Python exceptions. This module knows nothing about how errors are
printed.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import dataclass

from localdpo.text import sanitise

__all__ = [
    "DivergedError",
    "EnvironmentFault",
    "InputError",
    "Interrupted",
    "LocalDPOError",
    "Problem",
    "first_problems",
]


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "!", "?", "…")) else text + "."


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    `where` is a file and line, a recipe key or an option; `message` says what is wrong, with the value;
    `fix` is what to do about it. Any of these may quote untrusted text: `str()` makes it inert.
    """

    where: str
    message: str
    fix: str = ""

    def __str__(self) -> str:
        text = _sentence(f"{self.where}: {self.message}" if self.where else self.message)
        return sanitise(f"{text} {_sentence(self.fix)}" if self.fix.strip() else text)


class LocalDPOError(Exception):
    """The root: something the user can act on. `exit_code` is what the command line ends with."""

    exit_code = 1

    def __init__(self, *problems: Problem | str) -> None:
        super().__init__(*problems)
        self.problems: tuple[Problem, ...] = tuple(p if isinstance(p, Problem) else Problem("", p) for p in problems)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class InputError(LocalDPOError):
    """A recipe, data file, model folder or option is not as it must be."""

    exit_code = 2


class EnvironmentFault(LocalDPOError):
    """The machine stands in the way: disk, memory, network, permissions, a lock."""

    exit_code = 3


class DivergedError(LocalDPOError):
    """Training met a loss or gradient that is not finite."""

    exit_code = 4


class Interrupted(LocalDPOError):
    """A signal ended the work; `exit_code` is 128 + its number."""

    exit_code = 130

    def __init__(self, *problems: Problem | str, signal_number: int = signal.SIGINT) -> None:
        super().__init__(*problems)
        self.exit_code = 128 + int(signal_number)


def first_problems(problems: Iterable[Problem], limit: int = 10, total: int | None = None) -> list[Problem]:
    """Return the first `limit` problems, and one more that counts the rest.

    `total` is how many there are, for a caller that kept only some of them.
    """
    found = list(problems)
    rest = max(total or 0, len(found)) - min(limit, len(found))
    return found[:limit] + ([Problem("", f"and {rest:,} more problems like these")] if rest else [])
