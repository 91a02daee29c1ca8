"""Run folders for tests of reports: as a trainer and an evaluation leave them, without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from localdpo.train.events import (
    EndEvent,
    EvalEvent,
    Event,
    SampleEvent,
    StartEvent,
    StepEvent,
    WarningEvent,
    event_line,
)

STEPS = 8


def step_event(step: int, **more: float) -> StepEvent:
    metrics = {
        "loss": 1 / step,
        "learning_rate": 1e-3 * (1 - step / 100_000),
        "grad_norm": 1.0,
        "tokens_per_second": 300.0,
        "peak_memory_bytes": 8e8,
        "rewards/chosen": 0.1 * step,
        "rewards/rejected": -0.1 * step,
        "rewards/accuracies": 1.0,
        "rewards/margins": 0.2 * step,
        "logps/chosen": -20.0,
        "logps/rejected": -30.0,
        "retain/drift": 0.01,
        **more,
    }
    return StepEvent(step=step, total_steps=STEPS, metrics=metrics)


def write_run(path: Path, word: str = "x", *, steps: int = STEPS, state: str = "finished") -> Path:
    """A run at ``path``; ``word`` is in every field that holds a text from outside."""
    (path / "adapter").mkdir(parents=True)
    (path / "adapter" / "adapter_config.json").write_text("{}")
    plan = {
        "train_pairs": 2,
        "held_out_pairs": 4,
        "device": word,
        "memory_mode": word,
        "lengths": [[32, 5], [64, 1]],
        "parameters": 1000,
    }
    events: list[Event] = [StartEvent(run=word, total_steps=steps, plan=plan)]
    events += [step_event(step) for step in range(1, steps + 1)]
    events += [
        EvalEvent(step=step, best=True, metrics={"eval_loss": 1 / step, "eval_rewards/accuracies": 0.75})
        for step in (4, 8)
        if step <= steps
    ]
    events.append(WarningEvent(step=3, code=word, message=word, where=word, fix=word))
    samples: list[Event] = [
        SampleEvent(step=steps, prompt=[{"role": "user", "content": f"{word} {n}"}], base=word, tuned=word,
                    tags=[word], accept=[word], base_right=True, tuned_right=n > 0)
        for n in range(2)
    ]  # fmt: skip
    events += samples
    if state == "finished":
        figures = {"lines": [word], "terms": [word], "groups": {}}
        events.append(EndEvent(step=steps, reason=word, message=word, adapter=word, seconds=90.0, figures=figures))
    events.sort(key=lambda event: event.step)
    (path / "metrics.jsonl").write_text("".join(map(event_line, events)))
    (path / "samples.jsonl").write_text("".join(map(event_line, samples)))
    status = {"state": state, "step": steps, "total_steps": steps, "adapter_step": steps, "message": word}
    (path / "status.json").write_text(json.dumps(status))
    recipe = {"model": word, "seed": 1, "data": {"train": word}, "dpo": {"beta": 0.1, "loss_type": word}}
    info = {
        "format": 1,
        "localdpo": word,
        "created": 1_790_000_000.0,
        "recipe": recipe,
        "files": {"data.train": {"path": word, "sha256": word}},
        "model": {"spec": word, "fingerprint": word},
        "machine": {"system": word, "processor": word, "cores": 2, "memory_bytes": 8e9, "versions": {"mlx": word}},
    }
    (path / "run.json").write_text(json.dumps(info))
    rows = [{"prompt": f"{word} {n}", "chosen": f"yes {word}", "rejected": f"no {word}"} for n in range(2)]
    (path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def evaluation(word: str = "x") -> dict[str, Any]:
    """A whole eval.json with ``word`` in every text and every name that is not fixed."""
    sides = {"base": interval(0.5), "tuned": interval(0.6)}
    plain = {"base": 0.5, "tuned": 0.4}
    drift = {
        "prompts": 3,
        "kl_per_token": interval(0.1),
        "unchanged": interval(0.5),
        "facts_kept": interval(0.9),
        "distinct_1": plain,
        "distinct_2": plain,
        "repetition": plain,
        "words": plain,
    }
    pair = {"source": word, "prompt": word, "margin": -0.5, "chosen_words": 3, "rejected_words": 4}
    answer = {"prompt": word, "group": word, "base": word, "tuned": word, "base_right": True, "tuned_right": False}
    return {
        "format": 1,
        "localdpo": word,
        "created": 1_790_000_100.0,
        "run": word,
        "step": STEPS,
        "model": word,
        "pairs_file": word,
        "held_out": {
            "pairs": 4,
            "skipped": 1,
            **{key: interval(0.8) for key in ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")},
            "base": {"preference_accuracy": interval(0.4)},
            "tags": {word: {"pairs": 2, "accuracy": interval(0.7), "margin": interval(1.0)}},
            "per_pair": [pair],
        },
        "drift": {
            "retain": drift,
            "probes": drift,
            "leakage": interval(0.1),
            "robustness": interval(0.9),
            "answers": [{**answer, "kl": 0.1}],
        },
        "tasks": [
            {"name": word, "kind": word, "examples": 2, "metrics": {word: sides},
             "answers": [{"prompt": word, "expected": word, "base": word, "tuned": word}]}
        ],
        "fairness": [{"name": word, "language": word, "groups": [word, word], "gap_logp": sides, "gap_answers": sides}],
        "blind": [{"a": word, "b": word, "wins": 3, "losses": 1, "ties": 0, "rate": interval(0.7), "judge": word}],
        "verdict": {
            "learned": "partly",
            "kept": "drifted",
            "words": word,
            "reasons": [{"word": "partly", "figure": word, "value": 0.8, "low": 0.6, "high": 0.9, "threshold": 0.5,
                         "text": word}],
        },
    }  # fmt: skip


def evaluated_run(path: Path, word: str = "x") -> Path:
    write_run(path, word)
    (path / "eval.json").write_text(json.dumps(evaluation(word)))
    return path
