"""The plainest way to score a pair, and tiny random models with random adapters to do it with.

Everything here runs one sequence at a time through ``model(ids)`` and looks at whole logits: no packing, no
padding, no tiles, no caches. It computes in MLX's float64 where the architecture allows, whose sums and products
are exact to 1e-16 but whose exp and norms are good to 1e-7 only.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from tiny import TinySpec, randomise_adapter, tiny_config

from localdpo.core.losses import LossSettings, PairLogps
from localdpo.model.lora import LoraSettings, attach_lora
from localdpo.sequences import EncodedRow

VOCABULARY = 89
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "phi": {"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    "phi3": {"rope_traditional": False},
    "gemma2": {
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 4.0,
    },
    "gemma3_text": {
        "query_pre_attn_scalar": 8,
        "sliding_window": 5,
        "sliding_window_pattern": 2,
        "rope_local_base_freq": 100.0,
    },
    "gemma4_text": {
        "global_head_dim": 8,
        "num_kv_shared_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "sliding_window": 5,
        "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": VOCABULARY,
        "num_hidden_layers": 3,
        "final_logit_softcapping": 4.0,
    },
    "cohere": {"logit_scale": 0.25, "layer_norm_eps": 1e-5},
    "granite": {
        "logits_scaling": 4.0,
        "attention_multiplier": 0.4,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.7,
        "attention_bias": False,
        "mlp_bias": True,
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "lfm2": {
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 32,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "full_attention"],
    },
}
"""What each architecture needs in config.json beside ``tiny_config``; windows and caps small enough to matter."""


def random_model(family: str = "llama", *, seed: int = 0, tied: bool = True, **overrides: Any) -> nn.Module:
    """A model of ``family`` in float32, in memory, its logits spread over several units."""
    spec = TinySpec(
        model_type=family,
        hidden_size=32,
        intermediate_size=64,
        vocab_size=VOCABULARY,
        tie_word_embeddings=tied,
        overrides={**FAMILIES[family], **overrides},
    )
    mx.random.seed(seed)
    module = importlib.import_module(f"mlx_lm.models.{'llama' if family == 'mistral' else family}")
    model: nn.Module = module.Model(module.ModelArgs.from_dict(tiny_config(spec)))
    if family == "gemma3_text" and tied:
        model.sanitize({})
    rng = np.random.default_rng(seed)
    weights = []
    for name, value in sorted(tree_flatten(model.parameters())):
        # Vectors are norms and biases: near what they start as, but never 0 or 1, so that leaving one out shows.
        scale = 0.2 if value.ndim == 1 else (0.3 if "embed" in name or "lm_head" in name else value.shape[-1] ** -0.5)
        noise = mx.array((scale * rng.standard_normal(value.shape)).astype(np.float32))
        weights.append((name, value + noise if value.ndim == 1 else noise))
    model.update(tree_unflatten(weights))
    model.freeze()
    model.eval()
    mx.eval(model.parameters())
    return model


def adapted_model(
    family: str = "llama", *, dropout: float = 0.0, num_layers: int | None = None, seed: int = 0, **overrides: Any
) -> nn.Module:
    """``random_model`` with a LoRA adapter whose A and B are both random: at B = 0 most errors hide."""
    model = random_model(family, seed=seed, **overrides)
    attach_lora(model, LoraSettings(rank=3, scale=1.5, dropout=dropout, num_layers=num_layers))
    randomise_adapter(model, seed + 1, 0.1)
    return model


def pair(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int], weight: float = 1.0) -> EncodedRow:
    """A pair of plain lists of ids."""
    ids = [np.array(part, np.int32) for part in (prompt, chosen, rejected)]
    return EncodedRow.of(ids[0], ids[1:], weight=weight)


def random_pairs(
    seed: int, lengths: Sequence[tuple[int, int, int]], weights: Sequence[float] | None = None
) -> list[EncodedRow]:
    """Pairs of random ids with (prompt, chosen, rejected) ``lengths``."""
    rng = np.random.default_rng(seed)
    return [
        pair(*(rng.integers(0, VOCABULARY, length) for length in row), weight=weights[i] if weights else 1.0)
        for i, row in enumerate(lengths)
    ]


def in_float64(tree: Any) -> Any:
    """The floating-point arrays of ``tree`` as float64."""
    return tree_map(lambda x: x.astype(mx.float64) if mx.issubdtype(x.dtype, mx.floating) else x, tree)


@contextmanager
def doubled(model: nn.Module, double: bool = True) -> Iterator[None]:
    """Within the block the model computes in float64; not with experts or convolutions, which MLX has in float32."""
    stored = model.parameters()
    if double and not any("switch" in name or "conv" in name for name, _ in model.named_modules()):
        model.update(in_float64(stored))
    try:
        yield
    finally:
        model.update(stored)


def token_logps(model: nn.Module, prompt: np.ndarray, completion: np.ndarray) -> mx.array:
    """log p of each completion token, from one sequence's whole logits."""
    ids = np.concatenate([prompt, completion])[:-1]
    logits = model(mx.array(ids[None]))[0, len(prompt) - 1 :]
    logits = logits - mx.max(logits, axis=-1, keepdims=True)
    logps = logits - mx.log(mx.sum(mx.exp(logits), axis=-1, keepdims=True))
    return mx.take_along_axis(logps, mx.array(completion)[:, None], axis=-1)[:, 0]


def pair_logps(model: nn.Module, pairs: Sequence[EncodedRow], *, double: bool = True) -> PairLogps:
    """Sums in float64, one sequence at a time."""
    with doubled(model, double):
        sides = [
            np.array([np.array(token_logps(model, p.prompt_ids, ids)).astype(np.float64).sum() for p, ids in rows])
            for rows in ([(p, p.chosen_ids) for p in pairs], [(p, p.rejected_ids) for p in pairs])
        ]
    return PairLogps(*sides, *counts(pairs))


def counts(pairs: Sequence[EncodedRow]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the chosen and of the rejected completions."""
    return np.array([len(p.chosen_ids) for p in pairs]), np.array([len(p.rejected_ids) for p in pairs])


def gradient(
    model: nn.Module,
    pairs: Sequence[EncodedRow],
    into_chosen: np.ndarray,
    into_rejected: np.ndarray,
    *,
    double: bool = True,
) -> dict[str, np.ndarray]:
    """d sum(into_chosen * chosen + into_rejected * rejected) / d adapter, by MLX's autodiff of the plain model."""

    def total(parameters: Any) -> mx.array:
        model.update(parameters)
        parts = [
            float(factor) * mx.sum(token_logps(model, p.prompt_ids, ids))
            for p, good, bad in zip(pairs, into_chosen, into_rejected, strict=True)
            for factor, ids in ((good, p.chosen_ids), (bad, p.rejected_ids))
        ]
        return sum(parts[1:], parts[0])

    with doubled(model, double):
        grads = mx.grad(total)(model.trainable_parameters())
        return {name: np.array(value).astype(np.float64) for name, value in tree_flatten(grads)}


def _log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -x)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(_log_sigmoid(x))


def losses(settings: LossSettings, policy: PairLogps, reference: PairLogps | None) -> np.ndarray:
    """Each pair's loss in float64 without the NLL term, written down from the papers and from TRL's trainers."""
    beta, eps = settings.beta, settings.label_smoothing
    lc, lr, nc, nr = (np.asarray(x, np.float64) for x in policy)
    mc, mr = lc / nc, lr / nr
    rc, rr = (np.asarray(x, np.float64) for x in reference[:2]) if reference else (np.zeros(1), np.zeros(1))
    a, b = lc - rc, lr - rr
    z = beta * (mc - mr) - settings.simpo_gamma if settings.loss_type == "simpo" else beta * (a - b)
    smooth = -(1 - eps) * _log_sigmoid(z) - eps * _log_sigmoid(-z)
    match settings.loss_type:
        case "sigmoid" | "simpo":
            return smooth
        case "robust":
            return (-(1 - eps) * _log_sigmoid(z) + eps * _log_sigmoid(-z)) / (1 - 2 * eps)
        case "ipo":
            return (a / nc - b / nr - 1 / (2 * beta)) ** 2
        case "hinge":
            return np.maximum(0, 1 - z)
        case "sppo_hard":
            return (a - 0.5 / beta) ** 2 + (b + 0.5 / beta) ** 2
        case "apo_zero":
            return _sigmoid(-beta * a) + _sigmoid(beta * b)
        case "apo_down":
            return _sigmoid(beta * a) + _sigmoid(-z)
        case "orpo":
            log_odds = (mc - np.log(-np.expm1(mc))) - (mr - np.log(-np.expm1(mr)))
            return -beta * _log_sigmoid(log_odds)
    raise AssertionError(settings.loss_type)


def loss_slopes(
    settings: LossSettings, policy: PairLogps, reference: PairLogps | None
) -> tuple[np.ndarray, np.ndarray]:
    """d loss / d chosen and d loss / d rejected of each pair, by central differences in float64."""
    slopes = []
    for side in ("chosen", "rejected"):
        at = np.asarray(getattr(policy, side), np.float64)
        step = 1e-6 * np.maximum(1, np.abs(at))
        up, down = (losses(settings, policy._replace(**{side: at + s}), reference) for s in (step, -step))
        slopes.append((up - down) / (2 * step))
    return slopes[0], slopes[1]


class Step(NamedTuple):
    loss: float
    nll: float
    grad: dict[str, np.ndarray]
    policy: PairLogps


def step(model: nn.Module, pairs: Sequence[EncodedRow], reference: PairLogps | None, settings: LossSettings) -> Step:
    """Loss, NLL a token and adapter gradient of one optimizer step over ``pairs``, the plainest way."""
    policy = pair_logps(model, pairs)
    weights = np.array([p.weight for p in pairs])
    tokens = float(weights @ policy.chosen_tokens)
    nll = -float(weights @ policy.chosen) / tokens
    loss = float(weights @ losses(settings, policy, reference)) / weights.sum() + settings.rpo_alpha * nll
    into_chosen, into_rejected = (weights / weights.sum() * s for s in loss_slopes(settings, policy, reference))
    grad = gradient(model, pairs, into_chosen - settings.rpo_alpha * weights / tokens, into_rejected)
    return Step(loss, nll, grad, policy)
