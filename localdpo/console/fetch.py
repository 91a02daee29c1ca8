"""Brings a model onto this machine, saying so."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from localdpo.text import sanitise

if TYPE_CHECKING:
    from localdpo.model.resolve import ModelSource


def fetch(spec: str) -> ModelSource:
    """Find the model, fetching it first where it is not there; each long step is told on standard error.

    Raises InputError and EnvironmentFault, as `resolve_model` does.
    """
    from localdpo.model.resolve import resolve_model

    return resolve_model(spec, lambda text: print(sanitise(text), file=sys.stderr, flush=True))
