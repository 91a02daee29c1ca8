"""Hold pairs out for evaluation so that no prompt is on both sides.

Prompts are compared turn by turn, white space at the ends aside. Prompts that only mean the same are not
found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from localdpo.data.pairs import PreferencePair, PromptRow, prompt_key

__all__ = ["overlap", "split_by_prompt"]


def split_by_prompt(
    pairs: Sequence[PreferencePair], fraction: float, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Return (train, held out), both in the given order, with about `fraction` of the pairs held out.

    Pairs with the same prompt stay together.     Which prompts are held out depends on the seed and the
    prompts alone, not on the order of the rows. With any `fraction` above 0 at least one prompt is held out
    when there are two; the training side is never empty.
    """
    groups: dict[bytes, list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(prompt_key(pair.prompt), []).append(index)
    if fraction <= 0 or len(groups) < 2:
        return list(pairs), []
    order = sorted(groups, key=lambda key: hashlib.sha256(f"{seed}:{key.hex()}".encode()).digest())
    wanted = max(1, round(fraction * len(pairs)))
    held: set[int] = set()
    for key in order:
        if len(held) + len(groups[key]) <= wanted:
            held.update(groups[key])
    if not held:
        # Every prompt has more pairs than wanted: take the one with the fewest.
        held.update(groups[min(order, key=lambda key: len(groups[key]))])
    train = [pair for index, pair in enumerate(pairs) if index not in held]
    return train, [pair for index, pair in enumerate(pairs) if index in held]


def overlap(
    train: Iterable[PreferencePair | PromptRow], held_out: Iterable[PreferencePair | PromptRow]
) -> list[PreferencePair | PromptRow]:
    """Return the held-out rows whose prompt is trained on as well."""
    seen = {prompt_key(row.prompt) for row in train}
    return [row for row in held_out if prompt_key(row.prompt) in seen]
