"""DPO's metrics: by rows, kinds apart; and its loss on held-out rows by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from localdpo.core.losses import LossSettings
from localdpo.methods.base import held_out_figures
from localdpo.methods.dpo import DPO
from localdpo.sequences import EncodedRow


def pairs(*kinds: str, weights: list[float] | None = None) -> list[EncodedRow]:
    ids = np.array([1, 2, 3], np.int32)
    weights = weights or [1.0] * len(kinds)
    return [EncodedRow.of(ids, (ids, ids[:2]), weight, kind) for kind, weight in zip(kinds, weights, strict=True)]


def metrics_of(
    chosen: list[float], rejected: list[float], *kinds: str, reference: np.ndarray | None = None
) -> dict[str, float]:
    """Of rows with these rewards, whose chosen answers have a log-prob of -3."""
    columns: dict[str, Any] = {"rewards/chosen": chosen, "rewards/rejected": rejected}
    columns |= {"logps/chosen": [-3.0] * len(chosen), "logps/rejected": [-2.0] * len(chosen)}
    arrays = {name: np.array(values, np.float32) for name, values in columns.items()}
    return DPO(LossSettings()).metrics(arrays, pairs(*kinds), reference)


def test_accuracy_is_of_rows_not_of_means():
    # The mean margin is positive, one row of two is right.
    metrics = metrics_of([9.0, 0.0], [0.0, 1.0], "preference", "preference")
    assert metrics["rewards/accuracies"] == 0.5
    assert metrics["rewards/margins"] == 4.0
    assert (metrics["rewards/chosen"], metrics["rewards/rejected"]) == (4.5, 0.5)


def test_equal_rewards_are_not_right():
    assert metrics_of([0.0], [0.0], "preference")["rewards/accuracies"] == 0.0


def test_retain_rows_are_reported_apart():
    reference = np.array([-3.0, 0.0, -1.5, 0.0], np.float32)
    metrics = metrics_of([1.0, 5.0], [0.0, 9.0], "preference", "retain", reference=reference)
    assert metrics["rewards/margins"] == 1.0
    assert metrics["retain/rewards/margins"] == -4.0
    # The base's answer lost 1.5 nats over its three tokens.
    assert metrics["retain/drift"] == pytest.approx(0.5)


def test_a_kind_without_rows_has_no_metrics():
    assert not any(name.startswith("retain") for name in metrics_of([1.0], [0.0], "preference"))
    retained = metrics_of([1.0], [0.0], "retain").keys() - {"nll_loss"}
    assert retained
    assert all(name.startswith("retain") for name in retained)


def test_held_out_loss_by_hand():
    policy = np.array([-2.0, -8.0, -9.0, -4.0], np.float32)
    reference = np.array([-3.0, -5.0, -6.0, -5.0], np.float32)
    rows = pairs("preference", "preference", weights=[1.0, 3.0])
    _, metrics = held_out_figures(DPO(LossSettings(beta=0.1, rpo_alpha=1.0)), rows, policy, reference)
    margins = [0.1 * (1 + 3), 0.1 * (-3 - 1)]
    losses = [math.log1p(math.exp(-margin)) for margin in margins]
    nll = (2.0 + 3 * 9.0) / (3 + 3 * 3)
    assert metrics["eval_loss"] == pytest.approx((losses[0] + 3 * losses[1]) / 4 + nll, rel=1e-5)
    assert metrics["eval_nll_loss"] == pytest.approx(nll, rel=1e-6)
    assert metrics["eval_rewards/accuracies"] == 0.5
    assert metrics["eval_rewards/margins"] == pytest.approx(sum(margins) / 2, abs=1e-6)
