"""Hold pairs out for evaluation so that no prompt is on both sides.

Prompts are compared turn by turn, white space at the ends aside. Prompts that only mean the same are not
found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from localdpo.data.pairs import PreferencePair, PromptRow, prompt_key

__all__ = ["held_out_rows", "overlap"]


def held_out_rows(keys: Iterable[bytes], fraction: float, seed: int) -> list[int]:
    """Return which of the rows with these prompts (`prompt_key`) to hold out, in order: about `fraction` of them.

    Rows with the same prompt stay together. Which prompts are held out depends on the seed and the prompts alone, not
    on the order of the rows. With any `fraction` above 0 at least one prompt is held out when there are two; the
    training side is never empty.
    """
    prompts, groups, counts = np.unique(_words(keys, 16), axis=0, return_inverse=True, return_counts=True)
    if fraction <= 0 or len(prompts) < 2:
        return []
    names = (prompt.astype(">u8").tobytes().hex() for prompt in prompts)
    order = np.lexsort(_words((hashlib.sha256(f"{seed}:{name}".encode()).digest() for name in names), 32).T[::-1])
    wanted, held, chosen = max(1, round(fraction * len(groups))), 0, []
    for prompt in order:
        if held + counts[prompt] <= wanted:
            chosen.append(prompt)
            held += counts[prompt]
        if held == wanted:
            break
    if not chosen:
        # Every prompt has more pairs than wanted: take the one with the fewest.
        chosen = [order[np.argmin(counts[order])]]
    return [int(row) for row in np.flatnonzero(np.isin(groups.ravel(), chosen))]


def _words(digests: Iterable[bytes], size: int) -> np.ndarray:
    """Digests of `size` bytes as rows of numbers, which sort as the digests do."""
    joined = bytearray()
    for digest in digests:
        joined += digest
    return np.frombuffer(joined, ">u8").reshape(-1, size // 8).astype(np.uint64)


def overlap(
    train: Iterable[PreferencePair | PromptRow], held_out: Sequence[PreferencePair | PromptRow]
) -> list[PreferencePair | PromptRow]:
    """Return the held-out rows whose prompt is trained on as well."""
    if not held_out:
        return []
    keys = [prompt_key(row.prompt) for row in held_out]
    # Of the prompts trained on, which may be very many, only those that are held out as well are remembered.
    seen = set(keys).intersection(prompt_key(row.prompt) for row in train)
    return [row for key, row in zip(keys, held_out, strict=True) if key in seen]
