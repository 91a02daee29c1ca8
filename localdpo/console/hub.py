"""`localdpo export RUN --to hub NAME`: what would go up, and what went."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from localdpo.console.exporting import tell
from localdpo.console.terminal import bytes_text, say
from localdpo.errors import InputError, Problem
from localdpo.text import inert_json

__all__ = ["refuse_elsewhere", "refuse_here", "run"]


def run(
    source: Path,
    name: str | None,
    model: str | None,
    base: str | None,
    *,
    public: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Upload a run, or with ``dry_run`` only say what would be uploaded. Raises InputError and EnvironmentFault."""
    from localdpo.export.hub import check_name, require_token, stage, upload
    from localdpo.export.source import find_source

    if name is None:
        raise InputError(Problem("NAME", "is missing", "Name the repository: --to hub NAME"))
    check_name(name)
    if not dry_run:
        require_token(name)
    found = find_source(source, model)
    with tempfile.TemporaryDirectory(prefix="localdpo-") as temporary:
        folder = Path(temporary) / "repository"
        folder.mkdir()
        files = stage(found, folder, base=base, say=tell)
        if dry_run:
            _show({"repository": name, "private": not public, "files": files, "dry_run": True}, as_json)
            return
        tell(f"Sending {bytes_text(sum(files.values()))} to {name}")
        done = upload(folder, name, public=public, force=force)
    _show({**asdict(done), "files": files, "dry_run": False}, as_json)


def refuse_elsewhere(to: str, name: str | None, public: bool, dry_run: bool) -> None:
    """Raise InputError when what is for the Hub alone is asked of another target."""
    asked = {"NAME": name is not None, "--public": public, "--dry-run": dry_run}
    problems = [Problem(flag, f"has no effect on --to {to}", "It is for --to hub") for flag, on in asked.items() if on]
    if problems:
        raise InputError(*problems)


def refuse_here(**settings: Any) -> None:
    """Raise InputError when what is for other targets is asked of the Hub."""
    flags = [f"--{name.replace('_', '-')}" for name, value in settings.items() if value]
    if flags:
        raise InputError(*(Problem(flag, "has no effect on --to hub", "Leave it out") for flag in flags))


def _show(row: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(inert_json(row, indent=2))
        return
    kind = "private" if row["private"] else "public"
    width = max(map(len, row["files"]))
    head = f"would send to {row['repository']} ({kind}):" if row["dry_run"] else f"sent to {row['url']} ({kind}):"
    lines = [head, *(f"  {name:{width}}  {bytes_text(size)}" for name, size in row["files"].items())]
    say(*lines)
