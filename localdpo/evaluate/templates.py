"""Fairness files: prompts with a slot for a person, and what fills it for each group.

A first line with ``fairness`` names the groups and their words; every other line is a template with fixed
continuations that say nothing about the group (docs/tasks.md). The n-th word of a group is the counterpart of the
n-th word of every other. This module reads and checks; it asks no model and never loads mlx.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localdpo.data.fields import Message, RowFields
from localdpo.evaluate.suitefile import find_file, one_or_more, open_file, shipped, whole_number

__all__ = ["FairnessSet", "Template", "read_fairness", "shipped_fairness"]

_ROW_KEYS = ("template", "favourable", "unfavourable", "continuations")
_HEAD_KEYS = ("fairness", "language", "groups", "system", "max_tokens", "description", "license")
_SLOT = re.compile(r"\{(\w+)\}")

Words = dict[str, tuple[str, ...]]
"""What fills each slot, as many words for every slot."""


@dataclass(frozen=True, slots=True)
class Template:
    """A prompt with slots, and the continuations: those good for the person, those bad, and neutral ones."""

    text: str
    favourable: tuple[str, ...] = ()
    unfavourable: tuple[str, ...] = ()
    neutral: tuple[str, ...] = ()
    line: int = field(default=0, compare=False)

    @property
    def continuations(self) -> tuple[str, ...]:
        """All of them: favourable, unfavourable, neutral."""
        return (*self.favourable, *self.unfavourable, *self.neutral)


@dataclass(frozen=True, slots=True)
class FairnessSet:
    """A fairness file, read. ``words[group][slot]`` has ``variants`` entries for every group and slot."""

    name: str
    words: dict[str, Words]
    templates: tuple[Template, ...]
    language: str | None = None
    system: str = ""
    max_tokens: int | None = None
    source: str = ""

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups' names, in the file's order."""
        return tuple(self.words)

    @property
    def variants(self) -> int:
        """How many people stand for each group."""
        return len(next(iter(next(iter(self.words.values())).values())))

    def prompt(self, template: Template, group: str, variant: int) -> tuple[Message, ...]:
        """The template with the words of a group."""
        text = _SLOT.sub(lambda match: self.words[group][match.group(1)][variant], template.text)
        user = Message(role="user", content=text)
        return (Message(role="system", content=self.system), user) if self.system.strip() else (user,)

    def all_words(self) -> list[str]:
        """Everything that fills a slot, the longest first."""
        return sorted(_distinct(self.words), key=lambda word: (-len(word), word))


def shipped_fairness() -> list[str]:
    """The names of the fairness files that come with localdpo."""
    return list(shipped("fairness"))


def read_fairness(name: str | Path) -> FairnessSet:
    """Read a shipped set by its name, or a fairness file. Raises InputError that names file, line and key."""
    path = find_file(name, "fairness", "set of fairness templates")
    opened = open_file(path, "fairness", ("template",), _HEAD_KEYS)
    head = opened.head
    words = _groups(head)
    language, system = head.text("language") or None, head.text("system")
    max_tokens, title = whole_number(head, "max_tokens"), head.text("fairness").strip()
    rows = [found for row in opened.rows if (found := _template(opened.fields(row), words))]
    opened.log.raise_if_any()
    return FairnessSet(title or path.stem, words, tuple(rows), language, system, max_tokens, str(path))


def _groups(head: RowFields) -> dict[str, Words]:
    value: Any = head.values.pop("groups", None)
    if not isinstance(value, dict) or len(value) < 2 or not all(isinstance(slots, dict) for slots in value.values()):
        fix = '{"women": {"name": ["Mary", …]}, "men": {"name": ["John", …]}}'
        head.bad("groups", "must name two groups or more and their words in the first line", f"Such as {fix}")
        return {}
    found = {str(group): {str(slot): _words(texts) for slot, texts in slots.items()} for group, slots in value.items()}
    if not all(texts for slots in found.values() for texts in slots.values()):
        head.bad("groups", "has a slot that is not a list of words")
        return {}
    slots = [set(words) for words in found.values()]
    if not slots[0] or any(one != slots[0] for one in slots):
        head.bad("groups", "does not have the same slots in every group")
        return {}
    counts = {len(texts) for words in found.values() for texts in words.values()}
    if len(counts - {1}) > 1:
        shown = ", ".join(map(str, sorted(counts)))
        head.bad("groups", f"has lists of {shown} words", "The n-th words belong together: give equally many, or one")
        return {}
    # One word alone, such as a pronoun, goes with every word of the other slots.
    return {group: {slot: t * max(counts) if len(t) == 1 else t for slot, t in words.items()}
            for group, words in found.items()}  # fmt: skip


def _words(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        return ()
    return tuple(texts)


def _distinct(words: dict[str, Words]) -> Iterator[str]:
    yield from dict.fromkeys(text for slots in words.values() for texts in slots.values() for text in texts)


def _template(fields: RowFields, words: dict[str, Words]) -> Template | None:
    if not fields.require("template"):
        return None
    before, text = fields.log.total, fields.text("template")
    good, bad, neutral = (one_or_more(fields, key) for key in _ROW_KEYS[1:])
    if fields.log.total > before or not words:
        return None
    known = set(next(iter(words.values())))
    used = _SLOT.findall(text)
    unknown = [slot for slot in used if slot not in known]
    if unknown or not used:
        what = f"has the slot {{{unknown[0][:40]}}}, which no group fills" if unknown else "has no slot"
        fields.bad("template", what, f"Slots are {', '.join(f'{{{slot}}}' for slot in sorted(known))}")
    made = Template(text, good, bad, neutral, fields.row.line)
    if not made.continuations or bool(good) != bool(bad):
        fix = 'Give "favourable" and "unfavourable" answers, or "continuations"'
        fields.bad("template", "has no continuations to compare", fix)
    for continuation in made.continuations:
        said = next((word for word in _distinct(words) if _says(continuation, word)), None)
        if said is not None:
            message = f"has a continuation that says {said!r:.40}"
            fields.bad("template", message, "It must say nothing about the group, or it is likelier for its own words")
    return made if fields.log.total == before else None


def _says(text: str, word: str) -> bool:
    pattern = rf"(?<!\w){re.escape(word)}(?!\w)" if word.isascii() else re.escape(word)
    return re.search(pattern, text, re.IGNORECASE) is not None
