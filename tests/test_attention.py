"""Attention over a packed batch against masked softmax in float64, and its way into mlx-lm's models."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx_lm.models.base
import mlx_lm.models.llama
import mlx_lm.models.qwen3
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from oracles import adapted_model, pair, random_model, random_pairs

from localdpo.dpo import attention
from localdpo.dpo.attention import LaneAttention, PackedAttention, PackedCache, Window
from localdpo.dpo.packing import PackedBatch, pack
from localdpo.dpo.scorer import FastScorer
from localdpo.sequences import sequences_of

HEADS, KV_HEADS, WIDTH, VALUE_WIDTH = 4, 2, 8, 6
SCALE = 0.4


def batch(min_shared: int = 1) -> PackedBatch:
    """Three pairs over two levels of sharing, with contexts that lie apart."""
    rows = random_pairs(0, [(9, 6, 4), (12, 1, 7), (3, 5, 5)])
    opening = rows[0].prompt_ids[:5].tolist()
    rows[1] = pair([*opening, *rows[1].prompt_ids], rows[1].chosen_ids, rows[1].rejected_ids)
    return pack(sequences_of(rows), min_shared=min_shared)


def inputs(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    shapes = ((HEADS, WIDTH), (KV_HEADS, WIDTH), (KV_HEADS, VALUE_WIDTH), (HEADS, VALUE_WIDTH))
    return tuple(rng.standard_normal((size, heads, 1, width)).astype(np.float32) for heads, width in shapes)


def exact_attention(queries: mx.array, keys: mx.array, values: mx.array, mask: np.ndarray) -> mx.array:
    """[T, H, 1, D] in and out, every head by itself, in the dtype of the inputs."""
    outs = []
    for head in range(HEADS):
        group = head // (HEADS // KV_HEADS)
        scores = SCALE * queries[:, head, 0] @ keys[:, group, 0].T
        scores = mx.where(mx.array(mask), scores, mx.array(-np.inf, scores.dtype))
        weights = mx.exp(scores - mx.max(scores, axis=-1, keepdims=True))
        outs.append((weights / mx.sum(weights, axis=-1, keepdims=True)) @ values[:, group, 0])
    return mx.stack(outs, axis=1)[:, :, None]


both = pytest.mark.parametrize("fused", [False, True], ids=["ours", "mlx"])


@both
@pytest.mark.parametrize("cost", [1, 10**9], ids=["many blocks", "one block"])
@pytest.mark.parametrize("window", [None, 1, 3, 9, 100])
@pytest.mark.parametrize("lanes", [1, 2, 5])
def test_output_and_gradients_equal_masked_softmax(
    monkeypatch: pytest.MonkeyPatch, fused: bool, cost: int, window: int | None, lanes: int
) -> None:
    monkeypatch.setattr(attention, "CALL_COST", {"cpu": cost, "gpu": cost})
    packed = batch().in_lanes(lanes, 0.3)
    assert len(packed.lanes) == lanes
    assert (len(packed.blocks(cost // HEADS, packed.lanes[0])) == 1) == (cost > 1)
    queries, keys, values, into = inputs(len(packed.tokens))

    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        caches: list[PackedCache] = []
        outs = []
        for number, span in enumerate(packed.lanes):
            own = slice(*span)
            caches.append(PackedCache(LaneAttention(packed, fused=fused, lane=number), caches))
            mask = caches[-1].make_mask(1, window_size=window)
            outs.append(caches[-1].attend(q[own], k[own], v[own], SCALE, mask))
        return mx.concatenate(outs)

    def total(attend: Callable[..., mx.array]) -> Callable[..., tuple[mx.array, mx.array]]:
        def run(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
            out = attend(q, k, v)
            return mx.sum(out * mx.array(into).astype(out.dtype)), out

        return run

    ours = mx.value_and_grad(total(attend), argnums=(0, 1, 2))
    visible = packed.attention_mask(window)
    oracle = mx.value_and_grad(total(lambda q, k, v: exact_attention(q, k, v, visible)), argnums=(0, 1, 2))
    (_, out), grads = ours(*(mx.array(x) for x in (queries, keys, values)))
    with mx.stream(mx.cpu):
        doubles = [mx.array(x).astype(mx.float64) for x in (queries, keys, values)]
        (_, exact), exact_grads = oracle(*doubles)
        np.testing.assert_allclose(np.array(out), np.array(exact), atol=2e-6)
        for grad, exact_grad in zip(grads, exact_grads, strict=True):
            np.testing.assert_allclose(np.array(grad), np.array(exact_grad), atol=1e-5)


@both
def test_an_extreme_score_does_not_overflow(fused: bool) -> None:
    packed = pack(pair([1, 2, 3], [4, 5], [6, 7]).sequences, min_shared=1)
    queries, keys, values, _ = inputs(len(packed.tokens))
    out = PackedCache(LaneAttention(packed, fused=fused)).attend(
        mx.array(1e3 * queries), mx.array(1e3 * keys), mx.array(values), SCALE, None
    )
    exact = exact_attention(mx.array(1e3 * queries), mx.array(1e3 * keys), mx.array(values), packed.attention_mask())
    np.testing.assert_allclose(np.array(out), np.array(exact), atol=1e-4)


@both
def test_half_precision_comes_back_as_it_came(fused: bool) -> None:
    packed = batch()
    cache = PackedCache(LaneAttention(packed, fused=fused))
    half = [mx.array(x).astype(mx.bfloat16) for x in inputs(len(packed.tokens))[:3]]
    out = cache.attend(*half, SCALE, None)
    grads = mx.grad(lambda *x: mx.sum(cache.attend(*x, SCALE, None)), argnums=(0, 1, 2))(*half)
    assert out.dtype == mx.bfloat16
    assert all(grad.dtype == mx.bfloat16 for grad in grads)
    exact = exact_attention(*(x.astype(mx.float32) for x in half), packed.attention_mask())
    np.testing.assert_allclose(np.array(out.astype(mx.float32)), np.array(exact), atol=2e-2)


def test_a_window_longer_than_every_sequence_is_no_mask() -> None:
    packed = batch()
    cache = PackedCache(LaneAttention(packed, fused=False))
    deepest = int(packed.positions.max())
    assert cache.make_mask(1) is None
    assert cache.make_mask(1, window_size=deepest + 1) is None
    assert cache.make_mask(1, window_size=deepest) == Window(deepest)


def greedy(model: object, count: int = 24) -> tuple[list[int], np.ndarray]:
    prompt = mx.array([5, 7, 11, 2, 3])
    steps = list(generate_step(prompt, model, max_tokens=count))
    return [int(token) for token, _ in steps], np.array([np.array(logps) for _, logps in steps])


NAMES = ("scaled_dot_product_attention", "swiglu")


def functions() -> dict[str, object]:
    return {name: getattr(mlx_lm.models.qwen3, name) for name in NAMES}


def test_within_the_patch_generation_is_the_same_and_after_it_all_is_as_before() -> None:
    model = random_model("qwen3", tied=False, seed=1)
    before, (tokens, logps) = functions(), greedy(model)
    assert len(set(tokens)) > 4
    patch, other = (PackedAttention(model, fast_activations=True) for _ in range(2))
    with patch:
        replaced = functions()
        assert all(replaced[name] is not before[name] for name in NAMES)
        tokens_within, logps_within = greedy(model)
        other.__enter__()
        assert functions() == replaced, "nothing is replaced twice"
    assert functions() == replaced, "not before the last one leaves"
    other.__exit__()
    assert functions() == before
    assert tokens_within == tokens
    np.testing.assert_allclose(logps_within, logps, atol=1e-5)


def test_a_step_takes_back_what_it_patched_even_when_it_fails() -> None:
    model = adapted_model("qwen3")
    before = functions()
    scorer = FastScorer(model)
    row = pair([1, 2, 3], [4, 5], [6])
    scorer.logps(row.sequences)
    assert functions() == before

    class Broken:
        columns = ()

        def share(self, *_: object) -> object:
            assert functions() != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        scorer.loss_and_grad([row], Broken())
    assert functions() == before


def test_only_the_models_own_modules_are_touched() -> None:
    untouched = mlx_lm.models.base.scaled_dot_product_attention
    with PackedAttention(random_model("qwen3"), fast_activations=False):
        assert mlx_lm.models.base.scaled_dot_product_attention is untouched


def test_a_mask_of_the_models_own_is_refused() -> None:
    packed = pack(pair([1, 2], [3], [4]).sequences)
    queries = mx.zeros((len(packed.tokens), HEADS, 1, WIDTH))
    cache = PackedCache(LaneAttention(packed, fused=False))
    with pytest.raises(TypeError, match="mask of the model's own"):
        cache.attend(queries, queries, queries, 1.0, mx.zeros((1, 1)))


def test_attention_sinks_are_left_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A softmax with sinks is another function; the probe then finds that sharing does not work."""
    seen = []

    def attention(queries: mx.array, *_: object, **more: object) -> mx.array:
        seen.append(more["sinks"])
        return queries

    monkeypatch.setattr(mlx_lm.models.llama, "scaled_dot_product_attention", attention)
    packed = pack(pair([1, 2], [3], [4]).sequences)
    queries = mx.zeros((len(packed.tokens), HEADS, 1, WIDTH))
    cache = PackedCache(LaneAttention(packed, fused=False))
    with PackedAttention(random_model("llama"), fast_activations=False):
        mlx_lm.models.llama.scaled_dot_product_attention(
            queries, queries, queries, cache=cache, scale=1.0, mask=None, sinks=mx.zeros(4)
        )
    assert len(seen) == 1
