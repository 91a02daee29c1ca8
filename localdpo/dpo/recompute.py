"""Less memory for the backward pass: what is cheap to make again is made again, not kept.

:class:`Checkpointed` keeps nothing of a layer but its inputs (Chen et al. 2016, arXiv:1604.06174), for a third more
time. :class:`Frugal` keeps all of a layer that takes a matrix product to make: it costs next to nothing. An adapter on
``down_proj`` needs that layer's input for its gradient and SwiGLU's gradient the sigmoid, two arrays as wide as the
MLP for every token; both follow from ``gate`` and ``up`` by multiplications and one exp.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from localdpo.dpo.attention import PackedCache
from localdpo.dpo.standin import StandIn, Trainable, replaced
from localdpo.model.autograd import on_this_stream, with_vjp
from localdpo.model.frozen import linear_dims

_PARTS = ("gate_proj", "up_proj", "down_proj")
_ACTIVATION = "swiglu"
_MLP = "mlp"

Activation = Callable[[mx.array, mx.array], mx.array]


class InOrder(StandIn):
    """Stands in for a layer and finishes its parameters' gradients before any gradient goes on to the layers below.

    MLX would do them when it likes, which is late: they are outputs, and nothing else waits for them. Until then all
    that they are made of stays in memory, the inputs of every layer that carries an adapter among it. A layer whose
    first argument is no array, as some architectures call theirs, is left to MLX.
    """

    def __init__(self, layer: nn.Module, stand_in: Any) -> None:
        """``stand_in`` is called for ``layer``; it may be the layer itself."""
        super().__init__(layer)
        self._stand_in = stand_in
        self._trainable = Trainable(layer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run what stands in for the layer."""
        if not self._trainable or not args or not isinstance(args[0], mx.array):
            return self._stand_in(*args, **kwargs)
        outside = self._trainable.get()
        hidden, *inside = _gate(args[0], *outside)
        self._trainable.put(inside)
        out = self._stand_in(hidden, *args[1:], **kwargs)
        self._trainable.put(outside)
        return out


def _gate_backward(primals: Any, cotangents: list[mx.array], outputs: Any) -> list[mx.array]:
    below, *gradients = cotangents
    return [mx.depends(below, gradients), *gradients]


_gate = with_vjp(lambda *arrays: list(arrays), _gate_backward)


class Checkpointed(StandIn):
    """Stands in for a layer and recomputes it in the backward pass instead of keeping its activations.

    Whatever a gradient flows through is an argument or a result of the checkpointed function: the layer's trainable
    arrays, what earlier layers hand over beside the hidden states (keys and values, in some architectures), and what
    passes between lanes through ``cache``. Captured, it would get none. Dropout draws the same mask both times.
    """

    def __init__(self, layer: nn.Module, cache: PackedCache | None = None) -> None:
        super().__init__(layer)
        self._cache = cache
        self._trainable = Trainable(layer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer."""
        layer, cache, trainable = self._layer, self._cache, self._trainable
        outside = trainable.get()
        handed = cache.handed if cache is not None else []
        seed = int(np.array(mx.random.randint(0, 2**31 - 1))) if _drops_out(layer) else None

        def inner(inside: list[mx.array], handed: list[mx.array], args: Any, kwargs: Any) -> Any:
            trainable.put(inside)
            if cache is not None:
                cache.handed = handed
            with _random_from(seed):
                out = layer(*args, **kwargs)
            return out, cache.kept if cache is not None else []

        out, kept = mx.checkpoint(on_this_stream(inner))(outside, handed, args, kwargs)
        trainable.put(outside)
        if cache is not None:
            cache.handed, cache.kept = handed, kept
        return out


def _drops_out(layer: nn.Module) -> bool:
    return any(isinstance(m, nn.Dropout) and m.training and m._p_1 < 1 for m in layer.modules())


@contextmanager
def _random_from(seed: int | None) -> Iterator[None]:
    """Draw from ``seed`` within the block, and go on with MLX's own random state after it."""
    if seed is None:
        yield
        return
    state: Any = mx.random.state
    high, low = state[0].tolist()
    mx.random.seed(seed)
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)


class Frugal(StandIn):
    """Stands in for a layer whose ``mlp`` is a gated one, and makes the input of its last product again."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer."""
        with replaced(self._layer, {_MLP: _GatedMLP(self._layer[_MLP])}):
            return self._layer(*args, **kwargs)


def keeping(
    layers: Sequence[nn.Module],
    *,
    checkpoint: bool,
    gated: Container[int] = (),
    caches: Sequence[PackedCache] = (),
) -> list[Any]:
    """What stands for each layer while gradients are taken: checkpointed, or frugal where ``gated`` has its ``id``.

    ``caches`` are the layers' own, in their order; none on the plain path.
    """

    def stand_in(index: int, layer: nn.Module) -> Any:
        if checkpoint:
            return Checkpointed(layer, caches[index] if caches else None)
        return Frugal(layer) if id(layer) in gated else layer

    return [InOrder(layer, stand_in(index, layer)) for index, layer in enumerate(layers)]


def is_gated_mlp(layer: nn.Module) -> bool:
    """Whether ``layer.mlp`` is ``down_proj(swiglu(gate_proj(x), up_proj(x)))``: by its parts, and proved by numbers."""
    mlp = layer.get(_MLP)
    if not isinstance(mlp, nn.Module) or sorted(mlp.children()) != sorted(_PARTS) or _activation(mlp) is None:
        return False
    width, _ = linear_dims(_base(mlp.gate_proj))
    rows = mx.array(np.random.default_rng(0).standard_normal((3, 1, width)).astype(np.float32))
    dtype = mlp.gate_proj(rows[:1]).dtype
    return bool(mx.array_equal(_GatedMLP(mlp)(rows.astype(dtype)), mlp(rows.astype(dtype))))


def _base(module: nn.Module) -> nn.Module:
    """The layer that an adapter wraps."""
    return cast(nn.Module, module.get("linear", module))


def _activation(mlp: nn.Module) -> Activation | None:
    found = vars(sys.modules[type(mlp).__module__]).get(_ACTIVATION)
    return found if callable(found) else None


class _GatedMLP:
    def __init__(self, mlp: nn.Module) -> None:
        self._mlp = mlp

    def __call__(self, x: mx.array) -> mx.array:
        mlp = self._mlp
        down = Checkpointed(_Down(cast(Activation, _activation(mlp)), mlp.down_proj))
        return cast(mx.array, down(mlp.gate_proj(x), mlp.up_proj(x)))


class _Down(nn.Module):
    """The part that is made again. Its own product is not: nothing in the backward pass asks for it."""

    def __init__(self, activation: Activation, down_proj: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.down_proj = down_proj
        self._activation = activation

    def __call__(self, gate: mx.array, up: mx.array) -> mx.array:
        return cast(mx.array, self.down_proj(self._activation(gate, up)))
