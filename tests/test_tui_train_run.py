"""The Train place from the check to the end of a run, at both sizes, with trainers made by hand."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import pytest
from fake_host import FakeModelHost
from localdpo_tui.services import preflight, trainer
from localdpo_tui.widgets.chart import Chart
from localdpo_tui.widgets.check_pane import CheckPane
from test_tui_runs_services import make_run, metrics
from test_tui_train import PLAN, folder, piloted, told

from localdpo.errors import EnvironmentFault, InputError, Problem
from localdpo.train.events import SampleEvent, StepEvent, WarningEvent
from localdpo.train.run import ActiveRun, Control, acquire
from tui import SIZES, screen_text, seen, started, until

__all__ = ["folder"]


# -- checking


@pytest.mark.parametrize("size", SIZES)
@piloted
async def test_the_check_shows_memory_lengths_and_time(folder, size, monkeypatch):
    async def plan(recipe, where):
        assert (recipe, where) == (folder / "recipes" / "mine.yaml", folder)
        return PLAN

    monkeypatch.setattr(preflight, "run_preflight", plan)
    async with started(folder, size, place="train") as (app, pilot):
        await seen(pilot, "• model")
        await pilot.press("c")
        await seen(pilot, "Memory: TIGHT")
        await seen(pilot, "r trains")
        app.screen.query_one(CheckPane).scroll_end(animate=False)
        await seen(pilot, "up to 60")


@piloted
async def test_escape_stops_the_check(folder, monkeypatch):
    ended = asyncio.Event()

    async def forever(recipe, where):
        try:
            await asyncio.sleep(600)
        finally:
            ended.set()

    monkeypatch.setattr(preflight, "run_preflight", forever)
    async with started(folder, place="train") as (_, pilot):
        await seen(pilot, "• model")
        await pilot.press("c")
        await seen(pilot, "Esc stops it.")
        await pilot.press("escape")
        await until(pilot, ended.is_set)
        await seen(pilot, "stopped")


@piloted
async def test_what_the_check_finds_wrong_is_a_sentence(folder, monkeypatch):
    async def refused(recipe, where):
        raise InputError(Problem("model", "there is no model called tiny\x1b[2J", "`localdpo models` lists them"))

    monkeypatch.setattr(preflight, "run_preflight", refused)
    async with started(folder, place="train") as (_, pilot):
        await seen(pilot, "• model")
        await pilot.press("c")
        await seen(pilot, "This recipe cannot be trained as it is.")
        await seen(pilot, "called tiny␛[2J")


# -- the run


@pytest.mark.parametrize("size", SIZES)
@piloted
async def test_a_finished_run_is_shown_with_its_curves(folder, size):
    make_run(folder / "runs" / "mine", steps=40)
    async with started(folder, size, place="train") as (app, pilot):
        await seen(pilot, "• model")
        await pilot.press("v", "v")
        await seen(pilot, "✓ finished, step 40 of 40")
        await seen(pilot, "Loss: smooth 0.6")
        await seen(pilot, "loss 0.025")
        await seen(pilot, "All done.")
        await seen(pilot, "Verdict: not learned, ")
        await until(pilot, lambda: isinstance(app.focused, Chart))
        shown = []  # `n` goes round the charts: every one once, whatever is shown of them
        for _ in range(6):
            before = app.focused
            await pilot.press("n")
            await until(pilot, lambda before=before: app.focused is not before)
            shown.append(str(app.focused.border_title).split(":")[0])
        assert len(set(shown)) == 6, shown
        assert [title for title in shown if title.startswith("Accuracy")]


class Trainer:
    """What a trainer does to its run folder, by hand."""

    def __init__(self, folder: Path) -> None:
        if not folder.exists():
            make_run(folder, steps=3, state="training")
        self.run = ActiveRun(folder, acquire(folder))
        self.run.set_status(state="training", step=3, total_steps=12, eta_seconds=50.0)

    def step(self, number: int) -> None:
        self.run.log(StepEvent(step=number, total_steps=12, metrics=metrics(number)))
        self.run.finish("training", step=number)

    def end(self, state: str, **changes: object) -> None:
        self.run.finish(state, **changes)
        self.run.__exit__(None, None, None)


@pytest.mark.parametrize("size", SIZES)
@piloted
async def test_a_running_trainer_is_found_followed_and_told_to_pause_and_stop(folder, size):
    work = Trainer(folder / "runs" / "mine")
    control = Control()
    async with started(folder, size, place="train") as (app, pilot):
        await seen(pilot, "▶ training, step 3 of 12, 50 s left")
        await until(pilot, lambda: app.status == "▶ training 3/12")
        work.step(4)
        await seen(pilot, "step 4 of 12")
        work.run.log(WarningEvent(step=4, code="loss-zero", message="Learned by heart.", fix="Lower it."))
        work.run.log(
            SampleEvent(step=4, prompt=[{"role": "user", "content": "Who?"}], base="Elena", tuned="Ath\x9bene")
        )
        await seen(pilot, "! step 4: Learned by heart. Lower it.")
        app.screen.query_one("#notes").scroll_end(animate=False)
        await seen(pilot, "Ath<U+009B>ene")
        await pilot.press("u")
        await until(pilot, lambda: work.run.poll(control) == "pause")
        work.run.set_status(state="paused")
        await seen(pilot, "⏸ paused")
        await pilot.press("u")
        await until(pilot, lambda: work.run.poll(control) == "resume")
        work.run.set_status(state="training")
        await seen(pilot, "▶ training")
        await pilot.press("x")
        await until(pilot, lambda: work.run.poll(control) == "stop")
        work.end("stopped")
        await seen(pilot, "■ stopped")
        await until(pilot, lambda: app.status == "")


@piloted
async def test_leaving_the_app_leaves_the_trainer_and_the_next_one_finds_it(folder):
    work = Trainer(folder / "runs" / "elsewhere")
    for _ in range(2):
        async with started(folder, place="train") as (_, pilot):
            await seen(pilot, "runs/elsewhere")
            await seen(pilot, "▶ training, step 3 of 12")
        assert work.run.poll(Control()) == "resume"
    work.end("finished")


@piloted
async def test_a_trainer_that_dies_is_noticed(folder):
    work = Trainer(folder / "runs" / "mine")
    async with started(folder, place="train") as (_, pilot):
        await seen(pilot, "▶ training")
        work.run._metrics.close()
        work.run._lock.release()
        await seen(pilot, "! interrupted")
        await told(pilot, "Press r to go on from its checkpoint")


@piloted
async def test_start_asks_whether_to_go_on_and_starts_a_trainer(folder, monkeypatch):
    calls = []

    class Started:
        exit_code = None

        def error(self):
            return None

    def start(recipe, where, **options):
        calls.append((recipe, where, options))
        return Started()

    monkeypatch.setattr(trainer, "start", start)
    host = FakeModelHost()
    async with started(folder, place="train", host=host) as (app, pilot):
        await seen(pilot, "• model")
        await app.host.load("smollm2-135m")  # as a chat did before
        await pilot.press("r")
        await until(pilot, lambda: calls)
        assert host.rested == 1
        assert calls[0] == (folder / "recipes" / "mine.yaml", folder, {"resume": False, "overrides": ()})
        await seen(pilot, "no run yet")
    make_run(folder / "runs" / "mine", steps=4, state="stopped")
    for key, resume in (("n", False), ("g", True)):
        async with started(folder, place="train") as (_, pilot):
            await seen(pilot, "• model")
            await pilot.press("r")
            await seen(pilot, "Go on with mine?")
            await pilot.press(key)
            await until(pilot, lambda: len(calls) > 1)
            assert calls.pop()[2]["resume"] is resume


@piloted
async def test_why_a_trainer_could_not_start_is_a_sentence(folder, monkeypatch):
    def start(*args, **options):
        raise EnvironmentFault(Problem("runs/mine", "Read-only file system", "Choose another folder"))

    monkeypatch.setattr(trainer, "start", start)
    async with started(folder, place="train") as (_, pilot):
        await seen(pilot, "• model")
        await pilot.press("r")
        await told(pilot, "Read-only file system. Choose another folder.")


@piloted
async def test_a_trainer_that_ends_later_with_an_error_is_told_once(folder, monkeypatch):
    class Gone:
        exit_code = 3

        def error(self):
            return EnvironmentFault(Problem("memory", "this run would need 80 GB", "Choose a smaller model"))

    monkeypatch.setattr(trainer, "start", lambda *args, **options: Gone())
    async with started(folder, place="train") as (app, pilot):
        await seen(pilot, "• model")
        await pilot.press("r")
        await told(pilot, "this run would need 80 GB")
        assert app.screen._trainer is None


@piloted
async def test_stop_counts_while_the_trainer_is_still_coming(folder, monkeypatch):
    """The first seconds load libraries: the run is not taken yet, and what is shown is the run before."""
    called, go_on = threading.Event(), threading.Event()

    class Started:
        exit_code = None

    def start(*args, **options):
        called.set()
        assert go_on.wait(60)
        return Started()

    monkeypatch.setattr(trainer, "start", start)
    make_run(folder / "runs" / "mine", steps=4, state="stopped")
    control = Control()
    async with started(folder, place="train") as (_, pilot):
        await seen(pilot, "• model")
        await pilot.press("r")
        await seen(pilot, "Go on with mine?")
        await pilot.press("g")
        await until(pilot, called.is_set)
        try:
            await pilot.press("x")
            work = Trainer(folder / "runs" / "mine")
            await until(pilot, lambda: work.run.poll(control) == "stop")
        finally:
            go_on.set()
        work.end("stopped")
        await seen(pilot, "■ stopped")


@piloted
async def test_a_link_goes_on_with_a_run_under_the_name_it_has_now(folder, monkeypatch):
    calls = []

    class Started:
        exit_code = None

    def start(recipe, where, **options):
        calls.append((recipe, options))
        return Started()

    monkeypatch.setattr(trainer, "start", start)
    run = make_run(folder / "runs" / "mine.1", state="stopped")
    async with started(folder, place="train") as (app, pilot):
        await seen(pilot, "• model")
        app.go("train", run="runs/mine.1", resume=True)
        await until(pilot, lambda: calls)
        assert calls[0] == (run.recipe_file, {"resume": True, "overrides": [f"output_dir={json.dumps(str(run.path))}"]})


@piloted
async def test_every_view_fits_the_smallest_terminal(folder):
    make_run(folder / "runs" / "mine", steps=40)
    for size in ((40, 10),):
        async with started(folder, size, place="train") as (app, pilot):
            await seen(pilot, "model")
            for _ in range(3):
                await pilot.press("v")
                await pilot.pause()
                assert "^q Quit" in screen_text(app)
