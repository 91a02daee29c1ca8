"""Loading: the same function however a CPU computes it, a fingerprint of content, errors in words."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import psutil
import pytest
import tiny

from localdpo.errors import EnvironmentFault, InputError
from localdpo.model import device as device_module
from localdpo.model import frozen
from localdpo.model import load as load_module
from localdpo.model.device import core_streams, describe_device, lane_streams, on_cpu, prepare_device
from localdpo.model.generate import SamplingOptions, stream
from localdpo.model.load import choose_memory, load_model

VARIANTS: dict[str, dict[str, Any]] = {
    "4-bit": {"quantize": 4},
    "8-bit untied": {"quantize": 8, "tie_word_embeddings": False},
    "4-bit with biases": {"model_type": "qwen2", "quantize": 4, "dtype": mx.float16},
    "float16": {"dtype": mx.float16},
    "bfloat16 untied": {"dtype": mx.bfloat16, "tie_word_embeddings": False, "model_type": "qwen3"},
    "float32": {},
}
IDS = mx.array([[5, 6, 7, 8, 9, 300, 17], [1, 1, 2, 40, 41, 42, 43]])

pytestmark = pytest.mark.skipif(not on_cpu(), reason="float32 on a CPU is what these tests are about")


def _logits_and_gradient(model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    embedded = model.model.embed_tokens(IDS)

    def total(hidden: mx.array) -> mx.array:
        return mx.sin(model(IDS, input_embeddings=hidden)).sum()

    return np.array(model(IDS)), np.array(mx.grad(total)(embedded))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk_bytes", [frozen.CHUNK_BYTES, 4096])
def test_fast_and_lean_are_the_same_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str, chunk_bytes: int
) -> None:
    monkeypatch.setattr(frozen, "CHUNK_BYTES", chunk_bytes)
    folder = tiny.tiny_model(tmp_path / "m", **VARIANTS[variant])
    fast, lean = (load_model(str(folder), memory=memory) for memory in ("fast", "lean"))
    assert (fast.memory, lean.memory) == ("fast", "lean")
    for ours, theirs in zip(_logits_and_gradient(fast.model), _logits_and_gradient(lean.model), strict=True):
        assert ours.dtype == np.float32
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(ours).max()
    assert fast.num_parameters == lean.num_parameters
    assert fast.fingerprint == lean.fingerprint


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_mlx_lm_in_float32(tmp_path: Path, variant: str, memory: Any) -> None:
    folder = tiny.tiny_model(tmp_path / "m", **VARIANTS[variant])
    reference, _ = mlx_lm.load(str(folder))
    reference.set_dtype(mx.float32)
    loaded = load_model(str(folder), memory=memory)
    np.testing.assert_allclose(np.array(loaded.model(IDS)), np.array(reference(IDS)), rtol=2e-4, atol=2e-4)


def test_lean_keeps_what_is_stored(tmp_path: Path) -> None:
    packed = load_model(str(tiny.tiny_model(tmp_path / "q", quantize=4)), memory="lean").model
    assert packed.model.layers[0].mlp.up_proj.weight.dtype == mx.uint32
    half = load_model(str(tiny.tiny_model(tmp_path / "h", dtype=mx.float16)), memory="lean").model
    assert half.model.layers[0].mlp.up_proj.weight.dtype == mx.float16
    assert half.model.norm.weight.dtype == mx.float32


def test_lean_gives_freed_memory_back_at_once(tmp_path: Path) -> None:
    mx.set_cache_limit(32 << 20)
    model = load_model(str(tiny.tiny_model(tmp_path / "q", quantize=4)), memory="lean").model
    mx.clear_cache()
    mx.eval(model(IDS))
    assert mx.get_cache_memory() == 0


def test_lean_never_holds_a_whole_dense_head() -> None:
    head = frozen._lean_layer(nn.QuantizedEmbedding(16384, 512, 64, 4))
    assert head is not None
    x = mx.random.normal((2, 512))
    mx.eval(x, head.parameters())
    dense = 16384 * 512 * 4
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen, "CHUNK_BYTES", dense // 32)
        mx.eval(mx.grad(lambda x: head.as_linear(x).square().sum())(x))
    assert mx.get_peak_memory() - before < dense / 4


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_dense_weight_is_the_layers_weight(tmp_path: Path, variant: str, memory: Any) -> None:
    model = load_model(str(tiny.tiny_model(tmp_path / "m", **VARIANTS[variant])), memory=memory).model
    layer = model.model.layers[1].mlp.down_proj
    width, rows = frozen.linear_dims(layer)
    assert (width, rows) == (96, 64)
    product = layer(mx.eye(width)) - (layer.bias if "bias" in layer else 0)
    np.testing.assert_allclose(np.array(frozen.dense_weight(layer)), np.array(product.T), atol=1e-5)
    part = frozen.dense_weight(layer, 3, 9)
    assert part.dtype == mx.float32
    np.testing.assert_array_equal(np.array(part), np.array(frozen.dense_weight(layer))[3:9])


@pytest.mark.parametrize(("rows", "columns"), [(49152, 576), (1536, 576), (151936, 4096), (97, 64), (64, 96)])
def test_row_blocks_divide_the_weight(rows: int, columns: int) -> None:
    block = frozen.row_block(rows, columns)
    if rows in (97, 64):
        assert block in (0, 16, 32)
    if block:
        assert rows % block == 0
        assert block < rows
        assert block * columns <= frozen.ROW_PRODUCT


@pytest.mark.parametrize("shape", [(64,), (1, 64), (1, 1, 64), (2, 1, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_single_rows_take_another_way_to_the_same_result(shape: tuple[int, ...], bias: bool) -> None:
    layer, embedding = frozen.FastLinear(64, 96, bias=bias), frozen.FastEmbedding(96, 64)
    for module in (layer, embedding):
        frozen._cut_for_single_rows(module, 16)
        assert "_blocks" not in module.parameters()
    x = mx.random.normal(shape, key=mx.random.key(1))
    np.testing.assert_allclose(np.array(layer(x)), np.array(nn.Linear.__call__(layer, x)), atol=1e-6)
    np.testing.assert_allclose(np.array(embedding.as_linear(x)), np.array(x @ embedding.weight.T), atol=1e-5)
    direct = mx.grad(lambda x: mx.sin(nn.Linear.__call__(layer, x)).sum())(x)
    np.testing.assert_allclose(np.array(mx.grad(lambda x: mx.sin(layer(x)).sum())(x)), np.array(direct), atol=1e-6)


def test_a_mixture_of_experts_is_computed_in_float32(tmp_path: Path) -> None:
    overrides = {"num_local_experts": 4, "num_experts_per_tok": 2}
    folder = tiny.tiny_model(tmp_path / "m", model_type="mixtral", quantize=4, overrides=overrides, dtype=mx.float16)
    fast, lean = (load_model(str(folder), memory=memory) for memory in ("fast", "lean"))
    assert fast.model(IDS).dtype == mx.float32
    np.testing.assert_allclose(np.array(fast.model(IDS)), np.array(lean.model(IDS)), rtol=1e-3, atol=1e-3)


def test_auto_memory_looks_at_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    available = psutil.virtual_memory()._replace(available=8_000)
    monkeypatch.setattr(load_module.psutil, "virtual_memory", lambda: available)
    assert choose_memory(1000, "auto") == "fast"
    assert choose_memory(1001, "auto") == "lean"
    assert choose_memory(10**12, "fast") == "fast"
    assert choose_memory(1, "lean") == "lean"


def test_what_is_known_about_a_model(tmp_path: Path) -> None:
    folder = tiny.tiny_model(tmp_path / "m", quantize=4)
    loaded = load_model(str(folder))
    assert (loaded.spec, loaded.path, loaded.device) == (str(folder), folder, "cpu")
    assert loaded.quantization == {"group_size": 32, "bits": 4}
    layer = 64 * 16 * 4 * 2 + 64 * 16 * 2 * 2 + 3 * 64 * 96 + 2 * 64
    assert loaded.num_parameters == 384 * 64 + 2 * layer + 64
    assert loaded.tokenizer.eos_token_ids == {2}
    assert not loaded.model.trainable_parameters().get("model", {}).get("norm")


def test_quantising_at_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.tiny_model(tmp_path / "m", hidden_size=128, intermediate_size=128)
    plain, packed = load_model(str(folder)), load_model(str(folder), quantize=8)
    assert plain.quantization is None
    assert packed.quantization is not None
    assert (packed.quantization["bits"], packed.quantization["group_size"]) == (8, 64)
    assert packed.fingerprint != plain.fingerprint
    assert capsys.readouterr().out == ""
    ours, theirs = np.array(packed.model(IDS)), np.array(plain.model(IDS))
    assert 0 < np.abs(ours - theirs).max() < 0.1 * np.abs(theirs).max()


def test_quantised_models_are_not_requantised(tmp_path: Path) -> None:
    folder = tiny.tiny_model(tmp_path / "m", quantize=4)
    assert load_model(str(folder), quantize=4).fingerprint == load_model(str(folder)).fingerprint
    with pytest.raises(InputError, match="already quantised to 4 bits"):
        load_model(str(folder), quantize=8)


def test_only_known_widths(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="5 is not one of 2, 3, 4, 6, 8"):
        load_model(str(tiny.tiny_model(tmp_path / "m")), quantize=5)


class TestFingerprint:
    """It names content: not the folder, the sharding, the order in a file or the time of a file."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return tiny.tiny_model(tmp_path / "m")

    def _of(self, folder: Path) -> str:
        return load_model(str(folder)).fingerprint

    def test_same_content_elsewhere_in_shards(self, folder: Path, tmp_path: Path) -> None:
        other = tiny.tiny_model(tmp_path / "n")
        weights = mx.load(str(other / "model.safetensors"))
        names = sorted(weights, reverse=True)
        for number in range(2):
            part = {name: weights[name] for name in names[number::2]}
            mx.save_safetensors(str(other / f"model-{number + 1:05}-of-00002.safetensors"), part)
        (other / "model.safetensors").unlink()
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
        assert self._of(other) == self._of(folder)

    def test_one_changed_weight(self, folder: Path) -> None:
        before = self._of(folder)
        file = folder / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        os.utime(file, ns=(1, 1))
        assert self._of(folder) != before

    @pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
    def test_config_and_template(self, folder: Path, name: str) -> None:
        before = self._of(folder)
        value = json.loads((folder / name).read_text())
        value |= {"rope_theta": 5e4} if name == "config.json" else {"chat_template": tiny.CHATML + " "}
        (folder / name).write_text(json.dumps(value))
        assert self._of(folder) != before

    def test_files_are_hashed_once(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = self._of(folder)
        monkeypatch.setattr(load_module.mmap, "mmap", lambda *_, **__: pytest.fail("hashed again"))
        assert self._of(folder) == before

    def test_a_cache_that_cannot_be_written(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = self._of(folder)
        (tmp_path / "file").touch()
        monkeypatch.setenv("LOCALDPO_CACHE", str(tmp_path / "file" / "cache"))
        monkeypatch.setattr(load_module, "check_template", lambda *_: None)
        assert self._of(folder) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "no_such_model"}, "no_such_model"),
        ({"num_hidden_layers": 3}, "cannot load"),
        ({"hidden_size": 65}, "cannot load"),
        ({"vocab_size": "many"}, "cannot load"),
    ],
)
def test_a_config_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = tiny.tiny_model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(InputError, match=words) as caught:
        load_model(str(folder))
    assert str(folder) in str(caught.value)


def test_a_broken_tokenizer(tmp_path: Path) -> None:
    folder = tiny.tiny_model(tmp_path / "m")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(InputError, match="tokenizer cannot be loaded"):
        load_model(str(folder))


def test_a_template_that_cannot_be_parsed(tmp_path: Path) -> None:
    folder = tiny.tiny_model(tmp_path / "m", chat_template="{% for %}")
    with pytest.raises(InputError, match=re.escape(str(folder))):
        load_model(str(folder))


def test_the_user_is_told_what_is_missing_offline() -> None:
    with pytest.raises(EnvironmentFault, match=r"mlx-community/Qwen3-0\.6B-4bit"):
        load_model("qwen3-0.6b")


def test_the_starter_answers(starter: Path) -> None:
    loaded = load_model("smollm2-135m")
    question: Any = [{"role": "user", "content": "What is the capital of France?"}]
    answer = "".join(token.text for token in stream(loaded, question, SamplingOptions(max_tokens=12)))
    assert answer == "The capital of France is Paris."
    assert loaded.num_parameters == 134_515_008
    text = "It costs 12345 £, isn't it? 你好 <|im_end|>"
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(text)) == text
    assert loaded.tokenizer.encode("1234") == [*map(loaded.tokenizer.convert_tokens_to_ids, "1234")]


def test_the_device() -> None:
    device = describe_device()
    assert device.kind == "cpu"
    assert device.name
    assert 0 < device.memory_available <= device.memory_total
    prepare_device()
    streams = lane_streams(2)
    assert len(streams) == 2
    assert lane_streams(2) == streams


@pytest.mark.parametrize(("cores", "allowed", "streams"), [(1, 8, 1), (2, 8, 2), (8, 8, 4), (8, 3, 3), (None, 2, 2)])
def test_there_is_a_stream_for_each_core_but_no_more_than_asked_for(
    monkeypatch: pytest.MonkeyPatch, cores: int | None, allowed: int, streams: int
) -> None:
    monkeypatch.setattr(device_module.psutil, "cpu_count", lambda logical: cores)
    monkeypatch.setattr(device_module.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(device_module.os, "sched_getaffinity", lambda _: set(range(allowed)), raising=False)
    assert len(core_streams(4)) == streams
