"""How tokens are chosen: the options of every answer, checked where they are made. Never loads mlx."""

from __future__ import annotations

from dataclasses import dataclass

from localdpo.errors import InputError, Problem

__all__ = ["SamplingOptions"]


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose tokens; the default is greedy.

    top_p, top_k and min_p apply when temperature > 0, and are off at 1.0, 0 and 0.0. repetition_penalty 1.0 is
    off. seed: None draws from mlx's global random state; a number makes the answer repeatable (and sets that state).
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Raise InputError naming every option out of range."""
        limits: list[tuple[str, bool, str]] = [
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= 100, "within 0 to 100"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("min_p", 0 <= self.min_p <= 1, "within 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 100, "above 0 and at most 100"),
        ]
        problems = [
            Problem(name, f"{getattr(self, name)} must be {wanted}") for name, fine, wanted in limits if not fine
        ]
        if problems:
            raise InputError(*problems)
