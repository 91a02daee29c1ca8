"""The line on top of every place: the four places, the folder, and what the trainer is doing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from textual.content import Content
from textual.style import Style
from textual.widget import Widget

from localdpo_tui.shown import fit, one_line

if TYPE_CHECKING:
    from localdpo_tui.app import LocalDPOApp

PLACES = (("pairs", "Pairs", "F2"), ("train", "Train", "F3"), ("chat", "Chat", "F4"), ("runs", "Runs", "F5"))


class TabLine(Widget):
    """One line; a click on a name goes there. The place shown is reversed and bold, so colour is not needed."""

    COMPONENT_CLASSES = {"tabline--tab", "tabline--here", "tabline--key", "tabline--status"}  # noqa: RUF012
    ALLOW_SELECT = False

    if TYPE_CHECKING:
        app: LocalDPOApp

    def __init__(self, here: str) -> None:
        super().__init__()
        self.here = here
        self.auto_links = False  # a tab is no hyperlink: no underline, no colours of its own

    def on_mount(self) -> None:
        """Follow the app's status."""
        self.watch(self.app, "status", self._changed, init=False)

    def _changed(self, _status: Any) -> None:
        self.refresh()

    def render(self) -> Content:
        """Return the line, the status cut to what is left of it."""
        tab, here, key = (self.get_visual_style(f"tabline--{name}", partial=True) for name in ("tab", "here", "key"))
        parts: list[Content] = []
        for name, title, hint in PLACES:
            click = Style.from_meta({"@click": f"app.go({name!r})"})
            parts.append(Content.styled(f" {title} ", (here if name == self.here else tab) + click))
            parts.append(Content.styled(f"{hint} ", key + click))
        line = Content("").join(parts)
        room = self.size.width - line.cell_length - 1
        status = one_line(self.app.status or self.app.folder_title)
        if room < 8:
            return line
        padding = " " * max(0, room - cell_len(status))
        shown = Content.styled(
            fit(status, min(room, cell_len(status))), self.get_visual_style("tabline--status", partial=True)
        )
        return Content("").join([line, Content(padding), shown, Content(" ")])
