"""What the UI remembers of a user across folders (the theme), in one small JSON file.

A missing or broken file is no preferences: a look must never keep anybody from their work.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import platformdirs

__all__ = ["load_preferences", "preferences_path", "save_preference"]


def preferences_path() -> Path:
    """Return the file's path: in `$LOCALDPO_CONFIG`, or in this platform's folder for settings."""
    chosen = os.environ.get("LOCALDPO_CONFIG")
    folder = Path(chosen).expanduser() if chosen else Path(platformdirs.user_config_dir("localdpo", appauthor=False))
    return folder / "ui.json"


def load_preferences() -> dict[str, Any]:
    """Return what was remembered, nothing when the file cannot be read."""
    try:
        value = json.loads(preferences_path().read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def save_preference(key: str, value: Any) -> None:
    """Remember one value. A folder that cannot be written is passed over in silence: it is only a look."""
    from localdpo.errors import EnvironmentFault
    from localdpo.files import write_json

    path = preferences_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**load_preferences(), key: value})
    except (OSError, EnvironmentFault):
        return
