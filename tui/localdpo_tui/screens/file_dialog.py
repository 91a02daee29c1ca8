"""Name a file: a line to type its path in, and what there is to choose from below it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from localdpo_tui.actions import Action, bindings, register
from localdpo_tui.screens.modal import ReadingModal
from localdpo_tui.shown import inert, one_line
from localdpo_tui.widgets.safe_input import SafeInput

__all__ = ["FileDialog"]

_SHOWN = 200


class FileDialog(ReadingModal[Path | None]):
    """Dismissed with a path, or None. Relative paths are in `folder`.

    Where `files` are given they are the choice; otherwise the folder's own files are, and folders can be entered.
    With `create` a file that is not there may be named.
    """

    CSS_PATH = "file_dialog.tcss"
    HELP = "Type a path, or go down to the list with the arrow key. Enter takes it; a folder is opened."
    ACTIONS: ClassVar[tuple[Action, ...]] = register(
        "file",
        Action("file.cancel", "escape", "Cancel", "Close without choosing."),
        Action("file.down", "down", "To the list", "Go to the list of files.", footer=False),
    )
    BINDINGS = bindings(ACTIONS)

    def __init__(
        self,
        title: str,
        folder: Path,
        files: Sequence[Path],
        *,
        create: bool = False,
        what: str = "Open",
        value: str = "",
    ) -> None:
        super().__init__()
        self._title, self._folder, self._files = title, folder, list(files)
        self._new = create or what == "Export"
        self._value = value
        self._entries: list[Path] = []

    def compose(self) -> ComposeResult:
        """A line and a list."""
        with Vertical(classes="box") as box:
            box.border_title = Content(one_line(self._title))
            box.border_subtitle = "Enter takes it, Esc cancels"
            hint = "name of a new file, or a path" if self._files else "path; ~ is your home folder"
            yield SafeInput(self._value, placeholder=hint, compact=True)
            yield OptionList(compact=True)
            yield Static(id="problem", markup=False)

    def on_mount(self) -> None:
        """List what there is."""
        self.query_one(Input).focus()
        self._list()

    def _list(self) -> None:
        run: Any = partial(self._fill, self.query_one(Input).value)
        self.run_worker(run, exclusive=True)

    async def _fill(self, typed: str) -> None:
        path = self._path(typed)
        entries = [file for file in self._files if typed.lower() in file.name.lower()]
        if not self._files:
            entries = await asyncio.to_thread(
                _entries, path if typed.endswith("/") or not typed else path.parent, path.name
            )
        self._entries = entries[:_SHOWN]
        choices = self.query_one(OptionList)
        choices.clear_options()
        choices.add_options([Option(inert(_label(entry, self._folder))) for entry in self._entries])
        choices.display = bool(entries)

    def _path(self, typed: str) -> Path:
        path = Path(os.path.expanduser(typed.strip() or "."))
        return path if path.is_absolute() else self._folder / path

    @on(Input.Changed)
    def _typed(self) -> None:
        self.query_one("#problem", Static).update("")
        self._list()

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        if not event.value.strip():
            if self._entries:
                self._take(self._entries[0])
            return
        self._take(self._path(event.value))

    @on(OptionList.OptionSelected)
    def _selected(self, event: OptionList.OptionSelected) -> None:
        self._take(self._entries[event.option_index])

    def _take(self, path: Path) -> None:
        if path.is_dir():
            line = self.query_one(Input)
            line.value = f"{path}/"
            line.focus()
            line.action_end()
        elif not self._new and not path.exists():
            self.query_one("#problem", Static).update(inert(f"{path} is not there. Check the path."))
        else:
            self.dismiss(path)

    def action_cancel(self) -> None:
        """Choose nothing."""
        self.dismiss(None)

    def action_down(self) -> None:
        """Go to the list."""
        self.query_one(OptionList).focus()


def _entries(folder: Path, start: str) -> list[Path]:
    try:
        found = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
        wanted = [entry for entry in found if entry.name.lower().startswith(start.lower())] if start else found
        return sorted(wanted, key=lambda entry: (not entry.is_dir(), entry.name.lower()))
    except OSError:
        return []


def _label(entry: Path, folder: Path) -> str:
    name = str(entry.relative_to(folder)) if entry.is_relative_to(folder) else str(entry)
    return f"{name}/" if entry.is_dir() else name
