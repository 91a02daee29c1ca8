"""Check a model folder before anything parses it: nothing in it may run code or surprise a C parser.

Weights are read from safetensors only; every header is parsed here first, because ``mx.load`` accepts trailing
bytes and says little about a truncated file. All problems of a folder are reported at once as one ``InputError``.
It knows nothing about networks, devices or what the weights mean.
"""

from __future__ import annotations

import json
import math
import re
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from localdpo.errors import InputError, Problem

MAX_HEADER_BYTES = 100_000_000
MAX_JSON_BYTES = 64_000_000
MAX_LAYERS = 4096
MAX_TOKENIZER_BYTES = 256_000_000
_BLOCK = 1 << 20
_SIZES = (
    "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim",
)  # fmt: skip
WEIGHT_PATTERN = "model*.safetensors"
READ_QUANTISATIONS = frozenset({"awq", "bitnet", "compressed-tensors", "fp8", "gptq", "modelopt", "mxfp4", "mxfp8"})
"""Methods of other libraries that mlx-lm 0.32 reads, some of them in some forms only."""
INDEX_NAME = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_IDENTIFIER = re.compile(r"[A-Za-z0-9_-]+")
_SHARD_NAME = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a safetensors file; ``start`` and ``end`` are byte positions in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class ModelFiles:
    """A checked model folder: its config, its weight files and the header of each."""

    path: Path
    config: dict[str, Any]
    tensors: dict[Path, dict[str, TensorEntry]]
    tokenizer_files: tuple[Path, ...]


def check_model_folder(path: Path) -> ModelFiles:
    """Validate the folder of an MLX or Hugging Face model, and describe it.

    Raises InputError with every problem found: a missing or damaged file, code to run, a pickle or a GGUF in
    place of safetensors, a shard that is absent, a link that leaves the folder.
    """
    if not path.is_dir():
        raise InputError(Problem(str(path), "is not a folder", "Give the folder that holds config.json"))
    problems: list[Problem] = []
    config = _read_config(path, problems)
    weights = _weight_files(path, problems)
    tokenizer_files = _tokenizer_files(path, problems)
    tensors: dict[Path, dict[str, TensorEntry]] = {}
    for file in weights:
        try:
            tensors[file] = read_safetensors_header(file)
        except InputError as error:
            problems.extend(error.problems)
    if not problems:
        problems.extend(_index_problems(path, tensors))
    if problems:
        raise InputError(*problems)
    return ModelFiles(path, config, tensors, tokenizer_files)


def missing_shards(path: Path) -> list[str]:
    """Names of weight files that the folder's index, or their numbering, expects and that are absent.

    Cheap: reads the index at most. A folder without an index or numbered files misses nothing.
    """
    names = {file.name for file in path.glob(WEIGHT_PATTERN) if file.exists()}
    try:
        return sorted(_shards_expected(path, names, []) - names)
    except OSError:
        return [INDEX_NAME]


def check_config(config: dict[str, Any], where: str) -> list[Problem]:
    """What in a parsed config.json forbids loading it: code to run, or values that no model has."""
    problems = []
    for key in ("model_file", "auto_map"):
        if config.get(key):
            problems.append(
                Problem(
                    where,
                    f"{key!r} names Python code to run ({_short(config[key])}); localdpo never runs a model's code",
                    "Use a conversion without it, for example one from mlx-community",
                )
            )
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not _IDENTIFIER.fullmatch(model_type):
        problems.append(Problem(where, f"'model_type' must be a plain name, got {_short(model_type)}"))
    layers = config.get("num_hidden_layers", 1)
    if not isinstance(layers, int) or isinstance(layers, bool) or not 0 < layers <= MAX_LAYERS:
        problems.append(Problem(where, f"'num_hidden_layers' is {_short(layers)}, not within 1 to {MAX_LAYERS}"))
    problems += [Problem(where, text) for text in _size_problems(config)]
    return [*problems, *_quantisation_problems(config, where)]


def config_parts(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a config.json says of the model, and what a multimodal one says of its language model."""
    text = config.get("text_config")
    return config, text if isinstance(text, dict) else {}


def foreign_quantisation(config: dict[str, Any]) -> str | None:
    """The method by which another library than MLX quantised the weights; None when none says so."""
    for part in config_parts(config):
        settings = part.get("quantization_config")
        if isinstance(settings, dict) and "quantization" not in config:
            return _short(settings.get("quant_method")).strip("'\"")
    return None


def foreign_quantisation_problem(method: str, where: str, reason: str = "") -> Problem:
    """What to say of weights in such a form that cannot be read."""
    return Problem(
        where,
        f"its weights are quantised with {method}, which MLX cannot read{f' ({reason})' if reason else ''}",
        "Take the original model, or a version of it for MLX, for example from mlx-community",
    )


def _quantisation_problems(config: dict[str, Any], where: str) -> Iterator[Problem]:
    method = foreign_quantisation(config)
    if method is not None and method not in READ_QUANTISATIONS:
        yield foreign_quantisation_problem(method, where)


def _size_problems(config: dict[str, Any]) -> Iterator[str]:
    """Sizes that no array has; keys that hold something else than a number are the model's own business."""
    for key in _SIZES:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and not 0 < value < 2**31:
            yield f"{key!r} is {_short(value)}, not within 1 to {2**31 - 1}"
    quantization = config.get("quantization")
    if isinstance(quantization, dict):
        for key, limit in (("bits", 8), ("group_size", 128)):
            value = quantization.get(key)
            if type(value) is not int or not 0 < value <= limit:
                yield f"quantization {key!r} is {_short(value)}, not within 1 to {limit}"
    if isinstance(config.get("text_config"), dict):
        yield from _size_problems(config["text_config"])


def read_safetensors_header(path: Path) -> dict[str, TensorEntry]:
    """Parse and check the header of a safetensors file.

    Every tensor's byte range must follow from its dtype and shape, and together the ranges must fill the file
    exactly, without gaps or overlaps. Raises InputError naming the file and the sizes.
    Format: https://huggingface.co/docs/safetensors (8 bytes length, JSON header, data).
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise _damaged(path, f"{size} bytes long, header length {length}")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("not an object")
        metadata = header.pop("__metadata__", None)  # mlx writes null when there is none
        if not isinstance(metadata, dict | None):
            raise ValueError("__metadata__ is not an object")
        entries = {name: _tensor_entry(name, value, 8 + length) for name, value in header.items()}
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header cannot be read ({str(error)[:120]})") from None
    position = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            raise _damaged(path, f"tensor {_short(name)} starts at byte {entry.start}, expected {position}")
        position = entry.end
    if position != size:
        raise _damaged(path, f"{size} bytes long, its header describes {position}")
    return entries


def check_adapter_folder(folder: Path) -> list[Problem]:
    """What is wrong with an mlx-lm LoRA adapter, as far as it can be told without its base.

    Its config, its header, that ``lora_a`` [.., input, rank] and ``lora_b`` [.., rank, output] come in pairs of one
    rank, and that every value is finite. An empty list means it is sound.
    """
    weights = folder / "adapters.safetensors"
    try:
        config = read_json(folder / "adapter_config.json")
        if not weights.is_file():
            raise InputError(Problem(str(weights), "is missing"))
        entries = read_safetensors_header(weights)
    except InputError as error:
        return list(error.problems)
    problems = list(_adapter_config_problems(config, str(folder / "adapter_config.json")))
    problems += [Problem(str(weights), text) for text in _rank_problems(entries, config)]
    bad = [name for name in entries if not _is_finite(weights, entries[name])]
    return problems + [Problem(str(weights), f"{_short(name)} holds values that are not finite") for name in bad]


def _adapter_config_problems(config: dict[str, Any], where: str) -> Iterator[Problem]:
    if config.get("fine_tune_type", "lora") != "lora":
        yield Problem(where, f"fine_tune_type is {_short(config['fine_tune_type'])}; only LoRA adapters are supported")
    parameters = config.get("lora_parameters")
    rank = parameters.get("rank") if isinstance(parameters, dict) else None
    if type(rank) is not int or rank < 1:
        yield Problem(where, f"rank is {_short(rank)}, not a whole number from 1")


def _rank_problems(entries: dict[str, TensorEntry], config: dict[str, Any]) -> Iterator[str]:
    parameters = config.get("lora_parameters")
    rank = parameters.get("rank") if isinstance(parameters, dict) else None
    if not entries:
        yield "holds no tensors"
    for name, entry in entries.items():
        stem, _, part = name.rpartition(".lora_")
        if part not in ("a", "b") or len(entry.shape) < 2:
            yield f"holds {_short(name)}, which is no part of a LoRA adapter"
        elif f"{stem}.lora_{'b' if part == 'a' else 'a'}" not in entries:
            yield f"holds {_short(name)} without its other half"
        elif entry.shape[-1 if part == "a" else -2] != rank:
            yield f"{_short(name)} has shape {list(entry.shape)}, which is not of rank {_short(rank)}"


def _is_finite(path: Path, entry: TensorEntry) -> bool:
    """Whether no value of a tensor is infinite or NaN: of no floating point value are all bits of the exponent set."""
    exponent = {
        "F16": ("<u2", 0x7C00),
        "BF16": ("<u2", 0x7F80),
        "F32": ("<u4", 0x7F800000),
        "F64": ("<u8", 0x7FF << 52),
    }
    if entry.dtype not in exponent or entry.start == entry.end:
        return True
    kind, bits = exponent[entry.dtype]
    count = (entry.end - entry.start) // np.dtype(kind).itemsize
    values = np.memmap(path, dtype=kind, mode="r", offset=entry.start, shape=(count,))
    mask = np.array(bits, dtype=kind)
    return not any(((values[at : at + _BLOCK] & mask) == mask).any() for at in range(0, count, _BLOCK))


def _tensor_entry(name: str, value: Any, base: int) -> TensorEntry:
    if not isinstance(value, dict):
        raise ValueError(f"{name}: not an object")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if dtype not in _DTYPE_BYTES:
        raise ValueError(f"{name}: unknown dtype {_short(dtype)}")
    if not _is_naturals(shape) or not _is_naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"{name}: bad shape or data_offsets")
    start, end = offsets
    if end - start != math.prod(shape) * _DTYPE_BYTES[dtype]:
        raise ValueError(f"{name}: {end - start} bytes for shape {_short(shape)} of {dtype}")
    return TensorEntry(dtype, tuple(shape), base + start, base + end)


def _is_naturals(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _damaged(path: Path, what: str) -> InputError:
    return InputError(Problem(str(path), f"damaged safetensors file: {what}", "Download or copy it again"))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder. Raises InputError."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError("too large")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(Problem(str(path), "is missing")) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(Problem(str(path), f"cannot be read as JSON ({str(error)[:120]})")) from None
    if not isinstance(value, dict):
        raise InputError(Problem(str(path), "must hold a JSON object"))
    return value


def _read_config(path: Path, problems: list[Problem]) -> dict[str, Any]:
    file = path / "config.json"
    if not _usable(path, file, problems):
        return {}
    try:
        config = read_json(file)
    except InputError as error:
        problems.extend(error.problems)
        return {}
    problems.extend(check_config(config, str(file)))
    return config


def _usable(folder: Path, file: Path, problems: list[Problem]) -> bool:
    """Whether ``file`` is a regular file that does not lead out of the model folder."""
    try:
        target = file.resolve(strict=True)
        if not stat.S_ISREG(target.stat().st_mode):
            raise OSError("not a regular file")
    except (OSError, RuntimeError) as error:
        missing = isinstance(error, FileNotFoundError)
        problems.append(Problem(str(file), "is missing" if missing else f"cannot be used ({error})"))
        return False
    if not any(target.is_relative_to(root) for root in _allowed_roots(folder)):
        problems.append(Problem(str(file), "is a link that leads out of the model folder", "Copy the file itself"))
        return False
    return True


def _allowed_roots(folder: Path) -> Iterator[Path]:
    """The folder, and the blob store beside it when the folder is a snapshot in the Hugging Face cache."""
    real = folder.resolve()
    yield real
    if real.parent.name == "snapshots":
        yield real.parent.parent / "blobs"


def _weight_files(path: Path, problems: list[Problem]) -> list[Path]:
    names = {file.name for file in path.glob(WEIGHT_PATTERN)}
    expected = _shards_expected(path, names, problems)
    for name in sorted(expected - names):
        problems.append(Problem(str(path / name), "shard is missing", "Download or copy the model again"))
    if not names and not expected:
        problems.append(Problem(str(path), f"no weights ({WEIGHT_PATTERN})", _instead_of_safetensors(path)))
    return [file for file in sorted(path / name for name in names) if _usable(path, file, problems)]


def _shards_expected(path: Path, names: set[str], problems: list[Problem]) -> set[str]:
    index = path / INDEX_NAME
    if index.exists():
        try:
            shards = _weight_map(index).values()
        except InputError as error:
            problems.extend(error.problems)
            return set()
        return set(shards)
    totals = {int(match[2]) for name in names if (match := _SHARD_NAME.fullmatch(name))}
    total = max(totals, default=0)
    if total > MAX_LAYERS:
        return set()
    return {f"model-{number:05}-of-{total:05}.safetensors" for number in range(1, total + 1)}


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard file name, from a weight index. Raises InputError."""
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise InputError(Problem(str(index), "has no 'weight_map'"))
    for name in mapping.values():
        if not isinstance(name, str) or not re.fullmatch(r"model[A-Za-z0-9._-]*\.safetensors", name):
            raise InputError(Problem(str(index), f"names a shard {_short(name)}, which is not a plain file name"))
    return mapping


def _index_problems(path: Path, tensors: dict[Path, dict[str, TensorEntry]]) -> Iterator[Problem]:
    index = path / INDEX_NAME
    if not index.exists():
        return
    missing = [(name, shard) for name, shard in _weight_map(index).items() if name not in tensors.get(path / shard, {})]
    for name, shard in missing[:10]:
        yield Problem(str(path / shard), f"lacks tensor {_short(name)}, which the index expects there")


def _instead_of_safetensors(path: Path) -> str:
    suffixes = {file.suffix for file in path.iterdir()}
    if ".gguf" in suffixes:
        return "GGUF files are not read: use a folder with safetensors, for example one from mlx-community"
    if suffixes & set(PICKLE_SUFFIXES):
        return "Pickled weights can run code and are never loaded: use a version of the model with safetensors"
    return "Use a folder with config.json and safetensors weights"


def _tokenizer_files(path: Path, problems: list[Problem]) -> tuple[Path, ...]:
    candidates = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tiktoken.model")
    extras = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
              "chat_template.json", "generation_config.json")  # fmt: skip
    found = [path / name for name in candidates if (path / name).exists()]
    if not found:
        problems.append(Problem(str(path), "has no tokenizer", "tokenizer.json belongs beside config.json"))
    files = [*found, *(path / name for name in extras if (path / name).exists())]
    usable = tuple(file for file in files if _usable(path, file, problems))
    large = [file for file in usable if file.stat().st_size > MAX_TOKENIZER_BYTES]
    problems += [Problem(str(file), f"is larger than {MAX_TOKENIZER_BYTES // 10**6} MB") for file in large]
    config_file = path / "tokenizer_config.json"
    if config_file in usable:
        problems.extend(_tokenizer_config_problems(config_file))
    return usable


def _tokenizer_config_problems(file: Path) -> Iterator[Problem]:
    try:
        config = read_json(file)
    except InputError as error:
        yield from error.problems
        return
    if config.get("auto_map"):
        yield Problem(
            str(file),
            f"'auto_map' names Python code to run ({_short(config['auto_map'])}); localdpo never runs a model's code",
            "Use a conversion whose tokenizer needs no code",
        )
    for key in ("chat_template_type", "tool_parser_type"):  # mlx-lm imports a module of this name
        value = config.get(key)
        if value is not None and not (isinstance(value, str) and _IDENTIFIER.fullmatch(value)):
            yield Problem(str(file), f"{key!r} must be a plain name, got {_short(value)}")
