"""The losses: worked numbers, float64, gradients, and margins far beyond what a healthy run has."""

from __future__ import annotations

import math
from typing import get_args

import mlx.core as mx
import numpy as np
import oracles
import pytest

from localdpo.core.losses import LOSSES, LossInputs, LossOutput, LossSettings, PairLogps, preference_loss
from localdpo.recipe import REFERENCE_FREE_LOSSES, DPORecipe, LossType

ALL = get_args(LossType)
WITH_REFERENCE = [name for name in ALL if name not in REFERENCE_FREE_LOSSES]


def settings_for(loss_type: LossType, **more: float) -> LossSettings:
    smoothing = 0.1 if loss_type == "robust" else 0.0
    return LossSettings(loss_type, **{"beta": 0.3, "label_smoothing": smoothing, **more})


def as_policy(policy: PairLogps, reference: PairLogps) -> LossInputs:
    columns = (policy.chosen, policy.rejected, reference.chosen, reference.rejected, *policy[2:])
    return LossInputs(*(mx.array(np.asarray(column, np.float32)) for column in columns))


def at_margin(margin: float, settings: LossSettings) -> float:
    """The loss of one pair whose margin beta * (a - b) is ``margin``, made of four uneven log-probs."""
    a_minus_b = margin / settings.beta
    policy = LossInputs(*(mx.array([x]) for x in (-20.0 + a_minus_b, -31.0, -22.0, -33.0, 7.0, 9.0)))
    return preference_loss(policy, settings).losses.item()


def random_logps(
    seed: int, count: int = 64, spread: float = 6.0, highest: float = -0.05
) -> tuple[PairLogps, PairLogps]:
    """Log-ratios of standard deviation ``spread`` at unequal lengths; no mean policy log-prob above ``highest``."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 60, (2, count))
    reference = -tokens * rng.uniform(0.2, 4.0, (2, count))
    policy = np.minimum(reference + spread * rng.standard_normal((2, count)), highest * tokens)
    rows = [x.astype(np.float32) for x in (*policy, *reference)]
    return PairLogps(rows[0], rows[1], *tokens), PairLogps(rows[2], rows[3], *tokens)


@pytest.mark.parametrize(
    ("loss_type", "smoothing", "margin", "expected"),
    [
        ("sigmoid", 0.0, 0.0, 0.693147),
        ("sigmoid", 0.0, 1.0, 0.313262),
        ("sigmoid", 0.0, -1.0, 1.313262),
        ("sigmoid", 0.1, 1.0, 0.413262),
        ("robust", 0.1, 1.0, 0.188262),
        ("robust", 0.1, 0.0, 0.693147),
        ("hinge", 0.0, 0.25, 0.75),
        ("hinge", 0.0, 1.5, 0.0),
        ("hinge", 0.0, -1.0, 2.0),
    ],
)
def test_worked_values(loss_type: LossType, smoothing: float, margin: float, expected: float) -> None:
    settings = LossSettings(loss_type, beta=0.1, label_smoothing=smoothing)
    assert at_margin(margin, settings) == pytest.approx(expected, abs=1e-6)


def test_worked_values_of_the_other_losses() -> None:
    """By hand, from a = 2, b = -1, n = 4 and 5, beta = 0.5, and mean log-probs of -1/2 and -2."""
    policy = LossInputs(*(mx.array([x]) for x in (-2.0, -10.0, -4.0, -9.0, 4.0, 5.0)))

    def loss(loss_type: LossType, **more: float) -> float:
        return preference_loss(policy, LossSettings(loss_type, **{"beta": 0.5, **more})).losses.item()

    assert loss("ipo") == pytest.approx((2 / 4 + 1 / 5 - 1) ** 2, abs=1e-6)
    assert loss("sppo_hard") == pytest.approx((2 - 1) ** 2 + (-1 + 1) ** 2, abs=1e-6)
    sigma_1, sigma_half, sigma_1_5 = (1 / (1 + math.exp(-x)) for x in (1.0, 0.5, 1.5))
    assert loss("apo_zero") == pytest.approx((1 - sigma_1) + (1 - sigma_half), abs=1e-6)
    assert loss("apo_down") == pytest.approx(sigma_1 + 1 - sigma_1_5, abs=1e-6)
    assert loss("simpo", simpo_gamma=0.5) == pytest.approx(math.log1p(math.exp(-(0.75 - 0.5))), abs=1e-6)
    odds = [math.exp(-0.5) / (1 - math.exp(-0.5)), math.exp(-2) / (1 - math.exp(-2))]
    assert loss("orpo") == pytest.approx(0.5 * math.log1p(odds[1] / odds[0]), abs=1e-6)


def test_slope_at_zero_margin_is_half_of_beta() -> None:
    settings = LossSettings(beta=0.1)

    def loss(ratio_difference: mx.array) -> mx.array:
        zero = mx.zeros(1)
        policy = LossInputs(ratio_difference, zero, zero, zero, zero + 1, zero + 1)
        return mx.sum(preference_loss(policy, settings).losses)

    assert mx.grad(loss)(mx.zeros(1)).item() == pytest.approx(-0.05, abs=1e-7)


@pytest.mark.parametrize("loss_type", ALL)
@pytest.mark.parametrize("beta", [0.05, 0.3, 2.0])
def test_values_and_gradients_equal_float64(loss_type: LossType, beta: float) -> None:
    settings = settings_for(loss_type, beta=beta)
    policy, reference = random_logps(seed=3)
    want = oracles.losses(settings, policy, reference)
    slopes = oracles.loss_slopes(settings, policy, reference)
    inputs = as_policy(policy, reference)

    def total(chosen: mx.array, rejected: mx.array) -> tuple[mx.array, LossOutput]:
        out = preference_loss(inputs._replace(chosen=chosen, rejected=rejected), settings)
        return mx.sum(out.losses), out

    (_, out), grads = mx.value_and_grad(total, argnums=(0, 1))(inputs.chosen, inputs.rejected)
    np.testing.assert_allclose(np.array(out.losses), want, rtol=1e-5, atol=2e-6)
    corner = np.abs(want) < 1e-3 if loss_type == "hinge" else np.zeros_like(want, bool)
    for grad, slope in zip(grads, slopes, strict=True):
        np.testing.assert_allclose(np.array(grad)[~corner], slope[~corner], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("loss_type", ["sigmoid", "robust"])
def test_label_smoothing_equals_float64(loss_type: LossType) -> None:
    settings = LossSettings(loss_type, beta=0.3, label_smoothing=0.2)
    policy, reference = random_logps(seed=4)
    out = preference_loss(as_policy(policy, reference), settings)
    np.testing.assert_allclose(np.array(out.losses), oracles.losses(settings, policy, reference), rtol=1e-5)


@pytest.mark.parametrize("loss_type", ALL)
def test_extreme_margins_stay_finite_and_right(loss_type: LossType) -> None:
    """Log-ratios of thousands of nats, and mean log-probs from nearly 0 to -500."""
    policy, reference = random_logps(seed=5, spread=4000.0, highest=-1e-3)
    settings = settings_for(loss_type)
    inputs = as_policy(policy, reference)

    def total(chosen: mx.array, rejected: mx.array) -> mx.array:
        return mx.sum(preference_loss(inputs._replace(chosen=chosen, rejected=rejected), settings).losses)

    losses = np.array(preference_loss(inputs, settings).losses)
    want = oracles.losses(settings, policy, reference)
    np.testing.assert_allclose(losses, want, rtol=1e-5, atol=1e-6)
    slopes = oracles.loss_slopes(settings, policy, reference)
    for grad, slope in zip(mx.grad(total, argnums=(0, 1))(inputs.chosen, inputs.rejected), slopes, strict=True):
        np.testing.assert_allclose(np.array(grad), slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss_type", ALL)
def test_certain_answers_stay_finite(loss_type: LossType) -> None:
    """A log-prob of exactly 0 is what a memorised answer rounds to; 1 - p is then 0, which ORPO divides by."""
    zero, low = mx.zeros(2), mx.array([0.0, -3e4])
    policy = LossInputs(zero, low, low, zero, zero + 3, zero + 4)

    def total(chosen: mx.array, rejected: mx.array) -> mx.array:
        return mx.sum(
            preference_loss(policy._replace(chosen=chosen, rejected=rejected), settings_for(loss_type)).losses
        )

    assert np.isfinite(total(policy.chosen, policy.rejected).item())
    grads = mx.grad(total, argnums=(0, 1))(policy.chosen, policy.rejected)
    assert all(np.isfinite(np.array(grad)).all() for grad in grads)


@pytest.mark.parametrize("loss_type", WITH_REFERENCE)
def test_rewards_are_beta_times_the_log_ratios(loss_type: LossType) -> None:
    """Summed, whatever the loss: IPO's loss is about means, its rewards are not."""
    policy, reference = random_logps(seed=6)
    out = preference_loss(as_policy(policy, reference), settings_for(loss_type))
    np.testing.assert_allclose(
        np.array(out.rewards_chosen), 0.3 * (policy.chosen - reference.chosen), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        np.array(out.rewards_rejected), 0.3 * (policy.rejected - reference.rejected), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("loss_type", sorted(REFERENCE_FREE_LOSSES))
def test_reference_free_losses_never_read_the_reference(loss_type: LossType) -> None:
    policy, reference = random_logps(seed=7)
    settings = settings_for(loss_type)
    assert settings.reference_free
    nowhere = PairLogps(*(np.full(64, np.nan, np.float32) for _ in range(2)), *reference[2:])
    ours = preference_loss(as_policy(policy, reference), settings)
    blind = preference_loss(as_policy(policy, nowhere), settings)
    for with_it, without in zip(ours, blind, strict=True):
        np.testing.assert_array_equal(np.array(with_it), np.array(without))
    np.testing.assert_allclose(np.array(ours.rewards_chosen), 0.3 * policy.chosen / policy.chosen_tokens, rtol=1e-5)


@pytest.mark.parametrize("loss_type", ["ipo", "simpo", "orpo"])
def test_these_losses_take_means(loss_type: LossType) -> None:
    """Twice the tokens at the same log-prob a token is the same loss."""
    settings = settings_for(loss_type)
    policy, reference = random_logps(seed=8)
    longer = [PairLogps(*(2 * np.asarray(column) for column in x)) for x in (policy, reference)]
    np.testing.assert_allclose(
        np.array(preference_loss(as_policy(*longer), settings).losses),
        np.array(preference_loss(as_policy(policy, reference), settings).losses),
        rtol=1e-6,
    )


def test_no_gradient_flows_through_rewards() -> None:
    policy, reference = random_logps(seed=9)
    inputs = as_policy(policy, reference)

    def rewards(chosen: mx.array) -> mx.array:
        out = preference_loss(inputs._replace(chosen=chosen), LossSettings())
        return mx.sum(out.rewards_chosen + out.rewards_rejected)

    assert not np.array(mx.grad(rewards)(inputs.chosen)).any()


def test_every_loss_type_has_its_function() -> None:
    assert set(LOSSES) == set(ALL)


def test_settings_come_from_the_recipe() -> None:
    recipe = DPORecipe(loss_type="simpo", beta=2.0, simpo_gamma=0.7, rpo_alpha=0.25)
    assert LossSettings.from_recipe(recipe) == LossSettings("simpo", 2.0, 0.0, 0.25, 0.7)
    robust = DPORecipe(loss_type="robust", label_smoothing=0.2, rpo_alpha=0.0)
    assert LossSettings.from_recipe(robust) == LossSettings("robust", 0.1, 0.2, 0.0, 0.5)
    assert not LossSettings.from_recipe(robust).reference_free


def test_rows_of_logps() -> None:
    logps = PairLogps(np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0]), np.array([1, 2, 3]), np.array([4, 5, 6]))
    picked = logps.rows([2, 0])
    assert [column.tolist() for column in picked] == [[3, 1], [6, 4], [3, 1], [6, 4]]
