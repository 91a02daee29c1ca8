"""Model folders: copy one, or write one from a model whose arrays are still on disk, a shard at a time.

No more than a shard of weights is in memory at once, however large the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from localdpo.files import environment_faults
from localdpo.model.load import OpenModel
from localdpo.model.safety import INDEX_NAME
from localdpo.train.checkpoint import disk_faults

SHARD_BYTES = 1 << 30
_LICENSES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")


def folder_bytes(model: OpenModel) -> int:
    """What the arrays of ``model`` take on disk, and its other files."""
    return weight_bytes(model.model) + sum(path.stat().st_size for path in _companions(model))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's arrays; reads none of them."""
    return sum(value.nbytes for _, value in _arrays(model))


def copy_base(model: OpenModel, folder: Path) -> None:
    """Copy the base as it is: weights, configuration, tokenizer, licence."""
    folder.mkdir()
    index = model.source.path / INDEX_NAME
    files = [*model.files.tensors, model.source.path / "config.json", *_companions(model)]
    with environment_faults(folder):
        for path in [*files, *([index] if index.exists() else [])]:
            shutil.copyfile(path, folder / path.name)


def write_model(model: OpenModel, folder: Path) -> None:
    """Write ``model`` as an MLX model folder with the base's tokenizer and licence, and let go of its arrays.

    Shards follow mlx-lm's naming. Raises EnvironmentFault when the disk is full.
    """
    folder.mkdir(exist_ok=True)
    arrays = dict(_arrays(model.model))
    model.model.update(tree_map(lambda _: mx.array([]), model.model.parameters()), strict=False)
    shards = list(_shards({name: value.nbytes for name, value in arrays.items()}))
    total = sum(value.nbytes for value in arrays.values())
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        shard = {name: arrays.pop(name) for name in names}
        with disk_faults(folder / file):
            mx.save_safetensors(str(folder / file), shard, metadata={"format": "mlx"})
        weight_map |= dict.fromkeys(names, file)
        del shard
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / INDEX_NAME, index)
    _write_json(folder / "config.json", model.config)
    with environment_faults(folder):
        for path in _companions(model):
            shutil.copyfile(path, folder / path.name)


def _arrays(model: nn.Module) -> list[tuple[str, mx.array]]:
    return cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))


def _shards(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Names in order, cut where a shard would grow beyond SHARD_BYTES."""
    names: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if names and filled + size > SHARD_BYTES:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    if names:
        yield names


def _companions(model: OpenModel) -> list[Path]:
    """The tokenizer's files and the licence: what a copy of the model must not be without."""
    root = model.source.path
    licenses = {path for pattern in _LICENSES for path in root.glob(pattern) if path.is_file()}
    return [*model.files.tokenizer_files, *sorted(licenses)]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
