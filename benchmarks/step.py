"""One measurement in a process of its own: `python benchmarks/step.py '{"tokens": 160, …}'` prints a line of JSON.

Trains a few steps of a model with random pairs of known lengths and reports seconds, tokens, peak memory, what the
preflight's estimate said, and the share of the machine's matrix-product rate. See ``Spec`` for what can be asked.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mlx.core as mx
import numpy as np

from localdpo.core.losses import LossSettings
from localdpo.core.reference import ReferenceCache
from localdpo.dpo.budget import CPU_STREAMS
from localdpo.dpo.scorer import FastScorer
from localdpo.methods.dpo import DPO
from localdpo.model.blas import blas_threads_within
from localdpo.model.device import core_streams
from localdpo.model.load import LoadedModel, load_model
from localdpo.model.lora import LoraSettings, attach_lora
from localdpo.recipe import Recipe
from localdpo.sequences import EncodedRow, RowValues
from localdpo.train.optimizer import AdapterOptimizer, global_norm
from localdpo.train.plan import make_plan


@dataclass(frozen=True)
class Spec:
    """What to measure. ``shape`` None is the starter model, else sizes for a random one, written in ``bits``."""

    shape: dict[str, int] | None = None
    bits: int | None = 4
    pairs: int = 8
    tokens: int = 160  # of a pair: half of them prompt, a quarter each answer
    batch: int = 4
    layers: int | None = None
    checkpointing: bool = False
    memory: str = "auto"
    steps: int = 4  # measured, after the first, which warms up
    seed: int = 0


def main() -> None:
    spec = Spec(**json.loads(sys.argv[1]))
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({**dataclasses.asdict(spec), **measure(spec, Path(folder))}), flush=True)


def measure(spec: Spec, folder: Path) -> dict[str, Any]:
    loaded = load_model(_model(spec), memory=spec.memory)  # type: ignore[arg-type]
    info = attach_lora(loaded.model, LoraSettings(rank=8, scale=2.0, num_layers=spec.layers, seed=spec.seed))
    pairs = random_pairs(spec, int(loaded.config["vocab_size"]))
    estimate = _estimate(spec, loaded, info, pairs)
    scorer = FastScorer(loaded.model, gradient_checkpointing=spec.checkpointing)
    mx.reset_peak_memory()
    begun = time.perf_counter()
    scorer.use_trunk(folder / "trunk", loaded.fingerprint)
    cache = ReferenceCache(folder / "reference", loaded.fingerprint, loaded.device)
    reference = RowValues.of(cache.get(scorer, pairs), pairs)
    prepared = time.perf_counter() - begun
    optimizer = AdapterOptimizer(loaded.model, Recipe.model_validate(_recipe(spec)).train)
    method = DPO(LossSettings(loss_type="sigmoid", beta=0.1))
    loaded.model.train()
    seconds, tokens = [], 0
    for step in range(spec.steps + 1):
        rows = [(step * spec.batch + i) % len(pairs) for i in range(spec.batch)]
        begun = time.perf_counter()
        window = [pairs[row] for row in rows]
        result = scorer.loss_and_grad(window, method.window_loss(window, reference.take(rows)))
        optimizer.update(result.grad, norm=global_norm(result.grad), learning_rate=1e-4)
        if step:
            seconds.append(time.perf_counter() - begun)
            tokens += result.tokens
    trained = info.num_layers / len(loaded.model.layers)
    return {
        "seconds": seconds,
        "prepare_seconds": prepared,
        "tokens_measured": tokens,
        "parameters": loaded.num_parameters,
        "trained_share": trained,
        "matmul_flops": matmul_rate(),
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "mlx_peak": mx.get_peak_memory(),
        "estimate": estimate,
        "memory_mode": loaded.memory,
    }


def _model(spec: Spec) -> str:
    """The model to load. A random one is made once, by another process: making it would be this one's peak."""
    if spec.shape is None:
        return "smollm2-135m"
    name = "-".join(map(str, [*spec.shape.values(), spec.bits]))
    folder = ROOT / "benchmarks" / ".work" / f"random-{name}"
    if not (folder / "config.json").exists():
        making = folder.with_suffix(".part")
        make = (
            "import json, mlx.core as mx, pathlib, sys, tiny\n"
            "tiny.tiny_model(pathlib.Path(sys.argv[1]), dtype=mx.float16, **json.loads(sys.argv[2]))"
        )
        sizes = json.dumps({**spec.shape, "quantize": spec.bits, "group_size": 64})
        subprocess.run([sys.executable, "-c", make, str(making), sizes], check=True, cwd=ROOT / "tests")
        making.rename(folder)
    return str(folder)


def _recipe(spec: Spec) -> dict[str, Any]:
    train = {"per_device_train_batch_size": spec.batch, "gradient_checkpointing": spec.checkpointing}
    return {"model": "smollm2-135m", "data": {"train": "pairs.jsonl"}, "train": train}


def _estimate(spec: Spec, loaded: LoadedModel, info: Any, pairs: list[EncodedRow]) -> dict[str, int] | None:
    recipe = Recipe.model_validate(_recipe(spec))
    plan = make_plan(
        recipe, loaded, info, pairs, held_out=0, retain_tokens=[], probes=0, truncated=0, skipped=[], warnings=[]
    )
    return plan.memory.to_json() if plan.memory else None


def random_pairs(spec: Spec, vocabulary: int) -> list[EncodedRow]:
    """Pairs of random ids, no two prompts alike but for their first 16 tokens."""
    rng = np.random.default_rng(spec.seed)
    start = rng.integers(10, vocabulary, 16)

    def ids(count: int) -> np.ndarray:
        return rng.integers(10, vocabulary, count).astype(np.int32)

    prompt, answer = spec.tokens // 2, spec.tokens // 4
    return [
        EncodedRow.of(np.concatenate([start, ids(prompt - 16)]).astype(np.int32), (ids(answer), ids(answer)), row=row)
        for row in range(spec.pairs)
    ]


def matmul_rate() -> float:
    """Operations a second of large float32 products on every stream that a step uses; the best of five."""
    left, right = mx.ones((1024, 1024)), mx.ones((1024, 1024))
    mx.eval(left, right)
    lanes = core_streams(CPU_STREAMS["cpu"])
    best = float("inf")
    with blas_threads_within(1):
        for _ in range(5):
            begun = time.perf_counter()
            mx.eval([mx.matmul(left, right, stream=lane) for lane in lanes])
            best = min(best, time.perf_counter() - begun)
    return len(lanes) * 2 * 1024**3 / best


if __name__ == "__main__":
    main()
