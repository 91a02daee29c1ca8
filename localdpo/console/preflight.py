"""What a run is about to do, in lines, from the plan as the start event carries it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from textwrap import wrap
from typing import Any

from localdpo.console.terminal import bytes_text, count_text, duration_text
from localdpo.text import sanitise

_SKIPPED_SHOWN = 10


def lines(plan: Mapping[str, Any], columns: int = 0) -> list[str]:
    """Return the plan in lines of a name and a value, sanitised; wrapped to ``columns`` unless that is 0."""
    shown = []
    for name, value in _facts(plan):
        line = f"{name:9} {sanitise(value)}"
        shown += wrap(line, columns, subsequent_indent=" " * 10) if columns else [line]
    return shown


def _facts(plan: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    where = {"cpu": "on the CPU", "gpu": "on the GPU"}.get(plan["device"], plan["device"])
    yield "model", f"{plan['model']}, {count_text(plan['parameters'])} parameters, {where}"
    yield "pairs", _pairs(plan)
    yield (
        "tokens",
        f"{plan['tokens_per_epoch']:,} an epoch, {plan['longest_tokens']:,} in the longest row"
        + (f", {plan['truncated']:,} pairs truncated" if plan["truncated"] else ""),
    )
    share = plan["trainable_parameters"] / plan["parameters"]
    yield "adapter", f"{count_text(plan['trainable_parameters'])} trainable parameters ({share:.1%})"
    yield "loss", ", ".join(_loss(plan["loss"]))
    yield (
        "steps",
        (
            f"{plan['total_steps']:,} of {plan['rows_per_step']} rows, {plan['epochs']:.3g} epochs; "
            f"warm-up {plan['warmup_steps']}"
        ),
    )
    yield "memory", _memory(plan)
    if plan["seconds"] is not None:
        yield "time", f"about {duration_text(plan['seconds'])} for the steps"
    for row in plan["skipped"][:_SKIPPED_SHOWN]:
        yield "skipped", f"{row['source']}:{row['line']}: {row['reason']}"
    if len(plan["skipped"]) > _SKIPPED_SHOWN:
        yield "skipped", f"and {len(plan['skipped']) - _SKIPPED_SHOWN:,} more rows"


def _pairs(plan: Mapping[str, Any]) -> str:
    parts = [f"{plan['train_pairs']:,} pairs to learn from", f"{plan['held_out_pairs']:,} held out"]
    kept = plan["retain_prompts"]
    parts.append(f"{kept:,} prompts whose answers stay" if kept else "no answers protected (data.retain is null)")
    if plan["probes"]:
        parts.append(f"{plan['probes']:,} probes at the end")
    return ", ".join(parts)


def _loss(loss: Mapping[str, Any]) -> Iterator[str]:
    yield str(loss["loss_type"])
    yield f"beta {loss['beta']:g}"
    if loss["rpo_alpha"]:
        yield f"rpo_alpha {loss['rpo_alpha']:g}"
    if loss["label_smoothing"]:
        yield f"label_smoothing {loss['label_smoothing']:g}"


def _memory(plan: Mapping[str, Any]) -> str:
    available = bytes_text(plan["memory_available"])
    if plan["memory"] is None:
        return f"not known for this kind of model; {available} available"
    checkpointing = ", recomputing activations to save some" if plan["gradient_checkpointing"] else ""
    return f"about {bytes_text(plan['memory']['total'])} of {available}: {plan['memory_verdict']}{checkpointing}"
