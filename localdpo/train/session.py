"""From a recipe to a model that can take its first step: loading, encoding, retain answers, reference.

Everything slow is a generator of ``ProgressEvent``, so that whoever watches sees how far it is, and
may leave between any two. This module knows how a run is set up, and nothing of how it goes.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import mlx.core as mx
import numpy as np

from localdpo.core.reference import ReferenceCache
from localdpo.core.score import Scorer
from localdpo.data.encode import encode_pairs, encoded_shelf
from localdpo.data.order import Position, RowOrder
from localdpo.data.pairs import PromptRow, pair_to_json, read_pairs
from localdpo.data.shelf import Shelf
from localdpo.dpo.scorer import make_scorer
from localdpo.errors import InputError, Problem
from localdpo.files import atomic_write, require_space
from localdpo.methods.base import Method, method_of
from localdpo.model.load import LoadedModel, load_model
from localdpo.model.lora import LoraInfo, LoraSettings, attach_lora, load_adapter, lora_scale
from localdpo.paths import cache_dir
from localdpo.recipe import Recipe
from localdpo.sequences import EncodedRow, Ids, RowValues, sequences_of
from localdpo.steps import Steps, result_of
from localdpo.train.alarms import Alarms
from localdpo.train.checkpoint import Checkpoint, TrainState, load_latest, restore_rng, rng_state
from localdpo.train.events import Event, ProgressEvent, StartEvent, WarningEvent
from localdpo.train.inputs import Inputs
from localdpo.train.monitor import EpochLoss
from localdpo.train.optimizer import AdapterOptimizer
from localdpo.train.plan import Plan, make_plan, require_memory, require_memory_to_load, rows_per_step, total_steps
from localdpo.train.retain import (
    RETAIN_TOKENS,
    base_answers,
    encode_prompts,
    retain_pairs,
)
from localdpo.train.run import ActiveRun
from localdpo.train.start import Start, reference_of, start_from

CHUNK = 32
"""Rows scored, or prompts answered, between two signs of life."""

T = TypeVar("T")
Stage = Generator[Event, None, T]


def staged(stage: str, work: Generator[tuple[int, int], None, T], step: int = 0) -> Stage[T]:
    """Turn (done, total) counts into progress events of ``stage``; returns what ``work`` returns."""
    steps = Steps(work)
    for done, total in steps:
        fraction = done / total if total else 1.0
        yield ProgressEvent(step=step, stage=stage, done=done, total=total, fraction=fraction)
    return steps.result


@dataclass
class Setup:
    """A model with a fresh adapter, its data encoded, and the plan: what the preflight needs."""

    recipe: Recipe
    inputs: Inputs
    loaded: LoadedModel
    info: LoraInfo
    train: Shelf[EncodedRow]
    held_out: Shelf[EncodedRow]
    retain_rows: list[PromptRow]
    retain_prompts: list[Ids]
    plan: Plan
    start: Start | None = None


@dataclass
class Session:
    """Everything the loop works with. ``train`` are the rows taught and those retained; ``state`` moves on."""

    setup: Setup
    run: ActiveRun
    scorer: Scorer
    method: Method
    optimizer: AdapterOptimizer
    order: RowOrder
    train: Sequence[EncodedRow]
    reference: RowValues | None
    held_out_reference: np.ndarray | None
    alarms: Alarms
    epoch_loss: EpochLoss
    state: TrainState

    @property
    def recipe(self) -> Recipe:
        """The recipe of the run."""
        return self.setup.recipe

    @property
    def starts_at_reference(self) -> bool:
        """Whether the model before the first step is the reference."""
        return self.setup.start is None or self.recipe.dpo.reference == "init"

    @property
    def loaded(self) -> LoadedModel:
        """The model, with the adapter attached."""
        return self.setup.loaded


def watched(session: Session, work: Stage[T]) -> Stage[T]:
    """Pass on the events of ``work``, each followed by the alarms it sets off; returns what ``work`` returns.

    An alarm about sample answers comes before the event that shows that they are complete.
    """
    steps = Steps(work)
    for event in steps:
        yield from session.alarms.settle(event)
        yield event
        session.epoch_loss.see(event)
        yield from session.alarms.see(event)
    return steps.result


def scored_rows(scorer: Scorer, rows: Sequence[EncodedRow]) -> Generator[tuple[int, int], None, np.ndarray]:
    """Log-probs of the rows' sequences under the model as it stands, float32 [S]; yields (done, wanted) rows."""
    parts = []
    for start in range(0, len(rows), CHUNK):
        yield start, len(rows)
        parts.append(scorer.logps(sequences_of(rows[start : start + CHUNK])))
    return np.concatenate(parts)


def set_up(recipe: Recipe, inputs: Inputs) -> Stage[Setup]:
    """Load and encode; returns what the preflight is made from. Raises InputError and EnvironmentFault."""
    yield ProgressEvent(stage="load", detail=recipe.model)
    require_memory_to_load(recipe)
    loaded = load_model(recipe.model, quantize=recipe.quantize, memory=recipe.train.memory)
    info = attach_lora(loaded.model, _lora_settings(recipe))
    start = start_from(recipe, loaded, info)
    yield ProgressEvent(stage="encode", total=len(inputs.train) + len(inputs.held_out))
    data = recipe.data
    train, held_out = encoded_shelf(), encoded_shelf()
    encodings = [
        encode_pairs(pairs, loaded.tokenizer, data.max_length, data.truncation, into=shelf)
        for pairs, shelf in ((inputs.train, train), (inputs.held_out, held_out))
    ]
    retain_rows, retain_prompts, retain_skipped = encode_prompts(inputs.retain, loaded, data.max_length)
    plan = make_plan(
        recipe,
        loaded,
        info,
        train,
        held_out=len(held_out),
        retain_tokens=_expected_retained(train, retain_prompts, data.max_length),
        probes=len(inputs.probes),
        truncated=sum(encoding.truncated for encoding in encodings),
        skipped=[*inputs.skipped, *(row for encoding in encodings for row in encoding.skipped), *retain_skipped],
        warnings=[*inputs.warnings, *_distinct([note for encoding in encodings for note in encoding.warnings])],
    )
    done = len(train) + len(held_out)
    yield ProgressEvent(stage="encode", done=done, total=done, fraction=1.0)
    return Setup(recipe, inputs, loaded, info, train, held_out, retain_rows, retain_prompts, plan, start)


def preflight(recipe: Recipe, inputs: Inputs) -> Plan:
    """What ``train(recipe)`` would do. Loads the model, writes no run folder. Raises like :func:`set_up`."""
    return result_of(set_up(recipe, inputs)).plan


def begin(setup: Setup, run: ActiveRun, *, resume: bool) -> Stage[Session]:
    """Answers to retain, the reference, and the state to go on from; yields the start event among them.

    Raises InputError for a run that has no whole checkpoint left, or whose model has changed, and
    EnvironmentFault for too little memory or disk.
    """
    recipe, loaded, plan = setup.recipe, setup.loaded, setup.plan
    run.bind_model(recipe.model, loaded.fingerprint)
    require_memory(plan)
    require_space(run.path, _bytes_to_save(setup))
    restored, notes = _restore(setup, run) if resume else (None, [])
    yield StartEvent(
        step=restored.state.step if restored else 0,
        run=str(run.path.absolute()),
        total_steps=plan.total_steps,
        steps_per_epoch=plan.steps_per_epoch,
        resumed=resume,
        plan=plan.to_json(),
    )
    yield from notes
    train = setup.train.copy()
    train.extend((yield from _retained(setup, run, resume)))
    method = method_of(recipe)
    scorer = yield from _scorer(setup)
    reference: RowValues | None = None
    held_out_reference: np.ndarray | None = None
    if method.needs_reference:
        judge, fingerprint = reference_of(recipe, setup.start, scorer, loaded)
        cache = ReferenceCache(cache_dir() / "reference", fingerprint, loaded.device)
        scored = train.copy()
        scored.extend(setup.held_out)
        both = yield from staged("reference", cache.fill(judge, scored))
        _require_finite_reference(both, scored)
        reference = RowValues.of(both, scored)
        held_out_reference = both[reference.starts[len(train)] :]
    order = RowOrder(len(train), rows_per_step(recipe.train), seed=recipe.seed, strata=[pair.kind for pair in train])
    session = Session(
        setup,
        run,
        scorer,
        method,
        AdapterOptimizer(loaded.model, recipe.train),
        order,
        train,
        reference,
        held_out_reference,
        Alarms.of(recipe, order.steps_per_epoch, (pair.chosen for pair in setup.inputs.train)),
        EpochLoss(order.steps_per_epoch),
        _first_state(recipe, order),
    )
    if restored is not None:
        _go_on(session, restored)
    return session


def _require_finite_reference(logps: np.ndarray, rows: Sequence[EncodedRow]) -> None:
    """Raise InputError where the model cannot score a row before anything is trained."""
    if np.isfinite(logps).all():
        return
    values = RowValues.of(logps, rows)
    bad = [row for number, row in enumerate(rows) if not np.isfinite(values.take([number])).all()]
    named = ", ".join(f"{row.source}:{row.line}" for row in bad[:3]) + (" …" if len(bad) > 3 else "")
    raise InputError(
        Problem(
            "the model",
            f"gives no finite log-prob for {len(bad):,} of {len(rows):,} rows before training ({named})",
            "Its weights do not fit its configuration, or overflow: take another version of the model",
        )
    )


def _first_state(recipe: Recipe, order: RowOrder) -> TrainState:
    mx.random.seed(recipe.seed)
    return TrainState(0, Position(), total_steps(recipe.train, order.steps_per_epoch), rng_state())


def _go_on(session: Session, restored: Checkpoint) -> None:
    """Put the session where the checkpoint was taken; the adapter is on the model already."""
    for event in session.run.every_event():
        session.alarms.replay([event])
        session.epoch_loss.see(event)
    session.optimizer.restore(restored.optimizer)
    restore_rng(restored.state.rng)
    session.state = replace(restored.state, total_steps=session.state.total_steps)


def _scorer(setup: Setup) -> Stage[Scorer]:
    model = setup.loaded.model
    scorer = make_scorer(model, gradient_checkpointing=setup.plan.gradient_checkpointing)
    scorer.use_trunk(cache_dir() / "trunk", setup.loaded.fingerprint)
    if scorer.path == "plain":
        message = f"Every prompt is run twice, once for each answer: {scorer.path_reason}."
        yield WarningEvent(code="plain-path", message=message)
    model.train()
    return scorer


def _bytes_to_save(setup: Setup) -> int:
    """Checkpoints at once on disk (kept ones, the best, the one being written) and the published adapter."""
    adapter = 4 * setup.info.trainable
    kept = setup.recipe.train.save_total_limit or 2
    return (kept + 2) * 3 * adapter + adapter


def _restore(setup: Setup, run: ActiveRun) -> tuple[Checkpoint | None, list[WarningEvent]]:
    """The newest whole checkpoint with its adapter on the model and the metrics cut back to it."""
    restored, damaged = load_latest(run.checkpoints)
    step = restored.state.step if restored else 0
    notes = [
        WarningEvent(step=step, code="checkpoint-damaged", where=problem.where, message=problem.message)
        for problem in damaged
    ]
    run.samples_file.unlink(missing_ok=True)
    if restored is None:
        run.cut_metrics(0)
        message = "There is no checkpoint yet: the run starts from its beginning."
        return None, [WarningEvent(code="no-checkpoint", message=message)]
    load_adapter(restored.adapter, setup.loaded)
    if not run.cut_metrics(restored.state.metrics_bytes):
        message = "metrics.jsonl is shorter than at the checkpoint: earlier metrics are lost."
        notes.append(WarningEvent(step=step, code="metrics-short", message=message))
    if restored.state.total_steps != setup.plan.total_steps:
        notes.append(
            WarningEvent(
                step=step,
                code="longer",
                message=f"The run now has {setup.plan.total_steps} steps and had {restored.state.total_steps}: "
                "the learning rate follows the schedule of the new length from here on.",
            )
        )
    return restored, notes


def _probes(setup: Setup) -> list[Ids]:
    return encode_prompts(setup.inputs.probes, setup.loaded, setup.recipe.data.max_length)[1]


def _lora_settings(recipe: Recipe) -> LoraSettings:
    lora = recipe.lora
    return LoraSettings(
        rank=lora.r,
        scale=lora_scale(lora.alpha, lora.r, lora.use_rslora),
        dropout=lora.dropout,
        target_modules=lora.target_modules,
        num_layers=None if lora.num_layers == "all" else lora.num_layers,
        seed=recipe.seed,
    )


def _distinct(problems: Sequence[Problem]) -> list[Problem]:
    return list(dict.fromkeys(problems))


def _expected_retained(train: Sequence[EncodedRow], prompts: Sequence[Ids], max_length: int) -> list[int]:
    """Tokens of each retain row before its answers are known: the base's, and one that is taught."""
    if not prompts:
        return []
    taught = sum(len(pair.chosen_ids) for pair in train) // max(len(train), 1)
    return [len(prompt) + min(RETAIN_TOKENS // 2, max_length) + taught for prompt in prompts]


def _retained(setup: Setup, run: ActiveRun, resume: bool) -> Stage[list[EncodedRow]]:
    """The retain rows: those the run was started with, else made from the base's answers.

    The base answers the probes in the same batches: the more rows share a read of the weights, the less each costs.
    """
    if not setup.retain_rows:
        return []
    if resume and run.retain_file.is_file():
        pairs = read_pairs(run.retain_file).pairs
    else:
        answers = yield from staged(
            "retain",
            base_answers(
                setup.loaded, [*setup.retain_prompts, *_probes(setup)], RETAIN_TOKENS, cache_dir() / "answers"
            ),
        )
        answers = answers[: len(setup.retain_prompts)]
        pairs = retain_pairs(
            setup.retain_rows,
            answers,
            setup.inputs.train,
            setup.loaded,
            seed=setup.recipe.seed,
            weight=setup.recipe.data.retain_weight,
        )
        if len(pairs) < len(answers):
            yield WarningEvent(
                code="retain-empty",
                message=f"The base has no answer of its own to {len(answers) - len(pairs)} of {len(answers)} "
                "retain prompts: they are left out.",
            )
        if not pairs:
            return []
        rows = (json.dumps(pair_to_json(pair), ensure_ascii=False) for pair in pairs)
        atomic_write(run.retain_file, "".join(f"{row}\n" for row in rows))
    # What does not fit is cut at its end, whatever the policy for pairs: part of an answer is kept as well.
    encoded = encode_pairs(pairs, setup.loaded.tokenizer, setup.recipe.data.max_length, "keep_start")
    return [replace(pair, row=len(setup.inputs.train) + pair.row) for pair in encoded.pairs]
