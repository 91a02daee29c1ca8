"""`localdpo pairs`: check, import, export and make preference pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from localdpo.commands.shared import Debug, Json, Overrides, guarded

app = typer.Typer(
    help="Check, import, export and generate preference pairs.",
    rich_markup_mode=None,
    no_args_is_help=True,
)

Rewards = Annotated[
    list[str] | None,
    typer.Option("--reward", metavar="NAME:KEY=VALUE", help="Such as length:max=40;weight=2; may be repeated."),
]
RewardsFile = Annotated[Path | None, typer.Option("--rewards", metavar="FILE", help="Rewards as YAML.")]
AllowCode = Annotated[bool, typer.Option("--allow-code", help="Let the reward `python` run your code.")]
MinGap = Annotated[float, typer.Option(min=0, help="Least difference of rewards.")]
Unfinished = Annotated[str, typer.Option(help="What an answer cut off may be: rejected, keep or leave-out.")]
Judge = Annotated[str | None, typer.Option(metavar="MODEL", help="A model that names the better answer.")]
Criterion = Annotated[str | None, typer.Option(metavar="TEXT", help="What the judge goes by.")]
Replace = Annotated[
    list[str] | None,
    typer.Option("--replace", metavar="OLD=NEW", help="Correct the model's answers so; may be repeated."),
]
Rewrite = Annotated[str | None, typer.Option(metavar="MODEL", help="A stronger model rewrites the answers.")]
Instruction = Annotated[str | None, typer.Option(metavar="TEXT", help="What the rewriter is told.")]
Samples = Annotated[int, typer.Option("--samples", "-n", min=1, help="Answers to each prompt.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Sample from the likeliest tokens only.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest answer.")]
PairsFile = Annotated[
    Path | None, typer.Argument(metavar="[FILE]", help="JSONL pairs; with --recipe its training file by default.")
]


@app.command("check")
@guarded
def pairs_check(
    file: PairsFile = None,
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


@app.command("stats")
@guarded
def pairs_stats(
    file: PairsFile = None,
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


@app.command("import")
@guarded
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


@app.command("export")
@guarded
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


@app.command("generate")
@guarded
def pairs_generate(
    prompts: Annotated[Path, typer.Argument(metavar="PROMPTS", help="JSONL with `prompt`, and what rewards need.")],
    out: Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="Where the pairs go; - is standard output.")],
    run: Annotated[Path | None, typer.Option("--run", metavar="RUN", help="A run or adapter folder.")] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="M", help="The model; see `localdpo models`.")] = None,
    who: Annotated[
        list[str] | None,
        typer.Option("--from", metavar="WHO", help="base, tuned or another model; may be repeated."),
    ] = None,
    rewards: Rewards = None,
    rewards_file: RewardsFile = None,
    allow_code: AllowCode = False,
    min_gap: MinGap = 0.0,
    unfinished: Unfinished = "rejected",
    judge: Judge = None,
    criterion: Criterion = None,
    replace: Replace = None,
    regex: Annotated[bool, typer.Option("--regex", help="OLD is a regular expression.")] = False,
    edits: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Correct the answers by hand in this file.")
    ] = None,
    rewrite: Rewrite = None,
    instruction: Instruction = None,
    samples: Samples = 4,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from so many tokens; 0 from all.")] = 0,
    min_p: Annotated[float, typer.Option(min=0, max=1, help="Least share of the likeliest token's probability.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(min=0.01, help="Above 1 discourages repetition.")] = 1.0,
    max_tokens: MaxTokens = 256,
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


@app.command("round")
@guarded
def pairs_round(
    recipe: Annotated[Path, typer.Argument(help="The recipe of each round's training.")],
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="How many; finished ones are passed over.")] = 1,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSONL prompts; those of the recipe's pairs by default.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="runs/RECIPE-rounds by default.")
    ] = None,
    overrides: Overrides = None,
    rewards: Rewards = None,
    rewards_file: RewardsFile = None,
    allow_code: AllowCode = False,
    min_gap: MinGap = 0.0,
    unfinished: Unfinished = "rejected",
    judge: Judge = None,
    criterion: Criterion = None,
    replace: Replace = None,
    rewrite: Rewrite = None,
    instruction: Instruction = None,
    samples: Samples = 4,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    max_tokens: MaxTokens = 256,
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
