"""`localdpo train`: preflight, events to the display, signals to the trainer, and the exit code."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from localdpo.console import preflight
from localdpo.console.display import Display, make_display
from localdpo.console.fetch import fetch
from localdpo.console.signals import StopSignals
from localdpo.console.terminal import is_live, width
from localdpo.errors import DivergedError
from localdpo.recipe import Recipe, load_recipe
from localdpo.train.events import EndEvent
from localdpo.train.run import Control


def run(path: Path, overrides: Sequence[str], *, resume: bool, dry_run: bool, json_lines: bool) -> int:
    """Train the recipe at ``path``; return the exit code. Raises LocalDPOError."""
    recipe = load_recipe(path, overrides)
    fetch(recipe.model)
    if dry_run:
        _show_plan(recipe, json_lines)
        return 0
    again = resume_command(path, overrides)
    with make_display(json_lines) as display:
        return _train(recipe, resume, display, again)


def _show_plan(recipe: Recipe, json_lines: bool) -> None:
    from localdpo.train.loop import plan as make_plan

    plan = make_plan(recipe)
    if json_lines:
        print(json.dumps({"event": "plan", **plan.to_json()}))
        return
    print("\n".join(preflight.lines(plan.to_json(), width() if is_live(sys.stdout) else 0)))
    for problem in plan.warnings:
        print(f"warning: {problem}")


def _train(recipe: Recipe, resume: bool, display: Display, again: str) -> int:
    control = Control()
    end: EndEvent | None = None

    def on_stop(number: int) -> None:
        control.stop()
        display.notice(f"{_name(number)}: finishing this step and saving; once more leaves at once")

    def on_leave() -> None:
        display.leave(f"left at once; go on from the last checkpoint with: {again}")

    with StopSignals(on_stop, on_leave) as signals:
        from localdpo.evaluate.probes import closing, glimpse
        from localdpo.train.loop import train

        for event in train(recipe, resume=resume, control=control, closing=closing, glimpse=glimpse):
            display.show(event)
            if isinstance(event, EndEvent):
                end = event
    if end is not None and end.resumable:
        display.notice(f"go on with: {again}")
    if signals.received is not None and (end is None or end.reason == "stopped"):
        return 128 + signals.received
    return DivergedError.exit_code if end is not None and end.reason == "diverged" else 0


def _name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def resume_command(path: Path, overrides: Sequence[str]) -> str:
    """Return the command line that goes on with this run."""
    settings = [word for override in overrides for word in ("--set", override)]
    program = "localdpo" if not sys.argv[0].endswith("__main__.py") else "python -m localdpo"
    return shlex.join([*program.split(), "train", str(path), *settings, "--resume"])
