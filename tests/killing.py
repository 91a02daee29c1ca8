"""Runs of a tiny model that are killed at random moments and resumed, and what they are compared with.

Used by test_reliability_resume.py and benchmarks/kill_runs.py. Every attempt is a real `localdpo train` in a process
of its own; the signal comes after a random part of the time that the run takes when nobody disturbs it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from training import recipe_for, workspace

from localdpo.files import verify_folder
from localdpo.recipe import dump_recipe
from localdpo.train.checkpoint import list_checkpoints
from localdpo.train.events import read_events
from localdpo.train.run import RunFolder

TESTS = Path(__file__).parent
SETTINGS: dict[str, Any] = {
    "lora__dropout": 0.2,
    "data__eval": 0.2,
    "train__per_device_train_batch_size": 2,
    "train__gradient_accumulation_steps": 2,
    "train__num_train_epochs": 3.0,
    "train__eval_steps": 3,
    "train__save_steps": 2,
    "train__save_total_limit": 2,
}
"""Dropout uses random numbers, accumulation splits steps, and something is evaluated or saved at most of them."""
VOLATILE = {"time", "eta_seconds", "step_seconds", "tokens_per_second", "peak_memory_bytes"}


def metrics(path: Path) -> list[dict[str, Any]]:
    """The steps and evaluations of a run, without what differs between two equal runs."""
    events = (event.to_json() for event in read_events(path / "metrics.jsonl").events)
    kept = (event for event in events if event["event"] in ("step", "eval"))
    return [{key: value for key, value in event.items() if key not in VOLATILE} for event in kept]


def outcome(path: Path) -> dict[str, Any]:
    """What two equal runs share: metrics, the bytes of the adapter, and the last answers to the probes."""
    answers = [(sample.tuned, sample.base) for sample in RunFolder(path).samples()]
    return {
        "metrics": metrics(path),
        "adapter": (path / "adapter" / "adapters.safetensors").read_bytes(),
        "answers": answers,
    }


@dataclass
class Killer:
    """Trains below ``root`` and kills. ``hit`` counts where the signals arrived, ``signals`` which they were."""

    root: Path
    seed: int
    hit: Counter[str] = field(default_factory=Counter)
    signals: Counter[str] = field(default_factory=Counter)
    finished: int = 0
    seconds: float = 0.0
    expected: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make the workspace and train it once without a disturbance."""
        workspace(self.root)
        recipe = recipe_for(
            self.root, **SETTINGS, data__retain=self.root / "keep.jsonl", data__probes=self.root / "probes.jsonl"
        )
        (self.root / "recipe.yaml").write_text(dump_recipe(recipe))
        self._rng = random.Random(self.seed)
        self._asked_at_the_end = False
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS.parent / "tui")]),
            "LOCALDPO_CACHE": str(self.root / "cache"),
        }
        whole = self.root / "runs" / "whole"
        child = self._start(whole, resume=False)
        began = self._begun(child)
        child.communicate(timeout=300)
        self.seconds = time.monotonic() - began
        assert child.returncode == 0
        self.expected = outcome(whole)

    @property
    def kills(self) -> int:
        """Signals that ended an attempt."""
        return sum(self.hit.values())

    def kill(self, count: int, most_a_run: int = 8) -> None:
        """Kill ``count`` attempts more; every run that gets to its end is compared with the one left alone."""
        wanted, number = self.kills + count, self.finished
        while self.kills < wanted:
            run = self.root / "runs" / f"killed-{number}"
            before = self.kills
            # A signal may also come after the end, while the process is about to leave.
            while self.kills < min(wanted, before + most_a_run) and not _finished(run):
                self._attempt(run, kill=True)
            if not _finished(run):
                self._attempt(run, kill=False)
            self._compare(run)
            number += 1
            self.finished = number
            shutil.rmtree(run)

    def _compare(self, run: Path) -> None:
        found = outcome(run)
        expected = dict(self.expected)
        if self._asked_at_the_end:
            # A stop during the closing answers ends a run that is finished: there are as many as there was time for.
            expected["answers"] = expected["answers"][: len(found["answers"])]
        differing = [name for name, value in expected.items() if found[name] != value]
        assert not differing, (
            f"{run} of seed {self.seed} differs in {differing}: {_first_difference(found, self.expected)}"
        )

    def _start(self, run: Path, *, resume: bool) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "localdpo", "train", str(self.root / "recipe.yaml"), "--json"]
        command += ["--set", f"output_dir={run}", *(["--resume"] if resume else [])]
        return subprocess.Popen(
            command, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def _begun(self, child: subprocess.Popen[str], event: str = "start") -> float:
        """Wait for an event (the first of a run is its start); the moment at which it came."""
        assert child.stdout is not None
        for line in child.stdout:
            if json.loads(line)["event"] == event:
                return time.monotonic()
        raise AssertionError(f"{child.communicate()[1]}")

    def _attempt(self, run: Path, *, kill: bool) -> None:
        """Train to the end, or until killed, if so asked and the signal comes in time."""
        child = self._start(run, resume=(run / "run.json").is_file())
        number = self._rng.choice([signal.SIGKILL] * 8 + [signal.SIGTERM, signal.SIGINT])
        try:
            if kill:
                early = self._rng.random() < 0.1
                self._begun(child, "progress" if early else "start")
                time.sleep(self._rng.uniform(0, 0.5 * self.seconds))
                child.send_signal(number)
            errors = child.communicate(timeout=300)[1]
        finally:
            child.kill()
        code = child.returncode
        assert "Traceback" not in errors, errors
        if code == 0:
            self._asked_at_the_end = kill and number != signal.SIGKILL
            return
        # A shell says 128 + N for both; the signal itself ends a process that has not begun to listen, or is leaving.
        expected = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15), signal.SIGINT: (130, -2)}[number]
        assert kill, errors
        assert code in expected, (code, errors)
        self.signals[number.name] += 1
        self.hit[moment(run)] += 1


def _first_difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    pairs = zip_longest(found["metrics"], expected["metrics"])
    return next((f"{ours} instead of {theirs}" for ours, theirs in pairs if ours != theirs), "not in the metrics")


def _finished(run: Path) -> bool:
    status = RunFolder(run).status()
    return status is not None and status.state == "finished"


def moment(path: Path) -> str:
    """What a run was at when its trainer was killed, by what it left; its newest checkpoint has to be whole."""
    status = RunFolder(path).status()
    checkpoints = list_checkpoints(path / "checkpoints")
    assert not checkpoints or verify_folder(checkpoints[-1][1]) == []
    if status is None:
        return "opening the run"
    if status.state == "stopped":
        return "stopped in order"
    if left := sorted(path.rglob(".*.tmp-*")):
        what = "a checkpoint" if left[0].parent.name == "checkpoints" else left[0].name.split(".tmp-")[0].lstrip(".")
        return f"writing {what}"
    state = json.loads((path / "status.json").read_bytes())["state"]
    return {"starting": f"preparing: {status.stage or 'open'}", "finishing": f"finishing: {status.stage}"}.get(
        state, state
    )
