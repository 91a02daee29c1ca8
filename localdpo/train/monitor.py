"""What the steps of an epoch come to. This module does no training; ``alarms`` says which figures are bad ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean

from localdpo.train.events import Event, StepEvent


@dataclass
class EpochLoss:
    """The mean training loss of the latest whole epoch (None before the first), from a run's events."""

    steps_per_epoch: int
    finished: float | None = None
    _losses: list[float] = field(default_factory=list)

    def see(self, event: Event) -> None:
        """Take in one event."""
        if not isinstance(event, StepEvent):
            return
        self._losses.append(event.metrics["loss"])
        if len(self._losses) == self.steps_per_epoch:
            self.finished = fmean(self._losses)
            self._losses.clear()
