"""The training loop on a tiny model: what it yields, when it stops, and that equal runs are equal."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from pair_scorer import PairScorer
from tiny import tiny_model
from training import adapter_arrays, collect, lasting, losses, of, recipe_for, stopped_at, workspace, write_rows

from localdpo.data.order import Position
from localdpo.dpo.scorer import FastScorer
from localdpo.errors import DivergedError, EnvironmentFault, InputError
from localdpo.model.load import load_model
from localdpo.model.lora import load_adapter
from localdpo.recipe import dump_recipe
from localdpo.steps import result_of
from localdpo.train import session
from localdpo.train.checkpoint import list_checkpoints
from localdpo.train.events import (
    CheckpointEvent,
    EndEvent,
    EvalEvent,
    ProgressEvent,
    StartEvent,
    StepEvent,
    WarningEvent,
)
from localdpo.train.inputs import read_inputs
from localdpo.train.loop import plan, train
from localdpo.train.run import Control, RunFolder


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A workspace no test changes but for its runs."""
    return workspace(tmp_path_factory.mktemp("work"))


@pytest.fixture
def root(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALDPO_CACHE", str(shared / "cache"))
    for name in ("model", "pairs.jsonl", "keep.jsonl", "probes.jsonl"):
        (tmp_path / name).symlink_to(shared / name)
    return tmp_path


def test_a_run_from_beginning_to_end(root):
    recipe = recipe_for(root, data__retain=root / "keep.jsonl")
    events = collect(recipe)
    run = RunFolder(recipe.output_dir)
    start, end = of(events, StartEvent)[0], events[-1]
    steps = of(events, StepEvent)
    assert [event.step for event in steps] == list(range(1, start.total_steps + 1))
    assert start.plan["train_pairs"] + start.plan["held_out_pairs"] == 24
    assert start.plan["retain_prompts"] == 6
    assert start.total_steps == 2 * math.ceil((start.plan["train_pairs"] + 6) / 4)
    assert [event.step for event in of(events, EvalEvent)] == [0, start.steps_per_epoch, start.total_steps]
    stages = list(dict.fromkeys(event.stage for event in of(events, ProgressEvent)))
    assert stages == ["read", "load", "encode", "retain", "reference", "evaluate", "save"]
    assert all(0 <= event.fraction <= 1 for event in of(events, ProgressEvent))
    assert isinstance(end, EndEvent)
    assert (end.reason, end.resumable) == ("finished", False)
    assert run.status().state == "finished"
    assert not run.is_running()
    kept = [event for event in events if not isinstance(event, ProgressEvent)]
    assert run.events().events == kept


def test_step_metrics_have_trls_names(root):
    events = collect(recipe_for(root, data__retain=root / "keep.jsonl", train__max_steps=2))
    metrics = of(events, StepEvent)[-1].metrics
    assert set(metrics) >= {
        *("loss", "learning_rate", "grad_norm", "epoch", "num_tokens", "step_seconds", "tokens_per_second"),
        *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
        *("logps/chosen", "logps/rejected", "peak_memory_bytes", "retain/rewards/margins", "retain/drift"),
    }
    assert metrics["rewards/margins"] == pytest.approx(metrics["rewards/chosen"] - metrics["rewards/rejected"])
    assert metrics["peak_memory_bytes"] > 100_000
    evaluation = of(events, EvalEvent)[0].metrics
    assert {"eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/chosen"} <= set(evaluation)


def test_the_first_loss_is_ln_2_and_the_first_held_out_loss_too(root):
    events = collect(recipe_for(root, dpo__rpo_alpha=0.0, train__max_steps=1))
    assert losses(events) == [pytest.approx(math.log(2), abs=1e-5)]
    assert of(events, EvalEvent)[0].metrics["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_training_moves_the_margin_and_nothing_but_the_adapter(root):
    recipe = recipe_for(root, train__num_train_epochs=3.0)
    before = {path.name: path.read_bytes() for path in (root / "model").resolve().iterdir()}
    events = collect(recipe)
    margins = [event.metrics["eval_rewards/margins"] for event in of(events, EvalEvent)]
    assert margins[-1] > margins[0] + 0.05
    assert losses(events)[-1] < losses(events)[0]
    assert {path.name: path.read_bytes() for path in (root / "model").resolve().iterdir()} == before


def test_published_adapter_is_the_model_that_was_evaluated(root):
    recipe = recipe_for(root)
    events = collect(recipe)
    loaded = load_model(recipe.model)
    load_adapter(recipe.output_dir / "adapter", loaded)
    setup = result_of(session.set_up(recipe, read_inputs(recipe)))
    logps = PairScorer(loaded.model).logps(setup.held_out)
    best = [event for event in of(events, EvalEvent) if event.best][-1]
    assert float(logps.chosen.mean()) == pytest.approx(best.metrics["eval_logps/chosen"], abs=1e-4)
    assert of(events, EndEvent)[0].adapter_step == best.step


def test_equal_runs_are_equal_to_the_bit(root):
    first = collect(recipe_for(root, lora__dropout=0.1, output_dir=root / "runs" / "a"))
    second = collect(recipe_for(root, lora__dropout=0.1, output_dir=root / "runs" / "b"))
    assert losses(first) == losses(second)
    one, two = (adapter_arrays(root / "runs" / name / "adapter") for name in "ab")
    assert all(mx.array_equal(one[name], two[name]) for name in one)
    assert losses(collect(recipe_for(root, lora__dropout=0.1, seed=1))) != losses(first)


@pytest.mark.parametrize("batch", [(8, 1), (1, 8), (2, 4)])
def test_accumulation_equals_a_larger_batch(root, batch):
    # 24 rows less the held-out ones: the last window of the epoch is a partial one.
    size, accumulation = batch
    recipe = recipe_for(
        root,
        data__eval=0.1,
        train__per_device_train_batch_size=size,
        train__gradient_accumulation_steps=accumulation,
        train__num_train_epochs=2.0,
        output_dir=root / "runs" / f"{size}x{accumulation}",
    )
    events = collect(recipe)
    reference = collect(recipe_for(root, train__per_device_train_batch_size=8, output_dir=root / "runs" / "reference"))
    assert len(losses(events)) == 2 * 3
    np.testing.assert_allclose(losses(events), losses(reference), rtol=1e-5)


RESUMED = {"lora__dropout": 0.2, "train__eval_steps": 3}


@pytest.fixture(scope="module")
def whole(shared):
    """A run that nothing interrupts: its events and its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCALDPO_CACHE", str(shared / "cache"))
        recipe = recipe_for(shared, **RESUMED, data__retain=shared / "keep.jsonl", output_dir=shared / "runs" / "whole")
        return collect(recipe), RunFolder(recipe.output_dir)


def _halves(root):
    return recipe_for(root, **RESUMED, data__retain=root / "keep.jsonl")


def _assert_same_run(whole, run):
    def metrics(folder):
        return [lasting(event) for event in folder.events().events if event.kind in ("step", "eval")]

    expected = whole[1]
    assert metrics(run) == metrics(expected)
    one, two = ((folder.adapter / "adapters.safetensors").read_bytes() for folder in (expected, run))
    assert one == two


@pytest.mark.parametrize("step", [2, 7, 8])
def test_a_resumed_run_equals_one_left_alone_to_the_bit(root, whole, step):
    # An epoch has 7 steps: inside an epoch, at its end, and just after it.
    recipe = _halves(root)
    first = stopped_at(recipe, step)
    assert first[-1].reason == "stopped"
    assert first[-1].resumable
    assert RunFolder(recipe.output_dir).status().state == "stopped"
    second = collect(recipe, resume=True)
    assert of(second, StartEvent)[0].step == step
    assert second[-1].adapter_step == whole[0][-1].adapter_step
    _assert_same_run(whole, RunFolder(recipe.output_dir))


def test_a_run_killed_between_checkpoints_goes_on_to_the_same_bits(root, whole):
    recipe = _halves(root)
    code = """
import os, sys
from localdpo.recipe import load_recipe
from localdpo.train.loop import train
for event in train(load_recipe(sys.argv[1])):
    if event.kind == "step" and event.step == 5:
        os.kill(os.getpid(), 9)
"""
    file = root / "killed.yaml"
    file.write_text(dump_recipe(recipe))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code, str(file)], env=environment, timeout=120)
    assert done.returncode == -9
    run = RunFolder(recipe.output_dir)
    assert run.status().state == "interrupted"
    assert [event.step for event in run.events().events if event.kind == "step"][-1] == 5
    events = collect(recipe, resume=True)
    assert of(events, StepEvent)[0].step == 4  # saved when the evaluation at 3 was the best
    _assert_same_run(whole, run)


@pytest.mark.parametrize("part", ["position", "rng", "optimizer", "adapter"])
def test_resuming_without_a_part_of_the_state_would_be_noticed(root, whole, part, monkeypatch):
    recipe = _halves(root)
    stopped_at(recipe, 4)
    real = session.load_latest

    def without_position(folder):
        found, damaged = real(folder)
        return replace(found, state=replace(found.state, position=Position())), damaged

    name, replacement = {
        "position": ("load_latest", without_position),
        "rng": ("restore_rng", lambda words: mx.random.seed(0)),
        "optimizer": ("AdapterOptimizer.restore", lambda self, state: None),
        "adapter": ("load_adapter", lambda folder, loaded: None),
    }[part]
    monkeypatch.setattr(f"localdpo.train.session.{name}", replacement)
    assert losses(collect(recipe, resume=True)) != losses(whole[0])[4:]


def test_a_run_over_a_cached_trunk_resumes_to_the_same_bits(root):
    settings = {"lora__num_layers": 1, "train__max_steps": 8}
    whole, halves = (recipe_for(root, **settings, output_dir=root / "runs" / name) for name in ("whole", "halves"))
    expected = losses(collect(whole))
    stopped_at(halves, 3)
    assert losses(collect(halves, resume=True)) == expected[3:]
    one, two = ((run.output_dir / "adapter" / "adapters.safetensors").read_bytes() for run in (whole, halves))
    assert one == two


def test_checkpoints_are_kept_by_number_and_the_best_always(root):
    recipe = recipe_for(root, train__save_steps=1, train__save_total_limit=2, train__eval_steps=100)
    events = collect(recipe)
    total = of(events, StartEvent)[0].total_steps
    assert len(of(events, CheckpointEvent)) == total
    steps = [step for step, _ in list_checkpoints(recipe.output_dir / "checkpoints")]
    assert steps == [total - 2, total - 1, total]  # two, and the best, which is the last


def test_a_corrupt_newest_checkpoint_falls_back_with_a_warning(root):
    recipe = recipe_for(root, train__save_steps=2, data__eval=None)
    stopped_at(recipe, 6)
    newest = recipe.output_dir / "checkpoints" / "step-000006" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-5])
    events = collect(recipe, resume=True)
    warning = of(events, WarningEvent)[0]
    assert warning.code == "checkpoint-damaged"
    assert "optimizer.safetensors" in warning.where
    assert of(events, StepEvent)[0].step == 5
    steps = [event.step for event in RunFolder(recipe.output_dir).events().events if event.kind == "step"]
    assert steps == list(range(1, steps[-1] + 1))


def test_resume_without_a_checkpoint_starts_over(root):
    recipe = recipe_for(root, data__eval=None)
    for _ in islice(train(recipe), 8):
        pass
    events = collect(recipe, resume=True)
    assert of(events, WarningEvent)[0].code == "no-checkpoint"
    assert of(events, StepEvent)[0].step == 1
    assert events[-1].reason == "finished"


def test_resume_of_a_finished_run_is_refused_and_leaves_it_alone(root):
    recipe = recipe_for(root)
    collect(recipe)
    before = (recipe.output_dir / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="this run is finished, at step"):
        collect(recipe, resume=True)
    assert (recipe.output_dir / "metrics.jsonl").read_bytes() == before
    assert RunFolder(recipe.output_dir).status().state == "finished"


def test_a_finished_run_can_be_made_longer(root):
    collect(recipe_for(root))
    events = collect(recipe_for(root, train__num_train_epochs=3.0), resume=True)
    start = of(events, StartEvent)[0]
    assert (start.step, start.total_steps) == (12, 18)
    assert "longer" in [warning.code for warning in of(events, WarningEvent)]
    assert events[-1].step == 18


def test_an_abandoned_run_is_released(root):
    recipe = recipe_for(root)
    events = train(recipe)
    for event in events:
        if isinstance(event, StepEvent):
            break
    assert RunFolder(recipe.output_dir).is_running()
    events.close()
    assert not RunFolder(recipe.output_dir).is_running()
    assert RunFolder(recipe.output_dir).status().state == "interrupted"


def test_second_run_keeps_the_first(root):
    recipe = recipe_for(root, train__max_steps=1)
    collect(recipe)
    events = collect(recipe)
    warning = of(events, WarningEvent)[0]
    assert warning.code == "set-aside"
    assert (root / "runs" / "a.1" / "adapter" / "adapters.safetensors").is_file()


def test_max_steps_go_before_epochs(root):
    events = collect(recipe_for(root, train__max_steps=7))
    assert of(events, StepEvent)[-1].step == 7
    assert events[-1].reason == "finished"


def test_stops_when_an_epochs_loss_is_low_enough(root):
    events = collect(recipe_for(root, train__stop_loss=1e9, train__num_train_epochs=3.0))
    start = of(events, StartEvent)[0]
    assert (events[-1].reason, events[-1].step) == ("stop_loss", start.steps_per_epoch)


def test_stops_without_improvement_and_keeps_the_best(root):
    # At this learning rate the first steps are the best and the rest ruin the model.
    recipe = recipe_for(
        root,
        train__learning_rate=0.3,
        train__lr_scheduler_type="constant",
        train__warmup_ratio=0.0,
        train__num_train_epochs=30.0,
        train__eval_steps=2,
        train__early_stopping_patience=3,
        train__save_total_limit=1,
    )
    events = collect(recipe)
    evaluations = of(events, EvalEvent)
    best = [event for event in evaluations if event.best][-1]
    assert events[-1].reason == "early_stopping"
    assert evaluations[-1].step == best.step + 6
    assert events[-1].adapter_step == best.step
    kept = adapter_arrays(recipe.output_dir / "checkpoints" / f"step-{best.step:06d}" / "adapter")
    published = adapter_arrays(recipe.output_dir / "adapter")
    assert all(mx.array_equal(kept[name], published[name]) for name in kept)


def test_the_preflight_says_what_the_run_does_and_makes_no_folder(root):
    recipe = recipe_for(root, train__max_steps=1)
    planned = plan(recipe).to_json()
    assert not recipe.output_dir.exists()
    started = of(collect(recipe), StartEvent)[0].plan
    exact = {key for key in started if not key.startswith(("seconds", "memory"))}
    assert {key: planned[key] for key in exact} == {key: started[key] for key in exact}


def test_the_last_adapter_is_published_when_asked_for(root):
    recipe = recipe_for(root, train__learning_rate=0.3, train__warmup_ratio=0.0, train__load_best_model_at_end=False)
    events = collect(recipe)
    assert events[-1].adapter_step == events[-1].step


def test_pause_waits_for_resume(root):
    control, seen = Control(), []
    run = RunFolder(root / "runs" / "a")
    for event in train(recipe_for(root, train__max_steps=4), control=control):
        seen.append(event)
        if isinstance(event, StepEvent) and event.step == 2:
            assert run.request("pause")
        if isinstance(event, ProgressEvent) and event.stage == "paused":
            assert run.status().state == "paused"
            assert run.request("resume")
    assert [event.stage for event in of(seen, ProgressEvent)].count("paused") == 1
    assert of(seen, CheckpointEvent)[0].step == 2
    assert seen[-1].reason == "finished"


def test_stop_by_the_control_file_saves_and_publishes(root):
    recipe = recipe_for(root)
    run = RunFolder(recipe.output_dir)
    seen = []
    for event in train(recipe):
        seen.append(event)
        if isinstance(event, StepEvent) and event.step == 3:
            assert run.request("stop")
    assert (seen[-1].reason, seen[-1].step, seen[-1].adapter_step) == ("stopped", 3, 3)
    assert (run.adapter / "adapters.safetensors").is_file()


def test_stop_before_the_first_step(root):
    control = Control()
    control.stop()
    events = collect(recipe_for(root), control=control)
    assert (events[-1].reason, events[-1].adapter, events[-1].resumable) == ("stopped", None, True)
    assert not of(events, StepEvent)


def test_stop_before_going_on_keeps_where_the_run_was(root):
    recipe = recipe_for(root)
    stopped_at(recipe, 3)
    control = Control()
    control.stop()
    end = collect(recipe, resume=True, control=control)[-1]
    assert (end.reason, end.step, end.message) == ("stopped", 3, "Stopped before going on from step 3.")
    status = RunFolder(recipe.output_dir).status()
    assert (status.state, status.step, status.attempt) == ("stopped", 3, 1)
    assert of(collect(recipe, resume=True), StepEvent)[0].step == 4


def test_a_loss_that_is_not_finite_names_its_rows_and_publishes_nothing(root, monkeypatch):
    recipe = recipe_for(root)
    real = FastScorer.loss_and_grad

    def poisoned(self, window, loss):
        result = real(self, window, loss)
        for index, row in enumerate(window):
            if row.line == 5:
                result.columns["logps/chosen"][index] = np.nan
                return result._replace(loss=math.nan)
        return result

    monkeypatch.setattr(FastScorer, "loss_and_grad", poisoned)
    seen = []
    with pytest.raises(DivergedError, match=r"pairs\.jsonl:5\. Look at") as info:
        seen.extend(train(recipe))
    run = RunFolder(recipe.output_dir)
    assert info.value.exit_code == 4
    assert run.status().state == "diverged"
    assert run.events().events[-1].reason == "diverged"
    assert not run.adapter.exists()


def test_chosen_falling_is_said_in_words(root):
    # Without NLL, pushing hard, DPO lowers both answers: the known failure.
    recipe = recipe_for(
        root,
        dpo__rpo_alpha=0.0,
        dpo__beta=0.5,
        data__eval=None,
        train__learning_rate=0.05,
        train__num_train_epochs=4.0,
        lora__r=2,
    )
    codes = [warning.code for warning in of(collect(recipe), WarningEvent)]
    assert set(codes) & {"chosen-falling", "loss-zero"}
    assert len(codes) == len(set(codes))


def test_fewer_rows_than_a_batch_train(root, tmp_path):
    write_rows(tmp_path / "few.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    recipe = recipe_for(root, data__train=tmp_path / "few.jsonl", train__per_device_train_batch_size=64)
    events = collect(recipe)
    assert [event.step for event in of(events, StepEvent)] == [1, 2]
    assert events[-1].adapter_step == 2


def test_reference_free_losses_need_no_reference(root):
    events = collect(recipe_for(root, dpo__loss_type="simpo", train__max_steps=2))
    assert "reference" not in {event.stage for event in of(events, ProgressEvent)}
    assert all(math.isfinite(loss) for loss in losses(events))


def test_a_file_to_evaluate_on_is_used_and_overlap_is_warned_about(root, tmp_path):
    rows = [json.loads(line) for line in (root / "pairs.jsonl").read_text().splitlines()[:2]]
    rows.append({"prompt": "new", "chosen": "x", "rejected": "y"})
    write_rows(tmp_path / "eval.jsonl", rows)
    events = collect(recipe_for(root, data__eval=tmp_path / "eval.jsonl", train__max_steps=1))
    plan = of(events, StartEvent)[0].plan
    assert plan["held_out_pairs"] == 3
    assert plan["train_pairs"] == 24
    assert any("2 of 3 held-out pairs" in warning["message"] for warning in plan["warnings"])
    assert (root / "runs" / "a" / "eval.jsonl").is_file()


def test_data_edited_while_training_does_not_matter_until_the_resume(root, tmp_path):
    pairs = tmp_path / "mine.jsonl"
    pairs.write_text((root / "pairs.jsonl").read_text())
    recipe = recipe_for(root, data__train=pairs)
    stopped_at(recipe, 2)
    pairs.write_text("")
    with pytest.raises(InputError, match=r"mine\.jsonl has changed since this run was started"):
        collect(recipe, resume=True)
    pairs.unlink()
    events = collect(recipe, resume=True)  # the run has a copy of its own
    assert events[-1].reason == "finished"


def test_another_model_is_refused_on_resume(root, tmp_path):
    recipe = recipe_for(root)
    stopped_at(recipe, 2)
    tiny_model(tmp_path / "other", tie_word_embeddings=False, seed=5)
    with pytest.raises(InputError, match="not the model this run was started with"):
        collect(recipe.model_copy(update={"model": str(tmp_path / "other")}), resume=True)


def test_no_room_on_the_disk_is_said_before_a_model_loads(root, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(EnvironmentFault, match="MB are needed"):
        collect(recipe_for(root).model_copy(update={"model": "/nowhere"}))


def test_the_everyday_prompts_are_retained_by_default(root, monkeypatch):
    monkeypatch.setattr("localdpo.train.inputs.recipes_dir", lambda: root)
    (root / "everyday.jsonl").symlink_to(root / "keep.jsonl")
    events = collect(recipe_for(root, data__retain="everyday", train__max_steps=1))
    assert of(events, StartEvent)[0].plan["retain_prompts"] == 6
    kept = [json.loads(line) for line in (root / "runs" / "a" / "retain.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in kept} == {"retain"}


def test_closing_gets_the_tuned_model_and_ends_the_run(root):
    def closing(session):
        yield ProgressEvent(stage="samples")
        return {"tuned": session.state.step}

    events = collect(recipe_for(root, train__max_steps=2), closing=closing)
    assert events[-1].figures == {"tuned": 2}
