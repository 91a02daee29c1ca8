"""OpenAI's chat and text completion bodies, in and out, as far as localdpo serves them.

What a request asks for and cannot have is refused by name; nothing that would change the answer is passed over in
silence. Fields that change no answer (`user`, `metadata`, …) are accepted and not used. Knows nothing of sockets,
models or tokens; what it makes is plain JSON values.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from localdpo.data.jsonl import parse_object
from localdpo.data.pairs import Message
from localdpo.errors import InputError
from localdpo.model.generate import SamplingOptions

__all__ = ["ApiError", "Ask", "Reply", "StopFilter", "error_body", "model_body", "parse_chat", "parse_text"]

Kind = Literal["chat", "text"]
FinishReason = Literal["stop", "length"]
BodyT = TypeVar("BodyT", bound="_Body")

# The only value that is served, where OpenAI's API has a choice; null and a missing key are fine as well.
_ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
_UNUSED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
)  # fmt: skip
_WORDS = {
    "missing": "is missing",
    "extra_forbidden": "is not a parameter of this server",
    "string_type": "must be a string",
    "int_type": "must be a whole number",
    "bool_type": "must be true or false",
}


class ApiError(Exception):
    """A request that is refused, in the words and the shape that OpenAI's clients expect."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, kind: str = ""
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")


def error_body(error: ApiError) -> dict[str, Any]:
    """The body of a refusal."""
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}}


def _text_of(content: Any) -> Any:
    """The text of a message whose content may be a list of text parts."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError("content parts must be of type 'text': this server answers text only")
        texts.append(part["text"])
    return "".join(texts)


class _Turn(BaseModel):
    # A name or a refusal that a client repeats has no place in most templates, and changes nothing.
    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text_of)]

    def message(self) -> Message:
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool = False


def _stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    model: str
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=4), BeforeValidator(_stops)
    ] = []
    # Not OpenAI's, but what mlx-lm's, llama.cpp's and vLLM's servers call them.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class _ChatBody(_Body):
    messages: list[_Turn] = Field(min_length=1)
    max_completion_tokens: int | None = None


class _TextBody(_Body):
    prompt: str | list[int] | list[str]


@dataclass(frozen=True)
class Ask:
    """A request understood: who is to answer what, how, and in which form."""

    kind: Kind
    model: str
    prompt: list[Message] | str | list[int]
    options: SamplingOptions
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


def parse_chat(raw: bytes, max_tokens: int) -> Ask:
    """Read the body of POST /v1/chat/completions; ``max_tokens`` holds where it names none. Raises ApiError."""
    body = _validated(_ChatBody, _object(raw))
    longest = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    messages = [turn.message() for turn in body.messages]
    return _ask("chat", body, messages, max_tokens if longest is None else longest)


def parse_text(raw: bytes, max_tokens: int) -> Ask:
    """Read the body of POST /v1/completions; ``max_tokens`` holds where it names none. Raises ApiError."""
    body = _validated(_TextBody, _object(raw))
    prompt: Any = body.prompt
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
        if len(prompt) > 1:
            raise ApiError(400, "prompt: one prompt a request is served; send one request for each", param="prompt")
        prompt = prompt[0]
    return _ask("text", body, prompt, max_tokens if body.max_tokens is None else body.max_tokens)


def _object(raw: bytes) -> dict[str, Any]:
    try:
        values = parse_object(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8") from None
    except ValueError as error:
        raise ApiError(400, f"the body {error}") from None
    return {key: value for key, value in values.items() if value is not None}


def _same(value: Any, one: Any) -> bool:
    return bool(value == one) and isinstance(value, bool) == isinstance(one, bool)  # 0 is not false here


def _validated(model: type[BodyT], values: dict[str, Any]) -> BodyT:
    for name, served in _ONLY.items():
        if name in values and not any(_same(values[name], one) for one in served):
            shown = " or ".join(repr(one) for one in served)
            raise ApiError(400, f"{name}: this server supports {shown} only", param=name, code="unsupported_parameter")
    dropped = (*_ONLY, *_UNUSED)
    try:
        return model.model_validate({key: value for key, value in values.items() if key not in dropped})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])[:100]
        words = _WORDS.get(first["type"], first["msg"].removeprefix("Value error, "))
        code = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter"}.get(first["type"])
        raise ApiError(400, f"{name}: {words}", param=name, code=code) from None


def _ask(kind: Kind, body: _Body, prompt: Any, max_tokens: int) -> Ask:
    chosen = {
        name: getattr(body, name)
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
        if getattr(body, name) is not None
    }
    try:
        options = SamplingOptions(max_tokens=max_tokens, **chosen)
    except InputError as error:
        raise ApiError(400, str(error), param=error.problems[0].where) from None
    return Ask(kind, body.model, prompt, options, tuple(body.stop), body.stream, body.stream_options.include_usage)


class StopFilter:
    """Text up to the first of some strings, fed in pieces; what may be the start of one is held back.

    ``found`` tells that one was met: it and everything after it is dropped.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """Return the text that is certain to be before every stop string."""
        if self.found:
            return ""
        text, self._held = self._held + text, ""
        places = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self.found = True
            return text[: min(places)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def close(self) -> str:
        """Return what was held back: the text is over, and it was no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that ``stop``, longer than it, begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


@dataclass
class Reply:
    """The answer to one Ask, as JSON bodies: whole, or in chunks."""

    ask: Ask
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def _head(self, form: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.ask.kind == "chat" else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": form, "created": self.created, "model": self.ask.model}

    def _choice(self, part: Mapping[str, Any], reason: FinishReason | None) -> dict[str, Any]:
        return {"index": 0, **part, "logprobs": None, "finish_reason": reason}

    @property
    def _chunk_form(self) -> str:
        return "chat.completion.chunk" if self.ask.kind == "chat" else "text_completion"

    def usage(self) -> dict[str, int]:
        """Tokens read and written so far."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    def whole(self, text: str, reason: FinishReason) -> dict[str, Any]:
        """The answer in one body."""
        if self.ask.kind == "text":
            choice = self._choice({"text": text}, reason)
            return {**self._head("text_completion"), "choices": [choice], "usage": self.usage()}
        choice = self._choice({"message": {"role": "assistant", "content": text, "refusal": None}}, reason)
        return {**self._head("chat.completion"), "choices": [choice], "usage": self.usage()}

    def chunk(self, text: str, reason: FinishReason | None = None) -> dict[str, Any]:
        """A piece of the answer; the last has a ``reason``."""
        part: dict[str, Any] = (
            {"text": text} if self.ask.kind == "text" else {"delta": {"content": text} if text else {}}
        )
        return self._with_usage({**self._head(self._chunk_form), "choices": [self._choice(part, reason)]}, None)

    def opening(self) -> dict[str, Any] | None:
        """The chunk that says who speaks; there is none in a text completion."""
        if self.ask.kind == "text":
            return None
        part = {"delta": {"role": "assistant", "content": ""}}
        return self._with_usage({**self._head(self._chunk_form), "choices": [self._choice(part, None)]}, None)

    def closing(self) -> dict[str, Any] | None:
        """The chunk with the usage, for those who asked for it."""
        if not self.ask.include_usage:
            return None
        return self._with_usage({**self._head(self._chunk_form), "choices": []}, self.usage())

    def _with_usage(self, body: dict[str, Any], usage: dict[str, int] | None) -> dict[str, Any]:
        return {**body, "usage": usage} if self.ask.include_usage else body


def model_body(name: str, created: int) -> dict[str, Any]:
    """A model in the list of models."""
    return {"id": name, "object": "model", "created": created, "owned_by": "localdpo"}
