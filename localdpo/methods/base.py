"""What the training loop asks of a method, and which there are.

A method says what it makes of the log-probs of a window's rows, and which figures it tells of them. It knows nothing
about models, schedules or files; the loop knows none of them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Protocol

import mlx.core as mx
import numpy as np

from localdpo.core.score import SummedLogps, WindowLoss
from localdpo.recipe import METHODS, Recipe
from localdpo.sequences import EncodedRow, completion_lengths, sequences_of


class Method(Protocol):
    """A way to teach."""

    @property
    def needs_reference(self) -> bool:
        """Whether its loss reads the reference's log-probs."""
        ...

    def window_loss(self, window: Sequence[EncodedRow], reference: np.ndarray | None) -> WindowLoss:
        """The loss of one optimizer step on B rows.

        ``reference`` holds the reference's log-probs of their sequences, one row after the other, float32 [S]; None
        for a method that needs none, ValueError otherwise.
        """
        ...

    def metrics(
        self, columns: Mapping[str, np.ndarray], rows: Sequence[EncodedRow], reference: np.ndarray | None
    ) -> dict[str, float]:
        """Figures of ``rows`` under TRL's names, from their loss's ``columns``, float32 [B] each."""
        ...


def held_out_figures(
    method: Method, rows: Sequence[EncodedRow], logps: np.ndarray, reference: np.ndarray | None
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Each row's figures, and the metrics of all with the loss as in training, ``eval_`` before each.

    ``logps`` and ``reference`` are of the rows' sequences, float32 [S].
    """
    loss = method.window_loss(rows, reference)
    lengths = completion_lengths(sequences_of(rows)).astype(np.float32)
    total, table = loss.share(range(len(rows)), SummedLogps(mx.array(logps), mx.array(lengths)))
    columns = dict(zip(loss.columns, np.array(table).T, strict=True))
    metrics = {"loss": float(total), **method.metrics(columns, rows, reference)}
    return columns, {f"eval_{name}": value for name, value in metrics.items()}


def method_of(recipe: Recipe) -> Method:
    """The method that ``recipe`` asks for, with the settings of its section.

    Its module's ``from_recipe`` makes it.
    """
    module = import_module(METHODS[recipe.method])
    make: Callable[[Recipe], Method] = module.from_recipe
    return make(recipe)
