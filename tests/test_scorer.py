"""A window of pairs scored: equal to the plainest way for any lengths, batches, splits, weights and losses."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, get_args
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten
from oracles import adapted_model, pair, random_model, random_pairs
from pair_scorer import PairScorer, PairStep
from tiny import randomise_adapter

from localdpo.core.losses import LossSettings, PairLogps
from localdpo.dpo import scorer as scorer_module
from localdpo.dpo.budget import CALL_COST
from localdpo.dpo.scorer import split_by_tokens
from localdpo.dpo.standin import Trainable
from localdpo.model import blas
from localdpo.model.device import lane_streams
from localdpo.model.lora import LoraSettings, adapters_off, attach_lora
from localdpo.recipe import LossType, TrainRecipe
from localdpo.sequences import EncodedRow
from localdpo.train.optimizer import AdapterOptimizer, global_norm

LOSSES = get_args(LossType)
WEIGHTS = [1.0, 0.5, 2.0, 1.0, 3.0, 0.25, 1.0, 1.5]


@cache
def shared_model() -> nn.Module:
    """One model for the tests that leave it as it was."""
    return adapted_model("qwen3")


@cache
def scorer_on(path: Any, lanes: int = 2) -> PairScorer:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(scorer_module, "core_streams", lambda most: lane_streams(lanes))
        return PairScorer(shared_model(), path=path)


def window(count: int = 8, seed: int = 0) -> list[EncodedRow]:
    """Unequal lengths and weights, an equal prompt, a one-token answer."""
    lengths = [(9, 6, 4), (14, 1, 9), (2, 3, 7), (10, 7, 7), (12, 5, 2), (3, 8, 8), (11, 2, 2), (6, 4, 10)]
    rows = random_pairs(seed, lengths[:count], WEIGHTS)
    if count > 3:
        rows[3] = pair(rows[0].prompt_ids, rows[3].chosen_ids, rows[3].rejected_ids, rows[3].weight)
    return rows


def settings_for(loss_type: LossType, **more: float) -> LossSettings:
    beta = {"simpo": 2.0, "hinge": 0.4, "sppo_hard": 0.5, "ipo": 0.5}.get(loss_type, 0.2)
    return LossSettings(loss_type, **{"beta": beta, "label_smoothing": 0.1 if loss_type == "robust" else 0.0, **more})


def assert_grads(ours: dict[str, Any], exact: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Within ``tolerance`` of the largest entry of all."""
    assert ours.keys() == exact.keys()
    largest = max(np.abs(np.array(value)).max() for value in exact.values())
    assert largest > 0
    for name, value in exact.items():
        np.testing.assert_allclose(
            np.array(ours[name]), np.array(value), rtol=0, atol=tolerance * largest, err_msg=name
        )


def assert_step(ours: PairStep, exact: oracles.Step) -> None:
    assert ours.loss == pytest.approx(exact.loss, rel=1e-5, abs=1e-5)
    assert ours.nll == pytest.approx(exact.nll, rel=1e-5)
    assert_grads(ours.grad, exact.grad)


@st.composite
def windows(draw: st.DrawFn) -> list[EncodedRow]:
    seed = draw(st.integers(0, 1000))
    lengths = st.tuples(st.integers(1, 20), st.integers(1, 9), st.integers(1, 9))
    rows = random_pairs(seed, draw(st.lists(lengths, min_size=1, max_size=5)))
    weights = draw(st.lists(st.sampled_from([0.1, 1.0, 2.5]), min_size=len(rows), max_size=len(rows)))
    for index, weight in enumerate(weights):
        prompt = rows[0].prompt_ids if draw(st.booleans()) else rows[index].prompt_ids
        rows[index] = pair(prompt, rows[index].chosen_ids, rows[index].rejected_ids, weight)
    return rows


@settings(max_examples=24, derandomize=True, deadline=None)
@given(
    rows=windows(),
    loss_type=st.sampled_from(LOSSES),
    rpo_alpha=st.sampled_from([0.0, 0.7]),
    max_tokens=st.sampled_from([1, 40, 1000]),
    checkpoint=st.booleans(),
    path=st.sampled_from(["shared", "plain"]),
    lanes=st.sampled_from([1, 2, 3]),
    call_cost=st.sampled_from([9, CALL_COST["cpu"]]),
)
def test_any_window_equals_the_plainest_way(
    rows: list[EncodedRow],
    loss_type: LossType,
    rpo_alpha: float,
    max_tokens: int,
    checkpoint: bool,
    path: Any,
    lanes: int,
    call_cost: int,
) -> None:
    model, scorer = shared_model(), scorer_on(path, lanes)
    scorer.gradient_checkpointing, scorer.max_tokens = checkpoint, max_tokens
    loss = settings_for(loss_type, rpo_alpha=rpo_alpha)
    with patch.dict(CALL_COST, {"cpu": call_cost}):  # attention in one block, or in many
        reference = scorer.reference_logps(rows)
        policy = scorer.logps(rows)
        step = scorer.loss_and_grad(rows, reference, loss)
    with adapters_off(model):
        exact_reference = oracles.pair_logps(model, rows)
    exact = oracles.step(model, rows, reference, loss)
    for ours, theirs in ((reference, exact_reference), (policy, exact.policy)):
        for side, tokens in ((0, 2), (1, 3)):
            assert np.max(np.abs(ours[side] - theirs[side]) / theirs[tokens]) < 1e-5
            np.testing.assert_array_equal(ours[tokens], theirs[tokens])
    assert_step(step, exact)
    np.testing.assert_allclose(step.losses, oracles.losses(loss, exact.policy, reference), rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(step.policy.chosen, policy.chosen, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(step.policy.rejected, policy.rejected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_finite_differences_of_both_matrices(loss_type: LossType) -> None:
    """The slope of the float64 loss itself, by moving A alone and B alone: no autodiff on either side of it."""
    model, rows = shared_model(), window(4)
    loss = settings_for(loss_type, rpo_alpha=0.3)
    scorer = PairScorer(model)
    reference = scorer.reference_logps(rows)
    grad = scorer.loss_and_grad(rows, reference, loss).grad
    rng = np.random.default_rng(0)
    for matrix in ("lora_a", "lora_b"):
        direction = {n: rng.standard_normal(g.shape) for n, g in grad.items() if n.endswith(matrix)}
        slope = sum(float((np.array(grad[n], np.float64) * d).sum()) for n, d in direction.items())
        # The five-point rule: a step long enough for what float32 there is in the loss, and no error of order h^2.
        h = 1e-3
        at = [exact_loss(model, rows, reference, loss, direction, k * h) for k in (-2, -1, 1, 2)]
        assert (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * h) == pytest.approx(slope, rel=1e-4, abs=1e-4)
        assert abs(slope) > 0.01


def exact_loss(
    model: nn.Module,
    rows: Sequence[EncodedRow],
    reference: PairLogps,
    loss: LossSettings,
    direction: dict[str, np.ndarray],
    step: float,
) -> float:
    """The float64 loss with the adapter moved by ``step * direction``."""
    with oracles.doubled(model), mx.stream(mx.cpu):
        stored = dict(tree_flatten(model.trainable_parameters()))
        moved = [(name, stored[name] + mx.array(step * d, mx.float64)) for name, d in direction.items()]
        model.update(tree_unflatten(moved))
        policy = oracles.pair_logps(model, rows)
    weights = np.array([row.weight for row in rows])
    nll = -float(weights @ policy.chosen) / float(weights @ policy.chosen_tokens)
    return float(weights @ oracles.losses(loss, policy, reference)) / weights.sum() + loss.rpo_alpha * nll


@pytest.mark.parametrize("count", [8, 5, 3], ids=["full window", "partial", "smaller"])
def test_a_window_is_the_weighted_mean_of_its_pairs(count: int) -> None:
    """Gradient accumulation: one window of n equals n windows of one, whatever the micro-batches."""
    model, rows = shared_model(), window(count)
    loss = settings_for("sigmoid", rpo_alpha=0.7)
    scorer = PairScorer(model, max_tokens=30)
    reference = scorer.reference_logps(rows)
    whole = scorer.loss_and_grad(rows, reference, loss)

    weights = np.array([row.weight for row in rows])
    tokens = weights * reference.chosen_tokens
    total: dict[str, np.ndarray] = {}
    mean = 0.0
    for index, row in enumerate(rows):
        alone = [
            scorer.loss_and_grad([row], reference.rows([index]), replace(loss, rpo_alpha=alpha)) for alpha in (0, 1)
        ]
        share, nll_share = weights[index] / weights.sum(), 0.7 * tokens[index] / tokens.sum()
        mean += share * alone[0].loss + nll_share * alone[0].nll
        for name, value in alone[0].grad.items():
            preference = np.array(value, np.float64)
            nll = np.array(alone[1].grad[name], np.float64) - preference
            total[name] = total.get(name, 0.0) + share * preference + nll_share * nll
    assert whole.loss == pytest.approx(mean, abs=1e-6)
    assert_grads(whole.grad, total)


def test_the_split_never_shows() -> None:
    model, rows = shared_model(), window()
    loss = settings_for("ipo", rpo_alpha=0.5)
    results = []
    for max_tokens in (1, 37, 10_000):
        scorer = PairScorer(model, max_tokens=max_tokens)
        results.append(scorer.loss_and_grad(rows, scorer.reference_logps(rows), loss))
    for result in results[:-1]:
        assert result.loss == pytest.approx(results[-1].loss, rel=2e-6)
        np.testing.assert_allclose(result.rewards_chosen, results[-1].rewards_chosen, atol=1e-5)
        assert_grads(result.grad, results[-1].grad)
    assert results[0].tokens > results[-1].tokens  # an equal prompt is shared only within a micro-batch


def test_columns_are_in_the_order_of_the_window() -> None:
    model, rows = shared_model(), window()
    scorer = PairScorer(model, max_tokens=30)
    reference, loss = scorer.reference_logps(rows), settings_for("sigmoid")
    first = scorer.loss_and_grad(rows, reference, loss)
    order = [5, 2, 7, 0, 1, 6, 3, 4]
    second = scorer.loss_and_grad([rows[i] for i in order], reference.rows(order), loss)
    assert second.loss == pytest.approx(first.loss, abs=1e-6)
    for name in ("losses", "rewards_chosen", "rewards_rejected"):
        np.testing.assert_allclose(getattr(second, name), getattr(first, name)[order], atol=1e-5)
    np.testing.assert_array_equal(second.policy.chosen_tokens, first.policy.chosen_tokens[order])


def test_ipo_by_hand() -> None:
    """Means, not sums: each log-ratio is divided by its own answer's tokens."""
    model, rows = shared_model(), [pair([5, 6, 7], [1, 2, 3, 4, 8, 9], [10, 11])]
    scorer = PairScorer(model)
    policy, reference = scorer.logps(rows), scorer.reference_logps(rows)
    a, b = policy.chosen[0] - reference.chosen[0], policy.rejected[0] - reference.rejected[0]
    result = scorer.loss_and_grad(rows, reference, LossSettings("ipo", beta=0.2))
    assert result.loss == pytest.approx((a / 6 - b / 2 - 1 / 0.4) ** 2, rel=1e-5)
    assert result.rewards_chosen[0] == pytest.approx(0.2 * a, abs=1e-6)


def test_accuracy_is_counted_over_rows() -> None:
    """One pair right by a little and one wrong by much is half right; the means of the rewards say all wrong."""
    model, rows = shared_model(), window(2)
    scorer = PairScorer(model)
    policy = scorer.logps(rows)
    shift = np.array([0.5, -30.0], np.float32)
    reference = policy._replace(chosen=policy.chosen - shift, rejected=policy.rejected)
    result = scorer.loss_and_grad(rows, reference, LossSettings())
    assert result.rewards_chosen.mean() < result.rewards_rejected.mean()
    assert result.metrics["rewards/accuracies"] == 0.5


def digest(model: nn.Module, trainable: bool) -> str:
    sha = hashlib.sha256()
    for name, value in sorted(tree_flatten(model.parameters())):
        if name.endswith(("lora_a", "lora_b")) == trainable:
            sha.update(name.encode() + np.array(value).tobytes())
    return sha.hexdigest()


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_step_moves_the_adapter_and_nothing_else(checkpoint: bool) -> None:
    model, rows = adapted_model("llama"), window(4)
    scorer = PairScorer(model, gradient_checkpointing=checkpoint)
    reference = scorer.reference_logps(rows)
    base, adapter = digest(model, trainable=False), digest(model, trainable=True)
    result = scorer.loss_and_grad(rows, reference, settings_for("sigmoid", rpo_alpha=1.0))
    assert digest(model, trainable=True) == adapter  # the trace leaves the parameters as they were
    assert all(name.endswith(("lora_a", "lora_b")) for name in result.grad)
    assert all(np.array(value).any() for value in result.grad.values())
    optimizer = AdapterOptimizer(model, TrainRecipe(learning_rate=1e-3))
    optimizer.update(result.grad, norm=global_norm(result.grad), learning_rate=1e-3)
    assert digest(model, trainable=False) == base
    assert digest(model, trainable=True) != adapter
    after = scorer.loss_and_grad(rows, reference, settings_for("sigmoid", rpo_alpha=1.0))
    assert after.loss < result.loss
    for ours, again in zip(reference, scorer.reference_logps(rows), strict=True):
        np.testing.assert_array_equal(ours, again)


def test_the_reference_is_the_base_to_the_last_bit() -> None:
    rows = window()
    model, base = adapted_model("llama"), random_model("llama")
    scorer, base_scorer = PairScorer(model), PairScorer(base)
    for ours, theirs in zip(scorer.reference_logps(rows), base_scorer.logps(rows), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert np.abs(scorer.logps(rows).chosen - scorer.reference_logps(rows).chosen).max() > 0.1


def test_dropout_is_for_the_gradient_only() -> None:
    rows = window()
    model, still = adapted_model("llama", dropout=0.5), adapted_model("llama")
    model.train()
    scorer = PairScorer(model)
    assert scorer.path == "shared"  # the probe is not misled by dropout either
    for ours, theirs in (
        (scorer.logps(rows), PairScorer(still).logps(rows)),
        (scorer.logps(rows), scorer.logps(rows)),
        (scorer.reference_logps(rows), PairScorer(still).reference_logps(rows)),
    ):
        np.testing.assert_allclose(ours.chosen, theirs.chosen, rtol=0, atol=2e-5)
        np.testing.assert_allclose(ours.rejected, theirs.rejected, rtol=0, atol=2e-5)
    assert all(module.training for module in model.modules())
    reference, loss = scorer.reference_logps(rows), settings_for("sigmoid")
    results = []
    for seed in (1, 1, 2):
        mx.random.seed(seed)
        results.append(scorer.loss_and_grad(rows, reference, loss).loss)
    assert results[0] == results[1]
    assert abs(results[0] - results[2]) > 1e-4


def test_trainable_arrays_by_place_are_those_by_name() -> None:
    model = adapted_model("qwen3")
    places, by_name = Trainable(model), dict(tree_flatten(model.trainable_parameters()))
    assert set(places.names) == set(by_name)
    assert len(places) == len(by_name)
    assert all(array is by_name[name] for name, array in zip(places.names, places.get(), strict=True))
    layers = [int(name.split(".")[2]) for name in places.names]
    assert layers == sorted(layers)  # the backward pass is chained from the top
    assert max(layers) > 0
    places.put([array + 1 for array in places.get()])
    moved = dict(tree_flatten(model.trainable_parameters()))
    assert all(mx.array_equal(moved[name], value + 1) for name, value in by_name.items())


def test_modes_are_put_back_one_by_one() -> None:
    model = adapted_model("llama")
    model.train()
    model.layers[0].eval()
    PairScorer(model).logps(window(2))
    assert not model.layers[0].self_attn.training
    assert model.layers[1].self_attn.training


def test_half_precision_sums_are_exact() -> None:
    """400 tokens from the same bf16 hidden states: ours are within float32 of float64, sums in bf16 are nats off."""
    model = random_model("llama", tied=False)
    model.set_dtype(mx.bfloat16)
    rows = random_pairs(1, [(5, 400, 300)])
    ours = PairScorer(model, path="plain").logps(rows)
    naive = []
    for sums, ids in zip(ours[:2], (rows[0].chosen_ids, rows[0].rejected_ids), strict=True):
        sequence = np.concatenate([rows[0].prompt_ids, ids])
        hidden = model.model(mx.array(sequence[None, :-1]))[0, 4:]
        weight = np.array(model.lm_head.weight.astype(mx.float32)).astype(np.float64)
        logits = np.array(hidden.astype(mx.float32)).astype(np.float64) @ weight.T
        logps = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        exact = logps[range(len(ids)), ids].sum()
        assert sums[0] == pytest.approx(exact, rel=1e-6)
        half = mx.array(logps[range(len(ids)), ids].astype(np.float32)).astype(mx.bfloat16)
        naive.append(abs(float(mx.sum(half).item()) - exact))
    assert max(naive) > 0.5


def test_half_precision_trains_on_both_paths() -> None:
    model = random_model("llama")
    model.set_dtype(mx.bfloat16)
    attach_lora(model, LoraSettings(rank=3, scale=1.5))
    randomise_adapter(model, 1, 0.1)
    rows, loss = window(4), settings_for("sigmoid")
    shared, plain = PairScorer(model), PairScorer(model, path="plain")
    assert (shared.path, plain.path) == ("shared", "plain")
    exact = oracles.step(model, rows, shared.reference_logps(rows), loss)[2]
    for scorer in (shared, plain):
        grad = scorer.loss_and_grad(rows, scorer.reference_logps(rows), loss).grad
        assert all(value.dtype == mx.float32 for value in grad.values())
        assert_grads(grad, exact, tolerance=0.05)


def test_tokens_and_nll_of_a_step() -> None:
    model, rows = shared_model(), window(2)
    scorer = PairScorer(model, max_tokens=10_000, path="plain")
    result = scorer.loss_and_grad(rows, scorer.reference_logps(rows), LossSettings(rpo_alpha=0.5))
    assert result.tokens == sum(2 * len(r.prompt_ids) + len(r.chosen_ids) + len(r.rejected_ids) - 2 for r in rows)
    weights = np.array([row.weight for row in rows])
    nll = -(weights * result.policy.chosen).sum() / (weights * result.policy.chosen_tokens).sum()
    assert result.nll == pytest.approx(nll, rel=1e-6)
    assert result.loss == pytest.approx((weights * result.losses).sum() / weights.sum() + 0.5 * nll, rel=1e-6)


@pytest.mark.parametrize("loss_type", ["simpo", "orpo"])
def test_reference_free_losses_need_no_reference(loss_type: LossType) -> None:
    model, rows = shared_model(), window(3)
    scorer, loss = PairScorer(model), settings_for(loss_type, rpo_alpha=0.2)
    result = scorer.loss_and_grad(rows, None, loss)
    assert_step(result, oracles.step(model, rows, None, loss))
    np.testing.assert_allclose(result.rewards_chosen, loss.beta * result.policy.chosen / result.policy.chosen_tokens)


def test_a_missing_reference_is_an_error() -> None:
    with pytest.raises(ValueError, match="reference"):
        PairScorer(shared_model()).loss_and_grad(window(1), None, LossSettings())


def test_no_pairs() -> None:
    logps = PairScorer(shared_model()).logps([])
    assert [len(column) for column in logps] == [0, 0, 0, 0]


def test_a_failure_leaves_model_and_threads_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted_model("llama")
    scorer, rows = PairScorer(model), window(2)
    reference = scorer.reference_logps(rows)
    before, threads = digest(model, trainable=True), []
    monkeypatch.setattr(blas, "blas_threads", lambda: 4)
    monkeypatch.setattr(blas, "set_blas_threads", threads.append)
    monkeypatch.setattr("localdpo.methods.dpo.preference_loss", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scorer.loss_and_grad(rows, reference, LossSettings())
    assert digest(model, trainable=True) == before
    assert threads == [1, 4]


@settings(max_examples=100, derandomize=True, deadline=None)
@given(rows=windows(), max_tokens=st.sampled_from([1, 20, 45, 200]))
def test_groups_hold_every_row_once_within_the_limit(rows: list[EncodedRow], max_tokens: int) -> None:
    groups = split_by_tokens([row.sequences for row in rows], max_tokens)
    assert sorted(index for group in groups for index in group) == list(range(len(rows)))
    for group in groups:
        prompts = {rows[i].prompt_ids.tobytes(): len(rows[i].prompt_ids) for i in group}
        answers = sum(len(rows[i].chosen_ids) + len(rows[i].rejected_ids) for i in group)
        assert len(group) == 1 or sum(prompts.values()) + answers <= max_tokens
    sizes = [sum(rows[i].num_tokens for i in group) for group in groups]
    assert sizes == sorted(sizes, reverse=True)


def test_groups_are_of_about_equal_work() -> None:
    rows = random_pairs(0, [(10, 5, 5)] * 8)
    assert [len(group) for group in split_by_tokens([row.sequences for row in rows], 10_000)] == [8]
    assert [len(group) for group in split_by_tokens([row.sequences for row in rows], 120)] == [4, 4]
    assert [len(group) for group in split_by_tokens([row.sequences for row in rows], 40)] == [2, 2, 2, 2]


def test_equal_prompts_stay_together() -> None:
    rows = random_pairs(0, [(30, 2, 2)] * 6)
    rows = [pair(rows[index % 2].prompt_ids, row.chosen_ids, row.rejected_ids) for index, row in enumerate(rows)]
    groups = split_by_tokens([row.sequences for row in rows], 50)
    assert sorted(sorted(group) for group in groups) == [[0, 2, 4], [1, 3, 5]]
