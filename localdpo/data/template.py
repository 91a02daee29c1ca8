"""Try a model's chat template in a child process before it is used in this one.

A chat template is a program that comes with a model: it can loop for ever or fill the memory, which the
sandbox it is rendered in does not prevent. Here it renders a few short conversations under limits on time
and memory. What a template does with other conversations, or on another day, this check cannot know.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from localdpo.errors import EnvironmentFault, InputError, Problem
from localdpo.files import write_json
from localdpo.paths import cache_dir

__all__ = ["check_template"]

_CHECKER = 1  # raise it when the child checks more: verdicts of older versions then count no more
_MAX_TEMPLATE = 1_000_000
_POLL_SECONDS = 0.05
_PATIENCE = 12
"""How many times its time a template may take by the clock: templates compute and never wait, but machines are busy."""
_CHILD = Path(__file__).with_name("template_child.py")
_FIX = "Use another version of this model, or put a template you trust into its chat_template.jinja"
_MESSAGES = {
    "time": "its chat template did not finish within {seconds:g} s",
    "memory": "its chat template used more than {megabytes:,.0f} MB of memory",
    "output": "its chat template turned a few words into more than a million characters",
    "unsafe": "its chat template tries what templates may not do ({message})",
    "syntax": "its chat template cannot be read: {message}{line}",
    "crash": "its chat template crashed the process that tried it",
}


def check_template(
    template: str, where: str = "the model", *, seconds: float = 5.0, memory_bytes: int = 1 << 30
) -> None:
    """Render `template` in a child process and raise `InputError` if it hangs, bloats, or is not a template.

    `where` names the model in the error; `seconds` are of processor time. A template that passed is
    remembered in the cache folder by its hash, so that the check costs nothing the next time.
    """
    if len(template) > _MAX_TEMPLATE:
        message = f"its chat template is longer than {_MAX_TEMPLATE:,} characters"
        raise InputError(Problem(where, message, _FIX))
    digest = hashlib.sha256(f"{_CHECKER}\0{template}".encode("utf-8", "surrogatepass")).hexdigest()
    remembered = cache_dir() / "templates" / f"{digest}.json"
    if _passed(remembered):
        return
    verdict = _try(template, seconds, memory_bytes)
    kind = verdict["verdict"]
    if kind != "ok":
        line = f" (line {verdict['line']})" if verdict.get("line") else ""
        message = _MESSAGES[kind].format(
            seconds=seconds, megabytes=memory_bytes / 1e6, message=verdict.get("message", ""), line=line
        )
        raise InputError(Problem(where, message, _FIX))
    with suppress(EnvironmentFault, OSError):  # a cache that cannot be written only costs time
        remembered.parent.mkdir(parents=True, exist_ok=True)
        write_json(remembered, {"verdict": "ok"})


def _passed(remembered: Path) -> bool:
    try:
        return bool(json.loads(remembered.read_bytes()) == {"verdict": "ok"})
    except (OSError, ValueError):
        return False


def _try(template: str, seconds: float, memory_bytes: int) -> dict[str, Any]:
    """Return the child's verdict; it is stopped when its time is over or its memory grows too far."""
    request = json.dumps({"template": template, "memory_bytes": memory_bytes})
    # -P keeps the script's folder, which is ours, off the child's import path.
    command = [sys.executable, "-P", str(_CHILD)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        try:
            return _watch(child, request, seconds, memory_bytes)
        finally:
            child.kill()


def _watch(child: subprocess.Popen[str], request: str, seconds: float, memory_bytes: int) -> dict[str, Any]:
    waiting: str | None = request
    deadline = time.monotonic() + _PATIENCE * seconds
    while True:
        try:
            answer, _ = child.communicate(waiting, timeout=_POLL_SECONDS)
            break
        except subprocess.TimeoutExpired:
            waiting = None  # it is sent only once
        used, resident = _usage(child.pid)
        if used > seconds or time.monotonic() > deadline:
            return {"verdict": "time"}
        if resident > memory_bytes:
            return {"verdict": "memory"}
    try:
        verdict = json.loads(answer)
    except ValueError:
        return {"verdict": "crash"}
    return (
        verdict if isinstance(verdict, dict) and verdict.get("verdict") in {"ok", *_MESSAGES} else {"verdict": "crash"}
    )


def _usage(pid: int) -> tuple[float, int]:
    """Processor seconds and bytes of memory that a process has used so far."""
    try:
        process = psutil.Process(pid)
        times = process.cpu_times()
        return times.user + times.system, int(process.memory_info().rss)
    except psutil.Error:
        return 0.0, 0
