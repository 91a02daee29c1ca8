"""How the terminal UI and its model host speak: one JSON object a line, over the host's stdin and stdout.

Every message has a `type`. What is asked has an `id`, a number the asker makes up, which every answer to it carries.

    asked             fields besides id                                   answered by
    load              model, quantize, memory                             progress…, then loaded or failed
    generate          messages, adapter, options, candidates              for each candidate: started, delta…, ended;
                                                                          failed when nothing could begin
    cancel            (the id of what is not wanted any more)             the ended of what it cancels
    count_tokens      model, rows                                         counted or failed

The host begins with `hello`. `adapter` is the folder of an adapter, null for the base: it may change from one request
to the next, the base is loaded once. Candidate k samples with seed + k, so that each can be made again alone. Texts are
as the model wrote them: whoever shows them makes them inert. Deltas come in batches of some tens of milliseconds. A
failure carries the sentences of a `LocalDPOError`.

A line is at most `MAX_LINE_BYTES` long; what is longer, is no strict JSON, or has a field that is missing, unknown or
of the wrong type is refused with a `ProtocolError` that says so. This module knows nothing about models, pipes or
screens, and loads no mlx.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from localdpo.data.jsonl import parse_object
from localdpo.errors import EnvironmentFault, InputError, LocalDPOError, Problem

__all__ = [
    "MAX_CANDIDATES",
    "MAX_LINE_BYTES",
    "PROTOCOL",
    "Cancel",
    "CountRow",
    "CountTokens",
    "Counted",
    "Delta",
    "Ended",
    "Failed",
    "Generate",
    "Hello",
    "Load",
    "Loaded",
    "Message",
    "Progress",
    "ProtocolError",
    "RowCount",
    "Started",
    "decode",
    "encode",
    "ended_error",
    "failure",
]

PROTOCOL = 1
"""The version; a UI speaks to a host of its own version only."""
MAX_LINE_BYTES = 16 << 20
MAX_CANDIDATES = 64
MAX_COUNT_ROWS = 4096
_MAX_ID = 2**53

EndReason = Literal["stop", "length", "cancelled", "error"]


class ProtocolError(ValueError):
    """A line that is no message of this protocol; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What all messages share."""

    type: ClassVar[str] = ""
    id: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load(Message):
    """Load a base, in place of the one there is; a model that is not on this machine is fetched."""

    type: ClassVar[str] = "load"
    model: str
    quantize: int | None = None
    memory: Literal["auto", "fast", "lean"] = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate(Message):
    """Answer `messages` `candidates` times. `options` are fields of `SamplingOptions`."""

    type: ClassVar[str] = "generate"
    messages: list[dict[str, Any]]
    adapter: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    candidates: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel(Message):
    """What was asked with this id is not wanted any more."""

    type: ClassVar[str] = "cancel"


@dataclass(frozen=True, slots=True, kw_only=True)
class CountRow:
    """A prompt and answers to it, to be counted as training counts them."""

    messages: list[dict[str, Any]]
    answers: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class CountTokens(Message):
    """Count the tokens of rows with the tokenizer of `model`, whose weights need not be loaded."""

    type: ClassVar[str] = "count_tokens"
    model: str
    rows: list[CountRow]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello(Message):
    """The host is there."""

    type: ClassVar[str] = "hello"
    protocol: int
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress(Message):
    """What takes so long, in a sentence."""

    type: ClassVar[str] = "progress"
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded(Message):
    """The base is loaded. `context` is how many tokens prompt and answer may have together."""

    type: ClassVar[str] = "loaded"
    model: str
    fingerprint: str
    parameters: int
    context: int
    device: str
    memory: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(Message):
    """A candidate's prompt is being read."""

    type: ClassVar[str] = "started"
    candidate: int = 0
    prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta(Message):
    """More text of a candidate; `tokens` so far, and how many a second."""

    type: ClassVar[str] = "delta"
    candidate: int = 0
    text: str
    tokens: int
    tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended(Message):
    """A candidate is over. `problems` say why when the reason is "error"."""

    type: ClassVar[str] = "ended"
    candidate: int = 0
    reason: EndReason
    tokens: int = 0
    tokens_per_second: float = 0.0
    problems: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCount:
    """Tokens of a prompt and of each answer, its end of turn among them; `problem` when they cannot be told."""

    prompt: int = 0
    answers: list[int] = field(default_factory=list)
    problem: str | None = None

    @property
    def longest(self) -> int:
        """The prompt with the longest answer: what `max_length` limits."""
        return self.prompt + max(self.answers, default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted(Message):
    """One count for each row."""

    type: ClassVar[str] = "counted"
    rows: list[RowCount]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Message):
    """It did not work. `exit_code` is that of the error's class; 1 is a mistake of the program."""

    type: ClassVar[str] = "failed"
    problems: list[dict[str, Any]]
    exit_code: int

    def error(self) -> LocalDPOError:
        """The error that the host met."""
        return _error(self.problems, self.exit_code)


def _error(problems: Iterable[Mapping[str, Any]], exit_code: int) -> LocalDPOError:
    kinds: dict[int, type[LocalDPOError]] = {2: InputError, 3: EnvironmentFault}
    found = [Problem(*(str(problem.get(key, "")) for key in ("where", "message", "fix"))) for problem in problems]
    return kinds.get(exit_code, LocalDPOError)(*found)


def ended_error(message: Ended) -> LocalDPOError | None:
    """Return why a candidate ended, when that was an error."""
    return _error(message.problems, message.exit_code) if message.reason == "error" else None


def failure(error: BaseException) -> dict[str, Any]:
    """Return `problems` and `exit_code` of an error: its sentences, or that the program made a mistake."""
    if isinstance(error, LocalDPOError):
        return {"problems": [asdict(problem) for problem in error.problems], "exit_code": error.exit_code}
    what = f"internal error in the model host: {type(error).__name__}: {error}"
    fix = "Please report it"
    if isinstance(error, MemoryError) or "alloc" in str(error).lower():
        what, fix = "the model does not fit into memory", "Choose a smaller model, or close other programs"
        return {"problems": [{"where": "", "message": what, "fix": fix}], "exit_code": EnvironmentFault.exit_code}
    return {"problems": [{"where": "", "message": what[:2000], "fix": fix}], "exit_code": 1}


_TYPES: dict[str, type[Message]] = {
    cls.type: cls
    for cls in (Load, Generate, Cancel, CountTokens, Hello, Progress, Loaded, Started, Delta, Ended, Counted, Failed)
}


def encode(message: Message) -> bytes:
    """Return a message as a line. Raises ProtocolError when it would be too long.

    Half a surrogate pair, which no JSON reader takes, becomes a question mark.
    """
    text = json.dumps({"type": message.type, **asdict(message)}, ensure_ascii=False, separators=(",", ":"))
    line = text.encode("utf-8", "replace") + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise ProtocolError(f"a message of {len(line):,} bytes is longer than {MAX_LINE_BYTES:,}")
    return line


def decode(line: bytes) -> Message:
    """Return the message on a line, every field checked. Raises ProtocolError."""
    if len(line) > MAX_LINE_BYTES:
        raise ProtocolError(f"a line is longer than {MAX_LINE_BYTES:,} bytes")
    try:
        value = parse_object(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise ProtocolError("a line is not UTF-8") from None
    except ValueError as error:
        raise ProtocolError(f"a line {error}") from None
    name = value.pop("type", None)
    cls = _TYPES.get(name) if isinstance(name, str) else None
    if cls is None:
        raise ProtocolError(f"there is no message {name!r:.60}")
    message: Message = _made(cls, value, str(name))
    if not 0 <= message.id <= _MAX_ID:
        raise ProtocolError(f"{name}: id {message.id} is not within 0 to 2^53")
    _check_sizes(message)
    return message


def _check_sizes(message: Message) -> None:
    if isinstance(message, Generate):
        if not 1 <= message.candidates <= MAX_CANDIDATES:
            raise ProtocolError(f"generate: {message.candidates} candidates are not within 1 to {MAX_CANDIDATES}")
        _check_turns(message.messages, "generate")
    if isinstance(message, CountTokens):
        if len(message.rows) > MAX_COUNT_ROWS:
            raise ProtocolError(f"count_tokens: more than {MAX_COUNT_ROWS} rows")
        for row in message.rows:
            _check_turns(row.messages, "count_tokens")


def _check_turns(messages: list[dict[str, Any]], where: str) -> None:
    for turn in messages:
        if not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
            raise ProtocolError(f"{where}: a message needs a role and a content, both text")


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {entry.name: hints[entry.name] for entry in fields(cls)}


def _made(cls: type, value: Mapping[str, Any], where: str) -> Any:
    hints = _hints(cls)
    unknown = [key for key in value if key not in hints]
    if unknown:
        raise ProtocolError(f"{where}: {unknown[0]!r:.60} is not a field of it")
    required = {entry.name for entry in fields(cls) if entry.default is MISSING and entry.default_factory is MISSING}
    missing = sorted(required - set(value))
    if missing:
        raise ProtocolError(f"{where}: {missing[0]!r} is missing")
    return cls(**{key: _checked(item, hints[key], f"{where}.{key}") for key, item in value.items()})


def _checked(value: Any, hint: Any, where: str) -> Any:
    """Return `value` when it is what `hint` says, objects made into their classes. Raises ProtocolError."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        inner = next(argument for argument in arguments if argument is not type(None))
        return None if value is None else _checked(value, inner, where)
    if origin is Literal and value in arguments:
        return value
    if origin is list and isinstance(value, list):
        return [_checked(item, arguments[0], where) for item in value]
    if origin is dict and isinstance(value, dict):
        return value
    if hint in (CountRow, RowCount) and isinstance(value, dict):
        return _made(hint, value, where)
    return _plain(value, hint, where)


def _plain(value: Any, hint: Any, where: str) -> Any:
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if hint in (str, int) and type(value) is hint:
        return value
    raise ProtocolError(f"{where}: {value!r:.60} is of the wrong type")
