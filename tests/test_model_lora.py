"""Adapters: mlx-lm's modules and files, switched off exactly, validated before the model is touched."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from localdpo.errors import InputError
from localdpo.files import verify_folder
from localdpo.model.generate import SamplingOptions, stream
from localdpo.model.load import LoadedModel, load_model
from localdpo.model.lora import (
    FastLoRALinear,
    LoraSettings,
    adapter_weights,
    adapters_off,
    attach_lora,
    detach_lora,
    load_adapter,
    lora_scale,
    save_adapter,
)

IDS = mx.array([[5, 6, 7, 8, 9, 300, 17]])
LINEARS = {
    "mlp.down_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "self_attn.k_proj",
    "self_attn.o_proj",
    "self_attn.q_proj",
    "self_attn.v_proj",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_model(tmp_path_factory.mktemp("m") / "base", quantize=4, num_hidden_layers=3)


@pytest.fixture
def loaded(folder: Path) -> LoadedModel:
    return load_model(str(folder))


def _logits(model: nn.Module) -> np.ndarray:
    return np.array(model(IDS))


def _mixture(folder: Path) -> LoadedModel:
    overrides = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return load_model(str(tiny.tiny_model(folder, model_type="mixtral", quantize=4, overrides=overrides)))


def test_fresh_adapters_change_nothing_and_only_they_train(loaded: LoadedModel) -> None:
    before = _logits(loaded.model)
    info = attach_lora(loaded.model, LoraSettings(rank=4))
    np.testing.assert_array_equal(_logits(loaded.model), before)
    names = {name for name, _ in tree_flatten(loaded.model.trainable_parameters())}
    assert names == set(adapter_weights(loaded.model))
    assert set(info.keys) == LINEARS
    assert info.num_layers == 3
    per_layer = 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    assert info.trainable == 3 * per_layer
    assert sum(value.size for _, value in tree_flatten(loaded.model.trainable_parameters())) == info.trainable


def test_initial_values(loaded: LoadedModel) -> None:
    attach_lora(loaded.model, LoraSettings(rank=4, seed=7))
    for name, value in adapter_weights(loaded.model).items():
        if name.endswith("lora_b"):
            assert not value.any().item()
        else:  # mlx-lm: uniform within 1/sqrt(input)
            bound = value.shape[0] ** -0.5
            assert 0.8 * bound < mx.abs(value).max().item() <= bound


@pytest.mark.parametrize("seed", [0, 7])
def test_the_seed_decides(folder: Path, seed: int) -> None:
    def weights(seed: int, disturb: int) -> dict[str, mx.array]:
        mx.random.seed(disturb)  # mlx's global state has no part in it
        model = load_model(str(folder)).model
        attach_lora(model, LoraSettings(seed=seed))
        return adapter_weights(model)

    first, again, other = weights(seed, 1), weights(seed, 2), weights(seed + 1, 1)
    a = "model.layers.0.mlp.up_proj.lora_a"
    assert all(mx.array_equal(first[name], again[name]) for name in first)
    assert not mx.array_equal(first[a], other[a])
    assert not mx.array_equal(first[a], first[a.replace("up", "gate")])


def test_the_scale() -> None:
    assert lora_scale(16, 8) == 2
    assert lora_scale(16, 16, use_rslora=True) == 4


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
@pytest.mark.parametrize("bits", [None, 4])
def test_our_module_is_mlx_lms_function(dtype: mx.Dtype, bits: int | None) -> None:
    mx.random.seed(3)
    base: nn.Module = nn.Linear(64, 48)
    base = base if bits is None else nn.QuantizedLinear.from_linear(base, 32, bits)
    theirs = LoRALinear.from_base(base, r=8, scale=1.7)
    ours = FastLoRALinear(64, 48, r=8, scale=1.7)
    ours.linear = base
    theirs.lora_b = mx.random.normal((8, 48)) * 0.3
    ours.lora_a, ours.lora_b = theirs.lora_a, theirs.lora_b
    x = mx.random.normal((2, 5, 64)).astype(dtype)
    assert ours(x).dtype == theirs(x).dtype
    np.testing.assert_allclose(np.array(ours(x)), np.array(theirs(x)), rtol=1e-6, atol=2e-6)

    def gradients(module: nn.Module) -> list[np.ndarray]:
        module.freeze()
        module.unfreeze(keys=["lora_a", "lora_b"], recurse=False)

        def total(parameters: dict[str, Any], x: mx.array) -> mx.array:
            module.update(parameters)
            return mx.sin(module(x).astype(mx.float32)).sum()

        parameters, inputs = mx.grad(total, argnums=(0, 1))(module.trainable_parameters(), x)
        return [np.array(value) for _, value in sorted(tree_flatten(parameters))] + [np.array(inputs)]

    for got, want in zip(gradients(ours), gradients(theirs), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 if dtype == mx.float16 else 1e-5)


def test_the_gradient_is_that_of_finite_differences(loaded: LoadedModel) -> None:
    attach_lora(loaded.model, LoraSettings(rank=4))
    tiny.randomise_adapter(loaded.model)
    name = "model.layers.1.self_attn.v_proj"
    module = loaded.model.model.layers[1].self_attn.v_proj

    def total(b: mx.array) -> mx.array:
        module.lora_b = b
        return mx.tanh(loaded.model(IDS)).sum()

    b = module.lora_b
    direction = mx.random.normal(b.shape, key=mx.random.key(1))
    slope = (mx.grad(total)(b) * direction).sum().item()
    step = 1e-3
    difference = (total(b + step * direction) - total(b - step * direction)).item() / (2 * step)
    assert slope == pytest.approx(difference, rel=2e-2), name


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("all-linear", LINEARS),
        ("attention", {name for name in LINEARS if name.startswith("self_attn")}),
        ("mlp", {name for name in LINEARS if name.startswith("mlp")}),
        (["q_proj", "mlp.up_proj"], {"self_attn.q_proj", "mlp.up_proj"}),
        ("v_proj", {"self_attn.v_proj"}),
    ],
)
def test_target_modules(loaded: LoadedModel, target: Any, expected: set[str]) -> None:
    info = attach_lora(loaded.model, LoraSettings(target_modules=target))
    assert set(info.keys) == expected
    adapted = {name.split(".", 3)[3].rsplit(".", 1)[0] for name in adapter_weights(loaded.model)}
    assert adapted == expected


def test_unknown_modules_are_all_named_with_what_there_is(loaded: LoadedModel) -> None:
    with pytest.raises(InputError) as caught:
        attach_lora(loaded.model, LoraSettings(target_modules=["q_proj", "queries", "proj"]))
    assert len(caught.value.problems) == 2
    assert "'queries'" in str(caught.value)
    assert "self_attn.q_proj" in str(caught.value)
    with pytest.raises(InputError):
        attach_lora(loaded.model, LoraSettings(target_modules=[]))


def test_the_top_layers(loaded: LoadedModel) -> None:
    info = attach_lora(loaded.model, LoraSettings(num_layers=2))
    assert info.num_layers == 2
    assert {name.split(".")[2] for name in adapter_weights(loaded.model)} == {"1", "2"}


@pytest.mark.parametrize("count", [0, 4, -2])
def test_impossible_layer_counts(loaded: LoadedModel, count: int) -> None:
    with pytest.raises(InputError, match="within 1 to 3"):
        attach_lora(loaded.model, LoraSettings(num_layers=count))


def test_attaching_twice_is_refused(loaded: LoadedModel) -> None:
    attach_lora(loaded.model, LoraSettings())
    with pytest.raises(InputError, match="already"):
        attach_lora(loaded.model, LoraSettings())


def test_experts_are_adapted_and_routers_are_not(tmp_path: Path) -> None:
    loaded = _mixture(tmp_path / "m")
    before = _logits(loaded.model)
    info = attach_lora(loaded.model, LoraSettings(rank=4))
    assert "block_sparse_moe.switch_mlp.up_proj" in info.keys
    assert not any(key.endswith("gate") for key in info.keys)
    experts = loaded.model.model.layers[0].block_sparse_moe.switch_mlp.up_proj
    assert isinstance(experts, LoRASwitchLinear)
    assert experts.lora_a.shape == (4, 4, 64)
    np.testing.assert_array_equal(_logits(loaded.model), before)
    tiny.randomise_adapter(loaded.model)
    assert np.abs(_logits(loaded.model) - before).max() > 0.01
    with adapters_off(loaded.model):
        np.testing.assert_array_equal(_logits(loaded.model), before)


def test_a_router_by_name(tmp_path: Path) -> None:
    info = attach_lora(_mixture(tmp_path / "m").model, LoraSettings(target_modules=["block_sparse_moe.gate"]))
    assert info.keys == ("block_sparse_moe.gate",)


def test_adapters_off_is_the_exact_base(loaded: LoadedModel) -> None:
    base = _logits(loaded.model)
    attach_lora(loaded.model, LoraSettings())
    tiny.randomise_adapter(loaded.model)
    tuned = _logits(loaded.model)
    assert np.abs(tuned - base).max() > 0.1
    with adapters_off(loaded.model):
        np.testing.assert_array_equal(_logits(loaded.model), base)
        with adapters_off(loaded.model):
            np.testing.assert_array_equal(_logits(loaded.model), base)
        np.testing.assert_array_equal(_logits(loaded.model), base)
    np.testing.assert_array_equal(_logits(loaded.model), tuned)
    with pytest.raises(RuntimeError, match="inside"), adapters_off(loaded.model):
        raise RuntimeError("inside")
    np.testing.assert_array_equal(_logits(loaded.model), tuned)
    detach_lora(loaded.model)
    np.testing.assert_array_equal(_logits(loaded.model), base)


def test_adapters_off_ignores_dropout(loaded: LoadedModel) -> None:
    base = _logits(loaded.model)
    attach_lora(loaded.model, LoraSettings(dropout=0.5))
    tiny.randomise_adapter(loaded.model)
    loaded.model.train()
    assert np.abs(_logits(loaded.model) - _logits(loaded.model)).max() > 0
    with adapters_off(loaded.model):
        np.testing.assert_array_equal(_logits(loaded.model), base)


def test_dora_cannot_be_switched_off(loaded: LoadedModel) -> None:
    attention = loaded.model.model.layers[0].self_attn
    attention.q_proj = DoRALinear.from_base(attention.q_proj)
    with pytest.raises(InputError, match="DoRA"), adapters_off(loaded.model):
        pass


def test_an_update_moves_the_adapter_and_leaves_the_base(loaded: LoadedModel) -> None:
    model = loaded.model
    info = attach_lora(model, LoraSettings())
    with adapters_off(model):
        base = {name: np.array(value) for name, value in tree_flatten(model.parameters())}
    model.train()
    optimizer = optim.SGD(learning_rate=0.1)
    _, gradients = nn.value_and_grad(model, lambda: model(IDS).square().mean())()
    optimizer.update(model, gradients)
    assert any(value.any().item() for name, value in adapter_weights(model).items() if name.endswith("lora_b"))
    with adapters_off(model):
        after = dict(tree_flatten(model.parameters()))
    assert after.keys() == base.keys()
    assert all(np.array_equal(base[name], np.array(after[name])) for name in base)
    assert info.trainable > 0


@pytest.fixture
def saved(loaded: LoadedModel, tmp_path: Path) -> Path:
    info = attach_lora(
        loaded.model, LoraSettings(rank=4, scale=1.5, num_layers=2, target_modules=["q_proj", "up_proj"])
    )
    tiny.randomise_adapter(loaded.model, scale=0.5)
    save_adapter(tmp_path / "adapter", loaded.model, info, loaded)
    return tmp_path / "adapter"


def test_a_saved_folder_is_mlx_lms(saved: Path, loaded: LoadedModel) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == 2
    assert config["lora_parameters"] == {
        "rank": 4,
        "scale": 1.5,
        "dropout": 0.0,
        "keys": ["mlp.up_proj", "self_attn.q_proj"],
    }
    assert (config["model"], config["base_fingerprint"]) == (loaded.spec, loaded.fingerprint)
    assert verify_folder(saved) == []
    shapes = {name: value.shape for name, value in mx.load(str(saved / "adapters.safetensors")).items()}
    assert shapes["model.layers.2.mlp.up_proj.lora_a"] == (64, 4)
    assert shapes["model.layers.2.mlp.up_proj.lora_b"] == (4, 96)
    assert len(shapes) == 8


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_round_trip(saved: Path, loaded: LoadedModel, folder: Path, memory: Any) -> None:
    other = load_model(str(folder), memory=memory)
    info = load_adapter(saved, other)
    assert (info.rank, info.scale, info.num_layers) == (4, 1.5, 2)
    np.testing.assert_allclose(_logits(other.model), _logits(loaded.model), atol=1e-5)
    assert {name for name, _ in tree_flatten(other.model.trainable_parameters())} == set(adapter_weights(loaded.model))


def test_mlx_lm_says_the_same_with_our_adapter(saved: Path, loaded: LoadedModel, folder: Path) -> None:
    model, tokenizer = mlx_lm.load(str(folder), adapter_path=str(saved))
    prompt = [5, 6, 7, 8]
    theirs = mlx_lm.generate(model, tokenizer, prompt, max_tokens=24)
    ours = "".join(token.text for token in stream(loaded, prompt, SamplingOptions(max_tokens=24)))
    assert ours == theirs
    with adapters_off(loaded.model):
        assert ours != "".join(token.text for token in stream(loaded, prompt, SamplingOptions(max_tokens=24)))


@pytest.mark.parametrize("keys", [None, ["self_attn.v_proj"]])
def test_an_adapter_of_mlx_lms_making(
    loaded: LoadedModel, folder: Path, tmp_path: Path, keys: list[str] | None
) -> None:
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0} | ({"keys": keys} if keys else {})
    model, _ = mlx_lm.load(str(folder))
    linear_to_lora_layers(model, 2, parameters)
    tiny.randomise_adapter(model)
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), adapter_weights(model))
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    info = load_adapter(tmp_path, loaded)
    assert set(info.keys) == (set(keys) if keys else LINEARS)
    np.testing.assert_allclose(_logits(loaded.model), np.array(model(IDS)), rtol=1e-3, atol=1e-3)


def test_loading_replaces_what_is_attached(saved: Path, folder: Path) -> None:
    once, twice = load_model(str(folder)), load_model(str(folder))
    load_adapter(saved, once)
    attach_lora(twice.model, LoraSettings(rank=2))
    tiny.randomise_adapter(twice.model, seed=9)
    load_adapter(saved, twice)
    np.testing.assert_array_equal(_logits(once.model), _logits(twice.model))


def _change(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / name
        config = json.loads(file.read_text())
        for key, value in changes.items():
            (config["lora_parameters"] if key in config["lora_parameters"] else config)[key] = value
        file.write_text(json.dumps(config))

    return edit


def _weights(edit: Callable[[dict[str, mx.array]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        file = str(folder / "adapters.safetensors")
        weights = dict(mx.load(file))
        mx.eval(list(weights.values()))
        edit(weights)
        mx.save_safetensors(file, weights)

    return rewrite


_FIRST = "model.layers.1.mlp.up_proj.lora_a"
_CONFIG = "adapter_config.json"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_change(_CONFIG, base_fingerprint="0" * 64, model="other"), "another base ('other')"),
        (_change(_CONFIG, fine_tune_type="dora"), "'dora'"),
        (_change(_CONFIG, num_layers=9), "within 1 to 3"),
        (_change(_CONFIG, num_layers="2"), "lacks"),
        (_change(_CONFIG, lora_parameters=None), "lacks"),
        (_change(_CONFIG, rank=8), "expected [64, 8]"),
        (_change(_CONFIG, rank=0), "rank 0"),
        (_change(_CONFIG, scale=None), "scale None"),
        (_change(_CONFIG, scale=math.nan), "scale nan"),
        (_change(_CONFIG, dropout=1.0), "dropout 1.0"),
        (_change(_CONFIG, keys=["lm_head"]), "'lm_head'"),
        (_change(_CONFIG, keys="q_proj"), "list"),
        (_change(_CONFIG, keys=["self_attn.q_proj"]), "no place"),
        (_weights(lambda weights: weights.pop(_FIRST)), f"lacks {_FIRST}"),
        (_weights(lambda weights: weights.update({"extra": mx.ones((1,))})), "holds extra"),
        (_weights(lambda weights: weights.update({_FIRST: mx.full((64, 4), math.nan)})), "not finite"),
        (_weights(lambda weights: weights.update({_FIRST: mx.full((64, 4), math.inf)})), "not finite"),
        (_weights(lambda weights: weights.update({_FIRST: mx.ones((4, 64))})), "[4, 64]"),
        (lambda folder: os.truncate(folder / "adapters.safetensors", 900), "damaged"),
        (lambda folder: (folder / "adapters.safetensors").unlink(), "missing"),
        (lambda folder: (folder / _CONFIG).unlink(), "missing"),
        (lambda folder: (folder / _CONFIG).write_text("{"), "JSON"),
    ],
)
def test_a_bad_adapter_leaves_the_model_as_it_was(
    saved: Path, folder: Path, damage: Callable[[Path], Any], words: str
) -> None:
    damage(saved)
    other = load_model(str(folder))
    attach_lora(other.model, LoraSettings(rank=2))
    tiny.randomise_adapter(other.model)
    before = _logits(other.model)
    with pytest.raises(InputError) as caught:
        load_adapter(saved, other)
    assert words in str(caught.value)
    np.testing.assert_array_equal(_logits(other.model), before)


def test_another_base_can_be_allowed(saved: Path, tmp_path: Path) -> None:
    other = load_model(str(tiny.tiny_model(tmp_path / "other", seed=5, num_hidden_layers=3)))
    with pytest.raises(InputError, match="another base"):
        load_adapter(saved, other)
    assert load_adapter(saved, other, any_base=True).rank == 4


def test_many_missing_tensors_are_summed_up(saved: Path, folder: Path) -> None:
    _change(_CONFIG, keys=sorted(LINEARS), num_layers=3)(saved)
    with pytest.raises(InputError, match="more such problems") as caught:
        load_adapter(saved, load_model(str(folder)))
    assert len(caught.value.problems) == 11


@pytest.mark.slow  # test_serve_cli's test_one_answer_by_every_way asks mlx-lm, too
def test_the_starter_with_an_adapter_in_mlx_lm(starter: Path, tmp_path: Path) -> None:
    loaded = load_model("smollm2-135m")
    info = attach_lora(loaded.model, LoraSettings(num_layers=4))
    tiny.randomise_adapter(loaded.model, scale=0.02)
    save_adapter(tmp_path / "a", loaded.model, info, loaded)
    prompt = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name two colours."}], add_generation_prompt=True
    )
    ours = [token.id for token in stream(loaded, prompt, SamplingOptions(max_tokens=10))]
    model, tokenizer = mlx_lm.load(str(starter), adapter_path=str(tmp_path / "a"))
    theirs = [answer.token for answer in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=10)]
    assert ours == theirs


def test_a_fresh_adapter_with_dropout_answers_the_same_twice(folder: Path) -> None:
    model = load_model(str(folder)).model
    attach_lora(model, LoraSettings(rank=2, dropout=0.5))
    tiny.randomise_adapter(model)
    np.testing.assert_array_equal(_logits(model), _logits(model))
