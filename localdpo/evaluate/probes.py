"""The probes: prompts never trained on, answered by the base and by the tuned model at the end of a run.

Greedy and batched; the base's answers come from the cache that retain prompts use. This module makes
samples; ``figures`` counts them.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from localdpo.data.pairs import PromptRow
from localdpo.evaluate.beside import answers_now
from localdpo.evaluate.figures import ProbeFigures, says
from localdpo.model.generate import batch_greedy
from localdpo.model.load import LoadedModel
from localdpo.paths import cache_dir
from localdpo.steps import mapped
from localdpo.train.events import Event, ProgressEvent, SampleEvent
from localdpo.train.retain import RETAIN_TOKENS, base_answers, encode_prompts, messages_of
from localdpo.train.session import Session, staged

PROBE_TOKENS = RETAIN_TOKENS
"""Longest answer to a probe: enough to say a name or a fact. As long as a retain answer, so that the base gives both
in the same batches."""


def closing(session: Session) -> Generator[Event, None, Mapping[str, Any]]:
    """What ``train`` does with the tuned model before it ends: yields samples, returns the figures."""
    rows = session.setup.inputs.probes
    if not rows:
        return {}
    figures = yield from probe(session.loaded, rows, max_length=session.recipe.data.max_length, step=session.state.step)
    return figures.to_json()


def glimpse(session: Session) -> Iterator[Event]:
    """Show what the model says by now to the first few probes, or held-out prompts, beside what the base said."""
    inputs, count = session.setup.inputs, session.recipe.train.sample_prompts
    rows = inputs.probes or [PromptRow(prompt=pair.prompt, tags=pair.tags) for pair in inputs.held_out[:count]]
    kept, prompts, _ = encode_prompts(rows[:count], session.loaded, session.recipe.data.max_length)
    if not prompts:
        return
    step, model = session.state.step, session.loaded.model
    model.eval()
    try:
        base = yield from staged(
            "samples", base_answers(session.loaded, prompts, PROBE_TOKENS, cache_dir() / "answers"), step
        )
        now = batch_greedy(session.loaded, prompts, PROBE_TOKENS)
    finally:
        model.train()
    for row, before, after in zip(kept, base, now, strict=True):
        yield replace(sample(row, before, after, step), final=False)


def probe(
    loaded: LoadedModel,
    rows: Sequence[PromptRow],
    *,
    max_length: int = 1024,
    max_tokens: int = PROBE_TOKENS,
    step: int = 0,
) -> Generator[Event, None, ProbeFigures]:
    """Answer ``rows`` by the base and by the model as it stands; yields progress, then a sample a row.

    Rows that the template refuses are left out.
    """
    kept, prompts, _ = encode_prompts(rows, loaded, max_length)
    wanted = 2 * len(prompts)
    base = yield from mapped(
        base_answers(loaded, prompts, max_tokens, cache_dir() / "answers"),
        lambda counts: _progress(step, counts[0], wanted, "the base answers"),
    )
    tuned = yield from answers_now(
        loaded,
        prompts,
        max_tokens,
        lambda given: _progress(step, len(prompts) + given, wanted, "the tuned model answers"),
    )
    samples = [sample(row, before, after, step) for row, before, after in zip(kept, base, tuned, strict=True)]
    yield from samples
    return ProbeFigures.of(samples, [rejected_terms(row) for row in kept], max_tokens)


def _progress(step: int, done: int, total: int, detail: str) -> ProgressEvent:
    fraction = done / total if total else 1.0
    return ProgressEvent(step=step, stage="samples", detail=detail, done=done, total=total, fraction=fraction)


def rejected_terms(row: PromptRow) -> tuple[str, ...]:
    """What an answer to the probe must not say: the strings of its optional key ``reject``."""
    terms = row.extra.get("reject", ())
    if isinstance(terms, str):
        return (terms,)
    return tuple(term for term in terms if isinstance(term, str)) if isinstance(terms, list) else ()


def sample(row: PromptRow, base: str, tuned: str, step: int) -> SampleEvent:
    """Both answers to a probe, judged by its accepted and rejected terms."""
    rejected = rejected_terms(row)

    def right(answer: str) -> bool | None:
        if not row.accept:
            return None
        return says(answer, row.accept) and not says(answer, rejected)

    return SampleEvent(
        step=step,
        prompt=messages_of(row),
        base=base,
        tuned=tuned,
        tags=list(row.tags),
        accept=list(row.accept),
        base_right=right(base),
        tuned_right=right(tuned),
    )
