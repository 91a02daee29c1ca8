"""The terminal UI in tmux: a real terminal, whose screen can be looked at."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[1]
SECONDS = 600.0  # a deadline that only a broken program meets, on a machine that is busy

needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")


def until(condition: Callable[[], Any], what: Callable[[], str]) -> Any:
    end = time.monotonic() + SECONDS
    while not (found := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"waited in vain; {what()}")
        time.sleep(0.1)
    return found


class Terminal:
    """`localdpo tui FOLDER` in a terminal of its own."""

    def __init__(self, folder: Path, config: Path) -> None:
        self._folder = folder
        self._environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tui'}",
            "LOCALDPO_CONFIG": str(config),
            "TEXTUAL_ANIMATIONS": "none",
        }
        self._environment.pop("TMUX", None)
        self._socket = ""

    def _tmux(self, *arguments: str) -> str:
        done = subprocess.run(
            ["tmux", "-f", "/dev/null", "-L", self._socket, *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
        )
        return done.stdout

    def open(self, *arguments: str, record: Path | None = None) -> None:
        """Open a new terminal on the folder; all that is written to it goes to `record` too, from the first byte."""
        self._socket = f"localdpo-{uuid.uuid4().hex[:8]}"
        command = [sys.executable, "-m", "localdpo", "tui", ".", *arguments]
        if record is not None:
            command = ["sh", "-c", 'read -r _ && exec "$@"', "sh", *command]
        self._tmux("new-session", "-d", "-x", "120", "-y", "36", "-c", str(self._folder), *command)
        if record is not None:
            self._tmux("pipe-pane", f"exec cat > '{record}'")
            until(record.exists, lambda: "for the record to begin")
            self.press("Enter")

    def move(self, key: str) -> None:
        """Press a key that moves the focus, and wait until it is seen to have moved.

        Textual hands a key to what has the focus then: one that comes too early goes astray.
        """
        before = self._tmux("capture-pane", "-p", "-e")
        self.press(key)
        until(lambda: self._tmux("capture-pane", "-p", "-e") != before, self.screen)

    def focuses(self, text: str) -> None:
        """Wait until the line with `text` is shown in reverse, as a button with the focus is."""

        def reverse() -> bool:
            lines = self._tmux("capture-pane", "-p", "-e").splitlines()
            return any(text in line and re.search(r"\x1b\[(?:\d+;)*7m", line) for line in lines)

        until(reverse, self.screen)

    def screen(self) -> str:
        """What it shows; nothing when it is gone."""
        return self._tmux("capture-pane", "-p")

    def sees(self, *texts: str) -> str:
        """Wait until all of `texts` are on the screen; return it."""

        def shown() -> str:
            screen = self.screen()
            return screen if all(text in screen for text in texts) else ""

        found: str = until(shown, lambda: f"for {texts}; the screen:\n{self.screen()}")
        return found

    def sees_no(self, text: str) -> None:
        """Wait until `text` is not on the screen any more."""
        until(lambda: text not in self.screen(), lambda: f"for {text!r} to go; the screen:\n{self.screen()}")

    def press(self, *keys: str) -> None:
        """Press keys, by tmux's names."""
        for key in keys:
            self._tmux("send-keys", key)
            time.sleep(0.05)  # two keys in one read could be taken for an escape sequence

    def type(self, text: str) -> None:
        """Type a text."""
        self._tmux("send-keys", "-l", text)

    @property
    def pid(self) -> int:
        return int(self._tmux("display-message", "-p", "#{pane_pid}"))

    def murder(self) -> None:
        """kill -9."""
        pid = self.pid
        os.kill(pid, signal.SIGKILL)
        until(lambda: not self.screen(), lambda: "for the process to end")
        self.close()

    def close(self) -> None:
        """Close the window: the program gets SIGHUP, and ends."""
        pid = self._tmux("display-message", "-p", "#{pane_pid}").strip()
        self._tmux("kill-server")
        if pid:
            until(lambda: not psutil.pid_exists(int(pid)), lambda: f"for process {pid} to end with its terminal")
