"""`localdpo doctor`: what this machine has for training, with a line of advice where something is amiss.

Given a folder it looks at that too: a run, or a workspace (`checkup`).
"""

from __future__ import annotations

import json
import locale
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from localdpo import __version__
from localdpo.console.finding import Finding, gathered, lines
from localdpo.console.terminal import bytes_text, is_live, say
from localdpo.paths import cache_dir

_PACKAGES = ("mlx", "mlx-lm", "huggingface_hub", "pydantic", "textual")
_LOW_MEMORY = 4e9
_LOW_DISK = 3e9
_SLOW_GFLOPS = 20.0


def examine() -> list[Finding]:
    """Look at the machine."""
    return gathered(_CHECKS)


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


def _network() -> Iterator[Finding]:
    from huggingface_hub import constants

    where = "set offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "asked only for models that are not here"
    advice = "Unset HF_HUB_OFFLINE to fetch models" if constants.HF_HUB_OFFLINE else ""
    yield Finding("Hub", "ok", where, advice)


def _terminal() -> Iterator[Finding]:
    kind = os.environ.get("TERM", "") or "not set"
    codec = locale.getpreferredencoding(False)
    if not sys.stdout.isatty():
        where = "output goes to a file or a pipe: plain lines"
    else:
        size = os.get_terminal_size(sys.stdout.fileno())
        where = f"{size.columns}x{size.lines}, TERM {kind}" + ("" if is_live(sys.stdout) else ": plain lines, no UI")
    advice = (
        "" if codec.lower().replace("-", "") == "utf8" else "Set LANG to a UTF-8 locale: signs are escaped otherwise"
    )
    yield Finding("terminal", "advice" if advice else "ok", f"{where}; text is {codec}", advice)


_CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _versions, _device, _blas, _memory, _cache, _network, _terminal,
)  # fmt: skip


def run(folder: Path | None, *, as_json: bool, fix: bool) -> int:
    """Print all findings about the machine, or about ``folder`` alone; return the exit code.

    3 when the machine is in the way, 2 when something in the folder is broken. Raises InputError when the
    folder is not there, or neither a run nor a workspace.
    """
    if folder is None:
        findings = examine()
    else:
        from localdpo.console.checkup import examine_folder

        findings = examine_folder(folder, fix=fix)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        say(*lines(findings))
    broken = any(finding.level == "broken" for finding in findings)
    return (3 if folder is None else 2) if broken else 0
