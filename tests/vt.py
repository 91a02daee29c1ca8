"""A terminal that notes what programs do to it, and commands run in one: for tests of what comes out.

`Screen` reads the bytes as xterm does (ECMA-48 and DEC private sequences, C1 controls in UTF-8 too) and keeps what an
attack would change: title, clipboard, links, modes, colours, questions that make a terminal type. It draws nothing;
`text` is what was printed, in order.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import fcntl
import logging
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SECONDS = 120.0  # a deadline that only a broken program meets, on a machine that is busy
_STRINGS = {"P": "device control", "X": "start of string", "^": "privacy message", "_": "application command"}
_C1 = {0x90: "P", 0x98: "X", 0x9B: "[", 0x9D: "]", 0x9E: "^", 0x9F: "_"}
_STEERING = re.compile("[\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2064\u2066-\u206f\ufeff\U000e0000-\U000e007f]")
_MOVES = frozenset("ABCDGKm")  # within the lines being drawn: no clearing, no scrolling, no going elsewhere
_SEQUENCE = re.compile(
    r"\x1b(?:\[(?P<csi>[0-?]*[ -/]*[@-~])"
    r"|\](?P<osc>[^\x07\x1b]*)(?:\x07|\x1b\\)"
    r"|(?P<string>[PX^_][^\x1b]*)\x1b\\"
    r"|(?P<escape>[ -/]*[0-~]))"
)


@dataclass
class Screen:
    """What has been done to a terminal. `effects` counts every steering sequence by a name and its parameters."""

    effects: dict[str, int] = field(default_factory=dict)
    modes: set[str] = field(default_factory=set)
    coloured: bool = False
    text: str = ""

    @classmethod
    def of(cls, data: bytes) -> Screen:
        """Read what a program wrote."""
        screen = cls()
        text = codecs.decode(data, "utf-8", "replace")
        text = "".join(f"\x1b{_C1[ord(char)]}" if ord(char) in _C1 else char for char in text).replace("\x9c", "\x1b\\")
        position = 0
        for match in _SEQUENCE.finditer(text):
            screen._print(text[position : match.start()])
            screen._obey(match)
            position = match.end()
        screen._print(text[position:])
        return screen

    @property
    def attacks(self) -> list[str]:
        """What was done that lines of text with colours and a cursor have no need of."""
        return (
            [f"{name} ({count})" for name, count in self.effects.items()]
            + (["colours stay on"] if self.coloured else [])
            + [f"mode {mode} stays on" for mode in sorted(self.modes)]
        )

    def _note(self, what: str) -> None:
        self.effects[what] = self.effects.get(what, 0) + 1

    def _print(self, text: str) -> None:
        for char in text:
            if char not in "\n\r\t" and (ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0):
                self._note(f"control {ord(char):#04x}")
        for found in _STEERING.findall(text):
            self._note(f"invisible U+{ord(found):04X}")
        self.text += text

    def _obey(self, match: re.Match[str]) -> None:
        if (csi := match["csi"]) is not None:
            self._csi(csi[:-1], csi[-1])
        elif (osc := match["osc"]) is not None:
            self._note(f"OSC {osc.split(';')[0]}")
        elif (string := match["string"]) is not None:
            self._note(_STRINGS[string[0]])
        else:
            self._note(f"ESC {match['escape']}")

    def _csi(self, parameters: str, final: str) -> None:
        if final in "hl":
            for number in parameters.lstrip("?").split(";"):
                self._mode(("?" if parameters.startswith("?") else "") + number, final == "h")
        elif final == "m" and not parameters.startswith((">", "?")):
            self.coloured = parameters not in ("", "0")
        elif final not in _MOVES or parameters.startswith((">", "?", "<", "=")):
            self._note(f"CSI {parameters}{final}")

    def _mode(self, mode: str, on: bool) -> None:
        if mode == "?25":  # the cursor: hidden while something is drawn
            self.modes ^= {"cursor hidden"} if on == ("cursor hidden" in self.modes) else set()
            return
        self._note(f"mode {mode} {'on' if on else 'off'}")
        (self.modes.add if on else self.modes.discard)(mode)


def _open(size: tuple[int, int]) -> tuple[int, int]:
    end, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    return end, child


# Ctrl-C and a hang-up reach a program only from the terminal that controls its session.
_OWN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""


class Terminal:
    """A program in a pseudo-terminal of a size; `read` what it wrote so far, `type` to it, `wait` for its end."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        *,
        size: tuple[int, int] = (24, 80),
        stdout: int | None = None,
        **environment: str,
    ) -> None:
        self._end, child = _open(size)
        clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
        path = f"{ROOT}{os.pathsep}{ROOT / 'tui'}{os.pathsep}{ROOT / 'tests'}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", _OWN_TERMINAL, *command],
            cwd=folder,
            env={**clean, "PYTHONPATH": path, "TERM": "xterm-256color", "LANG": "C.UTF-8", **environment},
            stdin=child,
            stdout=child if stdout is None else stdout,
            stderr=child,
            start_new_session=True,
        )
        os.close(child)
        self.output = b""
        self._open = True

    def read(self, seconds: float = 0.1) -> bytes:
        """Take in what comes within `seconds`; returns all there is."""
        if self._open and select.select([self._end], [], [], seconds)[0]:
            try:
                data = os.read(self._end, 65536)
            except OSError as error:
                if error.errno != errno.EIO:  # Linux's word for a terminal nobody has open any more
                    raise
                data = b""
            self._open = bool(data)
            self.output += data
        elif not self._open:
            time.sleep(0.02)  # all is read; what is waited for now is the end
        return self.output

    def until(self, condition: Callable[[], object] | str, what: str = "") -> None:
        """Wait until a condition holds, or a text was written."""
        end = time.monotonic() + SECONDS

        def holds() -> object:
            return condition.encode() in self.output if isinstance(condition, str) else condition()

        while not holds():
            over = not self._open and self.process.poll() is not None
            if (over and not holds()) or time.monotonic() > end:
                raise AssertionError(f"waited in vain for {what or condition}: {self.output[-3000:]!r}")
            self.read()

    def type(self, text: str) -> None:
        """Type a text."""
        os.write(self._end, text.encode())

    @property
    def descriptor(self) -> int:
        """The terminal's end."""
        return self._end

    def send(self, data: bytes) -> None:
        """Send bytes as they are, as fast as they are taken; what comes meanwhile is read."""
        while data:
            readable, writable, _ = select.select([self._end], [self._end], [], SECONDS)
            assert readable or writable, "the program neither reads nor writes"
            if readable:
                self.read()
            if writable:
                data = data[os.write(self._end, data[:1000]) :]

    def wait(self) -> int:
        """Wait for the end of the program; returns its exit code, negative for a signal."""
        self.until(lambda: self.process.poll() is not None, "the end")
        self.read()
        return int(self.process.returncode)

    def settings(self) -> list[Any]:
        """The line discipline: echo, what Ctrl-C does, and so on."""
        return termios.tcgetattr(self._end)

    def hang_up(self) -> None:
        """Close the terminal as a window is closed."""
        os.close(self._end)
        self._open = False

    def close(self) -> None:
        """End the program if it runs, and the terminal."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)
        self.process.wait()
        if self._open or self._end >= 0:
            with contextlib.suppress(OSError):
                os.close(self._end)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Ran:
    """A command that was run: its words, exit code, and what the terminal got."""

    words: tuple[str, ...]
    code: int
    output: bytes

    @property
    def screen(self) -> Screen:
        """What it did to the terminal."""
        return Screen.of(self.output)


def localdpo_in_terminal(
    folder: Path,
    commands: Iterable[Sequence[str]],
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int] = (24, 100),
    term: str = "xterm-256color",
) -> list[Ran]:
    """Run commands in this process, each with a terminal of its own as its standard streams."""
    from localdpo.cli import main

    monkeypatch.chdir(folder)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", str(size[1]))  # for who asks about the terminal of the process, not of a stream
    monkeypatch.setenv("LINES", str(size[0]))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    before = logging.getLogRecordFactory()
    try:
        return [_run(main, tuple(words), monkeypatch, size) for words in commands]
    finally:
        logging.setLogRecordFactory(before)


def _run(
    main: Callable[[], None], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> Ran:
    end, child = _open(size)
    output: list[bytes] = []
    reader = threading.Thread(target=_drain, args=(end, output), daemon=True)
    reader.start()
    with monkeypatch.context() as patched, open(child, "r+b", buffering=0) as terminal:
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            patched.setattr(sys, name, open(os.dup(terminal.fileno()), mode, encoding="utf-8"))  # noqa: SIM115
        patched.setattr(sys, "argv", ["localdpo", *words])
        try:
            main()
            code = 0
        except SystemExit as left:
            code = int(left.code or 0)
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            stream.close()
    reader.join(SECONDS)
    os.close(end)
    return Ran(words, code, b"".join(output))


def _drain(end: int, into: list[bytes]) -> None:
    # Until everyone has closed the other end: an end of file on macOS, an error on Linux.
    with contextlib.suppress(OSError):
        while data := os.read(end, 65536):
            into.append(data)


def environment_of(home: Path, **more: str) -> Mapping[str, str]:
    """Variables that give a process folders of its own under `home`."""
    return {"HOME": str(home), "LOCALDPO_CACHE": str(home / "cache"), "LOCALDPO_CONFIG": str(home / "config"), **more}
