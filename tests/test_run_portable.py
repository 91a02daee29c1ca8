"""Nothing in a run folder depends on where the command was started."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from localdpo_tui.services.answering import find_target, tuned_runs
from localdpo_tui.services.run_list import read_rows
from training import collect, of, workspace
from typer.testing import CliRunner

from localdpo.cli import app
from localdpo.console.results import end_lines
from localdpo.data.store import PairStore
from localdpo.errors import InputError
from localdpo.evaluate.heldout import evaluate_run
from localdpo.paths import child_environment, follow, from_here
from localdpo.recipe import Recipe, load_recipe
from localdpo.train.events import EndEvent, StepEvent
from localdpo.train.run import RunFolder
from localdpo.yamlfile import parse_yaml

RECIPE = """
model: model
data: {train: ../pairs.jsonl, eval: 0.25, retain: null, max_length: 128, probes: ../probes.jsonl}
train: {learning_rate: 1.0e-3, max_steps: 2, sample_prompts: 0}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose recipe names everything relative, the model without ./, and the current folder in it."""
    folder = workspace(tmp_path / "project")
    (folder / "recipes").mkdir()
    (folder / "model").rename(folder / "recipes" / "model")
    (folder / "recipes" / "mine.yaml").write_text(RECIPE)
    monkeypatch.chdir(folder)
    return folder


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (text for item in value.values() for text in texts(item))
    elif isinstance(value, list):
        yield from (text for item in value for text in texts(item))
    elif isinstance(value, str):
        yield value


def documents(run: Path) -> Iterator[tuple[Path, Any]]:
    """Everything that a run folder says, but for the data that it copied."""
    for path in sorted(run.rglob("*")):
        if path.suffix == ".json":
            yield path, json.loads(path.read_text())
        elif path.suffix == ".yaml":
            yield path, parse_yaml(path.read_text(), str(path))
        elif path.name in ("metrics.jsonl", "samples.jsonl"):
            yield from ((path, json.loads(line)) for line in path.read_text().splitlines())


def test_every_path_in_a_run_is_absolute_or_its_own(project: Path) -> None:
    collect(load_recipe("recipes/mine.yaml"))
    run = project / "runs" / "mine"
    names = {entry.name for folder in (project, project / "recipes", run) for entry in folder.iterdir()}
    seen = set()
    for path, document in documents(run):
        for text in texts(document):
            if "\n" in text or " " in text:
                continue
            if os.path.isabs(text):
                seen.add(text)
            elif text.split("/")[0] in names - {"model"} and text != "mine":
                assert (run / text).exists(), f"{path.name} says {text}"
            else:
                assert text not in ("model", "runs/mine"), f"{path.name} says {text}"
    assert {str(project / "recipes" / "model"), str(run), str(run / "adapter")} <= seen


def test_a_run_is_evaluated_and_gone_on_with_from_elsewhere(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = collect(load_recipe("recipes/mine.yaml"))[-1]
    assert isinstance(end, EndEvent)
    assert end_lines(end)[-1] == f"adapter (step 2): {Path('runs/mine/adapter')}"
    run = project / "runs" / "mine"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert end_lines(end)[-1] == f"adapter (step 2): {run / 'adapter'}"
    assert evaluate_run(run).pairs == 6
    recipe = load_recipe(run / "recipe.yaml", ["train.max_steps=3"])
    assert of(collect(recipe, resume=True), StepEvent)[-1].step == 3
    assert RunFolder(run).status().state == "finished"  # type: ignore[union-attr]
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_run_that_was_moved_is_where_it_is(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collect(load_recipe("recipes/mine.yaml"))
    moved = tmp_path / "kept" / "of-tuesday"
    moved.parent.mkdir()
    (project / "runs" / "mine").rename(moved)
    monkeypatch.chdir(moved.parent)
    assert load_recipe("of-tuesday/recipe.yaml").output_dir == Path("of-tuesday")
    assert evaluate_run(moved).pairs == 6
    again = collect(load_recipe("of-tuesday/recipe.yaml", ["train.max_steps=3"]), resume=True)
    assert of(again, StepEvent)[-1].step == 3
    # The recipe of a run is its own: anywhere else the key says where to.
    assert load_recipe("of-tuesday/recipe.yaml", ["output_dir=other"]).output_dir == Path("other")
    project.rename(tmp_path / "gone")
    with pytest.raises(InputError, match=r"pairs\.jsonl: there is no such file"):
        load_recipe("of-tuesday/recipe.yaml")


def test_a_folder_without_a_dot_is_anchored_once(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    anchored = str(project / "recipes" / "model")
    assert load_recipe("recipes/mine.yaml").model == anchored
    monkeypatch.chdir(project / "recipes")
    assert load_recipe("mine.yaml").model == anchored
    assert load_recipe("mine.yaml", ["model=model"]).model == anchored
    monkeypatch.chdir(project)
    # As before: a folder beside the command rather than the recipe, and names that are no folders.
    (project / "org" / "base").mkdir(parents=True)
    text = RECIPE.replace("model: model", "model: org/base")
    (project / "recipes" / "mine.yaml").write_text(text)
    assert load_recipe("recipes/mine.yaml").model == str(project / "org" / "base")
    (project / "recipes" / "smollm2-135m").mkdir()
    for name in ("smollm2-135m", "someone/else", "someone/else@main"):
        (project / "recipes" / "mine.yaml").write_text(RECIPE.replace("model: model", f"model: {name}"))
        assert load_recipe("recipes/mine.yaml").model == name


def test_a_path_is_shown_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert from_here(tmp_path / "runs" / "a") == str(Path("runs/a"))
    assert from_here("runs/a") == str(Path("runs/a"))
    assert from_here(tmp_path.parent / "b") == str(tmp_path.parent / "b")


def test_a_recipe_made_in_python_is_anchored_too(project: Path) -> None:
    values = {"model": "recipes/model", "output_dir": "runs/made", "data": {"train": "pairs.jsonl", "retain": None}}
    recipe = Recipe.model_validate({**values, "data": {**values["data"], "max_length": 128}, "train": {"max_steps": 1}})
    collect(recipe)
    run = RunFolder(project / "runs" / "made")
    assert run.info()["files"]["data.train"]["path"] == str(project / "pairs.jsonl")
    kept = load_recipe(run.recipe_file)
    assert kept.data.train == project / "pairs.jsonl"
    assert run.info()["recipe"]["output_dir"] == str(run.path)


def test_what_is_gone_is_looked_for_where_it_was_from_the_run(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new" / "deeper"
    (new / "runs" / "a").mkdir(parents=True)
    (new / "pairs.jsonl").touch()
    before, now = str(old / "runs" / "a"), new / "runs" / "a"
    assert follow(str(old / "pairs.jsonl"), before, now) == str(new / "pairs.jsonl")
    for stays in (str(old / "other.jsonl"), "everyday", "org/name", str(tmp_path), str(new / "pairs.jsonl")):
        assert follow(stays, before, now) == stays
    assert follow(str(old / "pairs.jsonl"), "runs/a", now) == str(old / "pairs.jsonl"), "nobody knows where that was"
    old.mkdir()
    (old / "pairs.jsonl").touch()
    assert follow(str(old / "pairs.jsonl"), before, now) == str(old / "pairs.jsonl"), "it is not gone"


def said(*arguments: object) -> str:
    """What a command prints, run in this process; it has to succeed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (arguments, result.output)
    return result.stdout


@pytest.fixture
def moved(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That project after two runs, the second on from the first, moved as a whole; the current folder is elsewhere."""
    said("train", "recipes/mine.yaml")
    second = RECIPE + "lora: {init_from: ../runs/mine/adapter}\ndpo: {reference: init}\n"
    (project / "recipes" / "second.yaml").write_text(second)
    said("train", "recipes/second.yaml")
    place = tmp_path / "another" / "place"
    place.parent.mkdir()
    project.rename(place)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return place


def test_a_project_that_was_moved_works_in_its_new_place(moved: Path, tmp_path: Path) -> None:
    run = moved / "runs" / "second"
    listed = {Path(row["path"]).name: row["model"] for row in json.loads(said("runs", moved / "runs", "--json"))}
    assert listed == dict.fromkeys(("mine", "second"), str(moved / "recipes" / "model"))
    assert json.loads(said("chat", run, "-p", "hello", "--max-tokens", "2", "--json")).keys() == {"prompt", "tuned"}
    found = json.loads(said("eval", run, "--limit", "2", "--json"))
    assert found["held_out"]["pairs"] == 6
    assert found["drift"]["probes"]["prompts"] > 0, "of the probes' own file: the run kept no answers"
    said("report", run)
    assert str(tmp_path / "project") not in (run / "report.html").read_text()
    said("export", run, "--to", "mlx", "--out", tmp_path / "elsewhere" / "out")
    for recipe, steps in ((moved / "recipes" / "second.yaml", 3), (run / "recipe.yaml", 4)):
        said("train", recipe, "--resume", "--set", f"train.max_steps={steps}", "--set", f"output_dir={run}")
        status = RunFolder(run).status()
        assert status is not None
        assert (status.state, status.step) == ("finished", steps)
    said("train", run / "recipe.yaml", "--fork", "--set", "train.max_steps=1")
    assert (moved / "runs" / "second.1" / "adapter").is_dir()
    assert RunFolder(run).info()["fork"]["run"] == str(moved / "runs" / "second.1")
    kept = RunFolder(run).info()
    assert kept["recipe"]["lora"]["init_from"] == str(moved / "runs" / "mine" / "adapter")
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"out"}


def test_the_ui_finds_what_was_moved(moved: Path) -> None:
    assert [run.model for run in tuned_runs(moved)] == [str(moved / "recipes" / "model")] * 2
    target = find_target(moved / "runs" / "second")
    assert target.model == str(moved / "recipes" / "model")
    assert target.is_cached()
    row = next(row for row in read_rows(moved / "runs") if row.name == "second")
    assert row.recipe["data"]["train"] == str(moved / "pairs.jsonl")
    assert row.model == str(moved / "recipes" / "model")


def test_what_is_missing_after_a_move_is_named(moved: Path) -> None:
    run = moved / "runs" / "second"
    (moved / "probes.jsonl").unlink()
    shutil.rmtree(moved / "recipes" / "model")
    result = CliRunner().invoke(app, ["train", str(run / "recipe.yaml"), "--resume"])
    assert (result.exit_code, "probes.jsonl: there is no such file" in result.output) == (2, True)
    result = CliRunner().invoke(app, ["chat", str(run), "-p", "hello"])
    assert result.exit_code == 2
    assert "recipes/model" in result.output.replace("\n", "")


def test_edits_that_were_not_saved_come_along(project: Path, tmp_path: Path) -> None:
    """The program was killed, the project moved: the edits are offered where the file is now."""
    (project / "pairs").mkdir()
    file = project / "pairs" / "mine.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    command = (
        "import os, sys; from localdpo.data.store import PairDraft, PairStore; "
        "store = PairStore.open(sys.argv[1]); store.insert(PairDraft.of('new', 'd', 'e')); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", command, str(file)], check=True, env=child_environment())
    project.rename(tmp_path / "moved")
    with PairStore.open(tmp_path / "moved" / "pairs" / "mine.jsonl") as store:
        assert store.recovered is not None
        assert len(store) == 2
