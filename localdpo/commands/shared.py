"""Options that several commands have, and what every command does with an error."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

P = ParamSpec("P")

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Write JSON for programs.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe; may be repeated."),
]
ChartFolder = Annotated[
    Path | None, typer.Option("--charts", metavar="DIR", help="Write the charts as files of their own, too.")
]
ChartForm = Annotated[str, typer.Option("--format", metavar="svg|png", help="Of these files; png needs an extra.")]


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Turn what a command raises into sentences on standard error and an exit code."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except (typer.Exit, SystemExit):
            raise
        except BaseException as error:
            from localdpo.console.failures import report

            raise typer.Exit(report(error, debug=bool(kwargs.get("debug")))) from None

    return run
