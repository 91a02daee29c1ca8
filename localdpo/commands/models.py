"""`localdpo models`: what there is to train, on this machine and in the catalogue."""

from __future__ import annotations

from typing import Annotated

import typer

from localdpo.commands.shared import Debug, Json, guarded

app = typer.Typer(
    help="List the models, fetch one, ask about one.",
    rich_markup_mode=None,
    invoke_without_command=True,
)


@app.callback()
@guarded
def models(context: typer.Context, json_lines: Json = False, debug: Debug = False) -> None:
    """List the catalogue, or run one of the commands below."""
    if context.invoked_subcommand is None:
        from localdpo.console import listing

        listing.show_models(json_lines)


@app.command("list")
@guarded
def models_list(json_lines: Json = False, debug: Debug = False) -> None:
    """List the models of the catalogue."""
    from localdpo.console import listing

    listing.show_models(json_lines)


@app.command("get")
@guarded
def models_get(
    name: Annotated[str, typer.Argument(help="A catalogue name or a Hub id, with @revision if need be.")],
    json_lines: Json = False,
    debug: Debug = False,
) -> None:
    """Fetch a model, so that it is there offline."""
    from localdpo.console import listing

    listing.get_model(name, json_lines)


@app.command("info")
@guarded
def models_info(
    name: Annotated[str, typer.Argument(help="A catalogue name, a Hub id or a folder.")],
    json_lines: Json = False,
    debug: Debug = False,
) -> None:
    """Tell about one model, without fetching it."""
    from localdpo.console import listing

    listing.show_model(name, json_lines)
