"""How much runs at a time, for what runs it and for what estimates it. Plain numbers; never imports mlx."""

from __future__ import annotations

from math import sqrt
from typing import Literal

Mode = Literal["cpu", "lean", "gpu"]
"""Where a model computes; "lean" is a CPU that holds the base as it is stored, to spare memory."""

CPU_STREAMS = {"cpu": 4, "lean": 1, "gpu": 1}
"""Over how many streams a micro-batch is spread at most, where there are as many cores. Measured on two: two streams
with a single-threaded BLAS each beat one with two threads (docs/decisions/0002); a step in four lanes takes a tenth
more processor time than in two, so four cores should gain by them (0006)."""

MICRO_BATCH_TOKENS = {"cpu": 1024, "lean": 256, "gpu": 4096}
"""The longest micro-batch, but for a single pair that is longer."""

CALL_COST = {"cpu": 32_000, "gpu": 1_000_000}
"""What an attention call costs beside its scores, in scores of one head.

On a CPU some 65 small operations, about 0.5 ms, measured. On a GPU some ten kernels a call, about 50 us, while it
computes some 20 scores a nanosecond: reckoned from launch times and peak rates, not measured (docs/decisions/0004).
"""


def block_rows(call_cost: int) -> float:
    """Tokens of a long segment that an attention call of that cost had best take.

    n tokens, b a call, make n/b calls and some n*b/2 scores of later tokens: least at b = sqrt(2 * call_cost).
    """
    return sqrt(2 * max(1, call_cost))


IN_FLIGHT = 4
"""Blocks of a lane's attention that may be under way at once on a CPU (docs/decisions/0007). With one, streams wait for
each other a quarter of the time: MLX hands out some ten operations ahead in all. With all of them, memory holds the
scores of the whole lane."""


def mode_of(device: str, memory: str) -> Mode:
    """The mode of a loaded model, by its ``device`` and ``memory``."""
    return "gpu" if device != "cpu" else "lean" if memory == "lean" else "cpu"


def tokens_alive(mode: Mode, longest: int) -> int:
    """Tokens whose activations are there at once where there is no end of pairs with ``longest`` tokens."""
    return longest * max(1, MICRO_BATCH_TOKENS[mode] // longest)
