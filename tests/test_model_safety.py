"""A model folder is checked before anything parses it."""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from localdpo.errors import InputError
from localdpo.model.safety import check_model_folder, missing_shards, read_safetensors_header


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_model(tmp_path_factory.mktemp("model"), quantize=4)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    copy.mkdir()
    for file in original.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def _edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _refused(folder: Path, *words: str) -> InputError:
    with pytest.raises(InputError) as caught:
        check_model_folder(folder)
    text = str(caught.value)
    for word in words:
        assert word in text
    return caught.value


def _safetensors(header: Any, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def test_a_sound_folder_is_described(folder: Path) -> None:
    files = check_model_folder(folder)
    assert files.config["model_type"] == "llama"
    (header,) = files.tensors.values()
    loaded = mx.load(str(folder / "model.safetensors"))
    assert {name: entry.shape for name, entry in header.items()} == {
        name: value.shape for name, value in loaded.items()
    }
    assert folder / "tokenizer.json" in files.tokenizer_files


@pytest.mark.parametrize("key", ["model_file", "auto_map"])
def test_config_naming_code_is_refused(folder: Path, key: str) -> None:
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    _edit(folder / "config.json", **{key: "evil.py"})
    _refused(folder, "config.json", key, "evil.py")


def test_tokenizer_naming_code_is_refused(folder: Path) -> None:
    _edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    _refused(folder, "tokenizer_config.json", "auto_map")


@pytest.mark.parametrize("key", ["chat_template_type", "tool_parser_type"])
def test_module_names_in_the_tokenizer_config_are_plain(folder: Path, key: str) -> None:
    _edit(folder / "tokenizer_config.json", **{key: "..evil"})
    _refused(folder, key)


@pytest.mark.parametrize("model_type", [None, 7, "", "../evil", "a.b"])
def test_model_type_must_be_a_plain_name(folder: Path, model_type: Any) -> None:
    _edit(folder / "config.json", model_type=model_type)
    _refused(folder, "model_type")


@pytest.mark.parametrize("layers", [0, -1, 10**9, "30", True, 1.5])
def test_absurd_layer_counts_are_refused(folder: Path, layers: Any) -> None:
    _edit(folder / "config.json", num_hidden_layers=layers)
    _refused(folder, "num_hidden_layers")


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\xff"])
def test_unreadable_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    _refused(folder, "config.json")


def test_all_problems_at_once(folder: Path) -> None:
    _edit(folder / "config.json", model_file="evil.py", model_type=3)
    (folder / "tokenizer.json").unlink()
    (folder / "model.safetensors").write_bytes(b"short")
    assert len(_refused(folder, "model_file", "model_type", "tokenizer", "damaged").problems) == 4


def test_missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    _refused(folder, "config.json", "missing")


def test_not_a_folder(tmp_path: Path) -> None:
    _refused(tmp_path / "nowhere", "nowhere")


@pytest.mark.parametrize(("name", "word"), [("pytorch_model.bin", "Pickled"), ("model.gguf", "GGUF")])
def test_other_weight_formats_are_named(folder: Path, name: str, word: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    _refused(folder, "no weights", word)


def test_truncated_weights_name_both_sizes(folder: Path) -> None:
    file = folder / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 1)
    _refused(folder, "model.safetensors", str(size), str(size - 1))


def test_bloated_weights_which_mlx_accepts(folder: Path) -> None:
    file = folder / "model.safetensors"
    with file.open("ab") as out:
        out.write(b"\0")
    assert mx.load(str(file))
    _refused(folder, "model.safetensors", "damaged")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**9) + b"{}",
        _safetensors(b"[]"),
        _safetensors(b"{"),
        _safetensors(b"\xff\xff"),
        _safetensors(b"[" * 50_000),
        _safetensors({"a": 1}),
        _safetensors({"__metadata__": []}),
        _safetensors(b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "a": {}}'),
        _safetensors({"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
        _safetensors({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\0" * 4),
        _safetensors({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"\0" * 4),
        _safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"\0" * 4),
        _safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"\0" * 4),
        _safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"\0" * 8),
        _safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, b"\0" * 4),
        _safetensors({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"\0" * 4),
        _safetensors(
            {
                "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]},
            },
            b"\0" * 6,
        ),
    ],
)
def test_damaged_headers(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(str(file))):
        read_safetensors_header(file)


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 400), value=st.integers(0, 255))
def test_any_changed_header_byte_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    file = tmp_path_factory.mktemp("byte") / "model.safetensors"
    mx.save_safetensors(str(file), {"a": mx.ones((2, 3)), "b": mx.zeros((4,), dtype=mx.float16)})
    content = bytearray(file.read_bytes())
    content[position % len(content)] = value
    file.write_bytes(content)
    try:
        entries = read_safetensors_header(file)
    except InputError:
        return
    assert max((entry.end for entry in entries.values()), default=0) == len(content)


def _shard(folder: Path, count: int = 2) -> None:
    """Split the folder's weights into numbered shards with an index."""
    weights = mx.load(str(folder / "model.safetensors"))
    names = sorted(weights)
    mapping = {}
    for number in range(count):
        part = names[number::count]
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        mx.save_safetensors(str(folder / file), {name: weights[name] for name in part})
        mapping |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))


def test_shards(folder: Path) -> None:
    _shard(folder)
    assert len(check_model_folder(folder).tensors) == 2
    assert missing_shards(folder) == []


@pytest.mark.parametrize("with_index", [True, False])
def test_a_missing_shard_is_named(folder: Path, with_index: bool) -> None:
    _shard(folder, 3)
    if not with_index:
        (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00002-of-00003.safetensors").unlink()
    _refused(folder, "model-00002-of-00003.safetensors", "missing")
    assert missing_shards(folder) == ["model-00002-of-00003.safetensors"]


def test_a_shard_without_its_tensor(folder: Path) -> None:
    _shard(folder)
    index = folder / "model.safetensors.index.json"
    mapping = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": mapping | {"extra.weight": "model-00001-of-00002.safetensors"}}))
    _refused(folder, "extra.weight")


@pytest.mark.parametrize("shard", ["../model-1.safetensors", "/etc/passwd", "model/x.safetensors", "other.bin", 3])
def test_an_index_names_plain_files(folder: Path, shard: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    _refused(folder, "not a plain file name")


def test_links_stay_inside(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    _refused(folder, "leads out")


def test_the_hub_cache_layout_is_known(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert check_model_folder(snapshot).config["model_type"] == "llama"


def test_a_fifo_does_not_hang(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    _refused(folder, "config.json", "regular")


def test_a_link_loop(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")
    _refused(folder, "config.json")
