"""How many tokens a pair has: estimated from its characters, or counted with a model's own tokenizer and template.

This module knows no model files: a tokenizer is handed in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from localdpo.data.chat import ChatFormat, ChatTokenizer, Refusal
from localdpo.data.pairs import PreferencePair

__all__ = ["Counter", "ExactCounter", "TokenCounts", "estimate_counts", "estimate_tokens"]

_TURN_OVERHEAD = 5  # role, newlines and control tokens of a chat template, roughly
_ANSWER_OVERHEAD = 1  # the end of the turn


class TokenCounts(NamedTuple):
    """Tokens of a prompt as the template writes it, and of each answer with its end of turn."""

    prompt: int
    chosen: int
    rejected: int

    @property
    def longest(self) -> int:
        """The prompt with the longer answer: what `data.max_length` limits."""
        return self.prompt + max(self.chosen, self.rejected)


Counter = Callable[[PreferencePair], TokenCounts]


def estimate_tokens(text: str) -> int:
    """Return about how many tokens a text has: four ASCII characters each, or one other character or so."""
    if text.isascii():
        return -(-len(text) // 4)
    plain = len(text.encode("ascii", "ignore"))
    return -(-plain // 4) + round(0.8 * (len(text) - plain))


def estimate_counts(pair: PreferencePair) -> TokenCounts:
    """Return estimated counts of a pair."""
    prompt = sum(estimate_tokens(turn["content"]) + _TURN_OVERHEAD for turn in pair.prompt) + _TURN_OVERHEAD
    return TokenCounts(
        prompt,
        estimate_tokens(pair.chosen) + _ANSWER_OVERHEAD,
        estimate_tokens(pair.rejected) + _ANSWER_OVERHEAD,
    )


class ExactCounter:
    """Counts with a model's tokenizer and chat template; pairs that the template refuses are estimated, and counted."""

    def __init__(self, tokenizer: ChatTokenizer, only_from: int = 0) -> None:
        """Pairs that cannot reach `only_from` tokens are estimated, as no token is shorter than a byte.

        Raises `InputError` when the tokenizer has no usable chat format.
        """
        self._format = ChatFormat(tokenizer)
        self._only_from = only_from
        shortest = self._format.encode([{"role": "user", "content": "a"}], ("a",))
        self._template = len(shortest.prompt_ids) + len(shortest.completions[0])
        self.refused = 0

    def __call__(self, pair: PreferencePair) -> TokenCounts:
        """Return the counts of a pair as training would encode it."""
        if self._only_from and self._most(pair) < self._only_from:
            return estimate_counts(pair)
        try:
            conversation = self._format.encode(pair.prompt, (pair.chosen, pair.rejected), pair.tools)
        except Refusal:
            self.refused += 1
            return estimate_counts(pair)
        chosen, rejected = conversation.completions
        return TokenCounts(len(conversation.prompt_ids), len(chosen), len(rejected))

    def _most(self, pair: PreferencePair) -> int:
        """More tokens than the pair can have; without end where its length is not in its texts."""
        if pair.tools or any(set(turn) - {"role", "content"} for turn in pair.prompt):
            return self._only_from
        texts = [*(turn["content"] for turn in pair.prompt), max(pair.chosen, pair.rejected, key=len)]
        return sum(4 * len(text) if not text.isascii() else len(text) for text in texts) + self._template * len(texts)
