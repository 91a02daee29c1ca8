"""A clock that goes back: runs are ordered by step, time left comes from a clock that cannot jump."""

from __future__ import annotations

import itertools
import os
import time

import pytest
from training import of, recipe_for, workspace

from localdpo.train.checkpoint import list_checkpoints, load_latest, prune
from localdpo.train.events import StepEvent
from localdpo.train.loop import train
from localdpo.train.run import Control, RunFolder


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALDPO_CACHE", str(tmp_path / "cache"))
    return workspace(tmp_path)


def test_a_clock_that_goes_back_all_the_time_disturbs_nothing(root, monkeypatch):
    now = itertools.count(2_000_000_000, -3600)
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    recipe = recipe_for(root, data__eval=None, train__max_steps=6, train__save_steps=1, train__save_total_limit=None)
    control, events = Control(), []
    for event in train(recipe, control=control):
        events.append(event)
        if isinstance(event, StepEvent) and event.step == 3:
            control.stop()
    # The newest by name is the oldest by every time there is.
    checkpoints = list_checkpoints(recipe.output_dir / "checkpoints")
    for step, path in checkpoints:
        for file in [path, *path.rglob("*")]:
            os.utime(file, (1e9 - step, 1e9 - step))
    assert load_latest(recipe.output_dir / "checkpoints")[0].state.step == 3
    events += train(recipe, resume=True)
    steps = of(events, StepEvent)
    assert [event.step for event in steps] == [1, 2, 3, 4, 5, 6]
    assert [event.time for event in steps] == sorted((event.time for event in steps), reverse=True)
    left = [event.eta_seconds for event in steps]
    assert all(seconds >= 0 for seconds in left)
    assert left[2] < 3600
    assert left[-1] == 0
    run = RunFolder(recipe.output_dir)
    assert [event.step for event in run.every_event() if isinstance(event, StepEvent)] == [1, 2, 3, 4, 5, 6]
    assert run.status().state == "finished"
    assert [path.name for path in prune(run.checkpoints, 1)] == [f"step-{step:06d}" for step in range(1, 6)]
