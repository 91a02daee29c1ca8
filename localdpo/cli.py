"""The `localdpo` command: arguments in, exit code out.

Every command imports what it needs when it runs, so that `--help` loads neither mlx nor anything else that is
slow. What is shown is in `localdpo.console`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

P = ParamSpec("P")

app = typer.Typer(
    name="localdpo",
    help="Teach a language model your preferences on your own computer.",
    epilog="Exit codes: 0 done, 2 bad input, 3 environment, 4 training diverged, 128 + signal number.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    invoke_without_command=True,
)
models_app = typer.Typer(
    help="List the models, fetch one, ask about one.",
    rich_markup_mode=None,
    invoke_without_command=True,
)
app.add_typer(models_app, name="models")

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Write JSON for programs.")]


def _guarded(command: Callable[P, None]) -> Callable[P, None]:
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


def _version(wanted: bool) -> None:
    if wanted:
        from localdpo import __version__

        typer.echo(f"localdpo {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
@_guarded
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where; the current folder by default.")] = Path(),
    debug: Debug = False,
) -> None:
    """Make a workspace from the shipped example."""
    from localdpo.console import workspace

    workspace.init(folder)


@app.command()
@_guarded
def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe; may be repeated."),
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", min=1, metavar="N", help="Stop after N steps.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop after the preflight.")] = False,
    json_lines: Annotated[bool, typer.Option("--json", help="Write one event a line as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Train an adapter with the pairs and settings of RECIPE."""
    from localdpo.console import training

    extra = [] if max_steps is None else [f"train.max_steps={max_steps}"]
    code = training.run(recipe, [*(overrides or []), *extra], resume=resume, dry_run=dry_run, json_lines=json_lines)
    if code:
        raise typer.Exit(code)


@app.command()
@_guarded
def chat(
    run: Annotated[Path | None, typer.Argument(help="A run folder, or an adapter folder.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="M", help="Another model than the run's; see `localdpo models`."),
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="The base model answers.")] = False,
    tuned: Annotated[bool, typer.Option("--tuned", help="The tuned model answers (default with a RUN).")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Both answer.")] = False,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="PROMPT", help="Answer this and exit.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="A system message.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from the likeliest tokens only.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="With --prompt: write the answers as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Talk to the tuned model, to the base, or to both."""
    from localdpo.console import talk

    talk.run(
        run,
        model,
        mode=talk.mode_of(base, tuned, compare),
        prompt=prompt,
        system=system,
        sampling={"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed},
        json_lines=json_lines,
    )


@app.command()
@_guarded
def runs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that holds the runs.")] = Path("runs"),
    json_lines: Json = False,
    debug: Debug = False,
) -> None:
    """List the runs in a folder and how far they are."""
    from localdpo.console import listing

    listing.show_runs(folder, json_lines)


@app.command()
@_guarded
def doctor(json_lines: Json = False, debug: Debug = False) -> None:
    """Look at this machine and give advice."""
    from localdpo.console import doctor as console

    if not console.show(json_lines):
        raise typer.Exit(3)


@models_app.callback()
@_guarded
def models(context: typer.Context, json_lines: Json = False, debug: Debug = False) -> None:
    """List the catalogue, or run one of the commands below."""
    if context.invoked_subcommand is None:
        from localdpo.console import listing

        listing.show_models(json_lines)


@models_app.command("list")
@_guarded
def models_list(json_lines: Json = False, debug: Debug = False) -> None:
    """List the models of the catalogue."""
    from localdpo.console import listing

    listing.show_models(json_lines)


@models_app.command("get")
@_guarded
def models_get(
    name: Annotated[str, typer.Argument(help="A catalogue name or a Hub id, with @revision if need be.")],
    json_lines: Json = False,
    debug: Debug = False,
) -> None:
    """Fetch a model, so that it is there offline."""
    from localdpo.console import listing

    listing.get_model(name, json_lines)


@models_app.command("info")
@_guarded
def models_info(
    name: Annotated[str, typer.Argument(help="A catalogue name, a Hub id or a folder.")],
    json_lines: Json = False,
    debug: Debug = False,
) -> None:
    """Tell about one model, without fetching it."""
    from localdpo.console import listing

    listing.show_model(name, json_lines)


def main() -> None:
    """Run the command line."""
    from localdpo.console.terminal import tolerate_narrow_encodings

    tolerate_narrow_encodings()
    app()
