"""Work in steps: a generator that yields how far it is, and returns what it made.

Whoever watches may leave between two steps. This module knows nothing about the work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any, Generic, TypeVar

__all__ = ["Steps", "mapped", "result_of"]

Step = TypeVar("Step")
Other = TypeVar("Other")
Result = TypeVar("Result")


class Steps(Generic[Step, Result]):
    """The steps of ``work`` to loop over; once they are through, ``result`` is what it returned."""

    result: Result

    def __init__(self, work: Generator[Step, Any, Result]) -> None:
        self._work = work

    def __iter__(self) -> Iterator[Step]:
        self.result = yield from self._work


def mapped(work: Generator[Step, Any, Result], change: Callable[[Step], Other]) -> Generator[Other, None, Result]:
    """``work`` with ``change(step)`` in place of each of its steps."""
    steps = Steps(work)
    for step in steps:
        yield change(step)
    return steps.result


def result_of(work: Generator[Any, Any, Result]) -> Result:
    """What ``work`` returns, its steps unseen."""
    steps = Steps(work)
    deque(steps, maxlen=0)
    return steps.result
