"""An adapter folded into the layers it stands beside: W + scale · (A B)ᵀ, stored as asked.

``plan`` says which layers change and how each is to be stored; ``stored_layer`` makes one. Folding is exact in
float32; what is lost is lost in storing. It knows nothing about files, prompts or answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from localdpo.errors import InputError, Problem
from localdpo.model.frozen import float32_weight, linear_dims
from localdpo.model.load import QUANTIZE_BITS, QUANTIZE_GROUP, OpenModel, open_model
from localdpo.model.lora import StoredAdapter

Delta = tuple[mx.array, mx.array, float]
"""lora_a, lora_b and the scale."""


@dataclass(frozen=True)
class Form:
    """How a layer is stored: in ``dtype``, or in ``bits`` per weight by groups of ``group``."""

    dtype: mx.Dtype = mx.float16
    bits: int | None = None
    group: int = QUANTIZE_GROUP


def deltas(stored: StoredAdapter) -> dict[str, Delta]:
    """Layer name -> what the adapter adds to it."""
    names = {name.rpartition(".")[0] for name in stored.weights}
    return {n: (stored.weights[f"{n}.lora_a"], stored.weights[f"{n}.lora_b"], stored.info.scale) for n in names}


def plan(model: OpenModel, adapted: Mapping[str, Delta], bits: int | None) -> dict[str, Form]:
    """The layers that a fused copy of ``model`` stores otherwise than the base does, and how.

    ``bits`` None: full precision, so every quantised layer is unpacked into the dtype of its scales. Else adapted
    layers are packed into ``bits``; the other layers of a quantised base stay bit for bit as they are, and those of
    an unquantised one are packed like any quantisation of it. Raises InputError for bits that MLX does not have.
    """
    if bits is not None and bits not in QUANTIZE_BITS:
        raise InputError(Problem("--quantize", f"{bits} is not one of {', '.join(map(str, QUANTIZE_BITS))}"))
    if bits is None:
        return dict(_unpacked(model, adapted))
    if model.config.get("quantization"):
        return dict(_repacked(model, adapted, bits))
    packed = dict(_modules(open_model(model.spec, quantize=bits).model))
    forms: dict[str, Form] = {}
    for name, module in _modules(model.model):
        if _packed(packed.get(name)):
            forms[name] = Form(bits=packed[name].bits, group=packed[name].group_size)
        elif name in adapted:
            forms[name] = Form(module.weight.dtype)
    return forms


def _unpacked(model: OpenModel, adapted: Mapping[str, Delta]) -> Iterator[tuple[str, Form]]:
    for name, module in _modules(model.model):
        if _packed(module):
            scales = module.scales.dtype
            yield name, Form(scales if mx.issubdtype(scales, mx.floating) else mx.bfloat16)
        elif name in adapted:
            yield name, Form(module.weight.dtype)


def _repacked(model: OpenModel, adapted: Mapping[str, Delta], bits: int) -> Iterator[tuple[str, Form]]:
    for name, module in _modules(model.model):
        if name in adapted:
            form = Form(module.weight.dtype)
            if _packed(module):
                # The microscaling modes have groups of 16 or 32 and a fixed width: affine takes their place here.
                group = module.group_size if module.mode == "affine" else 32
                form = Form(module.scales.dtype if module.mode == "affine" else mx.bfloat16, bits, group)
            yield name, form


def fused_config(config: Mapping[str, Any], forms: Mapping[str, Form], bits: int | None) -> dict[str, Any]:
    """config.json of the fused copy: no quantisation, or that of the base with the re-packed layers named."""
    kept = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    if bits is None:
        return kept
    base = config.get("quantization")
    quantization: dict[str, Any] = dict(base) if base else {"group_size": QUANTIZE_GROUP, "bits": bits}
    usual = {
        "mode": "affine",
        **{key: quantization[key] for key in quantization if key in ("group_size", "bits", "mode")},
    }
    for name, form in forms.items():
        entry = {"group_size": form.group, "bits": form.bits, "mode": "affine"}
        if form.bits is not None and (entry != usual or name in quantization):
            quantization[name] = entry
    return kept | {"quantization": quantization, "quantization_config": quantization}


def stored_layer(module: nn.Module, form: Form, delta: Delta | None) -> nn.Module:
    """``module`` with ``delta`` folded in and stored as ``form`` says: an ordinary layer of mlx or mlx-lm.

    Nothing is computed until its arrays are.
    """
    weight = float32_weight(module)
    if delta is not None:
        weight = weight + delta_weight(*delta)
    layer: nn.Module
    if form.bits is None:
        layer = _dense_shell(module)
        layer.weight = weight.astype(form.dtype)
    else:
        layer = _packed_shell(module, form.group, form.bits)
        layer.weight, layer.scales, layer.biases = mx.quantize(weight.astype(form.dtype), form.group, form.bits)
    if "bias" in module:
        layer.bias = module.bias
    layer.eval()
    layer.freeze()
    return layer


def delta_weight(lora_a: mx.array, lora_b: mx.array, scale: float) -> mx.array:
    """What the adapter adds to the weight, float32, in its shape [output, input] (experts first in a mixture)."""
    a, b = lora_a.astype(mx.float32), lora_b.astype(mx.float32)
    # A plain layer has A [input, rank] and B [rank, output]; experts have [E, rank, input] and [E, output, rank].
    return scale * ((b @ a) if a.ndim == 3 else (b.T @ a.T))


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Set the module of that full name."""
    model.update_modules(tree_unflatten([(name, layer)]))


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if "weight" in module and module.weight.ndim > 1]


def _packed(module: nn.Module | None) -> bool:
    return module is not None and "scales" in module


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.QuantizedEmbedding)


def _is_switch(module: nn.Module) -> bool:
    return isinstance(module, SwitchLinear | QuantizedSwitchLinear)


def _dense_shell(module: nn.Module) -> nn.Module:
    if _is_embedding(module):
        return nn.Embedding(1, 1)
    return SwitchLinear(1, 1, 1, bias=False) if _is_switch(module) else nn.Linear(1, 1, bias=False)


def _packed_shell(module: nn.Module, group: int, bits: int) -> nn.Module:
    width, rows = linear_dims(module)
    if _is_embedding(module):
        return nn.QuantizedEmbedding(rows, width, group, bits)
    if _is_switch(module):
        return QuantizedSwitchLinear(width, rows, 1, bias=False, group_size=group, bits=bits)
    return nn.QuantizedLinear(width, rows, bias=False, group_size=group, bits=bits)
