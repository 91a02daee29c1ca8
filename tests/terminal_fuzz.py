"""The terminal UI in a pseudo-terminal, sent what terminals really send, for as long as one likes.

    python tests/terminal_fuzz.py --minutes 60 --seed 7
    python tests/terminal_fuzz.py --events 20000

A session edits a new pair by typing and pasting, with reports, broken sequences and resizes between the pieces, then
goes through the whole UI by keys and mouse. It fails when the UI ends by itself, shows a fault, or no longer hears a
key; when the text is not what was typed and pasted; when undo does not lead back to the start or redo to the end;
when a row that nobody touched has changed. What is sent follows from the seed and the session's number alone.
"""

from __future__ import annotations

# ruff: noqa: E402
import argparse
import fcntl
import json
import os
import random
import signal
import struct
import sys
import tempfile
import termios
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tui")]

from vt import Screen, Terminal, environment_of

from localdpo.data.jsonl import ProblemLog
from localdpo.data.pairs import scan_pairs
from tui import write_pairs

TUI = (sys.executable, "-m", "localdpo", "tui", ".")
SIZE = (36, 120)
TEXT = "abc é漢🙂 {}[]\"'\\ <b> = ; ~"
Piece = tuple[list[bytes], str]
"""What is written, in separate writes, and what it adds to a text."""


class Fault(AssertionError):
    """What went wrong, with what was sent before it."""


class Session:
    """One run of the UI; ``events`` counts what was sent."""

    def __init__(self, folder: Path, seed: int, number: int) -> None:
        self.folder, self.file = folder, folder / "pairs.jsonl"
        self.dice = random.Random(f"{seed} {number}")
        self.name = f"seed {seed}, session {number}"
        self.events = 0
        self.sent: list[bytes] = []
        write_pairs(self.file)
        self.before = self.file.read_bytes().splitlines()
        environment = environment_of(folder / "home", TEXTUAL_ANIMATIONS="none", EDITOR="true", VISUAL="true")
        self.terminal = Terminal(TUI, folder, size=SIZE, **environment)

    def run(self) -> None:
        """Everything; raises Fault."""
        try:
            with self.terminal:
                self.until(lambda: b"largest planet" in self.terminal.output, "the first screen")
                self.edit()
                self.wander(self.dice.randrange(20, 90))
                self.end()
        except AssertionError as error:
            last = b" ".join(self.sent[-40:])
            raise Fault(f"{self.name}, event {self.events}: {str(error)[-3000:]}\nlast sent: {last!r}") from None

    def send(self, *writes: bytes) -> None:
        for data in writes:
            self.events += 1
            self.sent.append(data)
            self.terminal.send(data)

    def until(self, condition: Callable[[], object], what: str) -> None:
        self.terminal.until(condition, what)

    def resize(self, rows: int, columns: int) -> None:
        self.events += 1
        self.sent.append(b"<%dx%d>" % (rows, columns))
        fcntl.ioctl(self.terminal.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    # -- a text

    def edit(self) -> None:
        """Write a new pair's prompt in pieces; undo all of it, redo all of it, save it."""
        # The list's footer says how many pairs there are once the whole file is indexed.
        self.until(lambda: b"3 pairs" in self.terminal.output, "the list")
        self.resize(*SIZE)
        since = len(self.terminal.output)
        self.send(b"\x0e")
        self.until(lambda: b"Turn+" in self.terminal.output[since:], "the new pair's fields")
        wanted = ""
        for _ in range(self.dice.randrange(2, 12)):
            writes, added = self.piece()
            self.send(*writes)
            wanted += added
            if self.dice.random() < 0.5:
                noise = self.dice.choice((self.report, self.broken))
                self.send(*noise())
            if self.dice.random() < 0.2:
                self.resize(self.dice.choice((1, 4, 24, 36, 100)), self.dice.choice((1, 12, 80, 120, 300)))
            if self.dice.random() < 0.3:
                self.send(b"\x1a", b"\x19")
        self.resize(*SIZE)
        self.saves(wanted, "as typed and pasted")
        self.send(b"\x1a" * 60)
        self.saves("", "after undo")
        self.send(b"\x19" * 60)
        self.saves(wanted, "after redo")
        self.rows()

    def saves(self, wanted: str, when: str) -> None:
        """Save, and wait until the new row says ``wanted``."""
        self.send(b"\x13")
        try:
            self.until(lambda: self.saved() == wanted, when)
        except AssertionError:
            rows = self.file.read_text("utf-8").splitlines()
            raise AssertionError(f"{when} the text is not {wanted!r}, the rows are {rows!r}") from None

    def saved(self) -> str | None:
        lines = self.file.read_bytes().splitlines()
        return str(json.loads(lines[1])["prompt"]) if len(lines) > len(self.before) else None

    def piece(self) -> Piece:
        """Text that is typed or pasted, as terminals send it."""
        text = "".join(self.dice.choices(TEXT, k=self.dice.randrange(1, 40)))
        match self.dice.randrange(7):
            case 0:  # typed key by key
                return [char.encode() for char in text[:12]], text[:12]
            case 1:  # a paste without brackets: CR is the Enter key
                return [f"{text}\r{text}".encode()], f"{text}\n{text}"
            case 2:
                return self.paste("\r"), self.pasted
            case 3:
                return self.paste("\r\n"), self.pasted
            case 4:  # a character in two writes
                return [b"\xe6\xbc", b"\xa2"], "漢"
            case 5:  # no UTF-8
                return [b"x\xffy"], "x\ufffdy"
            case _:  # kitty's form of a letter, and its release
                return [b"\x1b[97u\x1b[97;1:3u"], "a"

    def paste(self, end: str) -> list[bytes]:
        lines = ["".join(self.dice.choices(TEXT, k=self.dice.randrange(30))) for _ in range(self.dice.randrange(1, 30))]
        self.pasted = "\n".join(lines)
        data = b"\x1b[200~" + end.join(lines).encode() + b"\x1b[201~"
        cut = self.dice.randrange(len(data))
        return [data[:cut], data[cut:]] if cut else [data]

    def report(self) -> list[bytes]:
        """What a terminal says by itself: the mouse moves, the window has the focus, an answer nobody waits for."""
        x, y = self.dice.randrange(1, 250), self.dice.randrange(1, 120)
        x10 = bytes((32 + 35, min(255, 32 + x), min(255, 32 + y)))
        said = (
            b"\x1b[<35;%d;%dM" % (x, y), b"\x1b[M" + x10, b"\x1b[I", b"\x1b[O", b"\x1b[?62;4c", b"\x1b[>0;276;0c",
            b"\x1b[%d;%dR" % (y, x), b"\x1b]11;rgb:0000/0000/0000\x07", b"\x1bP>|term 1.0\x1b\\", b"\x1b[?2026;2$y",
            b"\x1b[8;24;80t", b"\x1b[?1;0y",
        )  # fmt: skip
        data = self.dice.choice(said)
        cut = self.dice.randrange(1, len(data))
        return [data] if self.dice.random() < 0.5 else [data[:cut] + data[cut:]]

    def broken(self) -> list[bytes]:
        """What no terminal should send, and some do."""
        return [
            self.dice.choice(
                (
                    b"\x1b[<35;1",
                    b"\x1b[M \x8e%",
                    b"\x1b[99999999999;1u",
                    b"\x1b[1;2;3;4;5;6;7z",
                    b"\x1b[55296u",
                    b"\x1b[<0;-3;-5m",
                    b"\x1b[97:65;2:3u",
                    b"\x1b[?",
                    b"\x1b[1;9999999M",
                )
            )
            + b"\x1b[I"  # and something after it, that ends it
        ]

    # -- everything else

    def wander(self, count: int) -> None:
        """Keys, clicks, pastes, resizes and reports in all places; after each ten a key must have its effect."""
        keys = [
            b"\x1bOQ", b"\x1bOR", b"\x1bOS", b"\x1b[15~", b"\x1b[17~", b"\x1b[17;2~", b"\x1bOP", b"\t", b"\x1b[Z",
            b"\x1b[A", b"\x1b[B", b"\x1b[C", b"\x1b[D", b"\x1b[5~", b"\x1b[6~", b"\x1b[H", b"\x1b[F", b"\x1bOA",
            b"\x1b[1;5C", b"\x1b[27;5;9~", b"\x1b[13;2u", b"\x1bOM", b"\x0f", b"\x10", b"\x1b\x1b",
        ]  # fmt: skip
        for number in range(1, count + 1):
            match self.dice.randrange(10):
                case 0 | 1 | 2 | 3:
                    self.send(self.dice.choice(keys))
                case 4:
                    x, y = self.dice.randrange(1, 125), self.dice.randrange(1, 40)
                    wheel = self.dice.choice((64, 65, 35, 32))
                    self.send(b"\x1b[<%d;%d;%dM" % (wheel, x, y))
                case 5:
                    self.send(*self.report())
                case 6:
                    self.send(*self.broken())
                case 7:
                    self.send(*self.paste("\r"))
                case 8:
                    self.resize(self.dice.randrange(1, 110), self.dice.randrange(1, 310))
                case _:
                    self.send(bytes(self.dice.choices(range(0x80, 0x100), k=self.dice.randrange(1, 6))))
            if number % 10 == 0:
                self.hears()
        self.hears()

    def hears(self) -> None:
        """Close what is open, and see that a key still has its effect."""
        self.resize(*SIZE)
        for key, place in ((b"\x1b[15~", b"Runs"), (b"\x1bOQ", b"Pairs")):
            since = len(self.terminal.output)
            self.send(b"\x1b\x1b\x1b\x1b" + key)
            try:
                self.until(lambda since=since: len(self.terminal.output) > since + 400, "")
            except AssertionError:
                drawn = self.terminal.output[since:]
                screen = Screen.of(self.terminal.output[-60_000:]).text
                raise AssertionError(f"{place.decode()} was not drawn; {drawn!r} was, over\n{screen}") from None

    def end(self) -> None:
        number = self.dice.choice((signal.SIGTERM, signal.SIGHUP))
        self.terminal.process.send_signal(number)
        code = self.terminal.wait()
        assert code == 128 + number, f"ended with {code}: {self.terminal.output[-1500:]!r}"
        assert b"Traceback" not in self.terminal.output
        assert b"internal error" not in self.terminal.output
        self.rows()

    def rows(self) -> None:
        """The file is sound, and what nobody touched stands as it stood."""
        lines = self.file.read_bytes().splitlines()
        untouched = [line for line in lines if line in self.before]
        assert untouched == self.before, f"rows that were not touched have changed: {lines!r}"
        log = ProblemLog()
        assert len(list(scan_pairs(self.file, log))) + log.total == len([line for line in lines if line.strip()])


def fuzz(seed: int, events: int = sys.maxsize, seconds: float = float("inf"), first: int = 0) -> tuple[int, int]:
    """Sessions until so many events were sent or seconds have passed; returns both counts. Raises Fault."""
    began, done, number = time.monotonic(), 0, first
    while done < events and time.monotonic() - began < seconds:
        with tempfile.TemporaryDirectory() as folder:
            session = Session(Path(folder), seed, number)
            session.run()
        done, number = done + session.events, number + 1
    return done, number - first


def main() -> None:
    """Fuzz from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "big"))
    parser.add_argument("--events", type=int, default=sys.maxsize)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--session", type=int, default=0, help="the first session's number: what a fault names")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    done, sessions = fuzz(options.seed, options.events, 60 * options.minutes, options.session)
    print(f"{done:,} events in {sessions:,} sessions without a finding")


if __name__ == "__main__":
    main()
