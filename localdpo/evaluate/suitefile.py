"""Files that a model is tested on: JSON Lines with a head of settings, shipped with localdpo or the user's own.

A shipped one is known by its name, any other by its path. This module finds and opens them and checks the head; what
the rows mean is for ``taskfile`` and ``templates`` to say. It never loads mlx.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localdpo.data.fields import RowFields
from localdpo.data.jsonl import ProblemLog, Row, read_rows
from localdpo.errors import InputError, Problem

__all__ = ["Opened", "find_file", "one_of", "one_or_more", "open_file", "sample_rows", "shipped", "whole_number"]

SUITES = Path(__file__).parent / "suites"


def shipped(folder: str = "") -> dict[str, Path]:
    """The shipped files by name: tasks, or in ``folder`` "fairness" the templates."""
    return {path.stem: path for path in sorted((SUITES / folder).glob("*.jsonl"), key=lambda p: p.stem)}


def find_file(name: str | Path, folder: str, what: str) -> Path:
    """The file of a shipped name or a path. Raises InputError that lists the names when there is neither."""
    known = shipped(folder)
    if str(name) in known:
        return known[str(name)]
    path = Path(name)
    if path.exists():
        return path
    close = difflib.get_close_matches(str(name), known, 1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    fix = f"{hint}Shipped ones are {', '.join(known)}; or give a path to a file of your own"
    raise InputError(Problem(str(name), f"is neither a shipped {what} nor a file", fix))


@dataclass(slots=True)
class Opened:
    """A file's head (its fields, empty without one), its rows, and the log that problems go to."""

    path: Path
    head: RowFields
    rows: list[Row]
    log: ProblemLog

    def fields(self, row: Row) -> RowFields:
        """A row to take apart."""
        return RowFields(row, str(self.path), self.log)


def open_file(path: Path, mark: str, row_keys: Sequence[str], head_keys: Sequence[str]) -> Opened:
    """Read a file. The first object is the head if it has ``mark`` and none of ``row_keys``.

    Unknown keys of the head go to the log, with what may have been meant. Raises InputError when the file cannot be
    read, or has no row.
    """
    log = ProblemLog()
    rows = list(read_rows(path, log))
    head = Row(1, {})
    if rows and mark in rows[0].value and not any(key in rows[0].value for key in row_keys):
        head = rows.pop(0)
    opened = Opened(path, RowFields(head, str(path), log), rows, log)
    for key in head.value:
        if key not in head_keys:
            close = difflib.get_close_matches(key, head_keys, 1)
            fix = f"Did you mean {close[0]!r}?" if close else f"Known keys are {', '.join(head_keys)}"
            opened.head.bad(key[:40], "is no setting", fix)
    if not rows:
        log.raise_if_any()
        raise InputError(Problem(str(path), "0 rows", "Write one JSON object a line"))
    return opened


def one_or_more(fields: RowFields, key: str) -> tuple[str, ...]:
    """Take a text or a list of texts, none of them blank; () when it is absent or a problem was logged."""
    value: Any = fields.values.pop(key, None)
    texts = [value] if isinstance(value, str) else value
    if value is None:
        return ()
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        fields.bad(key, "must be a text or a list of texts, none of them blank")
        return ()
    return tuple(texts)


def one_of(fields: RowFields, key: str, allowed: Sequence[str], default: str) -> str:
    """Take a setting that is one of a few words; the default when it is absent or was logged as a problem."""
    value = fields.values.pop(key, None)
    if value is None:
        return default
    if value not in allowed:
        fields.bad(key, f"is {value!r:.60}", f"It can be {', '.join(allowed)}")
        return default
    return str(value)


def whole_number(fields: RowFields, key: str) -> int | None:
    """Take a number of 1 or more; None when it is absent or was logged as a problem."""
    value = fields.values.pop(key, None)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        fields.bad(key, f"is {value!r:.40}", "It must be a whole number, 1 or more")
        return None
    return value


def sample_rows(count: int, limit: int | None, seed: int) -> list[int]:
    """The indices of at most ``limit`` of ``count`` rows, drawn without repeats by ``seed``, in order.

    Raises InputError for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise InputError(Problem("limit", f"{limit} must be 1 or more"))
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), limit))
