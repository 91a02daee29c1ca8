"""The verdict on real training of the starter model: a good recipe, a wrecked model, and two steps.

`LOCALDPO_ATHENE_RUN` names a finished run of the Athene recipe to judge in place of training one.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from localdpo.evaluate.evaluation import EvalOptions, evaluate
from localdpo.evaluate.evidence import read_evaluation, verdict_of_run
from localdpo.evaluate.probes import closing
from localdpo.paths import recipes_dir
from localdpo.recipe import load_recipe
from localdpo.train.loop import train
from localdpo.train.run import RunFolder

pytestmark = pytest.mark.slow


def trained(folder: Path, *overrides: str) -> RunFolder:
    recipe = load_recipe(recipes_dir() / "athene.yaml", [f"output_dir={folder}", *overrides])
    for _ in train(recipe, closing=closing):
        pass
    return RunFolder(folder)


def evaluated(run: RunFolder) -> dict[str, Any]:
    for _ in evaluate(run, EvalOptions(limit=24)):
        pass
    data = read_evaluation(run)
    assert data is not None
    return data


def test_the_athene_recipe_is_good(starter: Path, tmp_path: Path):
    ready = os.environ.get("LOCALDPO_ATHENE_RUN")
    if ready:
        shutil.copytree(ready, tmp_path / "athene")
        run = RunFolder(tmp_path / "athene")
    else:
        run = trained(tmp_path / "athene")
    first = verdict_of_run(run)
    assert first is not None
    assert (first.learned, first.kept) == ("learned", "kept"), first.words
    data = evaluated(run)
    assert (data["verdict"]["learned"], data["verdict"]["kept"]) == ("learned", "kept"), data["verdict"]["words"]
    assert data["drift"]["probes"]["kl_per_token"]["value"] < 1.0


def test_plain_dpo_at_a_high_learning_rate_is_broken(starter: Path, tmp_path: Path):
    run = trained(tmp_path / "plain", "data.retain=null", "dpo.rpo_alpha=0", "train.learning_rate=1e-3")
    verdict = verdict_of_run(run)
    assert verdict is not None
    assert verdict.kept == "broken", verdict.words
    data = evaluated(run)
    assert data["verdict"]["kept"] == "broken", data["verdict"]["words"]
    broken = {reason["figure"] for reason in data["verdict"]["reasons"] if reason["word"] == "broken"}
    assert {"facts kept", "leakage", "KL a token"} <= broken


def test_two_steps_have_not_learned(starter: Path, tmp_path: Path):
    run = trained(tmp_path / "two", "train.max_steps=2")
    verdict = verdict_of_run(run)
    assert verdict is not None
    assert verdict.learned == "not", verdict.words
    assert evaluated(run)["verdict"]["learned"] == "not"
