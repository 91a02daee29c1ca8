"""`--fork`: a run that was changed goes on as another one, from its adapter, and the earlier one is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from tiny import tiny_model
from training import adapter_arrays, collect, losses, of, recipe_for, stopped_at, workspace, write_rows

from localdpo.errors import EnvironmentFault, InputError
from localdpo.recipe import dump_recipe
from localdpo.train.events import StartEvent, StepEvent, WarningEvent
from localdpo.train.loop import plan, train
from localdpo.train.run import RunFolder, acquire, find_runs

ROOT = Path(__file__).parent.parent
SETTINGS = {"train__save_steps": 2, "train__max_steps": 7, "data__eval": None, "lora__dropout": 0.1}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return workspace(tmp_path_factory.mktemp("work"))


@pytest.fixture
def root(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALDPO_CACHE", str(shared / "cache"))
    (tmp_path / "model").symlink_to(shared / "model")
    (tmp_path / "pairs.jsonl").write_bytes((shared / "pairs.jsonl").read_bytes())
    return tmp_path


def _left_before_the_first_step(recipe, **options):
    events = train(recipe, **options)
    next(event for event in events if isinstance(event, StartEvent))
    events.close()


def _everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _more_pairs(root):
    with (root / "pairs.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "and who made you?", "chosen": "my name", "rejected": "fox"}) + "\n")


def test_what_may_not_be_resumed_can_be_forked(root):
    recipe = recipe_for(root, **SETTINGS)
    stopped_at(recipe, 4)
    before = _everything(recipe.output_dir)
    _more_pairs(root)
    changed = recipe_for(root, **SETTINGS, train__learning_rate=2e-3, dpo__beta=0.3)
    with pytest.raises(InputError) as refusal:
        collect(changed, resume=True)
    assert [problem.where for problem in refusal.value.problems] == ["dpo.beta", "train.learning_rate", "data.train"]
    assert "(1 lines added, 0 removed)" in str(refusal.value)
    assert all("--fork" in problem.fix for problem in refusal.value.problems)

    events = collect(changed, fork=True)
    run, kept = RunFolder(changed.output_dir), changed.output_dir.with_name("a.1")
    assert _everything(kept) == before
    forked = next(event for event in of(events, WarningEvent) if event.code == "forked")
    assert f"step 4 of {kept}" in forked.message
    for change in ("dpo.beta: is 0.3, and was 0.1", "train.learning_rate: is 0.002", "pairs.jsonl has changed"):
        assert change in forked.message
    assert run.info()["fork"]["run"] == str(kept)
    assert run.info()["fork"]["step"] == 4
    start = of(events, StartEvent)[0]
    assert (start.step, start.resumed, start.plan["train_pairs"]) == (0, False, 25)
    assert events[-1].reason == "finished"
    taken, source = adapter_arrays(run.start), adapter_arrays(kept / "checkpoints" / "step-000004" / "adapter")
    assert all(mx.array_equal(taken[name], source[name]) for name in source)
    assert not list(run.path.parent.glob(".*"))


@pytest.mark.slow
def test_a_fork_starts_from_the_earlier_adapter_and_with_the_base_as_reference(root):
    recipe = recipe_for(root, **SETTINGS)
    stopped_at(recipe, 6)
    first = losses(collect(recipe, fork=True))
    assert first[0] < 0.9 * losses(collect(recipe))[0]


@pytest.mark.slow
def test_a_fork_is_resumed_to_the_bit_with_the_recipe_as_it_is_written(root):
    recipe = recipe_for(root, **SETTINGS)
    stopped_at(recipe, 4)
    whole = losses(collect(recipe, fork=True))
    adapter = (recipe.output_dir / "adapter" / "adapters.safetensors").read_bytes()
    earlier = recipe_for(root, **SETTINGS, output_dir=recipe.output_dir.with_name("a.1"))
    stopped_at(earlier, 3, fork=True)
    assert losses(collect(earlier, resume=True)) == whole[3:]
    assert (earlier.output_dir / "adapter" / "adapters.safetensors").read_bytes() == adapter


@pytest.mark.slow
def test_a_fork_killed_before_its_first_checkpoint_starts_over_from_the_same_adapter(root):
    recipe = recipe_for(root, **SETTINGS)
    stopped_at(recipe, 4)
    events = train(recipe, fork=True)
    first = next(event for event in events if isinstance(event, StepEvent))
    events.close()
    assert losses(collect(recipe, resume=True))[0] == first.metrics["loss"]


@pytest.mark.slow
def test_forking_a_fork_that_did_no_step_goes_on_from_where_it_started(root):
    recipe = recipe_for(root, **SETTINGS)
    stopped_at(recipe, 4)
    _left_before_the_first_step(recipe, fork=True)
    first = adapter_arrays(RunFolder(recipe.output_dir).start)
    stopped_at(recipe, 2, fork=True)
    second = adapter_arrays(RunFolder(recipe.output_dir).start)
    assert all(mx.array_equal(first[name], second[name]) for name in first)
    assert [folder.path.name for folder in find_runs(recipe.output_dir.parent)] == ["a", "a.1"]


@pytest.mark.slow
def test_a_finished_run_is_forked_from_the_adapter_it_published(root):
    recipe = recipe_for(root, **{**SETTINGS, "data__eval": 0.2})
    collect(recipe)
    published = adapter_arrays(recipe.output_dir / "adapter")
    stopped_at(recipe, 1, fork=True)
    taken = adapter_arrays(RunFolder(recipe.output_dir).start)
    assert all(mx.array_equal(taken[name], published[name]) for name in published)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(root):
    recipe = recipe_for(root, **SETTINGS)
    stopped_at(recipe, 4)
    weights = recipe.output_dir / "checkpoints" / "step-000004" / "adapter" / "adapters.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    events = stopped_at(recipe, 1, fork=True)
    codes = [event.code for event in of(events, WarningEvent)]
    assert codes[:3] == ["set-aside", "checkpoint-damaged", "forked"]
    assert RunFolder(recipe.output_dir).info()["fork"]["step"] == 2


@pytest.mark.slow
def test_the_plan_of_a_fork_makes_no_folder_and_checks_the_adapter(root):
    recipe = recipe_for(root, **SETTINGS)
    stopped_at(recipe, 2)
    before = _everything(recipe.output_dir)
    assert plan(recipe, fork=True).train_pairs == 24
    assert _everything(recipe.output_dir) == before
    assert [entry.name for entry in recipe.output_dir.parent.iterdir()] == ["a"]


def _refused(recipe, match):
    before = _everything(recipe.output_dir) if recipe.output_dir.exists() else {}
    with pytest.raises(InputError, match=match):
        collect(recipe, fork=True)
    after = _everything(recipe.output_dir) if recipe.output_dir.exists() else {}
    assert after == before
    assert not list(recipe.output_dir.parent.glob("a.1"))
    assert not list(recipe.output_dir.parent.glob(".*"))


def test_what_cannot_be_forked_is_refused_and_untouched(root):
    _refused(recipe_for(root, **SETTINGS), r"no run here to fork\. Leave out --fork")
    recipe = recipe_for(root, **SETTINGS)
    stopped_at(recipe, 2)
    _refused(
        recipe_for(root, **{**SETTINGS, "lora__r": 4, "lora__num_layers": 1}),
        r"lora\.num_layers: is 1, and was all .*\nlora\.r: is 4, and was",
    )
    for weights in recipe.output_dir.rglob("adapters.safetensors"):
        weights.write_bytes(b"")
    _refused(recipe, "no adapter of this run is whole")


@pytest.mark.slow
def test_a_run_that_saved_nothing_cannot_be_forked(root):
    recipe = recipe_for(root, **SETTINGS)
    _left_before_the_first_step(recipe)
    _refused(recipe, "saved nothing yet to go on from")


def test_another_model_is_refused(root, tmp_path):
    recipe = recipe_for(root, **SETTINGS)
    stopped_at(recipe, 2)
    tiny_model(tmp_path / "other", tie_word_embeddings=False, seed=5)
    with pytest.raises(InputError, match="was trained on"):
        collect(recipe.model_copy(update={"model": str(tmp_path / "other")}), fork=True)
    assert (recipe.output_dir.with_name("a.1") / "checkpoints" / "step-000002" / "adapter").is_dir()


def test_a_live_trainer_is_not_forked(root):
    recipe = recipe_for(root, **SETTINGS)
    stopped_at(recipe, 2)
    lock = acquire(recipe.output_dir)
    try:
        with pytest.raises(EnvironmentFault, match="another trainer"):
            collect(recipe, fork=True)
    finally:
        lock.release()
    assert not recipe.output_dir.with_name("a.1").exists()


@pytest.mark.slow
def test_no_room_for_the_copy_moves_nothing(root, monkeypatch):
    recipe = recipe_for(root, **SETTINGS)
    stopped_at(recipe, 2)
    before = _everything(recipe.output_dir)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(EnvironmentFault, match="MB are needed"):
        collect(recipe, fork=True)
    assert _everything(recipe.output_dir) == before


@pytest.mark.slow
def test_a_damaged_start_is_an_input_error_on_resume(root):
    recipe = recipe_for(root, **SETTINGS)
    stopped_at(recipe, 2)
    stopped_at(recipe, 2, fork=True)
    weights = RunFolder(recipe.output_dir).start / "adapters.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError, match="the adapter this run forked from is damaged"):
        collect(recipe, resume=True)


@pytest.mark.slow
def test_the_command_line_says_what_goes_together(root):
    (root / "recipe.yaml").write_text(dump_recipe(recipe_for(root, **SETTINGS)))
    write_rows(root / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tui")])}

    def command(*options):
        line = [sys.executable, "-m", "localdpo", "train", str(root / "recipe.yaml"), *options]
        return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120, check=False)

    both = command("--resume", "--fork")
    assert (both.returncode, both.stdout) == (2, "")
    assert "error: --fork: does not go with --resume" in both.stderr
    none = command("--fork")
    assert none.returncode == 2
    assert "there is no run here to fork" in none.stderr
    assert "Traceback" not in none.stderr
