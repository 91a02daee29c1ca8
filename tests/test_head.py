"""The tiled head against float64: every storage of the weights, values and gradients, and its memory."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from localdpo.dpo import head as head_module
from localdpo.dpo.forward import exact_logps
from localdpo.dpo.head import Head
from localdpo.model.frozen import LeanEmbedding, LeanLinear, LeanQuantizedEmbedding, LeanQuantizedLinear

VOCABULARY, WIDTH, TOKENS = 700, 64, 9


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> mx.array:
    return mx.array((scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32))


def linear(bias: bool = False, dtype: mx.Dtype = mx.float32) -> nn.Linear:
    module = nn.Linear(WIDTH, VOCABULARY, bias=bias)
    module.weight = normal(VOCABULARY, WIDTH, scale=0.4)
    if bias:
        module.bias = normal(VOCABULARY, seed=1)
    module.set_dtype(dtype)
    return module


def embedding(dtype: mx.Dtype = mx.float32) -> nn.Embedding:
    module = nn.Embedding(VOCABULARY, WIDTH)
    module.weight = normal(VOCABULARY, WIDTH, scale=0.4).astype(dtype)
    return module


def lean(module: nn.Module) -> nn.Module:
    """The same stored arrays in the layer that computes them in float32."""
    kinds = {
        nn.Linear: LeanLinear,
        nn.Embedding: LeanEmbedding,
        nn.QuantizedLinear: LeanQuantizedLinear,
        nn.QuantizedEmbedding: LeanQuantizedEmbedding,
    }
    layer = kinds[type(module)].__new__(kinds[type(module)])
    layer.__dict__.update(module.__dict__)
    layer.update(module.parameters(), strict=False)
    for name, value in module.items():
        layer[name] = value
    return layer


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": linear,
    "linear with bias": lambda: linear(bias=True),
    "linear bf16": lambda: linear(dtype=mx.bfloat16),
    "embedding": embedding,
    "embedding f16": lambda: embedding(mx.float16),
    "quantised linear 4 bits, 32": lambda: nn.QuantizedLinear.from_linear(linear(), 32, 4),
    "quantised linear 8 bits, 64, bias": lambda: nn.QuantizedLinear.from_linear(linear(bias=True), 64, 8),
    "quantised linear 4 bits, bf16": lambda: nn.QuantizedLinear.from_linear(linear(dtype=mx.bfloat16), 64, 4),
    "quantised linear mxfp4": lambda: nn.QuantizedLinear.from_linear(linear(), 32, 4, mode="mxfp4"),
    "quantised embedding 4 bits, 64": lambda: nn.QuantizedEmbedding.from_embedding(embedding(), 64, 4),
    "quantised embedding 8 bits, 32": lambda: nn.QuantizedEmbedding.from_embedding(embedding(), 32, 8),
    "lean linear bf16": lambda: lean(linear(bias=True, dtype=mx.bfloat16)),
    "lean embedding f16": lambda: lean(embedding(mx.float16)),
    "lean quantised linear": lambda: lean(nn.QuantizedLinear.from_linear(linear(dtype=mx.bfloat16), 32, 4)),
    "lean quantised embedding": lambda: lean(nn.QuantizedEmbedding.from_embedding(embedding(mx.float16), 64, 8)),
}


def exact_weight(module: nn.Module) -> np.ndarray:
    """The weights that are stored, in float64: codes times scales plus biases."""
    if "scales" not in module:
        return np.array(module.weight.astype(mx.float32)).astype(np.float64)
    if module.mode != "affine":
        dense = mx.dequantize(module.weight, module.scales, None, module.group_size, module.bits, module.mode)
        return np.array(dense.astype(mx.float32)).astype(np.float64)
    packed = np.array(module.weight)
    shifts = np.arange(0, 32, module.bits, dtype=np.uint32)
    codes = ((packed[..., None] >> shifts) & (2**module.bits - 1)).reshape(len(packed), -1).astype(np.float64)
    scales, biases = (
        np.repeat(np.array(x.astype(mx.float32)).astype(np.float64), module.group_size, axis=-1)
        for x in (module.scales, module.biases)
    )
    return codes * scales + biases


def exact(head: Head, hidden: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs [N] and d logp / d hidden [N, D], by the formula."""
    weight = exact_weight(head.module)
    logits = hidden.astype(np.float64) @ weight.T
    if "bias" in head.module:
        logits += np.array(head.module.bias.astype(mx.float32)).astype(np.float64)
    logits *= head.scale
    slope = np.full_like(logits, head.scale)
    if head.softcap is not None:
        logits = head.softcap * np.tanh(logits / head.softcap)
        slope *= 1 - (logits / head.softcap) ** 2
    logits -= logits.max(axis=-1, keepdims=True)
    logps = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    rows = np.arange(len(targets))
    into_logits = -np.exp(logps)
    into_logits[rows, targets] += 1
    return logps[rows, targets], (into_logits * slope) @ weight


def check(head: Head, hidden: mx.array, atol: float = 1e-5) -> None:
    targets = np.random.default_rng(5).integers(0, VOCABULARY, len(hidden))
    targets[:3] = [0, VOCABULARY - 1, 256]
    into = normal(len(hidden), seed=6)

    def total(hidden: mx.array) -> tuple[mx.array, mx.array]:
        logps = head.logps(hidden, mx.array(targets))
        return mx.sum(into * logps), logps

    (_, logps), grad = mx.value_and_grad(total)(hidden)
    plain = np.array(hidden.astype(mx.float32))
    want, want_grad = exact(head, plain, targets)
    np.testing.assert_allclose(np.array(logps), want, atol=atol)
    np.testing.assert_allclose(np.array(head.logps(hidden, mx.array(targets), grad=False)), want, atol=atol)
    assert logps.dtype == mx.float32
    assert grad.dtype == hidden.dtype
    if hidden.dtype == mx.float32:
        np.testing.assert_allclose(np.array(grad), np.array(into)[:, None] * want_grad, atol=atol)
    whole = np.array(head.logits(mx.array(plain)))
    assert whole.shape == (len(hidden), VOCABULARY)
    np.testing.assert_allclose(np.array(exact_logps(mx.array(whole), mx.array(targets))), want, atol=atol)


@pytest.fixture(params=[1, 1 << 30], ids=["tiles", "one tile"])
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest tile is 256 of the 700 logits: three tiles, the last one short; or all at once."""
    monkeypatch.setattr(head_module, "_CPU_TILE", request.param)
    monkeypatch.setattr(head_module, "_GPU_TILE", request.param)


tiled = pytest.mark.usefixtures("_tiles")


@tiled
@pytest.mark.parametrize("name", MODULES)
def test_every_storage(name: str) -> None:
    check(Head(MODULES[name]()), normal(TOKENS, WIDTH, seed=3))


@tiled
@pytest.mark.parametrize("scale", [1.0, 0.25, 3.0])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("name", ["linear with bias", "quantised embedding 4 bits, 64"])
def test_scale_and_softcap(name: str, scale: float, softcap: float | None) -> None:
    check(Head(MODULES[name](), scale, softcap), normal(TOKENS, WIDTH, seed=3), atol=2e-5)


@tiled
def test_half_precision_hidden_states_are_widened_first() -> None:
    check(Head(linear()), normal(TOKENS, WIDTH, seed=3).astype(mx.bfloat16))


@tiled
def test_large_logits() -> None:
    """A sum of exponentials without its maximum taken away would overflow; logits here reach several hundred."""
    hidden = 40 * normal(TOKENS, WIDTH, seed=3)
    targets = mx.array(np.arange(TOKENS) * 70)
    want, _ = exact(Head(linear()), np.array(hidden), np.array(targets))
    assert want.min() < -200
    np.testing.assert_allclose(np.array(Head(linear()).logps(hidden, targets)), want, rtol=2e-6)


@tiled
def test_one_prediction_and_none() -> None:
    check(Head(linear()), normal(TOKENS, WIDTH, seed=3)[:3])
    assert Head(linear()).logps(mx.zeros((0, WIDTH)), mx.zeros((0,), mx.int32)).shape == (0,)


def test_a_tile_never_changes_the_gradient_of_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, targets = normal(TOKENS, WIDTH, seed=3), mx.arange(TOKENS)
    head = Head(linear(), 1.0, 5.0)

    def grad() -> np.ndarray:
        return np.array(mx.grad(lambda h: mx.sum(head.logps(h, targets)))(hidden))

    first = grad()
    monkeypatch.setattr(head_module, "_CPU_TILE", 300 * TOKENS)
    np.testing.assert_allclose(grad(), first, atol=2e-6)


@tiled
def test_not_a_number_is_not_hidden() -> None:
    hidden = normal(TOKENS, WIDTH, seed=3)
    hidden[2, 5] = np.nan
    logps = np.array(Head(linear()).logps(hidden, mx.arange(TOKENS)))
    assert np.isnan(logps[2])
    assert np.isfinite(np.delete(logps, 2)).all()


def peak(run: Callable[[mx.array], mx.array], hidden: mx.array) -> int:
    """Bytes beyond what was alive before: the least of three runs.

    MLX allocates when an operation is queued and frees when it has run, so on a busy machine a run holds up to ten
    operations' results more than it needs. That surplus is the scheduler's; the least of a few runs is the head's own.
    """
    mx.eval(hidden)
    peaks = []
    for _ in range(3):
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.grad(lambda h: mx.sum(run(h)))(hidden))
        peaks.append(mx.get_peak_memory() - before)
    return min(peaks)


def test_memory_at_a_large_vocabulary() -> None:
    """[tokens, vocabulary] never exists: the peak is a small part of one such matrix; the plain head has four."""
    vocabulary, tokens, width = 150_000, 128, 8
    module = nn.Embedding(vocabulary, width)
    mx.eval(module.parameters())
    hidden, targets = normal(tokens, width), mx.arange(tokens)
    ours = peak(lambda h: Head(module).logps(h, targets), hidden)
    plain = peak(lambda h: exact_logps(module.as_linear(h), targets), hidden)
    whole = 4 * tokens * vocabulary
    assert plain > 3 * whole
    assert ours < 0.4 * whole
    assert ours < 0.1 * plain


@pytest.mark.parametrize("quantised", [False, True])
def test_memory_does_not_grow_with_the_vocabulary(quantised: bool) -> None:
    tokens, width = 48, 32
    hidden, targets = normal(tokens, width), mx.arange(tokens)
    peaks = []
    for vocabulary in (120_000, 480_000):
        module = nn.QuantizedEmbedding(vocabulary, width, 32, 4) if quantised else nn.Embedding(vocabulary, width)
        mx.eval(module.parameters())
        head = Head(module)
        peaks.append(peak(lambda h, head=head: head.logps(h, targets), hidden))
    assert peaks[1] < 1.3 * peaks[0]
