"""What an empty workspace shows: what localdpo does, and three ways to begin."""

from __future__ import annotations

from textual import on
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.message import Message
from textual.widgets import Button, Static

__all__ = ["Welcome"]

WORDS = """[b]Teach a language model what you prefer.[/b]

You write [b]pairs[/b]: a prompt, the answer you want (chosen) and one you don't (rejected). localdpo trains a small \
adapter with them, on this computer, and nothing leaves it. Then you chat with the result, and keep it or roll back.

Twenty good pairs are enough to see something change. Press F1 anywhere for help, Ctrl+P to search for anything that \
can be done. [b]Pairs, Train, Chat[/b] and [b]Runs[/b] are the four places in the line above: F2 to F5."""

CHOICES = (
    ("example", "Open the Athene example", "Pairs that teach the starter model its name, with their recipe"),
    ("blank", "Start with an empty file", "pairs/my-pairs.jsonl; write or generate the pairs yourself"),
    ("import", "Import a file", "JSONL, CSV or JSON of TRL, ShareGPT, OpenAI, Alpaca, Argilla …"),
)


class Welcome(VerticalScroll, can_focus=False):
    """Three buttons under an explanation. Posts `Chosen`."""

    HELP = "This folder has no pairs yet. Choose how to begin; whatever you choose, no file of yours is changed."

    DEFAULT_CSS = """
    Welcome {
        height: 1fr;
        padding: 1 2;
        align: center top;
        .words { width: 76; max-width: 100%; height: auto; margin-bottom: 1; }
        Button { width: 40; max-width: 100%; }
    }
    """

    class Chosen(Message):
        """How to begin: `example`, `blank` or `import`."""

        def __init__(self, choice: str) -> None:
            super().__init__()
            self.choice = choice

    def compose(self) -> ComposeResult:
        """Put the words above the buttons."""
        yield Static(WORDS, classes="words")
        for name, label, what in CHOICES:
            yield Button(label, id=f"begin-{name}", variant="primary" if name == "example" else "default", compact=True)
            yield Static(f"  {what}", classes="words muted", markup=False)

    @on(Button.Pressed)
    def _pressed(self, event: Button.Pressed) -> None:
        event.stop()
        self.post_message(self.Chosen((event.button.id or "").removeprefix("begin-")))
