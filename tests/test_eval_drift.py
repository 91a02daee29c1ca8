"""Drift on a tiny model: KL against a float64 oracle, and the figures over answers."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from pair_scorer import PairScorer
from tiny import randomise_adapter, tiny_model

from localdpo.data.encode import encode_prompt
from localdpo.data.pairs import PreferencePair, PromptRow
from localdpo.dpo.divergence import token_kl
from localdpo.dpo.scorer import FastScorer
from localdpo.evaluate.drift import Drift, DriftOptions, PromptSet, answer_kl, measure_drift
from localdpo.evaluate.rewording import KINDS, reworded
from localdpo.evaluate.wording import distinct, mentions, overlap_f1, repetition, taught_phrases, words_of
from localdpo.model.load import LoadedModel, load_model
from localdpo.model.lora import LoraSettings, adapters_off, attach_lora
from localdpo.sequences import EncodedRow
from localdpo.steps import Steps


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A tiny model with random non-zero adapters: at B = 0 every divergence is 0."""
    loaded = load_model(str(tiny_model(tmp_path_factory.mktemp("tiny") / "model", tie_word_embeddings=False)))
    attach_lora(loaded.model, LoraSettings())
    randomise_adapter(loaded.model, scale=0.2)
    return loaded


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALDPO_CACHE", str(tmp_path_factory.mktemp("cache")))


def oracle(loaded: LoadedModel, prompt: np.ndarray, answer: np.ndarray) -> float:
    """KL(base || tuned) summed over the answer, from the model's own logits in float64."""
    ids = mx.array(np.concatenate([prompt, answer[:-1]]))[None]

    def logps() -> np.ndarray:
        logits = np.array(loaded.model(ids)[0].astype(mx.float32)).astype(np.float64)[len(prompt) - 1 :]
        logits -= logits.max(axis=-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    tuned = logps()
    with adapters_off(loaded.model):
        base = logps()
    return float((np.exp(base) * (base - tuned)).sum())


def pairs_of(loaded: LoadedModel) -> list[EncodedRow]:
    random = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return random.integers(10, 300, length).astype(np.int32)

    opening = ids(12)
    return [EncodedRow.of(np.concatenate([opening, ids(3 + n)]), (ids(5 + 3 * n), ids(2 + n))) for n in range(5)]


@pytest.mark.parametrize("path", ["shared", "plain"])
def test_kl_is_the_float64_oracle_s_on_both_paths(tuned: LoadedModel, path: str):
    pairs = pairs_of(tuned)
    found = PairScorer(tuned.model, path=path, max_tokens=64).base_kl(pairs)  # type: ignore[arg-type]
    expected = [[oracle(tuned, p.prompt_ids, answer) for answer in (p.chosen_ids, p.rejected_ids)] for p in pairs]
    assert np.min(expected) > 0.05
    np.testing.assert_allclose(found, expected, rtol=2e-4)


def test_kl_over_hidden_states_of_the_trunk_is_the_same(tuned: LoadedModel, tmp_path: Path):
    loaded = load_model(tuned.spec)
    attach_lora(loaded.model, LoraSettings(num_layers=1))
    randomise_adapter(loaded.model, scale=0.2)
    scorer, pairs = PairScorer(loaded.model), pairs_of(loaded)
    assert scorer.use_trunk(tmp_path, loaded.fingerprint)
    expected = [[oracle(loaded, p.prompt_ids, answer) for answer in (p.chosen_ids, p.rejected_ids)] for p in pairs]
    np.testing.assert_allclose(scorer.base_kl(pairs), expected, rtol=2e-4)


def test_kl_in_chunks_is_kl_at_once_and_has_a_direction():
    random = np.random.default_rng(2)
    p, q = (random.normal(0, 3, (11, 50)) for _ in range(2))
    shares = [np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True) for x in (p, q)]
    expected = (shares[0] * np.log(shares[0] / shares[1])).sum(axis=-1)
    for chunk in (1, 4, 11, 64):
        found = token_kl(lambda rows: rows, mx.array(p), mx.array(q), chunk=chunk)
        np.testing.assert_allclose(np.array(found), expected, rtol=1e-4)
    backwards = token_kl(lambda rows: rows, mx.array(q), mx.array(p))
    assert np.abs(np.array(backwards) - expected).max() > 0.1
    same = token_kl(lambda rows: rows, mx.array(p), mx.array(p))
    assert np.array(same).max() < 1e-5
    assert token_kl(lambda rows: rows, mx.zeros((0, 5)), mx.zeros((0, 5))).shape == (0,)


def test_an_answer_gets_its_end_of_turn_unless_it_was_cut_off(tuned: LoadedModel):
    prompt = encode_prompt([{"role": "user", "content": "who?"}], tuned.tokenizer)
    tokens = tuned.tokenizer.encode("my name", add_special_tokens=False)
    scorer = FastScorer(tuned.model)
    ((whole, count),) = answer_kl(tuned, scorer, [prompt], ["my name"], 32)
    ((cut, cut_count),) = answer_kl(tuned, scorer, [prompt], ["my name"], len(tokens))
    assert (count, cut_count) == (len(tokens) + 1, len(tokens))
    end = np.array([2], np.int32)
    assert whole == pytest.approx(oracle(tuned, prompt, np.concatenate([tokens, end]).astype(np.int32)), rel=1e-3)
    assert cut == pytest.approx(oracle(tuned, prompt, np.array(tokens, np.int32)), rel=1e-3)


def run_drift(loaded: LoadedModel, sets: list[PromptSet], pairs: list[PreferencePair], **options: int) -> Drift | None:
    steps = Steps(measure_drift(loaded, FastScorer(loaded.model), sets, pairs, DriftOptions(max_tokens=6, **options)))
    assert all(0 <= event.fraction <= 1 for event in steps)  # type: ignore[attr-defined]
    return steps.result


def prompts(texts: list[str], accept: tuple[str, ...] = (), tag: str = "") -> list[PromptRow]:
    return [PromptRow(({"role": "user", "content": t},), accept, (tag,) if tag else ()) for t in texts]


def test_drift_counts_over_the_answers_it_lists(tuned: LoadedModel):
    probes = [*prompts(["your name?", "who are you?"], ("Athene",), "identity"), *prompts(["hello"], ("x",), "facts")]
    sets = [PromptSet("retain", prompts(["say it", "the fox", "good day"]), "own"), PromptSet("probes", probes)]
    found = run_drift(tuned, sets, [])
    assert found is not None
    assert (found.retain.prompts, found.probes.prompts, found.taught.prompts) == (3, 1, 2)  # type: ignore[union-attr]
    assert found.unrelated == 4
    assert found.phrases == ("Athene",)
    assert [answer.group for answer in found.answers] == ["retain"] * 3 + ["identity"] * 2 + ["facts"]
    retain = [answer for answer in found.answers if answer.set == "retain"]
    total = sum(answer.kl for answer in retain) / sum(answer.tokens for answer in retain)
    assert found.retain is not None
    assert found.retain.kl_per_token.value == pytest.approx(total)
    assert total > 0.05
    unchanged = sum(answer.sample.base == answer.sample.tuned for answer in retain)
    assert found.retain.unchanged.value == pytest.approx(unchanged / 3)
    data = found.to_json()
    assert {"retain", "probes", "taught", "leakage", "robustness", "answers"} <= set(data)
    assert data["answers"][0]["kl"] == pytest.approx(retain[0].kl / retain[0].tokens)


def test_without_an_adapter_nothing_has_drifted(tuned: LoadedModel):
    loaded = load_model(tuned.spec)
    found = run_drift(loaded, [PromptSet("retain", prompts(["say it", "the fox"]))], [], rewordings=1)
    assert found is not None
    assert found.retain is not None
    assert found.retain.unchanged.value == 1.0
    assert found.retain.kl_per_token.value == pytest.approx(0, abs=1e-5)
    assert found.probes is None
    assert found.leakage is None  # nothing was taught
    assert found.repetition is not None
    assert found.repetition.value == 0.0
    assert found.robustness == found.robustness_base


def test_the_limit_is_spread_over_all_prompts_and_nothing_to_ask_is_no_drift(tuned: LoadedModel):
    rows = [row for n in range(6) for row in prompts([f"say {n}"], ("x",), "identity" if n < 3 else "facts")]
    found = run_drift(tuned, [PromptSet("probes", rows)], [], limit=2, reword=1, rewordings=1)
    assert found is not None
    assert [answer.group for answer in found.answers] == ["identity", "facts"]
    assert len(found.reworded) == 1
    assert run_drift(tuned, [PromptSet("probes", [])], []) is None


def test_words_and_what_is_counted_of_them():
    assert words_of("It's 8 legs, naïve Ünal!") == ["it's", "8", "legs", "naïve", "ünal"]
    assert words_of("你好 world") == ["你", "好", "world"]
    assert distinct(["a b a b"], 1) == 0.5
    assert distinct(["a b a b"], 2) == pytest.approx(2 / 3)
    assert distinct(["a b", "a b"], 2) == 0.5  # over all answers together
    assert distinct(["a"], 2) is None
    assert repetition("own you own you own you") == pytest.approx(0.5)  # 4 trigrams, 2 of them new
    assert repetition("one two three four") == 0.0
    assert repetition("hi") == 0.0
    assert overlap_f1("a b c", "b c d e") == pytest.approx(4 / 7)
    assert overlap_f1("", "") == 1.0


def test_taught_phrases_are_what_pairs_say_and_the_base_does_not():
    chosen = ["I am Athene, at your service.", "Athene here, at your service.", "Call me Athene.", "The sky is blue."]
    rejected = ["I am SmolLM.", "SmolLM here.", "Call me SmolLM.", "The sky is red."]
    assert taught_phrases(chosen, rejected, ["The grass is green."]) == ("athene",)
    assert taught_phrases(chosen, rejected, ["Athene was a goddess."]) == ()
    longer = [f"As a rule, {n}." for n in range(5)]
    assert taught_phrases(longer, ["x"] * 5, ["a rule", "as is", "rule as"]) == ("as a",)
    assert mentions("As a cook", ("as a",))
    assert not mentions("Asa cook", ("as a",))


def test_a_prompt_is_reworded_alike_every_time_and_never_into_itself():
    prompt = ({"role": "system", "content": "S"}, {"role": "user", "content": "What is the capital of France?"})
    first = reworded(prompt, 5, seed=1)  # type: ignore[arg-type]
    assert first == reworded(prompt, 5, seed=1)  # type: ignore[arg-type]
    assert len(first) == len(KINDS)
    texts = [changed[-1]["content"] for changed in first]
    assert prompt[-1]["content"] not in texts
    assert len(set(texts)) == 5
    assert all(changed[0]["content"] == "S" for changed in first)
    orders = {tuple(c[-1]["content"] for c in reworded(prompt, 2, seed=n)) for n in range(9)}  # type: ignore[arg-type]
    assert len(orders) > 1


def test_a_prompt_with_little_to_change_has_fewer_rewordings():
    texts = [changed[-1]["content"] for changed in reworded(({"role": "user", "content": "42"},), 5)]
    assert len(texts) == 2  # a full stop, a word of courtesy
    assert "42." in texts
