"""A method is one module: one that the package does not know trains, evaluates and resumes by the same loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from training import adapter_arrays, collect, losses, of, recipe_for, stopped_at, workspace

from localdpo.recipe import METHODS, Recipe
from localdpo.train.events import EndEvent, EvalEvent, StepEvent


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(METHODS, "likelihood", "toy_method")
    return workspace(tmp_path)


def test_a_method_of_forty_lines_trains(root: Path) -> None:
    recipe = recipe_for(root, method="likelihood", data__eval=0.25, train__max_steps=12)
    events = collect(recipe)
    steps, evaluations, end = of(events, StepEvent), of(events, EvalEvent), events[-1]
    assert isinstance(end, EndEvent)
    assert (end.reason, len(steps)) == ("finished", 12)
    found = losses(events)
    assert np.mean(found[-3:]) < np.mean(found[:3])
    assert evaluations[-1].metrics["eval_loss"] < evaluations[0].metrics["eval_loss"]
    assert steps[-1].metrics["logps/chosen"] > steps[0].metrics["logps/chosen"]
    # Its own figures and no others: it has no rewards and no reference.
    assert not [name for name in steps[0].metrics if name.startswith("rewards/")]
    assert any(np.abs(np.array(value)).max() > 0 for value in adapter_arrays(recipe.output_dir / "adapter").values())


def test_it_resumes_to_the_same_bits(root: Path) -> None:
    settings = {"method": "likelihood", "data__eval": None, "train__max_steps": 8, "train__save_steps": 2}
    whole, parted = (recipe_for(root, output_dir=root / name, **settings) for name in ("whole", "parted"))
    collect(whole)
    stopped_at(parted, 3)
    collect(parted, resume=True)
    ours, theirs = (adapter_arrays(recipe.output_dir / "adapter") for recipe in (parted, whole))
    for name, value in theirs.items():
        np.testing.assert_array_equal(np.array(ours[name]), np.array(value), err_msg=name)


def test_an_unknown_method_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="'likelyhood', and must be dpo"):
        Recipe.model_validate({"model": "m", "method": "likelyhood", "data": {"train": "p.jsonl"}})
