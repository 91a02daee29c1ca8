"""The probes at the end of a run, their figures, and the evaluation of a finished run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from training import collect, losses, of, recipe_for, workspace, write_rows

from localdpo.data.pairs import PromptRow
from localdpo.errors import InputError
from localdpo.evaluate.figures import ProbeFigures, says
from localdpo.evaluate.heldout import evaluate_run
from localdpo.evaluate.probes import PROBE_TOKENS, closing, glimpse, probe, rejected_terms, sample
from localdpo.model.load import load_model
from localdpo.steps import Steps
from localdpo.train.events import EvalEvent, ProgressEvent, SampleEvent, StartEvent
from localdpo.train.run import Control, RunFolder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = workspace(tmp_path_factory.mktemp("work"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCALDPO_CACHE", str(root / "cache"))
        yield root


@pytest.fixture(scope="module")
def trained(root):
    recipe = recipe_for(root, data__probes=root / "probes.jsonl", train__learning_rate=5e-3)
    return recipe, collect(recipe, closing=closing)


@pytest.mark.parametrize(
    ("text", "terms", "found"),
    [
        ("My name is Athene.", ["Athene"], True),
        ("i am ATHENE!", ["athene"], True),
        ("Athenes", ["Athene"], False),
        ("Parisian", ["Paris"], False),
        ("It has 8 legs.", ["eight", "8"], True),
        ("It has 18 legs.", ["8"], False),
        ("Café Athène", ["athène"], True),
        ("H2O, of course", ["H2O"], True),
        ("It's C++.", ["C++"], True),
        ("I\u2019m fine", ["I'm"], True),
        ("Hugging\n Face", ["Hugging Face"], True),
        ("100°C", ["100"], True),
        ("anything", ["", " "], False),
        ("anything", [], False),
    ],
)
def test_terms_are_found_as_whole_words_whatever_their_case(text, terms, found):
    assert says(text, terms) is found


def _sample(tags, accept, base, tuned, **extra):
    row = PromptRow(({"role": "user", "content": "q"},), tuple(accept), tuple(tags), extra=extra)
    return sample(row, base, tuned, 9)


def test_an_answer_is_right_when_it_accepts_and_does_not_reject():
    assert _sample(["identity"], ["Athene"], "I am SmolLM", "I am Athene").tuned_right is True
    both = _sample(["identity"], ["Athene"], "x", "I am Athene, or SmolLM", reject=["SmolLM"])
    assert (both.base_right, both.tuned_right) == (False, False)
    assert _sample([], [], "a", "b").tuned_right is None


@pytest.mark.parametrize(("value", "terms"), [("x", ("x",)), (["x", 3, "y"], ("x", "y")), (7, ()), (None, ())])
def test_rejected_terms_are_read_leniently(value, terms):
    row = PromptRow(({"role": "user", "content": "q"},), extra={"reject": value})
    assert rejected_terms(row) == terms


def test_figures_count_what_changed_and_what_did_not():
    samples = [
        _sample(["identity"], ["Athene"], "SmolLM", "Athene"),
        _sample(["identity"], ["Athene"], "SmolLM", "I am SmolLM"),
        _sample(["everyday"], ["Paris"], "Paris", "Paris"),
        _sample(["everyday"], ["Rome"], "Rome", "Athene of Rome"),
        _sample(["everyday"], ["eight", "8"], "8", "ten"),
        _sample(["everyday"], ["2"], "5", "2"),
        _sample(["everyday"], [], "hello", "hello"),
    ]
    figures = ProbeFigures.of(samples, [["SmolLM"]] * 2 + [[]] * 5)
    identity, everyday = figures.groups["identity"], figures.groups["everyday"]
    assert (identity.probes, identity.base_right, identity.tuned_right, identity.forbidden) == (2, 0, 1, 1)
    assert (everyday.probes, everyday.judged, everyday.mentions) == (5, 4, 1)
    assert (everyday.base_right, everyday.kept, everyday.tuned_right) == (3, 2, 3)
    assert figures.lines() == [
        "identity: 1 of 2 (50%) answers say Athene",
        "identity: 1 of 2 (50%) answers say SmolLM",
        "everyday: 1 of 5 (20%) answers mention Athene",
        "everyday: 2 of 3 (67%) answers that the base had right still are (3 of 4 are right now)",
    ]
    assert figures.to_json()["groups"]["everyday"]["kept"] == 2


def test_figures_of_nothing():
    assert ProbeFigures.of([]).lines() == []
    assert ProbeFigures.of([_sample([], [], "a", "b")]).lines() == []


def test_figures_never_load_mlx():
    code = "import sys, localdpo.evaluate.figures; sys.exit('mlx' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_a_run_ends_with_its_probes(root, trained):
    recipe, events = trained
    samples = of(events, SampleEvent)
    assert len(samples) == 4
    assert [s.tags for s in samples] == [["identity"]] * 2 + [["everyday"]] * 2
    assert samples == RunFolder(recipe.output_dir).samples()
    end = events[-1]
    assert end.figures["groups"]["identity"]["probes"] == 2
    assert end.figures["terms"] == ["Athene"]
    stages = [event for event in of(events, ProgressEvent) if event.stage == "samples"]
    assert [(event.done, event.total) for event in stages] == [(0, 8), (4, 8), (4, 8)]


def test_base_and_tuned_answers_are_those_models(root, trained):
    """The tuned answers are the published adapter's, the base's the model's without it."""
    from localdpo.data.encode import encode_prompt
    from localdpo.model.generate import batch_greedy
    from localdpo.model.lora import load_adapter

    recipe, events = trained
    samples = of(events, SampleEvent)
    loaded = load_model(recipe.model)
    prompts = [encode_prompt(s.prompt, loaded.tokenizer) for s in samples]
    assert [s.base for s in samples] == batch_greedy(loaded, prompts, PROBE_TOKENS)
    load_adapter(recipe.output_dir / "adapter", loaded)
    assert [s.tuned for s in samples] == batch_greedy(loaded, prompts, PROBE_TOKENS)
    assert [s.tuned for s in samples] != [s.base for s in samples]


def test_glimpses_between_epochs_change_nothing(root, tmp_path):
    """The model answers after each epoch but the last; losses and adapter are those of a run that was left alone."""
    settings = {"data__probes": root / "probes.jsonl", "lora__dropout": 0.1, "train__num_train_epochs": 3.0}
    seen = collect(recipe_for(root, output_dir=tmp_path / "seen", **settings), closing=closing, glimpse=glimpse)
    alone = collect(recipe_for(root, output_dir=tmp_path / "alone", **settings))
    samples = of(seen, SampleEvent)
    glimpses = [event for event in samples if not event.final]
    epoch = of(seen, StartEvent)[0].steps_per_epoch
    assert [event.step for event in glimpses] == [epoch, epoch, 2 * epoch, 2 * epoch]
    assert all(event.tuned for event in glimpses)
    assert losses(seen) == losses(alone)
    assert (tmp_path / "seen/adapter/adapters.safetensors").read_bytes() == (
        tmp_path / "alone/adapter/adapters.safetensors"
    ).read_bytes()
    run = RunFolder(tmp_path / "seen")
    assert run.samples() == [event for event in samples if event.final]
    assert [event for event in run.events().events if isinstance(event, SampleEvent)] == samples


def test_glimpses_of_held_out_prompts_and_none(root, tmp_path):
    held_out = collect(recipe_for(root, output_dir=tmp_path / "a"), glimpse=glimpse)
    assert len(of(held_out, SampleEvent)) == 2
    none = collect(recipe_for(root, output_dir=tmp_path / "b", train__sample_prompts=0), glimpse=glimpse)
    assert of(none, SampleEvent) == []


def test_without_probes_there_is_nothing_to_close(root, tmp_path):
    events = collect(recipe_for(root, output_dir=tmp_path / "run", train__max_steps=1), closing=closing)
    assert events[-1].figures == {}


def test_a_stop_during_the_probes_ends_a_finished_run(root, tmp_path):
    from localdpo.train.loop import train

    recipe = recipe_for(root, data__probes=root / "probes.jsonl", output_dir=tmp_path / "run", train__max_steps=1)
    control, events = Control(), []
    for event in train(recipe, control=control, closing=closing):
        events.append(event)
        if isinstance(event, ProgressEvent) and event.stage == "samples":
            control.stop()
    assert not of(events, SampleEvent)
    assert (events[-1].reason, events[-1].figures) == ("finished", {})


def test_probes_can_be_asked_of_any_model(root, trained):
    loaded = load_model(str(root / "model"))
    steps = Steps(probe(loaded, [PromptRow(({"role": "user", "content": "your name?"},))], max_tokens=4))
    (only,) = of(list(steps), SampleEvent)
    assert only.base == only.tuned  # no adapter is on
    assert steps.result.groups["probes"].judged == 0


def test_a_finished_run_is_scored_as_it_was_in_training(trained):
    recipe, events = trained
    best = [event for event in of(events, EvalEvent) if event.best][-1]
    found = evaluate_run(recipe.output_dir)
    assert found.pairs == 2
    for name, value in found.metrics.items():
        assert value == pytest.approx(best.metrics[name], abs=1e-4)


def test_a_finished_run_can_be_scored_on_other_pairs(trained, tmp_path):
    rows = [{"prompt": f"say {n}", "chosen": "my name is Athene", "rejected": "fox"} for n in range(5)]
    found = evaluate_run(trained[0].output_dir, write_rows(tmp_path / "more.jsonl", rows))
    assert found.pairs == 5
    assert 0 <= found.metrics["eval_rewards/accuracies"] <= 1


def test_what_is_no_run_cannot_be_scored(tmp_path):
    with pytest.raises(InputError, match="is no run with an adapter"):
        evaluate_run(tmp_path)
