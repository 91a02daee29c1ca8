"""An Ollama Modelfile: the base, the adapter, and the chat template in Ollama's language.

The template is not looked up in a list: its pieces are read off what the model's own Jinja template writes, put
together again, and compared with it on conversations. Where that is not the same to the letter (dates, thinking,
tools), TEMPLATE is left out and Ollama goes by the base's. It knows nothing about weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

from localdpo.catalogue import find_entry
from localdpo.data.chat import ChatTokenizer

OLLAMA = {
    "smollm2-135m": "smollm2:135m",
    "qwen2.5-0.5b": "qwen2.5:0.5b",
    "qwen3-0.6b": "qwen3:0.6b",
    "llama3.2-1b": "llama3.2:1b",
    "qwen2.5-1.5b": "qwen2.5:1.5b",
    "qwen3-1.7b": "qwen3:1.7b",
    "gemma2-2b": "gemma2:2b",
    "qwen2.5-3b": "qwen2.5:3b",
    "llama3.2-3b": "llama3.2:3b",
    "mistral-7b": "mistral:7b-instruct-v0.3-q4_0",
    "qwen2.5-7b": "qwen2.5:7b",
    "llama3.1-8b": "llama3.1:8b",
    "qwen3-8b": "qwen3:8b",
}
"""The same models in Ollama's library. Names there can come to mean a newer model: those that did are left out."""

_USER, _ANSWER, _SYSTEM, _NEXT = "«user»", "«answer»", "«system»", "«next»"

Conversation = Sequence[dict[str, str]]


def ollama_name(spec: str) -> str | None:
    """The base in Ollama's library, if the catalogue knows it."""
    entry = find_entry(spec)
    return OLLAMA.get(entry.name) if entry is not None else None


@dataclass(frozen=True)
class ChatPieces:
    """What a chat template writes around the contents; ``system`` is its own system message, if it has one."""

    lead: str
    before_system: str | None
    after_system: str
    before_user: str
    after_user: str
    before_answer: str
    after_answer: str
    opening: str
    system: str | None

    def render(self, conversation: Conversation) -> str:
        """The text up to where the assistant is to answer."""
        turns = list(conversation)
        if self.system is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.system})
        around = {
            "system": (self.before_system or "", self.after_system),
            "user": (self.before_user, self.after_user),
            "assistant": (self.before_answer, self.after_answer),
        }
        parts = (around[turn["role"]][0] + turn["content"] + around[turn["role"]][1] for turn in turns)
        return self.lead + "".join(parts) + self.opening

    def go_template(self) -> str:
        """The same in Ollama's template language; the beginning-of-text token is Ollama's own to add."""
        system = (
            f'{{{{ if eq .Role "system" }}}}{self.before_system}{{{{ .Content }}}}{self.after_system}{{{{ else }}}}'
            if self.before_system is not None
            else ""
        )
        return (
            "{{- range .Messages }}"
            + system
            + f'{{{{ if eq .Role "user" }}}}{self.before_user}{{{{ .Content }}}}{self.after_user}'
            + f'{{{{ else if eq .Role "assistant" }}}}{self.before_answer}{{{{ .Content }}}}'
            + f"{self.after_answer}{{{{ end }}}}"
            + ("{{ end }}" if system else "")
            + "{{ end }}"
            + self.opening
        )


def modelfile(base: str | None, adapter: str, tokenizer: ChatTokenizer) -> tuple[str, str]:
    """The text of a Modelfile, and a remark when it lacks the template (else empty).

    ``base``: a GGUF file or a name in Ollama; None leaves a place for it.
    """
    lines = [f"FROM {base or 'BASE.gguf'}", f"ADAPTER ./{adapter}"]
    pieces = chat_pieces(tokenizer)
    if pieces is None:
        remark = "The Modelfile has no TEMPLATE: Ollama uses the base's own."
        return "\n".join([*lines, f"# {remark}", ""]), remark
    lines.append(f'TEMPLATE """{pieces.go_template()}"""')
    if pieces.system is not None:
        lines.append(f'SYSTEM """{pieces.system}"""')
    return "\n".join([*lines, ""]), ""


def chat_pieces(tokenizer: Any) -> ChatPieces | None:
    """The pieces of a tokenizer's chat template; None when it is more than pieces put together."""
    try:
        pieces = _pieces(tokenizer)
    except Exception:  # a template may raise anything it likes; then there is none for Ollama
        return None
    if pieces is None:
        return None
    texts = [text for text in astuple(pieces) if text is not None]
    if any(mark in text for text in texts for mark in ("{{", "}}", '"""')):
        return None
    return pieces if all(_agrees(pieces, tokenizer, talk) for talk in _talks(pieces)) else None


def _pieces(tokenizer: Any) -> ChatPieces | None:
    user, answer = {"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}
    asked = _text(tokenizer, [user], True)
    after_user = _text(tokenizer, [user], False).partition(_USER)[2]
    tail = asked.partition(_USER)[2]
    after_answer = _text(tokenizer, [user, answer], False).partition(_ANSWER)[2]
    between = _text(tokenizer, [user, answer, {"role": "user", "content": _NEXT}], True)
    to_answer = between.partition(_USER)[2].partition(_ANSWER)[0]
    before_next = between.partition(_ANSWER)[2].partition(_NEXT)[0]
    if not (tail.startswith(after_user) and to_answer.startswith(after_user) and before_next.startswith(after_answer)):
        return None
    before_user, opening = before_next[len(after_answer) :], tail[len(after_user) :]
    if not opening and to_answer[len(after_user) :].strip():
        return None  # it ignores add_generation_prompt: nothing it writes opens the assistant's turn
    start = asked.partition(_USER)[0]
    if not start.endswith(before_user):
        return None
    extra = start[: len(start) - len(before_user)]
    before_system, after_system = _around_system(tokenizer, user, before_user)
    for lead in ("", getattr(tokenizer, "bos_token", None) or ""):
        found = _lead(extra, lead, before_system, after_system)
        if found is not None:
            before, system = found
            return ChatPieces(
                lead=lead,
                before_system=before,
                after_system=after_system,
                before_user=before_user,
                after_user=after_user,
                before_answer=to_answer[len(after_user) :],
                after_answer=after_answer,
                opening=opening,
                system=system,
            )
    return None


def _around_system(tokenizer: Any, user: dict[str, str], before_user: str) -> tuple[str | None, str]:
    """What is before (the text's beginning included) and after a system message; None when there is no such turn."""
    try:
        text = _text(tokenizer, [{"role": "system", "content": _SYSTEM}, user], True)
    except Exception:
        return None, ""
    before, found, rest = text.partition(_SYSTEM)
    between = rest.partition(_USER)[0]
    if not found or not between.endswith(before_user):
        return None, ""
    return before, between[: len(between) - len(before_user)]


def _lead(extra: str, lead: str, before: str | None, after: str) -> tuple[str | None, str | None] | None:
    """What is before a system message and the template's own one, if the text begins with ``lead``; else None."""
    if not extra.startswith(lead) or (before is not None and not before.startswith(lead)):
        return None
    rest, bare = extra[len(lead) :], None if before is None else before[len(lead) :]
    if not rest:
        return bare, None
    if bare and rest.startswith(bare) and rest.endswith(after) and len(rest) > len(bare) + len(after):
        return bare, rest[len(bare) : len(rest) - len(after)]
    return None


def _talks(pieces: ChatPieces) -> list[list[dict[str, str]]]:
    turns = [("user", "Who are you?"), ("assistant", "I am."), ("user", "And?"), ("assistant", "So."), ("user", "Yes")]
    long = [{"role": role, "content": content} for role, content in turns]
    system = [{"role": "system", "content": "Be brief."}] if pieces.before_system is not None else []
    return [long[:1], long[:3], long, [*system, *long[:1]], [*system, *long]]


def _agrees(pieces: ChatPieces, tokenizer: Any, talk: list[dict[str, str]]) -> bool:
    return pieces.render(talk) == _text(tokenizer, talk, True)


def _text(tokenizer: Any, talk: list[dict[str, str]], generation: bool) -> str:
    # As in training: a model that can think aloud is told not to.
    options = {"add_generation_prompt": generation, "enable_thinking": False}
    return str(tokenizer.apply_chat_template(talk, tokenize=False, **options))
