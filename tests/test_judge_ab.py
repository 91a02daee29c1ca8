"""A local judge between two sides: both orders, ties kept apart, a journal that goes on, real runs of a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import replies
from tiny import tiny_model
from training import collect, recipe_for, workspace, write_rows

from localdpo.console import evaluating
from localdpo.errors import InputError
from localdpo.evaluate.blind import BlindTest, blind_tests, wilson_interval
from localdpo.evaluate.judge import JudgeResult, judge_answers, judge_run
from localdpo.steps import Steps
from localdpo.train.events import ProgressEvent


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = workspace(tmp_path_factory.mktemp("work"))
    tiny_model(root / "judge", tie_word_embeddings=False, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCALDPO_CACHE", str(root / "cache"))
        yield root


def finish(work: Any) -> tuple[list[ProgressEvent], JudgeResult]:
    steps = Steps(work)
    return list(steps), steps.result


def replying(monkeypatch: pytest.MonkeyPatch, judge: Path, reply: Callable[[str, str], str]) -> list[str]:
    """Make the model at ``judge`` say what ``reply`` makes of answers A and B; the others answer as they do."""

    def to_prompt(text: str) -> str:
        a, b = text.split("[Answer A]\n")[1].split("\n\n[Answer B]\n")
        return reply(a, b.rsplit("\n\n", 1)[0])

    return replies.replying(monkeypatch, judge, to_prompt)


def prompt(text: str) -> tuple[Any, ...]:
    return ({"role": "user", "content": text},)


ANSWERS = [
    (prompt("one"), "short", "much longer"),
    (prompt("two"), "much longer", "short"),
    (prompt("three"), "same", "same "),
    (prompt("four"), "short", "a longer one"),
]


def longer(a: str, b: str) -> str:
    return "A" if len(a) > len(b) else "B"


@pytest.mark.parametrize("seed", [0, 1])
def test_both_orders_are_asked_and_the_sides_are_counted(root, tmp_path, monkeypatch, seed):
    asked = replying(monkeypatch, root / "judge", longer)
    journal = tmp_path / "blind" / "j.jsonl"
    events, result = finish(judge_answers(journal, ("x", "y"), ANSWERS, str(root / "judge"), seed=seed))
    assert len(asked) == 6  # three differ, two orders each
    assert [asked[n].index("short") < asked[n].index("longer") for n in range(4)] == [True, False, False, True]
    assert (result.rate.wins, result.rate.losses, result.rate.ties, result.rate.skipped) == (2, 1, 1, 0)
    assert (result.asked, result.same, result.same_place) == (3, 1, 0)
    found = result.to_json()
    low, high = wilson_interval(2.5, 4)
    assert found["rate"] == {"value": 2.5 / 4, "low": low, "high": high}
    assert (found["a"], found["b"], found["judge"]) == ("x", "y", str(root / "judge"))
    assert {event.stage for event in events} == {"load", "judge"}


def test_the_journal_is_one_of_blind_tests_with_the_same_result(root, tmp_path, monkeypatch):
    replying(monkeypatch, root / "judge", longer)
    journal = tmp_path / "blind" / "j.jsonl"
    _, result = finish(judge_answers(journal, ("x", "y"), ANSWERS, str(root / "judge"), seed=5))
    (test,) = blind_tests(tmp_path)
    assert test.win_rate() == result.rate
    assert test.about["judge"] == str(root / "judge")
    outcomes = {item.prompt[0]["content"]: judgement.outcome for item, judgement in test.decided()}
    assert outcomes == {"one": "b", "two": "a", "three": "tie", "four": "b"}


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_judge_that_likes_a_place_gives_ties_and_is_named(root, tmp_path, monkeypatch, letter):
    replying(monkeypatch, root / "judge", lambda _a, _b: letter)
    _, result = finish(judge_answers(tmp_path / "j.jsonl", ("x", "y"), ANSWERS, str(root / "judge")))
    assert (result.rate.ties, result.rate.wins, result.rate.losses) == (4, 0, 0)
    assert result.same_place == result.asked == 3
    assert "same place twice for 3 of 3" in result.sentence()


def test_replies_that_name_nothing_are_kept_apart(root, tmp_path, monkeypatch):
    replying(monkeypatch, root / "judge", lambda a, b: "hm" if "one" in a + b else longer(a, b))
    _, result = finish(judge_answers(tmp_path / "j.jsonl", ("x", "y"), ANSWERS, str(root / "judge")))
    assert (result.rate.skipped, result.rate.judged) == (1, 3)
    assert result.to_json()["unclear"] == 1


def test_it_goes_on_where_it_was_and_asks_nothing_twice(root, tmp_path, monkeypatch):
    asked = replying(monkeypatch, root / "judge", longer)
    journal = tmp_path / "j.jsonl"
    test = BlindTest.start(journal, ("x", "y"), 0, {"judge": str(root / "judge")})
    del test
    work = judge_answers(journal, ("x", "y"), ANSWERS, str(root / "judge"))
    next(work)
    work.close()
    assert not asked
    _, some = finish(judge_answers(journal, ("x", "y"), ANSWERS[:1], str(root / "judge")))
    assert (some.asked, some.rate.wins) == (1, 1)
    before = len(asked)
    _, whole = finish(judge_answers(journal, ("x", "y"), ANSWERS, str(root / "judge")))
    assert (whole.rate.wins, whole.rate.losses, whole.rate.ties) == (2, 1, 1)
    assert len(asked) == before == 6  # what was begun with was settled, and nothing was asked again
    assert len(BlindTest.resume(journal).judgements) == 4


def test_a_journal_of_others_is_refused(root, tmp_path):
    journal = tmp_path / "j.jsonl"
    BlindTest.start(journal, ("x", "z"), 0)
    with pytest.raises(InputError, match="holds verdicts of a person on x and z"):
        finish(judge_answers(journal, ("x", "y"), ANSWERS, str(root / "judge")))


@pytest.fixture(scope="module")
def runs(root):
    made = []
    for name, rate in (("a", 5e-3), ("b", 2e-2)):
        recipe = recipe_for(root, output_dir=root / "runs" / name, data__eval=0.25, train__learning_rate=rate)
        collect(recipe)
        made.append(recipe.output_dir)
    return made


def test_a_run_is_judged_against_its_base_and_against_another_run(root, runs, monkeypatch):
    asked = replying(monkeypatch, root / "judge", longer)
    _, result = finish(judge_run(runs[0], str(root / "judge"), max_tokens=6))
    assert (result.a, result.b) == ("base", "a")
    assert result.rate.judged + result.rate.skipped + result.left_out == 6  # a quarter of 24 pairs
    rows = [json.loads(line) for line in result.journal.read_text("utf-8").splitlines()]
    answers = [row for row in rows if row["event"] == "answers"]
    assert any(row["a"] != row["b"] for row in answers)
    assert result.asked > 0
    assert len(asked) == 2 * result.asked
    assert result.journal.parent == runs[0] / "blind"
    before = len(asked)
    _, again = finish(judge_run(runs[0], str(root / "judge"), max_tokens=6))
    assert again == result
    assert len(asked) == before
    _, other = finish(judge_run(runs[1], str(root / "judge"), against=runs[0], max_tokens=6, limit=2))
    assert (other.a, other.b) == ("a", "b")
    assert other.rate.judged + other.rate.skipped + other.left_out == 2


def test_prompts_of_a_file_and_what_is_no_run(root, runs, tmp_path, monkeypatch):
    replying(monkeypatch, root / "judge", longer)
    file = write_rows(tmp_path / "p.jsonl", [{"prompt": f"say {n}"} for n in range(3)])
    _, result = finish(judge_run(runs[0], str(root / "judge"), prompts_file=file, max_tokens=4))
    assert result.rate.judged + result.rate.skipped + result.left_out == 3
    with pytest.raises(InputError, match="is no run with an adapter"):
        finish(judge_run(tmp_path, str(root / "judge")))
    with pytest.raises(InputError, match="limit: 0"):
        finish(judge_run(runs[0], str(root / "judge"), limit=0))


def test_verdicts_of_a_real_model_are_counted_whatever_it_says(root, tmp_path):
    _, result = finish(judge_answers(tmp_path / "j.jsonl", ("x", "y"), ANSWERS, str(root / "judge")))
    rate = result.rate
    assert rate.wins + rate.losses + rate.ties + rate.skipped == 4


def test_eval_asks_the_judge_first_and_its_verdicts_are_in_the_file(root, runs, monkeypatch, capsys):
    replying(monkeypatch, root / "judge", longer)
    evaluating.run(evaluating.Request(runs[1], against=[runs[0]], drift=False, limit=3, judge=str(root / "judge")))
    said = capsys.readouterr().out
    assert said.count("judged by ") == 2
    assert "win rate" in said
    rows = json.loads((runs[1] / "eval.json").read_text("utf-8"))["blind"]
    mine = [row for row in rows if row["judge"] == str(root / "judge")]
    assert {(row["a"], row["b"]) for row in mine} >= {("base", "b"), ("a", "b")}
