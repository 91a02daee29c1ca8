"""A chat with the base, the tuned model or both: what was said, what is asked next, and its JSON.

`localdpo chat` has a conversation of its own that ends with its process; this one is kept, goes on later, and
remembers of every reply what made it, so that a reply can become a pair. It knows no screens, hosts or files.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

from localdpo.data.fields import Message
from localdpo.data.provenance import AnswerOrigin, now

__all__ = ["DEFAULT_SAMPLING", "SIDES", "Chat", "Mode", "Reply", "Side", "Turn", "new_id"]

Side = Literal["base", "tuned"]
Mode = Literal["both", "tuned", "base"]
SIDES: tuple[Side, ...] = ("base", "tuned")
DEFAULT_SAMPLING: Mapping[str, Any] = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 512}
_FORMAT = 1


def new_id() -> str:
    """A name for a chat that sorts by time and never comes twice."""
    return time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + secrets.token_hex(3)


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer as the model gave it, white space at its ends aside. `stopped` when it was cut short by hand."""

    text: str
    origin: AnswerOrigin | None = None
    tokens_per_second: float = 0.0
    stopped: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        row: dict[str, Any] = {"text": self.text, "tokens_per_second": round(self.tokens_per_second, 1)}
        row |= {"origin": self.origin.to_json()} if self.origin is not None else {}
        return row | ({"stopped": True} if self.stopped else {})

    @classmethod
    def from_json(cls, value: Any) -> Reply | None:
        """What `to_json` wrote, None for anything else."""
        if not isinstance(value, Mapping) or not isinstance(value.get("text"), str):
            return None
        speed = value.get("tokens_per_second")
        return cls(
            value["text"],
            AnswerOrigin.from_json(value.get("origin")),
            float(speed) if isinstance(speed, int | float) else 0.0,
            value.get("stopped") is True,
        )


@dataclass(slots=True)
class Turn:
    """A question and the answers it got, by side."""

    prompt: str
    replies: dict[Side, Reply] = field(default_factory=dict)

    def spoken(self, side: Side) -> str:
        """What `side` is taken to have answered: its own reply or, where it was not asked, the other's."""
        reply = self.replies.get(side) or next(iter(self.replies.values()), None)
        return reply.text if reply is not None else ""


@dataclass(slots=True)
class Chat:
    """A conversation. `run` is the folder of the tuned model's run as the workspace names it, "" for none."""

    id: str = field(default_factory=new_id)
    model: str = ""
    run: str = ""
    mode: Mode = "both"
    system: str = ""
    sampling: dict[str, Any] = field(default_factory=lambda: dict(DEFAULT_SAMPLING))
    turns: list[Turn] = field(default_factory=list)
    started: str = field(default_factory=now)

    @property
    def title(self) -> str:
        """The first question, for lists; it may be long and hold anything."""
        return self.turns[0].prompt if self.turns else ""

    @property
    def sides(self) -> tuple[Side, ...]:
        """Who answers the next question; without a run the base does."""
        if not self.run:
            return ("base",)
        return SIDES if self.mode == "both" else (self.mode,)

    def messages(self, side: Side, number: int | None = None) -> tuple[Message, ...]:
        """What `side` is asked at turn `number` (the last): system message, all that came before, the question.

        Turns that nobody answered are left out: two questions in a row are more than some templates take.
        """
        last = len(self.turns) - 1 if number is None else number
        messages = [Message(role="system", content=self.system)] if self.system.strip() else []
        for turn in self.turns[:last]:
            answer = turn.spoken(side)
            if answer:
                messages.append(Message(role="user", content=turn.prompt))
                messages.append(Message(role="assistant", content=answer))
        return (*messages, Message(role="user", content=self.turns[last].prompt))

    def ask(self, prompt: str) -> Turn:
        """Add a question."""
        self.turns.append(Turn(prompt))
        return self.turns[-1]

    def fork(self, number: int) -> Chat:
        """A new chat with the turns before `number`: to ask something else there and lose nothing of this one."""
        kept = [Turn(turn.prompt, dict(turn.replies)) for turn in self.turns[:number]]
        return replace(self, id=new_id(), turns=kept, started=now(), sampling=dict(self.sampling))

    def emptied(self) -> Chat:
        """A new chat with the same settings."""
        return self.fork(0)

    def text(self) -> str:
        """Everything that was said, to search in."""
        said = [self.system]
        for turn in self.turns:
            said += [turn.prompt, *(reply.text for reply in turn.replies.values())]
        return "\n".join(said)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "format": _FORMAT,
            "id": self.id,
            "started": self.started,
            "model": self.model,
            "run": self.run,
            "mode": self.mode,
            "system": self.system,
            "sampling": dict(self.sampling),
            "turns": [
                {"prompt": turn.prompt, "replies": {side: reply.to_json() for side, reply in turn.replies.items()}}
                for turn in self.turns
            ],
        }

    @classmethod
    def from_json(cls, value: Any) -> Chat | None:
        """What `to_json` wrote, None for anything else; single values of a wrong type count as absent."""
        if not isinstance(value, Mapping) or value.get("format") != _FORMAT or not isinstance(value.get("id"), str):
            return None
        mode, sampling = value.get("mode"), value.get("sampling")
        turns = value.get("turns")
        return cls(
            id=value["id"],
            model=_text(value.get("model")),
            run=_text(value.get("run")),
            mode=cast(Mode, mode) if mode in get_args(Mode) else "both",
            system=_text(value.get("system")),
            sampling={**DEFAULT_SAMPLING, **(sampling if isinstance(sampling, Mapping) else {})},
            turns=[turn for turn in map(_turn, turns) if turn] if isinstance(turns, Sequence) else [],
            started=_text(value.get("started")),
        )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _turn(value: Any) -> Turn | None:
    if not isinstance(value, Mapping) or not isinstance(value.get("prompt"), str):
        return None
    replies = value.get("replies")
    found: dict[Side, Reply] = {
        side: reply
        for side in SIDES
        if isinstance(replies, Mapping) and (reply := Reply.from_json(replies.get(side))) is not None
    }
    return Turn(value["prompt"], found)
