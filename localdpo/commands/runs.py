"""`localdpo runs`: what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from localdpo.commands.shared import ChartFolder, ChartForm, Debug, Json, guarded


class _ListsByDefault(TyperGroup):
    """A group whose command `list` is meant where none is named: a folder is no command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `list` before arguments that do not begin with a command."""
        named = bool(args) and (args[0] in self.commands or args[0] == "--help")
        return list(super().parse_args(ctx, args if named else ["list", *args]))


app = typer.Typer(
    help="List runs, or compare two: `localdpo runs [DIR]` lists.",
    rich_markup_mode=None,
    cls=_ListsByDefault,
)


@app.command("list")
@guarded
def runs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that holds the runs.")] = Path("runs"),
    json_lines: Json = False,
    debug: Debug = False,
) -> None:
    """List the runs in a folder. This is what `localdpo runs [DIR]` does."""
    from localdpo.console import listing

    listing.show_runs(folder, json_lines)


@app.command("compare")
@guarded
def runs_compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A run folder.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write a page with curves and answers, too.")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page, A-B.html by default, in the browser.")] = False,
    charts: ChartFolder = None,
    form: ChartForm = "svg",
    json_lines: Json = False,
    debug: Debug = False,
) -> None:
    """Put two runs side by side. As a page it has their curves and answers, too."""
    from localdpo.console import reporting

    reporting.compare(first, second, reporting.Request(output, show, charts, form, json_lines))
