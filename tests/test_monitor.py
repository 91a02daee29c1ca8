"""Metrics by rows, kinds apart, and the loss of an epoch."""

from __future__ import annotations

import math

import numpy as np
import pytest

from localdpo.data.encode import EncodedPair
from localdpo.dpo.losses import LossSettings, PairLogps
from localdpo.train.events import EvalEvent, StepEvent
from localdpo.train.monitor import EpochLoss, Scores, held_out_metrics, row_metrics

SETTINGS = LossSettings(beta=0.1, rpo_alpha=1.0)


def _pairs(*kinds, weights=None):
    ids = np.array([1, 2, 3], np.int32)
    weights = weights or [1.0] * len(kinds)
    return [EncodedPair(ids, ids, ids[:2], weight, kind) for kind, weight in zip(kinds, weights, strict=True)]


def _logps(chosen, rejected):
    size = len(chosen)
    return PairLogps(np.array(chosen, np.float32), np.array(rejected, np.float32), np.full(size, 3), np.full(size, 2))


def _scores(chosen, rejected):
    return Scores(
        _logps([-3.0] * len(chosen), [-2.0] * len(chosen)),
        np.array(chosen, np.float32),
        np.array(rejected, np.float32),
    )


def test_accuracy_is_of_rows_not_of_means():
    # The mean margin is positive, one row of two is right.
    metrics = row_metrics(_scores([9.0, 0.0], [0.0, 1.0]), _pairs("preference", "preference"), None)
    assert metrics["rewards/accuracies"] == 0.5
    assert metrics["rewards/margins"] == 4.0
    assert (metrics["rewards/chosen"], metrics["rewards/rejected"]) == (4.5, 0.5)


def test_equal_rewards_are_not_right():
    assert row_metrics(_scores([0.0], [0.0]), _pairs("preference"), None)["rewards/accuracies"] == 0.0


def test_retain_rows_are_reported_apart():
    scores, pairs = _scores([1.0, 5.0], [0.0, 9.0]), _pairs("preference", "retain")
    metrics = row_metrics(scores, pairs, _logps([-3.0, -1.5], [0.0, 0.0]))
    assert metrics["rewards/margins"] == 1.0
    assert metrics["retain/rewards/margins"] == -4.0
    # The base's answer lost 1.5 nats over its three tokens.
    assert metrics["retain/drift"] == pytest.approx(0.5)


def test_a_kind_without_rows_has_no_metrics():
    assert not any(name.startswith("retain") for name in row_metrics(_scores([1.0], [0.0]), _pairs("preference"), None))
    assert all(name.startswith("retain") for name in row_metrics(_scores([1.0], [0.0]), _pairs("retain"), None))


def test_held_out_loss_by_hand():
    policy, reference = _logps([-2.0, -9.0], [-8.0, -4.0]), _logps([-3.0, -6.0], [-5.0, -5.0])
    metrics = held_out_metrics(policy, reference, _pairs("preference", "preference", weights=[1.0, 3.0]), SETTINGS)
    margins = [0.1 * (1 + 3), 0.1 * (-3 - 1)]
    losses = [math.log1p(math.exp(-margin)) for margin in margins]
    nll = (2.0 + 3 * 9.0) / (3 + 3 * 3)
    assert metrics["eval_loss"] == pytest.approx((losses[0] + 3 * losses[1]) / 4 + nll, rel=1e-5)
    assert metrics["eval_nll_loss"] == pytest.approx(nll, rel=1e-6)
    assert metrics["eval_rewards/accuracies"] == 0.5
    assert metrics["eval_rewards/margins"] == pytest.approx(sum(margins) / 2, abs=1e-6)


def test_the_mean_loss_of_an_epoch_is_known_at_its_end():
    epoch, seen = EpochLoss(3), []
    for step, loss in enumerate([1.0, 2.0, 3.0, 5.0, 5.0, 8.0], 1):
        epoch.see(StepEvent(step=step, metrics={"loss": loss}))
        epoch.see(EvalEvent(step=step, metrics={"eval_loss": 9.0}))
        seen.append(epoch.finished)
    assert seen == [None, None, 2.0, 2.0, 2.0, 6.0]
