"""A text area for untrusted text, which can mark words.

Control characters never reach the terminal: the document holds stand-ins (see `standin`), the screen shows signs,
and `raw` is the text as the file has it. Text that comes in, by any way, has `\\n` as its line ends.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, islice
from typing import Any

from rich.style import Style
from rich.text import Text
from textual.document._document_navigator import DocumentNavigator
from textual.strip import Strip
from textual.widgets import TextArea
from textual.widgets.text_area import Edit, EditResult

from localdpo_tui.standin import StandIns, picture
from localdpo_tui.terminal_input import Typed
from localdpo_tui.widgets.wrapping import Wrapping

__all__ = ["SafeTextArea"]

_OPTIONS = {"soft_wrap": True, "show_line_numbers": False, "tab_behavior": "focus", "max_checkpoints": 1000}
LONG_LINE = 1000
"""Characters of a line whose rows are drawn one by one."""
BRACKET_REACH = 2000
"""Characters that are searched for the other one of a pair of brackets."""


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
        return self._stretch(line_index, 0, len(self.document[line_index]))

    def _stretch(self, line_index: int, start: int, end: int) -> Text:
        text = Text(picture(self.document[line_index][start:end]), end="", no_wrap=True)
        for first, last in self._marks.get(line_index, ()):
            _stylize(text, self.MARK, first - start, last - start)
        return text

    # -- a key costs the same in a long text as in a short one

    def _rewrap_and_refresh_virtual_size(self) -> None:
        if not isinstance(self.wrapped_document, Wrapping):  # the document is a new one
            self.wrapped_document = Wrapping(self.document, tab_width=self.indent_width)
            self.navigator = DocumentNavigator(self.wrapped_document)
        super()._rewrap_and_refresh_virtual_size()

    def _yield_character_locations(self, start: tuple[int, int]) -> Iterable[tuple[str, tuple[int, int]]]:
        return islice(super()._yield_character_locations(start), BRACKET_REACH)

    def _yield_character_locations_reverse(self, start: tuple[int, int]) -> Iterable[tuple[str, tuple[int, int]]]:
        return islice(super()._yield_character_locations_reverse(start), BRACKET_REACH)

    def _render_line(self, y: int) -> Strip:
        wrapped = self.wrapped_document
        row = y + self.scroll_offset.y
        line_index, section = wrapped._offset_to_line_info[row] if row < wrapped.height else (0, 0)
        line = self.document[line_index]
        plain = self.soft_wrap and not (self.show_line_numbers or self.suggestion)
        if row >= wrapped.height or len(line) < LONG_LINE or "\t" in line or not plain:
            return super()._render_line(y)
        assert isinstance(wrapped, Wrapping)
        return self._render_section(line_index, *wrapped.section(line_index, section))

    def _render_section(self, line_index: int, start: int, end: int) -> Strip:
        """Draw one row of a line as Textual draws it, who takes the whole line apart for each row."""
        theme = self._theme
        text = self._stretch(line_index, start, end)
        if end == len(self.document[line_index]):
            text.append(" ")  # the cursor may stand behind the end
        cursor_row, cursor_column = self.selection.end
        line_style = theme.base_style
        if cursor_row == line_index and self.highlight_cursor_line:
            line_style = theme.cursor_line_style
            if self._has_cursor and line_style:
                text.stylize(line_style)
        top, bottom = sorted(self.selection)
        if top != bottom and top[0] <= line_index <= bottom[0] and theme.selection_style:
            first = top[1] if line_index == top[0] else 0
            last = bottom[1] if line_index == bottom[0] else len(self.document[line_index])
            _stylize(text, theme.selection_style, first - start, last - start)
        for column, style in self._spots(line_index, cursor_row, cursor_column):
            _stylize(text, style, column - start, column - start + 1)
        strip = Strip(text.render(self.app.console), cell_length=text.cell_len)
        width = self.scrollable_content_region.size.width
        return strip.extend_cell_length(width, line_style).apply_style(theme.base_style or self.rich_style)

    def _spots(self, line_index: int, cursor_row: int, cursor_column: int) -> Iterable[tuple[int, Style]]:
        theme, bracket = self._theme, self._matching_bracket_location
        matched = self._has_cursor and self.match_cursor_bracket and bracket and self.selection.is_empty
        if cursor_row == line_index:
            if matched and theme.bracket_matching_style:
                yield cursor_column, theme.bracket_matching_style
            if self._draw_cursor and theme.cursor_style:
                yield cursor_column, theme.cursor_style
        if matched and bracket and bracket[0] == line_index and theme.bracket_matching_style:
            yield bracket[1], theme.bracket_matching_style


def _stylize(text: Text, style: Style, start: int, end: int) -> None:
    if end > 0:
        text.stylize(style, max(0, start), end)
