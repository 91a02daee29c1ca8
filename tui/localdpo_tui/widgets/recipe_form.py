"""Every key of a recipe in a list: its value, whether the file gives it, and whether something is wrong with it.

The list draws lines (Textual's Line API), so that it costs the same for five keys and for fifty, and knows no
files: it is told what to show and posts what the user wants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from localdpo_tui.actions import Action, bindings, register
from localdpo_tui.shown import fit, one_line

if TYPE_CHECKING:
    from localdpo.recipe_edit import Setting

__all__ = ["FormRow", "RecipeForm", "matching"]

SECTIONS = {"": "Run", "data": "Data", "lora": "Adapter (lora)", "dpo": "Loss (dpo)", "train": "Training (train)"}
_NAME_CELLS, _VALUE_CELLS = 29, 13


@dataclass(frozen=True, slots=True)
class FormRow:
    """A key as the form shows it: its value as text, whether the file gives it, how many problems it has."""

    setting: Setting
    value: str
    given: bool = False
    problems: int = 0

    @property
    def sign(self) -> str:
        """What stands before the name: a problem, a value of the file's own, or a default."""
        return "!" if self.problems else "•" if self.given else " "


def matching(rows: Sequence[FormRow], search: str) -> list[FormRow]:
    """The rows with every word of ``search`` in their key, help or value."""
    words = search.lower().split()
    return [
        row
        for row in rows
        if all(word in f"{row.setting.key} {row.setting.help} {row.value}".lower() for word in words)
    ]


class RecipeForm(ScrollView, can_focus=True):
    """The list. Set `rows`; it posts `Highlighted`, `EditAsked`, `Chosen` and `ResetAsked`."""

    HELP = """Every key of the recipe. Enter changes the highlighted one, ← → go through the choices of one that has
    choices, Delete goes back to its default, / searches keys and their help.

    • marks a value that the file gives, ! one that is wrong; all others are defaults. What is right is written to the
    file at once, with your comments where they were; Ctrl+Z takes a change back."""
    ACTIONS: ClassVar[tuple[Action, ...]] = register(
        "form",
        Action("form.edit", "enter", "Change", "Change the value of this key."),
        Action("form.next", "right", "Choice", "The next choice of this key."),
        Action("form.previous", "left", "Choice before", "The choice before.", footer=False),
        Action("form.reset", "delete,backspace", "Default", "Go back to the default."),
        Action("form.up", "up,k", "Up", "The key above.", footer=False),
        Action("form.down", "down,j", "Down", "The key below.", footer=False),
        Action("form.page_up", "pageup", "Page up", "A page up.", footer=False),
        Action("form.page_down", "pagedown", "Page down", "A page down.", footer=False),
        Action("form.first", "home", "First", "The first key.", footer=False),
        Action("form.last", "end", "Last", "The last key.", footer=False),
    )
    BINDINGS = bindings(ACTIONS)
    COMPONENT_CLASSES = {  # noqa: RUF012 - Textual declares the type
        "form--section",
        "form--given",
        "form--default",
        "form--problem",
        "form--cursor",
    }
    ALLOW_SELECT = False
    DEFAULT_CSS = """
    RecipeForm { height: 1fr; scrollbar-size-vertical: 1; scrollbar-size-horizontal: 0; }
    RecipeForm > .form--section { color: $text-accent; text-style: bold; }
    RecipeForm > .form--given { color: $foreground; text-style: bold; }
    RecipeForm > .form--default { color: $text-muted; }
    RecipeForm > .form--problem { color: $text-error; text-style: bold; }
    RecipeForm > .form--cursor { background: $boost; }
    RecipeForm:focus > .form--cursor { text-style: reverse; }
    """

    class _About(Message):
        """Something about one key."""

        def __init__(self, setting: Setting) -> None:
            super().__init__()
            self.setting = setting

    class Highlighted(_About):
        """The cursor is on another key."""

    class EditAsked(_About):
        """The user wants to type a value."""

    class ResetAsked(_About):
        """The user wants the default."""

    class Chosen(_About):
        """The user took one of the choices."""

        def __init__(self, setting: Setting, value: str) -> None:
            super().__init__(setting)
            self.value = value

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._rows: list[FormRow] = []
        self._lines: list[FormRow | str] = []
        self._cursor = 0

    @property
    def current(self) -> FormRow | None:
        """The highlighted row."""
        line = self._lines[self._cursor] if self._cursor < len(self._lines) else None
        return line if isinstance(line, FormRow) else None

    def show(self, rows: Sequence[FormRow]) -> None:
        """Show these rows under their sections, the cursor staying on its key."""
        before = self.current
        self._rows = list(rows)
        self._lines = []
        section: str | None = None
        for row in rows:
            if row.setting.section != section:
                section = row.setting.section
                self._lines.append(SECTIONS.get(section, section))
            self._lines.append(row)
        self.virtual_size = Size(0, len(self._lines))
        keys = [line.setting.key if isinstance(line, FormRow) else "" for line in self._lines]
        wanted = before.setting.key if before is not None else ""
        self._cursor = keys.index(wanted) if wanted and wanted in keys else min(1, max(0, len(keys) - 1))
        self.refresh()
        self._told()

    def go_to(self, key: str) -> None:
        """Put the cursor on a key, if it is shown."""
        for number, line in enumerate(self._lines):
            if isinstance(line, FormRow) and line.setting.key == key:
                self._move_to(number, 1)

    def _told(self) -> None:
        row = self.current
        if row is not None:
            self.post_message(self.Highlighted(row.setting))

    def render_line(self, y: int) -> Strip:
        """Return one line."""
        number = y + self.scroll_offset.y
        width = self.size.width
        if number >= len(self._lines):
            return Strip.blank(width, self.rich_style)
        line = self._lines[number]
        if isinstance(line, str):
            return Strip([Segment(fit(line, width), self._style("section"))], width)
        name = fit(f"{line.sign} {line.setting.name}", min(_NAME_CELLS, max(8, width - _VALUE_CELLS)))
        text = fit(f"{name} {one_line(line.value)}", width)
        role = "problem" if line.problems else "given" if line.given else "default"
        style = self._style(role)
        if number == self._cursor:
            style += self._style("cursor")
        return Strip([Segment(text, style)], width)

    def _style(self, role: str) -> Style:
        partial: Style = self.get_component_rich_style(f"form--{role}", partial=True)
        return self.rich_style + partial

    def _move_to(self, number: int, direction: int) -> None:
        """Put the cursor on the nearest key from ``number`` on, in ``direction``."""
        last = len(self._lines) - 1
        number = min(max(number, 0), last)
        while 0 <= number <= last and not isinstance(self._lines[number], FormRow):
            number += direction
        if not 0 <= number <= last or number == self._cursor:
            return
        self._cursor = number
        self.scroll_to_region(Region(0, max(0, number - 1), 1, 3), animate=False)
        self.refresh()
        self._told()

    def action_up(self) -> None:
        """Go up."""
        self._move_to(self._cursor - 1, -1)

    def action_down(self) -> None:
        """Go down."""
        self._move_to(self._cursor + 1, 1)

    def action_page_up(self) -> None:
        """Go a page up."""
        number = self._cursor - max(1, self.size.height - 1)
        self._move_to(number, -1 if number > 0 else 1)

    def action_page_down(self) -> None:
        """Go a page down."""
        self._move_to(self._cursor + max(1, self.size.height - 1), -1)

    def action_first(self) -> None:
        """Go to the first key."""
        self._move_to(0, 1)

    def action_last(self) -> None:
        """Go to the last key."""
        self._move_to(len(self._lines) - 1, -1)

    def action_edit(self) -> None:
        """Ask for the value, or take the next choice where there is nothing to type."""
        row = self.current
        if row is not None and row.setting.closed:
            self._choose(1)
        elif row is not None:
            self.post_message(self.EditAsked(row.setting))

    def action_next(self) -> None:
        """Take the next choice."""
        self._choose(1)

    def action_previous(self) -> None:
        """Take the choice before."""
        self._choose(-1)

    def _choose(self, distance: int) -> None:
        row = self.current
        if row is None or not row.setting.choices:
            return
        choices = row.setting.choices
        at = choices.index(row.value) if row.value in choices else -1 if distance > 0 else 0
        self.post_message(self.Chosen(row.setting, choices[(at + distance) % len(choices)]))

    def action_reset(self) -> None:
        """Ask for the default."""
        row = self.current
        if row is not None and row.given:
            self.post_message(self.ResetAsked(row.setting))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Hide the keys for choices where there are none."""
        row = self.current
        if action in ("next", "previous"):
            return row is not None and bool(row.setting.choices)
        if action == "reset":
            return row is not None and row.given and not row.setting.required
        return True

    def on_click(self, event: events.Click) -> None:
        """Go to the key, and change it with a second click."""
        number = event.y + self.scroll_offset.y
        if event.chain > 1:
            self.action_edit()
        elif number < len(self._lines):
            self._move_to(number, 1)
