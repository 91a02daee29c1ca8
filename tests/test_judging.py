"""The judge is asked in both orders; one that favours a place decides nothing, whatever the answers are."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localdpo.data.judging import Verdict, ballots, read_verdict, standing, verdict_of

ANSWERS = ["bad", "good answer", "best answer of all", "so-so"]


def ask(judge: object, count: int) -> list[Verdict]:
    return [judge(ballot.first, ballot.second) for ballot in ballots(count)]  # type: ignore[operator]


def by_length(first: int, second: int) -> Verdict:
    return "first" if len(ANSWERS[first]) > len(ANSWERS[second]) else "second"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", "first"), ("B.", "second"), (" T\n", "tie"), ("Answer B is better.", "second"), ("**A**", "first"),
        ("option b", "second"), ("It is a tie", "tie"), ("Both are fine", "tie"), ("(A)", "first"), ("", "unclear"),
        ("an apple", "unclear"), ("I cannot say", "unclear"), ("Better", "unclear"), ("answer a", "first"),
    ],
)  # fmt: skip
def test_replies(text: str, expected: Verdict) -> None:
    assert read_verdict(text) == expected


def test_every_two_answers_are_shown_in_both_orders() -> None:
    asked = ballots(4)
    assert len(asked) == 12
    assert {(b.first, b.second) for b in asked} == set(itertools.permutations(range(4), 2))
    for one, other in zip(asked[::2], asked[1::2], strict=True):
        assert (one.first, one.second) == (other.second, other.first)
    text = asked[0].question([{"role": "user", "content": "Q?"}], ANSWERS)[0]["content"]
    turned = asked[1].question([{"role": "user", "content": "Q?"}], ANSWERS)[0]["content"]
    assert text.index("bad") < text.index("good answer")
    assert turned.index("bad") > turned.index("good answer")


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("first", "second", "first"), ("second", "first", "second"), ("first", "first", "tie"),
        ("second", "second", "tie"), ("tie", "tie", "tie"), ("first", "tie", "tie"), ("unclear", "first", "unclear"),
    ],
)  # fmt: skip
def test_only_the_same_answer_in_both_orders_counts(one: Verdict, other: Verdict, expected: Verdict) -> None:
    assert verdict_of(one, other) == expected


def test_a_judge_without_bias_finds_best_and_worst() -> None:
    found = standing(4, ask(by_length, 4))
    assert (found.best, found.worst, found.wins) == (2, 0, (-3, 1, 3, -1))
    assert (found.compared, found.same_place) == (6, 0)


@pytest.mark.parametrize("place", ["first", "second"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_judge_that_always_names_one_place_decides_nothing(place: Verdict, count: int) -> None:
    found = standing(count, ask(lambda first, second: place, count))
    assert (found.best, found.worst) == (None, None)
    assert found.same_place == found.compared == count * (count - 1) // 2
    assert set(found.wins) == {0}


def test_a_judge_with_some_bias_decides_what_it_decides_in_both_orders() -> None:
    def leaning(first: int, second: int) -> Verdict:
        # names the first place unless the second answer is much longer
        return "second" if len(ANSWERS[second]) > len(ANSWERS[first]) + 8 else "first"

    # bad (3), good answer (11), best answer of all (18), so-so (5): only differences above 8 are decided
    found = standing(4, ask(leaning, 4))
    assert found.best == 2
    assert found.wins == (-1, 0, 2, -1)
    assert (found.worst, found.same_place) == (0, 4)
    two = standing(2, [leaning(0, 2), leaning(2, 0)])
    assert (two.best, two.worst) == (1, 0)


def test_a_judge_that_says_nothing_useful() -> None:
    found = standing(2, ["unclear", "first"])
    assert (found.best, found.reason) == (None, "the judge's replies name no answer")


@settings(deadline=None)
@given(count=st.integers(2, 4), data=st.data())
def test_a_pair_is_only_made_where_the_judge_prefers_best_to_worst_in_both_orders(
    count: int, data: st.DataObject
) -> None:
    kinds = st.sampled_from(["first", "second", "tie", "unclear"])
    asked = ballots(count)
    verdicts: list[Verdict] = data.draw(st.lists(kinds, min_size=len(asked), max_size=len(asked)))
    found = standing(count, verdicts)
    if found.best is None:
        assert found.reason
        return
    said = {(b.first, b.second): v for b, v in zip(asked, verdicts, strict=True)}
    assert said[found.best, found.worst] == "first"
    assert said[found.worst, found.best] == "second"
