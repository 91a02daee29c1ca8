"""Models taken apart: the right head, scale and cap are found, and what does not fit is refused in words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import gemma3
from oracles import FAMILIES, VOCABULARY, random_model

from localdpo.dpo.anatomy import NotUnderstood, examine

IDS = mx.array([[5, 7, 11, 2, 3, 88, 0]])
SCALES = {"cohere": 0.25, "granite": 0.25}
SOFTCAPS = {"gemma2": 4.0, "gemma4_text": 4.0}


def same_logits(model: nn.Module) -> None:
    anatomy = examine(model)
    ours = anatomy.head.logits(anatomy.body(IDS, cache=None)[0].astype(mx.float32))
    np.testing.assert_allclose(np.array(ours), np.array(model(IDS)[0]), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_understood(family: str) -> None:
    model = random_model(family)
    anatomy = examine(model)
    assert anatomy.head.scale == SCALES.get(family, 1.0)
    assert anatomy.head.softcap == SOFTCAPS.get(family)
    assert anatomy.head.vocabulary == VOCABULARY
    assert all(ours is theirs for ours, theirs in zip(anatomy.layers, model.layers, strict=True))
    assert anatomy.dtype == mx.float32
    same_logits(model)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe", "granite"])
def test_tied_and_untied_heads_are_told_apart(family: str) -> None:
    assert isinstance(examine(random_model(family, tied=True)).head.module, nn.Embedding)
    untied = random_model(family, tied=False)
    assert examine(untied).head.module is untied.lm_head
    same_logits(untied)


def test_a_language_model_inside_a_multimodal_one() -> None:
    text = random_model("gemma3_text")
    config = {"model_type": "gemma3", "vocab_size": VOCABULARY, "text_config": dict(vars(text.args))}
    model = gemma3.Model(gemma3.ModelArgs.from_dict(config))
    model.language_model = text
    assert examine(model).body is text.model


def test_quantised_and_half_precision() -> None:
    model = random_model("qwen2")
    nn.quantize(model, group_size=32, bits=4)
    assert isinstance(examine(model).head.module, nn.QuantizedEmbedding)
    half = random_model("llama", tied=False)
    half.set_dtype(mx.bfloat16)
    assert examine(half).dtype == mx.bfloat16


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_configured_cap_wins_where_logits_are_too_small_to_tell(dtype: mx.Dtype) -> None:
    model = random_model("gemma2", final_logit_softcapping=30.0)
    model.model.norm.weight = mx.full(model.model.norm.weight.shape, -0.9)
    model.set_dtype(dtype)
    assert mx.abs(model(IDS)).max().item() < 1
    for _ in range(3):
        assert examine(model).head.softcap == 30.0


def test_layers_are_put_back() -> None:
    model = random_model("cohere")
    anatomy = examine(model)
    before = model(IDS)
    layers = list(anatomy.layers)
    with anatomy.replaced_layers([lambda hidden, *_, **__: hidden] * len(layers)):
        assert mx.abs(model(IDS) - before).max().item() > 0.1
    with pytest.raises(KeyError), anatomy.replaced_layers([]):
        raise KeyError
    assert list(anatomy.layers) == layers
    assert mx.array_equal(model(IDS), before)


class Odd(nn.Module):
    """A language model whose parts are where nobody looks, or are not what they seem."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        self.inner = random_model("llama")
        for name, part in parts.items():
            self[name] = part

    def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
        return self.inner(ids, cache)


class Body(nn.Module):
    def __init__(self, layers: Any, hidden: Any = None) -> None:
        super().__init__()
        self.layers = layers
        self.embed_tokens = nn.Embedding(VOCABULARY, 32)
        self._hidden = hidden

    def __call__(self, ids: mx.array, cache: Any = None) -> Any:
        return self.embed_tokens(ids) if self._hidden is None else self._hidden


class Whole(Body):
    def __init__(self) -> None:
        super().__init__([])

    def __call__(self, ids: mx.array, attention_mask: mx.array) -> mx.array:
        return self.embed_tokens(ids)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({}, "body"),
        ({"model": Body(nn.Linear(2, 2))}, "layers"),
        ({"model": Body([], hidden=(mx.zeros((1, 7, 32)), None))}, "hidden states"),
        ({"model": Body([], hidden=mx.zeros((7, 32)))}, "hidden states"),
        ({"model": Body([])}, "projection"),
        ({"model": Body([], hidden=mx.zeros((1, 7, 16)))}, "projection"),
        ({"model": random_model("llama").model.layers[0]}, "layers"),
        ({"model": Whole()}, "called"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(parts: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotUnderstood, match=reason):
        examine(Odd(**parts))


def test_a_body_without_a_vocabulary() -> None:
    body = Body([])
    del body.embed_tokens
    with pytest.raises(NotUnderstood, match="head"):
        examine(Odd(model=body))


def test_a_setting_of_another_kind_is_ignored() -> None:
    model = random_model("llama")
    model.model.args = SimpleNamespace(logit_scale="large", final_logit_softcapping=0.0)
    assert examine(model).head.softcap is None
    same_logits(model)
