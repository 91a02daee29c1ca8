"""The preflight on the screen: asks for it, shows what came of it, and can be told to stop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from textual import work
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Static

from localdpo.errors import LocalDPOError
from localdpo.text import sanitise
from localdpo_tui.services import preflight

__all__ = ["CheckPane"]

NOT_CHECKED = (
    "Press c to check before you train.\n\n"
    "It loads the model, encodes your pairs and says whether they fit into memory, which rows are too long or are left "
    "out, how many steps there will be and how long they take. Nothing is written, and Esc stops it."
)
_STYLES = {
    "": "",
    "muted": "$text-muted",
    "good": "$text-success bold",
    "warning": "$text-warning bold",
    "bad": "$text-error bold",
    "heading": "bold",
}


class CheckPane(VerticalScroll, can_focus=True):
    """Call `check` with a recipe; `cancel` stops it."""

    HELP = """The check runs the preflight in a process of its own: it loads the model and encodes the pairs, as
    training would, and writes nothing. SAFE fits with room to spare, TIGHT may fit, TOO BIG does not."""
    DEFAULT_CSS = "CheckPane { padding: 0 1; }"

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id, classes="pane")
        self.checking = False

    def compose(self) -> ComposeResult:
        """Start with what a check is for."""
        yield Static(NOT_CHECKED, id="plan", markup=False)

    def on_mount(self) -> None:
        """Name the pane."""
        self.border_title = Content("Check")

    def clear(self) -> None:
        """Forget a plan that is out of date."""
        if not self.checking:
            self._say(NOT_CHECKED, "")

    def _say(self, text: str | Content, subtitle: str) -> None:
        self.query_one("#plan", Static).update(text)
        self.border_subtitle = Content(subtitle)

    def check(self, recipe: Path, folder: Path) -> None:
        """Start the preflight of a recipe, ending one that is under way."""
        self._check(recipe, folder)

    @work(group="check", exclusive=True)
    async def _check(self, recipe: Path, folder: Path) -> None:
        self.checking = True
        self._say("Loading the model and encoding the pairs. Esc stops it.", "checking")
        try:
            plan = await preflight.run_preflight(recipe, folder)
            width = max(30, self.scrollable_content_region.width)
            self._say(_content(preflight.lines(plan, width)), "r trains")
        except LocalDPOError as error:
            self._say(_content([("This recipe cannot be trained as it is.", "bad"), ("", ""), (str(error), "")]), "")
        except asyncio.CancelledError:
            if self.is_attached:
                self._say(NOT_CHECKED, "stopped")
            raise
        finally:
            self.checking = False

    def cancel(self) -> bool:
        """Stop the preflight; False when none is under way."""
        if not self.checking:
            return False
        self.workers.cancel_group(self, "check")
        return True


def _content(parts: Sequence[preflight.Part]) -> Content:
    return Content("\n").join(Content.styled(sanitise(text), _STYLES[role]) for text, role in parts)
