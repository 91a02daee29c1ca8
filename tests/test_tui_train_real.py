"""A real trainer on a tiny model, started from the UI: paused, gone on with, left alone, found again and stopped."""

from __future__ import annotations

import json

import pytest
from localdpo_tui.widgets.recipe_form import RecipeForm
from test_tui_train import piloted
from training import workspace

from localdpo.train.events import StepEvent
from localdpo.train.run import RunFolder
from tui import seen, started, until

RECIPE = """\
model: ../model
data: {train: ../pairs.jsonl, eval: 0.2, retain: null, max_length: 64}
lora: {r: 2}
train:
  max_steps: 100000   # stopped long before
  eval_steps: 50
  learning_rate: 1.0e-5
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    workspace(tmp_path)
    monkeypatch.setenv("LOCALDPO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "real.yaml").write_text(RECIPE)
    return tmp_path


def step_of(run: RunFolder) -> int:
    status = run.status()
    return status.step if status is not None else 0


@piloted
async def test_a_trainer_outlives_the_ui_and_obeys_the_next_one(folder, monkeypatch):
    monkeypatch.setattr("tui.DEADLINE", 240.0)  # a process that loads mlx, on a machine that may be busy
    run = RunFolder(folder / "runs" / "real")
    try:
        async with started(folder, place="train") as (app, pilot):
            await seen(pilot, "• model")
            await pilot.press("r")
            await until(pilot, lambda: step_of(run) > 2, "the first steps")
            await seen(pilot, "▶ training")
            await pilot.press("u")
            await seen(pilot, "⏸ paused")
            at = step_of(run)
            await pilot.press("u")
            await until(pilot, lambda: step_of(run) > at, "steps after the pause")
            assert json.loads((run.path / "run.json").read_text())["recipe"]["lora"]["r"] == 2
        # The UI is gone.
        left = step_of(run)
        assert run.is_running()
        async with started(folder, place="train") as (app, pilot):
            await seen(pilot, "▶ training")
            await until(pilot, lambda: step_of(run) > left + 1, "steps while nobody looked")
            await until(pilot, lambda: app.screen.view.last is not None and app.screen.view.last.step > left)
            await pilot.press("x")
            await seen(pilot, "■ stopped")
            await until(pilot, lambda: not run.is_running())
            steps = [event.step for event in run.events().events if isinstance(event, StepEvent)]
            assert steps == list(range(1, len(steps) + 1))
            assert (run.adapter / "adapters.safetensors").is_file()
            # Going on with it takes up where it was.
            await pilot.press("v")
            await until(pilot, lambda: app.screen.query_one(RecipeForm).has_focus)
            await pilot.press("r")
            await seen(pilot, "Go on with real?")
            await pilot.press("g")
            await until(pilot, lambda: step_of(run) > len(steps), "steps after going on")
            await pilot.press("x")
            await seen(pilot, "■ stopped")
    finally:
        run.request("stop")
