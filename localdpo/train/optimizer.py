"""AdamW over the adapter's parameters: learning-rate schedules, clipping, and the guard against NaN.

The state is a flat mapping of arrays by name, so a checkpoint holds it as it is. This module knows
nothing about losses or where gradients come from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from math import ceil, cos, pi
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from localdpo.data.encode import EncodedPair
from localdpo.errors import DivergedError, Problem
from localdpo.recipe import TrainRecipe

Gradients = Mapping[str, mx.array]


def warmup_steps(settings: TrainRecipe, total_steps: int) -> int:
    """``warmup_steps``, else ``warmup_ratio`` of all steps rounded up; always less than all steps."""
    wanted = settings.warmup_steps
    if wanted is None:
        wanted = ceil(settings.warmup_ratio * total_steps)
    return min(wanted, max(total_steps - 1, 0))


def learning_rate_at(settings: TrainRecipe, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step ``step``, counted from 1.

    After the warm-up this is the rate that transformers' schedulers give the same step. In a
    warm-up of w steps, step k has k / (w + 1) of the full rate: theirs is (k - 1) / w, which makes
    the first step of every run do nothing.
    """
    warmup = warmup_steps(settings, total_steps)
    if step <= warmup:
        return settings.learning_rate * step / (warmup + 1)
    progress = (step - 1 - warmup) / max(total_steps - warmup, 1)
    scale = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + cos(pi * progress)),
    }[settings.lr_scheduler_type]
    return settings.learning_rate * max(scale, 0.0)


def global_norm(gradients: Gradients) -> float:
    """The Euclidean norm over all gradients together, summed in float32 in the order of their names."""
    total = mx.array(0.0)
    for name in sorted(gradients):
        total = total + mx.square(gradients[name].astype(mx.float32)).sum()
    norm: Any = mx.sqrt(total).item()
    return float(norm)


class AdapterOptimizer:
    """AdamW (Loshchilov & Hutter 2019) with bias correction, for the trainable parameters of ``model``.

    ``mlx.optimizers`` leaves the correction out unless told: the first update would then be about
    3.2 times the learning rate.
    """

    def __init__(self, model: nn.Module, settings: TrainRecipe) -> None:
        self._model = model
        self._max_norm = settings.max_grad_norm
        self._adamw = optim.AdamW(
            learning_rate=settings.learning_rate,
            betas=[settings.adam_beta1, settings.adam_beta2],
            eps=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
            bias_correction=True,
        )
        self._adamw.init(self._parameters())

    def _parameters(self) -> dict[str, mx.array]:
        flat: Any = tree_flatten(self._model.trainable_parameters())
        return dict(sorted(flat))

    def update(self, gradients: Gradients, *, norm: float, learning_rate: float) -> None:
        """Clip ``gradients`` (by name, as in ``trainable_parameters``) from ``norm`` and take one step.

        The model and the state are evaluated when this returns.
        """
        if self._max_norm is not None:
            # The small term is torch's clip_grad_norm_, for equal curves.
            factor = min(self._max_norm / (norm + 1e-6), 1.0)
            gradients = {name: gradient * factor for name, gradient in gradients.items()}
        self._adamw.learning_rate = learning_rate
        parameters = self._parameters()
        updated = self._adamw.apply_gradients(dict(gradients), {name: parameters[name] for name in gradients})
        self._model.update(tree_unflatten(list(updated.items())))
        mx.eval(updated, self._adamw.state)

    def state(self) -> dict[str, mx.array]:
        """Everything a later process needs to go on: the step count and both moments, by flat name."""
        return dict(tree_flatten(self._adamw.state))

    def restore(self, state: Mapping[str, mx.array]) -> None:
        """Take over a ``state()``. Raises ValueError when it is for other parameters."""
        own = self.state()
        if {name: value.shape for name, value in own.items()} != {n: v.shape for n, v in state.items()}:
            raise ValueError("the optimizer state is for other parameters")
        restored: dict[str, Any] = {"step": state["step"], "learning_rate": state["learning_rate"]}
        for name in self._parameters():
            restored[name] = {moment: state[f"{name}.{moment}"] for moment in ("m", "v")}
        self._adamw.state = restored


def require_finite(
    step: int,
    window: Sequence[EncodedPair],
    per_row: Mapping[str, np.ndarray],
    whole: Mapping[str, float],
) -> None:
    """Raise DivergedError unless everything about a step is finite.

    ``per_row`` holds figures with one value a row of ``window``, ``whole`` figures of the step
    (its loss, its gradient norm). The rows whose own figures are bad are named; when only a figure
    of the step is bad, all rows of the step are.
    """
    bad_rows = {
        index: name for name, values in per_row.items() for index in np.flatnonzero(~np.isfinite(values)).tolist()
    }
    bad_figures = [name for name, value in whole.items() if not math.isfinite(value)]
    if not bad_rows and not bad_figures:
        return
    named = sorted(bad_rows) or range(len(window))
    rows = ", ".join(f"{window[index].source}:{window[index].line}" for index in named)
    what = " and ".join(dict.fromkeys([*bad_figures, *bad_rows.values()]))
    raise DivergedError(
        Problem(
            f"step {step}",
            f"training diverged: {what} not finite, in {'row' if len(named) == 1 else 'rows'} {rows}",
            "Look at these rows, or train with a lower train.learning_rate. Nothing was published; "
            "checkpoints of earlier steps are kept",
        )
    )
