"""Frozen base weights computed in float32 on a CPU, where MLX's half and quantised products are slow.

``fast`` dequantises every weight once into a plain float32 layer. ``lean`` keeps the stored weights (4 bits, or
half precision) and dequantises inside each product, and again in its gradient, so that no more than a layer's
worth of dense weights is ever alive. Both compute the same function. On a GPU the model is left alone.

Expert layers of a mixture have no lean form: they stay quantised, which is right and slow.

It knows nothing about adapters, and takes no gradient with respect to a base weight: they are frozen.
"""

from __future__ import annotations

from typing import Literal, Protocol, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from localdpo.model.autograd import with_vjp
from localdpo.model.blas import blas_threads

CpuMemory = Literal["fast", "lean"]
CHUNK_BYTES = 16 << 20  # dense rows of a lean product alive at once; dequantising needs about four times that

ROW_PRODUCT = 500_000  # elements of a weight that OpenBLAS multiplies by one row without packing it first
ROW_BLOCK = 512

_HALF = (mx.float16, mx.bfloat16)


def is_lean(model: nn.Module) -> bool:
    """Whether ``model`` holds its base as it is stored, and was prepared for a CPU so."""
    return any(isinstance(module, _LEAN_TYPES) for module in model.modules())


def linear_dims(module: nn.Module) -> tuple[int, int]:
    """Columns and rows of the dense weight, however it is stored.

    (input, output) of a linear layer, (width, vocabulary) of an embedding.
    """
    rows, columns = module.weight.shape[-2:]
    return columns * 32 // module.bits if _is_packed(module) else columns, rows


def dense_weight(module: nn.Module, start: int = 0, stop: int | None = None) -> mx.array:
    """Rows ``start:stop`` of a linear's or embedding's weight as ``[rows, input]``, dequantised where needed.

    float32 for layers prepared for the CPU; otherwise the dtype the layer computes in.
    """
    if isinstance(module, _LEAN_TYPES):
        return _dense_rows(module, slice(start, stop), None)
    rows = slice(start, stop)
    weight: mx.array = module.weight if start == 0 and stop is None else module.weight[rows]
    if not _is_packed(module):
        return weight
    biases = _biases(module, rows)
    return mx.dequantize(weight, module.scales[rows], biases, module.group_size, module.bits, module.mode)


def float32_weight(module: nn.Module) -> mx.array:
    """The dense weight ``[rows, input]`` (experts first in a mixture) in float32, however it is stored.

    What the stored numbers stand for, without the rounding of the dtype that the layer computes in.
    """
    if _is_packed(module):
        return _dequantise(module, module.weight, module.scales, _biases(module, slice(None)))
    return cast(mx.array, module.weight).astype(mx.float32)


def compute_in_float32(model: nn.Module, memory: CpuMemory) -> None:
    """Prepare every layer of ``model``, in place, for float32 products on the CPU.

    Weights are evaluated one layer at a time, the largest first: what it takes to make an embedding of several times
    its own size is then gone before the others are there.
    """
    make = _fast_layer if memory == "fast" else _lean_layer
    for name, module in sorted(model.named_modules(), key=lambda named: -_stored_size(named[1])):
        if name and (replacement := make(module)) is not None:
            replacement.eval()
            mx.eval(replacement.parameters())
            model.update_modules(tree_unflatten([(name, replacement)]))
            del replacement
    for module in model.modules():
        if not isinstance(module, (*_LEAN_TYPES, QuantizedSwitchLinear)):
            _cast_own_arrays(module)
    mx.eval(model.parameters())


def _stored_size(module: nn.Module) -> int:
    return int(module.weight.size) if "weight" in module else 0


class _Dense(Protocol):
    """Rows ``start:stop`` of a weight as ``[stop - start, input]`` float32, not computed before ``after`` is."""

    def __call__(self, start: int, stop: int, after: mx.array) -> mx.array: ...


def frozen_matmul(x: mx.array, dense: _Dense, rows: int, chunk: int) -> mx.array:
    """``x @ dense().T`` whose gradient calls ``dense`` again rather than keep its result.

    At most ``chunk`` of the weight's ``rows`` are alive at a time, and none before ``x`` is: without that
    dependency the evaluator dequantises ahead. x: [..., input] float32 -> [..., rows].
    """
    bounds = [(start, min(start + chunk, rows)) for start in range(0, rows, chunk)]

    def product(x: mx.array) -> mx.array:
        parts: list[mx.array] = []
        for start, stop in bounds:
            parts.append(x @ dense(start, stop, parts[-1] if parts else x).T)
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)

    def into_x(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        total: mx.array | None = None
        for start, stop in bounds:
            part = cotangent[..., start:stop] @ dense(start, stop, cotangent if total is None else total)
            total = part if total is None else total + part
        return cast(mx.array, total)

    return cast(mx.array, with_vjp(product, into_x)(x))


def row_block(rows: int, columns: int) -> int:
    """Rows of a weight to multiply at a time when the input is a single row; 0 to take them all at once."""
    largest = min(ROW_BLOCK, ROW_PRODUCT // columns)
    return next((size for size in range(largest, 15, -1) if rows % size == 0 and size < rows), 0)


def _cut_for_single_rows(layer: nn.Module, block: int) -> None:
    """Let ``layer`` multiply single rows by ``block`` rows of its weight at a time: two to four times faster.

    OpenBLAS copies ("packs") a large weight before it multiplies, which doubles the memory traffic of a product
    that does nothing else; below a size it multiplies in place. The blocks are a view of the weight.
    """
    layer._blocks = layer.weight.reshape(-1, block, layer.weight.shape[1]).swapaxes(1, 2)  # "_": no parameter
    mx.eval(layer._blocks)


def _is_single_row(layer: nn.Module, x: mx.array) -> bool:
    return x.size == x.shape[-1] and "_blocks" in layer


def _single_row_product(layer: nn.Module, x: mx.array) -> mx.array:
    """One row x [..., input] @ weight.T -> [..., rows]."""
    return cast(mx.array, (x.reshape(1, 1, -1) @ layer._blocks).reshape(*x.shape[:-1], -1))


class FastLinear(nn.Linear):
    """A frozen float32 linear layer; decoding, which multiplies single rows, takes a shorter way."""

    def __call__(self, x: mx.array) -> mx.array:
        """x: [..., input] -> [..., output]."""
        if not _is_single_row(self, x):
            return super().__call__(x)
        y = _single_row_product(self, x)
        return y + self.bias if "bias" in self else y


class FastEmbedding(nn.Embedding):
    """A frozen float32 embedding whose use as the vocabulary head takes the shorter way of FastLinear."""

    def as_linear(self, x: mx.array) -> mx.array:
        """x: [..., width] -> logits [..., vocabulary]."""
        return _single_row_product(self, x) if _is_single_row(self, x) else x @ self.weight.T


class LeanLinear(nn.Linear):
    """A frozen half-precision linear layer that computes in float32."""

    def __call__(self, x: mx.array) -> mx.array:
        """x: [..., input] -> [..., output], float32."""
        return _lean_product(self, x)


class LeanQuantizedLinear(nn.QuantizedLinear):
    """A frozen quantised linear layer that dequantises inside the product."""

    def __call__(self, x: mx.array) -> mx.array:
        """x: [..., input] -> [..., output], float32."""
        return _lean_product(self, x)


class LeanEmbedding(nn.Embedding):
    """A frozen half-precision embedding that computes in float32."""

    def __call__(self, x: mx.array) -> mx.array:
        """Token ids [...] -> [..., width], float32."""
        return self.weight[x].astype(mx.float32)

    def as_linear(self, x: mx.array) -> mx.array:
        """x: [..., width] -> logits [..., vocabulary], float32."""
        return _lean_product(self, x)


class LeanQuantizedEmbedding(nn.QuantizedEmbedding):
    """A frozen quantised embedding that dequantises the rows it needs to float32."""

    def __call__(self, x: mx.array) -> mx.array:
        """Token ids [...] -> [..., width], float32."""
        return _dequantise(self, self.weight[x], self.scales[x], _biases(self, x))

    def as_linear(self, x: mx.array) -> mx.array:
        """x: [..., width] -> logits [..., vocabulary], float32."""
        return _lean_product(self, x)


_LEAN_TYPES = (LeanLinear, LeanQuantizedLinear, LeanEmbedding, LeanQuantizedEmbedding)


def _lean_product(module: nn.Module, x: mx.array) -> mx.array:
    columns, rows = linear_dims(module)
    chunk = max(1, CHUNK_BYTES // (4 * columns))

    def dense(start: int, stop: int, after: mx.array) -> mx.array:
        return _dense_rows(module, slice(start, stop), after)

    y = frozen_matmul(x, dense, rows, chunk)
    return y + module.bias if "bias" in module else y


def _dense_rows(module: nn.Module, rows: slice, after: mx.array | None) -> mx.array:
    weight: mx.array = module.weight[rows]
    if after is not None:
        weight = mx.depends(weight, after)
    if not _is_packed(module):
        return weight.astype(mx.float32)
    return _dequantise(module, weight, module.scales[rows], _biases(module, rows))


def _biases(module: nn.Module, rows: slice | mx.array) -> mx.array | None:
    """Quantisation biases of some rows; None for modes that have none (mxfp4, nvfp4)."""
    return module.biases[rows] if "biases" in module else None


def _is_packed(module: nn.Module) -> bool:
    return "scales" in module


def _dequantise(module: nn.Module, weight: mx.array, scales: mx.array, biases: mx.array | None) -> mx.array:
    # affine scales are widened first: the product then is exact to float32 whatever dtype they are stored in
    if scales.dtype in _HALF:
        scales = scales.astype(mx.float32)
        biases = biases.astype(mx.float32) if biases is not None else None
    return mx.dequantize(weight, scales, biases, module.group_size, module.bits, module.mode, dtype=mx.float32)


def _fast_layer(module: nn.Module) -> nn.Module | None:
    layer: nn.Module
    kind = type(module)  # exactly: a model's own subclass may compute something else
    if kind in (nn.QuantizedEmbedding, nn.Embedding):
        layer = FastEmbedding(1, 1)
    elif kind in (nn.QuantizedLinear, nn.Linear):
        layer = FastLinear(1, 1, bias=False)
    elif kind is QuantizedSwitchLinear:
        layer = SwitchLinear(1, 1, 1, bias=False)
    else:
        return None
    if _is_packed(module):
        layer.weight = _dequantise(module, module.weight, module.scales, _biases(module, slice(None)))
    else:
        layer.weight = module.weight.astype(mx.float32)
    if "bias" in module:
        layer.bias = module.bias.astype(mx.float32)
    if not isinstance(layer, SwitchLinear):
        rows, columns = layer.weight.shape
        block = row_block(rows, columns)
        if block and blas_threads():  # only OpenBLAS gains by it
            _cut_for_single_rows(layer, block)
    return layer


def _lean_layer(module: nn.Module) -> nn.Module | None:
    packed = _is_packed(module)
    kinds: dict[type, type] = {nn.QuantizedLinear: LeanQuantizedLinear, nn.QuantizedEmbedding: LeanQuantizedEmbedding}
    if not packed and "weight" in module and module.weight.dtype in _HALF:
        kinds = {nn.Linear: LeanLinear, nn.Embedding: LeanEmbedding}
    lean = kinds.get(type(module))
    if lean is None:
        return None
    layer: nn.Module = lean(32, 32, group_size=32, bits=4) if packed else lean(1, 1)
    for name in ("weight", "scales", "biases", "bias"):
        if name in module:
            value = module[name]
            layer[name] = value.astype(mx.float32) if name == "bias" else value
        elif name in layer:
            del layer[name]
    if packed:
        layer.group_size, layer.bits, layer.mode = module.group_size, module.bits, module.mode
    return layer


def _cast_own_arrays(module: nn.Module) -> None:
    for name, value in module.items():
        if isinstance(value, mx.array) and value.dtype in _HALF:
            module[name] = value.astype(mx.float32)
