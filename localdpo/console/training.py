"""`localdpo train`: preflight, events to the display, signals to the trainer, and the exit code."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from localdpo.console import preflight
from localdpo.console.display import Display, make_display
from localdpo.console.fetch import fetch
from localdpo.console.signals import StopSignals
from localdpo.console.terminal import OpenTerminals, is_live, say, width
from localdpo.errors import DivergedError, InputError, Problem
from localdpo.recipe import Recipe, load_recipe
from localdpo.text import sanitise
from localdpo.train.events import EndEvent, Event
from localdpo.train.run import Control


@dataclass(frozen=True, slots=True)
class Options:
    """How to train: go on with a run, or from it in a new one; only plan; write JSON."""

    resume: bool = False
    fork: bool = False
    dry_run: bool = False
    json_lines: bool = False


def run(path: Path, overrides: Sequence[str], options: Options) -> int:
    """Train the recipe at ``path``; return the exit code. Raises LocalDPOError."""
    if options.resume and options.fork:
        raise InputError(
            Problem("--fork", "does not go with --resume", "--resume goes on with a run, --fork makes a new one of it")
        )
    recipe = load_recipe(path, overrides)
    fetch(recipe.model)
    if options.dry_run:
        _show_plan(recipe, options)
        return 0
    again = resume_command(path, overrides)
    with make_display(options.json_lines) as display:
        return _train(recipe, options, display, again)


def _show_plan(recipe: Recipe, options: Options) -> None:
    from localdpo.train.loop import plan as make_plan

    plan = make_plan(recipe, fork=options.fork)
    if options.json_lines:
        print(json.dumps({"event": "plan", **plan.to_json()}))
        return
    say(*preflight.lines(plan.to_json(), width() if is_live(sys.stdout) else 0))
    for problem in plan.warnings:
        say(f"warning: {problem}")


def _train(recipe: Recipe, options: Options, display: Display, again: str) -> int:
    control = Control()
    terminals = OpenTerminals()
    end: EndEvent | None = None

    def on_stop(number: int) -> None:
        control.stop()
        terminals.let_go()  # of a window that was closed: what is said to it now would be an error
        display.notice(f"{_name(number)}: finishing this step and saving; once more leaves at once")

    def on_leave() -> None:
        display.leave(f"left at once; go on from the last checkpoint with: {again}")

    with StopSignals(on_stop, on_leave) as signals:
        from localdpo.evaluate.probes import closing, glimpse
        from localdpo.train.loop import train

        events = train(
            recipe, resume=options.resume, fork=options.fork, control=control, closing=closing, glimpse=glimpse
        )
        for event in events:
            _show(event, display, terminals)
            if isinstance(event, EndEvent):
                end = event
    if end is not None and end.adapter is not None:
        _tell_verdict(recipe, display)
    if end is not None and end.resumable:
        display.notice(f"go on with: {again}")
    if signals.received is not None and (end is None or end.reason == "stopped"):
        return 128 + signals.received
    return DivergedError.exit_code if end is not None and end.reason == "diverged" else 0


def _show(event: Event, display: Display, terminals: OpenTerminals) -> None:
    try:
        display.show(event)
    except OSError:
        if not terminals.let_go():
            raise  # anything but a terminal that has just gone: its signal is under way


def _tell_verdict(recipe: Recipe, display: Display) -> None:
    """Say what the run's own figures come to; `localdpo eval` knows more."""
    from localdpo.evaluate.evidence import verdict_of_run
    from localdpo.train.run import RunFolder

    verdict = verdict_of_run(RunFolder(recipe.output_dir))
    if verdict is not None:
        display.notice(sanitise(f"verdict: {verdict.words}"))


def _name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def resume_command(path: Path, overrides: Sequence[str]) -> str:
    """Return the command line that goes on with this run."""
    settings = [word for override in overrides for word in ("--set", override)]
    program = "localdpo" if not sys.argv[0].endswith("__main__.py") else "python -m localdpo"
    return shlex.join([*program.split(), "train", str(path), *settings, "--resume"])
