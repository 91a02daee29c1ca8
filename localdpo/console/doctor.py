"""`localdpo doctor`: what this machine has for training, with a line of advice where something is amiss."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from localdpo import __version__
from localdpo.console.terminal import bytes_text
from localdpo.paths import cache_dir
from localdpo.text import sanitise

Level = Literal["ok", "advice", "broken"]

_PACKAGES = ("mlx", "mlx-lm", "huggingface_hub", "pydantic", "textual")
_LOW_MEMORY = 4e9
_LOW_DISK = 3e9
_SLOW_GFLOPS = 20.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; ``advice`` is empty when there is nothing to do."""

    name: str
    level: Level
    value: str
    advice: str = ""


def examine() -> list[Finding]:
    """Look at everything; a check that fails itself is a finding too."""
    return [finding for check in _CHECKS for finding in _guarded(check)]


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:  # a doctor that crashes helps nobody
        name = check.__name__.removeprefix("_")
        yield Finding(name, "broken", f"{type(error).__name__}: {error}", "Install localdpo again and compare versions")


def _versions() -> Iterator[Finding]:
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in _PACKAGES)
    yield Finding("localdpo", "ok", f"{__version__} on Python {platform.python_version()}, {packages}")
    yield Finding("system", "ok", f"{platform.system()} {platform.release()} {platform.machine()}")


def _device() -> Iterator[Finding]:
    from localdpo.model.device import describe_device

    device = describe_device()
    if device.backend != "cpu":
        yield Finding("device", "ok", f"{device.backend} GPU, {device.name}")
        return
    # MLX on a Mac falls back to the CPU only where there is no Metal for it.
    advice = "Use an arm64 Python to reach the GPU" if sys.platform == "darwin" else ""
    value = f"CPU, {device.name}, {os.cpu_count()} cores"
    yield Finding("device", "advice" if advice else "ok", value, advice)


def _blas() -> Iterator[Finding]:
    from localdpo.model.blas import enable_fast_blas, measure_gflops

    status = enable_fast_blas()
    speed = measure_gflops()
    value = f"{status.state}: {status.detail}; {speed:.0f} GF/s in fp32"
    advice = ""
    if not status.fast:
        advice = "Matrix products are slow; install scipy-openblas32 and leave LOCALDPO_BLAS unset"
    elif speed < _SLOW_GFLOPS:
        advice = "Slower than a common machine; is something else running?"
    yield Finding("BLAS", "advice" if advice else "ok", value, advice)


def _memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    low = memory.available < _LOW_MEMORY
    advice = "Close other programs, or train with --set train.memory=lean" if low else ""
    value = f"{bytes_text(memory.available)} available of {bytes_text(memory.total)}"
    yield Finding("memory", "advice" if low else "ok", value, advice)


def _cache() -> Iterator[Finding]:
    folder = cache_dir()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    models = sorted(child.name for child in _children(folder / "models") if (child / "config.json").is_file())
    held = f"models: {', '.join(models)}" if models else "no model yet"
    if os.access(existing, os.W_OK):
        advice = "" if models else "`localdpo models get smollm2-135m` fetches the starter model"
        yield Finding("cache", "advice" if advice else "ok", f"{folder}, {held}", advice)
    else:
        yield Finding("cache", "broken", f"{folder} cannot be written", "Set LOCALDPO_CACHE to a folder of yours")
    advice = "Models need space: free some, or set LOCALDPO_CACHE to another disk" if free < _LOW_DISK else ""
    yield Finding("disk", "advice" if advice else "ok", f"{bytes_text(free)} free there", advice)


def _children(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


_CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (_versions, _device, _blas, _memory, _cache)


def show(as_json: bool) -> bool:
    """Print all findings; return whether nothing is broken."""
    findings = examine()
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        print("\n".join(lines(findings)))
    return not any(finding.level == "broken" for finding in findings)


def lines(findings: Sequence[Finding]) -> list[str]:
    """Return the findings for people, one or two lines each."""
    signs = {"ok": "ok    ", "advice": "advice", "broken": "BROKEN"}
    shown = []
    for finding in findings:
        shown.append(f"{signs[finding.level]}  {finding.name:9} {sanitise(finding.value)}")
        if finding.advice:
            shown.append(f"{'':18}{sanitise(finding.advice)}.")
    return shown
