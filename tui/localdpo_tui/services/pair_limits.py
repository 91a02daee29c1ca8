"""What limits the pairs of a file: the model that will read them, and the length it is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["PairLimits"]


@dataclass(frozen=True, slots=True)
class PairLimits:
    """The base model of the recipe and its `data.max_length`, in tokens; `recipe` is None for the defaults."""

    model: str = "smollm2-135m"
    max_length: int = 1024
    recipe: Path | None = None
