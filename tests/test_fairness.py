"""Fairness files, and gaps between groups on a tiny model with a random adapter, against sums done by hand."""

from __future__ import annotations

import itertools
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles import token_logps
from tiny import randomise_adapter, tiny_model
from training import write_rows

from localdpo.data.chat import ChatFormat
from localdpo.errors import InputError
from localdpo.evaluate.fairness import FairnessResult, run_fairness, shipped_fairness
from localdpo.evaluate.templates import read_fairness
from localdpo.evaluate.tone import refuses, sentiment
from localdpo.model.load import LoadedModel, load_model
from localdpo.model.lora import LoraSettings, adapters_off, attach_lora
from localdpo.steps import Steps
from localdpo.train.events import ProgressEvent

GROUPS = {
    "foxes": {"name": ["Fox", "Vix"], "they": ["she"]},
    "dogs": {"name": ["Dog", "Rex"], "they": ["he"]},
    "cats": {"name": ["Cat", "Tom"], "they": ["it"]},
}
HEAD = {"fairness": "animals", "language": "en", "groups": GROUPS}
ROWS = [
    {"template": "Is {name} kind?", "favourable": "Yes, very.", "unfavourable": "No, not much."},
    {"template": "What does {name} do when {they} is alone?", "continuations": ["Nothing.", "Something else."]},
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    model = load_model(str(tiny_model(tmp_path_factory.mktemp("m") / "model", tie_word_embeddings=False)))
    attach_lora(model.model, LoraSettings(rank=4))
    randomise_adapter(model.model, scale=0.3)
    return model


@pytest.fixture(scope="module")
def result(loaded, tmp_path_factory) -> FairnessResult:
    return run(loaded, write_rows(tmp_path_factory.mktemp("f") / "animals.jsonl", [HEAD, *ROWS]))


def run(loaded: LoadedModel, file: Path, **options: Any) -> FairnessResult:
    work: Generator[ProgressEvent, None, list[FairnessResult]] = run_fairness(loaded, [file], max_tokens=8, **options)
    steps = Steps(work)
    assert {event.stage for event in steps} == {"fairness"}
    return steps.result[0]


def by_hand(loaded: LoadedModel, row: dict[str, Any]) -> np.ndarray:
    """Log-probs a token [groups, people, continuations] from a plain forward pass each."""
    chat = ChatFormat(loaded.tokenizer)
    texts = row.get("continuations") or [row["favourable"], row["unfavourable"]]
    found = np.zeros((3, 2, len(texts)))
    for group, person in itertools.product(range(3), range(2)):
        words = list(GROUPS.values())[group]
        prompt = row["template"].replace("{name}", words["name"][person]).replace("{they}", words["they"][0])
        made = chat.encode([{"role": "user", "content": prompt}], texts)
        for number, ids in enumerate(made.completions):
            logps = token_logps(loaded.model, np.array(made.prompt_ids), np.array(ids))
            found[group, person, number] = float(logps.sum()) / len(ids)
    return found


def test_the_gap_is_that_of_the_groups_means_before_and_after(loaded, result):
    def gaps() -> list[float]:
        by_group = [by_hand(loaded, row).mean(axis=1) for row in ROWS]
        return [(table.max(axis=0) - table.min(axis=0)).mean() for table in by_group]

    tuned = gaps()
    with adapters_off(loaded.model):
        base = gaps()
    assert result.gap_logp.tuned.value == pytest.approx(np.mean(tuned), rel=1e-3)
    assert result.gap_logp.base.value == pytest.approx(np.mean(base), rel=1e-3)
    assert [row["gap_logp"]["tuned"] for row in result.examples] == pytest.approx(tuned, rel=1e-3)
    assert result.gap_logp.base.value != pytest.approx(result.gap_logp.tuned.value, rel=1e-2)


def test_chance_is_the_gap_with_people_dealt_by_lot(loaded, result):
    # Of two people a group, swapping the second ones in every order is all there is up to renaming the groups.
    found = []
    for row in ROWS:
        table = by_hand(loaded, row)
        for order in itertools.permutations(range(3)):
            dealt = np.stack([table[:, 0], table[list(order), 1]], axis=1).mean(axis=1)
            found.append((dealt.max(axis=0) - dealt.min(axis=0)).mean())
    assert result.chance[1] == pytest.approx(np.mean(found), rel=0.15)


def test_lean_is_good_less_bad_against_the_mean_of_all(loaded, result):
    by_group = by_hand(loaded, ROWS[0]).mean(axis=1)
    leans = by_group[:, 0] - by_group[:, 1]
    assert [side.tuned.value for side in result.lean.values()] == pytest.approx(leans - leans.mean(), abs=2e-4)
    assert sum(side.base.value for side in result.lean.values()) == pytest.approx(0, abs=1e-9)


def test_answers_are_compared_and_counted_by_group(result):
    assert result.groups == ("foxes", "dogs", "cats")
    assert 0 <= result.gap_answers.tuned.value <= 1
    assert set(result.by_group) == {"words", "refused", "sentiment"}
    for row in result.examples:
        assert set(row["prompts"]) == set(row["base"]) == set(row["tuned"]) == set(result.groups)
    assert result.examples[0]["prompts"]["dogs"] == "Is Dog kind?"
    assert result.examples[1]["prompts"]["cats"] == "What does Cat do when it is alone?"


def test_equal_groups_have_no_gap(loaded, tmp_path):
    same = {"a": {"x": ["fox", "dog"]}, "b": {"x": ["fox", "dog"]}}
    found = run(loaded, write_rows(tmp_path / "s.jsonl", [{**HEAD, "groups": same}, {**ROWS[0], "template": "A {x}?"}]))
    assert found.gap_logp.tuned.value == found.gap_answers.tuned.value == found.gap_answers.base.value == 0
    assert [side.tuned.value for side in found.lean.values()] == [0, 0]


def test_one_person_a_group_has_no_chance_and_limit_draws_templates(loaded, tmp_path):
    one = {"a": {"x": "fox"}, "b": {"x": "dog"}}
    rows = [{"template": f"Is the {{x}} {n}?", "continuations": "Well."} for n in range(4)]
    found = run(loaded, write_rows(tmp_path / "o.jsonl", [{**HEAD, "groups": one}, *rows]), limit=3)
    assert (found.templates, found.chance, found.lean) == (3, None, {})
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["gap_logp_chance"] is None


def test_results_are_plain_json(result):
    found = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert set(found["gap_logp"]["tuned"]) == {"value", "low", "high"}
    assert (found["name"], found["language"], found["templates"], found["skipped"]) == ("animals", "en", 2, 0)


def test_shipped_sets_are_whole():
    assert len(shipped_fairness()) == 8
    for name in shipped_fairness():
        found = read_fairness(name)
        assert found.name == name
        assert found.language == name[-2:]
        assert found.variants == 4
        assert len(found.templates) >= 6
        assert all(template.favourable and template.unfavourable for template in found.templates)
        for template in found.templates:
            prompts = {found.prompt(template, group, 0)[-1]["content"] for group in found.groups}
            assert len(prompts) == len(found.groups)
            assert not any("{" in prompt for prompt in prompts)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[:1], r'bad.jsonl:1: "groups" must name two groups or more'),
        ([{**HEAD, "groups": {"a": {"x": ["b"]}}}, ROWS[0]], "must name two groups"),
        ([{**HEAD, "groups": {"a": {"x": ["b"]}, "c": {"y": ["d"]}}}, ROWS[0]], "same slots in every group"),
        ([{**HEAD, "groups": {"a": {"x": ["b", "c"]}, "c": {"x": ["d", "e", "f"]}}}, ROWS[0]], "lists of 2, 3 words"),
        ([{**HEAD, "groups": {"a": {"x": [1]}, "c": {"x": ["d"]}}}, ROWS[0]], "not a list of words"),
        ([{**HEAD, "group": 1}, ROWS[0]], r'"group" is no setting\. Did you mean \'groups\''),
        ([HEAD, {**ROWS[0], "template": "Is {nam} kind?"}], r'bad.jsonl:2: "template" has the slot {nam}'),
        ([HEAD, {**ROWS[0], "template": "Is it kind?"}], "has no slot"),
        ([HEAD, {"template": "Is {name} kind?"}], "no continuations to compare"),
        ([HEAD, {"template": "Is {name} kind?", "favourable": "Yes."}], "no continuations to compare"),
        ([HEAD, ROWS[0], {"prompt": "x"}], r'bad.jsonl:3: "template" is missing'),
        ([HEAD, {**ROWS[0], "favourable": "Yes, she is."}], r"bad.jsonl:2: .*says 'she'.*nothing about the group"),
    ],
)
def test_a_bad_file_is_named_with_line_and_key(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        read_fairness(write_rows(tmp_path / "bad.jsonl", rows))


def test_a_name_that_is_nothing_is_answered_with_those_there_are():
    with pytest.raises(InputError, match="Did you mean 'gender-en'"):
        read_fairness("gender-em")


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I cannot answer this.", True),
        ("As an AI language model, I …", True),
        ("I am sorry to hear that she lost.", True),  # crude, and said so
        ("Sorry seems to be the hardest word.", False),
        ("抱歉，我不能回答。", True),
        ("Yes, she will do well.", False),
        ("她会做得很好。", False),
    ],
)
def test_refusals(answer, refused):
    assert refuses(answer) is refused


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("A good and honest person.", 1),
        ("A lazy, dishonest person.", -1),
        ("not good", -1),
        ("not bad", 1),
        ("He isn't good", -1),
        ("Good, but a risk.", 0),
        ("The table has legs.", 0),
        ("很好", 1),
        ("不好", -1),
        ("好，但是有风险", 0),
    ],
)
def test_friendliness(answer, value):
    assert sentiment(answer) == value
