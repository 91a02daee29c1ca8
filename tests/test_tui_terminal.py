"""The terminal UI in a real pseudo-terminal that sends anything, stops it, and goes away."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from vt import Terminal, environment_of

from localdpo.data.store import PairStore
from tui import write_pairs

TUI = (sys.executable, "-m", "localdpo", "tui", ".")
BROKEN = "from localdpo_tui.terminal_input import TerminalInput; from localdpo.__main__ import main; "
STORM = b"word " * 6000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "pairs.jsonl")
    return tmp_path


@pytest.fixture
def ui(folder: Path) -> Iterator[Terminal]:
    with opened(folder) as terminal:
        yield terminal


def opened(folder: Path, *command: str) -> Terminal:
    environment = environment_of(folder / "home", TEXTUAL_ANIMATIONS="none")
    terminal = Terminal(command or TUI, folder, size=(36, 120), **environment)
    sees(terminal, "largest planet")
    return terminal


def sees(terminal: Terminal, text: str, since: int = 0) -> None:
    """Wait until a text was drawn after `since` bytes."""
    terminal.until(lambda: text.encode() in terminal.output[since:], text)


def new_pair(terminal: Terminal) -> None:
    """Begin a pair; the cursor is in its prompt, as the footer shows."""
    sees(terminal, "3 pairs")
    since = len(terminal.output)
    terminal.send(b"\x0e")
    sees(terminal, "Turn+", since)


def saved(terminal: Terminal, folder: Path) -> dict[str, object]:
    """The new pair, when the file has it."""
    terminal.until(lambda: len((folder / "pairs.jsonl").read_bytes().splitlines()) == 4, "the file")
    return dict(json.loads((folder / "pairs.jsonl").read_text("utf-8").splitlines()[1]))


def drafted(folder: Path) -> str:
    """The prompt of the new pair as its draft has it."""
    with PairStore.open(folder / "pairs.jsonl") as store:
        return store.row(int(store.keys[1])).draft().messages[-1]["content"]


def test_lines_pasted_and_bytes_that_are_no_text_are_saved_as_they_should_be(ui: Terminal, folder: Path):
    new_pair(ui)
    ui.send(b"\x1b[200~one\rtwo\r\n\rfour\x1b[201~\xff\x1b[M \x8e%\x1b[97:65;2:3u\x1b[99999999999;1u!")
    sees(ui, "four")
    ui.send(b"\x13")
    assert saved(ui, folder)["prompt"] == "one\ntwo\n\nfour\ufffd!"
    ui.send(b"\x1b[M \xc3\xa9\xfe\x1bOR")
    sees(ui, "Recipe")
    ui.process.send_signal(signal.SIGTERM)
    assert ui.wait() == 143
    assert "?1049" not in str(ui.output[ui.output.rindex(b"\x1b[?1049l") + 8 :])


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_is_heard_behind_a_storm_of_keys_and_what_was_typed_is_kept(
    ui: Terminal, folder: Path, number: signal.Signals
):
    new_pair(ui)
    ui.send(STORM)
    sees(ui, "word")
    ui.hang_up() if number == signal.SIGHUP else ui.process.send_signal(number)
    assert ui.process.wait(60) == 128 + number
    draft = drafted(folder)
    assert draft  # the rest is in the terminal still, and goes with it
    assert STORM.decode().startswith(draft)


def test_a_storm_of_keys_arrives_whole(ui: Terminal, folder: Path):
    new_pair(ui)
    ui.send(STORM + b"\x13")
    assert saved(ui, folder)["prompt"] == STORM.decode()


def test_a_signal_is_heard_by_an_app_whose_terminal_takes_nothing(ui: Terminal, folder: Path):
    new_pair(ui)
    ui.send(b"kept")
    sees(ui, "kept")
    # Nobody reads any more: what the app draws fills the terminal, then its queue, then it waits and takes no keys.
    while select.select([], [ui.descriptor], [], 2)[1]:
        os.write(ui.descriptor, b"\x1bOR\x1bOQ")
    ui.process.send_signal(signal.SIGTERM)
    assert ui.process.wait(60) == 143
    assert drafted(folder) == "kept"


@pytest.mark.parametrize("stop", [signal.SIGTSTP, signal.SIGSTOP])
def test_a_process_that_was_stopped_draws_itself_when_it_goes_on(ui: Terminal, stop: signal.Signals):
    process = psutil.Process(ui.process.pid)
    ui.process.send_signal(stop)
    ui.until(lambda: process.status() == psutil.STATUS_STOPPED, "the stop")
    since = len(ui.read())
    ui.process.send_signal(signal.SIGCONT)
    sees(ui, "largest planet", since)
    new_pair(ui)
    since = len(ui.output)
    ui.send(b"all keys of this sentence")
    sees(ui, "sentence", since)
    ui.process.send_signal(signal.SIGTERM)
    assert ui.wait() == 143


def test_input_that_cannot_be_read_ends_the_app_with_an_error(folder: Path):
    broken = BROKEN + "TerminalInput.feed = lambda *_: 1 / 0; main()"
    with opened(folder, sys.executable, "-c", broken, "tui", ".") as terminal:
        terminal.send(b"x")
        assert terminal.wait() == 1
        assert b"internal error: ZeroDivisionError" in terminal.output
        assert b"Traceback" not in terminal.output


def test_a_terminal_that_ends_without_a_signal_ends_the_app(folder: Path):
    ignored = "import signal; real = signal.signal; real(signal.SIGHUP, signal.SIG_IGN); "
    ignored += "signal.signal = lambda number, handler: number == signal.SIGHUP or real(number, handler); " + BROKEN
    with opened(folder, sys.executable, "-c", ignored + "main()", "tui", ".") as terminal:
        terminal.hang_up()
        assert terminal.process.wait(60) == 129


def test_a_paste_into_a_window_without_the_focus_arrives(ui: Terminal, folder: Path):
    new_pair(ui)
    ui.send(b"\x1b[O\x1b[200~one\rtwo\x1b[201~\x1b[I!")
    sees(ui, "two")
    ui.send(b"\x13")
    assert saved(ui, folder)["prompt"] == "one\ntwo!"
