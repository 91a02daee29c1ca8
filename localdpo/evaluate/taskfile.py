"""Task files: prompts with what is expected of the answers, of three kinds.

One JSON object a line. ``classification`` rows have ``label`` (one of ``choices``), ``qa`` rows ``expected``,
``generation`` rows ``references``; all have ``prompt``. A first line with ``task`` sets what holds for all of them
(docs/tasks.md). This module reads and checks; it asks no model and never loads mlx.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast, get_args

from localdpo.data.fields import Message, RowFields, blank_prompt
from localdpo.errors import InputError
from localdpo.evaluate.suitefile import Opened, find_file, one_of, one_or_more, open_file, shipped, whole_number

__all__ = ["Example", "Kind", "Task", "read_task", "shipped_tasks"]

Kind = Literal["classification", "qa", "generation"]

_ANSWER_KEYS: dict[str, Kind] = {"label": "classification", "expected": "qa", "references": "generation"}
_ROW_KEYS = ("prompt", *_ANSWER_KEYS)
_HEAD_KEYS = (
    "task", "kind", "language", "template", "system", "choices", "by", "score", "max_tokens", "description", "license",
)  # fmt: skip
_SLOT = "{prompt}"


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and what counts as right: the label alone, accepted answers, or references."""

    prompt: tuple[Message, ...]
    expected: tuple[str, ...]
    choices: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    line: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Task:
    """A task file, read. ``by`` and ``score`` say how a choice is made, see ``tasks``; ``max_tokens`` may be None."""

    name: str
    kind: Kind
    examples: tuple[Example, ...]
    language: str | None = None
    by: Literal["logprob", "answer"] = "logprob"
    score: Literal["sum", "mean"] = "sum"
    max_tokens: int | None = None
    description: str = ""
    source: str = ""

    @property
    def labels(self) -> tuple[str, ...]:
        """The choices if they are the same in every example, else ()."""
        sets = {example.choices for example in self.examples}
        return sets.pop() if len(sets) == 1 else ()


def shipped_tasks() -> list[str]:
    """The names of the tasks that come with localdpo."""
    return list(shipped())


def read_task(name: str | Path) -> Task:
    """Read a shipped task by its name, or a task file. Raises InputError that names file, line and key."""
    path = find_file(name, "", "task")
    opened = open_file(path, "task", _ROW_KEYS, _HEAD_KEYS)
    head = opened.head
    template = _template(head)
    system, language = head.text("system"), head.text("language") or None
    choices = one_or_more(head, "choices")
    by = one_of(head, "by", ("logprob", "answer"), "logprob")
    score = one_of(head, "score", ("sum", "mean"), "sum")
    kind = _kind(opened)
    rows = [example for row in opened.rows if (example := _example(opened.fields(row), kind, template, system))]
    task = Task(
        head.text("task").strip() or path.stem,
        kind,
        tuple(rows),
        language,
        cast(Literal["logprob", "answer"], by),
        cast(Literal["sum", "mean"], score),
        whole_number(head, "max_tokens"),
        head.text("description"),
        str(path),
    )
    if kind == "classification":
        task = _with_choices(task, choices, opened)
    opened.log.raise_if_any()
    return task


def _template(head: RowFields) -> str:
    template = head.text("template") or _SLOT
    if template.count(_SLOT) != 1:
        head.bad("template", f"must have {_SLOT} in it, once")
    return template


def _kind(opened: Opened) -> Kind:
    """The kind that the head names, or that the first row's keys show. Raises InputError when neither does."""
    head, first = opened.head, opened.rows[0]
    found = next((kind for key, kind in _ANSWER_KEYS.items() if key in first.value), None)
    if "kind" in head.values or found is not None:
        return cast(Kind, one_of(head, "kind", get_args(Kind), found or "qa"))
    has = ", ".join(f'"{key[:40]}"' for key in list(first.value)[:8]) or "no keys"
    fix = f'A row has "label", "expected" or "references"; this one has {has}'
    opened.log.add(f"{opened.path}:{first.line}", "does not say what is expected", fix)
    opened.log.raise_if_any()
    raise InputError()


def _example(fields: RowFields, kind: Kind, template: str, system: str) -> Example | None:
    key = next(name for name, of in _ANSWER_KEYS.items() if of == kind)
    if not fields.require("prompt", key):
        return None
    before = fields.log.total
    if system.strip() and "system" not in fields.values and isinstance(fields.values["prompt"], str):
        fields.values["system"] = system
    prompt = fields.prompt_turns()
    expected, choices = one_or_more(fields, key), one_or_more(fields, "choices")
    tags, _ = fields.common()
    if prompt is None or not fields.answerable(prompt):
        return None
    if blank_prompt(prompt):
        fields.bad("prompt", "is blank")
    if kind == "classification" and len(expected) > 1:
        fields.bad(key, "must be one text")
    if fields.log.total > before:
        return None
    last: Message = {**prompt[-1], "content": template.replace(_SLOT, prompt[-1]["content"])}
    return Example((*prompt[:-1], last), expected, choices, tags, fields.row.line)


def _with_choices(task: Task, common: tuple[str, ...], opened: Opened) -> Task:
    """Every example with its own choices, those of the head, or all labels of the file; problems go to the log."""
    labels = common or tuple(dict.fromkeys(example.expected[0] for example in task.examples))
    examples = [replace(example, choices=example.choices or labels) for example in task.examples]
    for example in examples:
        _check_choices(example, opened)
    return replace(task, examples=tuple(examples))


def _check_choices(example: Example, opened: Opened) -> None:
    where, choices = f"{opened.path}:{example.line}", example.choices
    if len(choices) < 2 or len({choice.strip() for choice in choices}) < len(choices):
        shown = _listed(choices)
        opened.log.add(where, f'"choices" are {shown}', "Two or more different ones are needed")
    elif example.expected[0] not in choices:
        opened.log.add(where, f'"label" is {example.expected[0]!r:.60}', f"The choices are {_listed(choices)}")


def _listed(texts: Sequence[str]) -> str:
    return ", ".join(repr(text[:40]) for text in texts[:8]) + (" …" if len(texts) > 8 else "")
