"""Alarms in the Train place: the sentence and its advice are on the smallest screen, whatever else a run says."""

from __future__ import annotations

import pytest
from test_alarms import alarms, everything, warnings
from test_tui_train import folder, piloted
from test_tui_train_run import Trainer

from localdpo.train.events import CheckpointEvent, EvalEvent, WarningEvent
from tui import SIZES, screen_text, seen, started, until

__all__ = ["folder"]

RAISED = {warning.code: warning for warning in warnings(alarms(), everything())}
LONGEST = sorted(RAISED.values(), key=lambda warning: len(warning.message + warning.fix))[-3:]


def notes_on_screen(app) -> str:
    """The words that can be read in the pane of notes, line breaks aside."""
    pane = app.screen.query_one("#notes")
    region = pane.scrollable_content_region
    lines = screen_text(app).splitlines()[region.y : region.bottom]
    return " ".join(" ".join(line[region.x : region.right] for line in lines).split())


@pytest.mark.parametrize("size", [SIZES[0], pytest.param(SIZES[1], marks=pytest.mark.slow)])
@piloted
async def test_the_latest_alarm_is_read_without_scrolling(folder, size):
    work = Trainer(folder / "runs" / "mine")
    try:
        async with started(folder, size, place="train") as (app, pilot):
            await seen(pilot, "▶ training, step 3 of 12")
            for number, alarm in enumerate(LONGEST, 4):
                work.run.log(WarningEvent(step=number, code=alarm.code, message=alarm.message, fix=alarm.fix))
                # What a run says besides comes later, and below.
                work.run.log(EvalEvent(step=number, best=True, metrics={"eval_loss": 0.5}))
                work.run.log(CheckpointEvent(step=number, path="checkpoints/step-000004"))
                text = f"! step {number}: {alarm.message} {alarm.fix}"
                await until(pilot, lambda text=text: text in notes_on_screen(app), text)
    finally:
        work.end("stopped")
