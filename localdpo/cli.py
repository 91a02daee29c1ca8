"""The `localdpo` command: arguments in, exit code out.

Every command imports what it needs when it runs, so that `--help` loads neither mlx nor anything else that is
slow. What is shown is in `localdpo.console`.
"""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer
from typer.core import TyperGroup

P = ParamSpec("P")


class _ListsByDefault(TyperGroup):
    """A group whose command `list` is meant where none is named: a folder is no command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `list` before arguments that do not begin with a command."""
        named = bool(args) and (args[0] in self.commands or args[0] == "--help")
        return list(super().parse_args(ctx, args if named else ["list", *args]))


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
pairs_app = typer.Typer(
    help="Check, import, export and generate preference pairs.",
    rich_markup_mode=None,
    no_args_is_help=True,
)
app.add_typer(pairs_app, name="pairs")

runs_app = typer.Typer(
    help="List runs, or compare two: `localdpo runs [DIR]` lists.",
    rich_markup_mode=None,
    cls=_ListsByDefault,
)
app.add_typer(runs_app, name="runs")

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Write JSON for programs.")]
ChartFolder = Annotated[
    Path | None, typer.Option("--charts", metavar="DIR", help="Write the charts as files of their own, too.")
]
ChartForm = Annotated[str, typer.Option("--format", metavar="svg|png", help="Of these files; png needs an extra.")]


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
    if context.invoked_subcommand is not None:
        return
    from localdpo.console import ui

    if ui.can_open():
        _guarded(ui.open_ui)(Path())
    else:
        typer.echo(context.get_help())


@app.command()
@_guarded
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
@_guarded
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
@_guarded
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
@_guarded
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
@_guarded
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
@_guarded
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


@runs_app.command("list")
@_guarded
def runs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that holds the runs.")] = Path("runs"),
    json_lines: Json = False,
    debug: Debug = False,
) -> None:
    """List the runs in a folder. This is what `localdpo runs [DIR]` does."""
    from localdpo.console import listing

    listing.show_runs(folder, json_lines)


@runs_app.command("compare")
@_guarded
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


@app.command()
@_guarded
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


@pairs_app.command("check")
@_guarded
def pairs_check(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="JSONL pairs; with --recipe its training file by default.")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", metavar="RECIPE", help="Take eval file, probes, lengths and model from a recipe."),
    ] = None,
    eval_file: Annotated[
        Path | None, typer.Option("--eval", metavar="FILE", help="Pairs held out, whose prompts must not be in FILE.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="M", help="Count with its tokenizer, and measure how far pairs are from it."),
    ] = None,
    expect: Annotated[
        list[str] | None,
        typer.Option("--expect", metavar="WORD", help="A word that the pairs are to teach; may be repeated."),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=8, metavar="N", help="Tokens; the recipe's, or 1024, by default.")
    ] = None,
    fix: Annotated[bool, typer.Option("--fix", help="Put right what is safe; a copy of the file is kept.")] = False,
    json_lines: Annotated[bool, typer.Option("--json", help="Write the findings as a JSON list.")] = False,
    debug: Debug = False,
) -> None:
    """Find what would spoil training: exit code 0 for none or notes, 1 for warnings, 2 for errors."""
    from localdpo.console import pairs_check as console

    request = console.Request(file, recipe, eval_file, model, tuple(expect or ()), max_length, fix, json_lines)
    if code := console.run(request):
        raise typer.Exit(code)


@pairs_app.command("stats")
@_guarded
def pairs_stats(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="JSONL pairs; with --recipe its training file by default.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="RECIPE", help="Take the file and the model from a recipe.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="M", help="Count with its tokenizer; estimated otherwise.")
    ] = None,
    json_lines: Json = False,
    debug: Debug = False,
) -> None:
    """Show how many pairs there are, how long, with which tags."""
    from localdpo.console import pairs_stats as console

    console.run(file, recipe, model, json_lines)


@pairs_app.command("import")
@_guarded
def pairs_import(
    source: Annotated[str, typer.Argument(metavar="FILE", help="JSONL, JSON, CSV or Parquet; - is standard input.")],
    out: Annotated[
        str | None, typer.Option("--out", "-o", metavar="FILE", help="Where; FILE.pairs.jsonl by default, - is stdout.")
    ] = None,
    file_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help="trl, openai, sharegpt, alpaca, hh-rlhf, ultrafeedback, argilla or columns; guessed by default.",
        ),
    ] = None,
    mapping: Annotated[
        list[str] | None,
        typer.Option(
            "--map", metavar="TARGET=COLUMN", help="Such as chosen=good or chosen=answers.0.text; repeatable."
        ),
    ] = None,
    encoding: Annotated[str | None, typer.Option(metavar="NAME", help="Of a CSV file; UTF-8 by default.")] = None,
    prompts: Annotated[bool, typer.Option("--prompts", help="Import prompts, to generate answers to.")] = False,
    keep_apostrophes: Annotated[
        bool, typer.Option("--keep-apostrophes", help="Leave the ' that guards a formula sign in CSV cells.")
    ] = False,
    provenance: Annotated[bool, typer.Option(help="Note file and line with each pair.")] = True,
    rejects: Annotated[
        Path | None, typer.Option("--rejects", metavar="FILE", help="Write the rows left out, with reasons.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 2 when a row is left out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell the format and columns; import nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
    json_lines: Json = False,
    debug: Debug = False,
) -> None:
    """Import pairs from another tool's file."""
    from localdpo.console import pairs_import as console
    from localdpo.data.importing import ImportOptions

    options = ImportOptions(file_format, tuple(mapping or ()), encoding, prompts, keep_apostrophes, provenance)
    console.run_import(
        source, out, options, dry_run=dry_run, force=force, strict=strict, rejects=rejects, json_lines=json_lines
    )


@pairs_app.command("export")
@_guarded
def pairs_export(
    source: Annotated[str, typer.Argument(metavar="FILE", help="JSONL pairs.")],
    out: Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="Where; - is standard output.")],
    target: Annotated[
        str | None, typer.Option("--to", metavar="KIND", help="jsonl, csv or parquet; by the name of --out by default.")
    ] = None,
    form: Annotated[
        str, typer.Option(help="TRL's standard or conversational form; auto takes the plainest that holds all.")
    ] = "auto",
    bare: Annotated[bool, typer.Option("--bare", help="Prompt, chosen, rejected and tools only.")] = False,
    provenance: Annotated[bool, typer.Option(help="Keep where pairs come from.")] = True,
    bom: Annotated[bool, typer.Option("--bom", help="Begin CSV with a byte order mark, for Excel.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
    json_lines: Json = False,
    debug: Debug = False,
) -> None:
    """Export pairs to JSONL, CSV or Parquet."""
    from localdpo.console import pairs_import as console

    settings = {"form": form, "bare": bare, "provenance": provenance, "bom": bom}
    console.run_export(source, out, target, settings, force=force, json_lines=json_lines)


@pairs_app.command("generate")
@_guarded
def pairs_generate(
    prompts: Annotated[Path, typer.Argument(metavar="PROMPTS", help="JSONL with `prompt`, and what rewards need.")],
    out: Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="Where the pairs go; - is standard output.")],
    run: Annotated[Path | None, typer.Option("--run", metavar="RUN", help="A run or adapter folder.")] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="M", help="The model; see `localdpo models`.")] = None,
    who: Annotated[
        list[str] | None,
        typer.Option("--from", metavar="WHO", help="base, tuned or another model; may be repeated."),
    ] = None,
    rewards: Annotated[
        list[str] | None,
        typer.Option("--reward", metavar="NAME:KEY=VALUE", help="Such as length:max=40;weight=2; may be repeated."),
    ] = None,
    rewards_file: Annotated[Path | None, typer.Option("--rewards", metavar="FILE", help="Rewards as YAML.")] = None,
    allow_code: Annotated[bool, typer.Option("--allow-code", help="Let the reward `python` run your code.")] = False,
    min_gap: Annotated[float, typer.Option(min=0, help="Least difference of rewards.")] = 0.0,
    unfinished: Annotated[
        str, typer.Option(help="What an answer cut off may be: rejected, keep or leave-out.")
    ] = "rejected",
    judge: Annotated[str | None, typer.Option(metavar="MODEL", help="A model that names the better answer.")] = None,
    criterion: Annotated[str | None, typer.Option(metavar="TEXT", help="What the judge goes by.")] = None,
    replace: Annotated[
        list[str] | None,
        typer.Option("--replace", metavar="OLD=NEW", help="Correct the model's answers so; may be repeated."),
    ] = None,
    regex: Annotated[bool, typer.Option("--regex", help="OLD is a regular expression.")] = False,
    edits: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Correct the answers by hand in this file.")
    ] = None,
    rewrite: Annotated[str | None, typer.Option(metavar="MODEL", help="A stronger model rewrites the answers.")] = None,
    instruction: Annotated[str | None, typer.Option(metavar="TEXT", help="What the rewriter is told.")] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="Answers to each prompt.")] = 4,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from the likeliest tokens only.")] = 0.95,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from so many tokens; 0 from all.")] = 0,
    min_p: Annotated[float, typer.Option(min=0, max=1, help="Least share of the likeliest token's probability.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(min=0.01, help="Above 1 discourages repetition.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Of all sampling.")] = 0,
    answers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Journal of answers; beside --out by default.")
    ] = None,
    ties: Annotated[Path | None, typer.Option(metavar="FILE", help="Where a judge's ties go.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
    json_lines: Json = False,
    debug: Debug = False,
) -> None:
    """Make pairs of a model's own answers to PROMPTS. The same command goes on after an interruption."""
    from localdpo.console import pairs_generate as console

    sampling = {
        "temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "max_tokens": max_tokens,
    }  # fmt: skip
    method = console.MethodOptions(
        rewards or (), rewards_file, allow_code, min_gap, unfinished, judge, criterion, replace or (), regex, edits,
        rewrite, instruction,
    )  # fmt: skip
    console.run_generate(
        prompts, out, console.Speakers(run, model, who or ()), method, samples=samples, sampling=sampling, seed=seed,
        answers=answers, ties=ties, force=force, json_lines=json_lines,
    )  # fmt: skip


@pairs_app.command("round")
@_guarded
def pairs_round(
    recipe: Annotated[Path, typer.Argument(help="The recipe of each round's training.")],
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="How many; finished ones are passed over.")] = 1,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSONL prompts; those of the recipe's pairs by default.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="runs/RECIPE-rounds by default.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe; may be repeated."),
    ] = None,
    rewards: Annotated[
        list[str] | None,
        typer.Option("--reward", metavar="NAME:KEY=VALUE", help="Such as length:max=40;weight=2; may be repeated."),
    ] = None,
    rewards_file: Annotated[Path | None, typer.Option("--rewards", metavar="FILE", help="Rewards as YAML.")] = None,
    allow_code: Annotated[bool, typer.Option("--allow-code", help="Let the reward `python` run your code.")] = False,
    min_gap: Annotated[float, typer.Option(min=0, help="Least difference of rewards.")] = 0.0,
    unfinished: Annotated[
        str, typer.Option(help="What an answer cut off may be: rejected, keep or leave-out.")
    ] = "rejected",
    judge: Annotated[str | None, typer.Option(metavar="MODEL", help="A model that names the better answer.")] = None,
    criterion: Annotated[str | None, typer.Option(metavar="TEXT", help="What the judge goes by.")] = None,
    replace: Annotated[
        list[str] | None,
        typer.Option("--replace", metavar="OLD=NEW", help="Correct the model's answers so; may be repeated."),
    ] = None,
    rewrite: Annotated[str | None, typer.Option(metavar="MODEL", help="A stronger model rewrites the answers.")] = None,
    instruction: Annotated[str | None, typer.Option(metavar="TEXT", help="What the rewriter is told.")] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="Answers to each prompt.")] = 4,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from the likeliest tokens only.")] = 0.95,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Of the first round's sampling; one more in each.")] = 0,
    json_lines: Json = False,
    debug: Debug = False,
) -> None:
    """Generate pairs, train on them, and repeat. The recipe's dpo.reference says whether the reference moves."""
    from localdpo.console import pairs_round as console
    from localdpo.console.pairs_generate import MethodOptions

    method = MethodOptions(
        rewards or (), rewards_file, allow_code, min_gap, unfinished, judge, criterion, replace or (), False, None,
        rewrite, instruction,
    )  # fmt: skip
    code = console.run_round(
        recipe, overrides or (), prompts, out, method, rounds=rounds, samples=samples,
        sampling={"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}, seed=seed,
        json_lines=json_lines,
    )  # fmt: skip
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
