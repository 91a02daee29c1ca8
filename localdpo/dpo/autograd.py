"""Functions with a gradient of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx


def with_vjp(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward``, whose vector-Jacobian product is ``backward(primals, cotangents, outputs)``.

    What the functions capture is constant: no gradient flows into it.
    """
    function = mx.custom_function(forward)
    function.vjp(backward)
    return function
