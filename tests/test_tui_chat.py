"""The Chat place with a host that has no model: asking, stopping, pairs of replies, finding chats again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_host import FakeModelHost
from localdpo_tui.app import LocalDPOApp
from localdpo_tui.places.chat import ChatPlace
from localdpo_tui.screens.chat_options import ChatOptionsScreen
from localdpo_tui.screens.chats import ChatsScreen
from localdpo_tui.screens.correct import CorrectScreen
from localdpo_tui.screens.dialog import Dialog
from localdpo_tui.services.chats import ChatHistory
from localdpo_tui.widgets.composer import Composer
from localdpo_tui.widgets.transcript import ReplyView, Transcript
from textual.pilot import Pilot
from textual.widgets import Input, OptionList, Select, Static

from localdpo.data.pairs import read_pairs
from localdpo.data.provenance import origin_of, provenance_of
from localdpo.errors import EnvironmentFault, Problem
from tui import SIZES, screen_text, started, until

Pilots = Pilot[None]


def a_workspace(root: Path, runs: tuple[str, ...] = ("athene",)) -> Path:
    (root / "pairs").mkdir(parents=True)
    (root / "pairs" / "mine.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    for name in runs:
        adapter = root / "runs" / name / "adapter"
        adapter.mkdir(parents=True)
        (adapter / "adapter_config.json").write_text("{}")
        (adapter / "adapters.safetensors").write_bytes(name.encode())
        (root / "runs" / name / "run.json").write_text(json.dumps({"recipe": {"model": "smollm2-135m"}}))
    return root


@pytest.fixture(autouse=True)
def _settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALDPO_CONFIG", str(tmp_path / "config"))
    monkeypatch.setattr("localdpo_tui.services.answering.Target.is_cached", lambda self: self.model == "smollm2-135m")


@asynccontextmanager
async def chatting(
    folder: Path, host: FakeModelHost, size: tuple[int, int] = (120, 36), **link: Any
) -> AsyncIterator[tuple[Pilots, ChatPlace]]:
    async with started(folder, size, host, place="chat", link=link) as (app, pilot):
        await until(pilot, lambda: isinstance(app.screen, ChatPlace) and bool(app.screen.query(".empty,.turn")))
        place = app.screen
        assert isinstance(place, ChatPlace)
        yield pilot, place


async def ask(pilot: Pilots, place: ChatPlace, text: str) -> None:
    turns = len(place.chat.turns)
    place.query_one(Composer).raw = text
    place.query_one(Composer).focus()
    await pilot.press("enter")
    await until(pilot, lambda: len(place.chat.turns) == turns + 1 and not place._asking)


def replies(place: ChatPlace) -> list[str]:
    """What the screen says of every reply."""
    return [str(view.query_one("#reply-text", Static).content) for view in place.query(ReplyView)]


def asked(host: FakeModelHost) -> list[dict[str, Any]]:
    return [what for kind, what in host.asked if kind == "generate"]


@pytest.mark.parametrize("size", SIZES)
def test_base_and_tuned_answer_the_same_question(tmp_path: Path, size: tuple[int, int]):
    async def body() -> None:
        host = FakeModelHost()
        async with chatting(a_workspace(tmp_path), host, size) as (pilot, place):
            assert "Talk with your model" in screen_text(pilot.app)
            await ask(pilot, place, "who are you?")
            await until(pilot, lambda: all(replies(place)))
            assert replies(place) == [
                "base 0: you said 'who are you?', and that is all.",
                "tuned 0: you said 'who are you?', and that is all.",
            ]
            shown = screen_text(pilot.app)
            assert "base  50 tok/s" in shown
            assert "athene  50 tok/s" in shown
            left, right = (view.region for view in place.query(ReplyView))
            if size[0] >= 100:
                assert left.y == right.y
                assert left.x < right.x
            else:
                assert left.x == right.x
                assert left.bottom <= right.y
            assert "Quit" in shown
            assert [what["adapter"] is None for what in asked(host)] == [True, False]
            assert asked(host)[1]["adapter"].endswith("runs/athene/adapter")

    asyncio.run(body())


def test_each_side_goes_on_with_its_own_answers(tmp_path: Path):
    async def body() -> None:
        host = FakeModelHost(lambda messages, adapter, _o, _n: f"{'T' if adapter else 'B'}{len(messages)}")
        async with chatting(a_workspace(tmp_path), host) as (pilot, place):
            await ask(pilot, place, "one")
            await ask(pilot, place, "two")
            said = [[turn["content"] for turn in what["messages"]] for what in asked(host)[2:]]
            assert said == [["one", "B1", "two"], ["one", "T1", "two"]]
            await pilot.press("ctrl+t")  # the tuned model alone
            await ask(pilot, place, "three")
            assert len(asked(host)) == 5
            await pilot.press("ctrl+t")  # the base alone, which takes the tuned one's answer as its own
            await ask(pilot, place, "four")
            assert [turn["content"] for turn in asked(host)[-1]["messages"]][-3:] == ["three", "T5", "four"]

    asyncio.run(body())


def test_esc_stops_keeps_what_came_and_does_not_ask_the_other_side(tmp_path: Path):
    async def body() -> None:
        host = FakeModelHost(hold=True)
        async with chatting(a_workspace(tmp_path), host) as (pilot, place):
            place.query_one(Composer).raw = "go"
            await pilot.press("enter")
            await until(pilot, lambda: "base" in "".join(replies(place)))
            assert place.busy()
            await pilot.press("escape")
            await until(pilot, lambda: not place._asking)
            assert not place.busy()
            assert host.cancelled == 1
            assert len(asked(host)) == 1
            (reply,) = place.chat.turns[0].replies.values()
            assert (reply.text, reply.stopped) == ("base", True)
            assert "stopped" in screen_text(pilot.app)
            kept = ChatHistory(tmp_path).latest()
            assert kept is not None
            assert kept.turns == place.chat.turns

    asyncio.run(body())


def test_a_second_message_waits_for_the_first_answer(tmp_path: Path):
    async def body() -> None:
        host = FakeModelHost(hold=True)
        async with chatting(a_workspace(tmp_path, runs=()), host) as (pilot, place):
            place.query_one(Composer).raw = "one"
            await pilot.press("enter")
            await until(pilot, lambda: len(asked(host)) == 1)
            place.query_one(Composer).raw = "two"
            await pilot.press("enter")
            await pilot.pause()
            assert place.query_one(Composer).raw == "two"
            host.release()
            await until(pilot, lambda: not place._asking)
            await pilot.press("enter")
            await until(pilot, lambda: len(place.chat.turns) == 2 and not place._asking)
            assert [len(what["messages"]) for what in asked(host)] == [1, 3]

    asyncio.run(body())


@pytest.mark.parametrize("size", SIZES)
def test_one_key_makes_a_pair_of_a_reply(tmp_path: Path, size: tuple[int, int]):
    async def body() -> None:
        folder = a_workspace(tmp_path)
        host = FakeModelHost(lambda *_: "I am SmolLM.")
        async with chatting(folder, host, size) as (pilot, place):
            await ask(pilot, place, "who are you?")
            await pilot.press("ctrl+s")
            await until(pilot, lambda: isinstance(pilot.app.screen, CorrectScreen))
            await pilot.pause()
            shown = screen_text(pilot.app)
            assert "mine.jsonl" in shown
            assert "Save pair" in shown
            assert "Quit" in shown
            await pilot.press("ctrl+s")  # nothing was changed: refused, and the screen stays
            await pilot.pause()
            assert isinstance(pilot.app.screen, CorrectScreen)
            await pilot.press(*("backspace",) * 7, *"Athene.")
            await pilot.press("ctrl+s")
            await until(pilot, lambda: len((folder / "pairs" / "mine.jsonl").read_text().splitlines()) == 2)
            pair = read_pairs(folder / "pairs" / "mine.jsonl").pairs[1]
            assert (pair.prompt[0]["content"], pair.chosen, pair.rejected) == (
                "who are you?", "I am Athene.", "I am SmolLM.",
            )  # fmt: skip
            assert provenance_of(pair.extra)["how"] == "reply"
            origin = origin_of(pair.extra, "rejected")
            assert origin is not None
            assert (origin.model, origin.fingerprint) == ("smollm2-135m", "f" * 64)
            assert origin.adapter.endswith("runs/athene/adapter")
            assert origin.sampling == {"temperature": 0.0, "top_p": 1.0, "max_tokens": 512}

    asyncio.run(body())


def test_leaving_a_correction_asks_before_what_was_written_is_dropped(tmp_path: Path):
    async def body() -> None:
        async with chatting(a_workspace(tmp_path), FakeModelHost()) as (pilot, place):
            await ask(pilot, place, "x")
            await pilot.press("ctrl+s")
            await until(pilot, lambda: isinstance(pilot.app.screen, CorrectScreen))
            await pilot.press("a", "escape")
            await until(pilot, lambda: isinstance(pilot.app.screen, Dialog))
            await pilot.press("escape")
            await until(pilot, lambda: isinstance(pilot.app.screen, CorrectScreen))
            await pilot.press("ctrl+r", "escape")  # nothing to lose any more
            await until(pilot, lambda: pilot.app.screen is place)

    asyncio.run(body())


def test_chats_are_kept_and_found_by_what_was_said(tmp_path: Path):
    async def body() -> None:
        folder = a_workspace(tmp_path)
        async with chatting(folder, FakeModelHost()) as (pilot, place):
            await ask(pilot, place, "about owls")
            await pilot.press("ctrl+n")
            await until(pilot, lambda: not place.chat.turns)
            await ask(pilot, place, "about cats")
        async with chatting(folder, FakeModelHost()) as (pilot, place):
            assert place.chat.turns == []  # a new chat, with the old one's settings
            assert place.chat.run == "athene"
            await pilot.press("ctrl+l")
            await until(pilot, lambda: isinstance(pilot.app.screen, ChatsScreen))
            await until(pilot, lambda: pilot.app.screen.query_one(OptionList).option_count == 2)
            await pilot.press(*"OWLS")
            await until(pilot, lambda: pilot.app.screen.query_one(OptionList).option_count == 1)
            await pilot.press("enter")
            await until(pilot, lambda: pilot.app.screen is place and len(place.query(ReplyView)) == 2)
            assert place.chat.title == "about owls"
            assert "about owls" in screen_text(pilot.app)

    asyncio.run(body())


def test_what_was_not_sent_is_there_again(tmp_path: Path):
    async def body() -> None:
        folder = a_workspace(tmp_path)
        async with chatting(folder, FakeModelHost()) as (pilot, place):
            await pilot.press(*"half a")
            pilot.app.hang_up(1)  # type: ignore[attr-defined]
        async with chatting(folder, FakeModelHost()) as (pilot, place):
            await until(pilot, lambda: place.query_one(Composer).raw == "half a")

    asyncio.run(body())


def test_asking_again_and_editing_lose_nothing(tmp_path: Path):
    async def body() -> None:
        host = FakeModelHost(lambda messages, *_: f"answer {len(messages)}")
        async with chatting(a_workspace(tmp_path, runs=()), host) as (pilot, place):
            await ask(pilot, place, "one")
            await ask(pilot, place, "two")
            first = place.chat.id
            await pilot.press("ctrl+r")
            await until(pilot, lambda: place.chat.id != first and not place._asking)
            assert [turn.prompt for turn in place.chat.turns] == ["one", "two"]
            place.query_one(Transcript).focus()
            await pilot.press("up", "e")
            await until(pilot, lambda: place.query_one(Composer).raw == "one")
            assert place.chat.turns == []
            await ask(pilot, place, "uno")
            titles = sorted([turn.prompt for turn in chat.turns] for chat in ChatHistory(tmp_path).all())
            assert titles == [["one", "two"], ["one", "two"], ["uno"]]

    asyncio.run(body())


def test_options_reach_the_model(tmp_path: Path):
    async def body() -> None:
        host = FakeModelHost()
        async with chatting(a_workspace(tmp_path, runs=("a", "b")), host, (80, 24)) as (pilot, place):
            await pilot.press("ctrl+g")
            await until(pilot, lambda: isinstance(pilot.app.screen, ChatOptionsScreen))
            options = pilot.app.screen
            options.query_one("#option-run", Select).value = "a"
            options.query_one("#sampling-temperature", Input).value = "-1"
            options.query_one("#sampling-seed", Input).value = "7"
            options.query_one("#option-system").raw = "be brief"  # type: ignore[attr-defined]
            await pilot.press("ctrl+s")
            await pilot.pause()
            assert pilot.app.screen is options  # -1 is no temperature
            options.query_one("#sampling-temperature", Input).value = "0.5"
            await pilot.press("ctrl+s")
            await until(pilot, lambda: pilot.app.screen is place)
            await ask(pilot, place, "hi")
            what = asked(host)[-1]
            assert what["options"] == {"temperature": 0.5, "top_p": 1.0, "max_tokens": 512, "seed": 7}
            assert what["messages"][0] == {"role": "system", "content": "be brief"}
            assert what["adapter"].endswith("runs/a/adapter")

    asyncio.run(body())


def test_a_model_that_is_not_here_is_fetched_only_when_asked_for(tmp_path: Path):
    async def body() -> None:
        host = FakeModelHost()
        async with chatting(a_workspace(tmp_path, runs=()), host, model="qwen3-0.6b") as (pilot, place):
            await until(pilot, lambda: "not on this machine" in screen_text(pilot.app))
            place.query_one(Composer).raw = "hi"
            await pilot.press("enter")
            await until(pilot, lambda: isinstance(pilot.app.screen, Dialog))
            assert "335 MB" in screen_text(pilot.app)
            await pilot.press("escape")
            await until(pilot, lambda: pilot.app.screen is place and not place._asking)
            assert host.asked == []
            assert place.query_one(Composer).raw == "hi"
            assert place.chat.turns == []
            await pilot.press("enter")
            await until(pilot, lambda: isinstance(pilot.app.screen, Dialog))
            await pilot.press("f")
            await until(pilot, lambda: len(place.chat.turns) == 1 and not place._asking)
            assert host.asked[0][1]["model"] == "qwen3-0.6b"

    asyncio.run(body())


def test_trouble_is_told_in_sentences_and_the_message_is_not_lost(tmp_path: Path):
    async def body() -> None:
        host = FakeModelHost()
        async with chatting(a_workspace(tmp_path, runs=()), host) as (pilot, place):
            host.error = EnvironmentFault(Problem("", "the model does not fit into memory", "Choose a smaller one"))
            place.query_one(Composer).raw = "hi"
            await pilot.press("enter")
            await until(pilot, lambda: len(pilot.app._notifications) == 1 and not place._asking)
            assert place.query_one(Composer).raw == "hi"
            (said,) = [note.message for note in pilot.app._notifications]
            assert said == "the model does not fit into memory. Choose a smaller one."

    asyncio.run(body())


@pytest.mark.parametrize("size", SIZES)
def test_what_a_model_says_is_inert_and_wide_characters_line_up(tmp_path: Path, size: tuple[int, int]):
    async def body() -> None:
        evil = "\x1b]52;c;ZXZpbA==\x07[red]not markup[/red] \u202e日本語テスト👩‍👩‍👧 e\u0301 " * 4
        async with chatting(a_workspace(tmp_path), FakeModelHost(lambda *_: evil), size) as (pilot, place):
            await ask(pilot, place, "日本語 \x1b[31m?")
            await pilot.pause()
            shown = screen_text(pilot.app)
            assert "\x1b" not in shown
            assert "\u202e" not in shown
            assert "[red]not markup[/red]" in shown.replace("\n", "")
            assert "日本語" in shown
            assert place.chat.turns[0].replies["base"].text == evil.strip()  # kept as it was
            from rich.cells import cell_len

            assert {cell_len(line) for line in shown.split("\n")} == {size[0]}

    asyncio.run(body())


def test_escape_twice_empties_the_line(tmp_path: Path):
    async def body() -> None:
        async with chatting(a_workspace(tmp_path), FakeModelHost()) as (pilot, place):
            await pilot.press(*"words", "escape")
            assert place.query_one(Composer).raw == "words"
            await pilot.press("escape")
            await until(pilot, lambda: place.query_one(Composer).raw == "")
            await pilot.press("ctrl+z")
            assert place.query_one(Composer).raw == "words"

    asyncio.run(body())


def test_the_starter_model_answers_through_the_real_host(tmp_path: Path, starter: Path):
    async def body() -> None:
        app = LocalDPOApp(a_workspace(tmp_path, runs=()), place="chat")
        async with app.run_test(size=(80, 24)) as pilot:
            await until(pilot, lambda: isinstance(app.screen, ChatPlace) and bool(app.screen.query(".empty")))
            place = app.screen
            assert isinstance(place, ChatPlace)
            place.chat.sampling["max_tokens"] = 8
            place.query_one(Composer).raw = "What is the capital of France?"
            await pilot.press("enter")
            deadline = asyncio.get_running_loop().time() + 120  # the first answer waits for mlx and the weights
            while not place.chat.turns or not place.chat.turns[0].replies:
                assert asyncio.get_running_loop().time() < deadline, screen_text(app)
                await pilot.pause(0.05)
            await until(pilot, lambda: not place._asking)
            reply = place.chat.turns[0].replies["base"]
            assert "Paris" in reply.text
            assert reply.origin is not None
            assert reply.origin.model == "smollm2-135m"
            assert reply.origin.finish in ("stop", "length")
            assert len(reply.origin.fingerprint) == 64
            assert reply.tokens_per_second > 0
            assert "Paris" in screen_text(app)
            pid = app.host.pid
            assert pid is not None
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE

    asyncio.run(body())
