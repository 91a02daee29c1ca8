"""exp, sigmoid and SwiGLU against float64 over their whole range."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from localdpo.dpo import fastmath

WIDE = np.concatenate(
    [np.linspace(-87, 88, 200_001), np.linspace(-1, 1, 20_001), np.array([0.0, -0.0, 1e-30, -1e-30, 88.0, -87.0])]
).astype(np.float32)


def relative_error(ours: mx.array, exact: np.ndarray) -> float:
    return float(np.max(np.abs(np.array(ours, np.float64) - exact) / np.abs(exact)))


def test_exp_over_its_range() -> None:
    assert relative_error(fastmath.exp(mx.array(WIDE)), np.exp(WIDE.astype(np.float64))) < 4e-6


def test_exp_is_as_good_as_float32_near_zero() -> None:
    near = np.linspace(-1, 1, 50_001).astype(np.float32)
    assert relative_error(fastmath.exp(mx.array(near)), np.exp(near.astype(np.float64))) < 3e-7
    assert fastmath.exp(mx.array([0.0])).item() == 1.0


def test_powers_of_two_below_a_whole_number() -> None:
    """What attention takes: rows of scores, and for each a whole number that none is above."""
    rng = np.random.default_rng(3)
    scores = rng.normal(0, 40, (7, 3, 501)).astype(np.float32) + rng.normal(0, 3000, (7, 3, 1)).astype(np.float32)
    top = np.ceil(scores.max(axis=-1, keepdims=True))
    exact = np.exp2(scores.astype(np.float64) - top)
    within = scores > top - 125
    ours = np.array(fastmath.exp2_below(mx.array(scores), mx.array(top)), np.float64)
    assert np.max(np.abs(ours - exact)[within] / exact[within]) < 3e-7
    assert (ours[~within] < 1e-37).all()
    masked = np.array(fastmath.exp2_below(mx.array([[-1e9, -np.inf, 5.0]]), mx.array([[5.0]])))
    assert masked[0, 2] == 1.0
    assert (masked[0, :2] < 2e-38).all()


def test_exp_below_its_range_is_small_and_never_negative() -> None:
    low = np.array(fastmath.exp(mx.array([-87.5, -100.0, -1e9, -3e38, -np.inf], mx.float32)))
    assert (low >= 0).all()
    assert (low < 2e-38).all()


def test_not_a_number_stays_one() -> None:
    """Otherwise a diverged run would look healthy."""
    for function in (fastmath.exp, fastmath.sigmoid):
        assert np.isnan(function(mx.array([np.nan, -np.nan], mx.float32))).all()
    assert np.isnan(fastmath.swiglu(mx.array([np.nan]), mx.array([1.0]))).all()


def test_sigmoid_over_its_range() -> None:
    x = WIDE[WIDE > -80]
    assert relative_error(fastmath.sigmoid(mx.array(x)), 1 / (1 + np.exp(-x.astype(np.float64)))) < 4e-6
    far = np.array(fastmath.sigmoid(mx.array([-81.0, -1e4, -np.inf, 1e4, np.inf], mx.float32)))
    np.testing.assert_allclose(far, [0, 0, 0, 1, 1], atol=1e-34)


def gates() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    gate = np.concatenate([np.linspace(-60, 60, 4001), rng.normal(0, 3, 4000)]).astype(np.float32)
    return gate, rng.normal(0, 2, gate.shape).astype(np.float32)


def test_swiglu_values() -> None:
    gate, up = gates()
    exact = gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64))) * up
    ours = np.array(fastmath.swiglu(mx.array(gate), mx.array(up)))
    np.testing.assert_allclose(ours, exact, rtol=4e-6, atol=1e-30)


def test_swiglu_gradient() -> None:
    gate, up = gates()
    into = np.random.default_rng(1).normal(0, 1, gate.shape).astype(np.float32)

    def total(gate: mx.array, up: mx.array) -> mx.array:
        return mx.sum(mx.array(into) * fastmath.swiglu(gate, up))

    into_gate, into_up = mx.grad(total, argnums=(0, 1))(mx.array(gate), mx.array(up))
    # Central differences of the float64 function, not the formula that the code uses.
    wide, step = gate.astype(np.float64), 1e-4

    def silu(x: np.ndarray) -> np.ndarray:
        return x / (1 + np.exp(-x))

    slope = (silu(wide + step) - silu(wide - step)) / (2 * step)
    np.testing.assert_allclose(np.array(into_gate), into * up * slope, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(np.array(into_up), into * silu(wide), rtol=1e-5, atol=1e-6)


def test_swiglu_gradient_is_finite_at_the_extremes() -> None:
    gate = mx.array([-1e30, -1e4, -90.0, 90.0, 1e4, 1e30], mx.float32)
    up = mx.full(gate.shape, 3.0)
    grads = mx.grad(lambda g, u: mx.sum(fastmath.swiglu(g, u)), argnums=(0, 1))(gate, up)
    assert all(np.isfinite(np.array(grad)).all() for grad in grads)
    np.testing.assert_allclose(np.array(grads[0]), [0, 0, 0, 3, 3, 3], atol=1e-4)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 4)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    x = mx.zeros(shape)
    assert fastmath.exp(x).shape == shape
    assert fastmath.sigmoid(x).shape == shape
    assert fastmath.swiglu(x, x).shape == shape
