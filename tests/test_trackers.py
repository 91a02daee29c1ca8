"""Reporting to trackers: what they get, what happens when they fail, and what the real packages keep of it."""

from __future__ import annotations

import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from training import collect, of, recipe_for, workspace

from localdpo.errors import EnvironmentFault
from localdpo.evaluate.probes import closing
from localdpo.recipe import Recipe, dump_recipe
from localdpo.train import reporting, trackers
from localdpo.train.events import (
    EndEvent,
    EvalEvent,
    Event,
    SampleEvent,
    StartEvent,
    StepEvent,
    WarningEvent,
)
from localdpo.train.loop import plan, train
from localdpo.train.run import RunFolder
from localdpo.train.trackers import Trackers, require_trackers

DEADLINE = 120.0

FAKE = """
import json, os, time

MODE = os.environ.get("FAKE_MODE", "")

def note(*words):
    with open(os.environ["FAKE_NOTES"], "a") as file:
        file.write(json.dumps(words) + "\\n")

class Table:
    def __init__(self, columns, data):
        self.data = data

class Run:
    def log(self, values, step):
        print("noise on standard output")
        if MODE == "raise" and step == 2:
            raise RuntimeError("no  such\\nserver")
        if MODE == "hang" and step == 2:
            time.sleep(3600)
        note("log", step, {name: getattr(value, "data", value) for name, value in values.items()})

def init(**settings):
    note("init", settings)
    if MODE == "refuse":
        raise RuntimeError("not logged in")
    return Run()

def finish():
    note("finish")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Path:
    """A package trackio that notes what is done to it, in the file that is returned."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "trackio.py").write_text(FAKE, encoding="utf-8")
    notes = tmp_path / "notes.jsonl"
    monkeypatch.setenv("FAKE_NOTES", str(notes))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    for name in ("START_SECONDS", "CLOSE_SECONDS", "_LEAVE_SECONDS"):
        monkeypatch.setattr(trackers, name, DEADLINE)
    monkeypatch.setattr(trackers, "LINGER_SECONDS", 0.5)
    return notes


def notes_of(file: Path) -> list[list]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def run_of(tmp_path: Path, *names: str) -> tuple[Recipe, RunFolder]:
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"id": "0123456789abcdef"}))
    data = {"train": tmp_path / "pairs.jsonl"}
    recipe = Recipe.model_validate({"model": "tiny", "data": data, "train": {"report_to": names}})
    return recipe, RunFolder(folder)


def step(number: int) -> StepEvent:
    return StepEvent(step=number, time=1e9 + number, metrics={"loss": 1 / number, "rewards/margins": 0.5 * number})


def sample(number: int, question: str, final: bool = False) -> SampleEvent:
    prompt = [{"role": "user", "content": question}]
    return SampleEvent(step=number, prompt=prompt, base="b\x1b[2J", tuned="t", tags=["x", "y"], final=final)


def a_run(steps: int = 3) -> list[Event]:
    return [
        StartEvent(total_steps=steps),
        EvalEvent(step=0, metrics={"eval_loss": 0.7, "epoch": 0.0}),
        *(step(number) for number in range(1, steps + 1)),
        sample(steps, "one?"),
        sample(steps, "two?"),
        sample(steps, "last?", final=True),
        WarningEvent(step=steps, code="loss-zero", message="Learned by heart.", fix="Lower it."),
        WarningEvent(step=steps, code="best-damaged", message="cannot be read", where="/home/me/runs/a"),
        EndEvent(step=steps, reason="finished"),
    ]


def reported(recipe: Recipe, run: RunFolder, events: list[Event]) -> list[Event]:
    with Trackers(recipe, run) as watching:
        return list(watching.reported(iter(events)))


# -- with a made-up tracker, in a process


def test_a_tracker_gets_the_settings_then_every_figure_in_order_then_the_end(tmp_path, fake):
    events = a_run()
    assert reported(*run_of(tmp_path, "trackio"), events) == events
    kind, settings = notes_of(fake)[0]
    assert kind == "init"
    assert (settings["project"], settings["name"], settings["resume"]) == ("localdpo", "mine-01234567", "allow")
    assert settings["config"]["dpo.beta"] == 0.1
    assert settings["config"]["data.train"] == "pairs.jsonl"  # no folder of this machine leaves it
    assert str(tmp_path) not in json.dumps(settings)
    assert notes_of(fake)[1:] == [
        ["log", 0, {"eval/loss": 0.7}],
        *(["log", n, {"train/loss": 1 / n, "train/rewards/margins": 0.5 * n}] for n in (1, 2, 3)),
        ["log", 3, {"samples/training": [["one?", "b␛[2J", "t", "x, y"], ["two?", "b␛[2J", "t", "x, y"]]}],
        ["log", 3, {"samples/final": [["last?", "b␛[2J", "t", "x, y"]]}],
        ["log", 3, {"warnings": [["loss-zero", "Learned by heart.", "Lower it."]]}],
        ["log", 3, {"warnings": [["best-damaged", "", ""]]}],  # it may quote folders
        ["finish"],
    ]


def test_a_tracker_that_fails_on_the_way_is_one_warning_and_training_goes_on(tmp_path, fake, monkeypatch):
    monkeypatch.setenv("FAKE_MODE", "raise")
    recipe, run = run_of(tmp_path, "trackio")

    def slowly() -> Iterator[Event]:
        for event in a_run(6):
            yield event
            if event.step == 4:  # by then its end has been heard of
                until(lambda: watching._links == [] or watching._links[0].error)

    with Trackers(recipe, run) as watching:
        shown = list(watching.reported(slowly()))
    (warning,) = [event for event in shown if event.kind == "warning" and event.code == "tracker-failed"]
    assert warning.where == "trackio"
    assert "RuntimeError: no such server" in warning.message
    assert "Training is not affected" in warning.message
    assert [event for event in shown if event is not warning] == a_run_like(shown)
    assert shown.index(warning) < len(shown) - 1
    assert [note[:2] for note in notes_of(fake)[1:]] == [["log", 0], ["log", 1]]


def a_run_like(shown: list[Event]) -> list[Event]:
    return [event for event in shown if not (isinstance(event, WarningEvent) and event.code == "tracker-failed")]


def test_a_tracker_that_hangs_is_one_warning_before_the_end(tmp_path, fake, monkeypatch):
    monkeypatch.setenv("FAKE_MODE", "hang")
    recipe, run = run_of(tmp_path, "trackio")
    with Trackers(recipe, run) as watching:
        work = watching.reported(iter(a_run()))
        next(work)  # it has started: the rest must not wait for it
        monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.2)
        shown = list(work)
        assert isinstance(shown[-1], EndEvent)
        assert shown[-2].code == "tracker-failed"
        assert "has not taken everything within 0 s of the end" in shown[-2].message
        assert ["finish"] not in notes_of(fake)


def test_a_tracker_that_cannot_start_is_an_error_before_the_first_step(tmp_path, fake, monkeypatch):
    monkeypatch.setenv("FAKE_MODE", "refuse")
    with pytest.raises(EnvironmentFault, match=r"trackio cannot start.*not logged in.*leave trackio out") as found:
        reported(*run_of(tmp_path, "trackio"), a_run())
    assert found.value.exit_code == 3


def test_a_run_that_is_left_half_way_is_closed_all_the_same(tmp_path, fake):
    with Trackers(*run_of(tmp_path, "trackio")) as watching:
        work = watching.reported(iter(a_run()))
        assert [next(work).step for _ in range(3)] == [0, 0, 1]
        work.close()
    assert [note[0] for note in notes_of(fake)] == ["init", "log", "log", "finish"]


def test_a_run_that_reports_nowhere_starts_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    events = a_run()
    assert reported(*run_of(tmp_path), events) == events


def test_a_package_that_is_missing_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wandb").mkdir()  # what wandb leaves in a folder is not wandb
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", found_only(tmp_path))
    recipe, _ = run_of(tmp_path, "wandb", "tensorboard")
    for work in (lambda: plan(recipe), lambda: collect(recipe), lambda: require_trackers(["wandb", "tensorboard"])):
        with pytest.raises(EnvironmentFault) as found:
            work()
        assert found.value.exit_code == 3
        assert [problem.where for problem in found.value.problems] == ["train.report_to"] * 2
        assert "wandb is not installed. Install it with: pip install 'localdpo[wandb]' (or uv" in str(found.value)
    assert not recipe.output_dir.exists()


def found_only(folder: Path):
    from importlib.machinery import PathFinder

    return lambda name: PathFinder.find_spec(name, [str(folder)])


def until(condition) -> None:
    limit = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


# -- the other end, in this process


class Broken:
    def __init__(self, hello: reporting.Hello) -> None:
        raise SystemExit("no key")


def test_even_a_tracker_that_ends_its_process_is_heard_of(monkeypatch):
    monkeypatch.setitem(reporting.TRACKERS, "wandb", Broken)
    hello = {"folder": ".", "name": "a", "id": "b", "recipe": {}, "yaml": ""}
    said = io.StringIO()
    assert reporting.main("wandb", iter([json.dumps(hello)]), said) == 1
    assert json.loads(said.getvalue()) == {"state": "failed", "error": "SystemExit: no key"}


def test_wandb_is_asked_to_gather_nothing_by_itself(tmp_path, monkeypatch):
    asked: dict = {}
    module = ModuleType("wandb")
    module.Settings = lambda **settings: settings
    module.init = lambda **settings: asked.update(settings)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    hello = {"folder": str(tmp_path), "name": "mine", "id": "0123", "recipe": {"seed": 1}, "yaml": ""}
    reporting.WeightsAndBiases(reporting.Hello(hello))
    assert (asked["project"], asked["name"], asked["id"], asked["resume"]) == ("localdpo", "mine", "0123", "allow")
    assert asked["config"] == {"seed": 1}
    assert "mode" not in asked  # WANDB_MODE decides
    settings = asked["settings"]
    assert settings["console"] == "off"
    gathers = ("disable_git", "disable_code", "x_disable_meta", "x_disable_stats", "x_disable_machine_info")
    assert all(settings[name] is True for name in gathers)
    assert settings["x_save_requirements"] is False
    assert settings["host"] == "localdpo"


# -- with the real packages: figures are read back from what they wrote


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALDPO_CACHE", str(tmp_path / "cache"))
    for name in ("START_SECONDS", "CLOSE_SECONDS", "_LEAVE_SECONDS"):
        monkeypatch.setattr(trackers, name, DEADLINE)
    return workspace(tmp_path)


def a_recipe(root: Path, name: str) -> Recipe:
    return recipe_for(root, data__probes=root / "probes.jsonl", train__report_to=[name], train__max_steps=8)


def interrupted_and_resumed(recipe: Recipe) -> list[Event]:
    """A run that is left at step 5, whose checkpoint is of step 4, and resumed; the events as it keeps them."""
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"save_steps": 4, "eval_steps": 100})})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trackers, "_LEAVE_SECONDS", DEADLINE)
        for event in train(recipe):
            if isinstance(event, StepEvent) and event.step == 5:
                break
    events = collect(recipe, resume=True, closing=closing)
    assert of(events, StartEvent)[0].step == 4
    assert not of(events, WarningEvent)
    kept = RunFolder(recipe.output_dir).events().events
    assert [event.step for event in of(kept, StepEvent)] == list(range(1, 9))
    return kept


def figures_of(events: list[Event]) -> dict[tuple[str, int], float]:
    return {(name, event.step): value for event in events for name, value in reporting.scalars(event).items()}


@pytest.mark.slow
def test_tensorboards_event_files_hold_the_metrics_once(root):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tensors = pytest.importorskip("tensorboard.util.tensor_util")
    recipe = a_recipe(root, "tensorboard")
    kept = interrupted_and_resumed(recipe)
    files = reading.EventAccumulator(str(recipe.output_dir / "tensorboard"), size_guidance={reading.TENSORS: 0})
    files.Reload()
    found: dict = {}
    for tag in files.Tags()["scalars"]:
        for event in files.Scalars(tag):
            found.setdefault((tag, event.step), []).append(event.value)
    texts = {
        tag: str([tensors.make_ndarray(event.tensor_proto) for event in files.Tensors(tag)])
        for tag in ("recipe", "samples/final")
    }
    expected = {key: [float(np.float32(value))] for key, value in figures_of(kept).items()}
    assert found == expected
    assert {tag for tag, _ in found} >= {"train/loss", "train/rewards/margins", "eval/loss", "eval/rewards/accuracies"}
    assert "rpo_alpha: 1.0" in texts["recipe"]
    assert texts["samples/final"].count("your name, ") == 2


@pytest.mark.slow
def test_wandb_keeps_the_metrics_offline(root, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    recipe = a_recipe(root, "wandb")
    kept = interrupted_and_resumed(recipe)
    run_id = RunFolder(recipe.output_dir).info()["id"]
    files = sorted((recipe.output_dir / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
    assert len(files) == 2  # one an attempt, of one run: `wandb sync` puts them together
    found = {}
    for file in files:
        for record in wandb_records(file):
            for update in record.run.config.update:
                assert str(root) not in update.value_json
            assert record.run.host in ("", "localdpo")
            rows = {"/".join([item.key, *item.nested_key]).strip("/"): item.value_json for item in record.history.item}
            if rows:
                assert rows["train/global_step"] == rows["_step"]
                figures = {name: json.loads(value) for name, value in rows.items() if name.count("/") >= 1}
                found |= {(name, int(rows["_step"])): value for name, value in figures.items()}
    expected = figures_of(kept)
    assert {key: found[key] for key in expected} == expected
    tables = list((recipe.output_dir / "wandb").glob("offline-run-*/files/media/table/samples/final_8_*.table.json"))
    assert len(json.loads(tables[0].read_text())["data"]) == 4


def wandb_records(file: Path):
    """The records of a file of wandb's: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


@pytest.mark.slow
def test_trackio_keeps_the_metrics_of_both_attempts_in_one_run(root, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(root / "trackio"))
    recipe = a_recipe(root, "trackio")
    kept = interrupted_and_resumed(recipe)
    with sqlite3.connect(root / "trackio" / "localdpo.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
    assert {name for name, _, _ in rows} == {f"a-{RunFolder(recipe.output_dir).info()['id'][:8]}"}
    found: dict = {}
    for _, number, metrics in rows:
        for name, value in json.loads(metrics).items():
            if not name.startswith("samples"):
                found.setdefault((name, number), set()).add(value)
    volatile = ("train/step_seconds", "train/tokens_per_second", "train/peak_memory_bytes")
    for key, value in figures_of(kept).items():
        # Step 5 was made twice, to the same bits.
        assert value in found[key] if key[0] in volatile else found[key] == {value}
    assert any("samples/final" in json.loads(metrics) for _, _, metrics in rows)


@pytest.mark.slow
def test_ctrl_c_finishes_the_step_and_closes_the_tracker(root, fake):
    recipe = a_recipe(root, "trackio")
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_steps": 100_000})})
    (root / "mine.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    paths = [str(Path(__file__).parents[1]), os.environ["PYTHONPATH"]]
    shown = []
    with subprocess.Popen(
        [sys.executable, "-m", "localdpo", "train", str(root / "mine.yaml"), "--json"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            shown.append(json.loads(line))  # nothing but events: what a tracker prints is not there
            if shown[-1]["event"] == "step" and shown[-1]["step"] == 3:
                os.killpg(process.pid, signal.SIGINT)
        assert process.wait(DEADLINE) == 130
    assert (shown[-1]["event"], shown[-1]["reason"]) == ("end", "stopped")
    kept = [event for event in shown if event["event"] == "step"]
    notes = notes_of(fake)
    assert notes[-1] == ["finish"]
    assert [note[1] for note in notes if note[0] == "log" and "train/loss" in note[2]] == [row["step"] for row in kept]
