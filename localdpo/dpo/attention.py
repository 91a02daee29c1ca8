"""Attention over a packed batch, through mlx-lm's own cache protocol.

A packed batch runs as T rows of one token each, so every linear layer sees [T, 1, width] without padding, and
rotary embeddings take each token's own position from ``cache.offset`` as they do in batched decoding. What is
left is attention itself: mlx-lm's models hand queries, keys, values and the cache to
``scaled_dot_product_attention``, and :func:`install` makes that function ask the cache when it is ours.

Keys and values of a shared prompt are traced inside the one forward pass, so gradients through them are exact,
with gradient checkpointing too. The rows may run in several lanes, each on a stream of its own: only attention looks
across, at keys and values of earlier lanes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from localdpo.dpo import fastmath
from localdpo.dpo.autograd import with_vjp
from localdpo.dpo.budget import CALL_COST
from localdpo.dpo.packing import PackedBatch, Segment
from localdpo.model.device import on_cpu

_ATTENTION = "scaled_dot_product_attention"
_SWIGLU = "swiglu"
_MASKED = -1e9


@dataclass(frozen=True, slots=True)
class Window:
    """A sliding-window mask, resolved inside :meth:`PackedCache.attend`."""

    size: int


class LaneAttention:
    """What all layers have in common while one lane of a packed batch runs: who may look where, and in which calls."""

    def __init__(self, batch: PackedBatch, *, fused: bool, frugal: bool = False, lane: int = 0) -> None:
        """``fused`` gives each block to MLX's own attention (GPU), otherwise to ours in float32 (CPU).

        Ours keeps its weights for the gradient, as many as there is context a token; ``frugal`` makes them again,
        as FlashAttention does (Dao et al. 2022, arXiv:2205.14135, algorithm 4).
        """
        self.batch = batch
        self.start, self.stop = batch.lanes[lane]
        self.fused = fused
        self.frugal = frugal
        self.offset = mx.array(batch.positions[self.start : self.stop])
        self.heads = 0
        self.bounds: list[int] = []
        """Where what the blocks look at begins and ends, ascending."""
        self._masks: dict[Any, mx.array] = {}
        self._blocks: list[Segment] = []

    def divide(self, heads: int) -> None:
        """Find the parts of the lane's tokens that an attention call takes; once for all layers."""
        if not self._blocks:
            self.heads = heads
            cost = CALL_COST["gpu" if self.fused else "cpu"] // heads
            self._blocks = self.batch.blocks(cost, (self.start, self.stop))
            self.bounds = sorted({place for block in self._blocks for span in _spans(block) for place in span})

    def by_block(self, queries: mx.array) -> Iterator[tuple[Segment, mx.array]]:
        """Each block and its own of the lane's queries [..., T, D]."""
        stops = [block.stop - self.start for block in self._blocks]
        return zip(self._blocks, _split(queries, stops), strict=True)

    def mask(self, block: Segment, window: int | None, form: Callable[[np.ndarray], np.ndarray]) -> mx.array:
        """[n, context + n]: where the block's queries may look, as ``form`` puts it; made once for all layers."""
        key = (block.start, window)
        if key not in self._masks:
            self._masks[key] = mx.array(form(self.batch.block_mask(block, window)))
        return self._masks[key]


class PackedCache:
    """Stands in for one layer's KV cache while a lane of a packed batch runs once.

    Tokens of a lane attend to earlier lanes' too. ``handed`` are those lanes' keys and values in this layer, and
    :attr:`kept` is what this lane adds for later ones: whoever takes gradients through a layer has to take them
    through both.
    """

    def __init__(self, lane: LaneAttention, earlier: Sequence[PackedCache] = ()) -> None:
        """``earlier`` are the same layer's caches of the lanes before, whose pass has been traced."""
        self.lane = lane
        self.offset = lane.offset
        self.handed = [array for cache in earlier for array in cache.kept]
        self.kept: list[mx.array] = []
        self._starts = [cache.lane.start for cache in earlier]

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Window | None:
        """Mlx-lm's hook; causality is known from the segments, so only a window is worth passing on."""
        deepest = int(self.lane.batch.positions.max())
        return None if window_size is None or window_size > deepest else Window(window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Mlx-lm's hook; [T, Hkv, 1, D] each, nothing to add: all tokens are in this pass."""
        return keys, values

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Window | None
    ) -> mx.array:
        """queries [T, H, 1, D], keys and values [T, Hkv, 1, D] of the lane's T tokens -> [T, H, 1, D]."""
        self.lane.divide(queries.shape[1])
        attend = self._attend_fused if self.lane.fused else self._attend_in_float32
        return attend(queries, keys, values, scale, mask.size if mask is not None else None)

    def _attend_fused(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, window: int | None
    ) -> mx.array:
        lane = self.lane
        queries, keys, values = (x.transpose(2, 1, 0, 3) for x in (queries, keys, values))
        all_keys, all_values = self._keep(keys, values)
        parts = []
        for block, own in lane.by_block(queries):
            mask = lane.mask(block, window, lambda allowed: allowed)
            attend = mx.fast.scaled_dot_product_attention
            parts.append(attend(own, all_keys.take(block), all_values.take(block), scale=scale, mask=mask))
        return _joined(parts).transpose(2, 1, 0, 3)

    def _attend_in_float32(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, window: int | None
    ) -> mx.array:
        lane = self.lane
        size, heads, _, width = queries.shape
        kv_heads, dtype = keys.shape[1], queries.dtype
        queries, keys, values = (x.astype(mx.float32) for x in (queries, keys, values))
        # Query heads that share keys stand side by side, so each product is one larger matrix product.
        queries = (queries.reshape(size, heads, width) * scale).transpose(1, 0, 2)
        queries = queries.reshape(kv_heads, heads // kv_heads, size, width)
        keys = keys.reshape(size, kv_heads, -1).transpose(1, 0, 2)
        values = values.reshape(size, kv_heads, -1).transpose(1, 0, 2)
        all_keys, all_values = self._keep(keys, values)
        attend = _keeps_rows if lane.frugal else _keeps_weights
        parts = []
        for block, own in lane.by_block(queries):
            mask = lane.mask(block, window, _penalties)
            parts.append(attend(own, all_keys.take(block), all_values.take(block), mask)[0])
        return _joined(parts).reshape(heads, size, -1).transpose(1, 0, 2)[:, :, None].astype(dtype)

    def _keep(self, keys: mx.array, values: mx.array) -> tuple[_Pieces, _Pieces]:
        """Keep the lane's own for later lanes; all that the blocks look at, earlier lanes' included."""
        self.kept = [keys, values]
        starts = [*self._starts, self.lane.start]
        all_keys, all_values = [*self.handed[0::2], keys], [*self.handed[1::2], values]
        return _Pieces(starts, all_keys, self.lane.bounds), _Pieces(starts, all_values, self.lane.bounds)


class _Pieces:
    """Keys or values in pieces between bounds: the gradient of a piece is no larger than the piece."""

    def __init__(self, starts: Sequence[int], arrays: Sequence[mx.array], bounds: Sequence[int]) -> None:
        """``arrays`` [..., n, D] begin at the tokens ``starts`` and follow one another."""
        self._at: list[tuple[int, mx.array]] = []
        for start, array in zip(starts, arrays, strict=True):
            stop = start + array.shape[-2]
            inside = [bound for bound in bounds if start < bound < stop]
            pieces = _split(array, [bound - start for bound in (*inside, stop)])
            self._at += zip((start, *inside), pieces, strict=True)

    def take(self, block: Segment) -> mx.array:
        """Those of a block's context and its own."""
        return _joined(
            [piece for low, high in _spans(block) for start, piece in self._at if low <= start < high], axis=-2
        )


def _split(x: mx.array, stops: Sequence[int]) -> list[mx.array]:
    """``x`` [..., n, D] in parts that end at ``stops``, the last of which is n."""
    return [x] if len(stops) == 1 else list(mx.split(x, list(stops[:-1]), axis=-2))


def _penalties(allowed: np.ndarray) -> np.ndarray:
    """0 where a query may look, a large negative number elsewhere, to be added to the scores."""
    return np.where(allowed, 0.0, _MASKED).astype(np.float32)


def _joined(parts: list[mx.array], axis: int = 2) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=axis)


def _spans(block: Segment) -> tuple[tuple[int, int], ...]:
    return (*block.ancestors, (block.start, block.stop))


def _weights_forward(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
    """queries [K, G, n, D] scaled, keys, values [K, m, D], mask [n, m] -> out [K, G, n, D], weights [K, G*n, m]."""
    scores = _scores(queries, keys, mask)
    weights = fastmath.exp(scores - mx.max(scores, axis=-1, keepdims=True))
    weights = weights * mx.reciprocal(mx.sum(weights, axis=-1, keepdims=True))
    weights = _flat(weights)
    return (weights @ values).reshape(*queries.shape[:3], -1), weights


def _weights_backward(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]
) -> tuple[mx.array, ...]:
    return _attention_gradient(primals, cotangents[0], *outputs)


def _rows_forward(
    queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Like :func:`_weights_forward`, with a row's top and scale in place of its weights exp(scores - top) * scale."""
    scores = _scores(queries, keys, mask)
    top = mx.max(scores, axis=-1, keepdims=True)
    weights = fastmath.exp(scores - top)
    scale = mx.reciprocal(mx.sum(weights, axis=-1, keepdims=True))
    return (_flat(weights * scale) @ values).reshape(*queries.shape[:3], -1), top, scale


def _rows_backward(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, mx.array, mx.array]
) -> tuple[mx.array, ...]:
    queries, keys, _, mask = primals
    out, top, scale = outputs
    # Not before the gradient is here, or weights of all layers would lie ready and wait for it.
    queries, keys = mx.depends([queries, keys], [cotangents[0]])
    weights = _flat(fastmath.exp(_scores(queries, keys, mask) - top) * scale)
    return _attention_gradient(primals, cotangents[0], out, weights)


def _scores(queries: mx.array, keys: mx.array, mask: mx.array) -> mx.array:
    return (_flat(queries) @ keys.swapaxes(1, 2)).reshape(*queries.shape[:3], -1) + mask


def _flat(x: mx.array) -> mx.array:
    """[K, G, n, m] -> [K, G*n, m]."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _attention_gradient(
    primals: tuple[mx.array, ...], into_out: mx.array, out: mx.array, weights: mx.array
) -> tuple[mx.array, ...]:
    queries, keys, values, mask = primals
    # Softmax's gradient needs sum(weights * into_weights) a row, which equals sum(out * into_out).
    along = mx.sum(into_out * out, axis=-1)
    into_out = _flat(into_out)
    into_values = weights.swapaxes(1, 2) @ into_out
    into_scores = weights * (into_out @ values.swapaxes(1, 2) - along.reshape(*into_out.shape[:2], 1))
    into_queries = (into_scores @ keys).reshape(queries.shape)
    into_keys = into_scores.swapaxes(1, 2) @ _flat(queries)
    return into_queries, into_keys, into_values, mx.zeros_like(mask)


_keeps_weights = with_vjp(_weights_forward, _weights_backward)
_keeps_rows = with_vjp(_rows_forward, _rows_backward)


def install(model: nn.Module, *, fast_activations: bool) -> None:
    """Let the model's architecture modules hand packed attention to :class:`PackedCache`.

    mlx-lm looks both functions up in its architecture module, which is the only place where a cache can reach
    attention. Calls that don't carry a PackedCache go to mlx-lm's own function, so nothing else changes;
    installing twice does nothing. ``fast_activations`` does the same for SwiGLU in float32 on a CPU.
    """
    names = {type(module).__module__ for module in model.modules()}
    for name in sorted(names):
        namespace = vars(sys.modules[name])
        _replace(namespace, _ATTENTION, _dispatch_attention)
        if fast_activations:
            _replace(namespace, _SWIGLU, _dispatch_swiglu)


def _replace(
    namespace: dict[str, Any], name: str, dispatch: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    original = namespace.get(name)
    if callable(original) and not hasattr(original, "localdpo_original"):
        replacement = wraps(original)(dispatch(original))
        replacement.localdpo_original = original  # type: ignore[attr-defined]
        namespace[name] = replacement


def _dispatch_attention(original: Callable[..., Any]) -> Callable[..., Any]:
    def attention(
        queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scale: float, mask: Any, **more: Any
    ) -> Any:
        if not isinstance(cache, PackedCache) or more.get("sinks") is not None:
            return original(queries, keys, values, cache=cache, scale=scale, mask=mask, **more)
        return cache.attend(queries, keys, values, scale, mask)

    return attention


def _dispatch_swiglu(original: Callable[..., Any]) -> Callable[..., Any]:
    def swiglu(gate: mx.array, up: mx.array) -> Any:
        if gate.dtype == mx.float32 and up.dtype == mx.float32 and on_cpu():
            return fastmath.swiglu(gate, up)
        return original(gate, up)

    return swiglu
