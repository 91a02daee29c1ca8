"""The `localdpo` command: arguments in, exit code out.

Every command imports what it needs when it runs, so that `--help` loads neither mlx nor anything else that is
slow. What is shown is in `localdpo.console`.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated

import typer

from localdpo.commands import models, pairs, runs
from localdpo.commands.shared import ChartFolder, ChartForm, Debug, Json, Overrides, guarded

app = typer.Typer(
    name="localdpo",
    help="Teach a language model your preferences on your own computer.",
    epilog="Exit codes: 0 done, 2 bad input, 3 environment, 4 training diverged, 128 + signal number.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    invoke_without_command=True,
)
app.add_typer(models.app, name="models")
app.add_typer(pairs.app, name="pairs")
app.add_typer(runs.app, name="runs")


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
    if context.invoked_subcommand is not None:
        return
    from localdpo.console import ui

    if ui.can_open():
        guarded(ui.open_ui)(Path())
    else:
        typer.echo(context.get_help())


@app.command()
@guarded
def tui(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="The workspace; the current folder by default.")
    ] = Path(),
    place: Annotated[
        str | None, typer.Option("--place", metavar="PLACE", help="Open at pairs, train, chat or runs.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Open the terminal UI: write pairs, train, chat, keep."""
    from localdpo.console import ui

    ui.open_ui(folder, place)


@app.command()
@guarded
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where; the current folder by default.")] = Path(),
    debug: Debug = False,
) -> None:
    """Make a workspace from the shipped example."""
    from localdpo.console import workspace

    workspace.init(folder)


@app.command()
@guarded
def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Overrides = None,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", min=1, metavar="N", help="Stop after N steps.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    fork: Annotated[
        bool, typer.Option("--fork", help="A new run from the last one's adapter; its recipe and pairs may differ.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop after the preflight.")] = False,
    json_lines: Annotated[bool, typer.Option("--json", help="Write one event a line as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Train an adapter with the pairs and settings of RECIPE."""
    from localdpo.console import training

    extra = [] if max_steps is None else [f"train.max_steps={max_steps}"]
    options = training.Options(resume=resume, fork=fork, dry_run=dry_run, json_lines=json_lines)
    code = training.run(recipe, [*(overrides or []), *extra], options)
    if code:
        raise typer.Exit(code)


@app.command()
@guarded
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
@guarded
def serve(
    run: Annotated[Path | None, typer.Argument(help="A run folder, or an adapter folder; none serves a base.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="M", help="Another model than the run's; see `localdpo models`."),
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen; beyond this machine a token is needed.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", metavar="NAME", help="A further name of this server; may be repeated."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option("--allow-origin", metavar="URL", help="Web pages of URL may call; may be repeated."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer where a request does not say.")] = 512,
    timeout: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="Longest time for a request.")] = 600,
    json_lines: Annotated[bool, typer.Option("--json", help="Write one event a line as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Serve the base and its runs to programs that speak OpenAI's API."""
    from localdpo.console import serving

    options = serving.Options(host, port, allow_host or (), allow_origin or (), max_tokens, timeout, json_lines)
    raise typer.Exit(serving.run(run, model, options))


@app.command()
@guarded
def export(
    run: Annotated[Path, typer.Argument(help="A run folder, or an adapter folder.")],
    to: Annotated[str, typer.Option("--to", metavar="TARGET", help="peft, gguf, fused, mlx or hub.")],
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="hub: the repository.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where; exports/NAME-TARGET by default.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="M", help="The base, where the adapter does not say it.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="B", help="The base in the other tool: a Hub id, a GGUF file, an Ollama model."),
    ] = None,
    with_base: Annotated[bool, typer.Option("--with-base", help="gguf, mlx: put the base beside the adapter.")] = False,
    quantize: Annotated[
        int | None, typer.Option("--quantize", metavar="BITS", help="fused: pack the weights; full precision without.")
    ] = None,
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="fused: write it even if it no longer answers as the adapter does.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an earlier export; hub: add to a repository that exists.")
    ] = False,
    public: Annotated[bool, typer.Option("--public", help="hub: let everybody see it; private without.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="hub: only say what would be sent.")] = False,
    json_lines: Json = False,
    debug: Debug = False,
) -> None:
    """Write the tuned model for other tools: PEFT, llama.cpp and Ollama, mlx-lm, a whole model; or to the Hub."""
    from localdpo.console import exporting, hub

    if to == "hub":
        hub.refuse_here(out=out, with_base=with_base, quantize=quantize, accept_loss=accept_loss)
        hub.run(run, name, model, base, public=public, force=force, dry_run=dry_run, as_json=json_lines)
        return
    hub.refuse_elsewhere(to, name, public, dry_run)
    exporting.run(
        run,
        to,
        out,
        model,
        {"base": base, "with_base": with_base, "quantize": quantize, "accept_loss": accept_loss},
        force=force,
        as_json=json_lines,
    )


@app.command("import-adapter")
@guarded
def import_adapter(
    adapter: Annotated[Path, typer.Argument(help="A LoRA adapter folder of mlx-lm or PEFT.")],
    model: Annotated[
        str | None, typer.Option("--model", metavar="M", help="Its base; what the adapter says by default.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run; runs/NAME by default.")] = None,
    quantize: Annotated[
        int | None, typer.Option("--quantize", metavar="BITS", help="Pack an unquantised base when it is loaded.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Set a run aside that is there already.")] = False,
    json_lines: Json = False,
    debug: Debug = False,
) -> None:
    """Make a run from an adapter that another tool trained."""
    from localdpo.console import exporting

    exporting.import_adapter(adapter, model, out, quantize, force=force, as_json=json_lines)


@app.command()
@guarded
def report(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="The page; report.html in RUN by default.")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    charts: ChartFolder = None,
    form: ChartForm = "svg",
    json_lines: Json = False,
    debug: Debug = False,
) -> None:
    """Write a run as one HTML page. It holds the verdict, curves, answers before and after, data, recipe, machine."""
    from localdpo.console import reporting

    reporting.run(run, reporting.Request(output, show, charts, form, json_lines))


@app.command("eval")
@guarded
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    pairs: Annotated[
        Path | None, typer.Option("--pairs", metavar="FILE", help="Score these pairs; those the run held out without.")
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option("--against", metavar="RUN", help="Compare with an earlier run of the same base; repeatable."),
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--tasks", metavar="NAME|FILE", help="A task, or all; may be repeated.")
    ] = None,
    fairness: Annotated[
        list[str] | None,
        typer.Option("--fairness", metavar="NAME|FILE", help="Prompts by group, or all; may be repeated."),
    ] = None,
    judge: Annotated[
        str | None, typer.Option("--judge", metavar="MODEL", help="A local model judges the run's answers, blind.")
    ] = None,
    drift: Annotated[bool, typer.Option("--drift/--no-drift", help="Ask both models what was not to change.")] = True,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, metavar="N", help="Prompts of each kind; 32 for drift without.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of intervals, rewordings and draws.")] = 0,
    json_lines: Json = False,
    debug: Debug = False,
) -> None:
    """Measure what a run changed and what it did not: into its eval.json, with a verdict."""
    from localdpo.console import evaluating

    evaluating.run(
        evaluating.Request(
            run,
            pairs,
            against or (),
            tasks or (),
            fairness or (),
            drift=drift,
            limit=limit,
            judge=judge,
            seed=seed,
            json=json_lines,
        )
    )


@app.command()
@guarded
def blind(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    other: Annotated[
        Path | None, typer.Argument(metavar="[OTHER]", help="Another run of the same base; the base itself without.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="JSONL prompts; held-out ones without.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="Judge N more at most.")] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="Only write the result so far, as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Judge two models without knowing which is which: 1, 2, t (tie), s (skip), u (undo), q (leave)."""
    from localdpo.console import judging

    judging.run(run, other, prompts, limit=limit, as_json=json_lines)


@app.command()
@guarded
def doctor(
    folder: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="A run or a workspace; this machine by default.")
    ] = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="Clear away what interrupted writes left in FOLDER; nothing you made.")
    ] = False,
    json_lines: Json = False,
    debug: Debug = False,
) -> None:
    """Look at this machine, a run or a workspace, and say what is wrong and how to mend it."""
    from localdpo.console import doctor as console

    code = console.run(folder, as_json=json_lines, fix=fix)
    if code:
        raise typer.Exit(code)


def main() -> None:
    """Run the command line."""
    from localdpo.console.terminal import quieten_libraries, say, tolerate_narrow_encodings

    tolerate_narrow_encodings()
    quieten_libraries()
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "show"):  # what Typer's errors of usage have, whichever class they are this year
            raise
        shown = io.StringIO()
        error.show(file=shown)
        say(shown.getvalue().rstrip("\n"), file=sys.stderr)
        code = getattr(error, "exit_code", 2)
    sys.exit(code)
