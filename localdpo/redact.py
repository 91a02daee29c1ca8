"""Take secrets out of text that others wrote before it is shown: a server may say back what it was sent.

Known are the values of environment variables that are named like secrets, and texts that look like tokens. A secret
of another kind, kept elsewhere, it cannot know.
"""

from __future__ import annotations

import os
import re

__all__ = ["redact"]

_NAMES = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_KEY|PRIVATE_KEY", re.IGNORECASE)
_SHORTEST = 8
_SHAPES = re.compile(
    r"(?P<kept>\b(?:bearer|basic)\s+|\b(?:hf|sk|pk|ghp|gho|ghs|github_pat|xox[abp]|wandb)[_-])[\w.~+/=-]{8,}",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """Return `text` with `…` in place of every secret that is known or looks like one."""
    for value in sorted(_values(), key=len, reverse=True):
        text = text.replace(value, "…")
    return _SHAPES.sub(r"\g<kept>…", text)


def _values() -> set[str]:
    return {value for name, value in os.environ.items() if _NAMES.search(name) and len(value) >= _SHORTEST}
