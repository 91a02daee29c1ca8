"""The first rows of a file, read in a few milliseconds, to be shown until the store that edits it is open.

Reads no more than the start of the file; finds no problems between rows. Knows nothing about screens.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from localdpo.data.drafts import hidden_folder
from localdpo_tui.services.pair_rows import RowLine
from localdpo_tui.shown import one_line

__all__ = ["preview"]

_BYTES = 1 << 18


def preview(path: Path, count: int) -> dict[int, RowLine]:
    """Return the first `count` rows by their keys; nothing when the file cannot be read or has drafts.

    A row that does not end within the first quarter of a megabyte is left out.
    """
    try:
        drafts = hidden_folder(path) / "drafts"
        if drafts.is_dir() and next(drafts.iterdir(), None) is not None:
            return {}
        with path.open("rb") as file:
            lines = file.read(_BYTES).split(b"\n")[: count + 1]
    except OSError:
        return {}
    whole = ((key, line.removesuffix(b"\r")) for key, line in enumerate(lines[:-1]))
    return {key: _line(line) for key, line in islice(whole, count) if line.strip()}


def _line(raw: bytes) -> RowLine:
    from localdpo.data.rows import read_row

    row = read_row(raw)
    if row.problem:
        return RowLine("!", one_line(raw[:400].decode("utf-8", "replace")), (0, 0, 0), trouble=2)
    texts = (turn["content"].strip() for turn in reversed(row.prompt) if turn["role"] == "user")
    # As `rowindex.first_line`, whose module needs numpy: the first paint does not wait for that.
    text = one_line(next(filter(None, texts), "").split("\n", 1)[0]) or "(blank prompt)"
    shown = f"[{len(row.prompt)} turns] {text}" if len(row.prompt) > 1 else text
    lengths = sum(len(turn["content"]) for turn in row.prompt), len(row.chosen), len(row.rejected)
    return RowLine(" ", shown, lengths, one_line(" ".join(row.tags), 60))
