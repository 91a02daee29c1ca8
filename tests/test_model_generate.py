"""Generation: streams, sampling options, and batches that answer as if decoded one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny

from localdpo.errors import InputError
from localdpo.model import generate, prefix
from localdpo.model.generate import SamplingOptions, batch_greedy, stream
from localdpo.model.load import LoadedModel, load_model

MAMBA = {"state_size": 8, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 4}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(tiny.tiny_model(tmp_path_factory.mktemp("m") / "base", quantize=4)))


def _prompts(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(4, 320, size=rng.integers(1, 30)).astype(np.int32) for _ in range(count)]


def _one_by_one(loaded: LoadedModel, prompts: list[np.ndarray], max_tokens: int) -> list[str]:
    options = SamplingOptions(max_tokens=max_tokens)
    return ["".join(token.text for token in stream(loaded, prompt, options)) for prompt in prompts]


def test_a_stream_is_mlx_lms_answer(loaded: LoadedModel) -> None:
    prompt = [5, 6, 7]
    tokens = list(stream(loaded, prompt, SamplingOptions(max_tokens=12)))
    text = "".join(token.text for token in tokens)
    assert text == mlx_lm.generate(loaded.model, loaded.tokenizer, prompt, max_tokens=12)
    assert [token.finish_reason for token in tokens[:-1]] == [None] * (len(tokens) - 1)
    assert tokens[-1].finish_reason in ("stop", "length")
    assert all(token.tps > 0 for token in tokens)


def test_messages_go_through_the_chat_template(loaded: LoadedModel) -> None:
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    ids = loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    options = SamplingOptions(max_tokens=6)
    assert [t.id for t in stream(loaded, messages, options)] == [t.id for t in stream(loaded, ids, options)]


def test_cancelling_stops_before_the_next_token(loaded: LoadedModel) -> None:
    seen: list[int] = []
    for token in stream(loaded, [5, 6, 7], SamplingOptions(max_tokens=40), lambda: len(seen) == 3):
        seen.append(token.id)
    assert len(seen) == 3


def test_an_empty_prompt(loaded: LoadedModel) -> None:
    with pytest.raises(ValueError, match="empty"):
        next(stream(loaded, []))


def test_the_end_of_turn_stops(loaded: LoadedModel) -> None:
    prompt = [5, 6, 7]
    third = list(stream(loaded, prompt, SamplingOptions(max_tokens=12)))[2].id
    ends = loaded.tokenizer.eos_token_ids
    loaded.tokenizer.eos_token_ids = {third}
    try:
        tokens = list(stream(loaded, prompt, SamplingOptions(max_tokens=12)))
        assert tokens[-1].finish_reason == "stop"
        assert len(tokens) <= 3
        assert batch_greedy(loaded, [prompt], 12) == ["".join(token.text for token in tokens)]
    finally:
        loaded.tokenizer.eos_token_ids = ends


def test_sampling_is_reproducible_and_really_samples(loaded: LoadedModel) -> None:
    def sample(seed: int, **options: Any) -> list[int]:
        chosen = SamplingOptions(max_tokens=16, temperature=2.0, seed=seed, **options)
        return [token.id for token in stream(loaded, [5, 6, 7], chosen)]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    greedy = [token.id for token in stream(loaded, [5, 6, 7], SamplingOptions(max_tokens=16))]
    assert sample(1) != greedy
    assert sample(1, top_k=1) == greedy
    assert sample(1, top_p=1e-6) == greedy
    assert sample(1, min_p=1.0) == greedy


def test_the_repetition_penalty_applies(loaded: LoadedModel) -> None:
    plain = [token.id for token in stream(loaded, [5, 6, 7], SamplingOptions(max_tokens=30))]
    punished = SamplingOptions(max_tokens=30, repetition_penalty=5.0)
    varied = [token.id for token in stream(loaded, [5, 6, 7], punished)]
    assert varied != plain
    assert len(set(varied)) > len(set(plain))


def test_options_out_of_range_are_all_named() -> None:
    with pytest.raises(InputError) as caught:
        SamplingOptions(max_tokens=0, temperature=-1, top_p=0, top_k=-1, min_p=2, repetition_penalty=0)
    assert [problem.where for problem in caught.value.problems] == [
        "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
    ]  # fmt: skip
    with pytest.raises(InputError):
        SamplingOptions(temperature=float("nan"))


def test_global_random_state_is_left_alone_by_greedy_decoding(loaded: LoadedModel) -> None:
    mx.random.seed(5)
    expected = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(5)
    list(stream(loaded, [5, 6, 7], SamplingOptions(max_tokens=4)))
    batch_greedy(loaded, [[5, 6, 7]], 4)
    assert mx.random.uniform(shape=(4,)).tolist() == expected


@pytest.mark.parametrize("rows", [1, 3, generate.BATCH_ROWS])
def test_a_batch_answers_like_one_by_one(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(generate, "BATCH_ROWS", rows)
    prompts = _prompts(9)
    assert batch_greedy(loaded, prompts, 20) == _one_by_one(loaded, prompts, 20)


@pytest.mark.parametrize("prefill", [1, 64])
@pytest.mark.parametrize("shared", [1, 5, 40])
def test_what_prompts_begin_with_runs_once(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, shared: int, prefill: int
) -> None:
    """Rows of very different lengths, one that is hardly longer than the prefix, two that are equal."""
    monkeypatch.setattr(generate, "PREFILL_TOKENS", prefill)
    start = np.arange(100, 100 + shared, dtype=np.int32)
    own = [np.array([4], np.int32), *_prompts(6, seed=8), np.arange(5, 65, dtype=np.int32)]
    prompts = [np.concatenate([start, rest]) for rest in own]
    prompts.append(prompts[2])
    assert prefix.shared_length(prompts) >= shared
    alone = [generate.batch_greedy(loaded, [prompt], 12)[0] for prompt in prompts]
    assert alone == _one_by_one(loaded, prompts, 12)
    assert batch_greedy(loaded, prompts, 12) == alone


def test_how_long_the_shared_part_is() -> None:
    assert prefix.shared_length([[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert prefix.shared_length([[1, 2, 3], [1, 2, 3]]) == 2  # each keeps a token of its own
    assert prefix.shared_length([[1, 2, 3], [2]]) == 0
    assert prefix.shared_length([[1, 2], [2, 2]]) == 0
    assert prefix.shared_length([[1, 2, 3]]) == 0
    assert prefix.shared_length([]) == 0


@pytest.mark.parametrize("prefill", [1, 7, 64])
def test_prompts_in_pieces(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, prefill: int) -> None:
    monkeypatch.setattr(generate, "PREFILL_TOKENS", prefill)
    prompts = _prompts(4, seed=2)
    assert batch_greedy(loaded, prompts, 8) == _one_by_one(loaded, prompts, 8)


def test_rows_that_finish_early_do_not_disturb_the_others(loaded: LoadedModel) -> None:
    prompts = _prompts(12, seed=3)
    answers = [[token.id for token in stream(loaded, p, SamplingOptions(max_tokens=16))] for p in prompts]
    common = max({token for answer in answers for token in answer}, key=lambda t: sum(t in a for a in answers))
    ends = loaded.tokenizer.eos_token_ids
    loaded.tokenizer.eos_token_ids = ends | {common}
    try:
        expected = _one_by_one(loaded, prompts, 16)
        assert len({len(text) for text in expected}) > 2
        assert batch_greedy(loaded, prompts, 16) == expected
    finally:
        loaded.tokenizer.eos_token_ids = ends


@pytest.mark.parametrize(
    "changes",
    [
        {"overrides": SLIDING},
        {"model_type": "qwen3", "tie_word_embeddings": False},
        {"model_type": "mamba", "overrides": MAMBA},
    ],
    ids=["sliding window", "qwen3", "no attention"],
)
def test_other_kinds_of_state(tmp_path: Path, changes: dict[str, Any]) -> None:
    loaded = load_model(str(tiny.tiny_model(tmp_path / "m", **changes)))
    prompts = _prompts(5, seed=4)
    assert batch_greedy(loaded, prompts, 14) == _one_by_one(loaded, prompts, 14)


def test_progress_counts_answers(loaded: LoadedModel) -> None:
    seen: list[tuple[int, int]] = []
    batch_greedy(loaded, _prompts(5), 6, lambda done, wanted: seen.append((done, wanted)))
    assert seen[-1] == (5, 5)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_no_prompts_and_no_tokens(loaded: LoadedModel) -> None:
    assert batch_greedy(loaded, [], 5) == []
    with pytest.raises(ValueError, match="max_tokens"):
        batch_greedy(loaded, [[5]], 0)


def test_the_starter_in_a_batch(starter: Path) -> None:
    loaded = load_model("smollm2-135m")
    questions = ["What is the capital of France?", "Name two colours.", "How many legs has a spider? Say a number."]
    prompts = [
        loaded.tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        for text in questions
    ]
    answers = batch_greedy(loaded, prompts, 12)
    assert answers[0] == "The capital of France is Paris."
    assert answers == _one_by_one(loaded, prompts, 12)
