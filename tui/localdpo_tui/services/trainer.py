"""Start a trainer that outlives the UI.

A trainer is `localdpo train` in a session of its own, with its output in a log file of the workspace: closing the UI or
losing the terminal leaves it at work. Whether a run is being trained is what its lock says, never a process number, so
any UI attaches to any trainer through the run folder (`localdpo.train.run.RunFolder`: events, status, requests).
`start` waits for the trainer's first seconds: call it on a thread. This module never loads mlx.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from localdpo.data.drafts import HIDDEN, make_hidden
from localdpo.errors import EnvironmentFault, InputError, LocalDPOError, Problem
from localdpo.files import environment_faults
from localdpo.paths import child_environment

__all__ = ["Trainer", "start"]

EARLY_SECONDS = 2.0
_KEPT_LOGS = 20
_TAIL_BYTES = 16_384


@dataclass(frozen=True, slots=True)
class Trainer:
    """A trainer that this process started. It lives on when this object is gone."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        """Its process number."""
        return self.process.pid

    @property
    def exit_code(self) -> int | None:
        """How it ended: an exit code of the command line, negative for a signal; None while it is at work."""
        return self.process.poll()

    def last_words(self) -> str:
        """Return the end of its log."""
        return _tail(self.log)

    def error(self) -> LocalDPOError | None:
        """Return why it ended, in its own words, when that was an error."""
        code = self.exit_code
        return None if code in (None, 0, 4, 129, 130, 143) else _explained(int(code or 1), self.last_words())


def start(recipe: str | Path, folder: str | Path, *, resume: bool = False, overrides: Sequence[str] = ()) -> Trainer:
    """Start training `recipe` in the workspace `folder`, where relative output folders go.

    Waits for at most two seconds for the trainer to end: then something is wrong with the recipe or the machine, and
    that is raised as the trainer said it. Raises InputError, EnvironmentFault.
    """
    log = _new_log(Path(folder), Path(recipe))
    words = [word for override in overrides for word in ("--set", override)]
    command = [sys.executable, "-P", "-m", "localdpo", "train", str(Path(recipe).absolute()), *words]
    with environment_faults(log), log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *(["--resume"] if resume else [])],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**child_environment(), "PYTHONUNBUFFERED": "1"},
        )
    # Somebody has to take note of its end, or it stays in the process table for as long as the UI runs.
    threading.Thread(target=process.wait, name="trainer", daemon=True).start()
    trainer = Trainer(process, log)
    with suppress(subprocess.TimeoutExpired):
        process.wait(EARLY_SECONDS)
        error = trainer.error()
        if error is not None:
            raise error
    return trainer


def _new_log(folder: Path, recipe: Path) -> Path:
    logs = folder / HIDDEN / "logs"
    with environment_faults(logs):
        make_hidden(folder / HIDDEN)
        logs.mkdir(exist_ok=True)
        for old in sorted(logs.glob("train-*.log"), key=lambda path: path.stat().st_mtime)[: -_KEPT_LOGS + 1]:
            old.unlink(missing_ok=True)
    name = f"train-{recipe.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    number = 0
    while (path := logs / f"{name}{f'-{number}' if number else ''}.log").exists():
        number += 1
    return path


def _tail(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _explained(code: int, said: str) -> LocalDPOError:
    """Return the error that a trainer ended with, from the sentences it printed."""
    lines = [line for line in said.splitlines() if line.strip()]
    problems = [Problem("", line.removeprefix("error: ")) for line in lines if line.startswith("error: ")]
    if not problems:
        last = lines[-1][:300] if lines else "it said nothing"
        what = f"signal {-code}" if code < 0 else f"exit code {code}"
        problems = [Problem("", f"the trainer ended ({what}): {last}", "Its log is in the folder .localdpo/logs")]
    return (InputError if code == 2 else EnvironmentFault if code in (3, -9) else LocalDPOError)(*problems)
