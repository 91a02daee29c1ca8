"""Functions with a gradient of their own, and the stream it runs on."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import mlx.core as mx


def on_this_stream(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, run on the stream that is the default now, whatever is the default when it is called.

    MLX runs a backward pass where it runs the forward one, but for what Python is asked to add to it: that lands on
    the default stream of the moment, and one stream would do the work of several.
    """
    stream = mx.default_stream(mx.default_device())

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with mx.stream(stream):
            return function(*args, **kwargs)

    return call


def with_vjp(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward``, whose vector-Jacobian product is ``backward(primals, cotangents, outputs)``, on the same stream.

    What the functions capture is constant: no gradient flows into it.
    """

    def call(*args: Any) -> Any:
        function = mx.custom_function(forward)
        function.vjp(on_this_stream(backward))
        return function(*args)

    return call
