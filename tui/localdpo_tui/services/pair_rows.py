"""A row of a file of pairs in the words of the UI: one line of a list, and its problems as sentences.

Knows the store's rows and nothing about screens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from localdpo.data.check.findings import KINDS
from localdpo.errors import InputError, Problem
from localdpo.text import sanitise
from localdpo_tui.shown import one_line

if TYPE_CHECKING:
    from localdpo.data.rows import Row
    from localdpo.data.store import PairStore

__all__ = ["RowLine", "can_edit", "estimate_tokens", "new_file_name", "row_findings", "row_line"]

_CHARACTERS_PER_TOKEN = 4.0
_TAG_CELLS = 60
_FIRST_FILE = "my-pairs.jsonl"


@dataclass(frozen=True, slots=True)
class RowLine:
    """One row as a list shows it; every text is safe and on one line.

    `state` is one sign (`!` cannot be read, `~` not saved yet, blank as in the file); `lengths` are characters of
    prompt, chosen and rejected; `problem` names what was found, in few words; `trouble` is 0 for nothing that
    matters, 1 for a warning, 2 for a row that is not trained on.
    """

    state: str
    prompt: str
    lengths: tuple[int, int, int]
    tags: str = ""
    problem: str = ""
    trouble: int = 0


def row_line(store: PairStore, key: int) -> RowLine:
    """Return a row as a line of the list. Raises KeyError for one that is not there."""
    row, summary = store.row(key), store.summary(key)
    broken = summary.state == "broken"
    shown = one_line(summary.first_line) or ("(blank prompt)" if not broken else "")
    if broken and not shown:
        shown = one_line(store.raw(key)[:400].decode("utf-8", "replace"))
    elif len(row.prompt) > 1:
        shown = f"[{len(row.prompt)} turns] {shown}"
    lengths = summary.prompt_chars, summary.chosen_chars, summary.rejected_chars
    titles = ", ".join(KINDS[code].title for code in summary.codes if code in KINDS)
    state = "!" if broken else "~" if summary.dirty else " "
    tags = one_line(" ".join(summary.tags), _TAG_CELLS)
    trouble = {"broken": 2, "skipped": 2, "warned": 1}.get(summary.state, 0)
    return RowLine(state, shown, lengths, tags, one_line(titles), trouble)


def row_findings(store: PairStore, key: int) -> list[str]:
    """Return what is wrong with a row as sentences with a next step. Raises KeyError for one that is not there."""
    row = store.row(key)
    lines = [f"This row {row.problem}"] if row.problem else []
    for code in store.summary(key).codes:
        if code in KINDS and not (row.problem and code in ("encoding", "schema")):
            kind = KINDS[code]
            lines.append(f"{kind.title[:1].upper()}{kind.title[1:]}. {kind.fix}.")
    return [sanitise(line) for line in lines]


def estimate_tokens(text: str) -> int:
    """Guess how many tokens a text is, for as long as no tokenizer is loaded: four UTF-8 bytes are about one."""
    return round(len(text.encode("utf-8", "surrogatepass")) / _CHARACTERS_PER_TOKEN)


def can_edit(row: Row, raw: bytes) -> bool:
    """Tell whether an editor can change the row without losing what it cannot show: the line must be an object."""
    if row.problem is None:
        return True
    try:
        return isinstance(json.loads(raw), dict)
    except (ValueError, RecursionError):
        return False


def new_file_name(folder: Path, text: str = "") -> Path:
    """Return the path of a new file of pairs in a workspace. Raises InputError for a name that is none."""
    name = text.strip() or _FIRST_FILE
    if name != sanitise(name) or name.endswith("/"):
        raise InputError(Problem(name, "is not a file name", "Use letters, digits and dashes"))
    path = Path(name).expanduser()
    if path.suffix != ".jsonl":
        path = path.with_name(f"{path.name}.jsonl")
    return path if path.is_absolute() or len(path.parts) > 1 else folder / "pairs" / path
