"""How fast the terminal UI is there and gone, what it weighs, and whether it ever stalls.

    python benchmarks/tui_start.py [--rows 50000] [--runs 5] [--json]

Each program runs in a tmux of its own at 120x36. *ready* is the time from the start of the process until its mark is
on the screen, polled every 8 ms; *RSS* is the memory of its process tree three seconds later; *quit* is the time from
its quit key until the process is gone. The first run warms the caches and is not counted; medians of the others are
given. Beside localdpo: a bare Textual app (the floor), and harlequin and posting where they are installed.

*Stall* is the longest time in which the UI's event loop did not answer, measured inside the app by a task that wakes
every 5 ms, while the keys below scroll and search a file of `--rows` pairs: it needs no tmux. Budgets: ready 500 ms,
60 MiB, quit 400 ms, stall 50 ms, on an idle machine with two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
BARE = """
from textual.app import App
from textual.widgets import Static
class Bare(App):
    def compose(self):
        yield Static("a bare app")
Bare().run()
"""
POLL_SECONDS = 0.008
REPEAT_SECONDS = 0.03  # a held key repeats about thirty times a second
SETTLE_SECONDS = 3.0
DEADLINE = 120.0


@dataclass(frozen=True)
class Program:
    name: str
    command: list[str]
    mark: str
    quit_key: str = "C-q"


@dataclass(frozen=True)
class Start:
    ready_ms: float
    rss_mib: float
    quit_ms: float


class Terminal:
    """A tmux server of its own; nothing of the user's is touched."""

    def __init__(self) -> None:
        self._socket = f"localdpo-bench-{uuid.uuid4().hex[:8]}"
        self.tmux("new-session", "-d", "-s", "keeper", "sleep 3600")  # a server without sessions ends

    def close(self) -> None:
        self.tmux("kill-server")

    def tmux(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["tmux", "-L", self._socket, *words], capture_output=True, text=True, check=False)

    def measure(self, program: Program) -> Start:
        line = "exec " + shlex.join(program.command)
        begin = time.perf_counter()
        self.tmux("new-session", "-d", "-s", "one", "-x", "120", "-y", "36", line)
        while not re.search(program.mark, self.tmux("capture-pane", "-p", "-t", "one").stdout):
            if time.perf_counter() - begin > DEADLINE:
                raise SystemExit(f"{program.name} never showed {program.mark!r}")
            time.sleep(POLL_SECONDS)
        ready = time.perf_counter() - begin
        time.sleep(SETTLE_SECONDS)
        pid_text = self.tmux("display-message", "-p", "-t", "one", "#{pane_pid}").stdout.strip()
        if not pid_text:
            raise SystemExit(f"{program.name} ended by itself")
        pid = int(pid_text)
        tree = psutil.Process(pid)
        rss = sum(process.memory_info().rss for process in (tree, *tree.children(recursive=True)))
        begin = time.perf_counter()
        self.tmux("send-keys", "-t", "one", program.quit_key)
        while self.tmux("has-session", "-t", "one").returncode == 0:
            if time.perf_counter() - begin > DEADLINE:
                raise SystemExit(f"{program.name} does not quit")
            time.sleep(POLL_SECONDS)
        return Start(1000 * ready, rss / 2**20, 1000 * (time.perf_counter() - begin))


def programs(small: Path, large: Path) -> Iterator[Program]:
    python = sys.executable
    yield Program("bare Textual", [python, "-c", BARE], "a bare app")
    yield Program("localdpo, 76 pairs", [python, "-m", "localdpo", "tui", str(small)], "What is your name")
    yield Program(f"localdpo, {large.name}", [python, "-m", "localdpo", "tui", str(large)], "fox|river|stars")
    if shutil.which("harlequin"):
        yield Program("harlequin", ["harlequin"], "Query Editor|Run Query")
    if shutil.which("posting"):
        yield Program("posting", ["posting"], "Collection", "C-c")


@contextmanager
def workspaces(rows: int) -> Iterator[tuple[Path, Path]]:
    """Make a small and a large workspace in a folder that goes away again."""
    with tempfile.TemporaryDirectory(prefix="localdpo-bench-") as name:
        small, large = Path(name) / "example", Path(name) / f"{rows:,} pairs"
        for folder in (small, large):
            (folder / "pairs").mkdir(parents=True)
        shutil.copy(ROOT / "recipes" / "athene.jsonl", small / "pairs")
        words = "the quick fox follows a river below distant stars and sleeps near an old stone bridge"
        pick = random.Random(0)
        with (large / "pairs" / "big.jsonl").open("w", encoding="utf-8") as file:
            for number in range(rows):
                texts = [" ".join(pick.choices(words.split(), k=pick.randint(5, 60))) for _ in range(3)]
                row = {"prompt": f"{number} {texts[0]}", "chosen": texts[1], "rejected": texts[2]}
                file.write(json.dumps(row) + "\n")
        yield small, large


async def longest_stall(folder: Path, rows: int) -> dict[str, tuple[float, float]]:
    """Return for each phase the longest silence of the event loop, and the most its thread computed at a stretch, ms.

    The first has in it what other programs and threads take; the second is what the UI does itself.
    """
    from localdpo_tui.app import LocalDPOApp
    from localdpo_tui.places.pairs import PairsPlace
    from textual.widgets import Input

    worst: dict[str, tuple[float, float]] = {}
    phase = "open"

    async def watch() -> None:
        wall, own = time.perf_counter(), time.thread_time()
        while True:
            await asyncio.sleep(0.005)
            before, wall, used, own = wall, time.perf_counter(), own, time.thread_time()
            seen = worst.get(phase, (0.0, 0.0))
            worst[phase] = max(seen[0], 1000 * (wall - before - 0.005)), max(seen[1], 1000 * (own - used))

    app = LocalDPOApp(folder)
    async with app.run_test(size=(120, 36)) as pilot:
        place = app.screen
        assert isinstance(place, PairsPlace)

        async def keys(*names: str) -> None:
            for name in names:
                await pilot.press(name)
                await asyncio.sleep(REPEAT_SECONDS)

        watcher = asyncio.create_task(watch())
        while place.store is None or len(place.rows.keys) < rows:
            await asyncio.sleep(0.02)
        phase = "scroll while indexing"
        await keys(*["pagedown"] * 30, "end", "home", *["down"] * 60)
        phase = "index"
        while not await asyncio.to_thread(place.store.build_index):
            await asyncio.sleep(0.02)
        phase = "scroll"
        await keys(*["pagedown"] * 60, "end", *["pageup"] * 30, "home")
        phase = "search"
        await keys("slash", *"old stone")
        while not 0 < len(place.rows.keys) < rows:
            await asyncio.sleep(0.02)
        place.query_one(Input).value = ""
        while len(place.rows.keys) < rows:
            await asyncio.sleep(0.02)
        phase = "edit"
        await keys("down", "enter")
        await pilot.pause(0.3)
        await keys(*"typing on", "escape", "ctrl+z", "delete", "ctrl+z")
        watcher.cancel()
        place.store.discard()
        place.close()
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000, help="pairs in the large file")
    parser.add_argument("--runs", type=int, default=5, help="counted starts of each program")
    parser.add_argument("--stalls", action="store_true", help="measure stalls only")
    parser.add_argument("--json", action="store_true", help="write JSON")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tui"), os.environ.get("PYTHONPATH", "")])
    sys.path[:0] = [str(ROOT), str(ROOT / "tui")]
    figures: dict[str, dict[str, float]] = {}
    with workspaces(options.rows) as (small, large), tempfile.TemporaryDirectory() as config:
        os.environ["LOCALDPO_CONFIG"] = config
        if shutil.which("tmux") and not options.stalls:
            with closing(Terminal()) as terminal:
                for program in programs(small, large):
                    starts = [asdict(terminal.measure(program)) for _ in range(options.runs + 1)][1:]
                    figures[program.name] = {
                        name: round(statistics.median(start[name] for start in starts), 1) for name in starts[0]
                    }
        elif not options.stalls:
            print("tmux is not installed: only stalls are measured", file=sys.stderr)
        stalls = asyncio.run(longest_stall(large, options.rows))
    load = os.getloadavg()[0]
    if options.json:
        print(json.dumps({"starts": figures, "stalls_ms": stalls, "load": load}, indent=2))
        return
    print(f"{'':24} {'ready ms':>9} {'RSS MiB':>8} {'quit ms':>8}")
    for name, row in figures.items():
        print(f"{name:24} {row['ready_ms']:9.0f} {row['rss_mib']:7.0f} {row['quit_ms']:8.0f}")
    print(f"\nlongest stall with {options.rows:,} pairs, ms: of the event loop, and of that its own thread's work")
    for name, (wall, own) in stalls.items():
        print(f"{name:24} {wall:9.1f} {own:7.1f}")
    print(f"\nload average {load:.1f}: figures mean something below 0.5")


if __name__ == "__main__":
    main()
