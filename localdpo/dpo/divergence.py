"""Kullback-Leibler divergence between what two models say comes next, a few tokens at a time.

Logits of [tokens, vocabulary] never exist whole: both models' hidden states are kept, and projected in chunks of
rows, one after the other. It knows predictions only, nothing of pairs or adapters.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from localdpo.dpo import fastmath
from localdpo.model.device import on_cpu

_CPU_CHUNK = 1 << 22
"""Logits alive at once, of each model: 16 MB on a CPU."""
_GPU_CHUNK = 1 << 25
_VOCABULARY = 1 << 16
"""About what models have; the chunk is rounded by it, nothing depends on it."""


def token_kl(logits: Callable[[mx.array], mx.array], p: mx.array, q: mx.array, *, chunk: int | None = None) -> mx.array:
    """KL(p || q) of each prediction in nats: p, q [N, ...], rows that ``logits`` maps to [n, V] -> float32 [N].

    Lazy: the chunks are chained, so that evaluating the result holds one of them at a time. ``chunk`` is in rows.
    """
    rows = chunk or max(1, (_CPU_CHUNK if on_cpu() else _GPU_CHUNK) // _VOCABULARY)
    parts: list[mx.array] = []
    for start in range(0, len(p), rows):
        p_rows, q_rows = p[start : start + rows], q[start : start + rows]
        if parts:
            p_rows, q_rows = mx.depends([p_rows, q_rows], [parts[-1]])
        parts.append(_kl(logits(p_rows), logits(q_rows)))
    return mx.concatenate(parts) if parts else mx.zeros((0,))


def _kl(p_logits: mx.array, q_logits: mx.array) -> mx.array:
    """sum p (log p - log q), both logits [n, V] float32; never below 0, as rounding alone could be."""
    exp = fastmath.exp if on_cpu() else mx.exp
    p_shifted = p_logits - mx.max(p_logits, axis=-1, keepdims=True)
    q_shifted = q_logits - mx.max(q_logits, axis=-1, keepdims=True)
    p_weights = exp(p_shifted)
    p_total = mx.sum(p_weights, axis=-1, keepdims=True)
    q_total = mx.sum(exp(q_shifted), axis=-1, keepdims=True)
    difference = (p_shifted - mx.log(p_total)) - (q_shifted - mx.log(q_total))
    return mx.maximum(mx.sum(p_weights * difference, axis=-1) / p_total[:, 0], 0.0)
