"""Both paths against one sequence at a time in float64: log-probs, adapter gradients, and which path a model takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import oracles
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from oracles import FAMILIES, VOCABULARY, adapted_model, pair, random_model, random_pairs
from pair_scorer import PairScorer
from tiny import randomise_adapter

from localdpo.dpo.anatomy import NotUnderstood
from localdpo.dpo.forward import Forward, choose_forward, exact_logps
from localdpo.dpo.packing import pack
from localdpo.dpo.recompute import Checkpointed, InOrder
from localdpo.model.device import lane_streams
from localdpo.model.frozen import compute_in_float32
from localdpo.model.lora import LoraSettings, adapters_off, attach_lora
from localdpo.sequences import EncodedRow, sequences_of

PATHS = {family: "plain" if family in ("gemma2", "lfm2") else "shared" for family in FAMILIES}
REASONS = {"gemma2": "differs by", "lfm2": "TypeError"}
TOLERANCE = 1e-5
GRAD_TOLERANCES = {"gemma4_text": 2e-5}
"""Its per-layer gates lose more in float32: mlx-lm's own rows, one at a time, are 7e-6 to 1.2e-5 from float64,
depending on how BLAS splits a product."""


def some_pairs() -> list[EncodedRow]:
    """Longer than the windows, of unequal lengths; an equal prompt, a common opening, answers that begin alike."""
    rows = random_pairs(3, [(11, 6, 4), (14, 1, 9), (1, 3, 2), (10, 7, 7)])
    opening = rows[0].prompt_ids
    rows.append(pair(opening, rows[3].chosen_ids, [*rows[3].chosen_ids[:3], 1, 2]))
    rows.append(pair([*opening[:9], 4, 5], [7], [7, 8]))
    return rows


def sums(model: nn.Module, forward: Forward, pairs: Sequence[EncodedRow]) -> np.ndarray:
    return np.array(forward.run(sequences_of(pairs), grad=False).sums).reshape(-1, 2)


def with_gradient(
    model: nn.Module, forward: Forward, pairs: Sequence[EncodedRow], factors: np.ndarray, checkpoint: bool = False
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Sums [B, 2], and the adapter gradient of sum(factors * sums)."""

    def total(parameters: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
        model.update(tree_unflatten(list(parameters.items())))
        out = forward.run(sequences_of(pairs), grad=True, checkpoint=checkpoint).sums.reshape(-1, 2)
        return mx.sum(mx.array(factors.astype(np.float32)) * out), out

    parameters = dict(tree_flatten(model.trainable_parameters()))
    with forward.patch:
        (_, out), grads = mx.value_and_grad(total)(parameters)
    mx.eval(out, grads)
    model.update(tree_unflatten(list(parameters.items())))
    return np.array(out), {name: np.array(value) for name, value in grads.items()}


def assert_grads(ours: dict[str, np.ndarray], exact: dict[str, np.ndarray], tolerance: float = TOLERANCE) -> None:
    """Within ``tolerance`` of the largest entry of all, and no tensor of zeros where there should be none."""
    assert ours.keys() == exact.keys()
    largest = max(np.abs(value).max() for value in exact.values())
    for name, value in exact.items():
        assert np.abs(value).max() > 0, name
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=tolerance * largest, err_msg=name)


def assert_sums(ours: np.ndarray, exact: Any, tolerance: float = TOLERANCE) -> None:
    """Within ``tolerance`` a token."""
    for column, side, tokens in zip(ours.T, exact[:2], exact[2:], strict=True):
        assert np.max(np.abs(column - side) / tokens) < tolerance


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_one_sequence_at_a_time(family: str, lanes: int) -> None:
    model, pairs = adapted_model(family), some_pairs()
    factors = np.random.default_rng(1).standard_normal((len(pairs), 2))
    exact = oracles.pair_logps(model, pairs)
    exact_grads = oracles.gradient(model, pairs, *factors.T)

    streams = lane_streams(lanes)
    forward, reason = choose_forward(model, streams=streams)
    assert forward.path == PATHS[family]
    assert REASONS.get(family, "checked against the plain path") in reason
    plain, _ = choose_forward(model, "plain", streams)
    assert plain.path == "plain"
    for way in (forward, plain) if forward.path == "shared" else (plain,):
        assert_sums(sums(model, way, pairs), exact)
        for checkpoint in (False, True):
            out, grads = with_gradient(model, way, pairs, factors, checkpoint)
            assert_sums(out, exact)
            assert_grads(grads, exact_grads, GRAD_TOLERANCES.get(family, TOLERANCE))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma4_text", "phi3"])
def test_the_gpu_form_of_attention_is_the_same(family: str) -> None:
    model, pairs = adapted_model(family), some_pairs()
    factors = np.random.default_rng(1).standard_normal((len(pairs), 2))
    forward, _ = choose_forward(model, "shared", lane_streams(2))
    forward._fused = True
    out, grads = with_gradient(model, forward, pairs, factors, checkpoint=True)
    assert_sums(out, oracles.pair_logps(model, pairs))
    assert_grads(grads, oracles.gradient(model, pairs, *factors.T), GRAD_TOLERANCES.get(family, TOLERANCE))


@pytest.mark.parametrize("path", ["shared", "plain"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "qwen3_moe"])
def test_a_batch_equals_its_pairs_alone_and_with_more_padding(family: str, path: Any) -> None:
    model, pairs = adapted_model(family), some_pairs()
    forward, _ = choose_forward(model, path)
    together = sums(model, forward, pairs)
    alone = np.concatenate([sums(model, forward, [row]) for row in pairs])
    padded = sums(model, forward, [*pairs, *random_pairs(8, [(40, 3, 30)])])[:-1]
    np.testing.assert_allclose(alone, together, atol=2e-5)
    np.testing.assert_allclose(padded, together, atol=2e-5)
    shuffled = [3, 0, 5, 1, 4, 2]
    np.testing.assert_allclose(sums(model, forward, [pairs[i] for i in shuffled]), together[shuffled], atol=2e-5)


def test_a_window_longer_than_the_probe_but_not_than_the_pairs() -> None:
    model, pairs = adapted_model("gemma3_text", sliding_window=48), random_pairs(2, [(60, 30, 12), (40, 5, 40)])
    forward, _ = choose_forward(model)
    assert forward.path == "shared"
    assert_sums(sums(model, forward, pairs), oracles.pair_logps(model, pairs))


class WindowOfItsOwn(nn.Module):
    """An attention that masks what is far away by itself, and only where there is something far away."""

    def __init__(self, inner: nn.Module, size: int) -> None:
        super().__init__()
        self.inner, self.size = inner, size

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        length = x.shape[1]
        if length > self.size:
            apart = mx.arange(length)[:, None] - mx.arange(length)[None]
            mask = (apart >= 0) & (apart < self.size)
        return self.inner(x, mask, cache)


@pytest.mark.parametrize("setting", ["sliding_window", "attention_chunk_size"])
def test_a_window_that_the_cache_is_not_asked_for_is_proved_once_a_row_reaches_it(setting: str) -> None:
    model = adapted_model("llama")
    for layer in model.layers:
        layer.self_attn = WindowOfItsOwn(layer.self_attn, 40)
    setattr(model.args, setting, 40)
    scorer = PairScorer(model)
    short, long = random_pairs(1, [(9, 4, 6), (12, 5, 3)]), random_pairs(2, [(60, 30, 12), (40, 5, 40)])
    assert_sums(np.stack(scorer.logps(short)[:2], axis=1), oracles.pair_logps(model, short))
    assert scorer.path == "shared"
    assert_sums(np.stack(scorer.logps(long)[:2], axis=1), oracles.pair_logps(model, long))
    assert scorer.path == "plain"
    assert "differs" in scorer.path_reason
    assert_sums(np.stack(scorer.logps(short)[:2], axis=1), oracles.pair_logps(model, short))


def test_a_window_that_changes_nothing_stays_shared() -> None:
    model, pairs = adapted_model("llama"), random_pairs(2, [(60, 30, 12)])
    model.args.sliding_window = 48
    scorer = PairScorer(model)
    assert_sums(np.stack(scorer.logps(pairs)[:2], axis=1), oracles.pair_logps(model, pairs))
    assert scorer.path == "shared"


@pytest.mark.parametrize("family", ["llama", "lfm2"])
def test_adapters_in_the_top_layer_only(family: str) -> None:
    """Layers without trainable arrays are checkpointed too, and pass gradients on."""
    model, pairs = adapted_model(family, num_layers=1), some_pairs()
    factors = np.random.default_rng(1).standard_normal((len(pairs), 2))
    exact = oracles.gradient(model, pairs, *factors.T)
    forward, _ = choose_forward(model)
    for checkpoint in (False, True):
        assert_grads(with_gradient(model, forward, pairs, factors, checkpoint)[1], exact)


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_quantised_base_in_float32(memory: Any, tied: bool) -> None:
    model = random_model("qwen2", tied=tied)
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, group_size=32, bits=4)
    compute_in_float32(model, memory)
    attach_lora(model, LoraSettings(rank=3, scale=1.5))
    randomise_adapter(model, 1, 0.1)
    pairs = some_pairs()
    factors = np.random.default_rng(1).standard_normal((len(pairs), 2))
    # Packed weights have no float64: the plain model itself is the oracle, in float32.
    exact = oracles.pair_logps(model, pairs, double=False)
    exact_grads = oracles.gradient(model, pairs, *factors.T, double=False)
    forward, _ = choose_forward(model)
    assert forward.path == "shared"
    for checkpoint in (False, True):
        out, grads = with_gradient(model, forward, pairs, factors, checkpoint)
        assert_sums(out, exact)
        assert_grads(grads, exact_grads)


def successor_model(vocabulary: int = 32) -> nn.Module:
    """After token t it expects t + 1, whatever came before: every other token is worth the same little."""
    model = random_model("llama", vocab_size=vocabulary, tied=False)
    for layer in model.layers:
        layer.self_attn.o_proj.weight = mx.zeros_like(layer.self_attn.o_proj.weight)
        layer.mlp.down_proj.weight = mx.zeros_like(layer.mlp.down_proj.weight)
    model.model.norm.weight = mx.ones((32,))
    model.model.embed_tokens.weight = mx.eye(vocabulary)
    model.lm_head.weight = mx.roll(mx.eye(vocabulary), 1, axis=0)
    return model


@pytest.mark.parametrize("path", ["shared", "plain"])
def test_each_token_is_predicted_from_the_one_before_it(path: Any) -> None:
    """One-hot ids: a mask that is off by one scores the wrong tokens, and the sums tell how many."""
    model = successor_model()
    forward, _ = choose_forward(model, path)
    rows = [
        pair([9, 1, 2, 3], [4, 5, 6], [5, 6, 7]),  # 3 expected; 5 is a surprise, 6 and 7 are not
        pair([9, 1, 2, 3], [4], [3]),
        pair([3], [4, 5, 9, 10], [0, 0]),
    ]
    hits = np.array([[3, 2], [1, 0], [3, 0]])
    tokens = np.array([[3, 3], [1, 1], [4, 2]])
    top = np.sqrt(32.0 / (1 + 32 * 1e-5))  # the norm of a one-hot row
    hit = top - np.log(np.exp(top) + 31)
    miss = -np.log(np.exp(top) + 31)
    np.testing.assert_allclose(sums(model, forward, rows), hits * hit + (tokens - hits) * miss, atol=2e-5)


@pytest.mark.parametrize("path", ["shared", "plain"])
def test_an_edited_token_changes_its_own_prediction_and_later_ones(path: Any) -> None:
    model = adapted_model("qwen3")
    forward, _ = choose_forward(model, path)
    prompt, answer = random_pairs(5, [(12, 8, 1)])[0].prompt_ids, random_pairs(5, [(12, 8, 1)])[0].chosen_ids

    def per_token(ids: np.ndarray) -> np.ndarray:
        logps = forward.run(sequences_of([pair(prompt, ids, [1])]), grad=False)
        return np.array(logps.predictions)[logps.members[0]]

    before = per_token(answer)
    for place in range(len(answer)):
        edited = answer.copy()
        edited[place] = (edited[place] + 1) % VOCABULARY
        changed = np.abs(per_token(edited) - before) > 1e-5
        assert changed.tolist() == [False] * place + [True] * (len(answer) - place)


def test_what_comes_after_a_completion_is_never_read() -> None:
    """Padding and the other rows of a batch: same numbers whatever their ids are."""
    model = adapted_model("llama")
    forward, _ = choose_forward(model, "plain")
    short = random_pairs(1, [(4, 3, 2)])
    first = sums(model, forward, [*short, *random_pairs(2, [(20, 6, 6)])])[0]
    second = sums(model, forward, [*short, *random_pairs(9, [(20, 6, 6)])])[0]
    np.testing.assert_array_equal(first, second)


def test_tokens_run_are_counted_once_where_shared() -> None:
    model = adapted_model("llama")
    rows = [pair(range(10), [1, 2, 3], [4, 5]), pair(range(10), [6], [7, 8])]
    shared, plain = (
        choose_forward(model, path)[0].run(sequences_of(rows), grad=False).tokens_run for path in ("shared", "plain")
    )
    assert shared == len(pack(sequences_of(rows)).tokens) == 10 + 2 + 1 + 0 + 1
    assert plain == (10 + 2) + (10 + 1) + 10 + (10 + 1)


def test_a_path_can_be_asked_for() -> None:
    model = random_model("llama")
    assert choose_forward(model, "plain")[1] == "asked for"
    assert choose_forward(model, "shared")[0].path == "shared"
    with pytest.raises(NotUnderstood, match="differs"):
        choose_forward(random_model("gemma2"), "shared")


class Opaque(nn.Module):
    """A causal model that can only be called."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
        return self.inner(ids, cache)


def test_an_unknown_model_is_used_as_a_whole() -> None:
    inner, pairs = adapted_model("llama"), some_pairs()
    model = Opaque(inner)
    forward, reason = choose_forward(model)
    assert forward.path == "plain"
    assert "insides" in reason
    factors = np.random.default_rng(1).standard_normal((len(pairs), 2))
    for checkpoint in (False, True):
        out, grads = with_gradient(model, forward, pairs, factors, checkpoint)
        assert_sums(out, oracles.pair_logps(inner, pairs))
        assert_grads(grads, oracles.gradient(model, pairs, *factors.T))
    with pytest.raises(NotUnderstood):
        choose_forward(model, "shared")


def test_checkpointed_dropout_draws_the_same_mask_twice() -> None:
    """Else the gradient is that of another loss: here it must be the slope of the loss that was returned."""
    model = adapted_model("llama", dropout=0.4)
    model.eval()
    forward, _ = choose_forward(model, "plain")
    assert forward.anatomy is not None  # else nothing is checkpointed
    model.train()
    pairs = some_pairs()
    factors = np.random.default_rng(1).standard_normal((len(pairs), 2))
    stored = dict(tree_flatten(model.trainable_parameters()))
    rng = np.random.default_rng(2)
    direction = {name: mx.array(rng.standard_normal(value.shape).astype(np.float32)) for name, value in stored.items()}

    def loss(step: float) -> tuple[float, dict[str, np.ndarray]]:
        mx.random.seed(5)
        model.update(tree_unflatten([(name, value + step * direction[name]) for name, value in stored.items()]))
        out, grads = with_gradient(model, forward, pairs, factors, checkpoint=True)
        return float((factors * out.astype(np.float64)).sum()), grads

    value, grads = loss(0.0)
    assert loss(0.0)[0] == value
    mx.random.seed(6)
    assert abs(float((factors * with_gradient(model, forward, pairs, factors, True)[0]).sum()) - value) > 1e-2
    slope = sum(float((grads[name] * np.array(direction[name])).sum()) for name in grads)
    step = 1e-3
    assert (loss(step)[0] - loss(-step)[0]) / (2 * step) == pytest.approx(slope, rel=2e-3)


def _kept(checkpoint: bool) -> int:
    """Most bytes that a gradient of a deep model needed beside what was there before it."""
    model = random_model("llama", num_hidden_layers=24)
    attach_lora(model, LoraSettings(rank=2, scale=2.0))
    randomise_adapter(model)
    forward, _ = choose_forward(model)
    pairs = random_pairs(5, [(100, 60, 60)] * 4)
    factors = np.ones((len(pairs), 2))
    with_gradient(model, forward, pairs[:1], factors[:1], checkpoint)  # what MLX sets up once
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with_gradient(model, forward, pairs, factors, checkpoint)
    return mx.get_peak_memory() - before


def test_checkpointing_keeps_a_fraction() -> None:
    """Of 24 layers, one at a time and what enters each. The gradients must not wait for the end, nor keep it all.

    The least of some: a stream that runs ahead can only add. All of it is kept where gradients wait.
    """
    assert min(_kept(True) for _ in range(4)) < 0.3 * _kept(False)


def test_a_layer_called_by_keyword_gets_its_gradients_too() -> None:
    model = adapted_model("llama")
    layer, hidden = model.layers[0], mx.array(np.random.default_rng(0).random((1, 5, 32), np.float32))

    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layer

        def __call__(self, *, inputs: mx.array) -> mx.array:
            return layer(inputs, None)

    parameters = dict(tree_flatten(layer.trainable_parameters()))

    def gradients(call: Any) -> dict[str, mx.array]:
        def total(parameters: dict[str, mx.array]) -> mx.array:
            layer.update(tree_unflatten(list(parameters.items())))
            return call().sum()

        found = mx.grad(total)(parameters)
        layer.update(tree_unflatten(list(parameters.items())))
        return found

    keyword = Keyword()
    exact = gradients(lambda: layer(hidden, None))
    for ours in (
        gradients(lambda: InOrder(keyword, keyword)(inputs=hidden)),
        gradients(lambda: InOrder(layer, layer)(hidden, None)),
    ):
        assert_grads({n: np.array(v) for n, v in ours.items()}, {n: np.array(v) for n, v in exact.items()})


def test_checkpointed_dropout_moves_the_random_state_on() -> None:
    model = adapted_model("llama", dropout=0.4)
    model.train()
    layer, hidden = Checkpointed(model.layers[0]), mx.array(np.random.default_rng(0).random((1, 5, 32), np.float32))
    mx.random.seed(1)
    first, second = layer(hidden, None), layer(hidden, None)
    assert mx.abs(first - second).max().item() > 1e-3
    mx.random.seed(1)
    assert mx.array_equal(layer(hidden, None), first)
    model.eval()
    state = mx.random.state[0].tolist()
    assert mx.array_equal(layer(hidden, None), layer(hidden, None))
    assert mx.random.state[0].tolist() == state


def test_log_probs_of_a_large_vocabulary_are_exact() -> None:
    """``mx.logsumexp`` on a CPU is off by 3e-4 here."""
    logits = np.random.default_rng(0).standard_normal((4, 49_152)).astype(np.float32)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    ours = exact_logps(mx.array(logits), mx.array([0, 1, 2, 49_151]))
    np.testing.assert_allclose(np.array(ours), exact[range(4), [0, 1, 2, 49_151]], atol=3e-6)


def test_the_base_is_what_is_left_without_adapters() -> None:
    pairs = some_pairs()
    model, base = adapted_model("qwen3"), random_model("qwen3")
    forward, base_forward = choose_forward(model)[0], choose_forward(base)[0]
    with adapters_off(model):
        np.testing.assert_array_equal(sums(model, forward, pairs), sums(base, base_forward, pairs))
    assert np.abs(sums(model, forward, pairs) - sums(base, base_forward, pairs)).max() > 0.1
