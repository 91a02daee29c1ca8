"""A PEFT LoRA adapter in our terms: read from safetensors, renamed, transposed, one rank and one scale for all.

PEFT may give modules ranks and alphas of their own: the product B·A·scale is kept exactly, by padding with columns
that add nothing and by scaling B. What is more than LoRA on linear layers is refused, each kind in a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from localdpo.errors import InputError, Problem, first_problems
from localdpo.export.names import SAME_NAMES
from localdpo.export.source import ADAPTER_CONFIG
from localdpo.model.load import OpenModel
from localdpo.model.lora import LoraInfo, LoraSettings, adapter_weights, attach_lora, lora_scale
from localdpo.model.safety import read_safetensors_header

PEFT_WEIGHTS = "adapter_model.safetensors"

_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])(\.default)?\.weight")
_LAYER = re.compile(r"(?P<stack>.+?)\.(?P<number>\d{1,4})\.(?P<key>.+)")
_PLAIN_NAME = re.compile(r"\^?[A-Za-z0-9_.]+")
_OTHER_KINDS = {
    "use_dora": "DoRA, which cannot be switched off like LoRA",
    "use_qalora": "QA-LoRA",
    "lora_bias": "LoRA with biases",
    "modules_to_save": "LoRA with whole modules beside it (modules_to_save)",
    "trainable_token_indices": "LoRA with trained tokens (trainable_token_indices)",
    "layer_replication": "LoRA on repeated layers (layer_replication)",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
    "fan_in_fan_out": "LoRA on transposed layers (fan_in_fan_out)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
}
_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base as it is; PiSSA, OLoRA and their like change it."""


@dataclass(frozen=True)
class _Pair:
    """A module's matrices: a [rank, input], b [output, rank], and its scale."""

    a: mx.array
    b: mx.array
    scale: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


def read_peft(folder: Path, config: Mapping[str, Any], model: OpenModel) -> tuple[LoraInfo, dict[str, mx.array]]:
    """The adapter of ``folder`` for ``model``: how it is attached, and its arrays by our names, float32.

    Raises InputError, with all problems of the file at once.
    """
    where = folder / ADAPTER_CONFIG
    _refuse_other_kinds(config, where)
    if model.config.get("model_type") not in SAME_NAMES:
        kind = model.config.get("model_type")
        raise InputError(
            Problem(str(folder), f"PEFT and mlx-lm name the layers of a {kind!r} model differently: it cannot be read")
        )
    pairs = _read_pairs(folder / PEFT_WEIGHTS, config, where)
    return _attached(pairs, _dropout(config, where), model, folder / PEFT_WEIGHTS)


def _refuse_other_kinds(config: Mapping[str, Any], where: Path) -> None:
    problems = []
    kind = config.get("peft_type")
    if kind != "LORA":
        problems.append(Problem(str(where), f"peft_type is {kind!r}; only LoRA adapters are supported"))
    problems += [
        Problem(str(where), f"this is {what}; only plain LoRA is supported")
        for key, what in _OTHER_KINDS.items()
        if config.get(key)
    ]
    if config.get("bias", "none") != "none":
        problems.append(Problem(str(where), f"bias is {config['bias']!r}; only LoRA without biases is supported"))
    start = config.get("init_lora_weights", True)
    if not any(start is value or (isinstance(value, str) and start == value) for value in _KEEPS_BASE):
        problems.append(
            Problem(
                str(where),
                f"init_lora_weights is {start!r}, which changes the base: the adapter does not fit the original",
                "Convert it to plain LoRA first (PEFT: path_initial_model_for_weight_conversion)",
            )
        )
    if problems:
        raise InputError(*problems)


def _read_pairs(path: Path, config: Mapping[str, Any], where: Path) -> dict[str, _Pair]:
    """Module path -> its matrices, all finite, A and B of one rank."""
    header = read_safetensors_header(path)
    problems = [
        Problem(str(path), f"holds {name}, which {_what(name)}") for name in header if not _TENSOR.fullmatch(name)
    ]
    if problems or not header:
        raise InputError(*(first_problems(problems) or [Problem(str(path), "holds no tensors")]))
    tensors = cast(dict[str, mx.array], mx.load(str(path)))
    found: dict[str, dict[str, mx.array]] = {}
    for name, value in tensors.items():
        match = cast(re.Match[str], _TENSOR.fullmatch(name))
        found.setdefault(match["module"], {})[match["matrix"]] = value
    pairs: dict[str, _Pair] = {}
    for module, matrices in sorted(found.items()):
        wrong = _pair_problem(matrices)
        if wrong:
            problems.append(Problem(str(path), f"{module} {wrong}"))
            continue
        a, b = (matrices[matrix].astype(mx.float32) for matrix in "AB")
        pairs[module] = _Pair(a, b, _scale(config, module, a.shape[0], where))
    if problems:
        raise InputError(*first_problems(problems))
    return pairs


def _what(name: str) -> str:
    if "lora_magnitude_vector" in name:
        return "belongs to DoRA: only plain LoRA is supported"
    if "lora_embedding" in name:
        return "adapts an embedding: only linear layers inside the transformer blocks are supported"
    return "is no LoRA matrix of a linear layer"


def _pair_problem(matrices: Mapping[str, mx.array]) -> str:
    if set(matrices) != {"A", "B"}:
        return f"has no lora_{'B' if 'A' in matrices else 'A'}"
    a, b = matrices["A"], matrices["B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] < 1:
        return f"has lora_A of shape {list(a.shape)} and lora_B of shape {list(b.shape)}, which are not of one rank"
    if not (mx.issubdtype(a.dtype, mx.floating) and mx.issubdtype(b.dtype, mx.floating)):
        return "is not stored in floating point"
    if not (mx.isfinite(a).all().item() and mx.isfinite(b).all().item()):
        return "holds values that are not finite"
    return ""


def _scale(config: Mapping[str, Any], module: str, rank: int, where: Path) -> float:
    alpha: Any = config.get("lora_alpha")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(_PLAIN_NAME.fullmatch(str(key)) for key in patterns):
        raise InputError(Problem(str(where), "alpha_pattern is not a table of plain module names"))
    for key, value in patterns.items():
        plain = key.removeprefix("^")
        if module == plain or (not key.startswith("^") and module.endswith(f".{plain}")):
            alpha = value
            break
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < abs(alpha) < 1e6:
        raise InputError(Problem(str(where), f"lora_alpha {alpha!r} is not a number other than 0"))
    return lora_scale(float(alpha), rank, bool(config.get("use_rslora")))


def _dropout(config: Mapping[str, Any], where: Path) -> float:
    value = config.get("lora_dropout", 0.0)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise InputError(Problem(str(where), f"lora_dropout {value!r} is not a number from 0 up to 1"))
    return float(value)


def _attached(
    pairs: Mapping[str, _Pair], dropout: float, model: OpenModel, path: Path
) -> tuple[LoraInfo, dict[str, mx.array]]:
    """The adapter in the top layers down to its lowest one, on every kind of module it has.

    Where it has none, there is one that adds nothing: A as at the start of training, B zero.
    """
    rank, scale = max(pair.rank for pair in pairs.values()), next(iter(pairs.values())).scale
    layers = len(model.model.layers)
    numbers, keys = set(), set()
    for module in pairs:
        match = _LAYER.fullmatch(module)
        if match is None or int(match["number"]) >= layers:
            raise InputError(_misplaced(path, module, layers))
        numbers.add(int(match["number"]))
        keys.add(match["key"])
    settings = LoraSettings(rank, scale, dropout, sorted(keys), layers - min(numbers))
    try:
        info = attach_lora(model.model, settings)
    except InputError as error:
        raise InputError(*(Problem(str(path), problem.message, problem.fix) for problem in error.problems)) from None
    weights = adapter_weights(model.model)
    problems = [problem for module, pair in pairs.items() if (problem := _fill(weights, module, pair, scale, path))]
    if problems:
        raise InputError(*first_problems(problems))
    mx.eval(weights)
    return info, weights


def _fill(weights: dict[str, mx.array], module: str, pair: _Pair, scale: float, path: Path) -> Problem | None:
    """Put a pair in its place among ``weights``; what is wrong when it has none or does not fit."""
    a_name, b_name = f"{module}.lora_a", f"{module}.lora_b"
    if a_name not in weights:
        return Problem(str(path), f"holds {module}, which has no place in this model")
    a, b = weights[a_name], weights[b_name]
    if a.ndim != 2 or (pair.a.shape[1], pair.b.shape[0]) != (a.shape[0], b.shape[1]):
        mine = f"{list(pair.a.shape)} and {list(pair.b.shape)}"
        return Problem(
            str(path), f"{module} has matrices of shape {mine}, which do not fit this model", "Name its base"
        )
    stored_b = pair.b.T if pair.scale == scale else pair.b.T * (pair.scale / scale)
    weights[a_name] = mx.concatenate([pair.a.T, a[:, pair.rank :]], axis=1)
    weights[b_name] = mx.concatenate([stored_b, b[pair.rank :]], axis=0)
    return None


def _misplaced(path: Path, module: str, layers: int) -> Problem:
    return Problem(
        str(path),
        f"holds {module}, which is in none of the {layers} blocks of this model",
        "Name the adapter's own base with --model; embeddings and the head cannot be adapted",
    )
