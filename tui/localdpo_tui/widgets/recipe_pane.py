"""The recipe as a form: the list of keys, what the highlighted one is for, and the field to type its value into.

What is right is written to the file at once, with the user's comments where they were. This pane starts nothing;
it says `Changed` when the recipe is another one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from textual import on, work
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.message import Message
from textual.widgets import Input, Static

from localdpo.errors import InputError, LocalDPOError, Problem
from localdpo_tui.shown import inert, one_line
from localdpo_tui.widgets.recipe_form import FormRow, RecipeForm, matching
from localdpo_tui.widgets.safe_input import SafeInput

if TYPE_CHECKING:
    from localdpo.recipe_edit import RecipeEdit, Setting
    from localdpo_tui.app import LocalDPOApp

__all__ = ["RecipePane"]

NO_RECIPE = (
    "There is no recipe in this folder yet.\n\n"
    "A recipe says which model learns which pairs, and how. `localdpo init` puts the Athene example here, which trains "
    "in a few minutes. Or write recipes/mine.yaml with two lines:\n\n"
    "    model: smollm2-135m\n    data: {train: ../pairs/mine.jsonl}"
)


class RecipePane(Vertical):
    """Open a recipe with `open_recipe`; `edit` is the file being changed, `problems` what is wrong with it, by key."""

    DEFAULT_CSS = """
    RecipePane { padding: 0 1; }
    RecipePane > #about { height: auto; max-height: 9; border-top: solid $surface-lighten-2; }
    RecipePane > #search, RecipePane > #value { height: 1; display: none; }
    RecipePane > #value { background: $boost; }
    RecipePane > #no-recipe { display: none; }
    RecipePane.-empty > RecipeForm, RecipePane.-empty > #about { display: none; }
    RecipePane.-empty > #no-recipe { display: block; }
    """

    class Changed(Message):
        """The recipe is another one, or another of its values is in force."""

    if TYPE_CHECKING:
        app: LocalDPOApp

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id, classes="pane")
        self.edit: RecipeEdit | None = None
        self.problems: dict[str, list[Problem]] = {}
        self._typing: Setting | None = None
        self._file = asyncio.Lock()

    def compose(self) -> ComposeResult:
        """Lay out search, list, help and field from top to bottom."""
        yield SafeInput(placeholder="search keys", id="search", compact=True)
        yield RecipeForm(id="form")
        yield Static(inert(NO_RECIPE), id="no-recipe", classes="empty")
        yield Static(id="about", markup=False)
        yield SafeInput(id="value", compact=True)

    def on_mount(self) -> None:
        """Name the pane."""
        self.border_title = Content("Recipe")

    # -- the file

    def show_empty(self) -> None:
        """Say what a recipe is, where there is none."""
        self.add_class("-empty")

    async def open_recipe(self, path: Path) -> bool:
        """Show a recipe; False when it cannot be read, which is said."""
        from localdpo.recipe_edit import RecipeEdit

        try:
            self.edit = await asyncio.to_thread(RecipeEdit.open, path)
        except LocalDPOError as error:
            self.app.notify_problem(error)
            return False
        self.remove_class("-empty")
        await self.settle()
        return True

    async def settle(self) -> None:
        """Look for problems, write the file when it is sound, and show all that."""
        edit = self.edit
        if edit is None:
            return
        async with self._file:
            try:
                self.problems = await asyncio.to_thread(edit.problems)
                if edit.changed and all(map(_is_missing_file, self.problems.values())):
                    await self._save(edit)
            except LocalDPOError as error:
                self.app.notify_problem(error)
        self._show()
        self.post_message(self.Changed())

    async def _save(self, edit: RecipeEdit) -> None:
        """Write the file; when it was changed elsewhere, make the changes of the form on top of that."""
        if await asyncio.to_thread(edit.changed_elsewhere):
            for problem in await asyncio.to_thread(edit.reload):
                self.app.notify_problem(problem, severity="warning")
            self.problems = await asyncio.to_thread(edit.problems)
            self.app.tell("The file was changed elsewhere; the form holds both changes.")
        await asyncio.to_thread(edit.save)

    async def reload_if_changed(self) -> None:
        """Read the file again when someone else has changed it and nothing waits here to be put right."""
        edit = self.edit
        if edit is not None and not edit.changed and await asyncio.to_thread(edit.changed_elsewhere):
            await self.open_recipe(edit.path)

    @work(group="recipe")
    async def _do(self, change: Callable[[], object]) -> None:
        """Make a change that reads and writes text, off this thread."""
        try:
            async with self._file:
                await asyncio.to_thread(change)
        except LocalDPOError as error:
            self.app.notify_problem(error)
            return
        await self.settle()

    def undo(self) -> None:
        """Take back the latest change."""
        if self.edit is not None:
            self._do(self.edit.undo)

    def go_to_problem(self) -> bool:
        """Put the cursor on the first problem and tell it; False when there is none."""
        if not self.problems:
            return False
        key, found = next(iter(self.problems.items()))
        self.app.notify_problem(InputError(*found))
        form = self.query_one(RecipeForm)
        form.go_to(key)
        form.focus()
        return True

    # -- showing

    def _rows(self) -> list[FormRow]:
        from localdpo.recipe_edit import settings

        edit = self.edit
        if edit is None:
            return []
        return [
            FormRow(setting, edit.shown(setting.key), edit.given(setting.key), len(self.problems.get(setting.key, ())))
            for setting in settings()
        ]

    def _show(self) -> None:
        edit = self.edit
        if edit is None:
            return
        self.border_title = Content(one_line(f"Recipe: {self.app.workspace.relative(edit.path)}"))
        count = sum(map(len, self.problems.values()))
        words = ([f"! {count} to put right"] if count else []) + ["not saved" if edit.changed else "saved"]
        self.border_subtitle = Content(", ".join(words))
        self.query_one(RecipeForm).show(matching(self._rows(), self.query_one("#search", Input).value))
        self._show_about()

    @on(RecipeForm.Highlighted)
    def _show_about(self) -> None:
        row = self.query_one(RecipeForm).current
        about = self.query_one("#about", Static)
        if row is None:
            about.update("No key matches. Esc shows all of them.")
            return
        setting = row.setting
        default = "it must be given" if setting.required else f"default {self._default(setting)}"
        parts: list[Content | str | tuple[str, str]] = [(setting.key, "bold"), ": ", one_line(row.value), "\n"]
        parts += [setting.help, "\n"]
        parts += [(f"{setting.accepts}; {default}", "$text-muted")]
        for problem in self._problems_at(setting):
            # Where there is nothing better to say, the fix is the help, which stands here already.
            fix = "" if problem.fix in setting.help else problem.fix
            parts += ["\n", (one_line(f"! {Problem('', problem.message, fix)}"), "$text-error bold")]
        about.update(Content.assemble(*parts))

    def _problems_at(self, setting: Setting) -> Sequence[Problem]:
        """Those of the key; what belongs to no key is shown with every one."""
        return [*self.problems.get(setting.key, []), *self.problems.get("", [])]

    def _default(self, setting: Setting) -> str:
        edit, value = self.edit, setting.default
        if edit is not None and setting.key == "output_dir":
            value = f"runs/{edit.path.stem}"
        return value if isinstance(value, str) else json.dumps(value)

    # -- changing a value

    @on(RecipeForm.EditAsked)
    def _type_value(self, event: RecipeForm.EditAsked) -> None:
        edit = self.edit
        if edit is None:
            return
        shown = edit.shown(event.setting.key)
        if one_line(shown, len(shown) + 1) != shown.strip():
            problem = Problem(event.setting.key, "holds characters that cannot be typed", "Change it in an editor (e)")
            self.app.notify_problem(problem)
            return
        self._typing = event.setting
        field = self.query_one("#value", Input)
        field.value = shown
        field.display = True
        field.focus()
        field.action_select_all()

    @on(Input.Submitted, "#value")
    def _value_given(self, event: Input.Submitted) -> None:
        setting, edit, value = self._typing, self.edit, event.value
        self.close_field()
        if setting is not None and edit is not None:
            self._do(lambda: edit.set(setting.key, value))

    @on(RecipeForm.Chosen)
    def _choice_taken(self, event: RecipeForm.Chosen) -> None:
        edit = self.edit
        if edit is not None:
            self._do(lambda: edit.set(event.setting.key, event.value))

    @on(RecipeForm.ResetAsked)
    def _reset_asked(self, event: RecipeForm.ResetAsked) -> None:
        edit = self.edit
        if edit is not None:
            self._do(lambda: edit.reset(event.setting.key))

    def open_search(self) -> None:
        """Open the search field."""
        field = self.query_one("#search", Input)
        field.display = True
        field.focus()

    @on(Input.Changed, "#search")
    def _searched(self, event: Input.Changed) -> None:
        self.query_one(RecipeForm).show(matching(self._rows(), event.value))
        self._show_about()

    @on(Input.Submitted, "#search")
    def _search_done(self) -> None:
        self.query_one(RecipeForm).focus()

    def close_field(self) -> bool:
        """Leave the field for a value, or the search with what it hid; False when neither is open."""
        field, search = self.query_one("#value", Input), self.query_one("#search", Input)
        if not field.display and not search.display:
            return False
        if field.display:
            self._typing = None
            field.display = False
        else:
            search.value = ""
            search.display = False
        self.query_one(RecipeForm).focus()
        return True


def _is_missing_file(problems: Sequence[Problem]) -> bool:
    """Whether all that is wrong is a file that may come later: the recipe itself is sound."""
    return all("there is no such file" in problem.message for problem in problems)
