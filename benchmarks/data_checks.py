"""Count what `localdpo pairs check` finds, and what it cries wolf at: ``python benchmarks/data_checks.py [--write]``.

Planted defects come from tests/planted.py; real files are those of recipes/ and tests/data. For chance, the answers of
random pairs are swapped, so that nothing can tell them apart, and whatever is said of length or shortcuts is wrong.
`--write` puts the tables into docs/data-checks.md.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import planted

from localdpo.console.pairs_check import settings_of
from localdpo.data.check.findings import KINDS, Severity
from localdpo.data.check.leaks import Other
from localdpo.data.check.report import CheckOptions, Report, check_file

PAGE = ROOT / "docs" / "data-checks.md"
BEGIN, END = "<!-- tables: benchmarks/data_checks.py --write -->", "<!-- end of tables -->"
CHANCE = ("pairs", "files", "answers swapped at random: noted", "and warned", "word in 90 % of chosen: warned")
BIASES = ("length_bias", "shortcut", "separable")


def table(header: Sequence[str], rows: Iterator[Sequence[object]]) -> list[str]:
    lines = [header, ["---"] * len(header), *([str(cell) for cell in row] for row in rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def kinds() -> Iterator[Sequence[object]]:
    for name, kind in KINDS.items():
        yield f"`{name}`", str(kind.severity), kind.title, kind.fix + (" (`--fix`)" if kind.fixable else "")


def check_planted(case: planted.Planted) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        path, held_out = case.write(Path(folder))
        return check_file(path, CheckOptions(others=(Other(held_out, "eval"),) if held_out else ()))


def planted_rows() -> Iterator[Sequence[object]]:
    for what, build in planted.BUILDERS.items():
        case = build()
        findings = [finding for finding in check_planted(case).findings if finding.kind == case.kind]
        named = {row for finding in findings for row in finding.rows}
        severity = max((finding.severity for finding in findings), key=lambda s: s.rank, default=None)
        if case.lines is None:
            is_it = [f for f in findings if case.evidence in json.dumps(f.to_json())]
            yield what, f"`{case.kind}`", severity or "-", "yes" if is_it else "**no**", "of the whole file"
        else:
            hit = f"{len(named & case.lines)} of {len(case.lines)}"
            yield what, f"`{case.kind}`", severity or "-", hit, f"{len(named - case.lines)} others named"


def real_rows(folder: Path) -> Iterator[Sequence[object]]:
    once = folder / "pandalm-one-a-prompt.jsonl"
    once.write_text("".join(json.dumps(row) + "\n" for row in planted.clean_pairs()), "utf-8")
    recipe = settings_of(None, ROOT / "recipes" / "athene.yaml")
    files = (
        ("recipes/athene.jsonl", ROOT / "recipes" / "athene.jsonl", CheckOptions()),
        (
            "recipes/athene.jsonl, with `--recipe`",
            recipe.file,
            CheckOptions(recipe.others, recipe.expected, recipe.max_length),
        ),
        ("PandaLM, all", planted.PANDALM, CheckOptions()),
        ("PandaLM, one pair a prompt", once, CheckOptions()),
    )
    for name, path, options in files:
        report = check_file(path, options)
        by = {severity: [f for f in report.findings if f.severity is severity] for severity in Severity}
        warned = ", ".join(f"`{f.kind}` ({len(f.rows)} rows)" for f in by[Severity.WARNING]) or "none"
        noted = ", ".join(f"`{f.kind}`" for f in by[Severity.INFO]) or "none"
        yield name, report.pairs, len(by[Severity.ERROR]), warned, noted


def chance_rows(folder: Path, repeats: int) -> Iterator[Sequence[object]]:
    """Yield how often something is said of random labels, and how often a planted word is warned of."""
    rows, planted_too = planted.clean_pairs(), planted.word_in_chosen().rows
    for size in (12, 16, 20, 30, 50, len(rows)):
        said = warned = caught = 0
        for seed in range(repeats):
            rng = random.Random(seed)
            picked = rng.sample(range(len(rows)), size)
            by_chance = _biases(folder, [_swapped(rows[i]) if rng.random() < 0.5 else rows[i] for i in picked])
            said += bool(by_chance)
            warned += Severity.WARNING in by_chance
            caught += Severity.WARNING in _biases(folder, [planted_too[i] for i in picked], "shortcut")
        yield size, repeats, said, warned, caught


def _biases(folder: Path, rows: list[dict[str, str]], *kinds: str) -> set[Severity]:
    path = folder / "chance.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return {finding.severity for finding in check_file(path).findings if finding.kind in (kinds or BIASES)}


def _swapped(row: dict[str, str]) -> dict[str, str]:
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def tables(repeats: int) -> list[str]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return [
            "## Every kind of finding",
            "",
            *table(("kind", "severity as a rule", "in short", "what to do"), kinds()),
            "",
            "## Planted defects",
            "",
            *table(("planted in 153 real pairs", "kind", "severity", "found", "beside it"), planted_rows()),
            "",
            "## Real files",
            "",
            *table(("file", "pairs", "errors", "warnings", "notes"), real_rows(folder)),
            "",
            "## Chance",
            "",
            *table(CHANCE, chance_rows(folder, repeats)),
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/data-checks.md")
    parser.add_argument("--repeats", type=int, default=100, help="files of each size for chance")
    options = parser.parse_args()
    lines = tables(options.repeats)
    if not options.write:
        print("\n".join(lines))
        return
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    PAGE.write_text("\n".join([before + BEGIN, "", *lines, "", END + rest.partition(END)[2]]), "utf-8")


if __name__ == "__main__":
    main()
