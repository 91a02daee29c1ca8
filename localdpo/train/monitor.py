"""What a step and an evaluation are worth saying: metrics under TRL's names, and warnings in words.

Metrics are taken over rows, not over means of batches. Rows of kind "retain" are reported apart:
their rewards say how much was forgotten, not how much was learned. This module does no training.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from localdpo.data.encode import EncodedPair
from localdpo.dpo.losses import LossSettings, PairLogps, Policy, preference_loss
from localdpo.train.events import EvalEvent, Event, StepEvent, WarningEvent

_RECENT = 4
_LEARNED_LOSS = 0.01
_FALLEN_NATS = 2.0


class Scores(NamedTuple):
    """B pairs as the policy scores them; rewards are float32 [B]."""

    policy: PairLogps
    rewards_chosen: np.ndarray
    rewards_rejected: np.ndarray


def row_metrics(scores: Scores, pairs: Sequence[EncodedPair], reference: PairLogps | None) -> dict[str, float]:
    """Rewards and log-probs of ``pairs``: preference rows by TRL's names, retain rows under retain/.

    ``retain/drift`` is by how many nats a token the base's own answers have become less likely. A
    kind without rows has no metrics.
    """
    retained = np.array([pair.kind == "retain" for pair in pairs])
    metrics = _kind_metrics(scores, ~retained, "")
    if retained.any():
        metrics |= _kind_metrics(scores, retained, "retain/")
        if reference is not None:
            policy = scores.policy
            lost = (reference.chosen - policy.chosen)[retained].sum()
            metrics["retain/drift"] = float(lost / policy.chosen_tokens[retained].sum())
    return metrics


def held_out_metrics(
    policy: PairLogps, reference: PairLogps | None, pairs: Sequence[EncodedPair], settings: LossSettings
) -> dict[str, float]:
    """The loss as in training (weights and NLL included) and the metrics of the rows, ``eval_`` before each."""
    weights = np.array([pair.weight for pair in pairs], np.float32)
    fixed = reference or PairLogps(*(np.zeros(len(pairs), np.float32) for _ in range(4)))
    columns = (policy.chosen, policy.rejected, fixed.chosen, fixed.rejected, *policy[2:])
    output = preference_loss(Policy(*(mx.array(column.astype(np.float32)) for column in columns)), settings)
    losses, chosen, rejected = (np.array(values) for values in output)
    nll = -float((weights * policy.chosen).sum() / (weights * policy.chosen_tokens).sum())
    metrics = {
        "loss": float((weights * losses).sum() / weights.sum()) + settings.rpo_alpha * nll,
        "nll_loss": nll,
        **row_metrics(Scores(policy, chosen, rejected), pairs, reference),
    }
    return {f"eval_{name}": value for name, value in metrics.items()}


def _kind_metrics(scores: Scores, rows: np.ndarray, prefix: str) -> dict[str, float]:
    if not rows.any():
        return {}
    chosen, rejected = scores.rewards_chosen[rows], scores.rewards_rejected[rows]
    return {
        f"{prefix}rewards/chosen": float(chosen.mean()),
        f"{prefix}rewards/rejected": float(rejected.mean()),
        f"{prefix}rewards/accuracies": float((chosen > rejected).mean()),
        f"{prefix}rewards/margins": float((chosen - rejected).mean()),
        f"{prefix}logps/chosen": float(scores.policy.chosen[rows].mean()),
        f"{prefix}logps/rejected": float(scores.policy.rejected[rows].mean()),
    }


@dataclass
class Watch:
    """Reads a run's events as they come and says, once each, what is going wrong.

    It keeps no state of its own on disk: a resumed run shows it the earlier events again.
    """

    settings: LossSettings
    steps_per_epoch: int
    epoch_losses: list[float] = field(default_factory=list)
    finished_epoch_loss: float | None = None
    _first: list[tuple[float, float]] = field(default_factory=list)
    _last: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_RECENT))
    _preference: deque[float] = field(default_factory=lambda: deque(maxlen=3))
    _held_out: list[float] = field(default_factory=list)
    _said: set[str] = field(default_factory=set)

    def replay(self, events: Iterable[Event]) -> None:
        """See events of an earlier attempt again without a word."""
        for event in events:
            list(self.see(event))

    def see(self, event: Event) -> list[WarningEvent]:
        """Take in one event; returns the warnings it gives rise to."""
        if isinstance(event, StepEvent):
            found = self._see_step(event)
        elif isinstance(event, EvalEvent):
            found = self._see_evaluation(event)
        else:
            return []
        fresh = [warning for warning in found if warning.code not in self._said]
        self._said.update(warning.code for warning in fresh)
        return fresh

    def _see_step(self, event: StepEvent) -> list[WarningEvent]:
        loss = event.metrics["loss"]
        if len(self.epoch_losses) == self.steps_per_epoch:
            self.epoch_losses.clear()
        self.epoch_losses.append(loss)
        if len(self.epoch_losses) == self.steps_per_epoch:
            self.finished_epoch_loss = fmean(self.epoch_losses)
        warnings = []
        if "rewards/chosen" in event.metrics:
            seen = loss, event.metrics["rewards/chosen"]
            if len(self._first) < _RECENT:
                self._first.append(seen)
            self._last.append(seen)
            warnings += self._chosen_falling(event.step)
        self._preference.append(loss - self.settings.rpo_alpha * event.metrics.get("nll_loss", 0.0))
        return warnings + self._learned_by_heart(event.step)

    def _chosen_falling(self, step: int) -> list[WarningEvent]:
        if step < 2 * _RECENT or self.settings.reference_free or len(self._last) < _RECENT:
            return []
        loss_before, reward_before = (fmean(values) for values in zip(*self._first, strict=True))
        loss_now, reward_now = (fmean(values) for values in zip(*self._last, strict=True))
        if loss_now >= loss_before or reward_now >= reward_before:
            return []
        if reward_now > -_FALLEN_NATS * self.settings.beta:
            return []
        return [
            WarningEvent(
                step=step,
                code="chosen-falling",
                message="The loss falls, but the chosen answers have become less likely than they are to the "
                f"base (rewards/chosen {reward_now:+.2f}): the model flees the rejected answers more than it "
                "learns the chosen ones.",
                fix="Raise dpo.rpo_alpha or dpo.beta, or lower train.learning_rate.",
            )
        ]

    def _learned_by_heart(self, step: int) -> list[WarningEvent]:
        settings = self.settings
        if step > self.steps_per_epoch or settings.loss_type != "sigmoid" or settings.label_smoothing:
            return []
        if len(self._preference) < 3 or fmean(self._preference) >= _LEARNED_LOSS:
            return []
        return [
            WarningEvent(
                step=step,
                code="loss-zero",
                message="The preference loss is near 0 in the first epoch: the pairs are learned by heart, "
                "and going on can only harm other answers.",
                fix="Lower train.learning_rate or train.num_train_epochs, or add pairs.",
            )
        ]

    def _see_evaluation(self, event: EvalEvent) -> list[WarningEvent]:
        self._held_out.append(event.metrics["eval_loss"])
        best = min(self._held_out)
        recent = self._held_out[-3:]
        if len(recent) < 3 or not best < recent[0] < recent[1] < recent[2]:
            return []
        return [
            WarningEvent(
                step=event.step,
                code="held-out-rising",
                message=f"The held-out loss has risen three times running, from {best:.3f} at its best to "
                f"{recent[-1]:.3f}: the model learns its pairs by heart.",
                fix="The best adapter is kept; set train.early_stopping_patience to stop by itself.",
            )
        ]
