"""The search line of the Pairs place, taken apart: words, and `tag:`, `state:`, `problem:` filters.

Knows the names that `PairStore.search` takes and those a person would type for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from localdpo.data.check.findings import KINDS
from localdpo.errors import InputError, Problem

__all__ = ["PairQuery", "parse_query"]

_STATES = {
    "unsaved": "dirty", "dirty": "dirty", "draft": "dirty", "saved": "clean", "clean": "clean", "ok": "ok",
    "warned": "warned", "skipped": "skipped", "broken": "broken",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PairQuery:
    """What to look for, as `PairStore.search` takes it; None where any will do."""

    text: str = ""
    tag: str | None = None
    state: str | None = None
    problem: str | None = None


def parse_query(line: str) -> PairQuery:
    """Return what a search line asks for. A tag with blanks is quoted: tag:"two words".

    Raises `InputError` for a state or problem that there is not; a name being typed may be short (problem:dup).
    """
    words, filters = [], {"tag": "", "state": "", "problem": ""}
    for word in _words(line):
        name, colon, value = word.partition(":")
        if colon and name.lower() in filters:
            filters[name.lower()] = value.strip('"')
        else:
            words.append(word)
    state, problem = filters["state"].lower(), filters["problem"].lower()
    return PairQuery(
        " ".join(words),
        filters["tag"] or None,
        _STATES[_named("state", state, _STATES)] if state else None,
        _problem(problem) if problem else None,
    )


def _words(line: str) -> list[str]:
    """Split at blanks outside quotation marks, which are kept: the store knows them too."""
    words, current, quoted = [], "", False
    for char in line:
        quoted ^= char == '"'
        if char.isspace() and not quoted:
            words.append(current)
            current = ""
        else:
            current += char
    return [word for word in [*words, current] if word]


def _named(what: str, typed: str, names: dict[str, str]) -> str:
    found = [name for name in names if name.startswith(typed)]
    if typed in names:
        return typed
    if not found:
        raise InputError(Problem(f"{what}:{typed}", f"is no {what}", f"One of {', '.join(names)}"))
    return found[0]


def _problem(typed: str) -> str:
    """Return the code that `typed` begins, or whose title does; "any" for every problem."""
    if typed in ("any", *KINDS):
        return typed
    loose = typed.replace("-", " ").replace("_", " ")
    for code, kind in KINDS.items():
        if code.replace("_", " ").startswith(loose) or kind.title.lower().startswith(loose):
            return code
    names = ", ".join(("any", *KINDS))
    raise InputError(Problem(f"problem:{typed}", "is no problem that is looked for", f"One of {names}"))
