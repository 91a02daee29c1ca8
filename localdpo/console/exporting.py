"""`localdpo export` and `localdpo import-adapter`: what is written where, and how to use it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localdpo.console.terminal import bytes_text, say
from localdpo.errors import InputError, Problem
from localdpo.text import sanitise

if TYPE_CHECKING:
    from localdpo.export.targets import Exported, Options


def tell(text: str) -> None:
    """Tell of a long step, on standard error."""
    say(text, file=sys.stderr, flush=True)


def run(
    source: Path,
    target: str,
    out: Path | None,
    model: str | None,
    settings: Mapping[str, Any],
    *,
    force: bool,
    as_json: bool,
) -> None:
    """Serve `localdpo export` for the targets that write a folder; ``settings`` are fields of `Options`.

    Raises InputError and EnvironmentFault.
    """
    from localdpo.export.source import find_source
    from localdpo.export.targets import TARGETS, Options, export

    if target not in TARGETS:
        raise InputError(Problem("--to", f"{target!r} is no target", f"It is one of {', '.join(TARGETS)}"))
    options = Options(**settings)
    _refuse_unused(target, options)
    found = find_source(source, model)
    folder = out if out is not None else Path("exports") / f"{found.name}-{target}"
    done = export(found, target, folder, options=options, force=force, notify=tell)
    if as_json:
        print(json.dumps(done.to_json(), indent=2))
    else:
        say("\n".join(_lines(done)))


_CONCERN = {
    "base": ("peft", "gguf"),
    "with_base": ("gguf", "mlx"),
    "quantize": ("fused",),
    "accept_loss": ("fused",),
}


def _refuse_unused(target: str, options: Options) -> None:
    """An option that a target would ignore is a mistake to report."""
    problems = []
    for name, targets in _CONCERN.items():
        if getattr(options, name) and target not in targets:
            flag = f"--{name.replace('_', '-')}"
            problems.append(Problem(flag, f"has no effect on --to {target}", f"It is for --to {' and '.join(targets)}"))
    if problems:
        raise InputError(*problems)


def _lines(done: Exported) -> list[str]:
    width = max(map(len, done.files))
    lines = [f"{done.target}: {done.folder}"]
    lines += [f"  {name:{width}}  {bytes_text(size)}" for name, size in done.files.items()]
    lines += [f"  {note}" for note in done.written.notes]
    lines += ["next:", *(f"  {step}" for step in done.written.next_steps)]
    return [sanitise(line) for line in lines]


def import_adapter(
    adapter: Path, model: str | None, out: Path | None, quantize: int | None, *, force: bool, as_json: bool
) -> None:
    """Serve `localdpo import-adapter`. Raises InputError and EnvironmentFault."""
    from localdpo.export.importing import import_adapter as bring

    folder = out if out is not None else Path("runs") / (adapter.resolve().name or "imported")
    done = bring(adapter, folder, model=model, quantize=quantize, force=force, notify=tell)
    if as_json:
        print(json.dumps(done.to_json(), indent=2))
    else:
        say(*done.lines())
