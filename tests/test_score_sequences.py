"""The engine scores sequences: any list of them, sharing whatever they share, equals each by itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from oracles import VOCABULARY, adapted_model

from localdpo.core.score import CompletionLogps, CoreScorer, LossShare, SequenceLogps, sequence_logps
from localdpo.dpo import scorer as scorer_module
from localdpo.dpo.forward import choose_forward
from localdpo.dpo.scorer import FastScorer, make_scorer
from localdpo.errors import InputError
from localdpo.model.device import lane_streams
from localdpo.sequences import EncodedRow, TokenSequence, completion_lengths, sequences_of

FAMILIES = ["llama", "qwen3", "phi3", "gemma3_text"]


@cache
def model_of(family: str) -> nn.Module:
    return adapted_model(family)


@cache
def scorer_of(family: str, max_tokens: int | None = None, lanes: int = 2, path: Any = "auto") -> FastScorer:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(scorer_module, "core_streams", lambda most: lane_streams(lanes))
        return FastScorer(model_of(family), max_tokens=max_tokens, path=path)


class Weighted:
    """A loss that weighs every token of every completion by itself, so that none can hide behind a sum."""

    columns = ("first",)

    def __init__(self, rows: Sequence[EncodedRow], seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.weights = [[rng.normal(size=len(s.completion_ids)) for s in row.sequences] for row in rows]

    def of(self, rows: Sequence[int]) -> mx.array:
        return mx.array(np.concatenate([w for row in rows for w in self.weights[row]]).astype(np.float32))

    def share(self, rows: Sequence[int], logps: CompletionLogps) -> LossShare:
        assert isinstance(logps, SequenceLogps)
        counts = [len(self.weights[row]) for row in rows]
        firsts = mx.array(np.cumsum([0, *counts[:-1]]))
        return LossShare(mx.sum(self.of(rows) * logps.tokens), mx.stop_gradient(logps.sums[firsts])[:, None])


ids = st.lists(st.integers(0, 3) | st.integers(0, VOCABULARY - 1), min_size=1, max_size=9)


@st.composite
def rows_of_sequences(draw: st.DrawFn) -> list[EncodedRow]:
    """Rows of one to four sequences: equal, nested and unrelated prompts, completions that open alike or are equal."""
    opening = draw(st.lists(st.integers(0, 3), max_size=14))
    prompts = draw(st.lists(ids, min_size=1, max_size=3))
    prompts += [[*opening, *prompt] for prompt in prompts]
    prompts += [[*prompt, *draw(ids)] for prompt in prompts[:1]]
    completions = draw(st.lists(ids, min_size=1, max_size=3))
    sequence = st.tuples(st.sampled_from(prompts), st.sampled_from(completions) | ids)
    drawn = draw(st.lists(st.lists(sequence, min_size=1, max_size=4), min_size=1, max_size=4))
    return [
        EncodedRow(tuple(TokenSequence(np.array(p, np.int32), np.array(c, np.int32)) for p, c in row)) for row in drawn
    ]


def one_at_a_time(model: nn.Module, sequences: Sequence[TokenSequence]) -> list[np.ndarray]:
    """Log-probs of each token, each sequence by itself, in float64."""
    with oracles.doubled(model):
        return [
            np.array(oracles.token_logps(model, one.prompt_ids, one.completion_ids)).astype(np.float64)
            for one in sequences
        ]


@settings(max_examples=25, derandomize=True, deadline=None)
@given(
    rows=rows_of_sequences(),
    family=st.sampled_from(FAMILIES),
    max_tokens=st.sampled_from([1, 25, 1000]),
    lanes=st.sampled_from([1, 2, 3]),
    path=st.sampled_from(["shared", "plain"]),
)
def test_any_list_of_sequences_equals_one_at_a_time(
    rows: list[EncodedRow], family: str, max_tokens: int, lanes: int, path: str
) -> None:
    model, sequences = model_of(family), sequences_of(rows)
    exact = one_at_a_time(model, sequences)
    scorer = scorer_of(family, max_tokens, lanes, path)
    np.testing.assert_allclose(scorer.logps(sequences), [row.sum() for row in exact], atol=2e-4)
    loss = Weighted(rows, seed=len(sequences))
    result = scorer.loss_and_grad(rows, loss)
    wanted = CoreScorer(model).loss_and_grad(rows, loss)
    by_hand = float((np.array(loss.of(range(len(rows)))) * np.concatenate(exact)).sum())
    assert result.loss == pytest.approx(by_hand, abs=2e-4)
    assert wanted.loss == pytest.approx(by_hand, abs=2e-4)
    firsts = np.cumsum([0, *(len(row.sequences) for row in rows[:-1])])
    np.testing.assert_allclose(result.columns["first"], [exact[n].sum() for n in firsts], atol=2e-4)
    largest = max(float(mx.max(mx.abs(value))) for value in wanted.grad.values())
    assert result.grad.keys() == wanted.grad.keys()
    for name, value in wanted.grad.items():
        np.testing.assert_allclose(np.array(result.grad[name]), np.array(value), rtol=0, atol=2e-4 * largest + 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_scorer_equals_the_oracle(family: str) -> None:
    """Token by token, and its gradient by finite differences along a direction of its own."""
    model = model_of(family)
    rng = np.random.default_rng(3)
    rows = [EncodedRow.of(rng.integers(0, VOCABULARY, 7).astype(np.int32), completions(rng)) for _ in range(2)]
    sequences = sequences_of(rows)
    exact = one_at_a_time(model, sequences)
    np.testing.assert_allclose(np.array(sequence_logps(model, sequences).tokens), np.concatenate(exact), atol=1e-4)
    np.testing.assert_allclose(CoreScorer(model).logps(sequences), [row.sum() for row in exact], atol=2e-4)
    loss, grad = Weighted(rows, 5), CoreScorer(model).loss_and_grad(rows, Weighted(rows, 5)).grad
    places = dict(tree_flatten(model.trainable_parameters()))
    assert grad.keys() == places.keys()
    step = 2e-4
    direction = {name: mx.random.normal(value.shape, key=mx.random.key(7)) for name, value in places.items()}
    values = []
    for sign in (1, -1):
        model.load_weights([(n, v + sign * step * direction[n]) for n, v in places.items()], strict=False)
        values.append(float((np.array(loss.of([0, 1])) * np.concatenate(one_at_a_time(model, sequences))).sum()))
    model.load_weights(list(places.items()), strict=False)
    slope = sum(float(mx.sum(grad[name] * direction[name])) for name in places)
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=5e-3)


def completions(rng: np.random.Generator) -> list[np.ndarray]:
    return [rng.integers(0, VOCABULARY, size).astype(np.int32) for size in (4, 1, 6)]


def test_a_prompt_is_run_once_for_any_number_of_completions() -> None:
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, VOCABULARY, 40).astype(np.int32)
    answers = [np.array([n, *rng.integers(0, VOCABULARY, 4)], np.int32) for n in range(8)]
    sequences = [TokenSequence(prompt, answer) for answer in answers]
    shared, _ = choose_forward(model_of("llama"), "shared")
    assert shared.run(sequences, grad=False).tokens_run == 40 + 8 * 4
    assert completion_lengths(sequences).tolist() == [5] * 8


def test_kl_from_the_base_is_that_of_the_plain_scorer() -> None:
    rng = np.random.default_rng(1)
    prompt = rng.integers(0, VOCABULARY, 9).astype(np.int32)
    sequences = [TokenSequence(prompt, answer) for answer in completions(rng)]
    exact = CoreScorer(model_of("qwen3")).base_kl(sequences)
    assert (exact > 0).all()
    np.testing.assert_allclose(scorer_of("qwen3").base_kl(sequences), exact, rtol=1e-4)


def test_the_environment_chooses_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    assert isinstance(make_scorer(model), FastScorer)
    monkeypatch.setenv("LOCALDPO_ENGINE", "core")
    assert isinstance(make_scorer(model), CoreScorer)
    monkeypatch.setenv("LOCALDPO_ENGINE", "slow")
    with pytest.raises(InputError, match="fast or core"):
        make_scorer(model)
