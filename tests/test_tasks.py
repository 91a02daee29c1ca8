"""Task files, and tasks on a tiny model with a random adapter: what is chosen, what is counted, what is refused."""

from __future__ import annotations

import json
import math
import sys
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
from localdpo.evaluate.suitefile import sample_rows
from localdpo.evaluate.taskfile import read_task, shipped_tasks
from localdpo.evaluate.tasks import TaskResult, run_tasks, spoken_choice
from localdpo.evaluate.text_metrics import classification_scores, exact_match, rouge, token_f1
from localdpo.model.load import LoadedModel, load_model
from localdpo.model.lora import LoraSettings, adapters_off, attach_lora
from localdpo.steps import Steps
from localdpo.train.events import ProgressEvent

CHOICES = ["my name", "the quick brown fox", "hello there you"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    # Not tied: a tied tiny model repeats its prompt's last token for ever.
    model = load_model(str(tiny_model(tmp_path_factory.mktemp("m") / "model", tie_word_embeddings=False)))
    attach_lora(model.model, LoraSettings(rank=4))
    randomise_adapter(model.model, scale=0.3)
    return model


def finish(work: Generator[ProgressEvent, None, list[Any]]) -> tuple[list[ProgressEvent], list[Any]]:
    steps = Steps(work)
    return list(steps), steps.result


def run(loaded: LoadedModel, *files: Path | str, **options: Any) -> list[TaskResult]:
    return finish(run_tasks(loaded, files, max_tokens=8, **options))[1]


def labelled(path: Path, **head: Any) -> Path:
    rows = [{"prompt": f"what is {n}?", "label": CHOICES[n % 3]} for n in range(9)]
    return write_rows(path, [{"task": "things", "choices": CHOICES, **head}, *rows])


def chosen_by_hand(loaded: LoadedModel, prompt: str, mean: bool) -> tuple[str, float]:
    """The likeliest choice and its share, from a plain forward pass each."""
    found = ChatFormat(loaded.tokenizer).encode([{"role": "user", "content": prompt}], CHOICES)
    prompt_ids = np.array(found.prompt_ids)
    sums = [float(token_logps(loaded.model, prompt_ids, np.array(ids)).sum()) for ids in found.completions]
    logps = [s / len(ids) if mean else s for s, ids in zip(sums, found.completions, strict=True)]
    best = int(np.argmax(logps))
    return CHOICES[best], math.exp(logps[best]) / sum(map(math.exp, logps))


@pytest.mark.parametrize("score", ["sum", "mean"])
def test_a_choice_is_the_likeliest_answer_of_the_model_and_of_its_base(loaded, tmp_path, score):
    (result,) = run(loaded, labelled(tmp_path / "t.jsonl", score=score))
    assert (result.name, result.kind, result.examples, result.by) == (
        "things",
        "classification",
        9,
        f"logprob ({score})",
    )
    for row in result.answers:
        label, share = chosen_by_hand(loaded, row["prompt"], score == "mean")
        assert (row["tuned"], row["tuned_probability"]) == (label, pytest.approx(share, abs=2e-3))
        with adapters_off(loaded.model):
            label, share = chosen_by_hand(loaded, row["prompt"], score == "mean")
        assert (row["base"], row["base_probability"]) == (label, pytest.approx(share, abs=2e-3))


def test_the_adapter_makes_a_difference(loaded, tmp_path):
    (result,) = run(loaded, labelled(tmp_path / "t.jsonl"))
    assert any(row["base_probability"] != row["tuned_probability"] for row in result.answers)


def test_figures_are_those_of_the_answers(loaded, tmp_path):
    (result,) = run(loaded, labelled(tmp_path / "t.jsonl"))
    for side in ("base", "tuned"):
        said = [row[side] for row in result.answers]
        scores = classification_scores([row["expected"] for row in result.answers], said, CHOICES)
        figures = {name: getattr(measured, side).value for name, measured in result.metrics.items()}
        assert figures["macro_f1"] == pytest.approx(scores.macro_f1)
        assert figures["micro_f1"] == pytest.approx(scores.micro_f1)
        assert {name: figures[f"f1/{name}"] for name in CHOICES} == pytest.approx(scores.per_class)
        right = [row[f"{side}_right"] for row in result.answers]
        assert figures["accuracy"] == pytest.approx(sum(right) / 9)
    change = result.metrics["accuracy"].change
    assert change.value == pytest.approx(result.metrics["accuracy"].tuned.value - result.metrics["accuracy"].base.value)


def test_answers_can_be_read_for_the_choice(loaded, tmp_path):
    (result,) = run(loaded, labelled(tmp_path / "t.jsonl", by="answer"))
    assert result.by == "answer"
    for row in result.answers:
        assert row["tuned_right"] is (spoken_choice(row["tuned"], CHOICES) == row["expected"])


def test_answers_are_scored_by_the_metrics_of_their_kind(loaded, tmp_path):
    qa = write_rows(tmp_path / "qa.jsonl", [{"prompt": f"q {n}", "expected": ["fox", "e"]} for n in range(4)])
    texts = [{"prompt": f"say {n}", "references": ["the quick brown fox", "hello"]} for n in range(4)]
    first, second = run(loaded, qa, write_rows(tmp_path / "text.jsonl", texts))
    assert list(first.metrics) == ["exact_match", "f1", "contains"]
    for side in ("base", "tuned"):
        said = [row[side] for row in first.answers]
        wanted = np.mean([[exact_match(text, ["fox", "e"]), token_f1(text, ["fox", "e"])] for text in said], axis=0)
        assert [getattr(first.metrics[name], side).value for name in ("exact_match", "f1")] == pytest.approx(wanted)
        said = [row[side] for row in second.answers]
        wanted = np.mean([rouge(text, ["the quick brown fox", "hello"])["rouge1"] for text in said])
        assert getattr(second.metrics["rouge1"], side).value == pytest.approx(wanted)
    assert {"rouge1", "rouge2", "rougeL", "meteor"} <= set(second.metrics)
    assert second.answers[0]["expected"] == "the quick brown fox | hello"


def test_without_sacrebleu_the_other_metrics_stay_and_a_note_says_so(loaded, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "sacrebleu"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    (result,) = run(loaded, write_rows(tmp_path / "t.jsonl", [{"prompt": "x", "references": "y"}]))
    assert list(result.metrics) == ["rouge1", "rouge2", "rougeL", "meteor"]
    assert "pip install 'localdpo[eval]'" in result.notes[0]


def test_bleu_and_chrf_are_there_with_sacrebleu(loaded, tmp_path):
    pytest.importorskip("sacrebleu")
    rows = [{"prompt": "x", "references": ["a b c", "d"]}, {"prompt": "y", "references": ["e"]}]
    (result,) = run(loaded, write_rows(tmp_path / "t.jsonl", rows))
    assert {"bleu", "chrf"} <= set(result.metrics)
    assert "tok:13a" in result.notes[0]


def test_a_model_without_an_adapter_is_its_own_base(tmp_path):
    plain = load_model(str(tiny_model(tmp_path / "model", tie_word_embeddings=False)))
    for result in run(plain, labelled(tmp_path / "t.jsonl"), labelled(tmp_path / "u.jsonl", by="answer")):
        assert all(row["base"] == row["tuned"] for row in result.answers)
        assert result.metrics["accuracy"].change.value == 0


def test_results_are_plain_json_and_the_same_again(loaded, tmp_path):
    file = labelled(tmp_path / "t.jsonl")
    once, again = (json.dumps(run(loaded, file, limit=5, seed=3)[0].to_json(), allow_nan=False) for _ in range(2))
    assert once == again
    found = json.loads(once)
    assert found["examples"] == len(found["answers"]) == 5
    assert set(found["metrics"]["accuracy"]["base"]) == {"value", "low", "high"}


def test_progress_names_the_task_and_ends(loaded, tmp_path):
    events, _ = finish(run_tasks(loaded, [labelled(tmp_path / "t.jsonl", by="answer")], max_tokens=3))
    assert {event.stage for event in events} == {"tasks"}
    assert any(event.detail == "things: the tuned model answers" for event in events)
    assert all(0 <= event.fraction <= 1 for event in events)


def test_a_prompt_without_room_is_counted_and_none_at_all_is_an_error(loaded, tmp_path):
    long = {"prompt": "word " * 3000, "expected": "x"}
    (result,) = run(loaded, write_rows(tmp_path / "t.jsonl", [long, {"prompt": "hi", "expected": "x"}]))
    assert (result.examples, result.skipped) == (1, 1)
    assert "1 of the examples could not be asked" in result.notes[0]
    with pytest.raises(InputError, match=r"none of its examples.*\n.*:1: it has 1[0-9],[0-9]+ tokens"):
        run(loaded, write_rows(tmp_path / "u.jsonl", [long]))


def test_limit_draws_the_same_rows_and_refuses_none(loaded, tmp_path):
    assert sample_rows(10, None, 0) == sample_rows(10, 99, 0) == list(range(10))
    assert sample_rows(100, 7, 1) == sample_rows(100, 7, 1) == sorted(set(sample_rows(100, 7, 1)))
    with pytest.raises(InputError, match="limit: 0 must be 1 or more"):
        run(loaded, labelled(tmp_path / "t.jsonl"), limit=0)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("It is positive, not negative.", "positive"),
        ("NEGATIVE", "negative"),
        ("unpositive", None),
        ("", None),
        ("very positive indeed", "very positive"),
        ("这是正面的", "正面"),
    ],
)
def test_the_choice_an_answer_names_first(answer, found):
    assert spoken_choice(answer, ["positive", "negative", "very positive", "正面", " "]) == found


def test_shipped_tasks_are_whole():
    assert shipped_tasks() == ["facts", "oneline", "sentiment", "sentiment-zh"]
    for name in shipped_tasks():
        task = read_task(name)
        assert (task.name, len({example.prompt[-1]["content"] for example in task.examples})) == (
            name,
            len(task.examples),
        )
        assert len(task.examples) >= 24
        assert task.description
    labels = [example.expected[0] for example in read_task("sentiment").examples]
    assert labels.count("Positive") == labels.count("Negative")


def test_a_head_holds_for_all_rows_and_is_not_needed(tmp_path):
    head = {"task": "t", "kind": "qa", "template": "Q: {prompt} A:", "system": "Be brief.", "language": "de"}
    task = read_task(write_rows(tmp_path / "x.jsonl", [head, {"prompt": "{why}?", "expected": "so", "tags": ["a"]}]))
    assert [turn["content"] for turn in task.examples[0].prompt] == ["Be brief.", "Q: {why}? A:"]
    assert (task.name, task.language, task.examples[0].tags) == ("t", "de", ("a",))
    bare = read_task(
        write_rows(tmp_path / "bare.jsonl", [{"prompt": "a", "label": "x"}, {"prompt": "b", "label": "y"}])
    )
    assert (bare.name, bare.kind, bare.labels) == ("bare", "classification", ("x", "y"))


ROW = {"prompt": "p", "label": "x"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"task": "t", "labels": ["x"]}, ROW], r'bad.jsonl:1: "labels" is no setting\. Known keys'),
        ([{"task": "t", "choises": ["x"]}, ROW], r'"choises" is no setting\. Did you mean \'choices\''),
        ([{"task": "t", "kind": "quiz"}, ROW], r'bad.jsonl:1: "kind" is \'quiz\''),
        ([{"task": "t", "template": "no slot"}, ROW], r'bad.jsonl:1: "template" must have {prompt} in it'),
        ([{"task": "t", "max_tokens": 0}, ROW], r'bad.jsonl:1: "max_tokens" is 0'),
        ([{"task": "t", "choices": ["x", "y"]}, ROW, {"prompt": "p", "label": "z"}], r'bad.jsonl:3: "label" is \'z\''),
        ([{"task": "t", "choices": ["x"]}, ROW], r"bad.jsonl:2: \"choices\" are 'x'\. Two or more"),
        ([ROW, {"prompt": "p"}], r'bad.jsonl:2: "label" is missing'),
        ([ROW, {"prompt": 3, "label": "x"}], r'bad.jsonl:2: "prompt" must be text'),
        ([{"prompt": "p", "expected": []}], r'bad.jsonl:1: "expected" must be a text or a list'),
        ([{"prompt": "p", "expected": ["a", 3]}], r'bad.jsonl:1: "expected" must be a text or a list'),
        ([{"prompt": "p", "answer": "a"}], r'bad.jsonl:1: does not say what is expected.*"prompt", "answer"'),
        ([{"prompt": " ", "references": "a"}], r'bad.jsonl:1: "prompt" is blank'),
        ([{"prompt": [{"role": "assistant", "content": "a"}], "references": "a"}], "must end with the user's turn"),
        ([{"task": "t"}], "bad.jsonl: 0 rows"),
        ([], "bad.jsonl: 0 rows"),
    ],
)
def test_a_bad_file_is_named_with_line_and_key(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        read_task(write_rows(tmp_path / "bad.jsonl", rows))


def test_a_name_that_is_nothing_is_answered_with_those_there_are(loaded):
    with pytest.raises(InputError, match=r"Did you mean 'sentiment'.*facts, oneline, sentiment"):
        run(loaded, "sentimant")
    with pytest.raises(InputError, match=r"cannot be read|is not a file"):
        read_task(Path(__file__).parent)
