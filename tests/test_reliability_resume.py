"""Exact resume: whatever moment a run was killed at, what it goes on to is what it would have been.

A copy of the run folder, taken in the middle of something, is what `kill -9` leaves at that moment: what a process has
not yet written is in no file. So one run gives any number of moments to resume from. Real signals come on top.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from killing import Killer, metrics
from training import collect, of, recipe_for, stopped_at, workspace

from localdpo import files
from localdpo.data.order import Position
from localdpo.dpo import scorer
from localdpo.dpo.scorer import FastScorer
from localdpo.errors import InputError
from localdpo.recipe import dump_recipe
from localdpo.train import loop
from localdpo.train.checkpoint import TrainState, save_checkpoint
from localdpo.train.events import StartEvent
from localdpo.train.run import RunFolder

ROOT = Path(__file__).parent.parent
SETTINGS: dict[str, Any] = {
    "lora__dropout": 0.2,
    "data__eval": 0.2,
    "train__per_device_train_batch_size": 2,
    "train__gradient_accumulation_steps": 2,
    "train__max_steps": 7,
    "train__eval_steps": 3,
    "train__save_steps": 2,
    "train__save_total_limit": 2,
}
"""Dropout uses random numbers, and something is evaluated or saved at most steps."""


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory):
    """A workspace; micro-batches are so small that every step gathers gradients over several."""
    folder = workspace(tmp_path_factory.mktemp("work"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCALDPO_CACHE", str(folder / "cache"))
        patch.setattr(scorer, "MICRO_BATCH_TOKENS", {"cpu": 48, "gpu": 48})
        yield folder


def _recipe(root, name, **settings):
    return recipe_for(
        root, **{**SETTINGS, **settings}, data__retain=root / "keep.jsonl", output_dir=root / "runs" / name
    )


def _outcome(run):
    return metrics(run), (run / "adapter" / "adapters.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(root):
    """What a run that nobody interrupts comes to."""
    recipe = _recipe(root, "whole")
    collect(recipe)
    return _outcome(recipe.output_dir)


class Moments:
    """Copies of a run folder, taken while a trainer is in the middle of something."""

    def __init__(self, run: Path, patch: pytest.MonkeyPatch) -> None:
        self.run = run
        self.taken: list[Path] = []
        self._patch = patch

    def copy(self) -> None:
        target = self.run.with_name(f"{self.run.name}-{len(self.taken)}")
        self.taken.append(shutil.copytree(self.run, target, symlinks=True))

    def before(self, owner: Any, name: str, when: Callable[..., bool], after: bool = False) -> None:
        """Take a copy at the first call of ``owner.name`` with arguments for which ``when`` holds."""
        real, done = getattr(owner, name), []

        def call(*args, **kwargs):
            hit = not done and when(*args, **kwargs)
            done.extend([True] * hit)
            if hit and not after:
                self.copy()
            result = real(*args, **kwargs)
            if hit and after:
                self.copy()
            return result

        self._patch.setattr(owner, name, call)


def _resumed(root, folder):
    events = collect(_recipe(root, folder.name), resume=True)
    return of(events, StartEvent)[0].step, _outcome(folder)


def _step(run):
    lines = (run / "metrics.jsonl").read_bytes().splitlines() if (run / "metrics.jsonl").exists() else []
    return sum(b'"event": "step"' in line for line in lines)


def test_killed_inside_an_accumulation_an_evaluation_a_save_or_the_last_step(root, whole, monkeypatch):
    recipe = _recipe(root, "moments")
    moments = Moments(run := recipe.output_dir, monkeypatch)
    moments.before(scorer, "_add", lambda total, part: bool(total) and _step(run) == 4)
    moments.before(FastScorer, "logps", lambda *args: _step(run) == 3)
    moments.before(files, "_put_in_place", lambda temporary, target: target.name == "step-000006")
    moments.before(files, "_put_in_place", lambda temporary, target: target.name == "step-000004", after=True)
    moments.before(loop, "save_adapter", lambda *args: True)
    collect(recipe)
    monkeypatch.undo()
    assert _outcome(run) == whole
    assert len(moments.taken) == 5
    torn = moments.taken[0] / "metrics.jsonl"
    torn.write_bytes(torn.read_bytes() + b'{"event": "step", "st')  # a line that a crash of the machine cut off
    began = {}
    for number, folder in enumerate(moments.taken):
        assert RunFolder(folder).status().state == "interrupted"
        began[number], outcome = _resumed(root, folder)
        assert outcome == whole
    # In order of time: the evaluation at 3, after the save at 4, the step after it, the save at 6, and the publishing.
    assert list(began.values()) == [2, 4, 4, 4, 7]


def _without_state(**dropped):
    def write(folder, state, optimizer, *rest):
        return save_checkpoint(folder, replace(state, **dropped), optimizer, *rest)

    return write


def _without_moments(folder, state, optimizer, *rest):
    fresh = {name: mx.zeros_like(value) for name, value in optimizer.items()}
    return save_checkpoint(folder, state, fresh, *rest)


DROPPED = {
    "position": _without_state(position=Position()),
    "rng": _without_state(rng=(0, 0)),
    "optimizer": _without_moments,
    "step": _without_state(step=1),
    "num_tokens": _without_state(num_tokens=0),
    "metrics": _without_state(metrics_bytes=0),
}
EARLY = ("position",)


@pytest.mark.parametrize(
    "part", [*EARLY, *(pytest.param(name, marks=pytest.mark.slow) for name in DROPPED if name not in EARLY)]
)
def test_a_checkpoint_without_a_part_of_the_state_does_not_pass_for_exact(root, whole, part, monkeypatch):
    recipe = _recipe(root, f"without-{part}")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", DROPPED[part])
        stopped_at(recipe, 4)
    assert _resumed(root, recipe.output_dir)[1] != whole


def test_nothing_of_the_state_is_left_untried():
    fields = set(asdict(TrainState(0, Position(), 0, (0, 0))))
    tried = {"position", "rng", "step", "num_tokens", "best_step", "best_loss", "metrics_bytes"}
    # total_steps is worked out anew from the recipe; the others are in the next test.
    assert fields - tried == {"total_steps", "stale"}


@pytest.mark.slow
def test_the_best_evaluation_and_those_since_count_across_a_resume(root, monkeypatch):
    settings = {"train__eval_steps": 1, "train__early_stopping_patience": 3, "train__max_steps": 12}
    real, calls = loop.held_out_metrics, []

    def worse(*args):
        """Best at the first evaluation after a step: by the recipe, the run ends three evaluations later."""
        calls.append(1)
        return real(*args) | {"eval_loss": float(len(calls))}

    monkeypatch.setattr(loop, "held_out_metrics", worse)
    ends = []
    for name, dropped in {"all": {}, "stale": {"stale": 0}, "best": {"best_step": None, "best_loss": None}}.items():
        calls.clear()
        recipe = _recipe(root, f"since-{name}", **settings)
        with monkeypatch.context() as patch:
            patch.setattr(loop, "save_checkpoint", _without_state(**dropped))
            stopped_at(recipe, 3)
        end = collect(recipe, resume=True)[-1]
        ends.append((end.step, end.adapter_step))
    assert ends == [(4, 1), (6, 1), (7, 4)]


def _environment(root):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tui")])
    return {**os.environ, "PYTHONPATH": path, "LOCALDPO_CACHE": str(root / "cache")}


def _train_command(root, recipe):
    file = root / f"{recipe.output_dir.name}.yaml"
    file.write_text(dump_recipe(recipe))
    return [sys.executable, "-m", "localdpo", "train", str(file), "--json"]


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_step_and_saves_and_the_run_goes_on_to_the_same_bits(root, number, code, monkeypatch):
    # The command line trains with micro-batches of their own size.
    monkeypatch.setattr(scorer, "MICRO_BATCH_TOKENS", {"cpu": 1024, "gpu": 8192})
    alone = _recipe(root, f"alone-{number}")
    collect(alone)
    recipe = _recipe(root, f"signal-{number}")
    with subprocess.Popen(
        _train_command(root, recipe), env=_environment(root), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            for line in child.stdout:
                if json.loads(line)["event"] == "step":
                    child.send_signal(number)
                    break
            printed, errors = child.communicate(timeout=120)
        finally:
            child.kill()
    assert child.returncode == code
    assert "Traceback" not in errors
    assert errors.rstrip().endswith("--resume")
    end = json.loads(printed.splitlines()[-1])
    assert (end["event"], end["reason"], end["resumable"]) == ("end", "stopped", True)
    assert RunFolder(recipe.output_dir).status().state == "stopped"
    step, outcome = _resumed(root, recipe.output_dir)
    assert step == end["step"]
    assert outcome == _outcome(alone.output_dir)


@contextmanager
def _copied_at_every_file_operation(run: Path) -> Iterator[dict[str, Path]]:
    """Copies of ``run`` by what was in it, one before each operation on a file of it that changed anything."""
    copies: dict[str, Path] = {}
    busy: list[bool] = []

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if busy or event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
            return
        if not str(arguments[0]).startswith(str(run)) or not (run / "run.json").exists():
            return
        busy.append(True)
        state = _state_of(run)
        if state not in copies:
            copies[state] = shutil.copytree(run, run.with_name(f"{run.name}-{len(copies)}"))
        busy.clear()

    sys.addaudithook(look)
    try:
        yield copies
    finally:
        busy.append(True)  # a hook cannot be taken away


def _state_of(run: Path) -> str:
    """What is in a run folder but for its status, which a resume does not read."""
    digest = hashlib.sha256()
    for path in sorted(run.rglob("*")):
        if "status.json" not in path.name:
            digest.update(f"{path.relative_to(run)} {path.stat().st_size if path.is_file() else ''}\n".encode())
    return digest.hexdigest()


@pytest.mark.slow
def test_killed_at_any_file_operation_of_a_run_it_goes_on_to_the_same_bits(root, whole):
    recipe = _recipe(root, "every")
    with _copied_at_every_file_operation(recipe.output_dir) as copies:
        collect(recipe)
    assert _outcome(recipe.output_dir) == whole
    assert len(copies) > 60
    for folder in copies.values():
        status = RunFolder(folder).status()
        if status is not None and status.state == "finished":
            assert _outcome(folder) == whole
            continue
        if not (folder / "pairs.jsonl").exists():
            # Killed before its copy of the data was in place: there is nothing to lose yet.
            with pytest.raises(InputError, match="own copy of its data is missing"):
                _resumed(root, folder)
            assert not list((folder / "checkpoints").glob("*"))
            continue
        outcome = _resumed(root, folder)[1]
        assert outcome == whole, folder
        shutil.rmtree(folder)


@pytest.mark.slow
def test_25_kills_at_random_moments(tmp_path):
    killer = Killer(tmp_path, seed=25)
    killer.kill(25)
    assert killer.kills == 25
    assert killer.finished >= 3
