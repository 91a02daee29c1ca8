"""Checkpoints: whole or not there, to the bit, and never the last good one deleted."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from tiny import randomise_adapter, tiny_model

from localdpo.data.order import Position
from localdpo.errors import EnvironmentFault, InputError
from localdpo.files import verify_folder
from localdpo.model.load import load_model
from localdpo.model.lora import LoraSettings, adapter_weights, attach_lora, load_adapter
from localdpo.recipe import TrainRecipe
from localdpo.train.checkpoint import (
    TrainState,
    list_checkpoints,
    load_latest,
    prune,
    restore_rng,
    rng_state,
    save_checkpoint,
)
from localdpo.train.optimizer import AdapterOptimizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCALDPO_CACHE", str(root / "cache"))
        loaded = load_model(str(tiny_model(root / "tiny")))
    info = attach_lora(loaded.model, LoraSettings(rank=2))
    randomise_adapter(loaded.model)
    return loaded, info, AdapterOptimizer(loaded.model, TrainRecipe())


def _state(step, **changes):
    return TrainState(step, Position(1, step), 100, (7, 2**32 - 1), **changes)


def _save(folder, model, step, **changes):
    loaded, info, optimizer = model
    return save_checkpoint(folder, _state(step, **changes), optimizer.state(), loaded, info)


def test_what_is_saved_is_read_back_to_the_bit(tmp_path, model):
    loaded, _, optimizer = model
    saved = _state(40, num_tokens=12, best_step=30, best_loss=1 / 3, stale=2, metrics_bytes=999)
    path = _save(tmp_path, model, 40, num_tokens=12, best_step=30, best_loss=1 / 3, stale=2, metrics_bytes=999)
    assert path.name == "step-000040"
    found, damaged = load_latest(tmp_path)
    assert damaged == []
    assert found.state == saved
    own = optimizer.state()
    assert found.optimizer.keys() == own.keys()
    assert all(mx.array_equal(found.optimizer[name], own[name]) for name in own)
    assert found.optimizer["step"].dtype == own["step"].dtype
    before = {name: mx.array(value) for name, value in adapter_weights(loaded.model).items()}
    load_adapter(found.adapter, loaded)
    after = adapter_weights(loaded.model)
    assert all(mx.array_equal(before[name], after[name]) for name in before)


def test_the_random_key_goes_on_where_it_was():
    mx.random.seed(3)
    mx.eval(mx.random.uniform(shape=(2,)))
    words = rng_state()
    expected = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(99)
    restore_rng(words)
    assert mx.random.uniform(shape=(4,)).tolist() == expected


def test_no_checkpoints_is_none(tmp_path):
    assert load_latest(tmp_path / "nowhere") == (None, [])
    (tmp_path / "step-x").mkdir()
    (tmp_path / ".step-000001.tmp-1").mkdir()
    assert load_latest(tmp_path) == (None, [])


FILES = ["state.json", "optimizer.safetensors", "adapter/adapters.safetensors", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["cut", "flipped", "missing"])
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path, model, name, how):
    _save(tmp_path, model, 1)
    file = _save(tmp_path, model, 2) / name
    data = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    elif how == "cut":
        file.write_bytes(data[:-3])
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    found, damaged = load_latest(tmp_path)
    assert found.state.step == 1
    assert name.split("/")[-1] in str(damaged[0])


def test_a_whole_folder_that_is_no_checkpoint_is_passed_over(tmp_path, model):
    _save(tmp_path, model, 1)
    newer = _save(tmp_path, model, 2)
    state = json.loads((newer / "state.json").read_text())
    del state["position"]
    (newer / "state.json").write_text(json.dumps(state))
    manifest = json.loads((newer / "manifest.json").read_text())
    data = (newer / "state.json").read_bytes()
    manifest["files"]["state.json"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (newer / "manifest.json").write_text(json.dumps(manifest))
    assert verify_folder(newer) == []
    found, damaged = load_latest(tmp_path)
    assert found.state.step == 1
    assert "cannot be read" in str(damaged[0])


def test_none_whole_is_an_input_error(tmp_path, model):
    (_save(tmp_path, model, 1) / "state.json").unlink()
    with pytest.raises(InputError, match="no checkpoint is whole"):
        load_latest(tmp_path)


def _steps(folder):
    return [step for step, _ in list_checkpoints(folder)]


def test_retention_keeps_the_newest_and_spares_the_best(tmp_path, model):
    for step in range(1, 7):
        _save(tmp_path, model, step)
    assert len(prune(tmp_path, 2, [2])) == 3
    assert _steps(tmp_path) == [2, 5, 6]
    assert prune(tmp_path, None) == []


def test_retention_never_deletes_the_last_good_one(tmp_path, model):
    for step in range(1, 4):
        _save(tmp_path, model, step)
    for step in (2, 3):
        (tmp_path / f"step-{step:06d}" / "state.json").write_text("{}")
    prune(tmp_path, 2)
    assert load_latest(tmp_path)[0].state.step == 1


def test_checkpoints_are_ordered_by_number_not_by_name(tmp_path, model):
    for step in (999_999, 1_000_000):
        _save(tmp_path, model, step)
    assert load_latest(tmp_path)[0].state.step == 1_000_000


def test_saving_again_replaces_whole(tmp_path, model):
    _save(tmp_path, model, 3, num_tokens=1)
    _save(tmp_path, model, 3, num_tokens=2)
    assert load_latest(tmp_path)[0].state.num_tokens == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-000003"]


def test_a_full_disk_leaves_what_was_there(tmp_path, model, monkeypatch):
    _save(tmp_path, model, 1)

    def full(path, arrays, metadata=None):
        Path(path).write_bytes(b"half")
        raise RuntimeError("[write] Unable to write 99 bytes to file.")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(EnvironmentFault, match=r"could not be saved.*Free some space"):
        _save(tmp_path, model, 2)
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-000001"]
    assert load_latest(tmp_path)[0].state.step == 1


KILLED = """
import os, sys
from pathlib import Path
import mlx.core as mx
from tiny import tiny_model
from localdpo.data.order import Position
from localdpo.model.load import load_model
from localdpo.model.lora import LoraSettings, attach_lora
from localdpo.recipe import TrainRecipe
from localdpo.train.checkpoint import TrainState, save_checkpoint
from localdpo.train.optimizer import AdapterOptimizer

root, when = Path(sys.argv[1]), int(sys.argv[2])
loaded = load_model(str(root / "tiny"))
info = attach_lora(loaded.model, LoraSettings(rank=2))
optimizer = AdapterOptimizer(loaded.model, TrainRecipe())
calls = 0

def count(event, arguments):
    # Every file opened, renamed or removed is a moment at which the process may die.
    global calls
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "shutil.rmtree", "os.listdir", "os.scandir"):
        calls += 1
        if calls == when:
            os.kill(os.getpid(), 9)

sys.addaudithook(count)
save_checkpoint(root / "checkpoints", TrainState(2, Position(), 9, (0, 1)), optimizer.state(), loaded, info)
"""


@pytest.mark.slow
def test_killed_at_any_moment_of_a_save_the_old_or_the_new_is_whole(tmp_path, model):
    tiny_model(tmp_path / "tiny")
    tests = Path(__file__).parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (tests.parent, tests))),
        "LOCALDPO_CACHE": str(tmp_path / "cache"),
    }
    _save(tmp_path / "checkpoints", model, 1)
    for when in range(1, 400, 5):
        command = [sys.executable, "-c", KILLED, str(tmp_path), str(when)]
        done = subprocess.run(command, env=environment, check=False)
        assert done.returncode in (0, -9)
        found, damaged = load_latest(tmp_path / "checkpoints")
        assert damaged == []
        assert found.state.step in (1, 2)
        if done.returncode == 0:
            assert found.state.step == 2
            return
    pytest.fail("the save never came to its end")
