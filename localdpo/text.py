"""Make untrusted text inert before it is shown.

Model output and data files may hold terminal escapes and bidirectional overrides. Everything that reaches a
terminal, a log or an error message goes through `sanitise`. This module changes what is *shown* only: what is
saved or encoded stays byte for byte as it was. It knows nothing about terminals or markup.
"""

from __future__ import annotations

import re

__all__ = ["StreamSanitiser", "sanitise"]

# C0 without \n and \t, DEL and C1, the bidirectional controls, the two Unicode line separators (rows would
# split where the file has none), and lone surrogates (stdout cannot encode them).
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


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
