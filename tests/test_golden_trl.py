"""Ours against TRL's own numbers; ``golden/make_trl.py`` made them and says how."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model
from pair_scorer import PairScorer

from localdpo.core.losses import LossSettings, PairLogps
from localdpo.model.lora import LoraSettings, attach_lora
from localdpo.recipe import TrainRecipe
from localdpo.sequences import EncodedRow
from localdpo.train.optimizer import AdapterOptimizer, global_norm, learning_rate_at

GOLDEN = Path(__file__).parent / "golden"
TRL: dict[str, Any] = json.loads((GOLDEN / "trl.json").read_text())
ARRAYS = dict(np.load(GOLDEN / "trl_arrays.npz"))
SCORED = [("untied", "mixed"), ("untied", "long"), ("untied", "short"), ("tied", "mixed")]
SIDES = ("chosen", "rejected")

COMPLETION_NLL = {"short"}  # where TRL's ORPO, whose NLL is the whole text's, is ours: nothing predicts a prompt token
QUESTIONS = [
    (variant, batch, case)
    for variant, batch in SCORED
    for case in TRL["cases"][variant]
    if batch in TRL["cases"][variant][case] and (case != "orpo" or batch in COMPLETION_NLL)
]
WITH_GRADIENT = [(*name.split("/")[:3],) for name in ARRAYS if name.endswith("/grad")]

scored = pytest.mark.parametrize(("variant", "batch"), SCORED)
paths = pytest.mark.parametrize("path", ["shared", "plain"])


def golden_model(variant: str, adapter: bool = True) -> nn.Module:
    model, _ = load_model(GOLDEN / "model", model_config={"tie_word_embeddings": variant == "tied"})
    model.freeze()
    return load_adapters(model, str(GOLDEN / "adapter")) if adapter else model


@cache
def token_logps(variant: str, batch: str, owner: str, side: str) -> list[np.ndarray]:
    """TRL's log-probs per completion token, one array a pair."""
    return [row[~np.isnan(row)] for row in ARRAYS[f"{variant}/{batch}/{owner}/{side}"]]


def plain_token_logps(model: nn.Module, prompt: list[int], completion: list[int]) -> np.ndarray:
    """One sequence at a time through the model's own logits: no packing, no padding, no shared prompt."""
    logits = model(mx.array([[*prompt, *completion[:-1]]]))[0, len(prompt) - 1 :]
    logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return np.array(mx.take_along_axis(logps, mx.array(completion)[:, None], axis=-1)[:, 0])


@scored
@pytest.mark.parametrize("owner", ["policy", "reference"])
def test_every_token_of_the_plain_model_agrees(variant: str, batch: str, owner: str) -> None:
    model = golden_model(variant, adapter=owner == "policy")
    for side in SIDES:
        for pair, expected in zip(TRL["batches"][batch], token_logps(variant, batch, owner, side), strict=True):
            ours = plain_token_logps(model, pair["prompt_ids"], pair[f"{side}_ids"])
            np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_the_goldens_are_not_blind() -> None:
    """At B = 0, or with equal lengths, sign, mask and mean-for-sum errors would all pass."""
    adapter = mx.load(str(GOLDEN / "adapter" / "adapters.safetensors"))
    assert len(adapter) == 2 * 7 * 2
    assert all(np.abs(np.array(tensor)).min() > 0 for tensor in adapter.values())
    for batch in ("mixed", "long", "short"):
        lengths = [(len(pair["chosen_ids"]), len(pair["rejected_ids"])) for pair in TRL["batches"][batch]]
        assert len({chosen for chosen, _ in lengths}) > 1
        assert any(chosen > rejected for chosen, rejected in lengths)
        assert any(chosen < rejected for chosen, rejected in lengths)
        assert 0 < TRL["cases"]["untied"]["sigmoid"][batch]["rewards/accuracies"] < 1


def test_the_peft_adapter_is_the_transpose_of_ours() -> None:
    ours = mx.load(str(GOLDEN / "adapter" / "adapters.safetensors"))
    peft = mx.load(str(GOLDEN / "peft" / "adapter_model.safetensors"))
    assert len(peft) == len(ours)
    for name, tensor in ours.items():
        path, _, matrix = name.rpartition(".")
        theirs = peft[f"base_model.model.{path}.lora_{matrix[-1].upper()}.weight"]
        np.testing.assert_array_equal(np.array(theirs).T, np.array(tensor))


@cache
def scorer(variant: str, path: Any) -> PairScorer:
    """Ours, with the golden adapter on our own LoRA modules. No test that shares it changes the model."""
    model = golden_model(variant, adapter=False)
    attach_lora(model, LoraSettings(TRL["lora"]["rank"], TRL["lora"]["scale"]))
    model.load_weights(str(GOLDEN / "adapter" / "adapters.safetensors"), strict=False)
    return PairScorer(model, path=path)


def encoded(batch: str) -> list[EncodedRow]:
    return [
        EncodedRow.of(np.array(row["prompt_ids"], np.int32), [np.array(row[f"{side}_ids"], np.int32) for side in SIDES])
        for row in TRL["batches"][batch]
    ]


def settings_of(case: str) -> LossSettings:
    """TRL's sft is the NLL beside any loss; its ORPO always holds it."""
    given = dict(TRL["settings"][case])
    if case == "sft":
        given = {"loss_type": "sigmoid", "rpo_alpha": 1.0}
    return LossSettings(**given, **({"rpo_alpha": 1.0} if case == "orpo" else {}))


def flat(gradients: dict[str, mx.array]) -> np.ndarray:
    return np.concatenate([np.array(gradients[name]).ravel() for name in sorted(gradients)])


def golden_sums(variant: str, batch: str, owner: str) -> PairLogps:
    rows = [token_logps(variant, batch, owner, side) for side in SIDES]
    sums = [np.array([row.astype(np.float64).sum() for row in side], np.float32) for side in rows]
    return PairLogps(*sums, *(np.array([len(row) for row in side]) for side in rows))


@scored
@paths
def test_summed_log_probs_agree(variant: str, batch: str, path: Any) -> None:
    ours, pairs = scorer(variant, path), encoded(batch)
    for owner, logps in (("policy", ours.logps(pairs)), ("reference", ours.reference_logps(pairs))):
        for mine, theirs in zip(logps, golden_sums(variant, batch, owner), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("variant", "batch", "case"), QUESTIONS)
def test_losses_and_rewards_agree(variant: str, batch: str, case: str) -> None:
    ours, pairs = scorer(variant, "shared"), encoded(batch)
    settings, expected = settings_of(case), TRL["cases"][variant][case][batch]
    reference = None if settings.reference_free else ours.reference_logps(pairs)
    result = ours.loss_and_grad(pairs, reference, settings)
    if case == "sft":
        assert result.nll == pytest.approx(expected["loss"], abs=1e-4)
        return
    assert result.loss == pytest.approx(expected["loss"], abs=1e-4, rel=1e-5 if case == "sppo_hard" else 0)
    if "losses" in expected:
        rtol = 1e-5 if case == "sppo_hard" else 0
        np.testing.assert_allclose(result.losses, expected["losses"], rtol=rtol, atol=1e-4)
    for name, value in result.metrics.items():
        # TRL logs the means of the reference-free losses as logps; ours are sums throughout.
        if name in expected and not (settings.reference_free and name.startswith("logps/")):
            assert value == pytest.approx(expected[name], abs=1e-4), name
    assert result.rewards_chosen.mean() == pytest.approx(expected["rewards/chosen"], abs=1e-4)
    assert result.rewards_rejected.mean() == pytest.approx(expected["rewards/rejected"], abs=1e-4)


@paths
@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointed"])
@pytest.mark.parametrize(("variant", "batch", "case"), WITH_GRADIENT)
def test_adapter_gradients_agree(variant: str, batch: str, case: str, checkpointing: bool, path: Any) -> None:
    ours, pairs, settings = scorer(variant, path), encoded(batch), settings_of(case)
    reference = None if settings.reference_free else ours.reference_logps(pairs)
    ours.gradient_checkpointing = checkpointing
    grad = flat(ours.loss_and_grad(pairs, reference, settings).grad)
    if case == "sft":  # the NLL alone: what rpo_alpha adds
        alone = LossSettings(settings.loss_type, settings.beta)
        grad = grad - flat(ours.loss_and_grad(pairs, reference, alone).grad)
    expected = ARRAYS[f"{variant}/{batch}/{case}/grad"]
    assert np.linalg.norm(grad - expected) < 1e-4 * np.linalg.norm(expected)
    np.testing.assert_allclose(grad, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("case", list(TRL["trajectories"]))
def test_ten_steps_of_training_agree(case: str) -> None:
    training, expected = TRL["training"], TRL["trajectories"][case]
    keys = ("learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm")
    recipe = TrainRecipe(lr_scheduler_type="constant", warmup_ratio=0.0, **{key: training[key] for key in keys})
    scorer.cache_clear()
    ours = scorer("untied", "shared")
    scorer.cache_clear()  # this model changes
    pairs, size = encoded(training["batch"]), training["batch_size"]
    reference = ours.reference_logps(pairs)
    optimizer = AdapterOptimizer(ours.model, recipe)
    for step, theirs in enumerate(expected):
        rows = [(step * size + i) % len(pairs) for i in range(size)]
        window = [pairs[i] for i in rows]
        result = ours.loss_and_grad(window, reference.rows(rows), settings_of(case))
        norm = global_norm(result.grad)
        assert result.loss == pytest.approx(theirs["loss"], abs=1e-4)
        assert norm == pytest.approx(theirs["grad_norm"], rel=1e-3)
        for name, value in result.metrics.items():
            if name in theirs:
                assert value == pytest.approx(theirs[name], abs=1e-3 if "logps" in name else 1e-4), (step, name)
        rate = learning_rate_at(recipe, step + 1, training["steps"])
        optimizer.update(result.grad, norm=norm, learning_rate=rate)
    final = dict(sorted(tree_flatten(ours.model.trainable_parameters())))
    np.testing.assert_allclose(flat(final), ARRAYS[f"trajectory/{case}/adapter"], rtol=0, atol=1e-4)
