"""The training loop: a recipe in, events out.

It prints nothing and decides nothing about how a run is shown. What happens after training (the
probes) is handed in, because it is built on top of this layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import mlx.core as mx

from localdpo.errors import DivergedError
from localdpo.files import verify_folder
from localdpo.methods.base import held_out_figures
from localdpo.model.lora import load_adapter, save_adapter
from localdpo.recipe import Recipe
from localdpo.train.checkpoint import (
    ADAPTER,
    checkpoint_path,
    disk_faults,
    prune,
    rng_state,
    save_checkpoint,
)
from localdpo.train.events import (
    CheckpointEvent,
    EndEvent,
    EvalEvent,
    Event,
    ProgressEvent,
    StepEvent,
    WarningEvent,
)
from localdpo.train.fork import find_fork_point, forked_message, staged_start, with_start
from localdpo.train.inputs import Inputs, originals, read_inputs, starting_files
from localdpo.train.optimizer import global_norm, learning_rate_at, require_finite
from localdpo.train.plan import Plan
from localdpo.train.run import ActiveRun, Control, Request
from localdpo.train.session import Session, Stage, begin, preflight, scored_rows, set_up, staged, watched
from localdpo.train.snapshot import Opened, copies, open_again, open_new
from localdpo.train.trackers import Trackers, require_trackers

Figures = Mapping[str, Any]
Closing = Callable[[Session], Generator[Event, None, Figures]]
"""What to do with the tuned model before the run ends: yields events, returns the closing figures."""
Glimpse = Callable[[Session], Iterator[Event]]
"""What to show of the model between two epochs; it leaves the model and every random state as they were."""

_MESSAGES = {
    "finished": "All {total} steps are done; the adapter is that of step {adapter}.",
    "stop_loss": "The loss of an epoch fell below train.stop_loss at step {step} of {total}; the adapter is that "
    "of step {adapter}.",
    "early_stopping": "The held-out loss no longer improved at step {step} of {total}; the adapter is that of "
    "step {adapter}.",
    "alarm": "The alarm {alarm} of train.stop_on went off by step {step} of {total}; the adapter is that of step "
    "{adapter}.",
    "stopped": "Stopped at step {step} of {total}; the adapter is that of step {adapter}.",
}
_PREPARING = frozenset({"read", "load", "encode", "retain", "reference"})


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    fork: bool = False,
    control: Control | None = None,
    closing: Closing | None = None,
    glimpse: Glimpse | None = None,
) -> Iterator[Event]:
    """Train the adapter of ``recipe`` into its run folder, yielding an event for all that happens.

    The last event is an ``EndEvent``; its adapter folder is loadable by mlx-lm. ``control`` (or the
    run's control file) asks for a pause or a stop, which take effect after the step. ``glimpse`` is
    called after each epoch but the last, ``closing`` at the end. With
    ``resume`` a run goes on from its newest whole checkpoint to the bits it would have had without
    the interruption; with ``fork`` a new run takes over the adapter of the one in its folder (see
    ``train/fork``). Raises InputError, EnvironmentFault, and DivergedError after the end event.
    """
    started = time.monotonic()
    control = control or Control()
    yield ProgressEvent(stage="read", detail=str(recipe.data.train))
    if resume and fork:
        raise ValueError("a run is either resumed or forked")
    require_trackers(recipe.train.report_to)
    how: Literal["new", "resume", "fork"] = "resume" if resume else "fork" if fork else "new"
    opened, work = _open(recipe, how, closing, glimpse, control, started)
    with opened.run as run, Trackers(recipe, run) as trackers:
        try:
            for event in trackers.reported(work):
                run.log(event)
                yield event
                preparing = isinstance(event, ProgressEvent) and event.stage in _PREPARING
                if preparing and run.poll(control) == "stop":
                    at = f"going on from step {run.current.step}" if run.current.step else "the first step"
                    yield _end(run, "stopped", f"Stopped before {at}.", resumable=True)
                    return
        except DivergedError as error:
            yield _end(run, "diverged", str(error), resumable=False)
            raise


def _end(run: ActiveRun, reason: str, message: str, *, resumable: bool) -> EndEvent:
    """Record an end that publishes nothing."""
    end = EndEvent(step=run.current.step, reason=reason, message=message, resumable=resumable)
    run.finish(reason, reason=reason, message=message)
    run.log(end)
    return end


def plan(recipe: Recipe, *, fork: bool = False) -> Plan:
    """What :func:`train` would do: the preflight of ``--dry-run``. Writes no run folder."""
    require_trackers(recipe.train.report_to)
    inputs = read_inputs(recipe)
    if fork:
        start = find_fork_point(recipe, inputs.files).adapter
        recipe = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"init_from": start})})
    return preflight(recipe, inputs)


def _open(
    recipe: Recipe,
    how: Literal["new", "resume", "fork"],
    closing: Closing | None,
    glimpse: Glimpse | None,
    control: Control,
    started: float,
) -> tuple[Opened, Iterator[Event]]:
    """The run folder with its lock taken, and the work to do in it."""
    notes: list[WarningEvent] = []
    if how == "resume":
        opened = open_again(recipe, originals(recipe.data) | starting_files(recipe))
    else:
        inputs = read_inputs(recipe)
        opened, notes = _open_fork(recipe, inputs) if how == "fork" else (open_new(recipe, inputs.files), [])
    run = opened.run

    def work() -> Iterator[Event]:
        if opened.set_aside is not None:
            message = f"The earlier run in {run.path} was kept: it is now {opened.set_aside}."
            yield WarningEvent(code="set-aside", message=message)
        yield from notes
        data = read_inputs(recipe, copies(run)) if how == "resume" else inputs
        setup = yield from set_up(with_start(recipe, run), data)
        session = yield from begin(setup, run, resume=how == "resume")
        reason = yield from watched(session, fit(session, control, glimpse))
        yield from watched(session, finish(session, reason, closing, control, started))

    return opened, work()


def _open_fork(recipe: Recipe, inputs: Inputs) -> tuple[Opened, list[WarningEvent]]:
    """A new run over the adapter of the one in its folder, and what there is to say of it."""
    point = find_fork_point(recipe, inputs.files)
    with staged_start(point) as start:
        opened = open_new(recipe, inputs.files, start, point.origin)
    notes = [
        WarningEvent(code="checkpoint-damaged", where=problem.where, message=problem.message)
        for problem in point.damaged
    ]
    if opened.fork is not None:
        notes.append(WarningEvent(code="forked", message=forked_message(opened.fork)))
    return opened, notes


def fit(session: Session, control: Control, glimpse: Glimpse | None = None) -> Stage[str]:
    """Steps, evaluations and checkpoints until a reason to end: finished, stop_loss, early_stopping, alarm, stopped."""
    run, recipe = session.run, session.recipe.train
    run.set_status(state="training", step=session.state.step, total_steps=session.state.total_steps)
    mx.reset_peak_memory()
    if session.state.step == 0:
        yield from evaluate(session)
    pace = Pace()
    while not (reason := stop_reason(session)):
        event = pace.timed(take_step(session))
        run.set_status(step=event.step, eta_seconds=event.eta_seconds)
        yield event
        improved = False
        if _due(session, recipe.eval_steps) or event.step == event.total_steps:
            improved = yield from evaluate(session)
        if glimpse is not None and session.state.position.window == 0 and event.step < event.total_steps:
            yield from glimpse(session)
        request, reason = run.poll(control), stop_reason(session)
        if improved or reason or request != "resume" or _due(session, recipe.save_steps):
            yield from save(session)
        if request == "pause" and not reason:
            request = yield from wait(session, control)
        if request == "stop" and not reason:
            return "stopped"
    return reason


class Pace:
    """Time left, from the seconds that this process's steps took: no clock that can jump, no pauses."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._steps = 0

    def timed(self, event: StepEvent) -> StepEvent:
        """The event with its time left."""
        self._seconds += event.metrics["step_seconds"]
        self._steps += 1
        left = self._seconds / self._steps * (event.total_steps - event.step)
        return replace(event, eta_seconds=round(left, 1))


def take_step(session: Session) -> StepEvent:
    """One optimizer step on the next window. Raises DivergedError before anything is changed."""
    began = time.perf_counter()
    state, recipe = session.state, session.recipe.train
    rows = session.order.rows(state.position)
    window = [session.train[row] for row in rows]
    reference = None if session.reference is None else session.reference.take(rows)
    result = session.scorer.loss_and_grad(window, session.method.window_loss(window, reference))
    norm = global_norm(result.grad)
    step = state.step + 1
    require_finite(
        step,
        window,
        result.columns,
        {"loss": result.loss, "grad_norm": norm},
    )
    rate = learning_rate_at(recipe, step, state.total_steps)
    session.optimizer.update(result.grad, norm=norm, learning_rate=rate)
    session.state = replace(
        state,
        step=step,
        position=session.order.after(state.position),
        rng=rng_state(),
        num_tokens=state.num_tokens + result.tokens,
    )
    seconds = time.perf_counter() - began
    metrics = {
        "loss": result.loss,
        "learning_rate": rate,
        "grad_norm": norm,
        "epoch": session.order.epochs_done(session.state.position),
        "num_tokens": session.state.num_tokens,
        "step_seconds": seconds,
        "tokens_per_second": result.tokens / seconds,
        "peak_memory_bytes": mx.get_peak_memory(),
        **session.method.metrics(result.columns, window, reference),
    }
    return StepEvent(step=step, total_steps=state.total_steps, metrics=metrics)


def evaluate(session: Session) -> Stage[bool]:
    """Score the held-out rows, if there are any; returns whether this is the best evaluation so far."""
    rows, state = session.setup.held_out, session.state
    if not rows:
        return False
    if state.step == 0 and session.held_out_reference is not None and session.starts_at_reference:
        logps = session.held_out_reference
    else:
        logps = yield from staged("evaluate", scored_rows(session.scorer, rows), state.step)
    columns, metrics = held_out_figures(session.method, rows, logps, session.held_out_reference)
    require_finite(state.step, rows, columns, {"eval_loss": metrics["eval_loss"]})
    metrics["epoch"] = session.order.epochs_done(state.position)
    loss = metrics["eval_loss"]
    # What was there before training is something to compare with, not something to keep.
    best = state.step > 0 and (state.best_loss is None or loss < state.best_loss)
    if best:
        session.state = replace(state, best_step=state.step, best_loss=loss, stale=0)
        session.run.set_status(best_step=state.step, best_loss=loss)
    elif state.step > 0:
        session.state = replace(state, stale=state.stale + 1)
    yield EvalEvent(step=state.step, best=best, metrics=metrics)
    return best


def stop_reason(session: Session) -> str:
    """Why the run is over by its recipe; empty while it is not."""
    state, recipe = session.state, session.recipe.train
    if state.step >= state.total_steps:
        return "finished"
    epoch_loss = session.epoch_loss.finished
    if recipe.stop_loss is not None and epoch_loss is not None and epoch_loss < recipe.stop_loss:
        return "stop_loss"
    if recipe.early_stopping_patience is not None and state.stale >= recipe.early_stopping_patience:
        return "early_stopping"
    if session.alarms.stopping:
        return "alarm"
    return ""


def _due(session: Session, every: int | None) -> bool:
    """Whether something that happens every so many steps (None: once an epoch) happens now."""
    if every is None:
        return session.state.position.window == 0
    return session.state.step % every == 0


def save(session: Session) -> Stage[None]:
    """Write a checkpoint of this moment and delete those there are too many of."""
    run, state = session.run, session.state
    run.sync()
    session.state = state = replace(state, metrics_bytes=run.metrics_bytes)
    path = save_checkpoint(run.checkpoints, state, session.optimizer.state(), session.loaded, session.setup.info)
    prune(run.checkpoints, session.recipe.train.save_total_limit, [state.best_step])
    yield CheckpointEvent(step=state.step, path=str(path.relative_to(run.path)), best=state.step == state.best_step)


def wait(session: Session, control: Control) -> Stage[Request]:
    """Wait out a pause; returns the request that ended it."""
    run = session.run
    run.set_status(state="paused", eta_seconds=None)
    state = session.state
    yield ProgressEvent(step=state.step, stage="paused", fraction=state.step / state.total_steps)
    while (request := run.poll(control)) == "pause":
        time.sleep(run.poll_seconds)
    run.set_status(state="training")
    return request


def finish(session: Session, reason: str, closing: Closing | None, control: Control, started: float) -> Stage[None]:
    """Publish the best adapter, let ``closing`` use the tuned model, and end."""
    run, state, stopped = session.run, session.state, reason == "stopped"
    run.set_status(state="finishing", eta_seconds=None)
    yield ProgressEvent(step=state.step, stage="save", fraction=1.0)
    step = yield from publish(session)
    figures: Figures = {}
    if closing is not None and not stopped:
        session.loaded.model.eval()
        figures = yield from _until_stopped(closing(session), run, control)
    run.finish("stopped" if stopped else "finished", reason=reason, adapter_step=step)
    yield EndEvent(
        step=state.step,
        reason=reason,
        message=_MESSAGES[reason].format(
            step=state.step, total=state.total_steps, adapter=step, alarm=session.alarms.stopping
        ),
        adapter=str(run.adapter.absolute()),
        adapter_step=step,
        seconds=round(time.monotonic() - started, 1),
        resumable=stopped,
        figures=figures,
    )


def publish(session: Session) -> Stage[int]:
    """Write the run's adapter folder from the best evaluation, else the last step; returns the step it is of."""
    run, state, step = session.run, session.state, session.state.step
    best = state.best_step if session.recipe.train.load_best_model_at_end else None
    if best is not None and best != step:
        path = checkpoint_path(run.checkpoints, best)
        problems = verify_folder(path)
        if problems:
            yield WarningEvent(
                step=step,
                code="best-damaged",
                where=str(path),
                message=f"The best adapter cannot be read ({problems[0].message}); the last one is published.",
            )
        else:
            load_adapter(path / ADAPTER, session.loaded)
            step = best
    with disk_faults(run.adapter):
        save_adapter(run.adapter, session.loaded.model, session.setup.info, session.loaded)
    return step


def _until_stopped(work: Generator[Event, None, Figures], run: ActiveRun, control: Control) -> Stage[Figures]:
    """Pass events on until ``work`` is done or a stop is asked for: what is left of it can be done again."""
    while run.poll(control) != "stop":
        try:
            yield next(work)
        except StopIteration as finished:
            figures: Figures = finished.value
            return figures
    work.close()
    return {}
