"""Blind comparison: sides, verdicts, the interval, and a journal that survives whatever ends the program."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import localdpo
from localdpo.data.provenance import AnswerOrigin
from localdpo.errors import InputError
from localdpo.evaluate.blind import (
    BlindTest,
    Choice,
    Comparison,
    WinRate,
    blind_tests,
    swapped,
    wilson_interval,
)

# Newcombe 1998, table I, method 3 (score, no continuity correction), to the four digits printed there.
NEWCOMBE = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]


def comparison(number: int) -> Comparison:
    prompt = ({"role": "user", "content": f"question {number}"},)
    origins = (
        AnswerOrigin("model", "m", time="2026-01-01T00:00:00+00:00"),
        AnswerOrigin("model", "m", adapter="runs/a", sampling={"temperature": 0.8}, seed=7, sample=1),
    )
    return Comparison(f"q{number}", prompt, (f"base {number}", f"tuned {number}"), origins)


def begun(path: Path, count: int = 6, seed: int = 5) -> BlindTest:
    test = BlindTest.start(path, ("base", "tuned"), seed, {"run": "runs/a"})
    for number in range(count):
        test.add(comparison(number))
    return test


def state(test: BlindTest) -> tuple[object, ...]:
    return test.sides, test.seed, test.about, test.comparisons, list(test.judgements.items()), test.current()


@pytest.mark.parametrize(("wins", "trials", "low", "high"), NEWCOMBE)
def test_the_interval_has_the_published_values(wins: int, trials: int, low: float, high: float):
    assert wilson_interval(wins, trials) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_by_its_definition():
    # The ends are the rates from which the observed one is exactly z standard errors away.
    z = 1.959963984540054
    for end in wilson_interval(13.5, 20):
        assert abs(13.5 / 20 - end) == pytest.approx(z * math.sqrt(end * (1 - end) / 20), rel=1e-12)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, 2 * n), st.just(n))))
def test_the_interval_holds_the_rate_and_mirrors(case: tuple[int, int]):
    halves, trials = case
    low, high = wilson_interval(halves / 2, trials)
    assert 0 <= low <= halves / 2 / trials <= high <= 1
    assert wilson_interval(trials - halves / 2, trials) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_no_verdict_says_nothing_and_impossible_counts_are_refused():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert WinRate(skipped=3).rate is None
    assert WinRate(skipped=3).sentence("tuned", "base") == "no verdict yet"
    with pytest.raises(ValueError, match="3 successes of 2"):
        wilson_interval(3, 2)


def test_ties_are_half_a_win_and_skips_count_for_nothing():
    result = WinRate(wins=12, losses=5, ties=3, skipped=4)
    assert result.judged == 20
    assert result.rate == pytest.approx(13.5 / 20)
    assert result.interval == wilson_interval(13.5, 20)
    assert result.to_json()["rate"] == pytest.approx(0.675)


@pytest.mark.parametrize(
    ("result", "meaning"),
    [
        (WinRate(18, 2), "tuned is preferred"),
        (WinRate(2, 18), "base is preferred"),
        (WinRate(12, 8, 1), "too few verdicts to tell them apart"),
    ],
)
def test_the_sentence_concludes_no_more_than_the_interval_allows(result: WinRate, meaning: str):
    assert result.sentence("tuned", "base").endswith(meaning)


def test_sides_are_a_fair_coin_that_depends_on_seed_and_key_alone():
    flips = [swapped(1, f"q{n}") for n in range(2000)]
    assert flips == [swapped(1, f"q{n}") for n in range(2000)]
    # 4.5 standard deviations of a fair coin are 100 of 2,000.
    assert abs(sum(flips) - 1000) < 100
    assert sum(a != swapped(2, f"q{n}") for n, a in enumerate(flips)) > 800


def test_the_order_shown_hides_the_side_and_the_verdict_finds_it(tmp_path: Path):
    test = begun(tmp_path / "t.jsonl", 12)
    for _ in range(12):
        shown = test.current()
        assert shown is not None
        answers = test.comparisons[shown.id].answers
        assert (shown.first, shown.second) == (answers[::-1] if swapped(test.seed, shown.id) else answers)
        # Always prefer the tuned answer, wherever it is shown.
        judgement = test.judge("first" if shown.first.startswith("tuned") else "second")
        assert judgement is not None
        assert judgement.outcome == "b"
    assert test.current() is None
    assert test.judge("tie") is None
    assert test.win_rate() == WinRate(wins=12)
    assert len({swapped(test.seed, f"q{n}") for n in range(12)}) == 2  # both orders were met


def test_undo_brings_the_same_answers_back_in_the_same_order(tmp_path: Path):
    test = begun(tmp_path / "t.jsonl")
    before = test.current()
    test.judge("first")
    test.judge("skip")
    assert [test.undo(), test.undo()] != [None, None]
    assert test.undo() is None
    assert test.current() == before
    assert test.win_rate() == WinRate()
    assert [row["event"] for row in rows(test.path)][-4:] == ["verdict", "verdict", "undo", "undo"]


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@settings(max_examples=25, deadline=None)  # every move is pushed to the disk
@given(st.lists(st.sampled_from([*get_args(Choice), "undo"]), max_size=12), st.integers(0, 10**6))
def test_a_resumed_test_is_the_uninterrupted_one(tmp_path_factory: pytest.TempPathFactory, moves: list[str], seed: int):
    test = begun(tmp_path_factory.mktemp("blind") / "t.jsonl", seed=seed)
    for move in moves:
        if move == "undo":
            test.undo()
        else:
            test.judge(move)  # type: ignore[arg-type]
        assert state(BlindTest.resume(test.path)) == state(test)


def test_half_a_line_is_cut_off_and_the_next_verdict_is_read_back(tmp_path: Path):
    test = begun(tmp_path / "t.jsonl")
    test.judge("first")
    whole = test.path.read_bytes()
    test.judge("second")
    cut = test.path.read_bytes()[:-9]
    for size in range(len(whole), len(cut)):
        test.path.write_bytes(cut[:size])
        again = BlindTest.resume(test.path)
        assert len(again.judgements) == 1
        assert again.path.read_bytes() == whole
    again.judge("tie")
    assert BlindTest.resume(test.path).win_rate().ties == 1


def test_killing_the_judge_loses_no_verdict(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    begun(path, 400)
    script = (
        "import sys\nfrom localdpo.evaluate.blind import BlindTest\n"
        "test = BlindTest.resume(sys.argv[1])\n"
        "while test.judge('first'):\n    print(len(test.judgements), flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(localdpo.__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE, env=environment) as judge:
        assert judge.stdout is not None
        for line in judge.stdout:
            if int(line) == 25:
                judge.send_signal(signal.SIGKILL)
                break
        told = max([25, *(int(line) for line in judge.stdout.read().splitlines())])
    assert len(BlindTest.resume(path).judgements) >= told


def test_what_is_no_blind_test_is_refused_with_its_name(tmp_path: Path):
    path = tmp_path / "other.jsonl"
    path.write_text('{"event": "step", "step": 1}\n')
    with pytest.raises(InputError, match="not the journal of a blind test"):
        BlindTest.resume(path)
    test = begun(tmp_path / "t.jsonl")
    with pytest.raises(InputError, match="exists already"):
        BlindTest.start(test.path, ("base", "tuned"), 1)
    with test.path.open("a") as file:
        file.write('{"event": "verdict", "id": "nobody", "choice": "first"}\n')
    with pytest.raises(InputError, match="no blind test wrote"):
        BlindTest.resume(test.path)


def test_a_comparison_is_kept_as_it_was_first_added(tmp_path: Path):
    test = begun(tmp_path / "t.jsonl", 1)
    test.add(Comparison("q0", comparison(0).prompt, ("other", "answers")))
    assert test.comparisons["q0"] == comparison(0)
    assert BlindTest.resume(test.path).comparisons["q0"] == comparison(0)


def test_the_tests_of_a_run_are_found_without_touching_them(tmp_path: Path):
    test = begun(tmp_path / "run" / "blind" / "base.jsonl")
    test.judge("first")
    (tmp_path / "run" / "blind" / "notes.jsonl").write_text("no journal\n")
    half = test.path.read_bytes() + b'{"event": "verd'
    test.path.write_bytes(half)
    (found,) = blind_tests(tmp_path / "run")
    assert state(found) == state(test)
    assert test.path.read_bytes() == half
    assert blind_tests(tmp_path / "no run") == []
