"""Which models are served: the base, and every run beside the one asked for that has an adapter for that base.

Looked up again at every request, so that a run that ends while the server is up is there at once. It reads run
folders; it knows nothing about requests and loads no model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from localdpo.errors import LocalDPOError
from localdpo.model.lora import CONFIG_FILE, WEIGHTS_FILE
from localdpo.model.safety import read_json
from localdpo.train.run import RunFolder, find_runs

__all__ = ["Offer", "Served"]


@dataclass(frozen=True)
class Served:
    """A model by its name: the base (``adapter`` is None) or a run's. ``created`` is seconds since 1970."""

    name: str
    adapter: Path | None
    created: int = 0


@dataclass(frozen=True)
class Offer:
    """What there is to choose from.

    base: the base's name. fingerprint: its content. chosen: adapters that are served whatever base they name, by
    name. folder: where to look for further runs, None for nowhere.
    """

    base: str
    fingerprint: str
    chosen: dict[str, Path] = field(default_factory=dict)
    folder: Path | None = None

    def models(self) -> dict[str, Served]:
        """All models by name: the base first, then what was asked for, then other runs by name."""
        found = {self.base: Served(self.base, None)}
        for name, adapter in [*self.chosen.items(), *self._runs()]:
            if any(served.adapter == adapter for served in found.values()):
                continue
            free = name if name not in found else f"runs/{name}"
            found.setdefault(free, Served(free, adapter, _written(adapter)))
        return found

    def elsewhere(self) -> list[str]:
        """Names of runs in the folder that are of another base, and so are not served."""
        return [run.path.name for run in self._kept() if _base_of(run.adapter) not in (None, self.fingerprint)]

    def _kept(self) -> list[RunFolder]:
        runs = find_runs(self.folder) if self.folder is not None else []
        return [run for run in runs if (run.adapter / WEIGHTS_FILE).is_file()]

    def _runs(self) -> list[tuple[str, Path]]:
        return [(run.path.name, run.adapter) for run in self._kept() if _base_of(run.adapter) == self.fingerprint]


def _base_of(adapter: Path) -> str | None:
    """The fingerprint of the base that an adapter was trained on; None where it does not say."""
    try:
        value = read_json(adapter / CONFIG_FILE).get("base_fingerprint")
    except LocalDPOError:
        return None
    return value if isinstance(value, str) else None


def _written(adapter: Path) -> int:
    try:
        return int((adapter / WEIGHTS_FILE).stat().st_mtime)
    except OSError:
        return 0
