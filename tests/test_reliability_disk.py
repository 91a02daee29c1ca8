"""Disks that are really full or really read-only: the state before is whole, and nothing acknowledged is lost."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from disks import mounted
from killing import metrics
from training import collect, recipe_for, workspace

from localdpo.data.order import Position
from localdpo.data.store import PairDraft, PairStore
from localdpo.errors import EnvironmentFault
from localdpo.files import verify_folder, write_json
from localdpo.model.load import load_model
from localdpo.model.lora import LoraSettings, adapter_weights, attach_lora, write_adapter
from localdpo.recipe import TrainRecipe
from localdpo.recipe_edit import RecipeEdit
from localdpo.train.checkpoint import TrainState, load_latest, save_checkpoint
from localdpo.train.events import StepEvent
from localdpo.train.loop import train
from localdpo.train.optimizer import AdapterOptimizer
from localdpo.train.run import ActiveRun, RunFolder, acquire

ROOT = Path(__file__).parent.parent


@pytest.fixture
def disk(tmp_path):
    with mounted(tmp_path / "disk") as made:
        yield made


@pytest.fixture
def large(tmp_path):
    """A disk that a run fits on."""
    with mounted(tmp_path / "large", "40m") as made:
        yield made


@pytest.fixture
def crowded(disk, monkeypatch):
    """A disk whose space others take right after it was asked for: the check before a write sees plenty."""
    monkeypatch.setattr("localdpo.files.shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 40))
    return disk


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return workspace(tmp_path_factory.mktemp("work"))


@pytest.fixture(autouse=True)
def _cache(root, monkeypatch):
    monkeypatch.setenv("LOCALDPO_CACHE", str(root / "cache"))


def _only(folder):
    return sorted(entry.name for entry in folder.iterdir() if entry.name != ".filler")


def _until_it_fits(disk, save, check):
    """Call ``save`` with more and more room; ``check`` looks at what is there after each failure and at the end."""
    failed = 0
    for tried, leave in enumerate((0, *(4096 << power for power in range(9)))):
        disk.fill(leave)
        try:
            save()
        except EnvironmentFault as fault:
            failed += "Free some space" in str(fault)
            check(saved=False)
        else:
            check(saved=True)
            assert failed == tried > 0
            return
    pytest.fail("it never fitted")


@pytest.fixture(scope="module")
def model(root):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCALDPO_CACHE", str(root / "cache"))
        loaded = load_model(str(root / "model"))
    info = attach_lora(loaded.model, LoraSettings(rank=4))
    return loaded, info, AdapterOptimizer(loaded.model, TrainRecipe())


def test_a_checkpoint_on_a_disk_that_runs_full_anywhere(crowded, model):
    loaded, info, optimizer = model
    folder = crowded.path / "checkpoints"

    def save(step):
        save_checkpoint(folder, TrainState(step, Position(), 9, (0, 1)), optimizer.state(), loaded, info)

    def check(saved):
        found, damaged = load_latest(folder)
        assert (found.state.step, damaged) == (2 if saved else 1, [])
        assert _only(folder) == ["step-000001", "step-000002"][: 2 if saved else 1]

    save(1)
    _until_it_fits(crowded, lambda: save(2), check)


def test_publishing_an_adapter_on_a_disk_that_runs_full_anywhere(crowded, model):
    loaded, info, _ = model
    folder = crowded.path / "adapter"

    def save(value):
        weights = {name: mx.full(old.shape, value) for name, old in adapter_weights(loaded.model).items()}
        write_adapter(folder, weights, info)

    def check(saved):
        assert verify_folder(folder) == []
        values = {float(array.max()) for array in mx.load(str(folder / "adapters.safetensors")).values()}
        assert values == {2.0 if saved else 1.0}
        assert _only(crowded.path) == ["adapter"]

    save(1.0)
    _until_it_fits(crowded, lambda: save(2.0), check)


def _is(file, which):
    data = json.loads(file.read_bytes())
    assert (data["which"], len(data["figures"])) == (which, 9000)


def test_results_and_recipes_on_a_disk_that_runs_full_anywhere(crowded, root):
    file, recipe = crowded.path / "eval.json", crowded.path / "recipe.yaml"
    write_json(file, {"which": "old", "figures": list(range(9000))})
    _until_it_fits(
        crowded,
        lambda: write_json(file, {"which": "new", "figures": list(range(9000))}),
        lambda saved: _is(file, "new" if saved else "old"),
    )
    crowded.empty()
    recipe.write_text(f"model: {root / 'model'}\n# {'x' * 9000}\ndata: {{train: pairs.jsonl}}\n")
    before = recipe.read_bytes()
    edit = RecipeEdit.open(recipe)
    edit.set("dpo.beta", "0.2")

    def check(saved):
        assert (recipe.read_bytes() != before) == saved
        assert _only(crowded.path) == ["eval.json", "recipe.yaml"]

    _until_it_fits(crowded, edit.save, check)
    assert b"beta: 0.2" in recipe.read_bytes()


def _pairs_file(folder, rows=300):
    path = folder / "pairs.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"p{n}", "chosen": "a" * 90, "rejected": "b"}) + "\n" for n in range(rows))
    )
    return path


def test_pairs_edited_on_a_full_disk_are_kept_and_saved_when_there_is_room(crowded):
    path = _pairs_file(crowded.path)
    before = path.read_bytes()
    with PairStore.open(path) as store:
        crowded.fill()
        store.insert(PairDraft.of("mine", "y" * 20_000, "z"), after=int(store.keys[0]))
        with pytest.raises(EnvironmentFault, match="Free some space"):
            store.flush()
        for leave in (0, 8192, 32_768):
            crowded.fill(leave)
            with pytest.raises(EnvironmentFault, match="Free some space"):
                store.save()
            assert path.read_bytes() == before
        assert store.row(int(store.keys[1])).prompt[0]["content"] == "mine"
        crowded.empty()
        store.flush()
        assert store.save().status == "saved"
    lines = path.read_bytes().splitlines()
    assert json.loads(lines[1])["prompt"] == "mine"
    assert b"\n".join([lines[0], *lines[2:], b""]) == before


def _recipe(root, folder, **settings):
    return recipe_for(
        root, data__eval=0.2, train__save_steps=2, train__max_steps=6, output_dir=folder / "a", **settings
    )


def _whole(root):
    collect(_recipe(root, root / "runs"))
    folder = root / "runs" / "a"
    return metrics(folder), (folder / "adapter" / "adapters.safetensors").read_bytes()


def _train(recipe, step, fault):
    """Train; ``fault`` happens at ``step``."""
    for event in train(recipe):
        if isinstance(event, StepEvent) and event.step == step:
            fault()


def test_a_disk_that_runs_full_in_the_middle_of_a_run(large, root):
    recipe = _recipe(root, large.path)
    with pytest.raises(EnvironmentFault, match="Free some space"):
        _train(recipe, 3, large.fill)
    run = RunFolder(recipe.output_dir)
    assert not run.is_running()
    large.empty()
    assert run.status().state in ("failed", "interrupted")
    assert load_latest(run.checkpoints)[0].state.step == 2
    events = collect(recipe, resume=True)
    assert events[-1].reason == "finished"
    assert (metrics(run.path), (run.adapter / "adapters.safetensors").read_bytes()) == _whole(root)


def _log_until_it_is_full(run, disk):
    with run:
        run.log(StepEvent(step=1))
        disk.fill()
        for step in range(2, 100):
            run.log(StepEvent(step=step))


def test_a_metrics_line_that_does_not_fit_ends_the_run_and_lets_go_of_it(disk):
    folder = disk.path / "a"
    folder.mkdir()
    with pytest.raises(EnvironmentFault, match="Free some space"):
        _log_until_it_is_full(ActiveRun(folder, acquire(folder)), disk)
    run = RunFolder(folder)
    steps = [event.step for event in run.events().events]
    assert steps == list(range(1, len(steps) + 1))
    assert not run.is_running()
    acquire(folder).release()


def test_space_is_asked_for_before_anything_is_made(disk, root):
    disk.fill(100_000)
    with pytest.raises(EnvironmentFault, match=r"MB are needed and .* free on this disk.*Free some space"):
        collect(_recipe(root, disk.path).model_copy(update={"model": "/nowhere"}))
    assert _only(disk.path) == []


def test_a_read_only_output_folder_is_said_before_training(large, root):
    large.read_only()
    with pytest.raises(EnvironmentFault, match="This disk is read-only: choose another folder") as fault:
        collect(_recipe(root, large.path).model_copy(update={"model": "/nowhere"}))
    assert fault.value.exit_code == 3


def test_pairs_on_a_read_only_disk_can_be_read_edited_and_saved_elsewhere(disk, tmp_path):
    path = _pairs_file(disk.path, rows=3)
    before = path.read_bytes()
    disk.read_only()
    with PairStore.open(path) as store:
        assert "read-only" in store.drafts_problem
        store.insert(PairDraft.of("mine", "a", "b"), after=int(store.keys[-1]))
        with pytest.raises(EnvironmentFault, match="read-only"):
            store.save()
        assert len(store) == 4
        store.save_as(tmp_path / "elsewhere.jsonl")
    assert path.read_bytes() == before
    assert b'"mine"' in (tmp_path / "elsewhere.jsonl").read_bytes()


@pytest.mark.slow
def test_a_finished_run_on_a_read_only_disk_can_be_looked_at(large, root):
    collect(_recipe(root, large.path))
    large.read_only()
    run = RunFolder(large.path / "a")
    assert run.status().state == "finished"
    assert not run.is_running()
    assert not run.request("stop")
    assert run.events().events[-1].reason == "finished"
