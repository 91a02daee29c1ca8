"""Many steps in one run, and what grows: ``python benchmarks/long_run.py [STEPS] [--minutes M]``.

A model of one tiny layer and pairs of a few tokens, so that eight hours' worth of steps pass in minutes. Twenty times a
run it notes resident memory, what the array library holds, open file descriptors and threads, and reads metrics.jsonl
as a viewer does. Figures: the slope of each over the second half, a million steps long. With ``--minutes`` it stops
there and says how far it got.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import mlx.core as mx
import numpy as np
import psutil
from tiny import tiny_model

from localdpo.recipe import Recipe
from localdpo.train.events import StepEvent, read_events
from localdpo.train.loop import train
from localdpo.train.run import Control, RunFolder

SAMPLES = 20
PIECE = 1 << 20


def recipe(root: Path, steps: int) -> Recipe:
    """Four pairs of a few tokens, a batch of one, a checkpoint and an evaluation now and then."""
    tiny_model(
        root / "model",
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        tie_word_embeddings=False,
    )
    rows = [{"prompt": f"p{n}", "chosen": "a", "rejected": "b"} for n in range(4)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    every = max(steps // 50, 1)
    return Recipe.model_validate(
        {
            "model": str(root / "model"),
            "output_dir": root / "run",
            "data": {"train": root / "pairs.jsonl", "eval": root / "pairs.jsonl", "retain": None},
            "lora": {"r": 2, "target_modules": ["self_attn.q_proj"], "dropout": 0.1},
            "train": {
                "per_device_train_batch_size": 1,
                "max_steps": steps,
                "learning_rate": 1e-5,
                "save_steps": every,
                "eval_steps": every,
            },
        }
    )


def look(run: RunFolder, offset: int, process: psutil.Process) -> tuple[int, dict[str, Any]]:
    """What a process holds now; and the metrics since ``offset`` read as a viewer reads them."""
    steps = 0
    while True:
        chunk = read_events(run.metrics_file, offset, PIECE)
        if chunk.offset == offset:
            break
        steps += sum(isinstance(event, StepEvent) for event in chunk.events)
        offset = chunk.offset
    return offset, {
        "steps_read": steps,
        "rss_mb": process.memory_info().rss / 1e6,
        "active_mb": mx.get_active_memory() / 1e6,
        "cache_mb": mx.get_cache_memory() / 1e6,
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("steps", type=int, nargs="?", default=200_000)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    options = parser.parse_args()
    process, control = psutil.Process(), Control()
    seen: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LOCALDPO_CACHE"] = f"{folder}/cache"
        run = RunFolder(Path(folder) / "run")
        offset, done, began = 0, 0, time.monotonic()
        for event in train(recipe(Path(folder), options.steps), control=control):
            if not isinstance(event, StepEvent):
                continue
            done = event.step
            if done % max(options.steps // SAMPLES, 1) == 0:
                offset, figures = look(run, offset, process)
                seen.append({"step": done, "minutes": round((time.monotonic() - began) / 60, 2), **figures})
                print(json.dumps(seen[-1]), file=sys.stderr, flush=True)
            if time.monotonic() - began > 60 * options.minutes:
                control.stop()
        size, minutes = run.metrics_file.stat().st_size, (time.monotonic() - began) / 60
        whole = 0
        with run.metrics_file.open("rb") as file:
            whole = sum(json.loads(line)["event"] == "step" for line in file)
    half = seen[len(seen) // 2 :]
    steps = np.array([figures["step"] for figures in half]) / 1e6
    slopes = {
        f"{name}_a_million_steps": round(float(np.polyfit(steps, [figures[name] for figures in half], 1)[0]), 2)
        for name in ("rss_mb", "active_mb", "cache_mb", "descriptors", "threads")
        if len(half) > 1
    }
    print(
        json.dumps(
            {
                "steps": done,
                "minutes": round(minutes, 1),
                "steps_a_second": round(done / minutes / 60, 1),
                "steps_in_metrics": whole,
                "metrics_mb": round(size / 1e6, 1),
                "first": seen[0] if seen else None,
                "last": seen[-1] if seen else None,
                **slopes,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
