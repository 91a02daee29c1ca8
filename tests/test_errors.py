from __future__ import annotations

import pickle
import signal

import pytest

from localdpo.errors import (
    DivergedError,
    EnvironmentFault,
    InputError,
    Interrupted,
    LocalDPOError,
    Problem,
    first_problems,
)


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (Problem("a.yaml:3", "is wrong"), "a.yaml:3: is wrong."),
        (Problem("a.yaml:3", "is wrong.", "Put it right"), "a.yaml:3: is wrong. Put it right."),
        (Problem("", "no place", "Did you mean x?"), "no place. Did you mean x?"),
    ],
)
def test_a_problem_reads_as_sentences(problem: Problem, text: str):
    assert str(problem) == text


def test_a_problem_that_quotes_a_terminal_escape_is_inert():
    assert str(Problem("a", "\x1b]52;c;x\x07", "\u202e")) == "a: ␛]52;c;x␇. <U+202E>."


@pytest.mark.parametrize(
    ("kind", "code"),
    [(LocalDPOError, 1), (InputError, 2), (EnvironmentFault, 3), (DivergedError, 4), (Interrupted, 130)],
)
def test_exit_codes(kind: type[LocalDPOError], code: int):
    assert kind("x").exit_code == code


def test_an_interruption_carries_its_signal():
    assert Interrupted("x", signal_number=signal.SIGTERM).exit_code == 143


def test_an_error_holds_all_problems_and_prints_one_a_line():
    error = InputError(Problem("a", "b"), "c")
    assert error.problems == (Problem("a", "b"), Problem("", "c"))
    assert str(error) == "a: b.\nc."


def test_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(InputError(Problem("a", "b"), "c")))
    assert error.problems == (Problem("a", "b"), Problem("", "c"))


def test_first_problems_counts_the_rest():
    problems = [Problem(str(i), "x") for i in range(12)]
    assert first_problems(problems, 12) == problems
    assert str(first_problems(problems, 10)[-1]) == "and 2 more problems like these."
    assert len(first_problems(problems[:10], 10, total=10)) == 10
    assert "and 990 more" in first_problems(problems[:10], 10, total=1000)[-1].message
