"""`localdpo eval`: all that can be measured of a finished run, one section after the other, into its eval.json.

The model is loaded once; the base is the same model with its adapters off. A section that has nothing to measure on is
left empty and the verdict says what it could not judge. Leaving half way, by closing the generator, writes nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from localdpo import __version__
from localdpo.core.score import Scorer
from localdpo.data.pairs import PreferencePair, PromptRow, read_pairs, read_prompts
from localdpo.data.split import overlap
from localdpo.dpo.scorer import make_scorer
from localdpo.errors import InputError, Problem
from localdpo.evaluate.blind import BlindTest, blind_tests
from localdpo.evaluate.drift import Drift, DriftOptions, PromptSet, measure_drift
from localdpo.evaluate.evidence import EVAL_FILE, FORMAT, evidence_of_evaluation
from localdpo.evaluate.fairness import FairnessResult, run_fairness
from localdpo.evaluate.heldout import PairScores, compare, figures, held_out_pairs, recipe_of, score_pairs
from localdpo.evaluate.taskfile import read_task, shipped_tasks
from localdpo.evaluate.tasks import TaskResult, run_tasks
from localdpo.evaluate.templates import read_fairness, shipped_fairness
from localdpo.evaluate.verdict import Verdict, judge
from localdpo.files import write_json
from localdpo.model.load import LoadedModel, load_model
from localdpo.model.lora import load_adapter
from localdpo.paths import cache_dir, recipes_dir
from localdpo.recipe import Recipe
from localdpo.train.events import Event, ProgressEvent
from localdpo.train.inputs import EVERYDAY, read_inputs
from localdpo.train.run import ACTIVE_STATES, RunFolder
from localdpo.train.session import staged
from localdpo.train.snapshot import copies

__all__ = ["EvalOptions", "Evaluation", "blind_results", "evaluate"]


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """What to measure, beside the held-out pairs.

    ``pairs_file`` stands in for the pairs the run held out. ``tasks`` and ``fairness`` are names of shipped ones or
    files ("all" takes every shipped one). ``against`` are runs of the same base. ``limit`` bounds the prompts of each
    drift set and the examples of each task.
    """

    pairs_file: Path | None = None
    against: Sequence[Path] = ()
    drift: bool = True
    limit: int | None = None
    tasks: Sequence[str] = ()
    fairness: Sequence[str] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The sections of eval.json. ``unread`` says why a section that was wanted is missing."""

    run: str
    step: int
    model: str
    verdict: Verdict
    created: float
    pairs_file: str | None = None
    held_out: dict[str, Any] | None = None
    drift: dict[str, Any] | None = None
    tasks: list[dict[str, Any]] = field(default_factory=list)
    fairness: list[dict[str, Any]] = field(default_factory=list)
    blind: list[dict[str, Any]] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; docs/eval.md says what each is."""
        names = ("run", "step", "model", "created", "pairs_file", "held_out", "drift", "tasks", "fairness", "blind")
        return {
            "format": FORMAT,
            "localdpo": __version__,
            **{name: getattr(self, name) for name in names},
            "verdict": self.verdict.to_json(),
            "notes": self.unread,
        }


def evaluate(run: RunFolder, options: EvalOptions | None = None) -> Generator[Event, None, Evaluation]:
    """Measure the published adapter of ``run`` and write its eval.json; yields progress, returns the evaluation.

    Raises InputError for what is no finished run, or an option that names nothing usable (all are read before a model
    is loaded), and what loading a model raises.
    """
    options = options or EvalOptions()
    recipe = recipe_of(run)
    step = _step_of(run)
    notes: list[str] = []
    pairs = _pairs(run, recipe, options, notes)
    others = [(path, _other(path, recipe)) for path in options.against]
    if others and not pairs:
        raise InputError(Problem("--against", "there are no pairs to compare on", "Name some with --pairs"))
    sets, trained = _prompt_sets(run, recipe, pairs) if options.drift else ([], [])
    tasks, fairness = _suites(options)
    yield ProgressEvent(stage="load", detail=recipe.model)
    loaded = load_model(recipe.model, quantize=recipe.quantize, memory=recipe.train.memory)
    load_adapter(run.adapter, loaded)
    held_out = None
    if pairs:
        held_out = yield from _held_out(loaded, recipe, pairs, run, others, options)
    scorer = _scorer(loaded)
    drift: Drift | None = None
    if sets:
        drift_options = DriftOptions(max_length=recipe.data.max_length, seed=options.seed)
        if options.limit is not None:
            drift_options = DriftOptions(
                options.limit, min(options.limit, drift_options.reword), max_length=recipe.data.max_length,
                seed=options.seed,
            )  # fmt: skip
        drift = yield from measure_drift(loaded, scorer, sets, trained, drift_options)
    drifted = drift.to_json() if drift is not None else None
    task_results, fairness_results = yield from _asked_for(loaded, tasks, fairness, options)
    found = Evaluation(
        run=run.path.resolve().name,
        step=step,
        model=recipe.model,
        verdict=judge(evidence_of_evaluation(held_out, drifted)),
        created=round(time.time(), 3),
        pairs_file=os.path.abspath(options.pairs_file) if options.pairs_file is not None else None,
        held_out=held_out,
        drift=drifted,
        tasks=task_results,
        fairness=fairness_results,
        blind=blind_results(run),
        unread=notes,
    )
    write_json(run.path / EVAL_FILE, found.to_json())
    return found


def _step_of(run: RunFolder) -> int:
    """The step of the published adapter. Raises InputError while a trainer may replace it."""
    status = run.status()
    if status is not None and status.state in ACTIVE_STATES:
        raise InputError(Problem(str(run.path), f"this run is {status.state}", "Let it end, or stop it, first"))
    return status.adapter_step or 0 if status is not None else 0


def _pairs(run: RunFolder, recipe: Recipe, options: EvalOptions, notes: list[str]) -> Sequence[PreferencePair]:
    if options.pairs_file is not None:
        return held_out_pairs(run, recipe, options.pairs_file)
    try:
        return held_out_pairs(run, recipe)
    except InputError as error:
        # A run without held-out pairs still has answers to compare.
        notes.append(error.problems[0].message)
        return []


def _other(path: Path, recipe: Recipe) -> RunFolder:
    """An earlier run to compare with. Raises InputError unless it has an adapter of the same base."""
    run = RunFolder(path)
    theirs = recipe_of(run)
    if (theirs.model, theirs.quantize) != (recipe.model, recipe.quantize):
        message = f"was trained on {theirs.model}, not on {recipe.model}"
        raise InputError(Problem(str(path), message, "Compare runs of one base"))
    return run


def _prompt_sets(
    run: RunFolder, recipe: Recipe, held_out: Sequence[PreferencePair]
) -> tuple[list[PromptSet], Sequence[PreferencePair]]:
    """What to ask for drift, and the pairs trained on; a run without retain prompts is asked the everyday ones."""
    trained = _trained(run, recipe)
    retain, source = _retained(run), "retain"
    if not retain:
        everyday = read_prompts(recipes_dir() / EVERYDAY)
        taught = {id(row) for row in overlap(chain(trained, held_out), everyday)}
        retain, source = [row for row in everyday if id(row) not in taught], "everyday"
    sets = [PromptSet("retain", retain, source), PromptSet("probes", _probes(run, recipe), "probes")]
    return [part for part in sets if part.rows], trained


def _trained(run: RunFolder, recipe: Recipe) -> Sequence[PreferencePair]:
    if not run.pairs_file.is_file():
        return []  # imported
    data = recipe.data.model_copy(update={"retain": None, "probes": None})
    return read_inputs(recipe.model_copy(update={"data": data}), copies(run)).train


def _retained(run: RunFolder) -> list[PromptRow]:
    if not run.retain_file.is_file():
        return []
    pairs = read_pairs(run.retain_file).pairs
    return [PromptRow(pair.prompt, tags=pair.tags, line=pair.line, source=pair.source) for pair in pairs]


def _probes(run: RunFolder, recipe: Recipe) -> list[PromptRow]:
    """The recipe's probes where their file is still there, else those whose answers the run kept."""
    if recipe.data.probes is not None and recipe.data.probes.is_file():
        return read_prompts(recipe.data.probes)
    return [
        PromptRow(tuple(dict(turn) for turn in sample.prompt), tuple(sample.accept), tuple(sample.tags))  # type: ignore[misc]
        for sample in run.samples()
    ]


def _scorer(loaded: LoadedModel) -> Scorer:
    scorer = make_scorer(loaded.model)
    scorer.use_trunk(cache_dir() / "trunk", loaded.fingerprint)
    return scorer


def _held_out(
    loaded: LoadedModel,
    recipe: Recipe,
    pairs: Sequence[PreferencePair],
    run: RunFolder,
    others: Sequence[tuple[Path, RunFolder]],
    options: EvalOptions,
) -> Generator[Event, None, dict[str, Any]]:
    """The section; afterwards the run's own adapter is on again."""
    scores: PairScores = yield from staged("evaluate", score_pairs(loaded, _scorer(loaded), recipe, pairs))
    found = figures(scores, options.seed)
    found["against"] = []
    for path, other in others:
        load_adapter(other.adapter, loaded)
        theirs = yield from staged("evaluate", score_pairs(loaded, _scorer(loaded), recipe, pairs))
        found["against"].append({"run": path.resolve().name, **compare(scores, theirs, options.seed)})
    if others:
        load_adapter(run.adapter, loaded)
    return found


def _suites(options: EvalOptions) -> tuple[list[str], list[str]]:
    """The tasks and fairness sets that were asked for, each read once. Raises InputError for one that is not sound."""
    tasks, fairness = _named(options.tasks, shipped_tasks()), _named(options.fairness, shipped_fairness())
    for name in tasks:
        read_task(name)
    for name in fairness:
        read_fairness(name)
    return tasks, fairness


def _asked_for(
    loaded: LoadedModel, tasks: Sequence[str], fairness: Sequence[str], options: EvalOptions
) -> Generator[Event, None, tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """What came of tasks and fairness, where they are wanted."""
    answered: list[TaskResult] = []
    measured: list[FairnessResult] = []
    if tasks:
        answered = yield from run_tasks(loaded, tasks, limit=options.limit, seed=options.seed)
    if fairness:
        measured = yield from run_fairness(loaded, fairness, limit=options.limit, seed=options.seed)
    return [result.to_json() for result in answered], [result.to_json() for result in measured]


def _named(wanted: Sequence[str], shipped: Sequence[str]) -> list[str]:
    """What was asked for, "all" taken apart, each once."""
    return list(dict.fromkeys(name for asked in wanted for name in (shipped if asked == "all" else [asked])))


def blind_results(run: RunFolder) -> list[dict[str, Any]]:
    """The win rates of the run's blind tests that have a verdict: side b against side a, by whom they were judged."""
    return [_blind_row(test) for test in blind_tests(run.path) if test.win_rate().judged]


def _blind_row(test: BlindTest) -> dict[str, Any]:
    rate = test.win_rate()
    low, high = rate.interval
    about: Mapping[str, Any] = test.about
    judge_name = about.get("judge")
    return {
        "a": test.sides[0],
        "b": test.sides[1],
        "wins": rate.wins,
        "losses": rate.losses,
        "ties": rate.ties,
        "rate": {"value": rate.rate, "low": low, "high": high},
        "judge": judge_name if isinstance(judge_name, str) and judge_name else "human",
    }
