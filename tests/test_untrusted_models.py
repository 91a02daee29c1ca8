"""Model folders made to harm: refused in words, or harmless; nothing in them runs, and nothing takes the machine along.

What a header, a config or a template alone can do is in test_model_safety and test_encode; here whole folders are
loaded, and the ways to one are tried.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import tiny
from hostile import HOSTILE, set_config
from hypothesis import given, settings
from hypothesis import strategies as st
from vt import Screen

from localdpo.errors import InputError
from localdpo.model.load import load_model
from localdpo.model.lora import LoraSettings, attach_lora, load_adapter, save_adapter
from localdpo.model.resolve import resolve_model
from localdpo.model.safety import check_adapter_folder, check_config, check_model_folder, read_safetensors_header


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_model(tmp_path_factory.mktemp("sound") / "m", num_hidden_layers=1)


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "m")
    return tmp_path / "m"


def refused(folder: Path) -> str:
    """Load a folder that must be refused; returns why, which is inert and names the folder."""
    with pytest.raises(InputError) as caught:
        load_model(str(folder))
    text = str(caught.value)
    assert str(folder) in text
    assert not Screen.of(text.encode()).attacks
    return text


# -- code


class _Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._mark),)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "model.pt", "tokenizer.json", "config.json"]
)
def test_a_pickle_is_never_read_whatever_it_is_called(folder: Path, tmp_path: Path, name: str):
    mark = tmp_path / "it ran"
    if not (folder / name).exists():
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(_Bomb(mark)))
    refused(folder)
    assert not mark.exists()
    pickle.loads((folder / name).read_bytes())
    assert mark.exists()  # it would have gone off


CODE = "import os\nos.mkdir({mark!r})\nclass Model: pass\nclass ModelArgs: pass\n"


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"model_file": "evil.py"}),
        ("config.json", {"auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.ModelArgs"}}),
        ("config.json", {"model_type": "../evil"}),
        ("config.json", {"model_type": "evil"}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Model", None]}}),
        ("tokenizer_config.json", {"tool_parser_type": "evil"}),
        ("tokenizer_config.json", {"chat_template_type": "evil"}),
    ],
)
def test_code_in_the_folder_does_not_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, change: dict[str, Any]
):
    mark = tmp_path / "it ran"
    for name in ("evil.py", "modeling_evil.py", "tokenization_evil.py", "mlx_lm.py", "transformers.py", "__init__.py"):
        (folder / name).write_text(CODE.format(mark=str(mark)))
    set_config(folder, file, **change)
    monkeypatch.chdir(folder)  # where Python would look for modules
    refused(folder)
    assert not mark.exists()


def test_python_files_beside_a_sound_model_do_not_run(folder: Path, tmp_path: Path):
    for name in ("modeling_llama.py", "tokenization_llama.py", "configuration_llama.py", "sitecustomize.py"):
        (folder / name).write_text(CODE.format(mark=str(tmp_path / "it ran")))
    load_model(str(folder))
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("name", ["model.gguf", "ggml-model-q4_0.gguf"])
def test_a_gguf_of_any_kind_is_refused_by_name(folder: Path, name: str):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"GGUF" + struct.pack("<IQQ", 99, 2**60, 2**60))
    assert "GGUF files are not read" in refused(folder)
    with pytest.raises(InputError, match="is a file"):
        resolve_model(str(folder / name))


# -- configurations and tokenizers


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 10**12), ("vocab_size", 0), ("vocab_size", -1), ("vocab_size", 1.5), ("vocab_size", None),
        ("hidden_size", 10**9), ("hidden_size", 10**30), ("hidden_size", 0), ("num_attention_heads", 0),
        ("num_attention_heads", 10**9), ("head_dim", 0), ("intermediate_size", 10**12), ("num_hidden_layers", 10**9),
        ("rms_norm_eps", "x"), ("rope_scaling", {"type": HOSTILE}), ("rope_scaling", []),
        ("quantization", {"bits": 99, "group_size": 64}), ("quantization", {"bits": 4, "group_size": 0}),
        ("quantization", [1]), ("quantization_config", {"quant_method": "gptq"}), ("tie_word_embeddings", "x"),
        ("eos_token_id", HOSTILE), ("eos_token_id", {}), ("layer_types", HOSTILE), ("model_type", HOSTILE),
        ("model_type", "__init__"), ("model_type", "base"), ("text_config", {"hidden_size": 0}),
        ("max_position_embeddings", HOSTILE),
    ],
)  # fmt: skip
def test_an_absurd_config_is_refused(folder: Path, key: str, value: Any):
    set_config(folder, "config.json", **{key: value})
    refused(folder)


def _tokenizer(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: set_config(folder, "tokenizer.json", **changes)


def _config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: set_config(folder, "tokenizer_config.json", **changes)


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "tokenizer.json").write_text("[]"),
        lambda folder: (folder / "tokenizer.json").write_text("[" * 100_000),
        lambda folder: os.truncate(folder / "tokenizer.json", 500),
        lambda folder: os.truncate(folder / "tokenizer.json", 300_000_000),  # sparse
        lambda folder: (folder / "special_tokens_map.json").write_text("[1]"),
        lambda folder: (folder / "added_tokens.json").write_text('{"x": "y"}'),
        lambda folder: (folder / "chat_template.jinja").write_bytes(b"\xff\xfe"),
        _tokenizer(model={"type": HOSTILE}),
        _tokenizer(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
        _tokenizer(truncation={"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 5}),
        _config(tokenizer_class=7),
        _config(eos_token=7),
        _config(added_tokens_decoder={"x": 1}),
        _config(extra_special_tokens=7),
        _config(chat_template=[1]),
        _config(chat_template="{% for m in messages %}"),
        _config(chat_template_type=HOSTILE),
    ],
)
def test_an_absurd_tokenizer_is_refused(folder: Path, harm: Callable[[Path], object]):
    harm(folder)
    refused(folder)


def test_a_hostile_class_name_harms_nothing(folder: Path, caplog: pytest.LogCaptureFixture):
    set_config(
        folder, "tokenizer_config.json", tokenizer_class=HOSTILE, name_or_path="/etc", tokenizer_file="/etc/passwd"
    )
    load_model(str(folder))


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["model_type", "hidden_size", "quantization", "text_config", "auto_map"]), _VALUES)
)
def test_any_config_is_judged_without_an_exception(config: dict[str, Any]):
    for problem in check_config(config, "config.json"):
        assert not Screen.of(str(problem).encode()).attacks


# -- the header reader, fuzzed

_NAMES = st.text(max_size=6) | st.sampled_from(["a", "a.lora_a", "a.lora_b", "__metadata__", "../x", HOSTILE])
_OFFSETS = st.integers(-2, 40) | st.sampled_from([2**31, 2**63, 2**64, 10**30])
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "U8", "I64", "F8_E4M3", "x", None, 7]),
        "shape": st.lists(_OFFSETS, max_size=3) | _VALUES,
        "data_offsets": st.lists(_OFFSETS, min_size=2, max_size=2) | _VALUES,
    }
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(_NAMES, _ENTRY | _VALUES, max_size=4), st.binary(max_size=40), st.integers(-3, 3))
def test_any_header_is_read_or_refused_and_never_reaches_outside_the_file(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], data: bytes, shift: int
):
    raw = json.dumps(header).encode()
    file = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    file.write_bytes(struct.pack("<Q", max(0, len(raw) + shift)) + raw + data)
    refusal = ""
    try:
        entries = read_safetensors_header(file)
    except InputError as error:
        refusal, entries = str(error), {}
    assert not Screen.of(refusal.encode()).attacks
    if refusal:
        return
    size = file.stat().st_size
    spans = sorted((entry.start, entry.end) for entry in entries.values())
    assert all(8 <= start <= end <= size for start, end in spans)
    assert sum(end - start for start, end in spans) == max((end for _, end in spans), default=8 + len(raw) + shift) - (
        8 + len(raw) + shift
    )


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_no_adapter(tmp_path_factory: pytest.TempPathFactory, data: bytes):
    folder = tmp_path_factory.getbasetemp() / "bytes"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"lora_parameters": {"rank": 2}}')
    (folder / "adapters.safetensors").write_bytes(data)
    assert check_adapter_folder(folder)


# -- adapters


@pytest.fixture
def adapter(sound: Path, tmp_path: Path) -> Path:
    loaded = load_model(str(sound))
    info = attach_lora(loaded.model, LoraSettings(rank=2))
    save_adapter(tmp_path / "adapter", loaded.model, info, loaded)
    return tmp_path / "adapter"


def test_a_sound_adapter_is_sound(adapter: Path):
    assert check_adapter_folder(adapter) == []


@pytest.mark.parametrize("rank", [10**9, 2**70, -1, "2", None, [2], True])
def test_a_rank_that_is_none_is_refused_before_anything_is_made(sound: Path, adapter: Path, rank: Any):
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["lora_parameters"]["rank"] = rank
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError):
        load_adapter(adapter, load_model(str(sound)))
    assert check_adapter_folder(adapter)


@pytest.mark.parametrize("keys", [["../x"], [HOSTILE], [7], [["q"]], {"a": 1}, ["self_attn.q_proj"] * 10_000])
def test_names_of_modules_that_are_none_are_refused(sound: Path, adapter: Path, keys: Any):
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["lora_parameters"]["keys"] = keys
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        load_adapter(adapter, load_model(str(sound)))
    assert not Screen.of(str(caught.value).encode()).attacks


def test_an_adapter_of_half_pairs_or_other_names_is_named(adapter: Path):
    file = str(adapter / "adapters.safetensors")
    weights = dict(mx.load(file))
    mx.eval(list(weights.values()))
    first = next(name for name in weights if name.endswith("lora_a"))
    del weights[first]
    weights[HOSTILE] = mx.ones((1,))
    mx.save_safetensors(file, weights)
    text = "\n".join(map(str, check_adapter_folder(adapter)))
    assert "without its other half" in text
    assert "no part of a LoRA adapter" in text
    assert not Screen.of(text.encode()).attacks


# -- names that lead elsewhere


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_no_file_of_a_model_is_a_link_out_of_its_folder(folder: Path, tmp_path: Path, name: str):
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    assert "leads out" in refused(folder)


@pytest.mark.parametrize(
    "spec", ["../../etc", "a/../../b", "owner/..", "owner/name@../../x", "a\0b", "/dev/zero", "~nobody/x"]
)
def test_names_of_models_stay_names(spec: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        resolve_model(spec)


def test_an_index_cannot_name_what_is_outside(folder: Path):
    mapping = {"model.embed_tokens.weight": "../outside/model.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))
    with pytest.raises(InputError, match="not a plain file name"):
        check_model_folder(folder)
