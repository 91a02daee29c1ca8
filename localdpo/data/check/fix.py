"""Put right what can be put right without judgement: rows that teach nothing, exact repeats, terminal escapes, carriage
returns, and prompts that stand in their answers too.

The file is rewritten line by line, whole or not at all, after a copy of it was made; lines that are not mended keep
every byte. Everything else that a check finds is left to its author.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from localdpo.data.check.findings import Finding
from localdpo.data.check.rows import repeats_prompt, strip_escapes, without_prompt
from localdpo.data.jsonl import MAX_LINE_BYTES, ProblemLog, Row, parse_object
from localdpo.data.pairs import take_pair
from localdpo.data.rowform import with_line_ends
from localdpo.data.rows import read_row, write_row
from localdpo.data.rowtext import set_values
from localdpo.data.store import pair_file_lock
from localdpo.errors import EnvironmentFault, InputError, Problem
from localdpo.files import atomic_file, environment_faults, require_space

__all__ = ["Fixed", "Signature", "fix_file", "signature_of"]

Signature = tuple[int, int, int]
_TEXTS = ("prompt", "chosen", "rejected", "system")
_BOM = codecs.BOM_UTF8


@dataclass(slots=True)
class Fixed:
    """What was done: lines deleted by kind, lines mended, and repeats kept because more than the texts differs.

    A line is mended of escapes, of carriage returns and of a prompt in its answers. `backup` is None when there was
    nothing to do.
    """

    deleted: dict[str, list[int]] = field(default_factory=dict)
    cleaned: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    backup: Path | None = None

    @property
    def changes(self) -> int:
        """How many lines changed or went."""
        return sum(map(len, self.deleted.values())) + len(self.cleaned)


def signature_of(path: Path) -> Signature:
    """Return what changes when somebody writes a file."""
    with environment_faults(path):
        stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def fix_file(path: Path, findings: Sequence[Finding], checked: Signature) -> Fixed:
    """Mend `path` by the findings of a check of it; `checked` is its signature before that check.

    The copy is `FILE.bak`, or with a number when that is there. Raises `EnvironmentFault` when the file has changed
    since or cannot be written, `InputError` when no row would be left.
    """
    with pair_file_lock(path):
        if signature_of(path) != checked:
            raise EnvironmentFault(Problem(str(path), "was changed while it was being checked", "Run the check again"))
        plan = _Plan.of(findings)
        fixed = plan.tried(path)
        if not fixed.changes:
            return fixed
        if plan.rows_left == 0:
            fix = "Nothing was changed: write pairs that teach something"
            raise InputError(Problem(str(path), "no row would be left", fix))
        require_space(path.absolute().parent, 2 * checked[1])
        fixed.backup = _backup(path)
        with path.open("rb") as source, atomic_file(path) as target:
            for _, line in plan.lines(source):
                target.write(line)
    return fixed


def _backup(path: Path) -> Path:
    copy = next(name for name in _backup_names(path) if not os.path.lexists(name))
    with environment_faults(copy), path.open("rb") as source, atomic_file(copy) as target:
        shutil.copyfileobj(source, target)
    with environment_faults(copy):
        shutil.copystat(path, copy)
    return copy


def _backup_names(path: Path) -> Iterator[Path]:
    yield path.with_name(f"{path.name}.bak")
    number = 2
    while True:
        yield path.with_name(f"{path.name}.bak{number}")
        number += 1


@dataclass(slots=True)
class _Plan:
    """Lines to delete by kind, lines to clean, and for every repeat the line that it repeats."""

    delete: dict[int, str]
    clean: set[int]
    shorten: set[int]
    repeats: dict[int, int]
    rows_left: int = 0
    _rest: dict[int, bytes] = field(default_factory=dict)
    _done: Fixed = field(default_factory=Fixed)

    @classmethod
    def of(cls, findings: Sequence[Finding]) -> _Plan:
        rows = {kind: [row for f in findings if f.kind == kind for row in f.rows] for kind in ("blank", "identical")}
        groups = [group for f in findings if f.kind == "duplicate" for group in f.details["groups"]]
        return cls(
            {row: kind for kind, lines in rows.items() for row in lines},
            {row for f in findings if f.kind in ("escapes", "carriage_returns") for row in f.rows},
            {row for f in findings if f.kind == "prompt_repeated" for row in f.rows},
            {row: group[0] for group in groups for row in group[1:]},
        )

    def tried(self, path: Path) -> Fixed:
        """Go through the file without writing; return what there is to do."""
        self._done, self.rows_left = Fixed(), 0
        with environment_faults(path), path.open("rb") as source:
            for _, line in self.lines(source):
                self.rows_left += bool(line.strip())
        done, self._done = self._done, Fixed()
        return done

    def lines(self, source: BinaryIO) -> Iterator[tuple[int, bytes]]:
        """Yield what stays of a file, mended, with its line numbers; giant lines come in pieces."""
        firsts = set(self.repeats.values())
        number, begins = 0, True
        while piece := source.readline(MAX_LINE_BYTES + 1):
            number += begins
            whole = begins and len(piece) <= MAX_LINE_BYTES
            begins = piece.endswith(b"\n")
            if not whole:
                yield number, piece
                continue
            if number in firsts:
                self._rest[number] = _rest_of(piece)
            if not self._goes(number, piece):
                yield number, self._mended(number, piece)

    def _goes(self, number: int, line: bytes) -> bool:
        kind = self.delete.get(number)
        if kind is None and number in self.repeats:
            # The same texts with another weight or other tags are not the same row.
            if self._rest.get(self.repeats[number]) != _rest_of(line):
                self._done.kept.append(number)
                return False
            kind = "duplicate"
        if kind is not None:
            self._done.deleted.setdefault(kind, []).append(number)
        return kind is not None

    def _mended(self, number: int, line: bytes) -> bytes:
        new = _without_escapes(line) if number in self.clean else line
        new = _without_prompt(new) if number in self.shorten else new
        if new != line:
            self._done.cleaned.append(number)
        return new


def _without_bom(line: bytes) -> tuple[bytes, bytes]:
    """The mark that a file may begin with, and what follows it."""
    body = line.removeprefix(_BOM)
    return line[: len(line) - len(body)], body


def _rest_of(line: bytes) -> bytes:
    """Return a digest of what a row has beside its texts and its id."""
    row = parse_object(_without_bom(line)[1].decode("utf-8"))
    rest = {key: value for key, value in row.items() if key not in (*_TEXTS, "id") and value is not None}
    return hashlib.blake2b(json.dumps(rest, sort_keys=True).encode(), digest_size=16).digest()


def _without_escapes(line: bytes) -> bytes:
    head, body = _without_bom(line)
    text = body.decode("utf-8")
    row = parse_object(text)
    changes = {key: _clean(row[key]) for key in _TEXTS if key in row and _clean(row[key]) != row[key]}
    if not changes:
        return line
    new = set_values(text, changes)
    # Rather a row with escapes than a wrong one.
    return head + new.encode("utf-8") if parse_object(new) == {**row, **changes} else line


def _without_prompt(line: bytes) -> bytes:
    """The line with the prompt taken out of both answers; what stands around them stays."""
    head, rest = _without_bom(line)
    body = rest.rstrip(b"\r\n")
    pair, _ = take_pair(Row(0, parse_object(body.decode("utf-8"))), "", ProblemLog())
    if pair is None or not repeats_prompt(pair):
        return line
    chosen, rejected = without_prompt(pair)
    draft = replace(read_row(body).draft(), chosen=chosen, rejected=rejected)
    return head + write_row(body, draft) + rest[len(body) :]


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return with_line_ends(strip_escapes(value))
    if isinstance(value, Mapping):
        return {key: _clean(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_clean(inner) for inner in value]
    return value
