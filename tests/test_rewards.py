"""Rewards by hand-worked examples, their grammar, and every mistake named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localdpo.data.pairs import PromptRow
from localdpo.data.rewards import REWARDS, parse_rewards, read_rewards
from localdpo.errors import InputError

ROW = PromptRow(({"role": "user", "content": "q"},), extra={"target": "the cat sat"}, line=4, source="p.jsonl")


def score(spec: str, answer: str, **options: Any) -> float:
    (value,) = parse_rewards([spec], **options).scores(answer, ROW).values()
    return value


@pytest.mark.parametrize(
    ("spec", "answer", "expected"),
    [
        ("length:max=4", "one two three four", 1.0),
        ("length:max=4", "1 2 3 4 5 6 7 8", 0.5),  # 4 / (4 + 4)
        ("length:min=6", "1 2 3", 6 / 9),
        ("length:min=2;max=3", "1 2", 1.0),
        ("length:max=5;unit=characters", "0123456789", 0.5),
        ("length:max=0", "a b", 1 / 3),
        ("regex:pattern=^Yes", "Yes, it is", 1.0),
        ("regex:pattern=^yes", "Yes, it is", 0.0),
        ("regex:pattern=^yes;ignore_case=true", "Yes, it is", 1.0),
        (r"regex:pattern=a\;b", "a;b", 1.0),
        ("json", '{"a": 1}', 1.0),
        ("json", "{'a': 1}", 0.0),
        ("json", '```json\n{"a": 1}\n```', 0.0),
        ("json:fenced=yes;keys=a|b", '```json\n{"a": 1}\n```', 0.5),
        ("json:keys=a", "[1]", 0.0),
        ("json", "[" * 100_000, 0.0),
        ("language:is=en", "This is a sentence that is written in English for you.", 1.0),
        ("language:is=de", "This is a sentence that is written in English for you.", 0.0),
        ("language:is=de", "Das ist ein Satz, der nicht auf Englisch ist, und das ist gut.", 1.0),
        ("forbidden:words=sorry|as an AI", "I am sorry, as an ai I am SORRY", 0.25),
        ("forbidden:words=art", "a smart start", 1.0),
        ("required:words=blue|deep sea", "The deep, sea is red", 0.5),
        ("similarity:target=the cat sat", "The cat sat!", 1.0),
        ("similarity:key=target", "xyz", 0.0),
        # trigrams of " ab " and " ab ab ": {" ab", "ab "} and {" ab": 2, "ab ": 2, "b a": 1}
        ("similarity:target=ab", "ab ab", 2 * 2 / (2 + 5)),
    ],
)
def test_by_hand(spec: str, answer: str, expected: float) -> None:
    assert score(spec, answer) == pytest.approx(expected)


@settings(deadline=None)
@given(answer=st.text(max_size=60))
def test_every_reward_is_within_0_and_1_for_any_text(answer: str) -> None:
    specs = [
        "length:min=2;max=5", "regex:pattern=a", "json:keys=a", "language:is=en", "forbidden:words=a",
        "required:words=a", "similarity:target=abc",
    ]  # fmt: skip
    assert {spec.partition(":")[0] for spec in specs} == set(REWARDS) - {"python"}
    scores = parse_rewards(specs).scores(answer, ROW)
    assert all(0 <= value <= 1 for value in scores.values())


def test_of_two_answers_outside_the_window_the_nearer_is_better() -> None:
    values = [score("length:max=5", "w " * count) for count in range(5, 400, 7)]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == len(values)


def test_a_weighted_sum_and_a_weight_turned_round() -> None:
    rewards = parse_rewards(["regex:pattern=a;weight=3", "length:max=2;weight=-1", "regex:pattern=b"])
    scores = rewards.scores("a b", ROW)
    assert scores == {"regex": 1.0, "length": 1.0, "regex#3": 1.0}
    assert rewards.total(scores) == pytest.approx((3 - 1 + 1) / 5)
    assert rewards.rewards[0].to_json() == {"reward": "regex", "weight": 3.0, "pattern": "a"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nosuch", "is no reward"),
        ("length", "min or max is missing"),
        ("length:max=x", "max must be a whole number"),
        ("length:max=-1", "max must be a whole number"),
        ("length:min=5;max=2", "min is 5 and max is 2"),
        ("length:max=2;unit=tokens", "is none of words, characters"),
        ("length:maximum=2", "'maximum' is no setting"),
        ("length:max", "not of the form key=value"),
        ("regex", "pattern is missing"),
        ("regex:pattern=(", "is no regular expression"),
        ("regex:pattern=a;weight=0", "weight is 0"),
        ("regex:pattern=a;weight=nan", "weight must be a number"),
        ("language:is=tlh", "is none of"),
        ("required:words=|", "must be words separated by"),
        ("similarity", "target or key is missing"),
        ("python:path=os:getcwd", "--allow-code"),
    ],
)
def test_mistakes_are_named(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_rewards([spec])


def test_all_mistakes_at_once_and_none_at_all() -> None:
    with pytest.raises(InputError) as caught:
        parse_rewards(["nosuch", "length"])
    assert len(caught.value.problems) == 2
    with pytest.raises(InputError, match="no reward is given"):
        parse_rewards([])


def test_a_missing_target_names_the_row() -> None:
    with pytest.raises(InputError, match=r"p\.jsonl:4.*no text under \"gold\""):
        score("similarity:key=gold", "a")


def test_a_function_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_reward.py").write_text(
        "def share(prompt, answer, row):\n    return len(answer) / len(row['target'] + prompt[0]['content'])\n"
        "def bad(prompt, answer, row):\n    return float('nan')\nvalue = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert score("python:path=own_reward:share", "abcdef", allow_code=True) == 0.5
    with pytest.raises(InputError, match="gave nan, which is not a number"):
        score("python:path=own_reward:bad", "a", allow_code=True)
    for path, message in (
        ("own_reward", "module:function"),
        ("own_reward:none", "imported"),
        ("own_reward:value", "not"),
    ):
        with pytest.raises(InputError, match=message):
            score(f"python:path={path}", "a", allow_code=True)


def test_a_yaml_file(tmp_path: Path) -> None:
    path = tmp_path / "rewards.yaml"
    path.write_text("- {reward: length, max: 3, weight: 2}\n- reward: required\n  words: [a, b c]\n")
    rewards = read_rewards(path)
    assert [reward.to_json() for reward in rewards.rewards] == [
        {"reward": "length", "weight": 2.0, "max": 3},
        {"reward": "required", "weight": 1.0, "words": ["a", "b c"]},
    ]
    assert json.dumps(rewards.rewards[1].to_json())
    path.write_text("reward: length\n")
    with pytest.raises(InputError, match="must be a list of rewards"):
        read_rewards(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_rewards(tmp_path / "none.yaml")
