"""The editor of one pair: the turns of its prompt, both answers side by side, tags and weight.

It is given a draft and gives one back; it knows nothing about files, stores or the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.message import Message as UIMessage
from textual.widget import Widget
from textual.widgets import Input, Label, Static, TextArea

from localdpo_tui.actions import Action, bindings, register
from localdpo_tui.shown import inert, one_line
from localdpo_tui.standin import StandIns
from localdpo_tui.widgets.editor import SafeTextArea
from localdpo_tui.widgets.safe_input import SafeInput

if TYPE_CHECKING:
    from localdpo.data.fields import Message
    from localdpo.data.rows import PairDraft

__all__ = ["PairEditor", "TextBox", "TurnBox"]

_TITLES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}


def _role(message: Message) -> str:
    return _TITLES.get(message["role"]) or one_line(message["role"])


class TextBox(SafeTextArea):
    """A titled text of the pair, its count in the lower border."""

    HELP = "Ctrl+Z and Ctrl+Y undo and redo in this text; Ctrl+T opens it in your own editor. Tab goes on."

    def __init__(self, title: str, raw: str = "", **options: Any) -> None:
        super().__init__(raw, highlight_cursor_line=False, **options)
        self.add_class("pane")
        self.border_title = Content(title)


class TurnBox(TextBox):
    """One turn of the prompt. Keys of the message other than its content are kept as they are."""

    def __init__(self, message: Message) -> None:
        super().__init__(_role(message), message["content"])
        self._message = message

    @property
    def message(self) -> Message:
        """The turn with the content as it stands here."""
        return cast("Message", {**self._message, "content": self.raw})

    def put(self, message: Message) -> None:
        """Show another turn."""
        self._message = message
        self.border_title = Content(_role(message))
        if self.raw != message["content"]:
            self.raw = message["content"]


class PairEditor(Widget):
    """Edits one draft at a time: `load` gives it one, `draft` is what stands there now."""

    HELP = """The pair: the prompt (a system message and several turns if need be), the answer you want (chosen) and the
    one you don't (rejected). Words that only one of the answers has are underlined. Every change is kept at once as
    a draft; Ctrl+S writes the drafts into the file."""

    ACTIONS: ClassVar[tuple[Action, ...]] = register(
        "pairs.editor",
        Action("pairs.editor.back", "escape", "Back", "Back to the list."),
        Action("pairs.editor.swap", "f9", "Swap", "The chosen answer becomes the rejected one and the other way."),
        Action("pairs.editor.external", "ctrl+t", "$EDITOR", "Edit this text in your own editor."),
        Action(
            "pairs.editor.system", "f7", "System", "Add a system message, or take an empty one away.", priority=True
        ),
        Action(
            "pairs.editor.add_turn", "f8", "Turn+", "Add the assistant's reply and the next question to the prompt."
        ),
        Action(
            "pairs.editor.remove_turn", "shift+f8", "Turn-", "Take the last two turns of the prompt away.", footer=False
        ),
    )
    BINDINGS = bindings(ACTIONS)

    DEFAULT_CSS = """
    PairEditor {
        height: 1fr;
        layout: vertical;
        #prompt { height: auto; max-height: 45%; min-height: 3; }
        TextBox { padding: 0 1; scrollbar-size-vertical: 1; }
        TurnBox { height: auto; min-height: 3; max-height: 9; }
        #answers { height: 1fr; min-height: 4; }
        #chosen, #rejected { width: 1fr; height: 100%; }
        #chosen { border-title-color: $text-success; }
        #rejected { border-title-color: $text-error; }
        #details { height: 1; padding: 0 1; }
        #details Label { color: $text-muted; }
        #details Input { border: none; height: 1; padding: 0 1; background: $surface; }
        #details Input:focus { background: $panel; text-style: underline; }
        #tags { width: 1fr; }
        #weight { width: 9; }
        #findings { height: auto; max-height: 4; padding: 0 1; color: $text-warning; }
    }
    PairsPlace.-one-pane PairEditor #prompt { max-height: 7; }
    """

    class Changed(UIMessage):
        """The user has changed something."""

    class Left(UIMessage):
        """The user wants back to the list."""

    class ExternalEditor(UIMessage):
        """A text is to be edited in the user's own editor."""

        def __init__(self, box: TextBox) -> None:
            super().__init__()
            self.box = box

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self._draft: PairDraft | None = None
        self._ready = False
        self._locked = False
        self._wants_focus = False
        self._tags = StandIns()
        # The boxes in use: a box that was removed stays in the tree until the next turn of the loop.
        self._turns = [TurnBox({"role": "user", "content": ""})]
        # Kept by name, not looked up: whoever counts may ask when the screen is on its way out.
        self.chosen = TextBox("Chosen", id="chosen")
        self.rejected = TextBox("Rejected", id="rejected")
        self._tag_line = SafeInput(id="tags", placeholder="none; several with commas", compact=True)
        self._weight_line = SafeInput(id="weight", placeholder="1", compact=True)
        self._findings = Static(id="findings")

    def compose(self) -> ComposeResult:
        """Lay out prompt, answers, details."""
        with VerticalScroll(id="prompt", can_focus=False):
            yield from self._turns
        with Horizontal(id="answers"):
            yield self.chosen
            yield self.rejected
        with Horizontal(id="details"):
            yield Label("Tags ")
            yield self._tag_line
            yield Label(" Weight ")
            yield self._weight_line
        yield self._findings

    @property
    def turns(self) -> list[TurnBox]:
        """The boxes of the prompt."""
        return list(self._turns)

    # -- in and out

    @property
    def locked(self) -> bool:
        """Whether the texts can only be read: the row's line holds what an editor cannot show."""
        return self._locked

    @locked.setter
    def locked(self, locked: bool) -> None:
        self._locked = locked
        for box in (*self._turns, self.chosen, self.rejected) if self._ready else ():
            box.read_only = locked
        self.disabled = self._draft is None

    @property
    def ready(self) -> bool:
        """Whether the boxes are there; until then a draft that was loaded waits."""
        return self._ready

    def on_mount(self) -> None:
        """Show what was loaded before there was anything to show it in."""
        self._ready = True
        self.show_findings(())
        self.load(self._draft)
        self.locked = self._locked
        if self._wants_focus:
            self.focus_text()

    def on_unmount(self) -> None:
        """Let nobody ask for boxes that are gone: counting ends later than the screen."""
        self._ready = False

    def focus_text(self) -> None:
        """Focus what is to be written: the prompt where it is blank, else the chosen answer; at once or when ready."""
        self._wants_focus = not self._ready
        if self._ready:
            box = self.chosen if self._turns[-1].raw.strip() else self._turns[-1]
            self.call_after_refresh(box.focus)

    def load(self, draft: PairDraft | None) -> None:
        """Show a draft; None empties the editor and switches it off."""
        self._draft = draft
        self.disabled = draft is None
        if not self._ready:
            return
        if draft is None:
            from localdpo.data.rows import PairDraft

            draft = PairDraft()
        with self.prevent(TextArea.Changed, Input.Changed):
            self._set_turns(draft.messages or ({"role": "user", "content": ""},))
            for box, text in ((self.chosen, draft.chosen), (self.rejected, draft.rejected)):
                if box.raw != text:
                    box.raw = text
            self._tag_line.value = self._tags.start(", ".join(draft.tags))
            self._weight_line.value = "" if draft.weight == 1.0 else f"{draft.weight:g}"

    def _set_turns(self, messages: Sequence[Message]) -> None:
        for box, message in zip(self._turns, messages, strict=False):
            box.put(message)
        more = [TurnBox(message) for message in messages[len(self._turns) :]]
        self._drop_turns(self._turns[len(messages) :])
        self._add_turns(len(self._turns), more)

    def _add_turns(self, place: int, boxes: Sequence[TurnBox]) -> None:
        if boxes:
            before = self._turns[place] if place < len(self._turns) else None
            self._turns[place:place] = boxes
            self.query_one("#prompt").mount_all(boxes, before=before)

    def _drop_turns(self, boxes: Sequence[TurnBox]) -> None:
        for box in boxes:
            self._turns.remove(box)
            box.remove()

    @property
    def draft(self) -> PairDraft | None:
        """The pair as it stands; None when none is shown. A weight that is no number stays what it was."""
        if self._draft is None or not self._ready:
            return self._draft
        weight = self._draft.weight
        with suppress(ValueError):
            weight = float(self._weight_line.value.strip() or 1)
        raw = self._tags.raw(self._tag_line.value)
        tags = tuple(dict.fromkeys(tag.strip() for tag in raw.split(",") if tag.strip()))
        if ", ".join(self._draft.tags) == raw:
            tags = self._draft.tags  # a tag with a comma in it stays one
        messages = tuple(box.message for box in self._turns)
        if messages and messages[0]["role"] == "system" and not messages[0]["content"].strip():
            messages = messages[1:]
        return replace(
            self._draft, messages=messages, chosen=self.chosen.raw, rejected=self.rejected.raw, tags=tags, weight=weight
        )

    @property
    def weight_problem(self) -> str:
        """What is wrong with the weight as typed, as a sentence; empty when nothing is."""
        text = self._weight_line.value.strip()
        try:
            good = 0 <= float(text or 1) < float("inf")
        except ValueError:
            good = False
        return "" if good else f"Weight {text} is not a number, 0 or more; 1 is usual, 2 counts twice."

    def show_findings(self, lines: Sequence[str]) -> None:
        """Show what is wrong with the pair, one sentence a line."""
        self._findings.update(inert("\n".join(f"! {line}" for line in lines)))
        self._findings.display = bool(lines)

    # -- what the user does

    @on(TextArea.Changed)
    @on(Input.Changed)
    def _changed(self, event: TextArea.Changed | Input.Changed) -> None:
        event.stop()
        # Whether it differs from what is kept is found out when the typing rests: that reads all of the texts.
        if self._draft is not None:
            self.post_message(self.Changed())

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        event.stop()
        self.screen.focus_next()

    def accept(self, draft: PairDraft) -> None:
        """Take `draft`, which was read from here, as what later changes are measured against."""
        self._draft = draft

    def action_back(self) -> None:
        """Back to the list."""
        self.post_message(self.Left())

    def action_swap(self) -> None:
        """Swap the two answers; each box's own undo takes it back."""
        chosen, rejected = self.chosen.raw, self.rejected.raw
        for box, text in ((self.chosen, rejected), (self.rejected, chosen)):
            box.put_raw(text)

    def action_external(self) -> None:
        """Open the focused text in the user's own editor."""
        focused = self.screen.focused
        if isinstance(focused, TextBox):
            self.post_message(self.ExternalEditor(focused))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer only what can be done to the text in focus."""
        if action == "external":
            return isinstance(self.screen.focused, TextBox)
        if action == "remove_turn":
            return len(self._turns) > 2
        return self._draft is not None or action == "back"

    def action_system(self) -> None:
        """Add a system message, or take away an empty one."""
        first = self._turns[0]
        if first.message["role"] != "system":
            first = TurnBox({"role": "system", "content": ""})
            self._add_turns(0, [first])
        elif not first.raw.strip():
            self._drop_turns([first])
            first = self._turns[0]
        self.call_after_refresh(first.focus)
        self._turns_changed()

    def action_add_turn(self) -> None:
        """Add a reply and the next question."""
        boxes = [TurnBox({"role": role, "content": ""}) for role in ("assistant", "user")]
        self._add_turns(len(self._turns), boxes)
        self.call_after_refresh(boxes[0].focus)
        self._turns_changed()

    def action_remove_turn(self) -> None:
        """Take the last two turns away."""
        self._drop_turns(self._turns[-2:])
        self.call_after_refresh(self._turns[-1].focus)
        self._turns_changed()

    def _turns_changed(self) -> None:
        self.refresh_bindings()
        if self.draft != self._draft:
            self.post_message(self.Changed())
