"""The preflight of a recipe, in a child process: the UI has no model and no tokenizer of its own.

The child is `localdpo train RECIPE --dry-run --json`, so the UI shows what the command line would. It can be
cancelled at any time. `lines` puts a plan into words and bars. This module knows no widgets.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from localdpo.console import preflight as words
from localdpo.errors import EnvironmentFault, InputError, LocalDPOError, Problem
from localdpo.text import sanitise

__all__ = ["Part", "band", "lines", "run_preflight"]

_LIMIT = 1 << 24
_KILL_AFTER = 3.0
_BAR = 24
_VERDICTS = {
    "safe": ("SAFE", "good", "fits with room to spare"),
    "tight": ("TIGHT", "warning", "may fit; close other programs, or lower the batch size or data.max_length"),
    "too big": ("TOO BIG", "bad", "does not fit: lower the batch size, data.max_length or lora.num_layers"),
    "unknown": ("UNKNOWN", "warning", "the kind of model is not known well enough to say"),
}

Part = tuple[str, str]
"""A line of text and its role: "", muted, good, warning, bad or heading."""


async def run_preflight(
    recipe: Path, folder: Path, command: Sequence[str] = (sys.executable, "-m", "localdpo")
) -> dict[str, Any]:
    """The plan of a recipe, trained from ``folder``, as JSON.

    Raises InputError or EnvironmentFault with what the child said. Cancelling the task ends the child.
    """
    try:
        child = await asyncio.create_subprocess_exec(
            *command,
            "train",
            os.path.abspath(recipe),
            "--dry-run",
            "--json",
            cwd=folder,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl+C in the terminal is the app's, not the child's
            limit=_LIMIT,
        )
    except OSError as error:
        raise EnvironmentFault(Problem(command[0], error.strerror or str(error))) from None
    try:
        out, err = await child.communicate()
    except BaseException:
        await _end(child)
        raise
    return _plan(child.returncode or 0, out, err)


async def _end(child: asyncio.subprocess.Process) -> None:
    """Ask the child to leave, and make it."""
    with suppress(ProcessLookupError):
        child.terminate()
    try:
        await asyncio.wait_for(child.communicate(), _KILL_AFTER)
    except (TimeoutError, asyncio.CancelledError):
        with suppress(ProcessLookupError):
            child.kill()
        await child.wait()


def _plan(code: int, out: bytes, err: bytes) -> dict[str, Any]:
    for line in reversed(out.splitlines()):
        with suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict) and value.get("event") == "plan":
                return value
    said = [line for line in sanitise(err.decode("utf-8", "replace")).splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in said if line.startswith(("error: ", "internal error: "))]
    told = errors or said[-3:] or [f"the preflight ended with exit code {code} and said nothing"]
    kind: type[LocalDPOError] = InputError if code == 2 else EnvironmentFault
    raise kind(*(Problem("", line) for line in told[:12]))


def band(plan: Mapping[str, Any], width: int = _BAR) -> list[Part]:
    """The memory of a plan: a bar of what it takes of what there is, the verdict, and what that means."""
    word, role, meaning = _VERDICTS.get(str(plan.get("memory_verdict")), _VERDICTS["unknown"])
    memory, available = plan.get("memory"), plan.get("memory_available") or 0
    if not isinstance(memory, Mapping) or not available:
        return [(f"Memory: {word}", role), (meaning, "muted")]
    share = float(memory["total"]) / float(available)
    full = min(width, max(1, round(share * width)))
    return [
        (f"Memory: {word}  [{'█' * full}{'·' * (width - full)}] {share:.0%} of what is available", role),
        (meaning, "muted"),
    ]


def lines(plan: Mapping[str, Any], width: int) -> list[Part]:
    """A plan in lines of at most ``width`` characters, sanitised: memory, figures, warnings, token lengths."""
    found = [*band(plan, max(8, min(_BAR, width - 50))), ("", "")]
    found += [(line, "") for line in words.lines(plan, width)]
    for warning in plan.get("warnings", ()):
        text = str(Problem(warning["where"], warning["message"], warning["fix"]))
        found.append((f"! {text}", "warning"))
    histogram = plan.get("lengths", ())
    if histogram:
        found += [("", ""), ("Tokens of a row (prompt and both answers)", "heading")]
        found += [(line, "") for line in _histogram(histogram, width)]
    return found


def _histogram(bins: Sequence[Sequence[int]], width: int) -> list[str]:
    most = max(count for _, count in bins)
    label = max(len(f"{edge:,}") for edge, _ in bins)
    count_width = len(f"{most:,}")
    room = max(4, min(50, width - label - count_width - 9))
    rows = []
    for edge, count in bins:
        length = -(-count * room // most) if most else 0
        rows.append(f"up to {edge:>{label},} {count:>{count_width},} {'▇' * length}")
    return rows
