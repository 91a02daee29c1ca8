"""Make the SVG screens of README from the real UI: `python benchmarks/screens.py [FOLDER]` (default docs/screens).

Every picture is the app itself on the shipped example, in a workspace that goes away again; nothing is drawn.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tui")]
os.environ.setdefault("TEXTUAL_ANIMATIONS", "none")

from localdpo_tui.app import LocalDPOApp
from localdpo_tui.places.pairs import PairsPlace
from textual.pilot import Pilot

Scene = Callable[[LocalDPOApp, Pilot[None]], Awaitable[None]]
DEADLINE = 60.0


async def until(condition: Callable[[], object]) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.02)

    await asyncio.wait_for(wait(), DEADLINE)


async def pairs(app: LocalDPOApp, pilot: Pilot[None]) -> None:
    place = app.screen
    assert isinstance(place, PairsPlace)
    await until(lambda: place.store is not None)
    await pilot.press("down", "enter")
    await until(lambda: place.editor.ready and place.editor.chosen.border_subtitle)


async def difference(app: LocalDPOApp, pilot: Pilot[None]) -> None:
    await pairs(app, pilot)
    await pilot.press("f10")
    await pilot.pause(0.3)


async def help_screen(app: LocalDPOApp, pilot: Pilot[None]) -> None:
    await until(lambda: isinstance(app.screen, PairsPlace) and app.screen.store is not None)
    await pilot.press("f1")
    await pilot.pause(0.2)


async def welcome(app: LocalDPOApp, pilot: Pilot[None]) -> None:
    await until(lambda: app.screen.query("#begin-example"))


def going_to(key: str) -> Scene:
    async def scene(app: LocalDPOApp, pilot: Pilot[None]) -> None:
        await until(lambda: isinstance(app.screen, PairsPlace) and app.screen.store is not None)
        await pilot.press(key)
        await pilot.pause(1.5)

    return scene


SCENES: dict[str, tuple[Scene, tuple[int, int], bool]] = {
    "welcome": (welcome, (100, 26), False),
    "pairs": (pairs, (120, 36), True),
    "pairs-80x24": (pairs, (80, 24), True),
    "difference": (difference, (100, 24), True),
    "help": (help_screen, (100, 34), True),
    "train": (going_to("f3"), (120, 36), True),
    "chat": (going_to("f4"), (120, 36), True),
    "runs": (going_to("f5"), (120, 36), True),
}


async def take(name: str, into: Path) -> None:
    scene, size, example = SCENES[name]
    with tempfile.TemporaryDirectory(prefix="localdpo-") as folder:
        workspace = Path(folder) / "athene"
        workspace.mkdir()
        os.environ["LOCALDPO_CONFIG"] = folder
        if example:
            from localdpo.console.workspace import create

            create(workspace)
        app = LocalDPOApp(workspace)
        async with app.run_test(size=size) as pilot:
            await scene(app, pilot)
            await pilot.pause(0.3)
            (into / f"{name}.svg").write_text(app.export_screenshot(title="localdpo", simplify=True), "utf-8")
            for place in app.places():
                place.close()


def main() -> None:
    into = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "screens"
    into.mkdir(parents=True, exist_ok=True)
    for name in SCENES:
        asyncio.run(take(name, into))
        print(into / f"{name}.svg")


if __name__ == "__main__":
    main()
