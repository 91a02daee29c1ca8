"""`localdpo chat`: finds the model and its adapter, and lets `Repl` talk to them.

The model is loaded once; the base answers with the adapter's layers swapped out.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from localdpo.console.chat import (
    Conversation,
    Mode,
    Repl,
    Side,
    Speaker,
    Turn,
    answer,
    line_reader,
    stop_on_interrupt,
)
from localdpo.console.fetch import fetch
from localdpo.console.terminal import is_live, say, width
from localdpo.data.pairs import Message
from localdpo.errors import InputError, Problem
from localdpo.text import inert_json

if TYPE_CHECKING:
    from localdpo.model.generate import SamplingOptions
    from localdpo.model.load import LoadedModel

DEFAULT_MODEL = "smollm2-135m"
_WIDE = 100


@dataclass(frozen=True)
class Target:
    """What to load: a model, and the folder of its adapter (None: the base alone)."""

    model: str
    adapter: Path | None = None
    quantize: int | None = None
    memory: Literal["auto", "fast", "lean"] = "auto"


class ModelSpeaker:
    """A loaded model, with its adapter or without."""

    def __init__(self, loaded: LoadedModel, options: SamplingOptions, has_adapter: bool) -> None:
        self.sides: tuple[Side, ...] = ("base", "tuned") if has_adapter else ("base",)
        self._loaded = loaded
        self._options = options

    def stream(self, side: Side, messages: Sequence[Message], cancelled: Callable[[], bool]) -> Iterator[str]:
        """Yield the answer of ``side``, a token at a time."""
        from localdpo.model.generate import stream
        from localdpo.model.lora import adapters_off

        bare = side == "base" and "tuned" in self.sides
        with adapters_off(self._loaded.model) if bare else nullcontext():
            for token in stream(self._loaded, messages, self._options, cancelled):
                yield token.text


def mode_of(base: bool, tuned: bool, compare: bool) -> Mode | None:
    """Return the mode that the flags ask for, None when they ask for nothing."""
    wanted = [name for name, flag in (("base", base), ("tuned", tuned), ("compare", compare)) if flag]
    if len(wanted) > 1:
        raise InputError(Problem(" ".join(f"--{name}" for name in wanted), "these exclude each other", "Choose one"))
    return wanted[0] if wanted else None  # type: ignore[return-value]


def find_target(run: Path | None, model: str | None) -> Target:
    """Return what to load for ``run`` (a run folder, an adapter folder or None) and ``model``.

    Raises InputError when there is no adapter at ``run``, or no word about which model it is for.
    """
    if run is None:
        return Target(model or DEFAULT_MODEL)
    from localdpo.export.source import find_source

    source = find_source(run, model)
    return Target(source.model, source.adapter, source.quantize, source.memory)


def load(target: Target, sampling: Mapping[str, Any]) -> ModelSpeaker:
    """Load the model, and the adapter onto it; ``sampling`` are fields of `SamplingOptions`."""
    from localdpo.model.generate import SamplingOptions
    from localdpo.model.load import load_model
    from localdpo.model.lora import load_adapter

    options = SamplingOptions(**sampling)
    fetch(target.model)
    loaded = load_model(target.model, quantize=target.quantize, memory=target.memory)
    if target.adapter is not None:
        load_adapter(target.adapter, loaded)
    return ModelSpeaker(loaded, options, target.adapter is not None)


def run(
    folder: Path | None,
    model: str | None,
    *,
    mode: Mode | None,
    prompt: str | None,
    system: str | None,
    sampling: Mapping[str, Any],
    json_lines: bool,
) -> None:
    """Serve `localdpo chat`. Raises InputError and what loading a model raises."""
    if json_lines and prompt is None:
        raise InputError(Problem("--json", "there is nothing to answer", "Give a prompt with -p"))
    target = find_target(folder, model)
    mode = mode or ("base" if target.adapter is None else "tuned")
    if mode != "base" and target.adapter is None:
        raise InputError(Problem(f"--{mode}", "there is no tuned model", "Name a run, as in runs/athene"))
    conversation = Conversation(mode, system)
    speaker = load(target, sampling)
    if prompt is not None:
        answer_once(conversation, speaker, prompt, json_lines)
        return
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        who = "base and tuned answer" if mode == "compare" else f"the {mode} model answers"
        say(f"{folder or target.model}: {who}. /help lists commands, Ctrl-D leaves.")
    Repl(conversation, speaker, sys.stdout, labels=interactive).run(line_reader(interactive))


def answer_once(conversation: Conversation, speaker: Speaker, prompt: str, json_lines: bool) -> None:
    """Print the answer to ``prompt``: as JSON, side by side where that fits, or one above the other.

    Raises KeyboardInterrupt after what there is was printed, when Ctrl-C cut it short.
    """
    if conversation.mode == "compare" and not json_lines and is_live(sys.stdout) and width() >= _WIDE:
        turn = _side_by_side(conversation, speaker, prompt)
    else:
        out = io.StringIO() if json_lines else sys.stdout
        turn = Repl(conversation, speaker, out, labels=False).ask(prompt)
    if json_lines:
        print(inert_json({"prompt": prompt, **turn.answers}))
    if turn.stopped:
        raise KeyboardInterrupt


def _side_by_side(conversation: Conversation, speaker: Speaker, prompt: str) -> Turn:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    shown: dict[Side, str] = {"base": "", "tuned": ""}

    def table() -> Table:
        grid = Table(*shown, box=None, expand=True, pad_edge=False, padding=(0, 2, 0, 0))
        for column in grid.columns:
            column.ratio = 1
        grid.add_row(*(Text(text) for text in shown.values()))
        return grid

    turn = Turn(prompt)
    conversation.turns.append(turn)
    console = Console(highlight=False)
    # Transient, and printed once more: a live region taller than the screen would lose its top.
    with stop_on_interrupt() as stopped, Live(console=console, transient=True) as live:
        for side in shown:
            if stopped():
                break
            for text in answer(conversation, speaker, side, stopped):
                shown[side] += text
                live.update(table())
        turn.stopped = stopped()
    console.print(table())
    return turn
