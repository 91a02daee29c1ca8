"""Batched sampling: a row's answer is its own whatever is decoded beside it, and is drawn as the options say."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from localdpo.model import generate
from localdpo.model.generate import BatchRow, SamplingOptions, batch_greedy
from localdpo.model.load import LoadedModel, load_model
from localdpo.model.sample import RowSampler, batch_sample

MAMBA = {"state_size": 8, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 4}
HOT = SamplingOptions(max_tokens=12, temperature=1.5)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(tiny.tiny_model(tmp_path_factory.mktemp("m") / "base")))


def prompts(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(4, 320, size=rng.integers(1, 30)).astype(np.int32) for _ in range(count)]


@pytest.mark.parametrize("rows", [1, 3, generate.BATCH_ROWS])
def test_a_row_is_the_same_alone_and_in_any_batch(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(generate, "BATCH_ROWS", rows)
    asked, seeds = prompts(8), list(range(8))
    together = batch_sample(loaded, asked, seeds, HOT)
    for number in (0, 5):
        assert batch_sample(loaded, asked[number : number + 1], seeds[number : number + 1], HOT) == [together[number]]
    assert batch_sample(loaded, asked[::-1], seeds[::-1], HOT) == together[::-1]


def test_seeds_decide_and_the_global_random_state_does_not(loaded: LoadedModel) -> None:
    asked = prompts(1) * 3
    mx.random.seed(1)
    expected = mx.random.uniform(shape=(2,)).tolist()
    mx.random.seed(1)
    first, second, same = batch_sample(loaded, asked, [7, 8, 7], HOT)
    assert mx.random.uniform(shape=(2,)).tolist() == expected
    assert first == same
    assert first != second


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_without_a_choice_it_is_greedy(loaded: LoadedModel, options: dict[str, float]) -> None:
    asked = prompts(5)
    chosen = SamplingOptions(**{"max_tokens": 10, "temperature": 2.0, **options})  # type: ignore[arg-type]
    texts = [answer.text for answer in batch_sample(loaded, asked, range(5), chosen)]
    assert texts == batch_greedy(loaded, asked, 10)


def test_an_end_of_turn_and_a_cut_are_told_apart(loaded: LoadedModel) -> None:
    asked, options = prompts(2), SamplingOptions(max_tokens=6)
    ids = [BatchRow(prompt) for prompt in asked]
    generate.decode_rows(loaded, ids, options, RowSampler(options))
    ends = loaded.tokenizer.eos_token_ids
    loaded.tokenizer.eos_token_ids = {ids[0].answer[2]}
    try:
        answers = batch_sample(loaded, asked, [0, 0], options)
    finally:
        loaded.tokenizer.eos_token_ids = ends
    assert answers[0].finish == "stop"
    assert answers[0].tokens <= 2
    assert (answers[1].finish, answers[1].tokens) == ("length", 6)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.6}, {"top_k": 3}, {"min_p": 0.3}, {"top_p": 0.9, "top_k": 2}])
def test_draws_follow_the_distribution_that_mlx_lm_would_draw_from(options: dict[str, float]) -> None:
    logits = mx.array([[2.0, 1.0, 0.5, 0.0, -1.0, -30.0]])
    logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    if "top_p" in options:
        logps = apply_top_p(logps, options["top_p"])
    if "min_p" in options:
        logps = apply_min_p(logps, options["min_p"])
    if "top_k" in options:
        logps = apply_top_k(logps, int(options["top_k"]))
    expected = np.array(mx.softmax(logps / 0.8, axis=-1))[0]
    draws = 4000
    rows = [BatchRow([1], seed) for seed in range(draws)]
    sampler = RowSampler(SamplingOptions(temperature=0.8, **options))  # type: ignore[arg-type]
    tokens = np.array(sampler(mx.broadcast_to(logits, (draws, 6)), rows))
    shares = np.bincount(tokens, minlength=6) / draws
    assert np.abs(shares - expected).max() < 4 * 0.5 / draws**0.5
    assert not shares[expected == 0].any()


def test_positions_draw_anew() -> None:
    logits = mx.zeros((64, 1000))
    sampler = RowSampler(SamplingOptions(temperature=1.0))
    first = sampler(logits, [BatchRow([1], seed) for seed in range(64)]).tolist()
    second = sampler(logits, [BatchRow([1], seed, answer=[5]) for seed in range(64)]).tolist()
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 5


def test_the_repetition_penalty_is_mlx_lms(loaded: LoadedModel) -> None:
    from localdpo.model.generate import stream

    options = SamplingOptions(max_tokens=20, repetition_penalty=3.0)
    for prompt in prompts(3):
        expected = "".join(token.text for token in stream(loaded, prompt, options))
        assert batch_sample(loaded, [prompt], [0], options)[0].text == expected


def test_models_with_other_state_are_sampled_row_by_row(tmp_path: Path) -> None:
    loaded = load_model(str(tiny.tiny_model(tmp_path / "m", model_type="mamba", overrides=MAMBA)))
    asked = prompts(3)
    answers = batch_sample(loaded, asked, [1, 2, 3], HOT)
    assert batch_sample(loaded, asked[1:2], [2], HOT) == answers[1:2]
    assert batch_sample(loaded, asked[1:2], [9], HOT) != answers[1:2]
