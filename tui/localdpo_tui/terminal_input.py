"""Bytes from a terminal read as Textual's events: untrusted, as a terminal may send anything.

`TerminalInput` splits the bytes into texts, pastes and escape sequences, and asks Textual's parser about one whole
sequence at a time. What is no UTF-8 becomes U+FFFD; a sequence that is broken or unknown is passed over and never
typed into a text. Printable keys that arrive together become one `Typed`. It knows nothing about widgets.
"""

from __future__ import annotations

import re
from codecs import getincrementaldecoder
from collections.abc import Iterable
from itertools import groupby
from time import monotonic

from textual._ansi_sequences import ANSI_SEQUENCES_KEYS
from textual._xterm_parser import XTermParser
from textual.events import InputEvent, Key, Paste
from textual.message import Message

__all__ = ["TerminalInput", "Typed"]

ESCAPE_SECONDS = 0.1
"""How long the rest of a sequence may take: an escape byte alone is the Esc key after that."""
PASTE_SECONDS = 2.0
"""How long a paste may stand still: the end of one that was cut off never comes."""
_LONGEST = 32  # characters of a sequence that Textual's parser still takes for one
_PASTE_END = b"\x1b[201~"

# A minus is no parameter by the grammar, and yet some terminals report the mouse at -1.
_CSI = rb"\x1b\[(?![M\[])[-0-?]*[ -/]*[@-~]"
# Keys of the Linux console and rxvt that do not keep to the grammar of sequences.
_ODD = sorted(
    (
        code
        for code in (sequence.encode() for sequence in ANSI_SEQUENCES_KEYS if sequence.startswith("\x1b["))
        if len(code) > 2 and not re.fullmatch(_CSI, code) and code != b"\x1b[M"
    ),
    key=len,
    reverse=True,
)
_TOKEN = re.compile(
    rb"(?P<text>[^\x1b]+)"
    rb"|(?P<paste>\x1b\[200~)"
    rb"|(?P<x10>\x1b\[M[ -\xff]{3})"  # three bytes that need not be UTF-8; the app asks for SGR reports instead
    rb"|(?P<odd>" + b"|".join(map(re.escape, _ODD)) + rb")"
    rb"|(?P<csi>" + _CSI + rb")"
    rb"|(?P<string>\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\))"
    rb"|(?P<alone>\x1b(?=\x1b))"
    rb"|(?P<escape>\x1bO[0-9;]*[ @-~]|\x1b(?:[\x00-\x1a\x1c-NQ-WYZ\\`-\x7f]|[\xc2-\xf4][\x80-\xbf]{1,3}))"
)
_BEGUN = rb"\x1b(?:\[M[ -\xff]{0,2}|\[\[|\[[-0-?]*[ -/]*|O[0-9;]*|[\xc2-\xf4][\x80-\xbf]*)?"
_UNFINISHED = re.compile(rb"(?:" + _BEGUN + rb"|\x1b[\]PX^_][^\x07\x1b]*\x1b?)\Z")
_BROKEN = re.compile(_BEGUN)


class Typed(InputEvent, bubble=False):
    """Printable keys that arrived together, in order."""

    def __init__(self, keys: Iterable[Key]) -> None:
        super().__init__()
        self.keys = tuple(keys)

    @property
    def text(self) -> str:
        """What was typed."""
        return "".join(key.character or "" for key in self.keys)


class TerminalInput:
    """Reads what a terminal sends: `feed` it bytes as they come, `tick` while none come."""

    def __init__(self) -> None:
        self._decode = getincrementaldecoder("utf-8")("replace").decode
        self._parser = XTermParser()
        self._held = b""
        self._paste: list[bytes] | None = None
        self._since = 0.0

    def feed(self, data: bytes) -> list[Message]:
        """Return the events that `data` completes."""
        self._since = monotonic()
        data, self._held = self._held + data, b""
        return _joined(self._read(data))

    def tick(self) -> list[Message]:
        """Return the events of what was begun and has not gone on for too long."""
        waited = monotonic() - self._since
        if self._paste is not None:
            return self.give_up() if waited > PASTE_SECONDS else []
        return self.give_up() if self._held and waited > ESCAPE_SECONDS else []

    def give_up(self) -> list[Message]:
        """Return the events of what was begun; its rest does not come."""
        held, self._held = self._held, b""
        if self._paste is not None:
            return list(self._end_paste(held))
        # Esc and Alt+[ are keys; the beginning of anything longer is a sequence that was cut off.
        return self._asked(held.decode("utf-8", "replace"), cut=True) if len(held) <= 2 else []

    def _read(self, data: bytes) -> Iterable[Message]:
        at = 0
        while at < len(data):
            if self._paste is not None:
                end = data.find(_PASTE_END, at)
                if end < 0:
                    self._hold_paste(data[at:])
                    return
                yield from self._end_paste(data[at:end])
                at = end + len(_PASTE_END)
            elif match := _TOKEN.match(data, at):
                at = match.end()
                yield from self._token(str(match.lastgroup), match.group())
            elif _UNFINISHED.match(data, at) and len(data) - at < 1024:
                self._held = data[at:]
                return
            else:
                broken = _BROKEN.match(data, at)
                assert broken is not None  # only an escape byte begins what is no token
                at = broken.end()

    def _token(self, kind: str, token: bytes) -> Iterable[Message]:
        match kind:
            case "text":
                yield from self._asked(self._decode(token))
            case "paste":
                self._paste = []
            case "csi":
                sequence = _as_textual_reads(token.decode())
                yield from self._asked(sequence, drop=True)
            case "odd":
                yield from self._asked(token.decode(), drop=True)
            case "alone" | "escape":
                yield from self._asked(token.decode("utf-8", "replace"), cut=True)

    def _hold_paste(self, data: bytes) -> None:
        assert self._paste is not None
        # The last bytes may be the beginning of the paste's end.
        kept = next(n for n in range(len(_PASTE_END) - 1, -1, -1) if data.endswith(_PASTE_END[:n]))
        self._held = data[len(data) - kept :]
        self._paste.append(data[: len(data) - kept])

    def _end_paste(self, last: bytes) -> Iterable[Message]:
        pasted, self._paste = b"".join([*(self._paste or ()), last]), None
        yield Paste(pasted.decode("utf-8", "replace").replace("\x00", ""))

    def _asked(self, text: str, *, cut: bool = False, drop: bool = False) -> list[Message]:
        """Return what Textual's parser makes of `text`.

        It waits for more when it knows no such sequence: `cut` has it take the characters as keys, `drop` forget them.
        """
        if not text:
            return []
        parser = self._parser
        try:
            found = list(parser.feed(text))
            if parser._awaiting.timeout is None:
                return found
            if cut:
                parser._timeout_time = 0.0
                return found + list(parser.tick())
        except Exception:  # a sequence that Textual's parser cannot read must not end all input
            found, drop = [], True
        if drop:
            self._parser = XTermParser()
        return found


def _as_textual_reads(sequence: str) -> str:
    """Return a whole control sequence in the form that Textual reads; empty when it is nothing to be told.

    Numbers that are no character are refused. Alternate keys and the kind of event of the kitty protocol, which were
    not asked for, are left out, and so is a key that is let go. Sizes come from the system.
    """
    numbers = re.findall(r"\d+", sequence)
    if len(sequence) > _LONGEST or sequence[-1] == "t" or not all(map(_is_character, numbers)):
        return ""
    fields = sequence[2:-1].split(";")
    if len(fields) > 1 and fields[1].partition(":")[2] == "3":
        return ""
    fields[:2] = [field.partition(":")[0] for field in fields[:2]]
    return f"\x1b[{';'.join(fields)}{sequence[-1]}"


def _is_character(number: str) -> bool:
    return len(number) <= 7 and int(number) <= 0x10FFFF and not 0xD800 <= int(number) <= 0xDFFF


def _joined(events: Iterable[Message]) -> list[Message]:
    """Return the events, printable keys that follow each other as one."""
    joined: list[Message] = []
    for printable, group in groupby(events, lambda event: isinstance(event, Key) and _types(event)):
        found = list(group)
        keys = [event for event in found if isinstance(event, Key)]
        joined += [Typed(keys)] if printable and len(found) > 1 else found
    return joined


def _types(key: Key) -> bool:
    # Alt+a is a key of its own, though it has a character.
    return key.is_printable and not key.key.startswith(("alt+", "ctrl+"))
