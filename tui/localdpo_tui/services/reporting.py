"""Make a run's report page where it is missing or older than the run, in a process of its own.

Checking pairs and drawing curves would hold the screen up; `localdpo report` does it elsewhere. This module waits for
it: call it on a thread.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from localdpo.errors import EnvironmentFault, Problem
from localdpo.paths import child_environment

__all__ = ["PAGE", "is_stale", "make_report"]

PAGE = "report.html"
_SOURCES = ("metrics.jsonl", "status.json", "run.json", "pairs.jsonl", "eval.json")
_MOST_SECONDS = 300


def is_stale(run: Path) -> bool:
    """Whether a run has no page yet, or one that is older than what it tells of."""
    made = _changed(run / PAGE)
    return made is None or any((_changed(run / name) or 0) > made for name in _SOURCES)


def _changed(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def make_report(run: Path) -> Path:
    """Return the page of a run, made anew if need be. Raises EnvironmentFault with what the command said."""
    if not is_stale(run):
        return run / PAGE
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "localdpo", "report", str(run.absolute())],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_MOST_SECONDS,
            text=True,
            errors="replace",
            env=child_environment(),
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentFault(Problem(str(run / PAGE), f"could not be made: {error}")) from None
    if done.returncode:
        said = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.strip()]
        raise EnvironmentFault(*[Problem("", line) for line in said[-3:] or [f"{run / PAGE} could not be made"]])
    return run / PAGE
