"""Generate, correct, rank and blind A/B on the screen, with a host that has no model."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_host import FakeModelHost
from localdpo_tui.app import LocalDPOApp
from localdpo_tui.screens.blind import BlindScreen, open_blind
from localdpo_tui.screens.candidates import CandidatesScreen
from localdpo_tui.screens.correct import CorrectScreen
from localdpo_tui.screens.judge import JudgeScreen
from localdpo_tui.services.candidates import CandidateStore, candidates_file
from localdpo_tui.services.correction import Correction
from localdpo_tui.widgets.editor import SafeTextArea
from rich.cells import cell_len
from textual.pilot import Pilot
from textual.widgets import DataTable, Input, OptionList

from localdpo.data.pairs import Message, read_pairs
from localdpo.data.provenance import origin_of, provenance_of
from localdpo.evaluate.blind import blind_tests
from tui import SIZES, screen_text, started, until, write_pairs

PROMPTS: list[tuple[Message, ...]] = [
    ({"role": "user", "content": "Who are you?"},),
    ({"role": "user", "content": "日本の首都は？"},),
]
EVIL = "\x1b]52;c;ZXZpbA==\x07 [b]x[/b] \u202e"


def numbered(messages: list[dict[str, Any]], adapter: str | None, options: Mapping[str, Any], _number: int) -> str:
    return f"{'tuned' if adapter else 'base'} answer with seed {options.get('seed')} {EVIL} 日本語"


@pytest.fixture(autouse=True)
def _settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALDPO_CONFIG", str(tmp_path / "config"))
    monkeypatch.setattr("localdpo_tui.services.answering.Target.is_cached", lambda self: True)


@asynccontextmanager
async def candidates(
    folder: Path, host: FakeModelHost, size: tuple[int, int], prompts: list[tuple[Message, ...]] | None = None
) -> AsyncIterator[tuple[Pilot[None], CandidatesScreen, Path]]:
    pairs = folder / "pairs" / "mine.jsonl"
    if not pairs.exists():
        write_pairs(pairs)
    async with started(folder, size, host, place="chat") as (app, pilot):
        screen = CandidatesScreen(pairs, PROMPTS if prompts is None else prompts)
        app.push_screen(screen)
        await until(pilot, lambda: app.screen is screen and bool(screen.query(".empty,.reply")), "the screen")
        yield pilot, screen, pairs


async def generated(pilot: Pilot[None], screen: CandidatesScreen, total: int) -> None:
    await pilot.press("g")
    await until(pilot, lambda: len(screen._store) == total and screen._generating is None, f"{total} candidates")
    await pilot.pause()


def lines_fit(app: LocalDPOApp) -> None:
    shown = screen_text(app)
    assert {cell_len(line) for line in shown.split("\n")} == {app.size.width}
    assert "Help" in shown
    assert "Quit" in shown
    assert "\x1b" not in shown
    assert "\u202e" not in shown


@pytest.mark.parametrize("size", SIZES)
def test_candidates_are_generated_and_kept(tmp_path: Path, size: tuple[int, int]):
    async def body() -> None:
        host = FakeModelHost(numbered)
        async with candidates(tmp_path, host, size) as (pilot, screen, pairs):
            assert "No answers yet" in screen_text(pilot.app)
            screen.query_one("#sampling-count", Input).value = "3"
            screen.query_one("#sampling-seed", Input).value = "5"
            await generated(pilot, screen, 6)
            options = [what["options"] for kind, what in host.asked if kind == "generate"]
            assert [option["seed"] for option in options] == [5, 6, 7, 5, 6, 7]
            assert {option["temperature"] for option in options} == {0.8}
            assert "answer with seed" in screen_text(pilot.app)
            lines_fit(pilot.app)  # type: ignore[arg-type]
            screen.query_one(OptionList).focus()
            screen.query_one(OptionList).highlighted = 0
            await until(pilot, lambda: screen._row == 0)
        async with candidates(tmp_path, host, size, prompts=[]) as (_, again, _):
            assert len(again._store) == 6
            assert again._prompts == PROMPTS
        kept = CandidateStore(candidates_file(pairs))
        kept.load()
        assert [candidate.origin.seed for candidate in kept.of(PROMPTS[0])] == [5, 6, 7]
        assert kept.all()[0].answer.startswith("base answer with seed 5 \x1b]52")  # as the model wrote it

    asyncio.run(body())


def test_esc_stops_generating_and_a_second_one_leaves(tmp_path: Path):
    async def body() -> None:
        host = FakeModelHost(numbered, hold=True)
        async with candidates(tmp_path, host, (120, 36)) as (pilot, screen, _):
            await pilot.press("g")
            await until(pilot, lambda: "Esc stops" in screen_text(pilot.app) and "base" in screen_text(pilot.app))
            await pilot.press("escape")
            await until(pilot, lambda: screen._generating is None)
            assert host.cancelled == 1
            assert len(screen._store) == 0
            assert pilot.app.screen is screen
            await pilot.press("escape")
            await until(pilot, lambda: pilot.app.screen is not screen)

    asyncio.run(body())


def test_what_cannot_be_generated_is_said(tmp_path: Path):
    async def body() -> None:
        host = FakeModelHost(numbered)
        async with candidates(tmp_path, host, (80, 24)) as (pilot, screen, _):
            screen.query_one("#sampling-temperature", Input).value = "0"
            await pilot.press("g")
            await until(pilot, lambda: len(pilot.app._notifications) == 1)
            (said,) = [note.message for note in pilot.app._notifications]
            assert "every candidate is the same" in said
            assert not host.asked

    asyncio.run(body())


@pytest.mark.parametrize("size", SIZES)
def test_a_candidate_is_corrected_into_a_pair(tmp_path: Path, size: tuple[int, int]):
    async def body() -> None:
        async with candidates(tmp_path, FakeModelHost(numbered), size, PROMPTS[:1]) as (pilot, screen, pairs):
            await generated(pilot, screen, 2)
            await pilot.press("down", "c")
            await until(pilot, lambda: isinstance(pilot.app.screen, CorrectScreen))
            await pilot.pause()
            lines_fit(pilot.app)  # type: ignore[arg-type]
            area = pilot.app.screen.query_one(SafeTextArea)
            assert area.raw == screen._store.all()[1].answer
            area.load_text("")
            await pilot.press(*"Athene")
            pilot.app.screen.query_one("#correct-tags", Input).value = "name, on-policy"
            await pilot.press("ctrl+s")
            await until(pilot, lambda: pilot.app.screen is screen)
            await until(pilot, lambda: "made into a pair" in screen_text(pilot.app))
            pair = read_pairs(pairs).pairs[-1]
            assert (pair.prompt, pair.chosen, pair.tags) == (PROMPTS[0], "Athene", ("name", "on-policy"))
            assert pair.rejected == screen._store.all()[1].answer
            origin = origin_of(pair.extra, "rejected")
            assert origin is not None
            assert (origin.by, origin.model, origin.seed, origin.finish) == ("model", "smollm2-135m", 1, "stop")
            assert provenance_of(pair.extra)["how"] == "correct"

    asyncio.run(body())


def test_a_correction_survives_the_end_of_the_program(tmp_path: Path):
    @asynccontextmanager
    async def correcting() -> AsyncIterator[tuple[Pilot[None], CorrectScreen, SafeTextArea]]:
        async with started(tmp_path, (80, 24), place="chat") as (app, pilot):
            await until(pilot, lambda: bool(app.screen.query(".empty")), "the place")
            screen = CorrectScreen(Correction(PROMPTS[0], "wrong", None), [tmp_path / "p.jsonl"], tmp_path)
            app.push_screen(screen)
            await until(pilot, lambda: bool(screen.query(SafeTextArea)), "the screen")
            yield pilot, screen, screen.query_one(SafeTextArea)

    async def body() -> None:
        async with correcting() as (pilot, screen, _):
            await pilot.press(*" but better")
            await until(pilot, lambda: screen._draft.read() == "wrong but better")
        async with correcting() as (pilot, screen, area):
            await until(pilot, lambda: area.raw == "wrong but better")
            await pilot.press("ctrl+s")
            await until(pilot, lambda: pilot.app.screen is not screen)
            assert screen._draft.read() is None

    asyncio.run(body())


@pytest.mark.parametrize("size", SIZES)
def test_ranking_by_single_keys(tmp_path: Path, size: tuple[int, int]):
    async def body() -> None:
        async with candidates(tmp_path, FakeModelHost(numbered), size) as (pilot, screen, pairs):
            await generated(pilot, screen, 4)
            await pilot.press("r")
            await until(pilot, lambda: isinstance(pilot.app.screen, JudgeScreen))
            judge = pilot.app.screen
            assert isinstance(judge, JudgeScreen)
            await until(pilot, lambda: "0 of 2 judged" in screen_text(pilot.app))
            lines_fit(pilot.app)  # type: ignore[arg-type]
            shown = judge.judging.current()
            assert shown is not None
            await pilot.press("2")
            await until(pilot, lambda: "1 of 2 judged" in screen_text(pilot.app))
            pair = read_pairs(pairs).pairs[-1]
            assert (pair.chosen, pair.rejected) == (shown.second, shown.first)
            second = judge.judging.current()
            await pilot.press("t")
            await until(pilot, lambda: "All candidates are ranked" in screen_text(pilot.app))
            await pilot.press("u")
            await until(pilot, lambda: judge.judging.current() == second)
            await pilot.press("u")
            await until(pilot, lambda: judge.judging.current() == shown)
            assert len(read_pairs(pairs).pairs) == 3  # the pair went with its verdict
            await pilot.press("s")
            await until(pilot, lambda: "1 of 2 judged" in screen_text(pilot.app))
            await pilot.press("escape")
            await until(pilot, lambda: pilot.app.screen is screen)
            await pilot.press("r")  # the place is remembered
            await until(pilot, lambda: "1 of 2 judged" in screen_text(pilot.app))

    asyncio.run(body())


def a_run(folder: Path, questions: int = 3) -> Path:
    run = folder / "runs" / "athene"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "adapter_config.json").write_text("{}")
    (run / "adapter" / "adapters.safetensors").write_bytes(b"weights")
    (run / "run.json").write_text(json.dumps({"recipe": {"model": "smollm2-135m"}}))
    train = write_pairs(folder / "pairs" / "train.jsonl")
    rows = [{"prompt": f"question {n}", "chosen": "a", "rejected": "b"} for n in range(questions)]
    held = write_pairs(folder / "pairs" / "eval.jsonl", rows)
    (run / "recipe.yaml").write_text(
        f"model: smollm2-135m\ndata: {{train: {json.dumps(str(train))}, eval: {json.dumps(str(held))}, retain: null}}\n"
    )
    return run


@pytest.mark.parametrize("size", SIZES)
def test_blind_ab_gives_a_win_rate_and_goes_on_another_day(tmp_path: Path, size: tuple[int, int]):
    run = a_run(tmp_path)
    host = FakeModelHost(lambda messages, adapter, *_: f"{'T' if adapter else 'B'} {messages[-1]['content']}")

    async def prefer_tuned(pilot: Pilot[None], judge: BlindScreen, wanted: int) -> None:
        for count in range(len(judge._contest._test.judgements), wanted):
            await until(pilot, lambda: judge.judging.current() is not None and not judge._busy)
            shown = judge.judging.current()
            assert shown is not None
            await pilot.press("1" if shown.first.startswith("T") else "2")
            await until(pilot, lambda at=count: len(judge._contest._test.judgements) == at + 1)  # type: ignore[misc]
        await until(pilot, lambda: f"{wanted} of 3 judged" in screen_text(pilot.app))

    @asynccontextmanager
    async def judging() -> AsyncIterator[tuple[LocalDPOApp, Pilot[None], BlindScreen]]:
        async with started(tmp_path, size, host, place="chat") as (app, pilot):
            await until(pilot, lambda: bool(app.screen.query(".empty")), "the place")
            app.run_worker(open_blind(app, run))
            await until(pilot, lambda: isinstance(app.screen, BlindScreen))
            assert isinstance(app.screen, BlindScreen)
            yield app, pilot, app.screen

    async def body() -> None:
        async with judging() as (app, pilot, judge):
            await prefer_tuned(pilot, judge, 1)
            await until(pilot, lambda: not judge._contest.making)  # every answer is made by now
            lines_fit(app)
        async with judging() as (app, pilot, judge):
            await prefer_tuned(pilot, judge, 3)
            await until(pilot, lambda: "Every prompt is judged" in screen_text(app))
            assert "athene won 3, base won 0, 0 ties: win rate 100%" in screen_text(app).replace("\n", "")
            lines_fit(app)
        assert len([kind for kind, _ in host.asked if kind == "generate"]) == 6  # none was made twice
        (test,) = blind_tests(run)
        assert test.win_rate().wins == 3

    asyncio.run(body())


def test_two_marked_runs_are_judged_against_each_other(tmp_path: Path):
    second = a_run(tmp_path)
    first = second.with_name("earlier")
    shutil.copytree(second, first)
    (first / "adapter" / "adapters.safetensors").write_bytes(b"other weights")

    async def body() -> None:
        host = FakeModelHost(lambda messages, adapter, *_: f"{adapter} {messages[-1]['content']}")
        async with started(tmp_path, (80, 24), host, place="runs") as (app, pilot):
            await until(pilot, lambda: app.screen.query_one(DataTable).row_count == 2)
            await until(pilot, lambda: app.screen.query_one(DataTable).has_focus)
            await pilot.press("home", "space", "down", "space", "ctrl+b")
            await until(pilot, lambda: isinstance(app.screen, BlindScreen))
            assert isinstance(app.screen, BlindScreen)
            shown = app.screen
            await until(pilot, lambda: shown.judging.current() is not None)
            pair = shown.judging.current()
            assert pair is not None
            assert {"earlier" in pair.first, "earlier" in pair.second} == {True, False}

    asyncio.run(body())


def test_a_run_without_anything_held_out_says_what_to_do(tmp_path: Path):
    async def body() -> None:
        run = a_run(tmp_path, questions=1)
        (run / "recipe.yaml").write_text(
            (run / "recipe.yaml").read_text().split(", eval")[0] + ", eval: null, retain: null}\n"
        )
        async with started(tmp_path, (80, 24), place="chat") as (app, pilot):
            app.run_worker(open_blind(app, run))
            await until(pilot, lambda: len(app._notifications) == 1)
            (said,) = [note.message for note in app._notifications]
            assert "held out no pairs" in said
            assert "Choose a file of prompts" in said

    asyncio.run(body())
