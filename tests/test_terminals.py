"""Signals, small and dumb terminals, pipes, and clocks that go back: programs in real pseudo-terminals."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tmux
from hostile import CORPUS, HOSTILE
from localdpo_tui.services.chats import ChatHistory
from localdpo_tui.services.conversation import Chat, Reply, Turn
from tiny import tiny_model
from tmux import needs_tmux
from training import write_rows
from vt import Screen, Terminal, environment_of, localdpo_in_terminal

from localdpo.train.events import StepEvent
from localdpo.train.run import RunFolder

LOCALDPO = (sys.executable, "-m", "localdpo")
RECIPE = """
model: model
data: {train: pairs.jsonl, eval: null, retain: null, max_length: 64}
lora: {r: 2, num_layers: 1}
train: {max_steps: STEPS, per_device_train_batch_size: 2}
output_dir: run
"""
# What Textual itself asks of a terminal: places of the cursor, modes that it takes back, the shape of the pointer.
_TEXTUAL = re.compile(
    r"CSI \d+;\d+H|OSC 22|mode \?(7|1000|1003|1004|1006|1015|1049|2004|2026|2048) (on|off)"
    r"|CSI (>25u|<u|\?2026\$p|\?2048\$p)|control 0x07"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    tiny_model(folder / "model", num_hidden_layers=1)
    write_rows(folder / "pairs.jsonl", [{"prompt": f"p {n}", "chosen": "yes", "rejected": "no"} for n in range(8)])
    (folder / "short.yaml").write_text(RECIPE.replace("STEPS", "2"))
    return folder


@pytest.fixture
def endless(folder: Path, tmp_path: Path) -> Path:
    """A workspace whose recipe trains until it is told to stop."""
    for name in ("model", "pairs.jsonl"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "long.yaml").write_text(RECIPE.replace("STEPS", "1000000"))
    return tmp_path


def training(folder: Path, **options: Any) -> Terminal:
    command = [*LOCALDPO, "train", "long.yaml"]
    return Terminal(command, folder, **environment_of(folder / "home"), **options)


def await_steps(terminal: Terminal, folder: Path, count: int = 2) -> RunFolder:
    run = RunFolder(folder / "run")
    terminal.until(lambda: sum(isinstance(e, StepEvent) for e in run.events().events) >= count, "steps")
    return run


def assert_saved(run: RunFolder, state: str = "stopped") -> None:
    status = run.status()
    assert status is not None
    assert status.state == state
    steps = [event.step for event in run.events().events if isinstance(event, StepEvent)]
    assert steps == list(range(1, status.step + 1))
    assert (run.checkpoints / f"step-{status.step:06}" / "adapter" / "adapters.safetensors").is_file()
    assert not run.is_running()


def test_ctrl_c_finishes_the_step_saves_and_gives_the_terminal_back(endless: Path):
    with training(endless) as terminal:
        before = terminal.settings()
        run = await_steps(terminal, endless)
        terminal.type("\x03")
        assert terminal.wait() == 130
        screen = Screen.of(terminal.output)
        assert screen.attacks == []  # cursor, colours and modes are as they were
        assert "Ctrl-C: finishing this step and saving" in screen.text
        assert "--resume" in screen.text
        assert terminal.settings() == before
    assert_saved(run)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_signals_save_and_end_with_their_number(endless: Path, number: signal.Signals, code: int):
    with training(endless) as terminal:
        run = await_steps(terminal, endless)
        terminal.process.send_signal(number)
        assert terminal.wait() == code
        assert Screen.of(terminal.output).attacks == []
    assert_saved(run)


@pytest.mark.slow
def test_a_closed_window_saves_too(endless: Path):
    with training(endless) as terminal:
        run = await_steps(terminal, endless)
        terminal.hang_up()
        assert terminal.process.wait(300) == 129
    assert_saved(run)


@pytest.mark.parametrize("ignored", [("SIGHUP",), ("SIGHUP", "SIGINT")], ids=["nohup", "background"])
def test_what_was_told_to_ignore_a_hang_up_goes_on_after_it(endless: Path, ignored: tuple[str, ...]):
    """As under nohup, or as a job in the background of a script, where a shell ignores Ctrl-C too."""
    (endless / "long.yaml").write_text(RECIPE.replace("STEPS", "60"))
    ignore = "".join(f"signal.signal(signal.{name}, signal.SIG_IGN);" for name in ignored)
    start = f"import os, signal, sys; {ignore} os.execv(sys.executable, sys.argv[1:])"
    command = [sys.executable, "-c", start, *LOCALDPO, "train", "long.yaml"]
    with Terminal(command, endless, **environment_of(endless / "home")) as terminal:
        run = await_steps(terminal, endless)
        if "SIGINT" in ignored:
            terminal.process.send_signal(signal.SIGINT)
        terminal.process.send_signal(signal.SIGHUP)
        terminal.hang_up()
        assert terminal.process.wait(200) == 0
    status = run.status()
    assert status is not None
    assert (status.state, status.step) == ("finished", 60)


@pytest.mark.slow
def test_ctrl_c_twice_leaves_at_once_and_the_last_checkpoint_is_whole(endless: Path):
    (endless / "long.yaml").write_text(RECIPE.replace("STEPS", "1000000, save_steps: 1"))
    with training(endless) as terminal:
        run = await_steps(terminal, endless, 3)
        terminal.type("\x03")
        terminal.until("once more leaves at once")
        terminal.type("\x03")
        assert terminal.wait() == 130
        assert "cursor hidden" not in Screen.of(terminal.output).modes
    status = run.status()
    assert status is not None
    assert status.state in ("interrupted", "stopped")  # stopped: the first one was quicker
    with Terminal([*LOCALDPO, "train", "long.yaml", "--resume"], endless, **environment_of(endless / "home")) as again:
        again.until("s/step")  # a step of its own, not one of the attempt before
        again.type("\x03")
        assert again.wait() == 130
    assert_saved(run)


# -- terminals that can do little


def test_a_dumb_terminal_gets_no_escapes(folder: Path, monkeypatch: pytest.MonkeyPatch):
    commands = (
        ("train", "short.yaml"),
        ("chat", "run", "--compare", "-p", "hello", "--max-tokens", "4"),
        ("pairs", "check", "pairs.jsonl"),
        ("pairs", "stats", "pairs.jsonl"),
        ("runs", "."),
        ("tui", "."),
    )
    for ran in localdpo_in_terminal(folder, commands, monkeypatch, term="dumb"):
        assert b"\x1b" not in ran.output
        assert ran.code == (3 if ran.words[0] == "tui" else 0), ran.output
        assert b"Traceback" not in ran.output
    assert b"The terminal UI cannot open here: the terminal type is dumb" in ran.output


def test_the_smallest_terminal_is_enough(folder: Path, monkeypatch: pytest.MonkeyPatch):
    commands = (
        ("train", "short.yaml"),
        ("chat", "run", "--compare", "-p", "hello", "--max-tokens", "4"),
        ("pairs", "check", "pairs.jsonl"),
        ("pairs", "stats", "pairs.jsonl"),
    )
    for ran in localdpo_in_terminal(folder, commands, monkeypatch, size=(10, 40)):
        assert ran.screen.attacks == []
        assert ran.code == 0, ran.output


def test_a_pipe_gets_no_escapes_even_beside_a_terminal(folder: Path):
    read, write = os.pipe()
    command = [*LOCALDPO, "pairs", "check", "pairs.jsonl"]
    with Terminal(command, folder, stdout=write, **environment_of(folder / "home")) as terminal:
        os.close(write)
        with os.fdopen(read, "rb") as piped:
            output = piped.read()
        assert terminal.wait() == 0
    assert b"8 pairs" in output
    assert b"\x1b" not in output
    assert b"\r" not in output


# -- the terminal UI


@pytest.fixture
def hostile_workspace(tmp_path: Path) -> Path:
    """Pairs, recipe and run with hostile texts and hostile names."""
    name = "e" + CORPUS["clipboard"] + CORPUS["bidi"] + CORPUS["C1 CSI"] + CORPUS["invisible"] + "[bold]"
    pairs, recipes, run = tmp_path / "pairs", tmp_path / "recipes", tmp_path / "runs" / name
    for made in (pairs, recipes, run / "adapter"):
        made.mkdir(parents=True)
    turns = [{"role": "system", "content": HOSTILE}, {"role": "user", "content": HOSTILE}]
    rows = [
        {"prompt": turns, "chosen": f"{HOSTILE}{n}", "rejected": HOSTILE, "tags": [HOSTILE, "[bold]"]} for n in range(4)
    ]
    write_rows(pairs / f"{name}.jsonl", rows)
    recipe = {"model": HOSTILE.replace("\0", ""), "data": {"train": f"../pairs/{name}.jsonl"}, "output_dir": name}
    (recipes / f"{name}.yaml").write_text(json.dumps(recipe))
    (run / "recipe.yaml").write_text(json.dumps(recipe))
    (run / "run.json").write_text(json.dumps({"model": {"spec": HOSTILE, "fingerprint": HOSTILE}, "files": {}}))
    status = {"state": HOSTILE, "stage": HOSTILE, "message": f"{HOSTILE}\ud800", "reason": HOSTILE, "host": HOSTILE}
    (run / "status.json").write_text(json.dumps(status))
    (run / "adapter" / "adapter_config.json").write_text(json.dumps({"model": HOSTILE}))
    sample = {"prompt": [{"role": HOSTILE, "content": HOSTILE}], "base": HOSTILE, "tuned": HOSTILE, "group": HOSTILE}
    events = [
        {"event": "start", "step": 0, "plan": {}, "model": HOSTILE},
        {"event": "warning", "step": 1, "code": HOSTILE, "message": HOSTILE, "fix": HOSTILE, "where": HOSTILE},
        {"event": "step", "step": 1, "loss": 0.5, HOSTILE: 1.0},
        {"event": "step", "step": 2, "loss": 0.4, HOSTILE: 2.0},
        {"event": "sample", "step": 2, "final": True, **sample},
        {"event": "end", "step": 2, "reason": HOSTILE, "message": HOSTILE, "figures": {"lines": [HOSTILE]}},
    ]
    for file in ("metrics.jsonl", "samples.jsonl"):
        write_rows(run / file, [{"time": 1.0, **event} for event in events])
    chat = Chat(model=HOSTILE, run=f"runs/{name}", system=HOSTILE, turns=[Turn(HOSTILE, {"base": Reply(HOSTILE)})])
    ChatHistory(tmp_path).save(chat)
    return tmp_path


@pytest.fixture
def ui(hostile_workspace: Path) -> Iterator[Terminal]:
    command = [*LOCALDPO, "tui", "."]
    environment = environment_of(hostile_workspace / "home", TEXTUAL_ANIMATIONS="none")
    with Terminal(command, hostile_workspace, size=(36, 120), **environment) as terminal:
        yield terminal


class Walk:
    """Presses keys and waits for what comes of them."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal

    def press(self, keys: str, *seen: str) -> None:
        """Type `keys`, and wait until all of `seen` was drawn since."""
        start = len(self._terminal.output)
        self._terminal.type(keys)
        self._terminal.until(
            lambda: all(text in Screen.of(self._terminal.output[start:]).text for text in seen),
            f"{seen} after {keys!r}",
        )

    def quit(self) -> Screen:
        """Leave with Ctrl+Q; returns all that was done to the terminal."""
        self._terminal.type("\x11")
        assert self._terminal.wait() == 0, self._terminal.output[-2000:]
        return Screen.of(self._terminal.output)


def assert_only_textual(screen: Screen) -> None:
    assert [effect for effect in screen.effects if not _TEXTUAL.fullmatch(effect)] == []
    assert screen.modes <= {"?7"}  # lines wrap again, as they do by default; all else is off again
    assert not screen.coloured


def test_the_terminal_ui_shows_hostile_texts_and_names_inert(ui: Terminal):
    walk = Walk(ui)
    walk.press("", "␛", "Quit")
    walk.press("\r", "$EDITOR", "␛")
    walk.press("\x1b[15~", "1 run", "␛")  # F5, runs
    walk.press("\x1bOR", "Recipe: recipes/", "␛")  # F3, train
    walk.press("\x1bOS", "Message")  # F4, chat
    assert_only_textual(walk.quit())


@needs_tmux
def test_the_dialogs_of_the_ui_show_hostile_texts_and_names_inert(hostile_workspace: Path, tmp_path: Path):
    record, (pairs,) = tmp_path / "record", (hostile_workspace / "pairs").iterdir()
    terminal = tmux.Terminal(hostile_workspace, tmp_path / "config")

    def look(key: str, title: str, *seen: str) -> None:
        """Open a dialog and close it again."""
        terminal.press(key)
        terminal.sees(title, *seen)
        terminal.press("Escape")
        terminal.sees_no(title)

    try:
        terminal.open(record=record)
        terminal.sees("␛", "Quit")
        look("o", "Open a file of pairs", "␛")
        look("i", "Import pairs from a file")
        look("C-g", "Candidates", "␛")
        look("F1", "The pairs of the open file")
        look("C-p", "Search for commands")
        look("v", "as one text", "␛")
        # A pair that is changed here and elsewhere is asked about, with its texts.
        terminal.press("x")
        terminal.sees("not saved")
        pairs.write_bytes(pairs.read_bytes().replace(b'"rejected": "', b'"rejected": "elsewhere ', 1))
        terminal.sees("Which do you keep?", "␛")
        terminal.press("b")
        terminal.sees_no("Which do you keep?")
        terminal.press("F3")
        terminal.sees("Recipe: recipes/")
        look("o", "Open a recipe", "␛")
        terminal.press("F4")
        terminal.sees("Message")
        look("C-l", "words that were said", "␛")
        look("C-g", "Use these", "␛")
        terminal.press("C-q")
        terminal.sees("Quit now?", "␛")
        terminal.press("Right", "Enter")
        tmux.until(lambda: not terminal.screen(), terminal.screen)
    finally:
        terminal.close()
    assert_only_textual(Screen.of(record.read_bytes()))


def test_a_terminal_too_small_for_the_ui_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch):
    (ran,) = localdpo_in_terminal(folder, [("tui", ".")], monkeypatch, size=(9, 39))
    assert ran.code == 3
    assert "The terminal is 39x9, and the terminal UI needs 40x10" in " ".join(ran.screen.text.split())
    assert ran.screen.attacks == []


@pytest.mark.slow
def test_the_ui_opens_in_the_smallest_terminal(folder: Path):
    environment = environment_of(folder / "home", TEXTUAL_ANIMATIONS="none")
    with Terminal([*LOCALDPO, "tui", "."], folder, size=(10, 40), **environment) as terminal:
        walk = Walk(terminal)
        walk.press("", "Pairs")
        walk.press("\x1bOR", "Recipe")
        assert_only_textual(walk.quit())


# -- clocks


def test_a_clock_that_goes_back_changes_neither_order_nor_the_time_left(folder: Path, monkeypatch: pytest.MonkeyPatch):
    now = time.time()
    ticks = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: now - 3600 * next(ticks))  # an hour back with every look
    (ran,) = localdpo_in_terminal(folder, [("train", "short.yaml", "--json", "--set", "output_dir=back")], monkeypatch)
    assert ran.code == 0, ran.output
    events = [json.loads(line) for line in ran.output.splitlines() if line.startswith(b"{")]
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == [1, 2]
    times = [event["time"] for event in steps]
    assert times == sorted(times, reverse=True)  # the clock did go back
    assert all(event["eta_seconds"] is None or event["eta_seconds"] >= 0 for event in steps)
    assert all(event["step_seconds"] >= 0 for event in steps)
    run = RunFolder(folder / "back")
    assert [e.step for e in run.events().events if isinstance(e, StepEvent)] == [1, 2]
    status = run.status()
    assert status is not None
    assert (status.state, status.step) == ("finished", 2)
    (listed,) = localdpo_in_terminal(folder, [("runs", ".", "--json")], monkeypatch)
    assert {row["path"]: row["state"] for row in json.loads(listed.output)}["back"] == "finished"
