"""The loss of an epoch."""

from __future__ import annotations

from localdpo.train.events import EvalEvent, StepEvent
from localdpo.train.monitor import EpochLoss


def test_the_mean_loss_of_an_epoch_is_known_at_its_end():
    epoch, seen = EpochLoss(3), []
    for step, loss in enumerate([1.0, 2.0, 3.0, 5.0, 5.0, 8.0], 1):
        epoch.see(StepEvent(step=step, metrics={"loss": loss}))
        epoch.see(EvalEvent(step=step, metrics={"eval_loss": 9.0}))
        seen.append(epoch.finished)
    assert seen == [None, None, 2.0, 2.0, 2.0, 6.0]
