"""AdamW over the adapter's parameters: learning-rate schedules, clipping, and the guard against NaN.

The state is a flat mapping of arrays by name, so a checkpoint holds it as it is. This module knows
nothing about losses or where gradients come from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import ceil, cos, pi
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from localdpo.dpo.standin import Trainable
from localdpo.errors import DivergedError, Problem
from localdpo.recipe import TrainRecipe
from localdpo.sequences import EncodedRow

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
    """The Euclidean norm over all gradients together, in float32."""
    arrays = [gradients[name] for name in sorted(gradients)]
    total: Any = mx.array(0.0)
    for group in _groups(arrays):
        total = total + _sum_of_squares(_flat(arrays[group]))
    return math.sqrt(total.item())


def _sum_of_squares(flat: mx.array) -> mx.array:
    # In two stages: on a CPU MLX adds number after number, and three million of them would be off in the third digit.
    squares = mx.square(flat.astype(mx.float32))
    whole = flat.size // _SUMMED * _SUMMED
    rows = squares[:whole].reshape(whole // _SUMMED, _SUMMED)
    return rows.sum(axis=-1).sum() + squares[whole:].sum()


def _flat(arrays: Sequence[mx.array]) -> mx.array:
    return mx.concatenate([array.reshape(-1) for array in arrays])


def _parts(flat: mx.array, like: Sequence[mx.array]) -> list[mx.array]:
    """The arrays that :func:`_flat` put together, each in the form of its ``like``."""
    parts = mx.split(flat, list(accumulate(array.size for array in like))[:-1])
    return [part.reshape(array.shape).astype(array.dtype) for part, array in zip(parts, like, strict=True)]


def _groups(arrays: Sequence[mx.array]) -> list[slice]:
    """Neighbours that are handled as one array, of some 1 MB: to begin an operation then costs little beside it."""
    groups, start, size = [], 0, 0
    for index, array in enumerate(arrays, 1):
        size += array.size
        if size >= _TOGETHER or index == len(arrays):
            groups.append(slice(start, index))
            start, size = index, 0
    return groups


_SUMMED = 1024  # numbers added up in a row
_TOGETHER = 1 << 18  # numbers
_MOMENTS = ("m", "v")


class AdapterOptimizer:
    """AdamW (Loshchilov & Hutter 2019) with bias correction, for the trainable parameters of ``model``.

    An adapter is hundreds of small arrays, and to begin an operation on each takes longer than its arithmetic: they
    are updated some dozens at a time, as one array. ``mlx.optimizers`` leaves the correction out unless told: the first
    update would then be about 3.2 times the learning rate.
    """

    def __init__(self, model: nn.Module, settings: TrainRecipe) -> None:
        self._trainable = Trainable(model)
        self._groups = {str(number): group for number, group in enumerate(_groups(self._trainable.get()))}
        self._max_norm = settings.max_grad_norm
        self._adamw = optim.AdamW(
            learning_rate=settings.learning_rate,
            betas=[settings.adam_beta1, settings.adam_beta2],
            eps=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
            bias_correction=True,
        )
        parameters = self._trainable.get()
        self._adamw.init({key: _flat(parameters[group]) for key, group in self._groups.items()})

    def update(self, gradients: Gradients, *, norm: float, learning_rate: float) -> None:
        """Clip ``gradients`` (by name, as in ``trainable_parameters``) from ``norm`` and take one step.

        The model and the state are evaluated when this returns.
        """
        # The small term is torch's clip_grad_norm_, for equal curves.
        factor = 1.0 if self._max_norm is None else min(self._max_norm / (norm + 1e-6), 1.0)
        names, parameters = self._trainable.names, self._trainable.get()
        self._adamw.learning_rate = learning_rate
        updated = self._adamw.apply_gradients(
            {key: _flat([gradients[name] for name in names[group]]) * factor for key, group in self._groups.items()},
            {key: _flat(parameters[group]) for key, group in self._groups.items()},
        )
        parts = {key: _parts(flat, parameters[self._groups[key]]) for key, flat in updated.items()}
        for key, own in parts.items():  # a group at a time: the passes in between take no more memory than one needs
            mx.async_eval(own, self._adamw.state[key])
        self._trainable.put([part for own in parts.values() for part in own])
        mx.eval(parts, self._adamw.state)

    def state(self) -> dict[str, mx.array]:
        """Everything a later process needs to go on: the step count and both moments, by flat name."""
        own: Any = self._adamw.state
        state = {"step": own["step"], "learning_rate": own["learning_rate"]}
        names, parameters = self._trainable.names, self._trainable.get()
        for key, group in self._groups.items():
            for moment in _MOMENTS:
                parts = _parts(own[key][moment], parameters[group])
                state.update({f"{name}.{moment}": part for name, part in zip(names[group], parts, strict=True)})
        return state

    def restore(self, state: Mapping[str, mx.array]) -> None:
        """Take over a ``state()``. Raises ValueError when it is for other parameters."""
        own = self.state()
        if {name: value.shape for name, value in own.items()} != {n: v.shape for n, v in state.items()}:
            raise ValueError("the optimizer state is for other parameters")
        restored: dict[str, Any] = {"step": state["step"], "learning_rate": state["learning_rate"]}
        for key, group in self._groups.items():
            names = self._trainable.names[group]
            restored[key] = {moment: _flat([state[f"{name}.{moment}"] for name in names]) for moment in _MOMENTS}
        self._adamw.state = restored


def require_finite(
    step: int,
    window: Sequence[EncodedRow],
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
