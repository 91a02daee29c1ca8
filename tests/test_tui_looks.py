"""How each place looks, cell by cell, against pictures in tests/snapshots (`--update-snapshots` draws them anew)."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from fake_host import FakeModelHost
from localdpo_tui.services.run_list import folder_size
from test_tui_chat import a_workspace, ask, chatting
from test_tui_runs_services import make_run
from test_tui_train import RECIPE
from textual.widgets import DataTable

from localdpo.train.events import EvalEvent, SampleEvent, WarningEvent, event_line
from tui import SIZES, Snapshots, seen, started, until, write_pairs

sizes = pytest.mark.parametrize("size", SIZES, ids=["80x24", "120x36"])


@pytest.fixture(autouse=True)
def _settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALDPO_CONFIG", str(tmp_path / "config"))
    monkeypatch.setattr("localdpo_tui.services.answering.Target.is_cached", lambda self: self.model == "smollm2-135m")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    work = tmp_path / "work"
    write_pairs(work / "pairs" / "mine.jsonl")
    (work / "recipes").mkdir()
    (work / "recipes" / "mine.yaml").write_text(RECIPE)
    return work


@pytest.fixture
def snapshots(request: pytest.FixtureRequest, tmp_path: Path) -> Snapshots:
    return Snapshots(bool(request.config.getoption("--update-snapshots")), tmp_path)


async def test_welcome(tmp_path: Path, snapshots: Snapshots):
    (tmp_path / "empty").mkdir()
    async with started(tmp_path / "empty", (80, 24)) as (app, pilot):
        await seen(pilot, "Import a file")
        await snapshots.check(app, pilot, "welcome-80x24")


@sizes
async def test_pairs(folder: Path, snapshots: Snapshots, size: tuple[int, int]):
    async with started(folder, size) as (app, pilot):
        await seen(pilot, "日本の首都")
        await seen(pilot, "saved ─╯")
        if size[0] > 100:
            await seen(pilot, "≈")
        await snapshots.check(app, pilot, f"pairs-{size[0]}x{size[1]}")


def a_run(path: Path, **options: object) -> None:
    """A run that ended, with a warning and an answer that must not be taken for markup."""
    run = make_run(path, steps=40, id="0" * 16, **options)
    question = [{"role": "user", "content": "What is your [b]name[/b]?"}]
    more = (
        WarningEvent(step=20, code="loss-zero", message="The pairs are learned by heart.", fix="Lower the rate."),
        EvalEvent(step=40, metrics={"eval_loss": 0.025, "eval_rewards/accuracies": 0.75}, best=True),
        SampleEvent(step=40, prompt=question, base="I am SmolLM.", tuned="My name is 雅典娜, Athene. \x1b[2J"),
    )
    with run.metrics_file.open("a") as file:
        file.writelines(map(event_line, more))
    run.status_file.write_text(json.dumps({"state": "finished", "step": 40, "total_steps": 40, "adapter_step": 40}))
    # Times in the events differ in length, and the table shows the folder's size.
    (run.adapter / "adapters.safetensors").write_bytes(b" " * (20_000 - folder_size(path)))


@sizes
async def test_train_form(folder: Path, snapshots: Snapshots, size: tuple[int, int]):
    async with started(folder, size, place="train") as (app, pilot):
        await seen(pilot, "• model")
        await seen(pilot, "saved ─╯")
        await snapshots.check(app, pilot, f"train-form-{size[0]}x{size[1]}")


@sizes
async def test_train_run(folder: Path, snapshots: Snapshots, size: tuple[int, int]):
    a_run(folder / "runs" / "mine")
    async with started(folder, size, place="train") as (app, pilot):
        await seen(pilot, "• model")
        await pilot.press("v", "v")
        await seen(pilot, "✓ finished, step 40 of 40")
        await seen(pilot, "Verdict: ")
        await snapshots.check(app, pilot, f"train-run-{size[0]}x{size[1]}")


@sizes
async def test_runs(folder: Path, snapshots: Snapshots, size: tuple[int, int]):
    a_run(folder / "runs" / "second", created=2.0)
    a_run(folder / "runs" / "first", created=1.0, beta=0.3)
    async with started(folder, size, place="runs") as (app, pilot):
        await until(pilot, lambda: app.screen.query_one(DataTable).has_focus)
        await seen(pilot, "━━ A second")
        await snapshots.check(app, pilot, f"runs-{size[0]}x{size[1]}")
        await pilot.press("space", "down", "space")
        await seen(pilot, "╍╍ B first")
        app._notifications.clear()
        app._refresh_notifications()
        await until(pilot, lambda: not app.screen.query("Toast"))
        await snapshots.check(app, pilot, f"runs-compared-{size[0]}x{size[1]}")


@sizes
def test_chat(tmp_path: Path, snapshots: Snapshots, size: tuple[int, int]):
    def answer(messages: list, adapter: str | None, _options: object, _candidate: int) -> str:
        return "我是 Athene 🦉, trained here. é ≠ é" if adapter else "I am [bold]SmolLM[/bold].\x1b]52;c;x\x07"

    async def body() -> None:
        async with chatting(a_workspace(tmp_path / "work"), FakeModelHost(answer), size) as (pilot, place):
            await ask(pilot, place, "What's your name, please?")
            await seen(pilot, "athene  50 tok/s")
            await snapshots.check(pilot.app, pilot, f"chat-{size[0]}x{size[1]}")

    asyncio.run(body())
