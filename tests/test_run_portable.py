"""Nothing in a run folder depends on where the command was started."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from training import collect, of, workspace

from localdpo.console.results import end_lines
from localdpo.errors import InputError
from localdpo.evaluate.heldout import evaluate_run
from localdpo.paths import from_here
from localdpo.recipe import load_recipe
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
