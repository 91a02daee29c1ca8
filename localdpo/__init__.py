"""Teach a language model your preferences on your own computer, by DPO with MLX.

The names below are the public surface; each is imported from its module when first used, so that importing the
package costs nothing and loads no mlx.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "DivergedError": "errors",
    "EnvironmentFault": "errors",
    "InputError": "errors",
    "Interrupted": "errors",
    "LocalDPOError": "errors",
    "PreferencePair": "data.pairs",
    "Problem": "errors",
    "Recipe": "recipe",
    "load_model": "model.load",
    "load_recipe": "recipe",
    "read_pairs": "data.pairs",
}

__all__ = [
    "DivergedError",
    "EnvironmentFault",
    "InputError",
    "Interrupted",
    "LocalDPOError",
    "PreferencePair",
    "Problem",
    "Recipe",
    "__version__",
    "load_model",
    "load_recipe",
    "read_pairs",
]

if TYPE_CHECKING:
    from localdpo.data.pairs import PreferencePair, read_pairs
    from localdpo.errors import (
        DivergedError,
        EnvironmentFault,
        InputError,
        Interrupted,
        LocalDPOError,
        Problem,
    )
    from localdpo.model.load import load_model
    from localdpo.recipe import Recipe, load_recipe


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return __all__
