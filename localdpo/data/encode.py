"""Preference pairs as token ids: prompt and answers apart, cut to length, every row left out named.

The model's own chat template writes the text (see `chat.py` for the rules). Lengths count one prompt with
one answer. This module knows nothing about batches, padding or the model's weights.
"""

from __future__ import annotations

import marshal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from localdpo.data.chat import ChatFormat, ChatTokenizer, Conversation, Refusal
from localdpo.data.pairs import Message, PreferencePair, Skipped, listed
from localdpo.data.shelf import Shelf
from localdpo.data.template import check_template
from localdpo.errors import InputError, Problem, first_problems
from localdpo.recipe import Truncation
from localdpo.sequences import EncodedRow, Ids, TokenSequence, same_prompt

__all__ = [
    "ChatTokenizer",
    "Encoding",
    "check_template",
    "encode_pairs",
    "encode_prompt",
    "encoded_shelf",
    "end_of_turn_ids",
]

UNFINISHED = "unfinished"
"""Key in a pair's ``extra``: its chosen answer was cut off, so it gets no end of turn: it would have gone on there."""


def encoded_shelf() -> Shelf[EncodedRow]:
    """An empty shelf for encoded rows: as many as there are, at a few bytes of memory each."""
    return Shelf(_to_shelf, _from_shelf)


def _to_shelf(row: EncodedRow) -> bytes:
    # A prompt that several sequences share is written once, and None in its place after that.
    ids: list[tuple[bytes | None, bytes]] = []
    before = None
    for sequence in row.sequences:
        again = before is not None and same_prompt(before, sequence)
        ids.append((None if again else sequence.prompt_ids.tobytes(), sequence.completion_ids.tobytes()))
        before = sequence
    # Written and read by this process alone.
    return marshal.dumps((ids, row.weight, row.kind, row.row, row.line, row.source))


def _from_shelf(data: bytes) -> EncodedRow:
    ids, *rest = marshal.loads(data)
    sequences: list[TokenSequence] = []
    for prompt, completion in ids:
        prompt_ids = sequences[-1].prompt_ids if prompt is None else np.frombuffer(prompt, np.int32)
        sequences.append(TokenSequence(prompt_ids, np.frombuffer(completion, np.int32)))
    return EncodedRow(tuple(sequences), *rest)


@dataclass(frozen=True, slots=True)
class Encoding:
    """The encoded pairs in order, the rows left out, what to tell the user, and how many were truncated."""

    pairs: Sequence[EncodedRow]
    skipped: list[Skipped]
    warnings: list[Problem]
    truncated: int


def end_of_turn_ids(tokenizer: ChatTokenizer) -> list[int]:
    """Return the ids that end an assistant's turn in this model's template. Raises `InputError`."""
    return [ChatFormat(tokenizer).end_of_turn]


def encode_prompt(
    messages: Sequence[Message],
    tokenizer: ChatTokenizer,
    tools: Sequence[dict[str, object]] = (),
    thinking: bool = False,
) -> Ids:
    """Return the ids of a conversation up to where the assistant is to answer, as training sees them.

    Raises `InputError` when the template refuses the conversation.
    """
    try:
        return _array(ChatFormat(tokenizer).encode(messages, tools=tools, thinking=thinking).prompt_ids)
    except Refusal as refusal:
        raise InputError(Problem("the conversation", str(refusal))) from None


def encode_pairs(
    pairs: Sequence[PreferencePair],
    tokenizer: ChatTokenizer,
    max_length: int = 1024,
    truncation: Truncation = "keep_start",
    progress: Callable[[int, int], None] | None = None,
    into: Shelf[EncodedRow] | None = None,
) -> Encoding:
    """Encode pairs with the model's chat template, a prompt with either answer in `max_length` tokens.

    A prompt that leaves no room for an answer is skipped. Of a longer pair, `keep_start` cuts the answers'
    ends (and then trains no end of turn for them), `keep_end` cuts the prompt's start, `skip` leaves the
    pair out. A row the template refuses is skipped too. `progress` gets the pairs done and their number.
    `into` is an empty shelf to put them on, where they may be too many for memory.
    Raises `InputError` when the tokenizer has no usable chat format or when no pair is left.
    """
    chat = ChatFormat(tokenizer)
    encoder = _Encoder(chat, max_length, truncation, [] if into is None else into)
    for row, pair in enumerate(pairs):
        try:
            encoder.add(row, pair)
        except Refusal as refusal:
            encoder.skipped.append(Skipped(pair.source, pair.line, str(refusal)))
        if progress is not None:
            progress(row + 1, len(pairs))
    if pairs and not encoder.pairs:
        reasons = [Problem(f"{skip.source}:{skip.line}", skip.reason) for skip in encoder.skipped]
        message = f"0 pairs are left: all {len(pairs):,} were skipped for this model"
        raise InputError(Problem(pairs[0].source, message), *first_problems(reasons))
    warnings = [*encoder.notes.warnings(truncation, max_length), *_stop_warning(chat, tokenizer)]
    return Encoding(encoder.pairs, encoder.skipped, warnings, encoder.truncated)


def _pairs(count: int) -> str:
    return "1 pair" if count == 1 else f"{count:,} pairs"


def _array(ids: Sequence[int]) -> Ids:
    return np.asarray(ids, dtype=np.int32)


@dataclass(slots=True)
class _Encoder:
    chat: ChatFormat
    max_length: int
    truncation: Truncation
    pairs: list[EncodedRow] | Shelf[EncodedRow]
    skipped: list[Skipped] = field(default_factory=list)
    truncated: int = 0
    notes: _Notes = field(default_factory=lambda: _Notes())

    def add(self, row: int, pair: PreferencePair) -> None:
        """Encode one pair. Raises `Refusal` with the reason to skip it."""
        conversation = self.chat.encode(pair.prompt, (pair.chosen, pair.rejected), pair.tools)
        prompt, (chosen, rejected) = conversation.prompt_ids, conversation.completions
        fitted = self.fit(prompt, chosen, rejected)
        if fitted[1] == fitted[2]:
            raise Refusal("both answers are the same tokens" + (" once truncated" if chosen != rejected else ""))
        cut = fitted != (prompt, chosen, rejected)
        self.truncated += cut
        self.notes.add(pair, conversation, cut)
        prompt_ids, chosen_ids, rejected_ids = map(_array, fitted)
        if pair.extra.get(UNFINISHED) and len(chosen_ids) > 1:
            chosen_ids = chosen_ids[:-1]
        answers = (chosen_ids, rejected_ids)
        self.pairs.append(EncodedRow.of(prompt_ids, answers, pair.weight, pair.kind, row, pair.line, pair.source))

    def fit(self, prompt: list[int], chosen: list[int], rejected: list[int]) -> tuple[list[int], list[int], list[int]]:
        """Return prompt and answers cut to length by the policy. Raises `Refusal` when they cannot be."""
        limit, longest = self.max_length, max(len(chosen), len(rejected))
        if len(prompt) >= limit:
            raise Refusal(f"its prompt has {len(prompt):,} tokens, which fills data.max_length ({limit:,})")
        if len(prompt) + longest <= limit:
            return prompt, chosen, rejected
        if self.truncation == "keep_start":
            room = limit - len(prompt)
            return prompt, chosen[:room], rejected[:room]
        if self.truncation == "skip":
            total = len(prompt) + longest
            raise Refusal(f"it has {total:,} tokens, more than data.max_length ({limit:,})")
        if longest >= limit:
            raise Refusal(f"its answer has {longest:,} tokens, which fills data.max_length ({limit:,})")
        return prompt[len(prompt) + longest - limit :], chosen, rejected


@dataclass(slots=True)
class _Notes:
    """Which lines of which file something was done to."""

    lines: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    control_text: set[str] = field(default_factory=set)

    def add(self, pair: PreferencePair, conversation: Conversation, cut: bool) -> None:
        happened = {
            "cut": cut,
            "control": bool(conversation.control_text),
            "system": conversation.folded_system,
            "appended": conversation.appended,
        }
        self.control_text.update(conversation.control_text)
        for what in (name for name, did in happened.items() if did):
            self.lines.setdefault((pair.source, what), []).append(pair.line)

    def warnings(self, truncation: Truncation, max_length: int) -> list[Problem]:
        tokens = ", ".join(sorted(self.control_text)[:4])
        cut = {
            "keep_start": "their answers lose their ends, and no end of turn is trained for those",
            "keep_end": "their prompts lose their starts",
        }.get(truncation, "")
        texts = {
            "cut": (
                f"longer than data.max_length ({max_length:,}) and truncated: {cut}",
                "Raise data.max_length, or set data.truncation to skip",
            ),
            "control": (
                f"with control tokens in their text ({tokens}), encoded as plain text",
                "Remove them if they are left over from a template",
            ),
            "system": (
                "whose system message went into the first user turn: the template has no place for it",
                "",
            ),
            "appended": (
                "whose answers were put right after the generation prompt, as the template writes none there",
                "",
            ),
        }
        return [
            Problem(source, f"{_pairs(len(lines))} {texts[what][0]} ({listed(lines)})", texts[what][1])
            for (source, what), lines in self.lines.items()
        ]


def _stop_warning(chat: ChatFormat, tokenizer: ChatTokenizer) -> list[Problem]:
    several = getattr(tokenizer, "eos_token_ids", None)  # mlx-lm's set; transformers answers with one number
    stops = set(several) if isinstance(several, set | list | tuple) else set()
    stops.add(tokenizer.eos_token_id)
    if chat.end_of_turn in stops:
        return []
    token = tokenizer.decode([chat.end_of_turn])
    message = f"its template ends turns with {token}, which its EOS tokens do not include"
    fix = f"Add {chat.end_of_turn} to eos_token_id in the model's config.json, or its answers may not stop"
    return [Problem("the model", message, fix)]
