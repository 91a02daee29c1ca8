"""The Train place: the recipe as a form, what training would take, and the run as it goes.

The trainer is a process of its own, watched through its run folder: leaving, quitting or losing the terminal
does not touch it, and opening this place finds it again. Nothing here computes anything about a model.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.events import ScreenResume

from localdpo.errors import LocalDPOError, Problem
from localdpo.evaluate.evidence import verdict_of_run
from localdpo.train.run import Request, RunFolder
from localdpo_tui.actions import Action, bindings, register
from localdpo_tui.places.base import Place
from localdpo_tui.services.run_view import RunView, read_chunk, state_sign
from localdpo_tui.widgets.check_pane import CheckPane
from localdpo_tui.widgets.recipe_form import RecipeForm
from localdpo_tui.widgets.recipe_pane import RecipePane
from localdpo_tui.widgets.run_pane import RunPane

if TYPE_CHECKING:
    from localdpo.recipe_edit import RecipeEdit
    from localdpo_tui.services.trainer import Trainer

POLL_SECONDS, IDLE_SECONDS = 0.4, 1.5
VIEWS = ("recipe", "check", "run")


class TrainPlace(Place):
    """Form, preflight and the live run."""

    NAME = "train"
    TITLE = "Train"
    CSS_PATH = "train.tcss"
    HELP = """Train: choose how the model learns, check that it fits, and watch it learn.

    Training goes on when you leave this place, quit, or lose the terminal; open localdpo again and it is here.
    Pause keeps everything on the disk and gives the processor back; stop saves and publishes what there is, and can
    be gone on with later."""
    ACTIONS: ClassVar[tuple[Action, ...]] = register(
        "train",
        Action("train.start", "r,ctrl+r", "Run", "Train with this recipe, or go on with its run."),
        Action("train.check", "c", "Check", "Check memory, lengths, steps and time before training."),
        Action("train.pause", "u", "Pause/go on", "Pause after this step, or go on."),
        Action("train.stop", "x", "Stop", "Stop after this step, save, and keep the adapter as it is."),
        Action("train.view", "v,f7", "View", "Recipe, check or run: the next of them."),
        Action("train.search", "slash", "Search", "Search the keys of the recipe."),
        Action("train.choose", "o", "Open", "Open another recipe of this folder."),
        Action("train.external", "e", "$EDITOR", "Edit the recipe in your own editor.", footer=False),
        Action("train.undo", "ctrl+z", "Undo", "Take back the latest change of the recipe.", footer=False),
        Action("train.chat", "t", "Talk", "Talk to what this run has learned.", footer=False),
        Action("train.cancel", "escape", "Cancel", "Stop the check, or leave the field.", footer=False),
    )
    BINDINGS = bindings(ACTIONS)

    def __init__(self) -> None:
        super().__init__()
        self.view: RunView | None = None
        self._right = "check"
        self._trainer: Trainer | None = None
        self._coming: RunFolder | None = None
        """The run of a trainer that was started here and is not at work yet."""

    @property
    def edit(self) -> RecipeEdit | None:
        """The recipe in the form."""
        return self.recipe_pane.edit

    @property
    def recipe_pane(self) -> RecipePane:
        """The form."""
        return self.query_one(RecipePane)

    # -- laying out

    def compose_body(self) -> ComposeResult:
        """Yield the form at the left, and check and run at the right, of which one is shown."""
        with Horizontal(id="train"):
            yield RecipePane(id="recipe")
            yield CheckPane(id="check")
            yield RunPane(id="run")

    def on_mount(self) -> None:
        """Find the recipe and the run to show."""
        self._show_view("recipe")
        self._begin()

    @work(group="begin", exclusive=True)
    async def _begin(self) -> None:
        """Open the recipe of last time, and the run that is going on, else that of the recipe."""
        # Recipes are checked by pydantic, whose import takes longer than the screen may stand still.
        await asyncio.to_thread(import_module, "localdpo.recipe_edit")
        if self.edit is None:
            await self._open_first()
        running = await asyncio.to_thread(self._going_on)
        if self.view is not None:
            return  # a link was faster
        if running is not None:
            self._watch(running)
        elif self.edit is not None:
            self._look_at(self._run_of_recipe(self.edit))
            self.query_one(RecipeForm).focus()

    async def _open_first(self) -> None:
        recipes, last = await asyncio.to_thread(
            lambda: (self.workspace.recipes(), self.workspace.state().get("recipe"))
        )
        named = [path for path in recipes if self.workspace.relative(path) == last]
        if not recipes or not await self.recipe_pane.open_recipe((named or recipes)[0]):
            self.recipe_pane.show_empty()

    def _going_on(self) -> RunFolder | None:
        runs = [run for run in self.workspace.runs() if run.is_running()]
        return max(runs, key=lambda run: float(run.info().get("created") or 0), default=None)

    @on(ScreenResume)
    def _look_again(self) -> None:
        if self.is_mounted:
            self._reload()

    @work(group="reload", exclusive=True)
    async def _reload(self) -> None:
        await self.recipe_pane.reload_if_changed()

    def open_link(self, **link: Any) -> None:
        """Show a recipe (`recipe="recipes/a.yaml"`), watch a run (`run="runs/a"`), go on with it (`resume=True`)."""
        self._follow_link(dict(link))

    @work(group="link", exclusive=True)
    async def _follow_link(self, link: dict[str, Any]) -> None:
        await asyncio.to_thread(import_module, "localdpo.recipe_edit")
        if "recipe" in link:
            await self._open(self.workspace.folder / str(link["recipe"]))
        if "run" in link:
            run = RunFolder(self.workspace.folder / str(link["run"]))
            self._watch(run)
            if link.get("resume"):
                # A run that was set aside has another name than its recipe says.
                place = f"output_dir={json.dumps(str(run.path))}"
                await self._launch(run.recipe_file, resume=True, run=run, overrides=[place])

    # -- which pane

    def _show_view(self, view: str) -> None:
        self._right = view if view != "recipe" else self._right
        for name in VIEWS:
            self.set_class(name == view, f"-view-{name}")
            self.set_class(name == self._right, f"-right-{name}")

    @property
    def _view(self) -> str:
        return next((name for name in VIEWS if self.has_class(f"-view-{name}")), "recipe")

    def action_view(self) -> None:
        """Go to the next view and put the focus there."""
        self._show_view(VIEWS[(VIEWS.index(self._view) + 1) % len(VIEWS)])
        self.call_after_refresh(self._focus_view)

    def _focus_view(self) -> None:
        if self._view == "run":
            self.query_one(RunPane).focus_first()
        elif self._view == "check":
            self.query_one(CheckPane).focus()
        else:
            self.query_one(RecipeForm).focus()

    # -- the recipe

    async def _open(self, path: Path) -> None:
        if await self.recipe_pane.open_recipe(path):
            self.query_one(CheckPane).clear()
            try:
                await asyncio.to_thread(self.workspace.remember, recipe=self.workspace.relative(path))
            except LocalDPOError as error:
                self.app.notify_problem(error, severity="warning")

    @on(RecipePane.Changed)
    def _recipe_changed(self) -> None:
        self.refresh_bindings()

    def action_undo(self) -> None:
        """Take back a change of the recipe."""
        self.recipe_pane.undo()

    def action_search(self) -> None:
        """Open the search field."""
        self._show_view("recipe")
        self.call_after_refresh(self.recipe_pane.open_search)

    @work(group="choose", exclusive=True)
    async def action_choose(self) -> None:
        """Choose among the recipes of the folder."""
        recipes = await asyncio.to_thread(self.workspace.recipes)
        if not recipes:
            self.recipe_pane.show_empty()
            return
        from localdpo_tui.screens.choose import ChooseScreen

        names = [self.workspace.relative(path) for path in recipes]
        chosen = await self.app.push_screen_wait(ChooseScreen("Open a recipe", names))
        if chosen is None:
            return
        await self._open(recipes[chosen])
        self._show_view("recipe")
        if self.edit is not None and not (self.view is not None and self.view.running):
            self._look_at(self._run_of_recipe(self.edit))

    @work(group="choose", exclusive=True)
    async def action_external(self) -> None:
        """Edit the file in $EDITOR."""
        edit = self.edit
        if edit is not None:
            from localdpo_tui.screens.external import edit_file

            if await edit_file(self.app, edit.path):
                await self._open(edit.path)

    # -- the preflight

    def action_check(self) -> None:
        """Run the preflight."""
        edit = self.edit
        if edit is None or self._refuse_invalid():
            return
        self._show_view("check")
        self.query_one(CheckPane).check(edit.path, self.workspace.folder)
        self.call_after_refresh(self._focus_view)

    def _refuse_invalid(self) -> bool:
        """Go to the first problem of the recipe; whether there is one."""
        if not self.recipe_pane.problems:
            return False
        self._show_view("recipe")
        self.call_after_refresh(self.recipe_pane.go_to_problem)
        return True

    def action_cancel(self) -> None:
        """Leave the field, or stop the check."""
        if not self.recipe_pane.close_field():
            self.query_one(CheckPane).cancel()

    # -- the run

    def _run_of_recipe(self, edit: RecipeEdit) -> RunFolder:
        """The run that the recipe makes, whether it is there yet or not."""
        return RunFolder(self.workspace.folder / Path(str(edit.value("output_dir"))).expanduser())

    def _watch(self, run: RunFolder) -> None:
        self._look_at(run)
        self._show_view("run")
        self.call_after_refresh(self._focus_view)

    def _look_at(self, run: RunFolder) -> None:
        if self._coming is not None and self._coming.path != run.path:
            self._expect(None)
        self.view = RunView(run)
        self.query_one(RunPane).show(self.view, self.workspace.relative(run.path))
        self._follow(self.view)

    @work(group="follow", exclusive=True, description="follow a run")
    async def _follow(self, view: RunView) -> None:
        """Read what the run says as long as the place lives; nothing of it happens on this thread but drawing."""
        while True:
            chunk, status = await asyncio.to_thread(read_chunk, view.run, view.offset)
            was_running = view.running
            if view.take(chunk, status):
                self._show_run(view)
                if view.running:
                    self._expect(None)
                elif was_running:
                    self._over(view)
            self._tell_of_trainer()
            if not chunk.events and view.to_judge:
                view.judge(await asyncio.to_thread(verdict_of_run, view.run))
                self.query_one(RunPane).changed()
            if chunk.events:
                await asyncio.sleep(0)
            else:
                await asyncio.sleep(POLL_SECONDS if view.running or self._trainer is not None else IDLE_SECONDS)

    def _show_run(self, view: RunView) -> None:
        self.query_one(RunPane).changed()
        status = view.status
        if status is not None and view.running:
            at = f" {status.step}/{status.total_steps}" if status.total_steps else ""
            self.app.status = f"{state_sign(status.state)} {status.state}{at}"
        else:
            self.app.status = ""
        self.refresh_bindings()

    def _over(self, view: RunView) -> None:
        said = view.end.message if view.end is not None and view.end.message else view.headline()
        if view.state in ("finished", "stopped"):
            self.app.tell(f"{said} Press t to talk to it.")
        else:
            where = self.workspace.relative(view.run.path)
            self.app.notify_problem(Problem(where, said, "Press r to go on from its checkpoint, or to start anew"))

    def _tell_of_trainer(self) -> None:
        """Tell why the trainer that was started here ended, when that was an error."""
        started = self._trainer
        if started is None or started.exit_code is None:
            return
        self._trainer = None
        self._expect(None)
        error = started.error()
        if error is not None:
            self.app.notify_problem(error)

    @work(group="launch", exclusive=True)
    async def action_start(self) -> None:
        """Train with the recipe; go on with its run when that was interrupted."""
        await self.recipe_pane.settle()
        edit = self.edit
        if edit is None or self._refuse_invalid():
            return
        run = self._run_of_recipe(edit)
        resume = await self._resume_or_new(run)
        if resume is not None:
            await self._launch(edit.path, resume=resume, run=run)

    async def _resume_or_new(self, run: RunFolder) -> bool | None:
        """Whether to go on with the run that is there; None when the user wants neither."""
        status = await asyncio.to_thread(run.status)
        if status is None or status.state not in ("stopped", "interrupted", "failed") or not status.step:
            return False
        answer = await self.app.ask(
            f"Go on with {run.path.name}?",
            f"This run was {status.state} at step {status.step} of {status.total_steps}. A new run keeps the old one "
            "beside it.",
            {"resume": "Go on", "new": "New run"},
        )
        return None if answer is None else answer == "resume"

    async def _launch(self, recipe: Path, *, resume: bool, run: RunFolder, overrides: Sequence[str] = ()) -> None:
        from localdpo_tui.services import trainer

        self.app.tell("Going on from the last checkpoint." if resume else "The trainer is starting.")
        self._expect(run)
        try:
            if self.app.host_started:
                await self.app.host.rest()  # two models at a time may be more than a laptop holds
            self._trainer = await asyncio.to_thread(
                trainer.start, recipe, self.workspace.folder, resume=resume, overrides=overrides
            )
        except LocalDPOError as error:
            self._expect(None)
            self.app.notify_problem(error)
            return
        self._watch(run)

    def _expect(self, run: RunFolder | None) -> None:
        if run is not self._coming:
            self._coming = run
            self.refresh_bindings()

    @work(group="control", exclusive=True)
    async def action_pause(self) -> None:
        """Pause, or go on."""
        if self.view is not None and self.view.state == "paused":
            await self._request("resume", "Going on.")
        else:
            await self._request("pause", "Pausing after this step; everything is saved first.")

    @work(group="control", exclusive=True)
    async def action_stop(self) -> None:
        """Stop and save."""
        await self._request("stop", "Stopping after this step; the adapter is saved.")

    async def _request(self, request: Request, said: str) -> None:
        run = self._coming or (self.view.run if self.view is not None else None)
        if run is None:
            return
        try:
            while not await asyncio.to_thread(run.request, request):
                if self._coming is None:
                    self.app.notify_problem("No trainer is at work on this run. Press r to start or go on.", "warning")
                    return
                # It takes seconds to load what it needs; a key pressed meanwhile counts all the same.
                await asyncio.sleep(POLL_SECONDS)
            self.app.tell(said)
        except LocalDPOError as error:
            self.app.notify_problem(error)

    def action_chat(self) -> None:
        """Talk to the tuned model."""
        if self.view is not None:
            self.app.go("chat", run=self.workspace.relative(self.view.run.path))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer what can be done now."""
        if not self.is_mounted:
            return True
        running = self.view is not None and self.view.running
        match action:
            case "pause" | "stop":
                return running or self._coming is not None
            case "start":
                return self.edit is not None and not running and self._coming is None
            case "check" | "search" | "external" | "undo":
                return self.edit is not None
            case "chat":
                return self.view is not None and not running and self.view.run.adapter.is_dir()
        return True
