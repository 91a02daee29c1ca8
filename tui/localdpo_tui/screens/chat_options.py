"""Who answers in a chat, and how: run, model, system prompt, sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.widgets import Input, Select, Static

from localdpo.errors import InputError
from localdpo_tui.actions import Action, bindings, register
from localdpo_tui.screens.modal import Modal
from localdpo_tui.services.conversation import Mode
from localdpo_tui.shown import one_line
from localdpo_tui.widgets.editor import SafeTextArea
from localdpo_tui.widgets.footer import FooterLine
from localdpo_tui.widgets.safe_input import SafeInput
from localdpo_tui.widgets.sampling import SamplingForm

if TYPE_CHECKING:
    from localdpo_tui.app import LocalDPOApp

__all__ = ["ChatOptionsScreen", "ChatSettings"]

_MODES: dict[Mode, str] = {"both": "both, side by side", "tuned": "the tuned model alone", "base": "the base alone"}


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """What the screen edits. `run` is the folder's name in the workspace, "" for none."""

    run: str = ""
    model: str = ""
    mode: Mode = "both"
    system: str = ""
    sampling: Mapping[str, Any] = field(default_factory=dict)


class ChatOptionsScreen(Modal[ChatSettings | None]):
    """Edit the settings of a chat; dismissed with the new ones, or None."""

    HELP = """Choose the run whose adapter answers beside the base, the system prompt and how tokens are chosen. At
    temperature 0 a model always says the same; a seed makes other temperatures repeatable."""
    CSS_PATH = "chat_options.tcss"
    ACTIONS: ClassVar[tuple[Action, ...]] = register(
        "chat options",
        Action("chat_options.save", "ctrl+s", "Use these", "Go on with these settings.", "Options"),
        Action("chat_options.cancel", "escape", "Cancel", "Leave everything as it was.", "Options"),
    )
    BINDINGS = bindings(ACTIONS)

    if TYPE_CHECKING:
        app: LocalDPOApp

    def __init__(self, settings: ChatSettings, runs: Sequence[tuple[str, str]]) -> None:
        """`runs` are those with an adapter: name and model."""
        super().__init__()
        self._settings = settings
        self._runs = dict(runs)

    def compose(self) -> ComposeResult:
        """Lay out the form."""
        settings = self._settings
        if settings.run and settings.run not in self._runs:
            self._runs[settings.run] = settings.model
        with Vertical(classes="box") as box:
            box.border_title = "Chat options"
            with Horizontal(classes="line"):
                yield Static("Tuned by", classes="label")
                names = {"": "no run: the base alone"} | {name: one_line(name) for name in self._runs}
                runs = [(Content(shown), name) for name, shown in names.items()]
                yield Select(runs, value=settings.run, allow_blank=False, compact=True, id="option-run")
            with Horizontal(classes="line"):
                yield Static("Base model", classes="label")
                yield SafeInput(settings.model, compact=True, id="option-model", disabled=bool(settings.run))
            with Horizontal(classes="line"):
                yield Static("Answers", classes="label")
                modes = [(label, mode) for mode, label in _MODES.items()]
                yield Select(
                    modes, value=settings.mode, allow_blank=False, compact=True, id="option-mode",
                    disabled=not settings.run,
                )  # fmt: skip
            yield Static("System prompt (empty: none)", classes="muted")
            yield SafeTextArea(settings.system, id="option-system", compact=True)
            yield SamplingForm(("temperature", "top_p", "max_tokens", "seed"), settings.sampling)
        yield FooterLine()

    @on(Select.Changed, "#option-run")
    def _run_changed(self, event: Select.Changed) -> None:
        run = str(event.value)
        model = self.query_one("#option-model", Input)
        model.disabled = bool(run)
        if run:
            model.value = self._runs[run]
        self.query_one("#option-mode", Select).disabled = not run

    def action_save(self) -> None:
        """Close with the settings, or say what cannot be."""
        try:
            sampling = self.query_one(SamplingForm).values()
        except InputError as error:
            self.app.notify_problem(error, "warning")
            return
        self.dismiss(
            ChatSettings(
                run=str(self.query_one("#option-run", Select).value),
                model=self.query_one("#option-model", Input).value.strip(),
                mode=cast(Mode, self.query_one("#option-mode", Select).value),
                system=self.query_one(SafeTextArea).raw,
                sampling=sampling,
            )
        )

    def action_cancel(self) -> None:
        """Close."""
        self.dismiss(None)
