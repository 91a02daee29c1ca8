"""Pairs scored by the engine, in the shape in which most tests look at them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.nn as nn
import numpy as np

from localdpo.core.losses import LossSettings, PairLogps, pair_logps
from localdpo.core.score import Gradients, Scorer
from localdpo.dpo.scorer import FastScorer
from localdpo.methods.dpo import DPO
from localdpo.sequences import EncodedRow, sequences_of


class PairStep(NamedTuple):
    """A step of DPO on B pairs: what the engine says, by name."""

    loss: float
    nll: float
    losses: np.ndarray
    rewards_chosen: np.ndarray
    rewards_rejected: np.ndarray
    policy: PairLogps
    tokens: int
    grad: Gradients
    metrics: dict[str, float]


def flat(logps: PairLogps | None) -> np.ndarray | None:
    """As the engine has them: chosen and rejected in turn."""
    return None if logps is None else np.stack([logps.chosen, logps.rejected], axis=1).astype(np.float32).reshape(-1)


class PairScorer:
    """A fast scorer (or another) asked about pairs."""

    def __init__(self, model: nn.Module, scorer: Scorer | None = None, **options: Any) -> None:
        self.scorer: Any = scorer or FastScorer(model, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scorer, name)

    def logps(self, rows: Sequence[EncodedRow]) -> PairLogps:
        return pair_logps(rows, self.scorer.logps(sequences_of(rows)))

    def reference_logps(self, rows: Sequence[EncodedRow]) -> PairLogps:
        return pair_logps(rows, self.scorer.reference_logps(sequences_of(rows)))

    def base_kl(self, rows: Sequence[EncodedRow]) -> np.ndarray:
        return np.asarray(self.scorer.base_kl(sequences_of(rows))).reshape(-1, 2)

    def loss_and_grad(
        self, rows: Sequence[EncodedRow], reference: PairLogps | None, settings: LossSettings
    ) -> PairStep:
        method, known = DPO(settings), flat(reference)
        result = self.scorer.loss_and_grad(rows, method.window_loss(rows, known))
        columns, metrics = result.columns, method.metrics(result.columns, rows, known)
        policy = pair_logps(rows, np.stack([columns["logps/chosen"], columns["logps/rejected"]], axis=1))
        return PairStep(
            result.loss,
            metrics.pop("nll_loss"),
            columns["losses"],
            columns["rewards/chosen"],
            columns["rewards/rejected"],
            policy,
            result.tokens,
            result.grad,
            metrics,
        )
