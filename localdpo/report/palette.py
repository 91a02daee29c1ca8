"""The colours of a page and of its charts, light and dark, and the style sheets made of them.

Every text colour has a contrast of 4.5 to 1 or more on each ground it stands on, every line of a chart 3 to 1
(WCAG 2.2, 1.4.3 and 1.4.11); tests compute it. The layout is in page.css, which names colours only by these variables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files

__all__ = ["DARK", "LIGHT", "LINES", "chart_css", "page_css"]

LIGHT: Mapping[str, str] = {
    "ground": "#f6f7f9",
    "card": "#ffffff",
    "sunk": "#f0f2f5",
    "text": "#1b2330",
    "muted": "#566072",
    "rule": "#d9dee6",
    "grid": "#e6e9ee",
    "accent": "#1f5fbf",
    "good": "#1b6e3c",
    "good-ground": "#e3f4e9",
    "fair": "#80540a",
    "fair-ground": "#fbf0d9",
    "bad": "#a82a2a",
    "bad-ground": "#fbe7e6",
    "ins": "#0f5730",
    "ins-ground": "#d3f0de",
    "del": "#8f1f1f",
    "del-ground": "#fadcda",
    "line0": "#1f6fd1",
    "line1": "#c2540a",
    "line2": "#12805c",
    "line3": "#8a44c2",
}
DARK: Mapping[str, str] = {
    "ground": "#12161d",
    "card": "#1a2029",
    "sunk": "#222a35",
    "text": "#e4e8ee",
    "muted": "#a3aebd",
    "rule": "#36404e",
    "grid": "#2a333f",
    "accent": "#7fb2ff",
    "good": "#7ed3a0",
    "good-ground": "#17352a",
    "fair": "#e9bd6a",
    "fair-ground": "#3a2f17",
    "bad": "#f59a94",
    "bad-ground": "#40201f",
    "ins": "#9be5b8",
    "ins-ground": "#173d2a",
    "del": "#f7b3ae",
    "del-ground": "#4a2423",
    "line0": "#6aa8ff",
    "line1": "#f29a55",
    "line2": "#4fc79c",
    "line3": "#c596f2",
}
LINES = 4
_DASHES = ("none", "6 3", "1.5 3", "8 3 1.5 3")


def _block(colours: Mapping[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())


def page_css() -> str:
    """The style sheet of a page: the system's theme unless one is chosen in the page, always light on paper."""
    layout = files("localdpo.report").joinpath("templates", "page.css").read_text("utf-8")
    light, dark = _block(LIGHT), _block(DARK)
    return "\n".join(
        (
            f":root{{color-scheme:light;{light}}}",
            f"@media (prefers-color-scheme:dark){{:root{{color-scheme:dark;{dark}}}}}",
            f":root:has(#theme-light:checked){{color-scheme:light;{light}}}",
            f":root:has(#theme-dark:checked){{color-scheme:dark;{dark}}}",
            f"@media print{{:root,:root:has(#theme-dark:checked){{color-scheme:light;{light}}}}}",
            layout,
            chart_css(lambda name: f"var(--{name})"),
        )
    )


def chart_css(colour: Callable[[str], str]) -> str:
    """The style of charts, with each colour as `colour(name)` writes it: a variable in a page, itself in a file."""
    rules = [
        f".chart text{{fill:{colour('muted')};font:11px system-ui,-apple-system,'Segoe UI',sans-serif}}",
        f".chart .key{{fill:{colour('text')}}}",
        f".chart .grid{{stroke:{colour('grid')};stroke-width:1}}",
        f".chart .axis{{stroke:{colour('rule')};stroke-width:1}}",
        f".chart .reference{{stroke:{colour('muted')};stroke-width:1;stroke-dasharray:2 3}}",
        ".chart .end{text-anchor:end}.chart .middle{text-anchor:middle}",
        ".chart .line{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}",
        ".chart .raw{fill:none;stroke-width:1;opacity:.35}.chart .band{opacity:.16;stroke:none}",
        ".chart .hit{fill:transparent;stroke:none}",
    ]
    for n in range(LINES):
        line = colour(f"line{n}")
        rules.append(f".chart .s{n}{{stroke:{line}}}.chart .f{n}{{fill:{line}}}")
        rules.append(f".chart .d{n}{{stroke-dasharray:{_DASHES[n]}}}")
    return "\n".join(rules)
