"""A text area for untrusted text, which can mark words.

Control characters never reach the terminal: the document holds stand-ins (see `standin`), the screen shows signs,
and `raw` is the text as the file has it. Text that comes in, by any way, has `\\n` as its line ends.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from rich.style import Style
from rich.text import Text
from textual.widgets import TextArea
from textual.widgets.text_area import Edit, EditResult

from localdpo_tui.standin import StandIns, picture
from localdpo_tui.terminal_input import Typed

__all__ = ["SafeTextArea"]

_OPTIONS = {"soft_wrap": True, "show_line_numbers": False, "tab_behavior": "focus", "max_checkpoints": 1000}


class SafeTextArea(TextArea):
    """Edits a text that may hold anything. Give it and take it with `raw`.

    Tab moves on, as these areas stand in forms.
    """

    # Bold and underlined: what differs is seen without colour.
    MARK = Style(bold=True, underline=True)

    def __init__(self, raw: str = "", **options: Any) -> None:
        self._stand_ins = StandIns()
        self._marks: dict[int, list[tuple[int, int]]] = {}
        options = {**_OPTIONS, **options}
        super().__init__(self._stand_ins.start(raw), **options)

    @property
    def raw(self) -> str:
        """The text as the file holds it."""
        return self._stand_ins.raw(self.text)

    @raw.setter
    def raw(self, text: str) -> None:
        self.load_text(text)

    def put_raw(self, text: str) -> None:
        """Replace the whole text, as another field of a file has it, in a way that undo takes back."""
        self.replace(self._stand_ins.keep(text), (0, 0), self.document.end, maintain_selection_offset=False)

    @property
    def selected_text(self) -> str:
        """What is selected, as the file holds it."""
        return self._stand_ins.raw(super().selected_text)

    def load_text(self, text: str) -> None:
        """Show another text; its history of changes starts afresh."""
        self._marks = {}
        super().load_text(self._stand_ins.start(text))

    def edit(self, edit: Edit) -> EditResult:
        """Apply an edit, what it adds made inert."""
        edit.text = self._stand_ins.put(edit.text)
        return super().edit(edit)

    def _on_typed(self, event: Typed) -> None:
        if not self.read_only:
            self._restart_blink()
            self._replace_via_keyboard(event.text, *self.selection)

    def _refresh_size(self) -> None:
        # Textual's undo and redo shorten the text before they move the cursor, and a scroll bar that goes with the
        # last lines asks where the cursor is: it must never be behind the end.
        self.set_reactive(TextArea.selection, self._validate_selection(self.selection))
        super()._refresh_size()

    def mark(self, spans: Sequence[tuple[int, int]]) -> None:
        """Mark the stretches `[start, end)` of the text, in characters; they vanish with the next `mark`."""
        lines = self.document.lines
        newline = len(self.document.newline)
        starts = list(accumulate((len(line) + newline for line in lines[:-1]), initial=0))
        marks: dict[int, list[tuple[int, int]]] = {}
        for start, end in spans:
            line = bisect_right(starts, start) - 1
            while line < len(lines) and starts[line] < end:
                first, last = max(0, start - starts[line]), min(len(lines[line]), end - starts[line])
                if first < last:
                    marks.setdefault(line, []).append((first, last))
                line += 1
        if marks != self._marks:
            self._marks = marks
            self.notify_style_update()
            self.refresh()

    def get_line(self, line_index: int) -> Text:
        """Return a line as it is shown."""
        text = Text(picture(self.document.get_line(line_index)), end="", no_wrap=True)
        for start, end in self._marks.get(line_index, ()):
            text.stylize(self.MARK, start, end)
        return text
