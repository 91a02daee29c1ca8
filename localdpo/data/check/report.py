"""Check a file of pairs: scan it, ask every question, and put the findings in order.

This module knows no models; the distance from one is `localdpo.evaluate.distance`'s to measure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from localdpo.data.check.chance import MIN_PROMPTS
from localdpo.data.check.findings import Finding, Severity, counted, exit_code, found, in_order
from localdpo.data.check.leaks import Other, leak_findings
from localdpo.data.check.length import length_figures, length_findings
from localdpo.data.check.near import are_near, are_reversed, grouped
from localdpo.data.check.repeats import Repeats
from localdpo.data.check.scan import Scan, scan_file, texts_of_lines
from localdpo.data.check.shortcuts import shortcut_findings
from localdpo.data.check.tokens import Counter, estimate_counts
from localdpo.data.jsonl import Progress
from localdpo.data.language import guess_language
from localdpo.data.pairs import listed
from localdpo.recipe import Truncation

__all__ = ["CheckOptions", "Report", "check_file"]

_CANDIDATES = 50_000
_MANY_NEAR, _MANY_REFUSALS, _MIXED = 0.02, 0.10, 0.05
_ENCODING = ("is not UTF-8", "is UTF-16", "has half of a surrogate")
DEFAULT_MAX_LENGTH = 1024


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """What a check is to know beside the file.

    `others` are files whose prompts must not be trained on; `expected` are words that the pairs are to teach;
    `counter` counts tokens, None estimates them.
    """

    others: tuple[Other, ...] = ()
    expected: tuple[str, ...] = ()
    max_length: int = DEFAULT_MAX_LENGTH
    truncation: Truncation = "keep_start"
    counter: Counter | None = None


@dataclass(slots=True)
class Report:
    """What a check found. `notes` say what was not looked at, and why."""

    file: str
    pairs: int
    skipped: int
    findings: list[Finding]
    notes: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 with nothing above info, 1 with warnings, 2 with errors."""
        return exit_code(self.findings)


def check_file(path: Path, options: CheckOptions | None = None, progress: Progress | None = None) -> Report:
    """Check the file at `path`. Raises `InputError` when it, or another file named, cannot be read at all."""
    options = options or CheckOptions()
    counter = options.counter or estimate_counts
    scan = scan_file(path, counter, prompts_too=bool(options.others), progress=progress)
    notes: list[str] = []
    repeats = scan.digests.find()
    findings = [
        *_broken(scan),
        *_row_findings(scan),
        *_repeat_findings(scan, repeats),
        *_near_findings(scan, repeats, notes),
        *_length_limit_findings(scan, options),
        *_language_findings(scan),
        *_bias_findings(scan, options, notes),
    ]
    for other in options.others:
        findings += leak_findings(scan, other, notes)
    findings = [_of_file(finding, str(path)) for finding in findings]
    return Report(str(path), scan.pairs, scan.num_skipped, in_order(findings), notes)


def _of_file(finding: Finding, name: str) -> Finding:
    return finding if finding.file else replace(finding, file=name)


def _broken(scan: Scan) -> Iterator[Finding]:
    for (message, fix), lines in scan.log.lines.items():
        kind = "encoding" if message.startswith(_ENCODING) else "schema"
        yield found(kind, message, lines, fix=fix or None)
    if scan.log.others:
        count = len(scan.log.others)
        yield found("schema", f"and {count:,} more problems, each another", sorted(set(scan.log.others)))
    if not scan.pairs and not scan.log.total:
        skipped = scan.num_skipped
        why = f"all {skipped:,} rows are ones that training skips" if skipped else "the file is empty"
        yield found("empty", f"0 pairs: {why}")


_ROW_MESSAGES = {
    "same_words": ("pair whose answers differ", "pairs whose answers differ", "in case, punctuation or spaces only"),
    "escapes": ("pair", "pairs", "with terminal escapes or control characters"),
    "carriage_returns": ("pair", "pairs", "with carriage returns in the text"),
    "serialised": ("pair", "pairs", "with a conversation written out as text"),
    "prompt_repeated": ("pair", "pairs", "whose answers begin with the whole prompt"),
    "invisible": ("pair", "pairs", "with invisible or direction-changing characters"),
    "mojibake": ("pair", "pairs", "with characters that were wrongly decoded"),
    "special_tokens": ("pair", "pairs", "with special tokens in the text"),
    "template": ("pair", "pairs", "with what looks left over from a prompt template"),
    "refusal": ("chosen answer refuses or apologises", "chosen answers refuse or apologise", "as an AI"),
    "language": (
        "chosen answer is in another language than its prompt",
        "chosen answers are in another language than their prompts",
        "while the rejected one is not",
    ),
}


def _row_findings(scan: Scan) -> Iterator[Finding]:
    for (code, reason), skipped in scan.skipped.items():
        yield found(code, f"{counted(len(skipped), 'row', 'rows')} skipped: {reason}", skipped)
    for code, (one, many, rest) in _ROW_MESSAGES.items():
        if code not in scan.codes:
            continue
        lines = list(scan.codes[code])
        quoted = "; ".join(scan.seen[code])
        message = f"{counted(len(lines), one, many)} {rest}" + (f": {quoted}" if quoted else "")
        often = code == "refusal" and len(lines) >= _MANY_REFUSALS * scan.pairs and len(lines) >= 3
        yield found(code, message, lines, severity=Severity.WARNING if often else None, share=len(lines) / scan.pairs)


def _repeat_findings(scan: Scan, repeats: Repeats) -> Iterator[Finding]:
    if repeats.duplicates:
        later = sorted(line for group in repeats.duplicates for line in group[1:])
        message = (
            f"{counted(len(later), 'pair repeats', 'pairs repeat')} an earlier one ({len(later) / scan.pairs:.1%})"
        )
        yield found("duplicate", message, later, groups=[list(group) for group in repeats.duplicates])
    for groups, one, many, what in (
        (repeats.contradictory, "pair of answers is", "pairs of answers are", "preferred both ways round"),
        (repeats.cycles, "prompt has", "prompts have", "preferences in a circle (A over B over C over A)"),
    ):
        if groups:
            lines = sorted(line for group in groups for line in group)
            message = f"{counted(len(groups), one, many)} {what}, as in {listed(groups[0])}"
            yield found("contradictory", message, lines, groups=[list(group) for group in groups])
    if lines := scan.ids_again():
        yield found("duplicate_id", f"{counted(len(lines), 'row uses', 'rows use')} an id again", lines)


def _near_findings(scan: Scan, repeats: Repeats, notes: list[str]) -> Iterator[Finding]:
    candidates, complete = scan.near.candidates(_CANDIDATES)
    if not complete:
        notes.append(f"near-duplicates: only the first {_CANDIDATES:,} candidates were compared")
    lines = scan.lines
    exact = {line for group in repeats.duplicates for line in group[1:]}
    edges = [(int(lines[a]), int(lines[b])) for a, b in candidates]
    edges = [edge for edge in edges if edge[1] not in exact]
    texts = texts_of_lines(scan.path, {line for edge in edges for line in edge}) if edges else {}
    near = [(a, b) for a, b in edges if a in texts and b in texts and _near_duplicates(texts[a], texts[b])]
    groups = grouped(near)
    if groups:
        later = sorted(line for group in groups for line in group[1:])
        share = len(later) / scan.pairs
        # Pairs of one prompt are held out together or not at all; prompts that merely look alike are torn apart.
        apart = {b for a, b in near if texts[a][0] != texts[b][0]}
        many = len(apart) >= 3 and len(apart) > _MANY_NEAR * scan.pairs
        nearly = f"{counted(len(later), 'pair is', 'pairs are')} nearly the same as an earlier one"
        message = f"{nearly} ({share:.1%}), as in {listed(groups[0])}"
        if apart:
            message += f"; of {len(apart):,} the prompts differ a little, so that a held-out part may not be new"
        severity = Severity.WARNING if many else None
        yield found("near_duplicate", message, later, severity=severity, groups=[list(group) for group in groups])


def _near_duplicates(first: tuple[str, str, str], second: tuple[str, str, str]) -> bool:
    return are_near(first, second) and not are_reversed(first, second)


def _length_limit_findings(scan: Scan, options: CheckOptions) -> Iterator[Finding]:
    prompt, chosen, rejected = (np.array(column, np.int64) for column in scan.tokens)
    limit, lines = options.max_length, scan.lines
    about = "" if options.counter else "an estimated "
    full = prompt >= limit
    over = (prompt + np.maximum(chosen, rejected) > limit) & ~full
    if full.any():
        named = [int(line) for line in lines[full]]
        severity = Severity.ERROR if bool(full.all()) and options.counter else None
        message = (
            f"{counted(len(named), 'prompt fills', 'prompts fill')} {about}{limit:,} tokens (data.max_length): skipped"
        )
        yield found("too_long", message, named, severity=severity, max_length=limit, estimated=not options.counter)
    if over.any():
        named = [int(line) for line in lines[over]]
        what = {
            "keep_start": "their answers lose their ends",
            "keep_end": "their prompts lose their starts",
            "skip": "they are skipped",
        }[options.truncation]
        longer = f"{counted(len(named), 'pair is', 'pairs are')} longer than {about}{limit:,} tokens"
        message = f"{longer} (data.max_length): {what}"
        yield found("too_long", message, named, max_length=limit, estimated=not options.counter)


def _language_findings(scan: Scan) -> Iterator[Finding]:
    """Say of the sample's chosen answers in which languages they are, if in several."""
    languages: dict[str, list[int]] = {}
    for answers in scan.sample.answers():
        language = guess_language(answers.chosen)
        if language is not None:
            languages.setdefault(language, []).append(answers.line)
    total = sum(map(len, languages.values()))
    many = {name: lines for name, lines in languages.items() if len(lines) >= max(3, _MIXED * total)}
    if len(many) < 2:
        return
    ranked = sorted(many, key=lambda name: -len(many[name]))
    shares = {name: len(languages[name]) / total for name in ranked}
    parts = ", ".join(f"{share:.0%} {name}" for name, share in shares.items())
    message = f"the chosen answers are in several languages (guessed): {parts}"
    rest = sorted(line for name in ranked[1:] for line in many[name])
    yield found("language_mix", message, rest, shares={name: round(share, 4) for name, share in shares.items()})


def _bias_findings(scan: Scan, options: CheckOptions, notes: list[str]) -> Iterator[Finding]:
    wanted = np.array(scan.preference, np.int64).astype(bool)
    if not wanted.any():
        return
    groups = np.unique(scan.digests.groups()[wanted], return_inverse=True)[1]
    prompts = int(groups.max()) + 1
    if prompts < MIN_PROMPTS:
        notes.append(f"length bias and shortcuts: not asked of {prompts} prompts; {MIN_PROMPTS} are the least")
        return
    findings, taught = shortcut_findings(scan.sample.answers(), int(wanted.sum()), options.expected)
    yield from findings
    chosen, rejected = (np.array(column, np.int64)[wanted] for column in scan.words)
    figures = length_figures(chosen, rejected, groups)
    explained = taught.text if taught is not None and taught.accuracy.value >= figures.accuracy.value else ""
    yield from length_findings(figures, chosen, rejected, scan.lines[wanted], explained)
