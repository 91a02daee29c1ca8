"""Terminals that send what terminals send: a short run each time, 20,000 events with --slow (FUZZ_SEED chooses)."""

from __future__ import annotations

import os

import pytest
from terminal_fuzz import fuzz


def test_the_ui_takes_what_terminals_send():
    events, _ = fuzz(seed=1, events=150)
    assert events >= 150


@pytest.mark.slow
def test_the_ui_takes_twenty_thousand_events():
    events, _ = fuzz(int(os.environ.get("FUZZ_SEED", "2")), events=20_000)
    assert events >= 20_000
