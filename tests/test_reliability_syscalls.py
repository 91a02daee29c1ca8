"""A real SIGKILL at every system call of a save, put there by strace: the old state or the new one, never less.

Every call that touches a file or a descriptor is a moment at which the process dies before the call is made. What was
acknowledged before must be there afterwards, and every file readable.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from localdpo.data.store import PairStore
from localdpo.files import recover_folder, verify_folder
from localdpo.train.checkpoint import load_latest
from localdpo.train.run import RunFolder

TESTS = Path(__file__).parent
CALLS = "trace=%file,%desc"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace, which only Linux has"),
]


class Victims:
    """Does an operation in a fresh process, with strace attached to it if so asked."""

    def __init__(self, cache: Path) -> None:
        path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
        self._server = subprocess.Popen(
            [sys.executable, str(TESTS / "syscall_victim.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "LOCALDPO_CACHE": str(cache)},
        )

    def close(self) -> None:
        self._server.communicate()

    def _say(self, text: str) -> None:
        assert self._server.stdin is not None
        print(text, file=self._server.stdin, flush=True)

    def _hear(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline()

    def do(self, operation: str, folder: Path, which: str, *strace: str) -> int:
        """Exit code of the operation. With arguments for strace, it is attached before the operation begins."""
        self._say(f"{operation}\t{folder}\t{which}")
        word, process = self._hear().split()
        assert word == "ready"
        if not strace:
            self._say("go")
            return int(self._hear())
        command = ["strace", "-f", "-e", CALLS, *strace, "-p", process]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
            assert tracer.stderr is not None
            first = tracer.stderr.readline()
            self._say("go")
            code = int(self._hear())
            tracer.stderr.read()
        if "attached" not in first:
            pytest.skip(f"strace may not attach: {first}")
        return code


@pytest.fixture(scope="module")
def victims(tmp_path_factory) -> Iterator[Victims]:
    server = Victims(tmp_path_factory.mktemp("cache"))
    yield server
    server.close()


def _moments(log: Path) -> list[tuple[str, int]]:
    """The calls of a trace: name and number, as strace counts them (by name, in each thread)."""
    counts: Counter[tuple[str, str]] = Counter()
    for line in log.read_text(errors="replace").splitlines():
        if match := re.match(r"(\d+) +([a-z0-9_]+)\(", line):
            counts[match[1], match[2]] += 1
    most: dict[str, int] = {}
    for (_, name), count in counts.items():
        most[name] = max(most.get(name, 0), count)
    return [(name, number) for name, count in sorted(most.items()) for number in range(1, count + 1)]


def _acknowledged(folder: Path) -> list[str]:
    file = folder.with_name("acknowledged")
    return file.read_text().splitlines() if file.exists() else []


def _check_checkpoint(folder: Path, done: list[str]) -> str:
    found, damaged = load_latest(folder)
    assert damaged == []
    assert found is not None
    assert found.state.step == 2 or "new" not in done
    return str(found.state.step)


def _check_adapter(folder: Path, done: list[str]) -> str:
    # Between two renames the old folder is aside, and the next writer or reader brings it back.
    brought_back = recover_folder(folder)
    assert verify_folder(folder) == []
    values = {float(value.max()) for value in mx.load(str(folder / "adapters.safetensors")).values()}
    assert values == {2.0} or ("new" not in done and values == {1.0})
    return f"{values} {brought_back}"


def _check_results(folder: Path, done: list[str]) -> str:
    data = json.loads((folder / "eval.json").read_bytes())
    assert data["figures"] == list(range(3000))
    assert data["which"] == "new" or "new" not in done
    return str(data["which"])


def _check_pairs(folder: Path, done: list[str]) -> str:
    first = b'{"prompt":"first","chosen":"a","rejected":"b", "mine": [1,  2]}\r\n'
    data = (folder / "pairs.jsonl").read_bytes()
    assert data.startswith(first)
    assert all(json.loads(line) for line in data.split(b"\n") if line)
    with PairStore.open(folder / "pairs.jsonl") as store:
        found = [store.row(int(key)).prompt[0]["content"] for key in store.keys]
    states = [["first", "p1"], ["first", "p1", "p2"], ["first", "p1", "p2", "p3"], ["first", "p2", "p3"]]
    at = states.index(found)
    acknowledged = sum(word in done for word in ("p2", "p3", "-p1"))
    assert at in (acknowledged, acknowledged + 1)
    if "saved" in done:
        assert b'"p3"' in data
    return f"{found} {len(data)}"


def _check_run(folder: Path, done: list[str]) -> str:
    run = RunFolder(folder)
    steps = [event.step for event in run.events().events]
    status = run.status()
    assert status is not None
    assert steps == list(range(1, len(steps) + 1))
    assert all(str(step) in (str(number) for number in steps) for step in (3, 4) if str(step) in done)
    assert status.step >= max([2, *(int(word.split()[1]) for word in done if word.startswith("status"))])
    return f"{steps} {status.step}"


CHECKS = {
    "checkpoint": _check_checkpoint,
    "adapter": _check_adapter,
    "results": _check_results,
    "pairs": _check_pairs,
    "run": _check_run,
}


@pytest.mark.parametrize("operation", list(CHECKS))
def test_killed_at_every_system_call_of_a_save(operation, victims, tmp_path):
    before, folder = tmp_path / "before" / "it", tmp_path / "now" / "it"
    before.mkdir(parents=True)
    if operation == "adapter":
        before.rmdir()
    assert victims.do(operation, before, "old") == 0
    _forget(before)

    def afresh() -> None:
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(before.parent, folder.parent)

    afresh()
    log = tmp_path / "trace"
    assert victims.do(operation, folder, "new", "-o", str(log)) == 0
    seen = {CHECKS[operation](folder, _acknowledged(folder))}
    moments = _moments(log)
    assert len(moments) > 20
    killed = 0
    for name, number in moments:
        afresh()
        code = victims.do(operation, folder, "new", "-o", os.devnull, "-e", f"inject={name}:signal=KILL:when={number}")
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
        seen.add(CHECKS[operation](folder, _acknowledged(folder)))
    assert killed > 0.9 * len(moments)
    assert len(seen) > 1, "no kill came before the new state was there"
    print(f"{operation}: killed at {killed} of {len(moments)} system calls")


def _forget(folder: Path) -> None:
    folder.with_name("acknowledged").unlink(missing_ok=True)
