"""Values as the words of a page: figures with their intervals, counts, times, settings, texts of a bounded length."""

from __future__ import annotations

import json
import time

from localdpo.report.values import Figure, number, tilde
from localdpo.series import number_text

__all__ = [
    "MAX_TEXT",
    "change",
    "count",
    "count_bytes",
    "cut",
    "duration",
    "file_name",
    "percent",
    "plain",
    "sentence",
    "value_text",
    "when",
]

MAX_TEXT = 4_000
"""Characters of one text that a page shows; the rest is counted."""


def cut(text: str, most: int = MAX_TEXT) -> str:
    """A text of at most `most` characters, which says how many more there are."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most:,} more characters)"


def sentence(words: str) -> str:
    """Words with a capital and a full stop, where their author left these to others."""
    return words[:1].upper() + words[1:] + ("" if words.endswith((".", "!", "?", "…")) or not words else ".")


def percent(figure: Figure | None) -> str:
    """A share with its interval: 92% (84% to 97%)."""
    if figure is None:
        return "–"
    if figure.low is None or figure.high is None:
        return f"{figure.value:.0%}"
    return f"{figure.value:.0%} ({figure.low:.0%} to {figure.high:.0%})"


def plain(figure: Figure | None) -> str:
    """A number with its interval."""
    if figure is None:
        return "–"
    if figure.low is None or figure.high is None:
        return number_text(figure.value)
    return f"{number_text(figure.value)} ({number_text(figure.low)} to {number_text(figure.high)})"


def count(value: object, absent: str = "–") -> str:
    """A whole number, `absent` for what is none."""
    found = number(value)
    return absent if found is None else f"{found:,.0f}"


def change(base: Figure | None, tuned: Figure | None) -> str:
    """By how much a figure grew, with its sign; empty where one of the two is unknown."""
    if base is None or tuned is None:
        return ""
    grown = tuned.value - base.value
    return f"{'+' if grown >= 0 else '−'}{number_text(abs(grown))}"


def file_name(path: str) -> str:
    """A file (and its line) without the folders before it."""
    return path.replace("\\", "/").rpartition("/")[2]


def when(seconds: float | None) -> str:
    """A moment in UTC, empty for None or what no calendar has."""
    if seconds is None or not 0 < seconds < 32_503_680_000:
        return ""
    return time.strftime("%-d %B %Y, %H:%M UTC", time.gmtime(seconds))


def duration(seconds: float) -> str:
    """Seconds as 45 s, 2 min 05 s or 3 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return (
        f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    )


def count_bytes(count: float | None) -> str:
    """Bytes in decimal units, empty for None."""
    for unit in ("B", "kB", "MB", "GB"):
        if count is None or count < 999.5:
            return "" if count is None else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def value_text(value: object) -> str:
    """A setting as a recipe writes it; paths without the home they are in."""
    if isinstance(value, str):
        return tilde(value)
    if isinstance(value, float):
        return number_text(value, 4)
    return cut(json.dumps(value, ensure_ascii=False, default=str), 300)
