"""What a check can find: every kind, once, with its severity and remedy; and a finding as the check reports it.

The names here are those of `localdpo pairs check --json` and of the marks beside a row in the terminal UI. This module
knows nothing about how anything is found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

__all__ = ["KINDS", "Finding", "FindingKind", "Severity", "counted", "exit_code", "found", "in_order", "worst"]


class Severity(StrEnum):
    """How bad a finding is.

    `info`: true and worth knowing, perhaps what was meant. `warning`: likely to spoil training or what is measured.
    `error`: the file cannot be trained on.
    """

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"

    @property
    def rank(self) -> int:
        """0 for info, 1 for warning, 2 for error."""
        return list(Severity).index(self)


@dataclass(frozen=True, slots=True)
class FindingKind:
    """`title` is two or three words for a mark or a heading, `fix` what to do, `fixable` whether `--fix` does it."""

    severity: Severity
    title: str
    fix: str
    fixable: bool = False


_INFO, _WARNING, _ERROR = Severity

KINDS: dict[str, FindingKind] = {
    # The file
    "encoding": FindingKind(_ERROR, "not UTF-8", "Save the file as UTF-8, or retype the line"),
    "schema": FindingKind(_ERROR, "broken row", "Correct the line, or delete it"),
    "empty": FindingKind(_ERROR, "no pairs", "Write one JSON object with prompt, chosen and rejected a line"),
    # A row
    "blank": FindingKind(_WARNING, "blank text", "Write it, or delete the row: training skips it", fixable=True),
    "identical": FindingKind(
        _WARNING, "same answers", "Write another rejected answer, or delete the row: training skips it", fixable=True
    ),
    "same_words": FindingKind(
        _INFO, "same words", "If case and punctuation are not what you teach, write another rejected answer"
    ),
    "media": FindingKind(_WARNING, "not text", "Leave it out: training skips what no text tells"),
    "no_preference": FindingKind(_WARNING, "no preference", "Say which answer is better, or delete the row"),
    "serialised": FindingKind(
        _WARNING, "structure in a text", "Export it again with messages as lists: this text cannot be read as one"
    ),
    "carriage_returns": FindingKind(
        _WARNING, "carriage returns", "Make them line breaks: the model would learn to write them", fixable=True
    ),
    "prompt_repeated": FindingKind(
        _WARNING, "prompt in answers", "Take it out: both answers would learn to repeat the question", fixable=True
    ),
    "weight_zero": FindingKind(_INFO, "weight 0", "Training skips it: give it a weight, or delete it"),
    "escapes": FindingKind(
        _WARNING, "control characters", "Remove them: the model would learn to write them", fixable=True
    ),
    "invisible": FindingKind(_INFO, "invisible characters", "Remove them unless the script of the text needs them"),
    "mojibake": FindingKind(
        _WARNING, "wrongly decoded", "Export the text again as UTF-8: some characters were lost or doubled"
    ),
    "special_tokens": FindingKind(
        _WARNING,
        "special tokens",
        "Remove them: the template writes the real ones, and in a text they are trained as text",
    ),
    "template": FindingKind(
        _WARNING, "template leftovers", "Remove what a prompt template left behind, or put turns into messages"
    ),
    "refusal": FindingKind(_INFO, "refusals", "If the chosen answer should help, write one that does"),
    "language": FindingKind(
        _INFO, "other language", "If the answer should be in the prompt's language, rewrite or delete the row"
    ),
    "too_long": FindingKind(_WARNING, "too long", "Raise data.max_length, or shorten the text"),
    # A row beside others
    "duplicate": FindingKind(
        _WARNING, "repeated", "Delete the repeats: they count twice; use weight for that", fixable=True
    ),
    "near_duplicate": FindingKind(_INFO, "nearly repeated", "Keep one of each unless the difference is the point"),
    "contradictory": FindingKind(_WARNING, "contradictory", "Keep the one that you mean"),
    "duplicate_id": FindingKind(_INFO, "id used again", "Give every pair an id of its own"),
    "leak": FindingKind(
        _WARNING, "in both files", "Remove them from one file: what was trained on shows nothing about other prompts"
    ),
    "near_leak": FindingKind(
        _INFO, "nearly in both files", "Remove them from one file, unless the difference is what is tested"
    ),
    # The pairs as a whole
    "language_mix": FindingKind(
        _INFO, "several languages", "Fine if the model is to speak them all; otherwise keep one"
    ),
    "length_bias": FindingKind(
        _WARNING, "length bias", "Add pairs in which the other answer is the longer one, or even the lengths out"
    ),
    "shortcut": FindingKind(
        _WARNING,
        "shortcut",
        "If this is what you teach, say so with --expect; if not, reword these answers or give rejected ones it too",
    ),
    "separable": FindingKind(
        _WARNING, "told apart by form", "Look at the words and formats named; make both answers of a pair alike in form"
    ),
    # Under a model
    "far": FindingKind(
        _WARNING, "far from the model", "Read these rows: garbled, in the wrong language, or hard to learn from"
    ),
    "distance": FindingKind(
        _INFO,
        "distance from the model",
        "Keep dpo.rpo_alpha above 0, or take answers from the model itself and correct them",
    ),
}
"""Every kind of finding by name."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found. `rows` are 1-based lines of `file`; for figures of the whole file, its most telling lines.

    `message` says what and how much, `fix` what to do, `details` has the figures by name, for programs. Texts may quote
    the file: sanitise them before showing.
    """

    kind: str
    severity: Severity
    message: str
    fix: str
    rows: tuple[int, ...] = ()
    file: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fixable(self) -> bool:
        """Whether `--fix` puts it right."""
        return KINDS[self.kind].fixable

    def to_json(self) -> dict[str, Any]:
        """Return it as `localdpo pairs check --json` writes it."""
        return {
            "kind": self.kind,
            "severity": self.severity.value,
            "file": self.file,
            "rows": list(self.rows),
            "message": self.message,
            "fix": self.fix,
            "fixable": self.fixable,
            "details": dict(self.details),
        }


def found(
    kind: str,
    message: str,
    rows: Iterable[int] = (),
    *,
    severity: Severity | None = None,
    fix: str | None = None,
    file: str = "",
    **details: Any,
) -> Finding:
    """Make a finding; its severity and remedy are its kind's unless given. `fix=""` means there is none."""
    known = KINDS[kind]
    return Finding(
        kind,
        known.severity if severity is None else severity,
        message,
        known.fix if fix is None else fix,
        tuple(rows),
        file,
        details,
    )


def counted(count: int, one: str, many: str) -> str:
    """Return a count with its noun: `1 pair`, `1,200 pairs`."""
    return f"1 {one}" if count == 1 else f"{count:,} {many}"


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Return findings with the worst first, and in the order of `KINDS` among equals."""
    place = {kind: number for number, kind in enumerate(KINDS)}
    return sorted(findings, key=lambda finding: (-finding.severity.rank, place[finding.kind]))


def worst(findings: Iterable[Finding]) -> Severity | None:
    """Return the highest severity, None without findings."""
    return max((finding.severity for finding in findings), key=lambda severity: severity.rank, default=None)


def exit_code(findings: Iterable[Finding]) -> int:
    """Return what the command ends with: 0 for nothing above info, 1 for warnings, 2 (bad input) for errors."""
    severity = worst(findings)
    return severity.rank if severity is not None else 0
