"""What the Pairs place says about the pair in the editor: tokens, words that differ, problems.

Counting and comparing follow the typing at a distance, off the UI thread; without a loaded model tokens are
estimated and marked ≈.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from textual.content import Content
from textual.timer import Timer

from localdpo.data.worddiff import different_words
from localdpo.errors import LocalDPOError
from localdpo_tui.places.pair_files import PairFiles
from localdpo_tui.services.pair_limits import PairLimits
from localdpo_tui.services.pair_rows import estimate_tokens, row_findings
from localdpo_tui.widgets.pair_editor import PairEditor

if TYPE_CHECKING:
    from localdpo.data.rows import PairDraft

__all__ = ["PairCounts"]

COUNT_SECONDS = 0.15
_TURN_TOKENS = 4
"""About what a chat template adds to a turn."""


class PairCounts(PairFiles):
    """Shows counts, differences and findings in the place's editor."""

    def __init__(self) -> None:
        super().__init__()
        self._counting: Timer | None = None
        self._limits: tuple[Path, PairLimits] | None = None

    @property
    def editor(self) -> PairEditor:
        """The editor."""
        raise NotImplementedError

    def recount(self) -> None:
        """Count and compare again, once the typing rests."""
        if self._counting is not None:
            self._counting.stop()
        self._counting = self.set_timer(COUNT_SECONDS, self._start_counting)

    def _start_counting(self) -> None:
        draft = self.editor.draft
        if draft is not None:
            self.spawn(self._count, draft, exclusive=True, group="count")

    async def _count(self, draft: PairDraft) -> None:
        differing = await asyncio.to_thread(different_words, draft.chosen, draft.rejected)
        counts, exact = await self.count_tokens(draft)
        if not self.editor.ready or self.editor.draft != draft:
            return
        self.editor.chosen.mark(differing[0])
        self.editor.rejected.mark(differing[1])
        if exact and self.store is not None and self.shown_key is not None:
            self.store.max_tokens = self.max_length
            self.store.note_tokens({self.shown_key: counts[0] + max(counts[1:])})
            self.refresh_rows()
        self._show_counts(counts, "" if exact else "≈")
        self._show_findings(draft, counts)

    async def count_tokens(self, draft: PairDraft) -> tuple[tuple[int, int, int], bool]:
        """Return the tokens of prompt, chosen and rejected, and whether they were counted rather than guessed."""
        limits = await self._find_limits()
        counted = await self._counted(limits.model, draft)
        if counted is not None:
            return counted, True
        prompt = sum(estimate_tokens(turn["content"]) + _TURN_TOKENS for turn in draft.messages)
        return (prompt, estimate_tokens(draft.chosen), estimate_tokens(draft.rejected)), False

    async def _counted(self, model: str, draft: PairDraft) -> tuple[int, int, int] | None:
        """Ask the host, if it is there already: counting alone is no reason to start a process."""
        if not self.app.host_started or not self.app.host.running:
            return None
        from localdpo_tui.services.model_host import CountRow

        row = CountRow(messages=[dict(turn) for turn in draft.messages], answers=[draft.chosen, draft.rejected])
        try:
            (count,) = await self.app.host.count_tokens(model, [row])
        except LocalDPOError:
            return None
        return None if count.problem else (count.prompt, count.answers[0], count.answers[1])

    async def _find_limits(self) -> PairLimits:
        """Return what the recipe of the open file says, read once for each file."""
        store = self.store
        if store is None:
            return PairLimits()
        if self._limits is None or self._limits[0] != store.path:
            self._limits = store.path, await asyncio.to_thread(_limits_for, self.app.folder, store.path)
        return self._limits[1]

    @property
    def max_length(self) -> int:
        """How many tokens prompt and answer may have together."""
        return (self._limits[1] if self._limits is not None else PairLimits()).max_length

    def _show_counts(self, counts: tuple[int, int, int], about: str) -> None:
        prompt, *answers = counts
        turns = self.editor.turns
        for box in turns:
            box.border_subtitle = ""
        turns[-1].border_subtitle = Content(f"{about}{prompt:,} tokens")
        for answer, count in zip((self.editor.chosen, self.editor.rejected), answers, strict=True):
            total = prompt + count
            over = " too long" if total > self.max_length else ""
            answer.border_subtitle = Content(f"{about}{total:,}/{self.max_length:,} tokens{over}")
            answer.set_class(bool(over), "-too-long")

    def _show_findings(self, draft: PairDraft, counts: tuple[int, int, int]) -> None:
        store, key = self.store, self.shown_key
        lines = row_findings(store, key) if store is not None and key is not None else []
        prompt, *answers = counts
        for name, count in zip(("chosen", "rejected"), answers, strict=True):
            if prompt + count > self.max_length:
                lines.append(
                    f"Prompt and {name} answer are longer than max_length ({self.max_length:,} tokens): the recipe's "
                    "truncation decides what is cut."
                )
        problem = self.editor.weight_problem
        self.editor.show_findings(lines + ([problem] if problem else []))

    @property
    def shown_key(self) -> int | None:
        """The key of the row in the editor."""
        raise NotImplementedError


def _limits_for(folder: Path, pairs: Path) -> PairLimits:
    from localdpo_tui.services.pair_recipe import limits_for  # reads YAML: not needed for the first paint

    return limits_for(folder, pairs)
