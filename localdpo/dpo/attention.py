"""Attention over a packed batch, through mlx-lm's own cache protocol.

A packed batch runs as T rows of one token each, so every linear layer sees [T, 1, width] without padding, and
rotary embeddings take each token's own position from ``cache.offset`` as they do in batched decoding. What is
left is attention itself: mlx-lm's models hand queries, keys, values and the cache to
``scaled_dot_product_attention``, and :class:`PackedAttention` makes that function ask the cache when it is ours.

Keys and values of a shared prompt are traced inside the one forward pass, so gradients through them are exact,
with gradient checkpointing too. The rows may run in several lanes, each on a stream of its own: only attention looks
across, at keys and values of earlier lanes.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import accumulate, chain
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from localdpo.dpo import fastmath
from localdpo.dpo.budget import CALL_COST, IN_FLIGHT
from localdpo.dpo.packing import PackedBatch, Segment
from localdpo.model.autograd import with_vjp
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

    def __init__(self, batch: PackedBatch, *, fused: bool, lane: int = 0) -> None:
        """``fused`` gives each block to MLX's own attention (GPU), otherwise to ours in float32 (CPU)."""
        self.batch = batch
        self.start, self.stop = batch.lanes[lane]
        self.fused = fused
        self.offset = mx.array(batch.positions[self.start : self.stop])
        self.heads = 0
        self.windows: set[int] = set()
        self._lanes = batch.lanes[: lane + 1]
        self._masks: dict[Any, mx.array] = {}
        self._blocks: list[Segment] = []
        self._pieces: _Pieces | None = None

    def divide(self, heads: int) -> None:
        """Find the parts of the lane's tokens that an attention call takes; once for all layers."""
        if not self._blocks:
            self.heads = heads
            cost = CALL_COST["gpu" if self.fused else "cpu"] // heads
            self._blocks = self.batch.blocks(cost, (self.start, self.stop))
            self._pieces = _Pieces(self._lanes, self._blocks)

    @property
    def pieces(self) -> _Pieces:
        """How keys and values of this lane and earlier ones fall apart; after :meth:`divide`."""
        assert self._pieces is not None
        return self._pieces

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

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Window | None:
        """Mlx-lm's hook; causality is known from the segments, so only a window is worth passing on."""
        deepest = int(self.lane.batch.positions.max())
        if window_size is not None:
            self.lane.windows.add(window_size)
        return None if window_size is None or window_size > deepest else Window(window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Mlx-lm's hook; [T, Hkv, 1, D] each, nothing to add: all tokens are in this pass."""
        return keys, values

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Window | None
    ) -> mx.array:
        """queries [T, H, 1, D], keys and values [T, Hkv, 1, D] of the lane's T tokens -> [T, H, 1, D].

        Raises TypeError for a mask that the model made by itself: it knows nothing of the tree.
        """
        if mask is not None and not isinstance(mask, Window):
            raise TypeError("attention was given a mask of the model's own")
        self.lane.divide(queries.shape[1])
        attend = self._attend_fused if self.lane.fused else self._attend_in_float32
        return attend(queries, keys, values, scale, mask.size if mask is not None else None)

    def _attend_fused(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, window: int | None
    ) -> mx.array:
        lane = self.lane
        queries, keys, values = (x.transpose(2, 1, 0, 3) for x in (queries, keys, values))
        all_keys, all_values = map(lane.pieces.split, self._keep(keys, values))
        parts = []
        for block, own in lane.by_block(queries):
            mask = lane.mask(block, window, lambda allowed: allowed)
            its_keys, its_values = (_joined(lane.pieces.of(block, x), axis=-2) for x in (all_keys, all_values))
            parts.append(mx.fast.scaled_dot_product_attention(own, its_keys, its_values, scale=scale, mask=mask))
        return _joined(parts).transpose(2, 1, 0, 3)

    def _attend_in_float32(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, window: int | None
    ) -> mx.array:
        size, heads, _, width = queries.shape
        kv_heads, dtype = keys.shape[1], queries.dtype
        queries, keys, values = (x.astype(mx.float32) for x in (queries, keys, values))
        # Query heads that share keys stand side by side, so each product is one larger matrix product.
        queries = (queries.reshape(size, heads, width) * (scale * fastmath.LOG2_E)).transpose(1, 0, 2)
        queries = queries.reshape(kv_heads, heads // kv_heads, size, width)
        keys = keys.reshape(size, kv_heads, -1).transpose(1, 0, 2)
        values = values.reshape(size, kv_heads, -1).transpose(1, 0, 2)
        all_keys, all_values = self._keep(keys, values)
        attend = with_vjp(*_block_by_block(self.lane, window))
        out: mx.array = attend(queries, *all_keys, *all_values)[0]
        return out.reshape(heads, size, -1).transpose(1, 0, 2)[:, :, None].astype(dtype)

    def _keep(self, keys: mx.array, values: mx.array) -> tuple[list[mx.array], list[mx.array]]:
        """Keep the lane's own for later lanes; keys and values of all lanes up to this one."""
        self.kept = [keys, values]
        return [*self.handed[0::2], keys], [*self.handed[1::2], values]


class _Pieces:
    """Keys or values of some lanes in pieces, of which a block looks at all or nothing.

    The gradient of a piece is no larger than the piece.
    """

    def __init__(self, lanes: Sequence[tuple[int, int]], blocks: Sequence[Segment]) -> None:
        bounds = {place for block in blocks for span in _spans(block) for place in span}
        cuts = [[*sorted(place for place in bounds if start < place < stop), stop] for start, stop in lanes]
        self._cuts = [[place - start for place in inside] for (start, _), inside in zip(lanes, cuts, strict=True)]
        stops = list(chain(*cuts))  # lanes follow one another
        starts = [0, *stops[:-1]]
        self._sizes = [stop - start for start, stop in zip(starts, stops, strict=True)]
        self._seen = {
            block.start: [
                number for low, high in _spans(block) for number, start in enumerate(starts) if low <= start < high
            ]
            for block in blocks
        }

    def __len__(self) -> int:
        return len(self._cuts)

    def split(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """The pieces of the lanes' ``arrays`` [..., n, D]."""
        return [piece for array, stops in zip(arrays, self._cuts, strict=True) for piece in _split(array, stops)]

    def of(self, block: Segment, pieces: Sequence[mx.array]) -> list[mx.array]:
        """Those of ``pieces`` that the block looks at."""
        return [pieces[number] for number in self._seen[block.start]]

    def add(self, totals: dict[int, mx.array], block: Segment, part: mx.array) -> list[mx.array]:
        """Add ``part`` [..., m, D], a row for each row that the block looks at, to the pieces' ``totals``."""
        numbers = self._seen[block.start]
        parts = _split(part, list(accumulate(self._sizes[number] for number in numbers)))
        for number, own in zip(numbers, parts, strict=True):
            totals[number] = totals[number] + own if number in totals else own
        return [totals[number] for number in numbers]

    def joined(self, totals: dict[int, mx.array], like: Sequence[mx.array]) -> list[mx.array]:
        """The lanes' arrays again, shaped as ``like``; zeros where no block looks."""
        arrays, number = [], 0
        for array, cuts in zip(like, self._cuts, strict=True):
            parts = []
            for own in range(number, number + len(cuts)):
                shape = (*array.shape[:-2], self._sizes[own], array.shape[-1])
                parts.append(totals[own] if own in totals else mx.zeros(shape, array.dtype))
            arrays.append(_joined(parts, axis=-2))
            number += len(cuts)
        return arrays


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


def _block_by_block(lane: LaneAttention, window: int | None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Attention of a lane and its gradient, a few blocks at a time.

    A block waits for an earlier one, so that few blocks' scores are alive: left to MLX all would be begun together. The
    weights are not kept. The backward pass makes them again from two numbers a row, as FlashAttention does (Dao et al.
    2022, arXiv:2205.14135, algorithm 4). They are 2**(score - top) * scale, with ``scale`` multiplied into what has
    one row a query rather than into the scores.
    """
    pieces, count = lane.pieces, len(lane.pieces)

    def forward(queries: mx.array, *context: mx.array) -> list[mx.array]:
        """queries [K, G, n, D], keys and values [K, m, D] of every lane -> out [K, G, n, D], top and scale [.., 1]."""
        keys, values = pieces.split(context[:count]), pieces.split(context[count:])
        rows: list[tuple[mx.array, mx.array, mx.array]] = []
        for block, own in lane.by_block(queries):
            own = _after(own, [rows[-IN_FLIGHT][0]] if len(rows) >= IN_FLIGHT else [])
            scores = _scores(own, _joined(pieces.of(block, keys), 1), lane.mask(block, window, _penalties))
            top = mx.ceil(mx.max(scores, axis=-1, keepdims=True))
            weights = fastmath.exp2_below(scores, top)
            scale = mx.reciprocal(mx.sum(weights, axis=-1, keepdims=True))
            out = _flat(weights) @ _joined(pieces.of(block, values), 1)
            rows.append((out.reshape(*own.shape[:3], -1) * scale, top, scale))
        return [_joined(list(parts)) for parts in zip(*rows, strict=True)]

    def backward(
        primals: tuple[mx.array, ...], cotangents: Sequence[mx.array], outputs: Sequence[mx.array]
    ) -> list[mx.array]:
        queries, *context = primals
        into_out, (out, top, scale) = cotangents[0], outputs
        all_keys, all_values = context[:count], context[count:]
        # Softmax's gradient needs sum(weights * into_weights) a row, which equals sum(out * into_out). It is taken
        # away within the product, by a column more.
        into_out = into_out * scale
        along = mx.sum(into_out * out, axis=-1, keepdims=True)
        into_weights = mx.concatenate([into_out, -along], axis=-1) / fastmath.LOG2_E
        ones = [mx.concatenate([x, mx.ones((*x.shape[:2], 1))], axis=2) for x in all_values]
        keys, values = pieces.split(all_keys), pieces.split(ones)
        into_keys: dict[int, mx.array] = {}
        into_values: dict[int, mx.array] = {}
        into_queries: list[mx.array] = []
        blocks = zip(*(lane.by_block(x) for x in (queries, top, into_out, into_weights)), strict=True)
        for (block, own), (_, its_top), (_, its_out), (_, its_weights) in blocks:
            own = _after(own, [into_queries[-IN_FLIGHT] if len(into_queries) >= IN_FLIGHT else into_out])
            its_keys, its_values = (_joined(pieces.of(block, x), 1) for x in (keys, values))
            scores = _scores(own, its_keys, lane.mask(block, window, _penalties))
            weights = _flat(fastmath.exp2_below(scores, its_top))
            added = pieces.add(into_values, block, weights.swapaxes(1, 2) @ _flat(its_out))
            into_scores = weights * (_flat(its_weights) @ its_values.swapaxes(1, 2))
            added += pieces.add(into_keys, block, into_scores.swapaxes(1, 2) @ _flat(own))
            into_queries.append(_after((into_scores @ its_keys).reshape(own.shape), added))
        return [_joined(into_queries), *pieces.joined(into_keys, all_keys), *pieces.joined(into_values, all_values)]

    return forward, backward


def _after(x: mx.array, others: list[mx.array]) -> mx.array:
    """``x``, which is not there before ``others`` are."""
    return mx.depends([x], others)[0] if others else x


def _scores(queries: mx.array, keys: mx.array, mask: mx.array) -> mx.array:
    return (_flat(queries) @ keys.swapaxes(1, 2)).reshape(*queries.shape[:3], -1) + mask


def _flat(x: mx.array) -> mx.array:
    """[K, G, n, m] -> [K, G*n, m]."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


class PackedAttention:
    """While it is entered, a model's architecture modules hand packed attention to :class:`PackedCache`.

    mlx-lm looks attention up in its architecture module, which is the only place where a cache can reach it. Calls
    that carry no PackedCache go to mlx-lm's own function, so nothing else changes, and the last one to leave puts
    everything back. ``fast_activations`` does the same for SwiGLU in float32 on a CPU.
    """

    def __init__(self, model: nn.Module, *, fast_activations: bool) -> None:
        self._modules = sorted({type(module).__module__ for module in model.modules()})
        self._dispatch = {_ATTENTION: _dispatch_attention}
        if fast_activations:
            self._dispatch[_SWIGLU] = _dispatch_swiglu

    def __enter__(self) -> None:
        with _patching:
            for module in self._modules:
                for name, dispatch in self._dispatch.items():
                    _patch(module, name, dispatch)

    def __exit__(self, *_: object) -> None:
        with _patching:
            for module in self._modules:
                for name in self._dispatch:
                    _unpatch(module, name)


_patching = threading.Lock()
_originals: dict[tuple[str, str], tuple[Any, int]] = {}
"""By module and name: the function that was there, and how many times it has been replaced."""


def _patch(module: str, name: str, dispatch: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    namespace = vars(sys.modules[module])
    if not callable(namespace.get(name)):
        return
    original, users = _originals.get((module, name), (namespace[name], 0))
    if not users:
        namespace[name] = wraps(original)(dispatch(original))
    _originals[module, name] = original, users + 1


def _unpatch(module: str, name: str) -> None:
    if (module, name) not in _originals:
        return
    original, users = _originals.pop((module, name))
    if users > 1:
        _originals[module, name] = original, users - 1
    else:
        vars(sys.modules[module])[name] = original


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
