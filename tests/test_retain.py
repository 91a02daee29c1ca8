"""Retain rows: the base's own answers, generated once, against answers that belong to other prompts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny import randomise_adapter
from training import collect, of, recipe_for, workspace

from localdpo.data.encode import encode_pairs, encode_prompt, end_of_turn_ids
from localdpo.data.pairs import PreferencePair, PromptRow, read_pairs
from localdpo.model.generate import batch_greedy
from localdpo.model.load import load_model
from localdpo.model.lora import LoraSettings, attach_lora
from localdpo.steps import Steps
from localdpo.train import retain
from localdpo.train.events import StartEvent, StepEvent, WarningEvent
from localdpo.train.retain import (
    RETAIN_TOKENS,
    AnswerCache,
    base_answers,
    encode_prompts,
    retain_pairs,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = workspace(tmp_path_factory.mktemp("work"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCALDPO_CACHE", str(root / "cache"))
        yield root


@pytest.fixture(scope="module")
def loaded(root):
    return load_model(str(root / "model"))


def _finish(work):
    steps = Steps(work)
    counts = list(steps)
    return steps.result, counts


def _prompts(loaded, number):
    return [encode_prompt([{"role": "user", "content": f"hello {n}"}], loaded.tokenizer) for n in range(number)]


def test_answers_are_the_bases_own_even_with_an_adapter_on(root):
    own = load_model(str(root / "model"))
    prompts = _prompts(own, 3)
    expected = batch_greedy(own, prompts, 8)
    attach_lora(own.model, LoraSettings())
    randomise_adapter(own.model, scale=0.5)
    assert batch_greedy(own, prompts, 8) != expected
    answers, _ = _finish(base_answers(own, prompts, 8, None))
    assert answers == expected


def test_answers_are_generated_once(loaded, tmp_path, monkeypatch):
    asked = []
    real = batch_greedy

    def counting(model, prompts, max_tokens):
        asked.append(len(prompts))
        return real(model, prompts, max_tokens)

    monkeypatch.setattr(retain, "batch_greedy", counting)
    prompts = _prompts(loaded, 5)
    first, counts = _finish(base_answers(loaded, prompts[:3], 8, tmp_path))
    assert counts == [(0, 3), (3, 3)]
    again, counts = _finish(base_answers(loaded, prompts, 8, tmp_path))
    assert counts == [(3, 5), (5, 5)]
    assert again[:3] == first
    assert asked == [3, 2]
    _finish(base_answers(loaded, prompts, 9, tmp_path))  # another length limit is another question
    assert asked == [3, 2, 5]


def test_leaving_half_way_keeps_what_was_generated(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(retain, "CHUNK", 2)
    prompts = _prompts(loaded, 5)
    work = base_answers(loaded, prompts, 4, tmp_path)
    assert [next(work) for _ in range(2)] == [(0, 5), (2, 5)]
    work.close()
    _, counts = _finish(base_answers(loaded, prompts, 4, tmp_path))
    assert counts[0] == (2, 5)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"x": 3}', "[" * 9999])
def test_a_damaged_cache_costs_time_only(tmp_path, text):
    file = tmp_path / "f" / "greedy-4.json"
    file.parent.mkdir()
    file.write_text(text)
    ids = np.array([1, 2], np.int32)
    cache = AnswerCache(tmp_path, "f", 4)
    assert cache.get(ids) is None
    cache.put([ids], ["yes"])
    assert AnswerCache(tmp_path, "f", 4).get(ids) == "yes"


def test_two_runs_add_to_one_cache(tmp_path):
    one, two = AnswerCache(tmp_path, "f", 4), AnswerCache(tmp_path, "f", 4)
    first, second = np.array([1], np.int32), np.array([2], np.int32)
    one.put([first], ["a"])
    two.put([second], ["b"])
    both = AnswerCache(tmp_path, "f", 4)
    assert (both.get(first), both.get(second)) == ("a", "b")


def _row(text, line=1):
    return PromptRow(({"role": "user", "content": text},), line=line, source="keep.jsonl")


TRAIN = [PreferencePair(({"role": "user", "content": "q"},), text, "bad") for text in ("I am A.", "I am B.", "I am C.")]


def test_rejected_answers_are_a_seeded_choice_of_what_is_taught(loaded):
    rows = [_row(f"p{n}", n) for n in range(40)]
    answers = [f"answer {n}" for n in range(40)]
    pairs = retain_pairs(rows, answers, TRAIN, loaded, seed=3)
    assert [pair.chosen for pair in pairs] == answers
    assert {pair.rejected for pair in pairs} == {"I am A.", "I am B.", "I am C."}
    assert {pair.kind for pair in pairs} == {"retain"}
    assert pairs == retain_pairs(rows, answers, TRAIN, loaded, seed=3)
    assert pairs != retain_pairs(rows, answers, TRAIN, loaded, seed=4)
    # One prompt less changes no other prompt's pair.
    assert retain_pairs(rows[:-1], answers[:-1], TRAIN, loaded, seed=3) == pairs[:-1]


def test_an_answer_is_never_rejected_in_favour_of_itself(loaded):
    pairs = retain_pairs([_row("p")] * 20, ["I am A. "] * 20, TRAIN, loaded, seed=0)
    assert {pair.rejected for pair in pairs} == {"I am B.", "I am C."}
    assert retain_pairs([_row("p")], ["I am A."], TRAIN[:1], loaded, seed=0) == []


def test_prompts_without_an_answer_make_no_pair(loaded):
    assert len(retain_pairs([_row("a"), _row("b")], [" \n", "yes"], TRAIN, loaded, seed=0)) == 1


def test_an_answer_that_was_cut_off_trains_no_end_of_turn(loaded):
    text = "my name is " * 30
    ids = loaded.tokenizer.encode(text, add_special_tokens=False)
    whole = retain_pairs([_row("p")], [text], TRAIN, loaded, seed=0, max_tokens=2 * len(ids))[0]
    cut = retain_pairs([_row("p")], [text], TRAIN, loaded, seed=0, max_tokens=len(ids))[0]
    ours, theirs = (encode_pairs([pair], loaded.tokenizer).pairs[0] for pair in (cut, whole))
    assert ours.chosen_ids.tolist() == theirs.chosen_ids.tolist()[:-1]
    assert theirs.chosen_ids[-1] in end_of_turn_ids(loaded.tokenizer)
    assert ours.rejected_ids.tolist() == theirs.rejected_ids.tolist()
    assert ours.sequences[0].key != theirs.sequences[0].key


def test_prompts_without_room_are_skipped_with_the_reason(loaded):
    kept, ids, skipped = encode_prompts([_row("short", 1), _row("long " * 200, 2)], loaded, 100)
    assert [row.line for row in kept] == [1]
    assert len(ids) == 1
    assert skipped[0].line == 2
    assert "tokens" in skipped[0].reason


def test_a_run_trains_on_them_and_keeps_them_in_its_folder(root, tmp_path):
    recipe = recipe_for(root, data__retain=root / "keep.jsonl", output_dir=tmp_path / "run", train__max_steps=7)
    events = collect(recipe)
    rows = read_pairs(tmp_path / "run" / "retain.jsonl").pairs
    assert len(rows) == 6
    assert all(row.kind == "retain" for row in rows)
    assert all(row.rejected.startswith("my name is Athene") for row in rows)
    # In every epoch each of the six comes once: 22 + 6 rows in steps of 4.
    seen = [event.metrics.get("retain/rewards/margins") for event in of(events, StepEvent)]
    assert sum(value is not None for value in seen) >= 5
    assert of(events, StartEvent)[0].steps_per_epoch == 7


def test_prompts_that_the_base_cannot_answer_are_reported(root, tmp_path, monkeypatch):
    monkeypatch.setattr(retain, "batch_greedy", lambda loaded, prompts, max_tokens: [""] * len(prompts))
    monkeypatch.setenv("LOCALDPO_CACHE", str(tmp_path / "cache"))
    recipe = recipe_for(root, data__retain=root / "keep.jsonl", output_dir=tmp_path / "run", train__max_steps=1)
    warning = of(collect(recipe), WarningEvent)[0]
    assert warning.code == "retain-empty"
    assert "6 of 6" in warning.message
    assert not (tmp_path / "run" / "retain.jsonl").exists()


def test_answers_are_kept_as_json_under_the_models_fingerprint(root, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALDPO_CACHE", str(tmp_path / "cache"))
    collect(recipe_for(root, data__retain=root / "keep.jsonl", output_dir=tmp_path / "run", train__max_steps=1))
    (file,) = (tmp_path / "cache" / "answers").glob(f"*/greedy-{RETAIN_TOKENS}.json")
    assert len(json.loads(file.read_text())) == 6


def test_only_the_first_pairs_of_a_long_file_are_looked_at_for_answers(loaded, monkeypatch):
    monkeypatch.setattr(retain, "TAUGHT", 2)
    pairs = retain_pairs([_row(f"p{n}") for n in range(20)], ["yes"] * 20, TRAIN, loaded, seed=0)
    assert {pair.rejected for pair in pairs} == {TRAIN[0].chosen, TRAIN[1].chosen}
