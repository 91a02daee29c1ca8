"""What the four places share: the tab line above, the footer below, and the hooks the app calls.

A place is a Textual screen and the base of a mode, so it stays alive while another one is shown. This module
knows nothing about pairs, runs or chats.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.events import AppBlur, Mount, ScreenSuspend
from textual.screen import Screen

from localdpo_tui.actions import Action
from localdpo_tui.widgets.footer import FooterLine
from localdpo_tui.widgets.tabline import TabLine

if TYPE_CHECKING:
    from localdpo_tui.app import LocalDPOApp
    from localdpo_tui.services.workspace import Workspace

__all__ = ["Place"]


class Place(Screen[None]):
    """One of the four places. Subclasses set `NAME`, `TITLE`, `HELP` and `ACTIONS` and yield their body."""

    NAME: ClassVar[str] = ""
    ACTIONS: ClassVar[tuple[Action, ...]] = ()
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-wide")]  # noqa: RUF012 - Textual declares the type
    VERTICAL_BREAKPOINTS = [(0, "-short"), (18, "-tall")]  # noqa: RUF012
    AUTO_FOCUS = ""  # a place says itself what has the focus; None would take the app's rule

    if TYPE_CHECKING:
        app: LocalDPOApp

    @property
    def workspace(self) -> Workspace:
        """The folder this app was opened on."""
        return self.app.workspace

    @property
    def narrow(self) -> bool:
        """Whether one pane at a time is shown."""
        return self.app.size.width < 100

    def compose(self) -> ComposeResult:
        """Put the place's body between the tab line and the footer."""
        yield TabLine(self.NAME)
        yield from self.compose_body()
        yield FooterLine()

    def compose_body(self) -> ComposeResult:
        """Yield the widgets of this place."""
        yield from ()

    @on(Mount)
    def _keep_still(self) -> None:
        # A full collection walks all that was imported, some 50 ms in which no key is obeyed. What is there once a
        # place is laid out stays as long as the app, so that the collector need not look at it again.
        self.call_after_refresh(gc.freeze)

    def spawn(
        self, work: Callable[..., Coroutine[Any, Any, object]], *arguments: Any, group: str, exclusive: bool = False
    ) -> None:
        """Run `work(*arguments)` as a worker of this place; `exclusive` cancels the one of this group before.

        It is called when the worker runs, so that one that is replaced before then leaves no coroutine behind.
        """
        run: Any = partial(work, *arguments)
        self.run_worker(run, group=group, exclusive=exclusive)

    def open_link(self, **link: Any) -> None:
        """Show what another place or the command line asked for, such as `run="runs/athene"`."""

    def flush(self) -> None:
        """Write what must not be lost. Called on the UI thread when the place is left and when the app ends."""

    def unsaved(self) -> str:
        """Return a sentence about what was written and is in no file yet, empty when there is nothing."""
        return ""

    async def save_all(self) -> bool:
        """Put what `unsaved` speaks of into its file. Returns whether that went well; says itself what did not."""
        return True

    def close(self) -> None:
        """Let go of files. Called once, after `flush`, when the app ends."""

    def busy(self) -> Sequence[str]:
        """Return a sentence for each piece of work that quitting would end."""
        return ()

    @on(ScreenSuspend)
    def _leave(self) -> None:
        self.flush()

    @on(AppBlur)
    def _blur(self) -> None:
        self.flush()
