"""One pass over a file of pairs that keeps what every check needs of a row, and not the row.

Some 300 bytes a pair stay in memory, whatever its length, and a bounded sample of answers.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from localdpo.data.check.near import NearIndex, normal
from localdpo.data.check.repeats import PairDigests, digest_pair, text_digest
from localdpo.data.check.rows import evidence, row_codes
from localdpo.data.check.sample import PromptSample
from localdpo.data.check.tokens import Counter, estimate_counts
from localdpo.data.jsonl import ProblemLog, Progress
from localdpo.data.pairs import PreferencePair, Skipped, scan_pairs
from localdpo.errors import InputError, Problem

__all__ = ["LineLog", "Scan", "prompt_text", "scan_file", "texts_of_lines"]

SAMPLE_PAIRS = 2_000
_DISTINCT_PROBLEMS = 500
_EVIDENCE_EACH = 3
_HELD_CHARS = 64_000_000


class LineLog(ProblemLog):
    """All problems of a file by message, with the lines; of a file full of different ones the first 500 messages."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[tuple[str, str], array[int]] = {}
        self.others: array[int] = array("q")

    def add(self, where: str, message: str, fix: str = "") -> None:
        """Record a problem of the line that `where` ends with."""
        super().add(where, message, fix)
        line = where.rpartition(":")[2]
        number = int(line) if line.isascii() and line.isdigit() else 0
        key = message, fix
        if key in self.lines or len(self.lines) < _DISTINCT_PROBLEMS:
            self.lines.setdefault(key, array("q")).append(number)
        else:
            self.others.append(number)


@dataclass(slots=True)
class Scan:
    """What is known of a file after one pass. Arrays have one entry a pair, in file order."""

    path: Path
    log: LineLog = field(default_factory=LineLog)
    pairs: int = 0
    retained: int = 0
    skipped: dict[tuple[str, str], array[int]] = field(default_factory=dict)
    codes: dict[str, array[int]] = field(default_factory=dict)
    seen: dict[str, list[str]] = field(default_factory=dict)
    digests: PairDigests = field(default_factory=PairDigests)
    near: NearIndex = field(default_factory=NearIndex)
    prompts: NearIndex = field(default_factory=NearIndex)
    sample: PromptSample = field(default_factory=lambda: PromptSample(SAMPLE_PAIRS))
    ids: array[int] = field(default_factory=lambda: array("Q"))
    id_rows: array[int] = field(default_factory=lambda: array("q"))
    words: tuple[array[int], array[int]] = field(default_factory=lambda: (array("i"), array("i")))
    tokens: tuple[array[int], array[int], array[int]] = field(
        default_factory=lambda: (array("i"), array("i"), array("i"))
    )
    preference: array[int] = field(default_factory=lambda: array("b"))

    @property
    def lines(self) -> npt.NDArray[np.int64]:
        """The line of every pair."""
        return self.digests.lines

    def add(self, pair: PreferencePair, counter: Counter, prompts_too: bool) -> None:
        """Take one pair."""
        self.pairs += 1
        digest = digest_pair(pair)
        self.digests.add(pair.line, digest)
        for code in row_codes(pair):
            self.mark(code, pair)
        texts = normal(prompt_text(pair)), normal(pair.chosen), normal(pair.rejected)
        self.near.add(texts)
        if prompts_too:
            self.prompts.add(texts[:1])
        for column, text in zip(self.words, texts[1:], strict=True):
            column.append(text.count(" ") + 1)
        for tokens, count in zip(self.tokens, counter(pair), strict=True):
            tokens.append(count)
        wanted = pair.kind == "preference"
        self.preference.append(wanted)
        if wanted:
            self.sample.add(pair.line, digest.prompt, pair.chosen, pair.rejected)
        if pair.id is not None:
            self.ids.append(text_digest(pair.id))
            self.id_rows.append(pair.line)

    def mark(self, code: str, pair: PreferencePair) -> None:
        """Note a code for a row, and for the first few what was seen there."""
        self.codes.setdefault(code, array("q")).append(pair.line)
        shown = self.seen.setdefault(code, [])
        if len(shown) < _EVIDENCE_EACH and (text := evidence(code, pair)):
            shown.append(f"{text}, line {pair.line}")

    def skip(self, row: Skipped) -> None:
        """Take a row that teaches nothing."""
        self.skipped.setdefault((row.code, row.reason), array("q")).append(row.line)

    @property
    def num_skipped(self) -> int:
        """How many rows teach nothing."""
        return sum(map(len, self.skipped.values()))

    def ids_again(self) -> list[int]:
        """Return the lines whose id an earlier row has."""
        digests, lines = np.array(self.ids, np.uint64), np.array(self.id_rows, np.int64)
        again = np.ones(len(digests), bool)
        again[np.unique(digests, return_index=True)[1]] = False
        return [int(line) for line in lines[again]]


def prompt_text(pair: PreferencePair) -> str:
    """Return all turns of a prompt as one text."""
    return "\n".join(turn["content"] for turn in pair.prompt)


def scan_file(
    path: Path, counter: Counter = estimate_counts, *, prompts_too: bool = False, progress: Progress | None = None
) -> Scan:
    """Read a file once. `prompts_too` also indexes prompts by themselves, to compare with another file's.

    Broken rows are in the scan's log. Raises `InputError` when there is no such file.
    """
    scan = Scan(path)
    try:
        for row in scan_pairs(path, scan.log, progress):
            if isinstance(row, Skipped):
                scan.skip(row)
            else:
                scan.add(row, counter, prompts_too)
    except InputError as error:
        # Text in another encoding is a finding about line 1; a file that is not there is an error of the command.
        if not all(problem.where == f"{path}:1" for problem in error.problems):
            raise
        _log_all(scan.log, error.problems)
    return scan


def _log_all(log: LineLog, problems: tuple[Problem, ...]) -> None:
    for problem in problems:
        log.add(problem.where, problem.message, problem.fix)


def texts_of_lines(path: Path, lines: set[int]) -> dict[int, tuple[str, str, str]]:
    """Return prompt, chosen and rejected of some lines as `near.normal` gives them, reading the file again.

    Stops at 64 million characters: lines beyond are missing from the result.
    """
    return dict(_texts(path, lines))


def _texts(path: Path, lines: set[int]) -> Iterator[tuple[int, tuple[str, str, str]]]:
    held, left = 0, len(lines)
    for row in scan_pairs(path, ProblemLog()):
        if isinstance(row, Skipped) or row.line not in lines:
            continue
        texts = normal(prompt_text(row)), normal(row.chosen), normal(row.rejected)
        held, left = held + sum(map(len, texts)), left - 1
        yield row.line, texts
        if held > _HELD_CHARS or not left:
            return
