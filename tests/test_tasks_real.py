"""The shipped tasks and fairness templates on the starter model: figures that are neither 0 nor all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import randomise_adapter

from localdpo.evaluate.fairness import run_fairness
from localdpo.evaluate.tasks import run_tasks
from localdpo.model.load import load_model
from localdpo.model.lora import LoraSettings, attach_lora
from localdpo.steps import result_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def loaded(starter: Path) -> Any:
    model = load_model("smollm2-135m")
    attach_lora(model.model, LoraSettings(rank=4))
    return model


def test_the_suite_tells_a_whole_model_from_a_broken_one(loaded):
    randomise_adapter(loaded.model, scale=0.2)  # noise far larger than any training leaves
    facts, oneline, sentiment = result_of(run_tasks(loaded, ["facts", "oneline", "sentiment"]))
    assert 0.25 < facts.metrics["contains"].base.value < 0.8
    assert 0.6 < sentiment.metrics["accuracy"].base.value < 0.95
    assert 0.2 < oneline.metrics["rouge1"].base.value < 0.8
    assert facts.metrics["contains"].tuned.value < 0.1
    assert oneline.metrics["rouge1"].change.high < 0


def test_a_fresh_adapter_changes_no_gap(loaded):
    randomise_adapter(loaded.model, scale=0.0)
    (found,) = result_of(run_fairness(loaded, ["gender-en"], limit=2, max_tokens=8))
    assert found.gap_logp.base.value > 0.01
    assert found.gap_logp.tuned.value == pytest.approx(found.gap_logp.base.value, abs=1e-4)
    assert all(row["base"] == row["tuned"] for row in found.examples)
