"""Completion log-probs straight from hidden states: logits of [tokens, vocabulary] never exist whole.

The vocabulary is walked in tiles with a running maximum and sum (the online softmax of Milakov and Gimelshein
2018, arXiv:1805.02867). With a gradient wanted, the same walk accumulates softmax-weighted rows of the head, so
d logp / d hidden is ready after one pass and the backward pass is one multiplication. Everything is float32.

It knows tokens only as (row, target) predictions: nothing of pairs, masks or losses.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from localdpo.dpo import fastmath
from localdpo.model.autograd import with_vjp
from localdpo.model.device import on_cpu
from localdpo.model.frozen import linear_dims

_CPU_TILE = 1 << 19
"""Logits alive at once on a CPU: 2 MB, about what stays in its cache."""
_GPU_TILE = 1 << 25
_CPU_DENSE = 1 << 22
"""Numbers of a packed weight made dense at once: 16 MB, and some 50 on the way."""
_GPU_DENSE = 1 << 26


@dataclass(frozen=True, slots=True)
class Head:
    """The vocabulary projection: logits = cap(scale * (hidden @ weight.T + bias)), cap(x) = c * tanh(x / c).

    ``module`` is a linear layer or an embedding used as one, plain, quantised or lean.
    """

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @property
    def width(self) -> int:
        """D."""
        return linear_dims(self.module)[0]

    @property
    def vocabulary(self) -> int:
        """V."""
        return linear_dims(self.module)[1]

    def logits(self, hidden: mx.array) -> mx.array:
        """hidden [N, D] float32 -> logits [N, V], float32; a packed weight is made dense some rows at a time."""
        parts: list[mx.array] = []
        size = self._dense_rows()
        for start in range(0, self.vocabulary, size):
            tile = slice(start, start + size)
            weight = self._rows(tile, parts[-1:])
            parts.append(self._finish(hidden @ weight.T, tile))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)

    def _dense_rows(self) -> int:
        return max(1, (_CPU_DENSE if on_cpu() else _GPU_DENSE) // self.width)

    def _finish(self, raw: mx.array, tile: slice) -> mx.array:
        if "bias" in self.module:
            raw = raw + self.module.bias[tile].astype(mx.float32)
        if self.scale != 1.0:
            raw = raw * self.scale
        return raw if self.softcap is None else self.softcap * mx.tanh(raw / self.softcap)

    def _slope(self, logits: mx.array) -> mx.array | None:
        """d logits / d (hidden @ weight.T), or None where it is 1 throughout."""
        if self.softcap is None:
            return None if self.scale == 1.0 else mx.array(self.scale)
        return self.scale * (1.0 - mx.square(logits / self.softcap))

    def _rows(self, index: slice | mx.array, after: list[mx.array] | None = None) -> mx.array:
        """Rows of the weight, [n, D] float32, the same bits whether one is read as a target or in a tile.

        Not made dense before ``after`` is there: the evaluator would prepare every tile before it uses the first.
        """
        module = self.module
        picked = {name: module[name][index] for name in ("weight", "scales", "biases") if name in module}
        weight: mx.array = mx.depends(picked["weight"], after) if after else picked["weight"]
        if "scales" not in picked:
            return weight.astype(mx.float32)
        scales, biases = picked["scales"], picked.get("biases")
        if module.mode == "affine":  # widened first: half precision would round the weights once more
            scales = scales.astype(mx.float32)
            biases = biases.astype(mx.float32) if biases is not None else None
        return mx.dequantize(weight, scales, biases, module.group_size, module.bits, module.mode, dtype=mx.float32)

    def _target_logits(self, hidden: mx.array, targets: mx.array, rows: mx.array) -> mx.array:
        raw = mx.sum(hidden * rows, axis=-1)
        if "bias" in self.module:
            raw = raw + self.module.bias[targets].astype(mx.float32)
        raw = raw * self.scale
        return raw if self.softcap is None else self.softcap * mx.tanh(raw / self.softcap)

    def logps(self, hidden: mx.array, targets: mx.array, *, grad: bool = True) -> mx.array:
        """log p(target) of each prediction: hidden [N, D] any float type, targets int [N] -> float32 [N].

        ``grad=False`` skips what only a gradient needs; a gradient taken all the same is zero.
        """
        hidden = hidden.astype(mx.float32)
        if not grad:
            return self._walk(mx.stop_gradient(hidden), targets, grad=False)[0]

        def forward(hidden: mx.array) -> tuple[mx.array, mx.array]:
            logps, slope = self._walk(hidden, targets, grad=True)
            assert slope is not None
            return logps, slope

        def backward(
            hidden: mx.array, cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]
        ) -> mx.array:
            return cotangents[0][:, None] * outputs[1]

        logps: mx.array = with_vjp(forward, backward)(hidden)[0]
        return logps

    def _walk(self, hidden: mx.array, targets: mx.array, *, grad: bool) -> tuple[mx.array, mx.array | None]:
        """Log-probs [N] and, with ``grad``, d logp / d hidden [N, D]."""
        cpu = on_cpu()
        exp = fastmath.exp if cpu else mx.exp
        tile = min(self._dense_rows(), max(256, (_CPU_TILE if cpu else _GPU_TILE) // max(1, len(hidden))))
        top = mx.full((len(hidden), 1), -mx.inf)
        total = mx.zeros((len(hidden), 1))
        mean_row = mx.zeros_like(hidden)
        previous = [hidden]
        for start in range(0, self.vocabulary, tile):
            # The sum too, or the evaluator would keep every tile's weights until it gets to it.
            weight = self._rows(slice(start, start + tile), previous)
            logits = self._finish(hidden @ weight.T, slice(start, start + tile))
            raised = mx.maximum(top, mx.max(logits, axis=-1, keepdims=True))
            weights = exp(logits - raised)
            fade = mx.exp(top - raised)
            total = total * fade + mx.sum(weights, axis=-1, keepdims=True)
            if grad:
                slope = self._slope(logits)
                weights = weights if slope is None else weights * slope
                mean_row = mx.addmm(mean_row * fade, weights, weight)
            top, previous = raised, [total, mean_row] if grad else [total]
        rows = self._rows(targets)
        target_logits = self._target_logits(hidden, targets, rows)
        logps = target_logits - (top + mx.log(total))[:, 0]
        if not grad:
            return logps, None
        slope = self._slope(target_logits[:, None])
        return logps, (rows if slope is None else rows * slope) - mean_row / total
