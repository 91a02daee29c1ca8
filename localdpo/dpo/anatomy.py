"""Where an mlx-lm model's body, layers and vocabulary head are, found by looking and proved by numbers.

mlx-lm's models agree on a call, ``model(ids, cache) -> logits``, not on their insides. :func:`examine` guesses the
insides from their usual names and keeps a guess only when it reproduces the model's own logits; otherwise the
caller has the reason why not and uses the model as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from localdpo.dpo.head import Head

_OUTER = ("language_model",)
_BODIES = ("model", "transformer", "backbone", "gpt_neox")
_LAYER_LISTS = ("layers", "h")
_EMBEDDINGS = ("embed_tokens", "wte", "embeddings", "tok_embeddings", "word_embeddings", "embed_in")
_HEADS = ("lm_head", "output", "embed_out")
_NORM = "norm"
_PROBE_TOKENS = 7


class NotUnderstood(Exception):
    """The model's insides could not be told apart; the message says what was missing."""


@dataclass(frozen=True)
class Anatomy:
    """A model taken apart: ``head(body(ids)) == model(ids)``. ``dtype`` is that of the body's hidden states."""

    body: nn.Module
    layer_list: str
    head: Head
    dtype: mx.Dtype

    @property
    def layers(self) -> list[nn.Module]:
        """The transformer layers, bottom first."""
        found: list[nn.Module] = self.body[self.layer_list]
        return found

    @contextmanager
    def replaced_layers(self, stand_ins: Sequence[Any], *, final_norm: bool = True) -> Iterator[None]:
        """Within the block the body runs ``stand_ins`` in place of its layers, and its last norm or none."""
        layers, norm = self.layers, self.body.get(_NORM)
        self.body[self.layer_list] = list(stand_ins)
        if not final_norm:
            self.body[_NORM] = nn.Identity()
        try:
            yield
        finally:
            self.body[self.layer_list] = layers
            if not final_norm:
                self.body[_NORM] = norm

    @property
    def has_norm(self) -> bool:
        """Whether the body ends in a norm found by name, so that states can be read before it."""
        return isinstance(self.body.get(_NORM), nn.Module)


def examine(model: nn.Module) -> Anatomy:
    """Take ``model`` apart. Raises NotUnderstood with the reason in words."""
    outer = next((model[name] for name in _OUTER if name in model), model)
    body = next((outer[name] for name in _BODIES if isinstance(outer.get(name), nn.Module)), None)
    if body is None:
        raise NotUnderstood("its transformer body was not found")
    layer_list = next((name for name in _LAYER_LISTS if isinstance(body.get(name), list)), None)
    if layer_list is None:
        raise NotUnderstood("its layers are not one list")
    vocabulary = _vocabulary(outer, body)
    ids = mx.array([[(37 * i + 11) % vocabulary for i in range(_PROBE_TOKENS)]])
    expected = model(ids)[0].astype(mx.float32)
    try:
        hidden = body(ids, cache=None)
    except TypeError:
        raise NotUnderstood("its body is not called as model(ids, cache) is") from None
    if not isinstance(hidden, mx.array) or hidden.ndim != 3:
        raise NotUnderstood("its body does not return hidden states")
    for head in _candidate_heads(outer, body):
        fits = head.width == hidden.shape[-1]
        if fits and _same(head.logits(hidden[0].astype(mx.float32)), expected, hidden.dtype):
            return Anatomy(body, layer_list, head, hidden.dtype)
    raise NotUnderstood("its logits are not a plain, scaled or soft-capped projection of its hidden states")


def _vocabulary(outer: nn.Module, body: nn.Module) -> int:
    modules = list(_projections(outer, body))
    if not modules:
        raise NotUnderstood("its vocabulary head was not found")
    return min(Head(module).vocabulary for module in modules)


def _projections(outer: nn.Module, body: nn.Module) -> Iterator[nn.Module]:
    for owner, names in ((outer, _HEADS), (body, _HEADS), (body, _EMBEDDINGS)):
        for name in names:
            module = owner.get(name)
            if isinstance(module, nn.Module) and "weight" in module:
                yield module


def _candidate_heads(outer: nn.Module, body: nn.Module) -> Iterator[Head]:
    settings = [getattr(owner, "args", None) or getattr(owner, "config", None) for owner in (outer, body)]

    def setting(name: str) -> float | None:
        for source in (outer, *settings):
            value = getattr(source, name, None)
            if isinstance(value, int | float) and value:
                return float(value)
        return None

    scales = [1.0]
    if (multiplier := setting("logit_scale")) is not None:
        scales.append(multiplier)
    if (divisor := setting("logits_scaling")) is not None:
        scales.append(1.0 / divisor)
    # What the configuration says comes first: on small logits a cap makes too little difference to tell.
    softcaps = dict.fromkeys((setting("final_logit_softcapping"), None))
    for module in _projections(outer, body):
        for scale in reversed(scales):
            for softcap in softcaps:
                yield Head(module, scale, softcap)


def _same(logits: mx.array, expected: mx.array, dtype: mx.Dtype) -> bool:
    if logits.shape != expected.shape:
        return False
    # Half precision rounds the model's own logits; ours are float32 from the same hidden states.
    tolerance = 1e-4 if dtype == mx.float32 else 3e-2
    size = mx.maximum(mx.max(mx.abs(expected)), 1.0)
    return bool(mx.max(mx.abs(logits - expected)) <= tolerance * size)
