"""One line of a file of pairs as something to edit: taken apart leniently, put together without touching the rest.

`read_row` never fails: a line that is no pair becomes a row with its problem and as much as could be read.
`write_row` changes only what an edit changed, in the form that the line has (plain texts, messages or whole
conversations). This module knows nothing about files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from localdpo.data.fields import Message
from localdpo.data.jsonl import MAX_LINE_BYTES, ProblemLog, parse_object
from localdpo.data.jsonl import Row as JsonRow
from localdpo.data.pairs import PreferencePair, pair_to_json, take_pair
from localdpo.data.rowtext import ABSENT, complete, set_values
from localdpo.errors import InputError, Problem

__all__ = ["PairDraft", "Row", "read_row", "repaired", "write_row"]

_OWN_KEYS = ("prompt", "chosen", "rejected", "system", "tags", "weight", "id", "tools")


@dataclass(frozen=True, slots=True)
class PairDraft:
    """A pair as it stands in an editor; it may be unfinished (blank answers, no prompt).

    `messages` is the prompt, with the system message first if there is one. `extra` holds the row's other keys.
    """

    messages: tuple[Message, ...] = ()
    chosen: str = ""
    rejected: str = ""
    tags: tuple[str, ...] = ()
    weight: float = 1.0
    extra: Mapping[str, Any] = field(default_factory=dict)
    id: str | None = None

    @classmethod
    def of(cls, prompt: str, chosen: str = "", rejected: str = "", system: str = "", **rest: Any) -> PairDraft:
        """A draft from plain texts."""
        turns = [Message(role="system", content=system)] if system else []
        return cls((*turns, Message(role="user", content=prompt)), chosen, rejected, **rest)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file of pairs.

    `prompt` is without the system message, which is `system` ("" for none). `problem` says why the row is no
    pair, `skipped` why it is one that teaches nothing; `code` is its name in `check.findings.KINDS`. `dirty` is whether
    it was changed since the file was read or saved. In a row with a problem, the other fields hold what could be read.
    """

    key: int
    prompt: tuple[Message, ...] = ()
    system: str = ""
    chosen: str = ""
    rejected: str = ""
    tags: tuple[str, ...] = ()
    weight: float = 1.0
    id: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None
    skipped: str | None = None
    code: str = ""
    dirty: bool = False

    @property
    def messages(self) -> tuple[Message, ...]:
        """The prompt with its system message."""
        return (Message(role="system", content=self.system), *self.prompt) if self.system else self.prompt

    def draft(self) -> PairDraft:
        """What an editor starts from."""
        return PairDraft(
            self.messages, self.chosen, self.rejected, self.tags, self.weight, dict(self.extra), self.id
        )  # fmt: skip


class _NotUtf8(ValueError):
    pass


def read_row(raw: bytes, key: int = 0, dirty: bool = False) -> Row:
    """Return the row that a line (without its line end) holds."""
    if len(raw) > MAX_LINE_BYTES:
        return Row(key, problem=f"is longer than {MAX_LINE_BYTES:,} bytes", code="schema", dirty=dirty)
    try:
        value = _value(raw)
    except ValueError as error:
        code = "encoding" if isinstance(error, _NotUtf8) else "schema"
        return Row(key, problem=str(error), code=code, dirty=dirty)
    log = ProblemLog()
    pair, skipped = take_pair(JsonRow(0, dict(value)), "", log)
    if pair is None:
        problem = log.first[0] if log.first else Problem("", "is not a pair")
        text = f"{problem.message}. {problem.fix}".removesuffix(". ")
        return replace(_guess(value, key), problem=text, code="schema", dirty=dirty)
    prompt, system = pair.prompt, ""
    if prompt and prompt[0]["role"] == "system" and set(prompt[0]) == {"role", "content"}:
        prompt, system = prompt[1:], prompt[0]["content"]
    reason, code = (skipped.reason, skipped.code) if skipped is not None else (None, "")
    return Row(
        key, prompt, system, pair.chosen, pair.rejected, pair.tags, pair.weight, pair.id, pair.extra,
        skipped=reason, code=code, dirty=dirty,
    )  # fmt: skip


def _value(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _NotUtf8(f"is not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start:,} of the line") from None
    return parse_object(text)


def _guess(value: Mapping[str, Any], key: int) -> Row:
    """Return what can be read of an object that is no pair."""

    def text(name: str) -> str:
        found = value.get(name)
        if isinstance(found, list) and found and isinstance(found[-1], dict):
            found = found[-1].get("content")
        return found if isinstance(found, str) else ""

    prompt = text("prompt")
    tags = value.get("tags")
    return Row(
        key,
        (Message(role="user", content=prompt),) if prompt else (),
        text("system"),
        text("chosen"),
        text("rejected"),
        tuple(tag for tag in tags if isinstance(tag, str) and tag.strip()) if isinstance(tags, list) else (),
        extra={name: inner for name, inner in value.items() if name not in _OWN_KEYS},
    )


def repaired(raw: bytes) -> bytes | None:
    """Return the line of a row that was cut off, closed so that it is JSON again; None when nothing is to be done."""
    if len(raw) > MAX_LINE_BYTES:
        return None
    text = raw.decode("utf-8", "ignore")  # half a character at the end is part of what was cut off
    try:
        parse_object(text)
    except ValueError:
        closed = complete(text)
        return None if closed is None else closed.encode("utf-8")
    return None


def write_row(raw: bytes | None, draft: PairDraft) -> bytes:
    """Return the line that holds `draft`: `raw` with what differs changed, or a new one where `raw` is None.

    Raises `InputError` for what no file of pairs can hold: half a surrogate pair, a blank tag, a weight that is
    not a number from 0, an `extra` that is not JSON or takes a key of the pair's own.
    """
    _check(draft)
    try:
        before = None if raw is None else _value(raw)
    except ValueError:
        before = None
    if raw is None or before is None:
        return _encoded(json.dumps(_new_row(draft), ensure_ascii=False, allow_nan=False))
    changes = _changes(before, read_row(raw), draft)
    return _encoded(set_values(raw.decode("utf-8"), changes)) if changes else raw


def _encoded(text: str) -> bytes:
    return text.encode("utf-8")


def _check(draft: PairDraft) -> None:
    problems = []
    if any(not tag.strip() for tag in draft.tags):
        problems.append(Problem("tags", "a tag is blank", "Leave it out"))
    if isinstance(draft.weight, bool) or not 0 <= draft.weight < math.inf:
        problems.append(Problem("weight", f"{draft.weight} is not a number, 0 or more"))
    taken = [key for key in draft.extra if key in _OWN_KEYS]
    if taken:
        problems.append(Problem("extra", f"{', '.join(taken)} belongs to the pair itself"))
    try:
        # Escaped, so that half a surrogate pair is met by the reader, which has a word for it.
        text = json.dumps([*draft.messages, draft.chosen, draft.rejected, draft.tags, draft.extra, draft.id])
        parse_object(f'{{"draft": {text}}}')
    except (ValueError, TypeError, RecursionError) as error:
        problems.append(Problem("pair", f"cannot be written as a row ({error})"))
    if problems:
        raise InputError(*problems)


def _as_pair(draft: PairDraft) -> PreferencePair:
    turns = draft.messages or (Message(role="user", content=""),)
    weight = float(draft.weight)
    return PreferencePair(turns, draft.chosen, draft.rejected, draft.id, draft.tags, weight, extra=dict(draft.extra))


def _new_row(draft: PairDraft) -> dict[str, Any]:
    row = pair_to_json(_as_pair(draft))
    # pair_to_json leaves out what is falsy.
    if draft.weight == 0:
        row["weight"] = 0.0
    if draft.id is not None:
        row["id"] = draft.id
    turns = draft.messages or (Message(role="user", content=""),)
    roles = [turn["role"] for turn in turns]
    plain = all(set(turn) == {"role", "content"} for turn in turns)
    # An unfinished row, with a blank prompt, becomes one of plain texts: it is written as one.
    if plain and (roles == ["user"] or (roles == ["system", "user"] and turns[0]["content"].strip())):
        row |= {"prompt": turns[-1]["content"], "chosen": draft.chosen, "rejected": draft.rejected}
        if len(turns) > 1:
            row["system"] = turns[0]["content"]
    return row


def _changes(before: Mapping[str, Any], row: Row, draft: PairDraft) -> dict[str, Any]:
    """Return the keys to set, with their values, so that a row reads as `draft`."""
    changes: dict[str, Any] = {}
    broken = row.problem is not None
    if broken or (row.messages, row.chosen, row.rejected) != (draft.messages, draft.chosen, draft.rejected):
        changes |= _new_texts(before, row, draft)
    if row.tags != draft.tags or (broken and "tags" in before):
        changes["tags"] = list(draft.tags) or ABSENT
    if row.weight != draft.weight or (broken and "weight" in before):
        changes["weight"] = draft.weight if draft.weight != 1.0 or "weight" in before else ABSENT
    if row.id != draft.id:
        changes["id"] = ABSENT if draft.id is None else draft.id
    changes |= {key: ABSENT for key in row.extra if key not in draft.extra}
    changes |= {key: value for key, value in draft.extra.items() if key not in row.extra or row.extra[key] != value}
    return {key: value for key, value in changes.items() if value is not ABSENT or key in before}


def _new_texts(before: Mapping[str, Any], row: Row, draft: PairDraft) -> dict[str, Any]:
    """Return prompt, system and answers in the form that the row has, or in one that holds the draft."""
    plain = _new_row(draft)
    wanted = {name: plain.get(name, ABSENT) for name in ("prompt", "system", "chosen", "rejected")}
    conversations = row.problem is None and "prompt" not in before
    listed = row.problem is None and isinstance(before.get("prompt"), list)
    if conversations or isinstance(before.get("chosen"), list) or isinstance(before.get("rejected"), list) or listed:
        wanted = _in_messages(before, draft, conversations)
    return {name: value for name, value in wanted.items() if before.get(name, ABSENT) != value}


def _in_messages(before: Mapping[str, Any], draft: PairDraft, conversations: bool) -> dict[str, Any]:
    turns = [dict(turn) for turn in draft.messages]
    wanted: dict[str, Any] = {"system": ABSENT}
    if isinstance(before.get("system"), str) and turns and turns[0]["role"] == "system":
        wanted["system"] = turns.pop(0)["content"]
    whole = conversations or _starts_conversation(before.get("chosen"))
    if not conversations:
        text_stays = isinstance(before.get("prompt"), str) and [turn["role"] for turn in turns] == ["user"]
        wanted["prompt"] = turns[0]["content"] if text_stays else turns
    for name, content in (("chosen", draft.chosen), ("rejected", draft.rejected)):
        wanted[name] = _answer(before.get(name), content, turns if whole else [])
    return wanted


def _starts_conversation(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], dict) and value[0].get("role") != "assistant"
    )


def _answer(before: Any, content: str, turns: list[dict[str, Any]]) -> Any:
    """Return an answer in the shape of what stood there; further keys of its message are kept."""
    if isinstance(before, str) and not turns:
        return content
    last = before[-1] if isinstance(before, list) and before and isinstance(before[-1], dict) else {}
    return [*turns, cast(dict[str, Any], {**last, "role": "assistant", "content": content})]
