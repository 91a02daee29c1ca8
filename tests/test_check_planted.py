"""Every planted defect is found with its rows, and real pairs are not cried wolf at."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from planted import BUILDERS, PANDALM, Planted, clean_pairs, opening_in_chosen, word_in_chosen

from localdpo.console.pairs_check import settings_of
from localdpo.data.check.findings import KINDS, Severity
from localdpo.data.check.leaks import Other
from localdpo.data.check.report import CheckOptions, Report, check_file

RECIPES = Path(__file__).parents[1] / "recipes"
PAGE = Path(__file__).parents[1] / "docs" / "data-checks.md"
BIASES = {"length_bias", "shortcut", "separable"}


def checked(case: Planted, folder: Path, **options: object) -> Report:
    path, held_out = case.write(folder)
    others = (Other(held_out, "eval"),) if held_out else ()
    return check_file(path, CheckOptions(others=others, **options))  # type: ignore[arg-type]


def kinds(report: Report, least: Severity = Severity.WARNING) -> set[str]:
    return {finding.kind for finding in report.findings if finding.severity.rank >= least.rank}


@pytest.mark.parametrize("what", BUILDERS)
def test_what_is_planted_is_found_and_nothing_beside_it(what: str, tmp_path: Path):
    case = BUILDERS[what]()
    report = checked(case, tmp_path)
    findings = [finding for finding in report.findings if finding.kind == case.kind]
    assert findings
    if case.lines is None:
        assert {finding.severity for finding in findings} >= {Severity.WARNING}
        assert any(case.evidence in finding.message for finding in findings)
        assert all(finding.rows for finding in findings)
    else:
        assert {row for finding in findings for row in finding.rows} == case.lines
    assert kinds(report) <= {case.kind, *BIASES}
    assert bool(report.exit_code) == (max(f.severity.rank for f in findings) > 0)


def test_real_pairs_one_a_prompt_give_nothing(tmp_path: Path):
    report = checked(Planted("", list(clean_pairs())), tmp_path)
    assert (report.findings, report.notes, report.pairs) == ([], [], 153)


def test_all_of_pandalm_gives_the_two_warnings_that_are_true():
    report = check_file(PANDALM)
    assert kinds(report) == {"duplicate", "contradictory"}
    rows = [json.loads(line) for line in PANDALM.read_text("utf-8").splitlines()]
    found = {finding.kind: finding for finding in report.findings}
    for group in found["duplicate"].details["groups"]:
        assert len({tuple(text.strip() for text in rows[line - 1].values()) for line in group}) == 1
    assert len(found["duplicate"].rows) == len(rows) - len(
        {tuple(text.strip() for text in row.values()) for row in rows}
    )
    (circle,) = found["contradictory"].details["groups"]
    edges = {rows[line - 1]["chosen"].strip(): rows[line - 1]["rejected"].strip() for line in circle}
    assert {edges[edges[edges[answer]]] for answer in edges} == set(edges)


@pytest.mark.parametrize("by_recipe", [False, True], ids=["alone", "with its recipe"])
def test_the_shipped_pairs_are_not_warned_about(by_recipe: bool):
    settings = settings_of(RECIPES / "athene.jsonl", RECIPES / "athene.yaml" if by_recipe else None)
    report = check_file(settings.file, CheckOptions(settings.others, settings.expected, settings.max_length))
    assert kinds(report) == set()
    (name,) = [f for f in report.findings if f.kind == "shortcut" and "Athene" in f.message]
    assert ("these pairs are to teach" if by_recipe else "looks like a name") in name.message


def test_what_is_expected_is_information(tmp_path: Path):
    report = checked(word_in_chosen(1.0), tmp_path, expected=("Certainly",))
    assert kinds(report) == set()
    (finding,) = [f for f in report.findings if f.kind == "shortcut" and "certainly" in f.message]
    assert (finding.severity, finding.fix) == (Severity.INFO, "")


def test_common_words_of_an_expected_sentence_are_not_expected(tmp_path: Path):
    report = checked(word_in_chosen(1.0, "the"), tmp_path, expected=("I am the one",))
    assert "shortcut" in kinds(report)


def test_a_shortcut_is_found_in_twenty_pairs(tmp_path: Path):
    case = word_in_chosen(1.0)
    report = checked(Planted(case.kind, case.rows[:20]), tmp_path)
    (finding,) = [f for f in report.findings if f.kind == "shortcut"]
    assert (finding.severity, len(finding.rows)) == (Severity.WARNING, 20)


def test_a_capital_at_the_start_is_no_name(tmp_path: Path):
    report = checked(opening_in_chosen(0.9), tmp_path)
    assert "shortcut" in kinds(report)


def test_random_labels_are_not_said_to_be_biased(tmp_path: Path):
    # At 1 % a test, 12 files of three tests each: more than two would be a sign.
    rng, said = random.Random(0), 0
    for size in (20, 40, 80) * 4:
        rows = [
            {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if rng.random() < 0.5 else row
            for row in rng.sample(clean_pairs(), size)
        ]
        report = checked(Planted("", list(rows)), tmp_path)
        said += bool(BIASES & kinds(report, Severity.INFO))
    assert said <= 2


def test_a_few_pairs_are_not_judged(tmp_path: Path):
    rows = [{"prompt": f"p{n}?", "chosen": f"yes {n}, a longer one", "rejected": f"no {n}"} for n in range(11)]
    report = checked(Planted("", list(rows)), tmp_path)
    assert kinds(report, Severity.INFO) == set()
    assert "11 prompts" in report.notes[0]


def test_many_pairs_of_one_prompt_count_once(tmp_path: Path):
    rows = clean_pairs()[:30]
    rows += [{"prompt": rows[0]["prompt"], "chosen": f"wow {n} " + "long " * n, "rejected": "no"} for n in range(90)]
    report = checked(Planted("", list(rows)), tmp_path)
    assert not BIASES & kinds(report)


def test_the_page_names_every_kind():
    text = PAGE.read_text("utf-8")
    assert [kind for kind in KINDS if f"| `{kind}` |" not in text] == []
