"""Preference pairs as people write them: JSONL in, `PreferencePair` out, every bad row named.

Three forms are read, with TRL's keys: `prompt`, `chosen` and `rejected` as strings; the same as lists of
messages; and full conversations in `chosen` and `rejected`, whose common start is the prompt. Optional keys
are `system`, `tools`, `tags`, `weight` and `id`; unknown ones are kept. This module knows nothing about
tokens or templates.
"""

from __future__ import annotations

import hashlib
import json
import marshal
import shlex
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localdpo.data.fields import Kind, Message, RowFields, blank_prompt
from localdpo.data.importers.source import require_json_lines
from localdpo.data.jsonl import ProblemLog, Progress, Row, read_rows
from localdpo.data.rowform import RowRefused, implicit_prompt, plain_row
from localdpo.data.shelf import Shelf
from localdpo.errors import InputError, Problem, first_problems

__all__ = [
    "Kind",
    "Message",
    "PairFile",
    "PreferencePair",
    "PromptRow",
    "Skipped",
    "collect_pairs",
    "has_carriage_return",
    "listed",
    "pair_shelf",
    "pair_to_json",
    "parse_pair",
    "prompt_key",
    "read_pairs",
    "read_prompts",
    "scan_pairs",
    "take_pair",
]


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A conversation up to the answer, the answer that is wanted and the one that is not.

    `prompt` ends in a user's (or a tool's) turn and holds the system message, if any, first. `kind` is
    `retain` for a pair that keeps an answer as it is. `line` is 1-based in `source`; both are for messages
    only.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    id: str | None = None
    tags: tuple[str, ...] = ()
    weight: float = 1.0
    kind: Kind = "preference"
    tools: tuple[dict[str, Any], ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    line: int = field(default=0, compare=False)
    source: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt without answers, to retain or to probe; `accept` lists the answers that count as right."""

    prompt: tuple[Message, ...]
    accept: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    id: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    line: int = field(default=0, compare=False)
    source: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that was left out, and why; `code` is the check's name for that, where it has one."""

    source: str
    line: int
    reason: str
    code: str = field(default="", compare=False)

    def __str__(self) -> str:
        return str(Problem(f"{self.source}:{self.line}", self.reason))


@dataclass(frozen=True, slots=True)
class PairFile:
    """What a file of pairs holds: the usable pairs, the rows left out, and what looks like a mistake."""

    pairs: list[PreferencePair]
    skipped: list[Skipped]
    warnings: list[Problem]


_FIELDS = tuple(PreferencePair.__dataclass_fields__)


class _Skip(Exception):
    """The row is well-formed but teaches nothing."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def listed(lines: Sequence[int], limit: int = 10, place: str = "line") -> str:
    """Return line numbers for a message: `lines 3, 5 and 9`, at most `limit` of them."""
    shown = [str(line) for line in lines[:limit]]
    if len(lines) > limit:
        return f"{place}s {', '.join(shown)} and {len(lines) - limit:,} more"
    return f"{place} {shown[0]}" if len(shown) == 1 else f"{place}s {', '.join(shown[:-1])} and {shown[-1]}"


def prompt_key(messages: Iterable[Message]) -> bytes:
    """Return a digest, equal for prompts whose turns are the same but for white space at the ends."""
    turns = [[message["role"], message["content"].strip()] for message in messages]
    return hashlib.blake2b(json.dumps(turns).encode(), digest_size=16).digest()


def read_pairs(path: str | Path, progress: Progress | None = None) -> PairFile:
    """Read a file of preference pairs.

    Rows that teach nothing (a blank answer, twice the same answer, weight 0) are skipped and named;
    repeated and contradictory pairs are kept and warned about. Raises `InputError` for broken rows, the
    first ten named and the rest counted, and when no pair is left.
    """
    pairs: list[PreferencePair] = []
    skipped, warnings = collect_pairs(path, pairs.append, progress)
    return PairFile(pairs, skipped, warnings)


def collect_pairs(
    path: str | Path, keep: Callable[[PreferencePair], None], progress: Progress | None = None
) -> tuple[list[Skipped], list[Problem]]:
    """Call `keep` with every usable pair of a file, in order; returns the rest of what `read_pairs` does.

    Raises as it does, by then having called `keep` for the pairs that are right.
    """
    require_json_lines(path)
    log = ProblemLog()
    kept = 0
    skipped: list[Skipped] = []
    repeats, returns = _Repeats(str(path)), array("q")
    for row in scan_pairs(path, log, progress):
        if isinstance(row, Skipped):
            skipped.append(row)
        else:
            keep(row)
            kept += 1
            repeats.add(row)
            if has_carriage_return(row):
                returns.append(row.line)
    log.raise_if_any()
    if not kept:
        raise _nothing_left(str(path), skipped, "pairs")
    return skipped, [*repeats.warnings(), *_returns_warning(str(path), returns)]


def pair_shelf() -> Shelf[PreferencePair]:
    """An empty shelf for pairs: as many as there are, at a few bytes of memory each."""
    # Written and read by this process alone; unlike JSON, marshal leaves every text and tuple as it is.
    return Shelf(lambda pair: marshal.dumps([getattr(pair, name) for name in _FIELDS]), _from_shelf)


def _from_shelf(data: bytes) -> PreferencePair:
    return PreferencePair(*marshal.loads(data))


def parse_pair(row: Row, source: str, log: ProblemLog) -> PreferencePair | Skipped | None:
    """Return the pair that a row of `source` holds; what was skipped and why; None when its problems are in `log`.

    The row's own object is taken apart.
    """
    before = log.total
    try:
        pair = _pair(RowFields(Row(row.line, plain_row(row.value)), source, log))
    except (RowRefused, _Skip) as skip:
        return Skipped(source, row.line, str(skip), skip.code)
    return pair if log.total == before else None


def scan_pairs(
    path: str | Path, log: ProblemLog, progress: Progress | None = None
) -> Iterator[PreferencePair | Skipped]:
    """Yield the rows of a file of pairs one at a time: a pair, or a row that teaches nothing.

    Broken rows go to `log` and are passed over. Raises `InputError` when the file cannot be read at all.
    """
    for row in read_rows(path, log, progress):
        pair = parse_pair(row, str(path), log)
        if pair is not None:
            yield pair


def read_prompts(path: str | Path, progress: Progress | None = None) -> list[PromptRow]:
    """Read a file of prompts: rows with `prompt` and optionally `system`, `accept`, `tags` and `id`.

    Raises `InputError` for broken rows, the first ten named and the rest counted, and when there is no row.
    """
    require_json_lines(path)
    log = ProblemLog()
    prompts = []
    for row in read_rows(path, log, progress):
        fields = RowFields(row, str(path), log)
        if not fields.require("prompt"):
            continue
        prompt = fields.prompt_turns()
        accept = fields.texts("accept")
        rest = fields.common()
        if prompt is None or not fields.answerable(prompt):
            continue
        if blank_prompt(prompt):
            fields.bad("prompt", "is blank")
        prompts.append(PromptRow(prompt, accept, *rest, dict(fields.values), row.line, str(path)))
    log.raise_if_any()
    if not prompts:
        raise _nothing_left(str(path), [], "prompts")
    return prompts


def _nothing_left(name: str, skipped: Sequence[Skipped], what: str) -> InputError:
    if not skipped:
        return InputError(Problem(name, f"0 {what}: the file is empty", "Write one JSON object a line"))
    reasons = [Problem(f"{name}:{skip.line}", skip.reason) for skip in skipped]
    message = f"0 {what} are left: all {len(skipped):,} rows were skipped"
    return InputError(Problem(name, message), *first_problems(reasons))


def _pair(fields: RowFields) -> PreferencePair | None:
    """Return the row's pair, None when problems were logged. Raises `_Skip` when it teaches nothing."""
    pair = _taken(fields)
    if pair is not None:
        _skip_if_useless(pair.prompt, pair.chosen, pair.rejected, pair.weight)
    return pair


def take_pair(row: Row, source: str, log: ProblemLog) -> tuple[PreferencePair | None, Skipped | None]:
    """Return the pair of a row even if it teaches nothing, and then why it would be skipped.

    There is no pair when the row's problems are in `log`. The row's own object is taken apart.
    """
    before = log.total
    try:
        pair = _taken(RowFields(Row(row.line, plain_row(row.value)), source, log))
    except RowRefused as refusal:
        log.add(f"{source}:{row.line}", str(refusal))
        return None, None
    if pair is None or log.total > before:
        return None, None
    try:
        _skip_if_useless(pair.prompt, pair.chosen, pair.rejected, pair.weight)
    except _Skip as skip:
        return pair, Skipped(source, row.line, str(skip), skip.code)
    return pair, None


def _taken(fields: RowFields) -> PreferencePair | None:
    if not fields.require("chosen", "rejected"):
        return None
    _tell_prompt(fields.values)
    if isinstance(fields.values["chosen"], str) and not fields.require("prompt"):
        return None
    before = fields.log.total
    prompt = fields.prompt_turns()
    chosen, rejected = fields.turns("chosen", "assistant"), fields.turns("rejected", "assistant")
    if prompt is None or chosen is None or rejected is None:
        return None
    parts = _split(fields, prompt, chosen, rejected)
    weight, tools, kind = fields.weight(), fields.tools(), fields.kind()
    tags, identity = fields.common()
    if parts is None or fields.log.total > before:
        return None
    turns, good, bad = parts
    line, source = fields.row.line, fields.name
    return PreferencePair(
        turns, good, bad, identity, tags, weight, kind, tools, dict(fields.values), line=line, source=source
    )


def _tell_prompt(values: dict[str, Any]) -> None:
    """TRL's implicit prompt: of two whole texts, what both begin with."""
    texts = values.get("chosen"), values.get("rejected")
    if values.get("prompt") is None and isinstance(texts[0], str) and isinstance(texts[1], str):
        parts = implicit_prompt(texts[0], texts[1])
        if parts is not None:
            values |= dict(zip(("prompt", "chosen", "rejected"), parts, strict=True))


def _split(
    fields: RowFields, prompt: tuple[Message, ...], chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[tuple[Message, ...], str, str] | None:
    """Return prompt turns and both answers: the answers are the one turn in which the conversations part."""
    whole = [_conversation(prompt, answer) for answer in (chosen, rejected)]
    for key, conversation in zip(("chosen", "rejected"), whole, strict=True):
        if conversation is None:
            fix = "Give the answer alone, or the conversation from its first turn"
            fields.bad(key, 'is a conversation that does not begin with "prompt"', fix)
    first, second = whole
    if first is None or second is None:
        return None
    shared = _common_length(first, second)
    answers = first[shared:], second[shared:]
    for key, answer in zip(("chosen", "rejected"), answers, strict=True):
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            fix = "Both conversations must be the same but for their last turn, the assistant's"
            fields.bad(key, f"goes on with {len(answer)} turns where it parts from the other", fix)
            return None
        if answer[0].get("tool_calls"):
            fields.bad(key, "is a tool call, which cannot be learned from yet", "Write the answer as text")
            return None
    if not fields.answerable(first[:shared]):
        return None
    return first[:shared], answers[0][0]["content"], answers[1][0]["content"]


def _conversation(prompt: tuple[Message, ...], answer: tuple[Message, ...]) -> tuple[Message, ...] | None:
    if answer[0]["role"] == "assistant":
        return prompt + answer
    # Some data sets give the prompt and the whole conversation: both must say the same.
    return answer if answer[: len(prompt)] == prompt else None


def _common_length(first: Sequence[Message], second: Sequence[Message]) -> int:
    """Return how many turns two conversations share, leaving each at least its last one."""
    limit = min(len(first), len(second)) - 1
    return next((n for n in range(limit) if first[n] != second[n]), limit)


def _skip_if_useless(prompt: Sequence[Message], chosen: str, rejected: str, weight: float) -> None:
    if blank_prompt(prompt):
        raise _Skip("blank", "the prompt is blank")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer.strip():
            raise _Skip("blank", f"the {name} answer is blank")
    if chosen == rejected:
        raise _Skip("identical", "both answers are the same")
    if chosen.strip() == rejected.strip():
        raise _Skip("identical", "the answers differ only in white space at their ends")
    if weight == 0:
        raise _Skip("weight_zero", "its weight is 0")


@dataclass(slots=True)
class _Repeats:
    """Finds pairs that repeat or contradict earlier ones, and ids used twice; keeps digests, not texts."""

    name: str
    seen: set[bytes] = field(default_factory=set)
    ids: set[str] = field(default_factory=set)
    repeated: list[int] = field(default_factory=list)
    contradicting: list[int] = field(default_factory=list)
    shared_ids: list[int] = field(default_factory=list)

    def add(self, pair: PreferencePair) -> None:
        prompt = prompt_key(pair.prompt)
        chosen, rejected = _digest(pair.chosen), _digest(pair.rejected)
        key = prompt + chosen + rejected
        if key in self.seen:
            self.repeated.append(pair.line)
        if prompt + rejected + chosen in self.seen:
            self.contradicting.append(pair.line)
        self.seen.add(key)
        if pair.id is not None:
            if pair.id in self.ids:
                self.shared_ids.append(pair.line)
            self.ids.add(pair.id)

    def warnings(self) -> list[Problem]:
        kinds = (
            (
                self.repeated,
                "an earlier pair is repeated",
                "Repeated pairs count twice: delete them, or use weight",
            ),
            (self.contradicting, "an earlier pair's answers are swapped", "Keep the one you mean"),
            (self.shared_ids, "an id is used again", "Give every pair its own id"),
        )
        return [
            Problem(
                self.name,
                f"{what} {len(lines):,} {'time' if len(lines) == 1 else 'times'} ({listed(lines)})",
                fix,
            )
            for lines, what, fix in kinds
            if lines
        ]


def has_carriage_return(pair: PreferencePair) -> bool:
    """Whether a text holds a line end other than \\n, which a tool or a terminal wrote and nobody typed."""
    return any("\r" in text for text in (pair.chosen, pair.rejected, *(turn["content"] for turn in pair.prompt)))


def _returns_warning(name: str, lines: Sequence[int]) -> list[Problem]:
    if not lines:
        return []
    message = f"carriage returns stand in the texts of {len(lines):,} rows ({listed(lines)}), and would be learned"
    return [Problem(name, message, f"`localdpo pairs check {shlex.quote(name)} --fix` makes them line breaks")]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.strip().encode(), digest_size=16).digest()


def pair_to_json(pair: PreferencePair) -> dict[str, Any]:
    """Return the row that `read_pairs` reads back as an equal pair, in the plainest form that holds it."""
    row: dict[str, Any] = {}
    turns = list(pair.prompt)
    plain = all(set(turn) == {"role", "content"} and turn["content"].strip() for turn in turns)
    if plain and [turn["role"] for turn in turns] in (["user"], ["system", "user"]):
        row["prompt"] = turns[-1]["content"]
        row |= {"chosen": pair.chosen, "rejected": pair.rejected}
        if len(turns) > 1:
            row["system"] = turns[0]["content"]
    else:
        row["prompt"] = [dict(turn) for turn in turns]
        row["chosen"] = [{"role": "assistant", "content": pair.chosen}]
        row["rejected"] = [{"role": "assistant", "content": pair.rejected}]
    optional = {
        "id": pair.id,
        "tags": list(pair.tags),
        "weight": None if pair.weight == 1.0 else pair.weight,
        "kind": None if pair.kind == "preference" else pair.kind,
        "tools": list(pair.tools),
    }
    return row | {key: value for key, value in optional.items() if value} | pair.extra
