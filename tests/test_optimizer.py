"""AdamW against worked numbers, schedules against transformers' formulas, clipping, and the NaN guard."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from localdpo.errors import DivergedError
from localdpo.recipe import TrainRecipe
from localdpo.sequences import EncodedRow
from localdpo.train.optimizer import (
    AdapterOptimizer,
    global_norm,
    learning_rate_at,
    require_finite,
    warmup_steps,
)


def _model(values=((0.5, -1.0), (2.0, 0.25))):
    model = nn.Linear(2, 2, bias=False)
    model.weight = mx.array(values)
    return model


def _adamw(weight, gradients, rate, *, decay=0.0, betas=(0.9, 0.999), eps=1e-8):
    """Algorithm 2 of Loshchilov & Hutter in float64, as torch.optim.AdamW has it."""
    weight = np.array(weight, dtype=np.float64)
    m, v = np.zeros_like(weight), np.zeros_like(weight)
    for t, g in enumerate(gradients, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        weight = weight * (1 - rate * decay)
        weight -= rate * (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
    return weight


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_ten_steps_agree_with_float64(decay):
    rng = np.random.default_rng(0)
    gradients = [rng.normal(size=(2, 2)) for _ in range(10)]
    model = _model()
    optimizer = AdapterOptimizer(model, TrainRecipe(weight_decay=decay, max_grad_norm=None))
    start = np.array(model.weight)
    for gradient in gradients:
        optimizer.update({"weight": mx.array(gradient.astype(np.float32))}, norm=1.0, learning_rate=0.01)
    expected = _adamw(start, gradients, 0.01, decay=decay)
    np.testing.assert_allclose(np.array(model.weight), expected, atol=2e-6)


def test_many_arrays_are_each_updated_as_if_alone():
    rng = np.random.default_rng(1)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2, bias=False), nn.Linear(2, 1))
    model.layers[1].freeze()
    model.layers[1].unfreeze(keys=["weight"])
    model.layers[2].freeze()
    named = dict(tree_flatten(model.trainable_parameters()))
    start = {name: np.array(value) for name, value in named.items()}
    gradients = [{name: rng.normal(size=value.shape) for name, value in start.items()} for _ in range(5)]
    optimizer = AdapterOptimizer(model, TrainRecipe(weight_decay=0.1, max_grad_norm=None))
    for step in gradients:
        given = {name: mx.array(value.astype(np.float32)) for name, value in reversed(step.items())}  # by name
        optimizer.update(given, norm=1.0, learning_rate=0.01)
    after, state = dict(tree_flatten(model.trainable_parameters())), optimizer.state()
    assert set(state) == {"step", "learning_rate", *(f"{name}.{moment}" for name in start for moment in "mv")}
    for name, weight in start.items():
        exact = _adamw(weight, [step[name] for step in gradients], 0.01, decay=0.1)
        np.testing.assert_allclose(np.array(after[name]), exact, atol=2e-6)
        assert state[f"{name}.m"].shape == weight.shape


def test_the_norm_of_many_small_numbers_is_exact_to_float32():
    values = np.random.default_rng(2).normal(0, 1e-3, 3_001_000).astype(np.float32)
    norm = global_norm({"a": mx.array(values[:1000]), "b": mx.array(values[1000:].reshape(-1, 8))})
    assert norm == pytest.approx(np.linalg.norm(values.astype(np.float64)), rel=1e-6)


def test_first_update_is_the_learning_rate():
    model = _model()
    before = np.array(model.weight)
    AdapterOptimizer(model, TrainRecipe()).update(
        {"weight": mx.array([[3.0, -0.2], [1e-3, 5.0]])}, norm=1.0, learning_rate=0.01
    )
    np.testing.assert_allclose(np.abs(np.array(model.weight) - before), 0.01, rtol=1e-4)


def test_clipping_scales_to_the_norm_and_leaves_small_gradients():
    gradients = {"weight": mx.array([[3.0, 0.0], [0.0, 4.0]])}
    assert global_norm(gradients) == pytest.approx(5.0)
    free = TrainRecipe(max_grad_norm=None)
    clipped, scaled = _model(), _model()
    # Betas of 0 make AdamW's step g / (|g| + eps): a large eps makes it proportional to g.
    plain = {"adam_beta1": 0.0, "adam_beta2": 0.0, "adam_epsilon": 1e3}
    AdapterOptimizer(clipped, TrainRecipe(max_grad_norm=1.0, **plain)).update(gradients, norm=5.0, learning_rate=1.0)
    AdapterOptimizer(scaled, free.model_copy(update=plain)).update(
        {"weight": gradients["weight"] / 5}, norm=1.0, learning_rate=1.0
    )
    np.testing.assert_allclose(np.array(clipped.weight), np.array(scaled.weight), rtol=1e-6)
    small = _model()
    AdapterOptimizer(small, TrainRecipe(max_grad_norm=10.0, **plain)).update(gradients, norm=5.0, learning_rate=1.0)
    assert np.array(small.weight)[0, 0] == pytest.approx(0.5 - 3.0 / 1003.0, abs=1e-6)


def test_norm_is_over_all_gradients_together():
    assert global_norm({"a": mx.array([3.0]), "b": mx.array([[4.0]])}) == pytest.approx(5.0)


def test_state_restores_to_the_same_bits():
    gradients = [mx.random.normal((2, 2), key=mx.random.key(n)) for n in range(4)]
    whole, half = _model(), _model()
    one, two = AdapterOptimizer(whole, TrainRecipe()), AdapterOptimizer(half, TrainRecipe())
    for gradient in gradients:
        one.update({"weight": gradient}, norm=1.0, learning_rate=0.01)
    for gradient in gradients[:2]:
        two.update({"weight": gradient}, norm=1.0, learning_rate=0.01)
    resumed = _model(np.array(half.weight).tolist())
    three = AdapterOptimizer(resumed, TrainRecipe())
    three.restore(two.state())
    for gradient in gradients[2:]:
        three.update({"weight": gradient}, norm=1.0, learning_rate=0.01)
    assert np.array_equal(np.array(whole.weight), np.array(resumed.weight))


def test_state_of_other_parameters_is_refused():
    optimizer = AdapterOptimizer(_model(), TrainRecipe())
    with pytest.raises(ValueError, match="other parameters"):
        optimizer.restore({**optimizer.state(), "weight.m": mx.zeros((3, 3))})


def _rates(total, **settings):
    recipe = TrainRecipe(learning_rate=1.0, **settings)
    return [learning_rate_at(recipe, step, total) for step in range(1, total + 1)]


def test_warm_up_wastes_no_step_and_reaches_the_full_rate():
    assert _rates(6, lr_scheduler_type="constant", warmup_steps=3) == [0.25, 0.5, 0.75, 1, 1, 1]


def test_after_the_warm_up_schedules_are_those_of_transformers():
    # get_linear_schedule_with_warmup and get_cosine_schedule_with_warmup at current_step = step - 1
    assert _rates(10, lr_scheduler_type="linear", warmup_steps=2)[2:] == pytest.approx(
        [(10 - s) / (10 - 2) for s in range(2, 10)]
    )
    assert _rates(10, lr_scheduler_type="cosine", warmup_steps=2)[2:] == pytest.approx(
        [0.5 * (1 + math.cos(math.pi * (s - 2) / (10 - 2))) for s in range(2, 10)]
    )


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("total", [1, 2, 3, 50])
def test_no_step_has_rate_zero_or_more_than_full(kind, total):
    rates = _rates(total, lr_scheduler_type=kind, warmup_ratio=0.1)
    assert all(0 < rate <= 1 for rate in rates)
    assert max(rates) == 1


def test_warm_up_by_ratio_is_rounded_up_and_leaves_a_step():
    assert warmup_steps(TrainRecipe(warmup_ratio=0.1), 18) == 2
    assert warmup_steps(TrainRecipe(warmup_ratio=1.0), 5) == 4
    assert warmup_steps(TrainRecipe(warmup_ratio=0.5, warmup_steps=0), 5) == 0


def _window():
    ids = np.array([1, 2], np.int32)
    return [EncodedRow.of(ids, (ids, ids), row=n, line=n + 4, source="athene.jsonl") for n in range(3)]


def test_rows_that_are_not_finite_are_named():
    with pytest.raises(DivergedError, match=r"step 7: .*logps/chosen not finite, in row athene\.jsonl:5") as info:
        require_finite(7, _window(), {"logps/chosen": np.array([-1.0, np.nan, -2.0])}, {"grad_norm": 1.0})
    assert info.value.exit_code == 4


def test_a_bad_gradient_alone_names_the_whole_step():
    with pytest.raises(DivergedError, match=r"grad_norm not finite, in rows .*:4, .*:5, .*:6"):
        require_finite(7, _window(), {"logps/chosen": np.zeros(3)}, {"loss": 1.0, "grad_norm": math.inf})


def test_finite_steps_pass():
    require_finite(1, _window(), {"logps/chosen": np.full(3, -1e30)}, {"loss": 1e30})
