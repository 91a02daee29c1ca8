"""What takes a module's place for the length of a pass, and where a module's trainable arrays are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn


class StandIn:
    """Takes a layer's place in the body, and answers as the layer for all that it does not do itself."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


@contextmanager
def replaced(module: nn.Module, members: Mapping[str, Any]) -> Iterator[None]:
    """Within the block ``module`` has other ``members``; they need not be modules."""
    before = {name: module[name] for name in members}
    for name, member in members.items():
        module[name] = member
    try:
        yield
    finally:
        for name, member in before.items():
            module[name] = member


class Trainable:
    """A module's trainable arrays, each where it is. As a tree, with names, they take several times as long to change.

    While gradients are taken others stand there, traced ones, and the module has to get its own back.
    """

    def __init__(self, module: nn.Module) -> None:
        self._places = [
            (path, part, name)
            for path, part in reversed(module.named_modules())  # MLX names the last layer first
            for name, value in part.items()
            if isinstance(value, mx.array) and name not in part._no_grad and not name.startswith("_")
        ]

    def __len__(self) -> int:
        return len(self._places)

    @property
    def names(self) -> list[str]:
        """Their names as in ``trainable_parameters``, in the order of :meth:`get`: the lowest layer first."""
        return [f"{path}.{name}" if path else name for path, _, name in self._places]

    def get(self) -> list[mx.array]:
        """The arrays."""
        return [part[name] for _, part, name in self._places]

    def put(self, arrays: Sequence[mx.array]) -> None:
        """Set ``arrays``, in the order of :meth:`get`."""
        for (_, part, name), array in zip(self._places, arrays, strict=True):
            part[name] = array
