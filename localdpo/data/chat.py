"""How one model writes a conversation: its chat template and tokenizer as a pair of exact functions.

`ChatFormat` renders text through the model's own template, finds out by rendering how a turn ends, and
proves where the prompt stops and the answer starts. Its rules:

- The prompt is what the template writes with `add_generation_prompt`; the answer is what it writes after
that.
- An answer ends in exactly one end-of-turn token; what templates write after it (a newline) is dropped.
- When the tokenizer merges text across the boundary, prompt and answer are encoded apart, as when generating.
- Control tokens in a user's or assistant's *text* stay text: only the template writes real ones.

It knows nothing about pairs, lengths or truncation. Reasoning models are asked for plain answers
(`enable_thinking=False`) unless an answer contains `</think>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from localdpo.data.fields import Message
from localdpo.errors import InputError, Problem

__all__ = ["ChatFormat", "ChatTokenizer", "Conversation", "Refusal"]

_QUESTION, _ANSWER, _SYSTEM = "Zq7question", "Zq7answer", "Zq7system"
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # noncharacters: no text may hold them
_PLACEHOLDER = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")
_THINK, _END_THINK = "<think>", "</think>"
# Llama 3.x writes today's date into every prompt unless told one; with a fixed one a run is the same
# tomorrow.
_DATE = "26 Jul 2024"


class ChatTokenizer(Protocol):
    """What is used of a Hugging Face tokenizer, or of mlx-lm's wrapper around one."""

    chat_template: Any
    all_special_tokens: list[str]
    eos_token_id: int | None
    bos_token_id: int | None

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Render a conversation."""

    def encode(self, text: str, **options: Any) -> list[int]:
        """Return the ids of a text."""

    def decode(self, token_ids: Any, **options: Any) -> Any:
        """Return the text of ids."""

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Return the id of a token."""

    def get_added_vocab(self) -> dict[str, int]:
        """Return the tokens added to the vocabulary, special or not."""


class Refusal(Exception):
    """A conversation that this model's format cannot hold; the text says why."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt and its answers as ids, and what had to be done for it.

    `control_text` lists the control tokens that stood in the text and were kept as text, `folded_system`
    says that the system message went into the first user turn, `appended` that the template does not
    continue its own generation prompt, so that the answer was put after it as it would be generated.
    """

    prompt_ids: list[int]
    completions: list[list[int]]
    control_text: tuple[str, ...] = ()
    folded_system: bool = False
    appended: bool = False


class ChatFormat:
    """The chat format of one tokenizer, found out by rendering. Raises `InputError` when there is none.

    `end_of_turn` is the id that ends an assistant's turn, `folds_system` whether system messages go into
    the first user turn because the template has no place for them.
    """

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        if not getattr(tokenizer, "has_chat_template", tokenizer.chat_template is not None):
            raise InputError(
                Problem(
                    "the model",
                    "its tokenizer has no chat template",
                    "Use an instruct or chat model, or put the model's chat_template.jinja into its folder",
                )
            )
        self._adds_bos = self._encodes_bos_unasked()
        self._control = self._special_tokens()
        self._find_format()
        self.folds_system = not self._has_system_turns()

    def _special_tokens(self) -> dict[str, int]:
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        names = {str(token) for token in self._tokenizer.all_special_tokens}
        names |= {str(token) for token in added.values() if getattr(token, "special", False)}
        return {name: int(self._tokenizer.convert_tokens_to_ids(name)) for name in names if _is_control(name)}

    def _encodes_bos_unasked(self) -> bool:
        bos = self._tokenizer.bos_token_id
        ids = self._tokenizer.encode("a", add_special_tokens=False)
        return bos is not None and len(ids) > 1 and ids[0] == bos

    def _find_format(self) -> None:
        """Render a tiny conversation and read off how the assistant's turn starts and ends."""
        question = [Message(role="user", content=_QUESTION)]
        try:
            bare = self._render(question, generate=False)
            prompt = self._render(question, generate=True)
            full = self._render([*question, Message(role="assistant", content=_ANSWER)], generate=False)
        except Refusal as refusal:
            fix = "This model cannot be trained on conversations: use an instruct or chat model"
            raise InputError(Problem("the model", f"on a plain question and answer {refusal}", fix)) from None
        before, found, self._tail = full.rpartition(_ANSWER)
        if not found:
            raise InputError(Problem("the model", "its chat template leaves the assistant's answer out"))
        self._add_turn_markers(full)
        # Longest first, so that no token hides a longer one that starts with it.
        self._names = sorted(self._control, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self._names)) or "(?!)")
        self._find_end()
        # A template that ignores add_generation_prompt leaves the assistant's header to us.
        header = before[len(prompt) :] if prompt == bare and before.startswith(prompt) else ""
        self._header = header if self._pattern.search(header) else ""

    def _add_turn_markers(self, rendered: str) -> None:
        """Count added tokens that the template itself writes as control tokens, flagged special or not."""
        for token, identity in self._tokenizer.get_added_vocab().items():
            if token in rendered and _is_control(token):
                self._control[token] = identity

    def _find_end(self) -> None:
        match = self._pattern.search(self._tail)
        if match:
            self.end_of_turn = self._control[match.group()]
            self._end_text = self._tail[: match.end()]
            return
        eos = self._tokenizer.eos_token_id
        if eos is None:
            message = "its template ends turns with no special token, and its tokenizer has no EOS token"
            fix = "Set eos_token in the model's tokenizer_config.json"
            raise InputError(Problem("the model", message, fix))
        self.end_of_turn = int(eos)
        self._end_text = str(self._tokenizer.decode([eos]))

    def _has_system_turns(self) -> bool:
        system, user = Message(role="system", content=_SYSTEM), Message(role="user", content=_QUESTION)
        try:
            return _SYSTEM in self._render([system, user], generate=True)
        except Refusal:
            return False

    def _render(
        self,
        messages: Iterable[Mapping[str, Any]],
        *,
        generate: bool,
        tools: Sequence[dict[str, Any]] = (),
        thinking: bool = False,
    ) -> str:
        options: dict[str, Any] = {"tools": list(tools)} if tools else {}
        if "date_string" in str(self._tokenizer.chat_template):
            options["date_string"] = _DATE
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=generate,
                enable_thinking=thinking,
                **options,
            )
        except Exception as error:  # a template is a program of the model's author: it may raise anything
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise Refusal(f"the chat template fails: {reason}") from None
        if not isinstance(text, str):
            raise Refusal(f"the chat template gives {type(text).__name__}, not text")
        return text

    def encode(
        self,
        messages: Sequence[Message],
        answers: Sequence[str] = (),
        tools: Sequence[dict[str, Any]] = (),
        thinking: bool | None = None,
    ) -> Conversation:
        """Return the ids of a prompt and of each answer to it.

        `thinking` is handed to the template as `enable_thinking`; None decides by the answers. Raises
        `Refusal`.
        """
        if thinking is None:
            thinking = any(_END_THINK in answer for answer in answers)
        folded = self.folds_system and any(message["role"] == "system" for message in messages)
        if folded:
            messages = _fold_system(messages)
        found: set[str] = set()
        safe = [{**self._shield(message, found), "role": message["role"]} for message in messages]
        shielded = [self._shield(answer, found) for answer in answers]
        tools = self._shield(list(tools), found)
        prompt = self._render(safe, generate=True, tools=tools, thinking=thinking) + self._header
        prompt_ids = self._ids(prompt)
        completions, appended = [], False
        for answer in shielded:
            turns = [*safe, {"role": "assistant", "content": answer}]
            full = self._render(turns, generate=False, tools=tools, thinking=thinking)
            text = self._continuation(prompt, full)
            if text is None:
                text, appended = self._appended(prompt, answer), True
            completions.append(self._completion_ids(prompt, prompt_ids, text))
        require_embedded(self._tokenizer, prompt_ids, *completions)
        return Conversation(prompt_ids, completions, tuple(sorted(found)), folded, appended)

    def _continuation(self, prompt: str, full: str) -> str | None:
        """Return what the template writes after the generation prompt, None when it writes something else."""
        if not full.startswith(prompt) or not full.endswith(self._tail):
            return None
        body = full[len(prompt) : len(full) - len(self._tail)]
        return body + self._end_text if body else None

    def _appended(self, prompt: str, answer: str) -> str:
        if prompt.rstrip().endswith(_THINK):
            # The generation prompt opens a block of thought: the answer continues it or closes it first.
            closes = _END_THINK in answer
            answer = answer.removeprefix(_THINK).lstrip("\n") if closes else f"\n{_END_THINK}\n\n{answer}"
        return answer + self._end_text

    def _completion_ids(self, prompt: str, prompt_ids: list[int], text: str) -> list[int]:
        whole = self._ids(prompt + text)
        ids = whole[len(prompt_ids) :]
        if whole[: len(prompt_ids)] != prompt_ids:
            ids = self._ids(text)
            if self._tokenizer.decode(prompt_ids + ids) != self._tokenizer.decode(whole):
                raise Refusal(
                    "the tokenizer merges the end of the prompt with the start of the answer; in the model's "
                    "chat_template.jinja, end the generation prompt in a line break or a token of its own"
                )
        if not ids or ids[-1] != self.end_of_turn or self.end_of_turn in ids[:-1]:
            raise Refusal("its answer does not end in exactly one end-of-turn token")
        return ids

    def _shield(self, value: Any, found: set[str]) -> Any:
        """Replace control tokens in texts by placeholders, so that they are told from the template's own."""
        if isinstance(value, Mapping):
            return {key: self._shield(inner, found) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._shield(inner, found) for inner in value]
        if not isinstance(value, str):
            return value
        if _OPEN in value or _CLOSE in value:
            raise Refusal("it contains U+FDD0 or U+FDD1, which are not characters")

        def placeholder(match: re.Match[str]) -> str:
            found.add(match.group())
            return f"{_OPEN}{self._names.index(match.group())}{_CLOSE}"

        return self._pattern.sub(placeholder, value)

    def _restore(self, text: str) -> str:
        return _PLACEHOLDER.sub(lambda match: self._names[int(match.group(1))], text)

    def _ids(self, text: str) -> list[int]:
        """Return the ids of rendered text, with at most one BOS before it. Raises `Refusal`."""
        if _OPEN not in text:
            return self._plain_ids(text)
        neutral = _PLACEHOLDER.sub("x", text)
        ids = self._ids_between_control_tokens(text)
        if ids is None or self._ids_between_control_tokens(neutral) != self._plain_ids(neutral):
            token = self._names[int(_PLACEHOLDER.findall(text)[0])]
            raise Refusal(f"it contains {token}, which this tokenizer cannot keep as text")
        return self._without_second_bos(ids)

    def _plain_ids(self, text: str) -> list[int]:
        return self._without_second_bos(self._encoded(text))

    def _encoded(self, text: str, **options: Any) -> list[int]:
        # verbose=False: transformers warns of long texts on stderr, and lengths are our caller's business.
        ids = [int(i) for i in self._tokenizer.encode(text, add_special_tokens=False, verbose=False, **options)]
        return ids[1:] if self._adds_bos else ids

    def _without_second_bos(self, ids: list[int]) -> list[int]:
        bos = self._tokenizer.bos_token_id
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

    def _ids_between_control_tokens(self, text: str) -> list[int] | None:
        """Encode each stretch between the template's control tokens as plain text.

        Returns None when a control token in a stretch will not stay text. This is what tokenizers do
        themselves, minus the search for control tokens inside a stretch.
        """
        control = set(self._control.values())
        ids: list[int] = []
        position = 0
        for match in [*self._pattern.finditer(text), None]:
            stretch = self._restore(text[position : match.start() if match else len(text)])
            if stretch:
                inner = self._encoded(stretch, split_special_tokens=True)
                if control.intersection(inner):
                    return None
                ids += inner
            if match:
                ids.append(self._control[match.group()])
                position = match.end()
        return ids


def require_embedded(tokenizer: ChatTokenizer, *parts: Sequence[int]) -> None:
    """Raise `InputError` for an id that the model has no embedding of: MLX would read what lies behind it.

    `tokenizer.embedding_rows`, where a model was loaded with it, says how many there are.
    """
    rows = getattr(tokenizer, "embedding_rows", None)
    highest = max(max(part, default=0) for part in parts)
    if rows is None or highest < rows:
        return
    token = tokenizer.decode([highest])
    raise InputError(
        Problem(
            "the model",
            f"its tokenizer writes {token!r} as id {highest:,}, and its embedding has {rows:,} rows",
            "Take tokenizer and weights from the same version of the model",
        )
    )


def _is_control(token: str) -> bool:
    # White space is everybody's, and <think> belongs to answers: those may hold a thought.
    return bool(token.strip()) and "think" not in token


def _fold_system(messages: Sequence[Message]) -> list[Message]:
    """Put the system messages' text before the first user turn. Raises `Refusal` when there is none."""
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system" and m["content"].strip())
    rest = [message for message in messages if message["role"] != "system"]
    first = next((i for i, message in enumerate(rest) if message["role"] == "user"), None)
    if first is None:
        raise Refusal("the template has no system turn, and there is no user turn to put the message into")
    content = "\n\n".join(part for part in (system, rest[first]["content"]) if part)
    return [*rest[:first], Message(**{**rest[first], "content": content}), *rest[first + 1 :]]
