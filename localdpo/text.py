"""Make untrusted text inert before it is shown.

Model output and data files may hold terminal escapes, bidirectional overrides and characters nobody sees.
Everything that reaches a terminal, a log or an error message goes through `sanitise` (`inert_json` for JSON that
is not pure ASCII). They change what is *shown* only: what is saved or encoded stays byte for byte as it was.
`line_ends` is for texts that come in. This module knows nothing about terminals or markup.
"""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = ["UNSAFE_RANGES", "StreamSanitiser", "inert_json", "line_ends", "sanitise"]

UNSAFE_RANGES: tuple[tuple[int, int], ...] = (
    (0x00, 0x08), (0x0B, 0x1F),  # C0 without \n and \t
    (0x7F, 0x9F),  # DEL and C1
    (0x061C, 0x061C), (0x200E, 0x200F), (0x202A, 0x202E), (0x2066, 0x2069),  # what turns the direction of text
    (0x2028, 0x2029),  # line separators: rows would split where the file has none
    (0x180E, 0x180E), (0x200B, 0x200B), (0x2060, 0x2064), (0x206A, 0x206F), (0xFEFF, 0xFEFF), (0xFFF9, 0xFFFB),
    (0xE0000, 0xE007F),  # takes no room and yet makes other tokens; the joiners of scripts and emoji stay
    (0xD800, 0xDFFF),  # lone surrogates: stdout cannot encode them
)  # fmt: skip
"""Code points that are never shown as they are, first and last of each range."""

_UNSAFE = re.compile("[" + "".join(f"{re.escape(chr(a))}-{re.escape(chr(b))}" for a, b in UNSAFE_RANGES) + "]")


def _picture(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode's control pictures: ESC is ␛
    if code == 0x7F:
        return "␡"
    return f"<U+{code:04X}>"


def sanitise(text: str) -> str:
    """Return `text` with every control character made visible: ESC as `␛`, U+202E as `<U+202E>`.

    Newlines and tabs stay; `\\r\\n` becomes `\\n`, as a line end is no attack, and a lone `\\r` becomes `␍`.
    """
    return _UNSAFE.sub(_picture, text.replace("\r\n", "\n"))


def line_ends(text: str) -> str:
    """Return `text` with `\\n` as its line ends: `\\r\\n` and `\\r` depend on the tool or the terminal it came from."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def inert_json(value: Any, indent: int | None = None) -> str:
    """Return `value` as JSON that is readable in any script and safe to show: what is unsafe is a `\\u` escape."""
    # Outside its strings JSON has no character of the ranges but the line ends that `indent` asks for.
    return _UNSAFE.sub(
        lambda match: json.dumps(match.group())[1:-1], json.dumps(value, indent=indent, ensure_ascii=False)
    )


class StreamSanitiser:
    """`sanitise` for text that arrives in chunks: the joined output equals `sanitise` of the joined input."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, chunk: str) -> str:
        """Return the part of the text so far that is safe to show now."""
        text = self._held + chunk
        # A \r at the end may be half of a line end: it waits for the next chunk.
        self._held = "\r" if text.endswith("\r") else ""
        return sanitise(text[: len(text) - len(self._held)])

    def close(self) -> str:
        """Return what was held back, and start afresh."""
        held, self._held = self._held, ""
        return sanitise(held)
