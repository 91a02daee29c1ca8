"""Prompts that begin alike: the beginning runs once, and every row of a batch starts from its keys and values.

Chat templates open every prompt with the same system message, often most of it. It knows attention caches only; a
model with any other state runs its prompts whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache


class Prefix(NamedTuple):
    """``length`` tokens that all prompts begin with; the keys and values of each layer, [1, heads, length, width]."""

    length: int
    layers: list[tuple[mx.array, mx.array]]


def shared_length(prompts: Sequence[Sequence[int] | np.ndarray]) -> int:
    """How many tokens all prompts begin with, leaving each of them one of its own; 0 for fewer than two prompts."""
    if len(prompts) < 2:
        return 0
    shortest = min(len(prompt) for prompt in prompts) - 1
    rows = np.array([np.asarray(prompt[:shortest]) for prompt in prompts])
    equal = (rows == rows[0]).all(axis=0)
    return int(equal.argmin()) if not equal.all() else shortest


def run_prefix(model: Any, prompts: Sequence[Sequence[int] | np.ndarray]) -> Prefix | None:
    """Run what all ``prompts`` begin with; None where that is nothing or a layer keeps anything but its attention."""
    length = shared_length(prompts)
    caches = make_prompt_cache(model)
    if length < 1 or any(type(cache) is not KVCache for cache in caches):
        return None
    model(mx.array(np.asarray(prompts[0][:length]))[None], cache=caches)
    layers = [(cache.keys[..., :length, :], cache.values[..., :length, :]) for cache in caches]
    mx.eval(layers)
    return Prefix(length, layers)


def caches_after(prefix: Prefix, padding: Sequence[int]) -> list[BatchKVCache]:
    """Batch caches of rows that are ``padding`` columns short on the left, their first ``prefix.length`` columns done.

    A row that starts late has less of the prefix in those columns: the columns that follow repeat the rest of it.
    """
    columns = np.arange(prefix.length)[None, :] - np.array(padding)[:, None]
    tokens = mx.array(np.maximum(columns, 0))  # what stands in the padding is masked
    caches = []
    for keys, values in prefix.layers:
        cache = BatchKVCache(list(padding))
        cache.offset = cache.offset + prefix.length
        rows = (mx.take(part[0], tokens, axis=1).swapaxes(0, 1) for part in (keys, values))
        cache.state = (*rows, cache.offset, cache.left_padding, prefix.length)
        caches.append(cache)
    return caches
