"""What other tools call the base and its layers.

Module names are those of mlx-lm; here is for which architectures Transformers gives every linear layer the same
name (compared module by module, ``tests/golden/make_peft.py``), and what to call a base outside localdpo.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from localdpo.catalogue import UPSTREAM, find_entry
from localdpo.errors import InputError, Problem
from localdpo.model.load import OpenModel

SAME_NAMES = frozenset(
    {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi",
        "phi3",
        "starcoder2",
        "olmo2",
        "cohere",
        "cohere2",
        "granite",
        "smollm3",
        "glm",
        "helium",
        "seed_oss",
        "hunyuan_v1_dense",
    }
)
"""Values of ``model_type`` whose linear layers mlx-lm and Transformers name alike."""


def require_same_names(model: OpenModel, weights: Mapping[str, mx.array], what: str) -> None:
    """Raise InputError when the adapter's tensors cannot be named for PyTorch's world.

    ``what`` names the format in the message. Adapters on the experts of a mixture are three-dimensional in mlx-lm,
    and PEFT has no such thing.
    """
    kind = model.config.get("model_type")
    if kind not in SAME_NAMES:
        raise InputError(
            Problem(
                model.spec,
                f"mlx-lm and Transformers name the layers of a {kind!r} model differently, and localdpo has no table "
                f"for it: {what} cannot be written",
                "Use --to mlx or --to fused",
            )
        )
    experts = [name for name, value in weights.items() if value.ndim != 2]
    if experts:
        raise InputError(
            Problem(
                experts[0],
                f"adapts all experts of a mixture at once, which {what} cannot express",
                "Train with target_modules: attention, or use --to fused",
            )
        )


def torch_base(model: OpenModel, asked: str | None) -> tuple[str, str]:
    """What PEFT is to load as the base, and a remark when that is not certain (else empty).

    A model of the catalogue has a full-precision original; a Hub id or a folder that is not quantised is its own.
    """
    if asked:
        return asked, ""
    spec = model.spec
    entry = find_entry(spec)
    if entry is not None:
        return UPSTREAM[entry.name], ""
    name = str(model.source.path) if model.source.kind == "folder" else spec.partition("@")[0]
    if model.config.get("quantization"):
        return name, (
            f"{name} is quantised for MLX, which PyTorch cannot load: put its original into base_model_name_or_path, "
            "or export again with --base NAME"
        )
    return name, ""
