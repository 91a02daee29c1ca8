"""Text wrapped to a width, whose cost for an edit does not grow with the line it is made in.

Textual wraps the whole line again for each key, and takes it apart into rows to find one. Here a line is wrapped from
shortly before the edit to where the rows are those from before. It knows nothing about widgets.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from rich.cells import cell_len
from textual._wrap import compute_wrap_offsets
from textual.document._document import Location
from textual.document._wrapped_document import WrappedDocument
from textual.geometry import Offset

__all__ = ["Wrapping"]


class Wrapping(WrappedDocument):
    """A view of a document as rows. Lines with tabs are left to Textual."""

    @property
    def height(self) -> int:
        """How many rows there are."""
        return len(self._offset_to_line_info)

    def section(self, line_index: int, section: int) -> tuple[int, int]:
        """Return where a row of a line begins and ends, in characters."""
        offsets = self._wrap_offsets[line_index]
        start = offsets[section - 1] if section else 0
        return start, offsets[section] if section < len(offsets) else len(self.document[line_index])

    def get_sections(self, line_index: int) -> list[str]:
        """Return the rows of a line."""
        line, offsets = self.document[line_index], self._wrap_offsets[line_index]
        return [line[start:end] for start, end in zip((0, *offsets), (*offsets, len(line)), strict=True)]

    def location_to_offset(self, location: Location) -> Offset:
        """Return where a location is among the rows: cells from the left, rows from the top."""
        line_index, column = location
        if self._tabs(line_index):
            return super().location_to_offset(location)
        section = bisect_right(self._wrap_offsets[line_index], column)
        start, _ = self.section(line_index, section)
        x = cell_len(self.document[line_index][start:column])
        return Offset(x, self._line_index_to_offsets[line_index][section])

    def _tabs(self, line_index: int) -> bool:
        return any(self._tab_width_cache[line_index]) or "\t" in self.document[line_index]

    def wrap_range(self, start: Location, old_end: Location, new_end: Location) -> None:
        """Wrap what an edit from `start` to `old_end` has changed, which goes to `new_end` now."""
        (row, column), (old_row, old_column), (new_row, new_column) = start, old_end, new_end
        lines = len(self._wrap_offsets)
        if not self._width or not row == old_row == new_row or row >= lines or self._tabs(row):
            super().wrap_range(start, old_end, new_end)
            return
        old = self._wrap_offsets[row]
        new = self._wrapped(self.document[row], old, min(column, old_column), new_column, new_column - old_column)
        self._wrap_offsets[row] = new
        self._tab_width_cache[row] = [0] if self.document[row] else []
        if grown := len(new) - len(old):
            tops = self._line_index_to_offsets
            top = tops[row][0]
            self._offset_to_line_info[top : top + len(old) + 1] = [(row, section) for section in range(len(new) + 1)]
            tops[row] = list(range(top, top + len(new) + 1))
            for below in range(row + 1, lines):
                tops[below] = [offset + grown for offset in tops[below]]

    def _wrapped(self, line: str, old: list[int], start: int, end: int, shift: int) -> list[int]:
        """Return where rows of a line begin; `old` is where they did before `start` to `end` was put into it."""
        # What comes after a break depends on nothing before it. A break depends on the word that follows it, which may
        # go on to the edit: from two rows above on, that word would be too long for a row whatever the edit does.
        kept = max(0, bisect_right(old, max(0, start - 1)) - 2)
        begin = old[kept - 1] if kept else 0
        length = end - begin + 4 * self._width
        while True:
            # Breaks in a piece are those of the whole line, as far as they go.
            piece = line[begin : begin + length]
            found = [begin + offset for offset in compute_wrap_offsets(piece, self._width, self._tab_width)]
            for number, offset in enumerate(found):
                same = bisect_left(old, offset - shift)
                if offset > end and same < len(old) and old[same] == offset - shift:
                    return old[:kept] + found[:number] + [before + shift for before in old[same:]]
            if begin + length >= len(line):
                return old[:kept] + found
            length *= 2
