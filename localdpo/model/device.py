"""What MLX runs on: name, memory, and the limits that keep a laptop usable. Knows nothing about models."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import psutil

# MLX walks a graph breadth first up to this width, depth first beyond. At its default, 20, one CPU stream waits for the
# other a quarter of the time; from 60 on their operations alternate, at no more memory (docs/decisions/0006). Read by
# MLX once, at the first evaluation. On a GPU there is one stream, and MLX's order stays.
if mx.default_device().type == mx.cpu:
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", "400")

CACHE_SHARE = 0.1
"""Of the machine's memory, for buffers that MLX keeps to use again."""

Backend = Literal["metal", "cuda", "cpu"]


@dataclass(frozen=True)
class Device:
    """The device MLX uses by default. Memory in bytes; on unified memory it is the machine's."""

    backend: Backend
    name: str
    memory_total: int
    memory_available: int
    recommended_working_set: int | None = None

    @property
    def kind(self) -> str:
        """``gpu`` or ``cpu``."""
        return "cpu" if self.backend == "cpu" else "gpu"


def on_cpu() -> bool:
    """Whether MLX's default device is the CPU."""
    return bool(mx.default_device().type == mx.cpu)


def describe_device() -> Device:
    """Describe MLX's default device; allocates nothing on it."""
    machine = psutil.virtual_memory()
    info = mx.device_info()
    name = str(info.get("device_name") or info.get("architecture") or "unknown")
    if on_cpu():
        return Device("cpu", name, machine.total, machine.available)
    if mx.metal.is_available():
        recommended = info.get("max_recommended_working_set_size")
        return Device("metal", name, machine.total, machine.available, int(recommended) if recommended else None)
    total = int(info.get("total_memory") or info.get("memory_size") or machine.total)
    return Device("cuda", name, total, int(info.get("free_memory") or total))


def prepare_device() -> None:
    """On Metal, wire the recommended working set and cap MLX's cache of freed buffers. Does nothing elsewhere.

    Without the first macOS pages weights out between steps, and a model near the memory limit slows down several
    times. Without the second the cache takes what is left: lengths differ from step to step, so do its buffers.
    """
    device = describe_device()
    if device.backend == "metal" and device.recommended_working_set:
        with suppress(RuntimeError, ValueError):  # a system that refuses is only slower
            mx.set_wired_limit(device.recommended_working_set)
            mx.set_cache_limit(int(device.memory_total * CACHE_SHARE))


def keep_no_freed_buffers() -> None:
    """Have MLX give freed memory back at once, for a model that is held small; the next allocation costs no more.

    On a CPU MLX would keep 32 MB, a tenth of what a lean run of the starter model takes, and measured no faster for it.
    """
    mx.set_cache_limit(0)


def core_streams(most: int) -> list[mx.Stream]:
    """Streams for work that is spread over cores: one for each that this process may use, at most ``most``.

    Physical cores: two threads of one core share what multiplies.
    """
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    with suppress(AttributeError, OSError):  # not on every system
        cores = min(cores, len(os.sched_getaffinity(0)))
    return lane_streams(max(1, min(most, cores)))


_thread = threading.local()


def lane_streams(count: int) -> list[mx.Stream]:
    """Streams that run side by side: ``count`` on a CPU, each with its own worker; the one default on a GPU.

    Kept for each thread, because a stream belongs to the thread that made it and is never freed.
    """
    if not on_cpu():
        return [mx.default_stream(mx.default_device())]
    streams: list[mx.Stream] = _thread.__dict__.setdefault("streams", [])
    while len(streams) < count:
        streams.append(mx.new_stream(mx.cpu))
    return streams[:count]
