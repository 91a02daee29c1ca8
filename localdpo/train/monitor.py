"""What a step and an evaluation come to: metrics under TRL's names.

Metrics are taken over rows, not over means of batches. Rows of kind "retain" are reported apart:
their rewards say how much was forgotten, not how much was learned. This module does no training;
``alarms`` says which figures are bad ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from localdpo.data.encode import EncodedPair
from localdpo.dpo.losses import LossSettings, PairLogps, Policy, preference_loss
from localdpo.train.events import Event, StepEvent


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
