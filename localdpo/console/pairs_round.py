"""`localdpo pairs round`: on-policy rounds, shown as they go."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localdpo.console.display import make_display
from localdpo.console.fetch import fetch
from localdpo.console.pairs_generate import MethodOptions, sampling_of
from localdpo.console.signals import StopSignals
from localdpo.console.terminal import duration_text
from localdpo.data.pairs import read_pairs, read_prompts
from localdpo.paths import from_here
from localdpo.recipe import load_recipe
from localdpo.text import sanitise
from localdpo.train.run import Control

if TYPE_CHECKING:
    from localdpo.evaluate.rounds import RoundDone, RoundStart

__all__ = ["run_round"]


def run_round(
    recipe_file: Path,
    overrides: Sequence[str],
    prompts: Path | None,
    out: Path | None,
    options: MethodOptions,
    *,
    rounds: int,
    samples: int,
    sampling: dict[str, Any],
    seed: int,
    json_lines: bool,
) -> int:
    """Serve `localdpo pairs round`; return the exit code. Raises LocalDPOError."""
    recipe = load_recipe(recipe_file, overrides)
    fetch(recipe.model)
    from localdpo.evaluate.generate.speakers import Source
    from localdpo.evaluate.generate.work import GenerateSettings
    from localdpo.evaluate.rounds import RoundDone, Rounds, RoundStart, prompts_of_pairs, run_rounds
    from localdpo.train.events import ProgressEvent

    rows = read_prompts(prompts) if prompts is not None else prompts_of_pairs(read_pairs(recipe.data.train).pairs)
    source = Source(recipe.model, recipe.lora.init_from, recipe.quantize, recipe.train.memory)
    generate = GenerateSettings((source,), options.method(), samples, sampling_of(sampling), seed)
    plan = Rounds(out or Path("runs") / f"{recipe_file.stem}-rounds", rounds, generate)
    control, finished = Control(), 0
    with make_display(json_lines) as display:

        def on_stop(_number: int) -> None:
            control.stop()
            display.notice("finishing what is under way and saving; once more leaves at once")

        def on_leave() -> None:
            display.leave("left at once; the same command goes on")

        with StopSignals(on_stop, on_leave) as signals:
            for event in run_rounds(recipe, rows, plan, control):
                if isinstance(event, RoundStart):
                    _tell(display, json_lines, _start_text(event), {"event": "round", "number": event.number})
                elif isinstance(event, RoundDone):
                    finished += 1
                    _tell(display, json_lines, _done_text(event), {"event": "round_end", **event.to_json()})
                elif not (json_lines and isinstance(event, ProgressEvent)):
                    display.show(event)
        if finished < rounds:
            display.notice(f"{finished} of {rounds} rounds are done; the same command goes on")
    return 128 + signals.received if signals.received is not None and finished < rounds else 0


def _tell(display: Any, json_lines: bool, text: str, data: dict[str, Any]) -> None:
    if json_lines:
        print(json.dumps(data), file=sys.stdout, flush=True)
    else:
        display.notice(sanitise(text))


def _start_text(event: RoundStart) -> str:
    return f"round {event.number} of {event.rounds}: answers by {event.source}"


def _done_text(event: RoundDone) -> str:
    again = " (was there already)" if event.skipped else ""
    gap = "" if event.gap is None else f", score gap {event.gap:.3f}"
    words = f"chosen {event.words_chosen:.1f} words, rejected {event.words_rejected:.1f}"
    took = "" if event.skipped else f", {duration_text(event.seconds)}"
    adapter = "" if event.adapter is None else f"; adapter {from_here(event.adapter)}"
    return f"round {event.number}{again}: {event.pairs} pairs, {words}{gap}{took}{adapter}"
