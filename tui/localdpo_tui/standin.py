"""Control characters in texts that are edited: each is replaced by a stand-in of one character, and back.

An editor moves a cursor over characters, so making them visible may not change their number, and what is saved
must be byte for byte what was read. The stand-ins are private-use characters; when a text has such characters of
its own, another block of them is used. Knows nothing about widgets.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

from localdpo.text import UNSAFE_RANGES, line_ends, sanitise

__all__ = ["StandIns", "picture", "signs"]

# Lone surrogates are not among them: no file of pairs holds one.
_CODES = tuple(code for first, last in UNSAFE_RANGES if first != 0xD800 for code in range(first, last + 1))
_BLOCK = 0x100
_BLOCKS = tuple(range(0x10FE00, 0x10F000, -_BLOCK))
_HIGHEST = chr(_BLOCKS[0] + _BLOCK - 1)
_LOWEST = chr(_BLOCKS[-1])


def _visible(code: int) -> str:
    shown = sanitise(chr(code))
    return shown if len(shown) == 1 else "�"


@cache
def _signs() -> dict[int, str]:
    return {code: _visible(code) for code in _CODES}


def signs(text: str) -> str:
    """Return `text` with a visible sign for each control character, for good: there is no way back."""
    return text.translate(_signs())


@cache
def _pictures() -> dict[int, str]:
    return {block + i: sign for block in _BLOCKS for i, sign in enumerate(_signs().values())}


def picture(text: str) -> str:
    """Return `text` with its stand-ins as visible signs, as many characters as before."""
    # Most texts have none: one comparison, not a table look-up for each character.
    return text.translate(_pictures()) if max(text, default="") >= _LOWEST else text


def _block_for(text: str) -> int:
    if max(text, default="") < _LOWEST:
        return _BLOCKS[0]
    used = {(ord(char) - ord(_LOWEST)) // _BLOCK for char in text if _LOWEST <= char <= _HIGHEST}
    return next((block for block in _BLOCKS if (block - ord(_LOWEST)) // _BLOCK not in used), _BLOCKS[0])


@dataclass(slots=True)
class StandIns:
    """The stand-ins used for one text; `start` chooses them anew for a new text."""

    _to: dict[int, int] = field(default_factory=dict)
    _back: dict[int, int] = field(default_factory=dict)

    def start(self, text: str) -> str:
        """Return a new text with stand-ins for what must not reach a terminal."""
        block = _block_for(text)
        self._to = {code: block + i for i, code in enumerate(_CODES)}
        self._back = {stand_in: code for code, stand_in in self._to.items()}
        if "\r" in text and text.count("\r") == text.count("\n") == text.count("\r\n"):
            del self._to[0x0D]  # the text's line ends are CRLF throughout: the editor keeps those itself
        return text.translate(self._to)

    def put(self, text: str) -> str:
        """Return text to be added (typed, pasted) with stand-ins; its line ends become the text's own."""
        return line_ends(text).translate(self._to)

    def keep(self, text: str) -> str:
        """Return text that is another field's as it stands, carriage returns and all, with stand-ins."""
        return text.replace("\r\n", "\n").translate(self._to) if 0x0D not in self._to else text.translate(self._to)

    def raw(self, text: str) -> str:
        """Return the text as a file holds it."""
        return text.translate(self._back)
