"""The order in which a run visits its rows: seeded epochs in which every row comes exactly once.

The order is a pure function of the seed and the epoch, so a position in it is two integers and a
resumed run needs no history. This module knows row numbers only: no pairs, no models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """Where the next window is: its epoch, counted from 0, and its number inside the epoch."""

    epoch: int = 0
    window: int = 0


def epoch_order(num_rows: int, *, seed: int, epoch: int, strata: Sequence[str] | None = None) -> np.ndarray:
    """A permutation of ``range(num_rows)``, int64 [num_rows]; the same for the same arguments.

    With ``strata`` (one label a row) every label is spread evenly over the epoch, so that small
    batches hold preference and retain rows in nearly the proportion of the whole set. Within a
    label the order is a plain shuffle.
    """
    rng = np.random.Generator(np.random.PCG64([seed, epoch]))
    if strata is None:
        return rng.permutation(num_rows)
    if len(strata) != num_rows:
        raise ValueError(f"strata has {len(strata)} labels for {num_rows} rows")
    labels = np.asarray(strata, dtype=str)
    place = np.empty(num_rows)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        # One row falls into each of len(rows) equal slices of the epoch, anywhere inside its slice.
        place[rng.permutation(rows)] = (np.arange(len(rows)) + rng.random(len(rows))) / len(rows)
    return np.argsort(place, kind="stable")


class RowOrder:
    """Cuts seeded epochs into windows: the rows of one optimizer step.

    A window holds ``window_size`` rows (batch size x accumulation). The last one of an epoch may
    hold fewer, and with fewer rows than a window the only one does.

    Raises ValueError without rows or with an empty window.
    """

    def __init__(self, num_rows: int, window_size: int, *, seed: int, strata: Sequence[str] | None = None) -> None:
        if num_rows < 1 or window_size < 1:
            raise ValueError(f"need a row and a window of at least one, got {num_rows} and {window_size}")
        self.num_rows = num_rows
        self.window_size = window_size
        self.steps_per_epoch = ceil(num_rows / window_size)
        self._seed = seed
        self._strata = strata
        self._cached: tuple[int, np.ndarray] | None = None

    def rows(self, position: Position) -> np.ndarray:
        """The row numbers of the window at ``position``, int64."""
        if self._cached is None or self._cached[0] != position.epoch:
            order = epoch_order(self.num_rows, seed=self._seed, epoch=position.epoch, strata=self._strata)
            self._cached = position.epoch, order
        start = position.window * self.window_size
        return self._cached[1][start : start + self.window_size]

    def after(self, position: Position) -> Position:
        """The position of the next window, in the next epoch after an epoch's last."""
        if position.window + 1 < self.steps_per_epoch:
            return Position(position.epoch, position.window + 1)
        return Position(position.epoch + 1, 0)

    def epochs_done(self, position: Position) -> float:
        """Epochs behind ``position`` as a fraction: 1.5 is half way through the second."""
        return position.epoch + min(position.window * self.window_size, self.num_rows) / self.num_rows
