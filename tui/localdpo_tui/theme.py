"""localdpo's own two themes; Textual's are offered beside them."""

from __future__ import annotations

from textual.theme import Theme

__all__ = ["DEFAULT_THEME", "THEMES"]

DEFAULT_THEME = "localdpo-dark"

THEMES = (
    Theme(
        name="localdpo-dark",
        primary="#7aa2c8",
        secondary="#8fae9b",
        accent="#e0b45c",
        warning="#e0b45c",
        error="#e06c75",
        success="#8fbf7f",
        foreground="#d9dde3",
        background="#14171c",
        surface="#1b1f26",
        panel="#232831",
    ),
    Theme(
        name="localdpo-light",
        primary="#2f5f8f",
        secondary="#4b7a60",
        accent="#9a5b00",
        warning="#9a5b00",
        error="#b3261e",
        success="#2e6b2e",
        foreground="#1d2229",
        background="#fafaf7",
        surface="#f0f0ea",
        panel="#e4e4dc",
        dark=False,
    ),
)
