"""What a run is made with: versions of the packages that matter and a few words on the machine.

For people who read a run or its report later. Nothing that names a person or a place is in it: no host name, no user,
no paths. This module reads package metadata and asks the system; it never loads mlx.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

from localdpo import __version__

__all__ = ["describe_machine"]

_PACKAGES = ("mlx", "mlx-lm", "transformers", "numpy")


def describe_machine() -> dict[str, Any]:
    """Plain JSON: `system`, `processor`, `cores`, `memory_bytes`, and `versions` by package."""
    import psutil

    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": platform.machine(),
        "cores": os.cpu_count() or 0,
        "memory_bytes": psutil.virtual_memory().total,
        "versions": {"localdpo": __version__, "python": platform.python_version(), **_installed()},
    }


def _installed() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
