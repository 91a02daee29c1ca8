"""Add finished pairs to a file of pairs, and take them back, whoever else has it open.

Every other byte of the file stays. An editor that has the file open (`PairStore`) sees the change and merges it by
row, so nothing of either is lost. Both functions read and write the whole file: call them on a thread.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from localdpo.data.rows import PairDraft, write_row
from localdpo.data.store import pair_file_lock
from localdpo.files import atomic_write, environment_faults

__all__ = ["add_pairs", "remove_pairs"]


def add_pairs(path: str | Path, drafts: Sequence[PairDraft]) -> None:
    """Append pairs; one whose id is in the file already takes the place of that row, at the end.

    The file and its folder are made where there are none. Raises InputError for a pair that cannot be written and
    EnvironmentFault; the file is then as it was.
    """
    rows = [write_row(None, draft) for draft in drafts]
    target = Path(path)
    with environment_faults(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with pair_file_lock(target):
        lines = _without(_lines(target), {draft.id for draft in drafts if draft.id})
        end = b"\r\n" if lines and lines[0].endswith(b"\r\n") else b"\n"
        if lines and not lines[-1].endswith(b"\n"):
            lines[-1] += end
        atomic_write(target, b"".join([*lines, *(row + end for row in rows)]))


def remove_pairs(path: str | Path, ids: Collection[str]) -> int:
    """Delete the rows with these ids; returns how many there were. Raises EnvironmentFault."""
    target = Path(path)
    with pair_file_lock(target):
        lines = _lines(target)
        kept = _without(lines, set(ids))
        if len(kept) < len(lines):
            atomic_write(target, b"".join(kept))
        return len(lines) - len(kept)


def _lines(path: Path) -> list[bytes]:
    with environment_faults(path):
        return _split(path.read_bytes()) if path.exists() else []


def _without(lines: list[bytes], ids: set[str]) -> list[bytes]:
    marks = [json.dumps(identity).encode() for identity in ids]

    def has_id(line: bytes) -> bool:
        # Few lines hold the text of an id at all: only those are read.
        if not any(mark in line for mark in marks):
            return False
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            return False
        return isinstance(value, dict) and value.get("id") in ids

    return [line for line in lines if not has_id(line)] if marks else lines


def _split(data: bytes) -> list[bytes]:
    r"""Lines with their ends: a row ends at \n alone, as everywhere in localdpo."""
    lines = data.split(b"\n")
    return [line + b"\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])
