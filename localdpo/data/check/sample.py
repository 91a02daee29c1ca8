"""A bounded sample of a file's pairs, taken by prompt, the same whatever the order of the rows."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from localdpo.data.check.features import Answers

__all__ = ["PromptSample"]

_KEPT_CHARS = 4_000
_SCRAMBLE, _MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1


class PromptSample:
    """Keeps the pairs whose prompts hash lowest, so that pairs of one prompt are kept together."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._heap: list[tuple[int, int, str, str, int]] = []

    def add(self, line: int, prompt: int, chosen: str, rejected: str) -> None:
        """Offer a pair; `prompt` is the 64-bit digest of its prompt."""
        # Digests are even already; scrambling keeps the sample apart from others that order by digest.
        priority = -((prompt * _SCRAMBLE) & _MASK)
        if len(self._heap) >= self._size and (priority, -line) <= self._heap[0][:2]:
            return
        item = priority, -line, chosen[:_KEPT_CHARS], rejected[:_KEPT_CHARS], prompt
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, item)
        else:
            heapq.heapreplace(self._heap, item)

    def __len__(self) -> int:
        return len(self._heap)

    def answers(self) -> list[Answers]:
        """Return the sample in file order."""
        return list(self._in_order())

    def _in_order(self) -> Iterator[Answers]:
        numbers: dict[int, int] = {}
        for _, line, chosen, rejected, prompt in sorted(self._heap, key=lambda item: -item[1]):
            yield Answers(-line, numbers.setdefault(prompt, len(numbers)), chosen, rejected)
