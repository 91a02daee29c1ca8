"""What `localdpo doctor FOLDER` looks at: a run folder or a workspace, and how to mend what is wrong.

It reads, and with ``fix`` clears away what interrupted writes left behind and puts back what they had moved aside:
nothing a user made. It loads no model.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from localdpo.console.finding import Finding, gathered
from localdpo.console.terminal import bytes_text
from localdpo.data.drafts import HIDDEN
from localdpo.errors import InputError, LocalDPOError, Problem
from localdpo.files import recover_folder, remove_leftovers, sha256_file, verify_folder
from localdpo.train.run import ACTIVE_STATES, RunFolder, find_runs

_LEFTOVER = re.compile(r"\.(.+)\.tmp-[0-9a-f]{8}-\d+-[0-9a-f]{8}")
_ASIDE = re.compile(r"\.(.+)\.previous")
_COPIES = {"data.train": "pairs.jsonl", "data.eval": "eval.jsonl"}
_LARGE_TRASH = 1e9
_SHOWN = 20


def examine_folder(folder: Path, *, fix: bool = False) -> list[Finding]:
    """Look at a run folder or a workspace. Raises InputError when ``folder`` is neither."""
    if not folder.is_dir():
        raise InputError(
            Problem(str(folder), "there is no such folder", "Name a run, as in runs/athene, or a workspace")
        )
    if (folder / "run.json").exists() or (folder / "metrics.jsonl").exists() or (folder / "status.json").exists():
        return examine_run(RunFolder(folder), fix=fix)
    found = examine_workspace(folder, fix=fix)
    if not found:
        raise InputError(
            Problem(str(folder), "is neither a run nor a workspace", "`localdpo init` makes a workspace here")
        )
    return found


def examine_run(run: RunFolder, *, fix: bool = False) -> list[Finding]:
    """Look at all of a run folder."""
    doctor = _RunDoctor(run, fix)
    return gathered(
        (doctor.state, doctor.recipe, doctor.data, doctor.checkpoints, doctor.metrics, doctor.adapter, doctor.leftovers)
    )


@dataclass
class _RunDoctor:
    run: RunFolder
    fix: bool = False

    def state(self) -> Iterator[Finding]:
        """Who is at work on it, and how it ended."""
        info, status = self.run.info(), self.run.status()
        if not info:
            yield Finding(
                "run", "broken", "run.json is missing or cannot be read", "Start a new run: this one cannot go on"
            )
        if status is None:
            yield Finding("state", "advice", "status.json is missing or cannot be read", "The next attempt writes it")
            return
        at = f"{status.state} at step {status.step} of {status.total_steps}"
        if status.state == "interrupted":
            who = f"process {status.pid} is gone and took its lock with it" if status.pid else "its trainer is gone"
            advice = "`localdpo train RECIPE --resume` goes on from the last checkpoint"
            yield Finding("state", "advice", f"{at}: {who}", advice)
        elif status.state in ACTIVE_STATES:
            yield Finding("state", "ok", f"{at}: process {status.pid} is at work on it")
        else:
            bad = status.state in ("failed", "diverged")
            advice = "train.log and the last warnings say why" if bad else ""
            yield Finding("state", "advice" if bad else "ok", f"{at}. {status.message}".rstrip(". "), advice)

    def recipe(self) -> Iterator[Finding]:
        """The resolved recipe, and whether its model is here."""
        from localdpo.model.resolve import cached_path
        from localdpo.recipe import load_recipe

        recipe = load_recipe(self.run.recipe_file, check_files=False)
        yield Finding("recipe", "ok", f"{self.run.recipe_file.name} is sound")
        try:
            here = cached_path(recipe.model) is not None
        except LocalDPOError:
            here = False
        advice = "" if here else "Training on and chatting need it: put it back, or fetch it with `localdpo models get`"
        where = "is on this machine" if here else "is not on this machine"
        yield Finding("model", "ok" if here else "advice", f"{recipe.model} {where}", advice)

    def data(self) -> Iterator[Finding]:
        """The run's own copies of its data against their sums; the originals."""
        known, status = self.run.info().get("files", {}), self.run.status()
        over = status is not None and status.state == "finished"
        for key, entry in known.items() if isinstance(known, dict) else ():
            if not isinstance(entry, dict):
                yield Finding("data", "broken", f"run.json says nothing sound about {key}", "Start a new run")
                continue
            wanted, original = entry.get("sha256"), Path(str(entry.get("path", "")))
            if key in _COPIES and not _has(self.run.path / _COPIES[key], wanted):
                value = f"{_COPIES[key]}, this run's own copy of its data, is missing or changed"
                yield Finding("data", "broken", value, "Start a new run: this one cannot be resumed")
            elif not _has(original, wanted):
                value = f"{original} has changed or gone since the run was started"
                advice = (
                    "" if over else "A resume is refused until it is as it was; --fork starts a run from this adapter"
                )
                yield Finding("data", "advice" if advice else "ok", value, advice)
            else:
                yield Finding("data", "ok", f"{key}: copy and original are as they were")

    def checkpoints(self) -> Iterator[Finding]:
        """Each checkpoint against its manifest."""
        folders = sorted(path for path in _children(self.run.checkpoints) if re.fullmatch(r"step-\d{6,}", path.name))
        damaged = {path: problems for path in folders if (problems := verify_folder(path))}
        whole = [path for path in folders if path not in damaged]
        if not folders:
            yield Finding("resume", "ok", "no checkpoint yet")
        elif whole:
            yield Finding(
                "resume", "ok", f"from {whole[-1].name}, {len(whole)} of {len(folders)} checkpoints are whole"
            )
        else:
            yield Finding("resume", "broken", "no checkpoint is whole", "Start a new run")
        for path, problems in damaged.items():
            advice = f"A resume falls back to {whole[-1].name}; this folder may be deleted" if whole else ""
            yield Finding(
                "resume",
                "advice" if whole else "broken",
                f"{path.name}, {Path(problems[0].where).name}: {problems[0].message}",
                advice,
            )
        size = sum(_size(path) for path in folders[-1:])
        free = shutil.disk_usage(self.run.path).free
        if size and free < 3 * size:
            yield Finding(
                "disk", "advice", f"{bytes_text(free)} free, a checkpoint takes {bytes_text(size)}", "Free some"
            )

    def metrics(self) -> Iterator[Finding]:
        """Lines of metrics.jsonl that are no events, and a last line cut off."""
        total = bad = steps = 0
        last = b"\n"
        try:
            with self.run.metrics_file.open("rb") as file:
                for last in file:
                    event = _object(last)
                    total, bad = total + 1, bad + ("event" not in event)
                    steps += event.get("event") == "step"
        except FileNotFoundError:
            yield Finding("metrics", "advice", "there is no metrics.jsonl", "The next attempt writes it")
            return
        if not last.endswith(b"\n"):
            yield Finding(
                "metrics", "advice", "its last line is cut off", "Readers pass it over and a resume cuts it away"
            )
            bad -= "event" not in _object(last)
        advice = "Readers pass them over; the curves have gaps" if bad else ""
        value = f"{total:,} events, {steps:,} steps" + (f", {bad:,} lines that are no events" if bad else "")
        yield Finding("metrics", "advice" if bad else "ok", value, advice)

    def adapter(self) -> Iterator[Finding]:
        """Manifest, header, shapes and values of the adapter."""
        from localdpo.model.safety import check_adapter_folder

        status = self.run.status()
        if not self.run.adapter.is_dir():
            finished = status is not None and status.state == "finished"
            if finished:
                yield Finding(
                    "adapter", "broken", "the run is finished and has no adapter", "Resume it for longer, or train anew"
                )
            else:
                yield Finding("adapter", "ok", "none yet: a run has one when it ends")
            return
        problems = verify_folder(self.run.adapter) if (self.run.adapter / "manifest.json").exists() else []
        problems = problems or check_adapter_folder(self.run.adapter)
        for problem in problems[:5]:
            fix = "Resume the run, or copy the adapter of a whole checkpoint here"
            yield Finding("adapter", "broken", f"{Path(problem.where).name}: {problem.message}", fix)
        if not problems:
            yield Finding("adapter", "ok", f"sound, {bytes_text(_size(self.run.adapter))}")

    def leftovers(self) -> Iterator[Finding]:
        """What interrupted writes left behind."""
        if self.run.is_running():
            return
        yield from _leftovers((self.run.path, self.run.checkpoints), self.fix)


def examine_workspace(folder: Path, *, fix: bool = False) -> list[Finding]:
    """Look at pairs, drafts, recipes, runs and trash; nothing is found where none of these are."""
    checks = (_pairs, _drafts, _recipes, partial(_runs, fix=fix), _trash)
    named = [partial(check, folder) for check in checks]
    found = gathered(named)
    if not found:
        return []
    return found + gathered([partial(_leftovers, (folder, folder / "pairs", folder / "recipes"), fix)])


def _pairs(folder: Path) -> Iterator[Finding]:
    from localdpo.data.pairs import read_pairs

    for path in sorted((folder / "pairs").glob("*.jsonl"))[:_SHOWN]:
        try:
            read = read_pairs(path)
        except LocalDPOError as error:
            first = error.problems[0]
            value = f"{path.name}: {first.message}" + (f" ({first.where})" if first.where else "")
            yield Finding("pairs", "broken", value, first.fix or f"`localdpo pairs check pairs/{path.name}` says more")
        else:
            left = f", {len(read.skipped):,} left out" if read.skipped else ""
            advice = f"`localdpo pairs check pairs/{path.name}` says which" if read.skipped else ""
            yield Finding("pairs", "advice" if left else "ok", f"{path.name}: {len(read.pairs):,} pairs{left}", advice)


def _drafts(folder: Path) -> Iterator[Finding]:
    """Unsaved edits; whether someone is at work on them is for the UI to find out."""
    for entry in _children(folder / HIDDEN / "drafts"):
        if any(journal.stat().st_size for journal in entry.glob("journal-*")):
            path = Path(str(_object(_bytes(entry / "owner")).get("path", entry.name)))
            yield Finding("drafts", "advice", f"{path.name} has edits that are not saved", "Open it in `localdpo tui`")


def _recipes(folder: Path) -> Iterator[Finding]:
    from localdpo.recipe import load_recipe

    for path in sorted((folder / "recipes").glob("*.yaml"))[:_SHOWN]:
        try:
            load_recipe(path)
        except LocalDPOError as error:
            first = error.problems[0]
            yield Finding("recipes", "broken", f"{path.name}: {first.where}: {first.message}", first.fix)
        else:
            yield Finding("recipes", "ok", f"{path.name} is sound")


def _runs(folder: Path, fix: bool) -> Iterator[Finding]:
    """One line a sound run, and what is wrong with the others."""
    for run in [*find_runs(folder / "runs"), *find_runs(folder)]:
        found = examine_run(run, fix=fix)
        wrong = [finding for finding in found if finding.level != "ok"]
        if not wrong:
            yield Finding("runs", "ok", f"{run.path.name}: {found[0].value}")
        for finding in wrong:
            value = f"{run.path.name}: {finding.name}: {finding.value}"
            yield Finding("runs", finding.level, value, finding.advice)


def _trash(folder: Path) -> Iterator[Finding]:
    trash = folder / HIDDEN / "trash" / "runs"
    size = _size(trash)
    if size:
        advice = "Empty trash in the UI's palette (Ctrl+P in Runs) frees it" if size > _LARGE_TRASH else ""
        count = len(_children(trash))
        yield Finding("trash", "advice" if advice else "ok", f"{count} runs, {bytes_text(size)}", advice)


def _leftovers(folders: tuple[Path, ...], fix: bool) -> Iterator[Finding]:
    for folder in folders:
        for entry in _children(folder):
            left, aside = _LEFTOVER.fullmatch(entry.name), _ASIDE.fullmatch(entry.name)
            if left:
                if fix:
                    remove_leftovers(folder / left[1])
                state = "removed" if not entry.exists() else "left by a write that was cut off"
                advice = "" if not entry.exists() else "--fix removes it, once its process is gone"
                yield Finding("leftovers", "ok" if not advice else "advice", f"{entry.name}: {state}", advice)
            elif aside and not (folder / aside[1]).exists():
                back = fix and recover_folder(folder / aside[1])
                state = "put back" if back else "moved aside by a write that was cut off"
                advice = "" if back else "--fix puts it back"
                yield Finding("leftovers", "ok" if back else "broken", f"{aside[1]}: {state}", advice)


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0


def _has(path: Path, sha256: object) -> bool:
    try:
        return path.is_file() and sha256_file(path) == sha256
    except (OSError, ValueError, LocalDPOError):
        return False


def _bytes(path: Path) -> bytes:
    with suppress(OSError):
        return path.read_bytes()
    return b""


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
