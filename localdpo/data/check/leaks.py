"""Prompts of a file of pairs that are in another file too, one that must measure or keep something else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from localdpo.data.check.findings import Finding, Severity, counted, found
from localdpo.data.check.near import NearIndex, are_near, normal
from localdpo.data.check.scan import Scan, texts_of_lines
from localdpo.data.jsonl import ProblemLog
from localdpo.data.pairs import PreferencePair, PromptRow, Skipped, prompt_key, read_prompts, scan_pairs

__all__ = ["Other", "leak_findings"]

_CANDIDATES = 50_000


@dataclass(frozen=True, slots=True)
class Other:
    """Another file and what it is for: `eval` holds pairs, `probes` and `retain` prompts."""

    path: Path
    purpose: Literal["eval", "probes", "retain"]


_WHAT = {
    "eval": ("held-out pair has a prompt", "held-out pairs have prompts"),
    "probes": ("probe has a prompt", "probes have prompts"),
    "retain": ("prompt to retain is one", "prompts to retain are ones"),
}


def leak_findings(scan: Scan, other: Other, notes: list[str]) -> Iterator[Finding]:
    """Yield what of `other` is trained on, exactly and nearly; rows are those of the other file.

    The scan must have indexed prompts. Raises `InputError` when the other file cannot be read.
    """
    rows = list(_rows(other, notes))
    trained = scan.digests.column("prompt")
    order = np.argsort(trained, kind="stable")
    keys = np.array([key for _, key, _ in rows], np.uint64)
    place = np.minimum(np.searchsorted(trained, keys, sorter=order), max(0, len(order) - 1))
    same = trained[order][place] == keys if len(order) and len(keys) else np.zeros(len(keys), bool)
    one, many = _WHAT[other.purpose]
    lines = [line for (line, _, _), is_same in zip(rows, same, strict=True) if is_same]
    if lines:
        taught = [int(scan.lines[order[p]]) for p, is_same in zip(place, same, strict=True) if is_same]
        message = f"{counted(len(lines), one, many)} that {scan.path} trains on ({len(lines) / len(rows):.1%})"
        severity = Severity.INFO if other.purpose == "retain" else None  # training leaves those out by itself
        yield found("leak", message, lines, file=str(other.path), severity=severity, train_rows=taught)
    rest = [(line, text) for (line, _, text), is_same in zip(rows, same, strict=True) if not is_same]
    near = _near(scan, rest)
    if near:
        message = f"{counted(len(near), one, many)} nearly like one that {scan.path} trains on"
        lines, taught = [line for line, _ in near], [line for _, line in near]
        yield found("near_leak", message, lines, file=str(other.path), train_rows=taught)


def _rows(other: Other, notes: list[str]) -> Iterator[tuple[int, int, str]]:
    """Yield line, digest and text of the prompts of a file."""
    log = ProblemLog()
    rows: list[PromptRow] | Iterator[PreferencePair | Skipped]
    rows = scan_pairs(other.path, log) if other.purpose == "eval" else read_prompts(other.path)
    for row in rows:
        if not isinstance(row, Skipped):
            text = normal("\n".join(turn["content"] for turn in row.prompt))
            yield row.line, int.from_bytes(prompt_key(row.prompt)[:8], "little"), text
    if log.total:
        notes.append(f"{other.path}: {log.total:,} broken rows were passed over; check that file by itself")


def _near(scan: Scan, rows: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """Return (line, line trained on) of prompts that are nearly the same."""
    index, trained = NearIndex(), scan.prompts.keys()
    for _, text in rows:
        index.add((text,))
    index.put_before(trained)
    candidates = [(a, b - len(trained)) for a, b in index.candidates(_CANDIDATES)[0] if a < len(trained) <= b]
    texts = texts_of_lines(scan.path, {int(scan.lines[a]) for a, _ in candidates}) if candidates else {}
    found_rows: dict[int, int] = {}
    for a, b in candidates:
        taught, (line, text) = int(scan.lines[a]), rows[b]
        if line not in found_rows and taught in texts and are_near(texts[taught][:1], (text,)):
            found_rows[line] = taught
    return sorted(found_rows.items())
