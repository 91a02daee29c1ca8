"""Evidence for a verdict, from what a run folder holds: its events, its probe answers, its evaluation.

`verdict_of_run` needs no model and no forward pass, so that lists of runs and the end of training can show it. An
evaluation (`eval.json`) of the run's published adapter knows more and goes before. This module never loads mlx.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from localdpo.evaluate.figures import TAUGHT, ProbeFigures, group_of, says
from localdpo.evaluate.intervals import Figure, figure_from_json, mean, share
from localdpo.evaluate.verdict import Evidence, Verdict, judge, verdict_from_json
from localdpo.evaluate.wording import repetition
from localdpo.train.events import EvalEvent, Event, SampleEvent, StartEvent, StepEvent
from localdpo.train.run import ACTIVE_STATES, RunFolder

__all__ = ["EVAL_FILE", "FORMAT", "evidence_of_evaluation", "evidence_of_events", "read_evaluation", "verdict_of_run"]

EVAL_FILE, FORMAT = "eval.json", 1
_FIRST_STEPS = 4


def read_evaluation(run: RunFolder) -> dict[str, Any] | None:
    """The run's eval.json as plain values; None when there is none, or none of a format that is known."""
    try:
        data = json.loads((run.path / EVAL_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) and data.get("format") == FORMAT else None


def verdict_of_run(run: RunFolder) -> Verdict | None:
    """The verdict on a run's published adapter, from its folder alone; None while there is none to judge.

    That of ``eval.json`` where it was made of the adapter that is published now and could judge anything (one of
    fairness alone cannot), else one from training's own figures. A run that diverged has learned nothing.
    """
    status = run.status()
    if status is None or status.state in ACTIVE_STATES:
        return None
    if status.state == "diverged":
        return Verdict("not", None, "not learned: training diverged and published no adapter")
    if status.adapter_step is None:
        return None
    evaluation = read_evaluation(run)
    if evaluation is not None and _is_of(evaluation, run, status.adapter_step):
        found = verdict_from_json(evaluation.get("verdict"))
        if found is not None and (found.learned or found.kept):
            return found
    return judge(evidence_of_events(run.every_event(), run.samples(), status.adapter_step))


def evidence_of_evaluation(held_out: Mapping[str, Any] | None, drift: Mapping[str, Any] | None) -> Evidence:
    """What an evaluation says: the sections of eval.json, either of which may be missing."""
    held_out, drift = held_out or {}, drift or {}
    sets = {name: drift.get(name) or {} for name in ("retain", "probes", "taught")}
    taught, probes = sets["taught"], sets["probes"]
    return Evidence(
        accuracy=figure_from_json(held_out.get("accuracy")),
        nats=figure_from_json(held_out.get("nats")),
        pairs=int(held_out.get("pairs") or 0),
        chosen_nll=held_out.get("chosen_nll"),
        facts=figure_from_json(probes.get("facts_kept")),
        facts_count=int(probes.get("facts") or 0),
        leakage=figure_from_json(drift.get("leakage")),
        unrelated=int(drift.get("unrelated") or 0),
        repetition=figure_from_json(drift.get("repetition")),
        kl=figure_from_json((probes or sets["retain"]).get("kl_per_token")),
        **_taught_counts(taught),
    )


def _taught_counts(taught: Mapping[str, Any]) -> dict[str, Any]:
    judged = int(taught.get("judged") or 0)
    if not judged:
        return {}
    right = taught["right"]
    return {
        "taught": share(round(right["tuned"] * judged), judged),
        "taught_base": right["base"],
        "taught_count": judged,
    }


def _is_of(evaluation: Mapping[str, Any], run: RunFolder, step: int) -> bool:
    """Whether an evaluation was made after the adapter, of the same step."""
    try:
        published = (run.adapter / "adapter_config.json").stat().st_mtime
        return bool(evaluation["step"] == step and evaluation["created"] >= published - 1)
    except (OSError, KeyError, TypeError):
        return False


def evidence_of_events(events: Iterable[Event], samples: Sequence[SampleEvent], adapter_step: int) -> Evidence:
    """What training's own events say about the adapter of ``adapter_step``; no model is asked anything.

    ``events`` are looked at once, in order, and at most an epoch of them is kept.
    """
    start: StartEvent | None = None
    before: EvalEvent | None = None
    after: EvalEvent | None = None
    first: list[StepEvent] = []
    last_epoch: deque[StepEvent] = deque(maxlen=1)
    for event in events:
        match event:
            case StartEvent() if start is None:
                start = event
                last_epoch = deque(maxlen=max(1, event.steps_per_epoch))
            case EvalEvent():
                before = event if before is None and event.step == 0 else before
                after = event if event.step == adapter_step else after
            case StepEvent() if event.step <= adapter_step:
                if len(first) < _FIRST_STEPS:
                    first.append(event)
                last_epoch.append(event)
    plan = start.plan if start is not None else {}
    return Evidence(
        **_held_out(before, after, int(_number(plan.get("held_out_pairs")))),
        **_trained(last_epoch, plan),
        **_probes([sample for sample in samples if sample.final]),
        retain_drift=_mean_metric(last_epoch, "retain/drift"),
        chosen_nll=_chosen_nll(before, after, first, last_epoch),
    )


def _held_out(before: EvalEvent | None, after: EvalEvent | None, pairs: int) -> dict[str, Any]:
    if after is None or "eval_rewards/accuracies" not in after.metrics:
        return {}
    accuracy = min(max(after.metrics["eval_rewards/accuracies"], 0.0), 1.0)
    found: dict[str, Any] = {"accuracy": share(accuracy * pairs, pairs) or Figure(accuracy), "pairs": pairs}
    if before is not None and {"eval_logps/chosen", "eval_logps/rejected"} <= set(before.metrics) & set(after.metrics):
        # Log-probs mean the same for every loss; rewards do not.
        found["nats"] = Figure(_preference(after.metrics, "eval_") - _preference(before.metrics, "eval_"))
    return found


def _preference(metrics: Mapping[str, float], prefix: str = "") -> float:
    return metrics[f"{prefix}logps/chosen"] - metrics[f"{prefix}logps/rejected"]


def _trained(last_epoch: Iterable[StepEvent], plan: Mapping[str, Any]) -> dict[str, Any]:
    margin = _mean_metric(last_epoch, "rewards/margins")
    loss = plan.get("loss")
    beta = _number(loss.get("beta")) if isinstance(loss, Mapping) else 0.0
    free = isinstance(loss, Mapping) and loss.get("loss_type") in ("simpo", "orpo")
    # Rewards of a reference-free loss are no change from the base: their signs are a preference all the same.
    nats = margin / beta if margin is not None and beta and not free else None
    return {"trained_accuracy": _mean_metric(last_epoch, "rewards/accuracies"), "trained_nats": nats}


def _number(value: object) -> float:
    """A number of a file that may come from anywhere; 0 for anything else."""
    return value if isinstance(value, int | float) and math.isfinite(value) and value > 0 else 0.0


def _chosen_nll(
    before: EvalEvent | None, after: EvalEvent | None, first_steps: Iterable[StepEvent], last_epoch: Iterable[StepEvent]
) -> float | None:
    """The chosen answers' summed NLL at the end over that at the beginning; of held-out pairs where there are any."""
    if before is not None and after is not None:
        first, last = (event.metrics.get("eval_logps/chosen") for event in (before, after))
    else:
        first, last = _mean_metric(first_steps, "logps/chosen"), _mean_metric(last_epoch, "logps/chosen")
    return last / first if first is not None and last is not None and first < 0 else None


def _mean_metric(steps: Iterable[StepEvent], name: str) -> float | None:
    values = [event.metrics[name] for event in steps if name in event.metrics]
    return fmean(values) if values else None


def _probes(samples: Sequence[SampleEvent]) -> dict[str, Any]:
    """What the closing answers say: what was taught, what was kept, what leaked."""
    figures = ProbeFigures.of(samples)
    found: dict[str, Any] = {}
    taught = figures.groups.get(TAUGHT)
    if taught is not None and taught.judged:
        found |= {
            "taught": share(taught.tuned_right, taught.judged),
            "taught_base": taught.base_right / taught.judged,
            "taught_count": taught.judged,
        }
    others = [group for name, group in figures.groups.items() if name != TAUGHT]
    right = sum(group.base_right for group in others)
    found |= {"facts": share(sum(group.kept for group in others), right), "facts_count": right}
    unrelated = [sample for sample in samples if group_of(sample) != TAUGHT]
    if figures.terms and unrelated:
        leaked = sum(says(s.tuned, figures.terms) and not says(s.base, figures.terms) for s in unrelated)
        found |= {"leakage": share(leaked, len(unrelated)), "unrelated": len(unrelated)}
    found["repetition"] = mean([repetition(s.tuned) - repetition(s.base) for s in samples])
    return found
