"""Hidden states at the cut from disk: the same numbers as running every layer, each state computed once."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_map
from oracles import adapted_model, pair, random_model, random_pairs
from pair_scorer import PairScorer
from tiny import randomise_adapter

from localdpo.core.losses import LossSettings
from localdpo.dpo import trunk as trunk_module
from localdpo.dpo.packing import pack
from localdpo.dpo.scorer import FastScorer
from localdpo.dpo.trunk import TrunkCache, gather, parts_of, scatter
from localdpo.model.lora import LoraSettings, attach_lora
from localdpo.sequences import EncodedRow, sequences_of

LENGTHS = [(12, 4, 7), (3, 6, 2), (9, 1, 5), (12, 3, 3)]
WIDTH = 6


def top_layer_model(architecture: str) -> nn.Module:
    model = random_model(architecture)
    attach_lora(model, LoraSettings(rank=3, scale=2.0, num_layers=1))
    randomise_adapter(model)
    return model


def states_for(pairs: list[EncodedRow], seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Random states of the parts of each pair: its prompt and both answers."""
    rng = np.random.default_rng(seed)
    return [
        {
            key: rng.normal(size=(len(sequence.inputs[tokens]), WIDTH)).astype(np.float32)
            for sequence in row.sequences
            for key, tokens in parts_of(sequence)
        }
        for row in pairs
    ]


def merged(states: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {key: array for some in states for key, array in some.items()}


def assert_kept(cache: TrunkCache, states: dict[str, np.ndarray]) -> None:
    for key, array in states.items():
        np.testing.assert_array_equal(cache.get(key), array)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3_text", "phi3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_equals_running_every_layer(tmp_path: Path, architecture: str, checkpointing: bool) -> None:
    model, pairs = top_layer_model(architecture), random_pairs(1, LENGTHS)
    whole = PairScorer(model, gradient_checkpointing=checkpointing)
    started = PairScorer(model, gradient_checkpointing=checkpointing)
    assert started.cut >= 1
    assert started.use_trunk(tmp_path, "base")
    reference = whole.reference_logps(pairs)
    np.testing.assert_allclose(started.reference_logps(pairs).chosen, reference.chosen, atol=1e-5)
    want = whole.loss_and_grad(pairs, reference, LossSettings(rpo_alpha=0.5))
    for _ in range(2):  # computed, then read
        got = started.loss_and_grad(pairs, reference, LossSettings(rpo_alpha=0.5))
        assert got.loss == pytest.approx(want.loss, abs=1e-6)
        largest = max(float(mx.max(mx.abs(value))) for value in want.grad.values())
        assert largest > 0
        for name, value in want.grad.items():
            np.testing.assert_allclose(np.array(got.grad[name]), np.array(value), rtol=0, atol=1e-5 * largest)
    assert started.trunk_bytes > 0


def test_the_trunk_runs_once_for_reference_policy_and_a_second_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pairs = top_layer_model("llama"), random_pairs(1, LENGTHS)
    bottom, calls = model.layers[0], []
    original = type(bottom).__call__

    def counted(self: nn.Module, *args: object, **kwargs: object) -> object:
        if self is bottom:
            calls.append(1)
        return original(self, *args, **kwargs)

    scorer = PairScorer(model)
    assert scorer.use_trunk(tmp_path, "base")
    reference = scorer.reference_logps(pairs)
    monkeypatch.setattr(type(bottom), "__call__", counted)
    scorer.loss_and_grad(pairs, reference, LossSettings())
    scorer.logps(pairs)
    assert not calls
    again = PairScorer(model)  # proves its path with every layer
    assert again.use_trunk(tmp_path, "base")
    calls.clear()
    again.logps(pairs)
    assert not calls


def test_nothing_to_skip_with_every_layer_adapted(tmp_path: Path) -> None:
    model = random_model("llama")
    attach_lora(model, LoraSettings(rank=2))
    scorer = PairScorer(model)
    assert scorer.cut == 0
    assert not scorer.use_trunk(tmp_path, "base")


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 14), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=5))
def test_gather_undoes_scatter(lengths: list[tuple[int, int, int]]) -> None:
    pairs = random_pairs(2, lengths)
    pairs.append(pair(pairs[0].prompt_ids, pairs[0].rejected_ids, pairs[0].chosen_ids))
    sequences = sequences_of(pairs)
    batch = pack(sequences)
    # A token's state depends on what it has read: copies of a short shared prefix have equal ones.
    states = np.zeros((len(batch.tokens), WIDTH), np.float32)
    for places in batch.paths:
        states[places] = np.cumsum(np.sin(batch.tokens[places][:, None] + np.arange(WIDTH)), axis=0)
    parts = scatter(batch, sequences, states)
    assert {key: len(array) for key, array in parts.items()} == {
        key: len(sequence.inputs[tokens]) for sequence in sequences for key, tokens in parts_of(sequence)
    }
    np.testing.assert_array_equal(gather(batch, sequences, parts), states)


def test_states_survive_and_damage_is_noticed(tmp_path: Path) -> None:
    first, second = states_for(random_pairs(1, LENGTHS))[:2]
    TrunkCache(tmp_path, "a", WIDTH).put(first | second)
    assert_kept(TrunkCache(tmp_path, "a", WIDTH), first | second)
    file = tmp_path / "a" / "states.f32"
    data = bytearray(file.read_bytes())
    data[4 * WIDTH * sum(map(len, first.values())) + 5] ^= 1  # in the second pair's prompt
    file.write_bytes(data)
    cache = TrunkCache(tmp_path, "a", WIDTH)
    damaged, *whole = second
    assert cache.get(damaged) is None
    assert_kept(cache, first | {key: second[key] for key in whole})
    cache.put({damaged: second[damaged]})
    assert_kept(TrunkCache(tmp_path, "a", WIDTH), first | second)


def test_a_torn_write_costs_only_itself(tmp_path: Path) -> None:
    first, *others = states_for(random_pairs(1, LENGTHS))
    TrunkCache(tmp_path, "a", WIDTH).put(first)
    with (tmp_path / "a" / "states.f32").open("ab") as file:
        file.write(b"part of a row")
    cache = TrunkCache(tmp_path, "a", WIDTH)
    cache.put(merged(others))
    assert_kept(cache, merged([first, *others]))


def test_two_writers_keep_each_others_states(tmp_path: Path) -> None:
    states = states_for(random_pairs(1, LENGTHS))
    first, second = TrunkCache(tmp_path, "a", WIDTH), TrunkCache(tmp_path, "a", WIDTH)
    first.put(merged(states[:2]))
    second.put(merged(states[2:]))
    assert_kept(TrunkCache(tmp_path, "a", WIDTH), merged(states))


def test_the_limit_holds_and_old_caches_go_first(tmp_path: Path) -> None:
    states = states_for(random_pairs(1, LENGTHS))
    TrunkCache(tmp_path, "old", WIDTH).put(merged(states))
    room = sum(array.nbytes for array in states[0].values())
    cache = TrunkCache(tmp_path, "new", WIDTH, limit=room)
    assert not (tmp_path / "old").exists()
    cache.put(states[0])
    cache.put(states[1])
    assert cache.nbytes <= room
    assert_kept(cache, states[0])
    assert all(cache.get(key) is None for key in states[1])


def test_a_prompt_is_kept_once_for_all_its_answers(tmp_path: Path) -> None:
    model, prompt = top_layer_model("llama"), range(20)
    scorer = FastScorer(model)
    assert scorer.use_trunk(tmp_path, "base")
    before, width = scorer.trunk_bytes, 4 * 32
    answers = [[n, n + 1, n + 2] for n in range(6)]
    rows = [pair(prompt, first, second) for first, second in zip(answers[::2], answers[1::2], strict=True)]
    for row in rows:  # in three passes
        scorer.logps(row.sequences)
    assert scorer.trunk_bytes - before == width * (20 + 6 * 2)


def test_states_beyond_the_limit_are_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trunk_module, "DEFAULT_LIMIT", 0)
    monkeypatch.setattr(TrunkCache.__init__, "__defaults__", (0,))
    model, pairs = top_layer_model("llama"), random_pairs(1, LENGTHS)
    scorer = PairScorer(model)
    want = scorer.logps(pairs)
    assert scorer.use_trunk(tmp_path, "base")
    np.testing.assert_allclose(scorer.logps(pairs).chosen, want.chosen, atol=1e-5)
    assert scorer.trunk_bytes == 0


def test_layers_that_hand_on_more_than_hidden_states_run_whole(tmp_path: Path) -> None:
    """Gemma 4's give keys and values to later layers: the probe finds out, and nothing else changes."""
    model, pairs = adapted_model("gemma4_text", num_layers=1), random_pairs(1, LENGTHS)
    scorer = PairScorer(model)
    want = scorer.logps(pairs)
    assert scorer.cut == 2
    assert not scorer.use_trunk(tmp_path, "base")
    np.testing.assert_array_equal(scorer.logps(pairs).chosen, want.chosen)


def test_another_adapter_uses_the_same_states_and_never_the_frozen_weights(tmp_path: Path) -> None:
    model, pairs = adapted_model("llama", num_layers=1, num_hidden_layers=3), random_pairs(1, LENGTHS)
    first = PairScorer(model)
    assert first.use_trunk(tmp_path, "base")
    first.logps(pairs)
    randomise_adapter(model, 77, 0.1)
    want = PairScorer(model).logps(pairs)
    again = PairScorer(model)
    assert again.use_trunk(tmp_path, "base")
    for layer in model.layers[:2]:  # whoever reads these weights now gets NaN
        layer.update(tree_map(lambda value: mx.full(value.shape, mx.nan), layer.parameters()))
    np.testing.assert_allclose(again.logps(pairs).chosen, want.chosen, atol=1e-5)
    np.testing.assert_allclose(again.logps(pairs).rejected, want.rejected, atol=1e-5)


@pytest.mark.parametrize("name", ["index.sqlite", "states.f32"])
def test_a_foreign_file_starts_afresh(name: str, tmp_path: Path) -> None:
    states = merged(states_for(random_pairs(1, LENGTHS)))
    TrunkCache(tmp_path, "a", WIDTH).put(states)
    (tmp_path / "a" / name).write_bytes(b"not what was here" * 9)
    cache = TrunkCache(tmp_path, "a", WIDTH)
    assert all(len(array) == 0 or cache.get(key) is None for key, array in states.items())
    cache.put(states)
    assert_kept(TrunkCache(tmp_path, "a", WIDTH), states)


def test_a_folder_that_cannot_be_made_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model, pairs = top_layer_model("llama"), random_pairs(1, LENGTHS)
    scorer = PairScorer(model)
    want = scorer.logps(pairs)
    assert scorer.use_trunk(tmp_path / "file", "base")
    np.testing.assert_allclose(scorer.logps(pairs).chosen, want.chosen, atol=1e-5)
    assert scorer.trunk_bytes == 0
