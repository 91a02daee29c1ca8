"""The app: what outlives a place, and the way between the places.

It holds the folder's workspace, the model host, the theme and the signals, and knows nothing about how a place
looks or what a service does. Places and services are imported when they are first needed, because the time to
the first paint is mostly the time of imports.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from textual import constants
from textual.app import App, SystemCommand
from textual.await_complete import AwaitComplete
from textual.driver import Driver
from textual.events import Event, Paste
from textual.reactive import reactive
from textual.screen import Screen
from textual.widgets import Input

from localdpo.errors import EnvironmentFault, LocalDPOError, Problem
from localdpo_tui.actions import Action, available, bindings, register
from localdpo_tui.places.base import Place
from localdpo_tui.preferences import load_preferences, save_preference
from localdpo_tui.shown import one_line, sentences
from localdpo_tui.standin import signs
from localdpo_tui.terminal_input import Typed
from localdpo_tui.theme import DEFAULT_THEME, THEMES
from localdpo_tui.widgets.editor import SafeTextArea
from localdpo_tui.widgets.safe_input import SafeInput

if TYPE_CHECKING:
    from localdpo_tui.services.model_host import ModelHost
    from localdpo_tui.services.workspace import Workspace

__all__ = ["LocalDPOApp"]

HANG_UP = (signal.SIGHUP, signal.SIGTERM)
GONE_SECONDS = 2.0
SWITCH_SECONDS = 0.0005
_PLACES = {"pairs": "PairsPlace", "train": "TrainPlace", "chat": "ChatPlace", "runs": "RunsPlace"}

EVERYWHERE = register(
    "app",
    Action("app.help", "f1", "Help", "What this place is for and what its keys do.", "Everywhere", priority=True),
    Action("app.pairs", "f2,1", "Pairs", "Go to the pairs.", "Everywhere", footer=False),
    Action("app.train", "f3,2", "Train", "Go to training.", "Everywhere", footer=False),
    Action("app.chat", "f4,3", "Chat", "Go to the chat.", "Everywhere", footer=False),
    Action("app.runs", "f5,4", "Runs", "Go to the runs.", "Everywhere", footer=False),
    Action("app.next_pane", "f6", "Next pane", "Move the focus on.", "Everywhere", footer=False, priority=True),
    Action("app.previous_pane", "shift+f6", "Previous pane", "Move the focus back.", "Everywhere", footer=False),
    Action("app.jump", "ctrl+o", "Jump", "Show a letter on every field; press it to go there.", "Everywhere"),
    Action("app.command_palette", "ctrl+p", "Palette", "Search for anything that can be done.", "Everywhere"),
    Action("app.theme", "", "Theme", "Choose the colours; the choice is remembered.", "Everywhere"),
    Action(
        "app.quit", "ctrl+q", "Quit", "Leave; what you wrote is kept, training goes on.", "Everywhere", priority=True
    ),
)


def _opener(name: str) -> Callable[[], Screen[None]]:
    def opened() -> Screen[None]:
        place: type[Place] = getattr(import_module(f"localdpo_tui.places.{name}"), _PLACES[name])
        return place()

    return opened


class LocalDPOApp(App[None]):
    """The terminal UI on one workspace folder.

    `place` is the place to open first, `link` what to show there (see `Place.open_link`), `host_factory` makes the
    model host (tests give a fake one). Raises nothing: what is wrong with the folder is shown.
    """

    TITLE = "localdpo"
    CSS_PATH = "app.tcss"
    MODES: ClassVar[dict[str, str | Callable[[], Screen[Any]]]] = {name: _opener(name) for name in _PLACES}
    ENABLE_COMMAND_PALETTE = True
    ACTIONS: ClassVar[tuple[Action, ...]] = EVERYWHERE
    BINDINGS = bindings(EVERYWHERE)
    NOTIFICATION_TIMEOUT = 6

    signalled: bool
    """Whether a signal was heard that was not obeyed yet."""
    failure: BaseException | None
    """What ended the app, when it was no user and no signal."""
    status: reactive[str] = reactive("", init=False)
    """What the trainer or the host is doing, for the tab line; empty shows the folder instead."""

    def __init__(
        self,
        folder: str | Path = ".",
        place: str | None = None,
        host_factory: Callable[[], ModelHost] | None = None,
        link: Mapping[str, Any] | None = None,
    ) -> None:
        self.DEFAULT_MODE = place if place in _PLACES else "pairs"  # type: ignore[misc]
        super().__init__()
        self.folder = Path(folder)
        self.folder_title = one_line(str(self.folder.absolute().name) or "/")
        self._host_factory = host_factory
        self._first_link = dict(link or {})
        self.signalled = False
        self.failure: BaseException | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._switch_interval = sys.getswitchinterval()
        for theme in THEMES:
            self.register_theme(theme)
        wanted = str(load_preferences().get("theme", DEFAULT_THEME))
        # Before anything is mounted: a change of theme styles the whole screen anew.
        self._remembered_theme = self.theme = wanted if wanted in self.available_themes else DEFAULT_THEME

    def get_driver_class(self) -> type[Driver]:
        """Return the driver that expects anything of a terminal."""
        if constants.DRIVER is not None or sys.platform == "win32":
            return super().get_driver_class()
        from localdpo_tui.driver import TerminalDriver

        return TerminalDriver

    async def on_event(self, event: Event) -> None:
        """Hand what was typed in a burst to the text in focus as one, or key by key to what is no text."""
        if isinstance(event, Typed | Paste):
            self.app_focus = True  # the window may be pasted into before, or without, a word that it has the focus
        focused = self.focused if isinstance(event, Typed | Paste) and not event.is_forwarded else None
        if isinstance(event, Typed):
            if isinstance(focused, SafeTextArea | SafeInput):
                focused._forward_event(event)
                return
            for key in event.keys:
                await super().on_event(key)
            return
        if isinstance(event, Paste) and isinstance(focused, Input) and not isinstance(focused, SafeInput):
            event.text = signs(event.text)  # the palette's line, which Textual draws as it is
        await super().on_event(event)

    @cached_property
    def workspace(self) -> Workspace:
        """The workspace in the folder; made on first use, reads nothing yet."""
        from localdpo_tui.services.workspace import Workspace

        return Workspace(self.folder)

    @cached_property
    def host(self) -> ModelHost:
        """The model host; its process starts with the first request."""
        if self._host_factory is not None:
            return self._host_factory()
        from localdpo_tui.services.model_host import ModelHost

        return ModelHost()

    @property
    def host_started(self) -> bool:
        """Whether a host was asked for in this session, so that looking does not start one."""
        return "host" in self.__dict__

    def on_mount(self) -> None:
        """Remember the theme when it changes, and end in order when the terminal hangs up."""
        self.theme_changed_signal.subscribe(self, self._remember_theme)
        # A thread that computes gives way after Python's 5 ms, every time that this one wants to go on: a screen drawn
        # while a large file is indexed took 100 ms so. The default comes back in `on_unmount`.
        sys.setswitchinterval(SWITCH_SECONDS)
        for number in HANG_UP:
            with suppress(ValueError):  # not the main thread: a test
                self._handlers[number] = signal.signal(number, partial(self._heard, asyncio.get_running_loop()))
        self.app_suspend_signal.subscribe(self, lambda _: self.flush_all())
        # What the shell has drawn meanwhile is not known to be other than what was there.
        self.app_resume_signal.subscribe(self, lambda _: self.refresh(layout=True))
        if self._first_link:
            self.call_after_refresh(self.go, self.current_mode, **self._first_link)

    def _remember_theme(self, _theme: object) -> None:
        if self.theme == self._remembered_theme:
            return
        self._remembered_theme = self.theme
        self.run_worker(lambda: save_preference("theme", self.theme), thread=True, group="preferences")

    # -- moving about

    def go(self, place: str, **link: Any) -> None:
        """Go to a place and show there what `link` names. Does nothing while a dialog is open."""
        if self.screen.is_modal:
            return
        self.switch_mode(place)
        screen = self.screen
        if link and isinstance(screen, Place):
            screen.call_after_refresh(screen.open_link, **link)

    def action_go(self, place: str) -> None:
        """Go to a place (a click on the tab line)."""
        self.go(place)

    def action_pairs(self) -> None:
        """Go to the pairs."""
        self.go("pairs")

    def action_train(self) -> None:
        """Go to training."""
        self.go("train")

    def action_chat(self) -> None:
        """Go to the chat."""
        self.go("chat")

    def action_runs(self) -> None:
        """Go to the runs."""
        self.go("runs")

    def action_next_pane(self) -> None:
        """Move the focus on."""
        self.screen.focus_next()

    def action_previous_pane(self) -> None:
        """Move the focus back."""
        self.screen.focus_previous()

    def action_jump(self) -> None:
        """Show a letter on everything that takes the focus."""
        from localdpo_tui.screens.jump import JumpScreen

        self.push_screen(JumpScreen(self.screen))

    def action_help(self) -> None:
        """Open help for the focused widget and the screen, or close it."""
        from localdpo_tui.screens.help import HelpScreen

        if isinstance(self.screen, HelpScreen):
            self.screen.dismiss()
        else:
            self.push_screen(HelpScreen(self.screen))

    def action_theme(self) -> None:
        """Choose the theme."""
        self.search_themes()

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """Return the palette: every action that can be done now."""
        focused = screen.focused
        chain = focused.ancestors_with_self if focused is not None else [screen, self]
        for node, action in available(chain):
            if action.name != "command_palette":
                title = f"{action.group}: {action.label}"
                yield SystemCommand(title, action.help, lambda n=node, a=action: self._do(n, a))

    async def _do(self, node: Any, action: Action) -> None:
        await self.run_action(action.name, node)

    # -- telling and asking

    def notify_problem(self, problem: BaseException | Problem | str, severity: str = "error") -> None:
        """Tell the user what is wrong and what to do about it, in sentences; never a traceback.

        An exception that is not a `LocalDPOError` is a mistake of the program and is named as one.
        """
        match problem:
            case LocalDPOError() | Problem() | str():
                text = sentences(problem)
            case OSError():
                text = sentences(Problem(str(problem.filename or ""), problem.strerror or str(problem)))
            case _:
                text = sentences(
                    f"Internal error: {type(problem).__name__}: {problem}. Nothing you wrote is lost; please report it."
                )
        level: Any = severity
        self.notify(text, title=_TITLES.get(severity, ""), severity=level, timeout=12, markup=False)

    def tell(self, message: str) -> None:
        """Say that something worked, in one line."""
        self.notify(sentences(message), markup=False)

    async def ask(self, title: str, text: str, choices: Mapping[str, str], danger: str = "") -> str | None:
        """Ask a question; return the key of the answer, None for Esc. To be awaited in a worker.

        The first choice has the focus; `danger` names the choice that destroys something.
        """
        from localdpo_tui.screens.dialog import Dialog

        return await self.push_screen_wait(Dialog(title, text, choices, danger))

    # -- ending

    def places(self) -> list[Place]:
        """Return the places opened so far."""
        return [screen for stack in self._screen_stacks.values() for screen in stack if isinstance(screen, Place)]

    def flush_all(self) -> None:
        """Have every place write what must not be lost."""
        for place in self.places():
            try:
                place.flush()
            except Exception as error:  # the other places are to be kept whatever happens to this one
                self.notify_problem(error)

    def _heard(self, loop: asyncio.AbstractEventLoop, number: int, _frame: object) -> None:
        # Not asyncio's own handler: the loop does not hear it while it waits for a terminal that takes no output.
        self.signalled = True
        self._end_soon(number)
        loop.call_soon_threadsafe(self.hang_up, number)

    def _end_soon(self, number: int) -> None:
        if not self.is_headless:
            # Textual's writer waits for ever when a terminal that is gone does not take its last words.
            signal.signal(signal.SIGALRM, lambda *_: os._exit(128 + number))
            signal.setitimer(signal.ITIMER_REAL, GONE_SECONDS)

    def hang_up(self, number: int) -> None:
        """End because the terminal is gone or the system asks: flush, ask nothing."""
        self._end_soon(number)
        self._leave(128 + number)
        self.signalled = False

    def lose_terminal(self, error: BaseException) -> None:
        """End because nothing can be read any more: the terminal is gone, or reading it has failed."""
        if self._exit or self.signalled:
            return
        if isinstance(error, EOFError) or (isinstance(error, OSError) and error.errno == errno.EIO):
            self.hang_up(signal.SIGHUP)
        else:
            if isinstance(error, OSError):
                problem = Problem("", f"The terminal cannot be read: {error.strerror}", "What you wrote is kept")
                error = EnvironmentFault(problem)
            self.failure = error
            self._leave(1)

    def _handle_exception(self, error: Exception) -> None:
        # What is written was kept when leaving began. A worker that had awaited a thread may look for a widget after
        # that, and find none: nobody waits for it any more.
        if not self._exit:
            super()._handle_exception(error)

    def pop_screen(self) -> AwaitComplete:
        """Close the screen on top, but never a place: Textual's palette asks twice when two keys close it."""
        return super().pop_screen() if len(self.screen_stack) > 1 else AwaitComplete()

    def _fatal_error(self) -> None:
        # Textual prints a traceback with the values of variables, which are the user's texts.
        self.flush_all()
        self.failure = self._exception
        self._close_messages_no_wait()

    async def action_quit(self) -> None:
        """Leave. Asks first when something is not saved, or would be cut off."""
        for place in self.places():
            with suppress(LocalDPOError):
                place.flush()
        unsaved = [place for place in self.places() if place.unsaved()]
        reasons = [reason for place in self.places() for reason in place.busy()]
        if unsaved or reasons:
            run: Any = partial(self._confirm_quit, unsaved, reasons)
            self.run_worker(run, exclusive=True, group="quit")
        else:
            self._leave()

    async def _confirm_quit(self, unsaved: Sequence[Place], reasons: Sequence[str]) -> None:
        text = "\n\n".join([*(place.unsaved() for place in unsaved), *reasons])
        choices = {"save": "Save and quit", "quit": "Quit"} if unsaved else {"quit": "Quit"}
        answer = await self.ask("Quit now?", text, {**choices, "cancel": "Cancel"}, danger="" if unsaved else "quit")
        if answer == "save":
            answer = "quit" if all([await place.save_all() for place in unsaved]) else None
        if answer == "quit":
            self._leave()

    def _leave(self, code: int = 0) -> None:
        self.flush_all()
        for place in self.places():
            with suppress(LocalDPOError, OSError):
                place.close()
            place.focused = None  # else the focus moves on with every widget that goes, and styles the rest anew
        self.exit(return_code=code)

    async def on_unmount(self) -> None:
        """End the host's process with the app."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        sys.setswitchinterval(self._switch_interval)
        gc.unfreeze()  # what the places kept from the collector
        if self.host_started:
            await self.host.close()


_TITLES = {"error": "This did not work", "warning": "Please note"}
