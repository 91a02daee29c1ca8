"""What the Pairs place does beyond editing: other files, import, export, repairs, and the user's own editor."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textual import on

from localdpo.errors import InputError, LocalDPOError, Problem
from localdpo_tui.places.pair_counts import PairCounts
from localdpo_tui.screens.external import edit_text
from localdpo_tui.services.pair_rows import new_file_name
from localdpo_tui.shown import one_line
from localdpo_tui.widgets.pair_editor import PairEditor
from localdpo_tui.widgets.pair_list import PairList
from localdpo_tui.widgets.welcome import Welcome

if TYPE_CHECKING:
    from localdpo.data.fields import Message
    from localdpo.data.store import PairStore

__all__ = ["PairTools"]

_NEW = "A new file …"
_ADD_LIMIT = 2000
"""More pairs than this are imported into a file of their own: adding them one by one would take long."""


class PairTools(PairCounts):
    """Actions of the Pairs place."""

    # -- beginning, and other files

    @on(Welcome.Chosen)
    def _begin_with(self, event: Welcome.Chosen) -> None:
        match event.choice:
            case "example":
                self.spawn(self._example, group="file", exclusive=True)
            case "blank":
                self.spawn(self._blank, group="file", exclusive=True)
            case "import":
                self.action_import()

    async def _example(self) -> None:
        try:
            await asyncio.to_thread(self.workspace.create_example)
        except (LocalDPOError, OSError) as error:
            self.app.notify_problem(error)
            return
        if await self.open_file(self.app.folder / "pairs" / "athene.jsonl"):
            self.app.tell("This is the Athene example. F3 trains with it as it is; F1 explains this place.")

    async def _blank(self) -> None:
        try:
            pairs, recipe = await asyncio.to_thread(self.workspace.create_blank)
        except (LocalDPOError, OSError) as error:
            self.app.notify_problem(error)
            return
        if await self.open_file(pairs):
            names = self.workspace.relative(pairs), self.workspace.relative(recipe)
            self.app.tell(f"Made {names[0]}, and {names[1]} to train with it.")

    def action_open(self) -> None:
        """Choose a file of the workspace, or name one."""
        # Not in the group that opens files: a key that comes early must not leave the first file half opened.
        self.spawn(self._choose_file, group="choose", exclusive=True)

    async def _choose_file(self) -> None:
        from localdpo_tui.screens.file_dialog import FileDialog

        files = await asyncio.to_thread(self.workspace.pair_files)
        dialog = FileDialog("Open a file of pairs", self.app.folder / "pairs", files, create=True)
        path = await self.app.push_screen_wait(dialog)
        if path is not None:
            with suppress(InputError):
                path = new_file_name(self.app.folder, str(path))
            await self.open_file(path, create=True)

    def action_import(self) -> None:
        """Bring in the pairs of a file of another tool."""
        self.spawn(self._import, group="import", exclusive=True)

    async def _import(self) -> None:
        from localdpo.data.importing import ImportOptions, inspect_file
        from localdpo_tui.screens.file_dialog import FileDialog

        source = await self.app.push_screen_wait(FileDialog("Import pairs from a file", Path.cwd(), (), what="Import"))
        if source is None or not self.commit():
            return
        try:
            found = await asyncio.to_thread(inspect_file, source)
        except (LocalDPOError, OSError) as error:
            self.app.notify_problem(error)
            return
        target = _free_name(self.app.folder / "pairs" / f"{source.stem}.jsonl")
        choices = {"new": f"Into {target.name}"}
        if self.store is not None:
            choices["add"] = f"Add to {one_line(self.store.path.name)}"
        answer = await self.app.ask("Import", f"{found.sentence()}.\n\nThe file itself stays as it is.", choices)
        if answer is None:
            return
        try:
            if answer == "add" and self.store is not None:
                lines = await asyncio.to_thread(_add_pairs, self.store, source, ImportOptions())
                self.refresh_list()
            else:
                lines = await asyncio.to_thread(_import_into, source, target, ImportOptions())
                await self.open_file(target)
        except (LocalDPOError, OSError) as error:
            self.app.notify_problem(error)
            return
        self.app.notify_problem("\n".join(lines[:8]), "information")

    def action_export(self) -> None:
        """Write the pairs to a file for other tools."""
        self.spawn(self._export, group="import", exclusive=True)

    async def _export(self) -> None:
        from localdpo_tui.screens.file_dialog import FileDialog

        store = self.store
        if store is None or not self.commit():
            return
        default = store.path.with_name(f"{store.path.stem}-export.csv")
        target = await self.app.push_screen_wait(
            FileDialog("Export to .jsonl or .csv", default.parent, (), what="Export", value=str(default))
        )
        if target is None:
            return
        force = False
        if target.exists():
            answer = await self.app.ask(
                f"{one_line(target.name)} is there already",
                "Replace it?",
                {"keep": "Keep it", "replace": "Replace"},
                "replace",
            )
            if answer != "replace":
                return
            force = True
        try:
            lines = await asyncio.to_thread(_export_to, store, target, force)
        except (LocalDPOError, OSError) as error:
            self.app.notify_problem(error)
            return
        self.app.notify_problem("\n".join(lines[:8]), "information")

    def open_linked(self, file: str | Path | None = None, key: int | None = None, query: str = "") -> None:
        """Do what a link asks for."""
        self.spawn(self._open_linked, file, key, query, group="link", exclusive=True)

    async def _open_linked(self, file: str | Path | None, key: int | None, query: str) -> None:
        if file is not None:
            path = Path(file)
            path = path if path.is_absolute() else self.app.folder / path
            if self.store is None or self.store.path != path.resolve():
                await self.open_file(path)
        from textual.widgets import Input

        self.query_one("#search", Input).value = query
        if key is not None and not self.query_one(PairList).go_to(key):
            self.refresh_list(key)

    # -- a row by other means

    def action_repair(self) -> None:
        """Close the row that was cut off."""
        store, key = self.store, self.query_one(PairList).current
        if store is None or key is None:
            return
        whole = store.repair(key)
        if whole is None:
            self.app.notify_problem(
                "This row cannot be repaired by itself. Edit as JSON in the palette opens its line, or delete it.",
                "warning",
            )
            return
        store.update_raw(key, whole)
        self.reload_row()
        self.app.tell("Repaired: what was cut off is missing still. Ctrl+Z takes it back.")

    def reload_row(self) -> None:
        """Have list and editor read the row again."""
        self.forget_row()
        self.refresh_list()

    def action_raw(self) -> None:
        """Edit the row's own line in the user's editor."""
        store, key = self.store, self.query_one(PairList).current
        if store is None or key is None or not self.commit():
            return
        before = store.raw(key)
        text = edit_text(self.app, before.decode("utf-8", "surrogateescape"), ".json")
        if text is None or text == before.decode("utf-8", "surrogateescape"):
            return
        try:
            store.update_raw(key, text.strip("\n").encode("utf-8", "surrogateescape"))
        except LocalDPOError as error:
            self.app.notify_problem(error)
        self.reload_row()

    @on(PairEditor.ExternalEditor)
    def _outside(self, event: PairEditor.ExternalEditor) -> None:
        text = edit_text(self.app, event.box.raw)
        if text is not None and text != event.box.raw:
            event.box.put_raw(text)

    # -- answers by the model

    def action_generate(self) -> None:
        """Let the model answer the prompts of the marked pairs."""
        from localdpo_tui.screens.candidates import CandidatesScreen

        prompts = self.chosen_prompts()
        if prompts and self.store is not None:
            self.app.push_screen(CandidatesScreen(self.store.path, prompts))

    def action_rank(self) -> None:
        """Judge generated answers two by two."""
        if self.store is not None and self.commit():
            self.spawn(self._rank, self.store.path, group="rank", exclusive=True)

    async def _rank(self, path: Path) -> None:
        from localdpo_tui.screens.candidates import open_ranking

        await open_ranking(self.app, path)
        self.look_for_changes()

    def chosen_prompts(self) -> list[tuple[Message, ...]]:
        """Return the prompts of the marked pairs that can be answered; says so when there is none."""
        store = self.store
        if store is None or not self.commit():
            return []
        rows = [store.row(key) for key in self.query_one(PairList).chosen]
        prompts = [row.messages for row in rows if row.prompt and row.prompt[-1]["content"].strip()]
        if not prompts:
            self.app.notify_problem("There is no prompt to answer. Write one first: n makes a new pair.", "warning")
        return prompts


def _free_name(path: Path) -> Path:
    number = 2
    free = path
    while free.exists():
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1
    return free


def _import_into(source: Path, target: Path, options: Any) -> list[str]:
    from localdpo.data.importing import import_pairs

    target.parent.mkdir(parents=True, exist_ok=True)
    return import_pairs(source, target, options).sentences()


def _add_pairs(store: PairStore, source: Path, options: Any) -> list[str]:
    from itertools import islice

    from localdpo.data.importing import ImportReport, inspect_file, iter_pairs
    from localdpo.data.rows import PairDraft

    report = ImportReport(inspect_file(source, options))
    pairs = list(islice(iter_pairs(source, options, report), _ADD_LIMIT + 1))
    if len(pairs) > _ADD_LIMIT:
        fix = "Import it into a new file"
        raise InputError(Problem(str(source), f"has more than {_ADD_LIMIT:,} pairs to add to an open file", fix))
    for pair in pairs:
        extra = {**pair.extra, **({"tools": list(pair.tools)} if pair.tools else {})}
        store.insert(PairDraft(pair.prompt, pair.chosen, pair.rejected, pair.tags, pair.weight, extra, pair.id))
    report.written = len(pairs)
    return report.sentences()


def _export_to(store: PairStore, target: Path, force: bool) -> list[str]:
    """Export what the list holds now, unsaved changes too."""
    from localdpo.data.exporters import ExportOptions, export_pairs, target_of

    with tempfile.TemporaryDirectory(prefix="localdpo-") as folder:
        now = store.save_as(Path(folder) / store.path.name)
        return export_pairs(now, target, ExportOptions(target_of(target)), force=force).sentences()
