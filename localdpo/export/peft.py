"""An adapter as PEFT saves it: the same numbers, transposed and renamed.

PEFT multiplies B·A·x by lora_alpha / r, so a scale is written as the alpha that gives it. On the same base weights in
float32 the logits are ours within 1e-4 (``tests/test_export_peft.py``); a base of another precision differs by what
its own weights differ.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from localdpo.export.cards import peft_card
from localdpo.export.names import require_same_names, torch_base
from localdpo.export.targets import Job, Written
from localdpo.files import array_faults, require_space
from localdpo.model.load import OpenModel, open_model
from localdpo.model.lora import LoraInfo, lora_scale, read_adapter
from localdpo.recipe import Recipe

PREFIX = "base_model.model."


def write(job: Job) -> Written:
    """Write adapter_model.safetensors, adapter_config.json and a README."""
    model = open_model(job.source.model, quantize=job.source.quantize, notify=job.say)
    stored = read_adapter(job.source.adapter, model.model, model)
    require_same_names(model, stored.weights, "a PEFT adapter")
    require_space(job.target, 4 * stored.info.trainable)
    base, remark = torch_base(model, job.options.base)
    config = peft_config(stored.info, stored.weights, model, base, job.source.recipe)
    tensors = {peft_name(name): mx.contiguous(value.T) for name, value in stored.weights.items()}
    with array_faults(job.folder):
        mx.save_safetensors(str(job.folder / "adapter_model.safetensors"), tensors, metadata={"format": "pt"})
    _write(job.folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")
    _write(job.folder / "README.md", peft_card(job.source, model.source.license, base))
    notes = [remark] if remark else []
    if model.config.get("quantization"):
        notes.append(
            "It was trained on the quantised base. On the original its answers can differ a little: the base does."
        )
    return Written(
        next_steps=(
            f'model = AutoModelForCausalLM.from_pretrained("{base}")',
            f'model = PeftModel.from_pretrained(model, "{job.target}")',
        ),
        notes=tuple(notes),
        figures={"base_model_name_or_path": base},
    )


def peft_name(name: str) -> str:
    """PEFT's name for ``….lora_a`` or ``….lora_b``."""
    path, _, matrix = name.rpartition(".")
    return f"{PREFIX}{path}.lora_{matrix[-1].upper()}.weight"


def peft_config(
    info: LoraInfo, names: Sequence[str] | dict[str, mx.array], model: OpenModel, base: str, recipe: Recipe | None
) -> dict[str, Any]:
    """The adapter_config.json of an adapter whose tensors are ``names`` (as localdpo names them)."""
    adapted = {name.rpartition(".")[0] for name in names}
    alpha, use_rslora = _alpha(info, recipe)
    layers = sorted({_layer_number(name) for name in adapted})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": info.rank,
        "lora_alpha": alpha,
        "use_rslora": use_rslora,
        "lora_dropout": info.dropout,
        "bias": "none",
        "target_modules": _target_modules(info.keys, model),
        "layers_to_transform": None if len(layers) == len(model.model.layers) else layers,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": False,
    }


def _alpha(info: LoraInfo, recipe: Recipe | None) -> tuple[float, bool]:
    """lora_alpha and use_rslora: as in the recipe where that is what the adapter holds."""
    if recipe is not None and recipe.lora.r == info.rank:
        lora = recipe.lora
        if lora_scale(lora.alpha, lora.r, lora.use_rslora) == info.scale:
            return _whole(lora.alpha), lora.use_rslora
    return _whole(info.scale * info.rank), False


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value


def _layer_number(name: str) -> int:
    return int(next(part for part in name.split(".") if part.isdigit()))


def _target_modules(keys: Sequence[str], model: OpenModel) -> list[str]:
    """Last parts of the names ("q_proj"), as most tools expect; with what is before where that says too much."""
    wanted = sorted({key.rpartition(".")[2] for key in keys})
    suffixes = tuple(f".{name}" for name in wanted)
    matched = {
        name
        for layer in model.model.layers
        for name, _ in layer.named_modules()
        if f".{name}".endswith(suffixes)
    }  # fmt: skip
    return wanted if matched == set(keys) else sorted(keys)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
