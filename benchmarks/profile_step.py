"""Where the time of a step goes: `python benchmarks/profile_step.py [LAYERS]` prints a table.

Parts are timed on their own, on one stream, over the first 8 pairs of the peers' work as one micro-batch, so they do
not add up to a step on two streams exactly. With `perf` installed, `perf record -g python benchmarks/step.py '{}'`
shows the functions below.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mlx.core as mx

from localdpo.core.losses import LossSettings
from localdpo.core.score import evaluating
from localdpo.data.encode import encode_pairs
from localdpo.data.pairs import read_pairs
from localdpo.dpo.attention import LaneAttention, PackedCache
from localdpo.dpo.forward import SharedForward
from localdpo.dpo.packing import pack
from localdpo.dpo.scorer import FastScorer
from localdpo.methods.dpo import DPO
from localdpo.model.blas import blas_threads_within
from localdpo.model.load import load_model
from localdpo.model.lora import LoraSettings, attach_lora
from localdpo.recipe import TrainRecipe
from localdpo.sequences import sequences_of
from localdpo.train.optimizer import AdapterOptimizer, global_norm

ROUNDS = 5


def seconds(run: Callable[[], object]) -> float:
    """The median of a few runs after one that warms up."""
    times = []
    for _ in range(ROUNDS + 1):
        begun = time.perf_counter()
        mx.eval(run())
        times.append(time.perf_counter() - begun)
    return median(times[1:])


def main() -> None:
    layers = int(sys.argv[1]) if len(sys.argv) > 1 else None
    loaded = load_model("smollm2-135m")
    attach_lora(loaded.model, LoraSettings(rank=8, scale=2.0, num_layers=layers, seed=0))
    rows = read_pairs(ROOT / "benchmarks" / "data" / "pandalm_64.jsonl").pairs[:8]
    pairs = encode_pairs(rows, loaded.tokenizer, 512, "keep_start").pairs
    scorer = FastScorer(loaded.model)
    forward = scorer._forward
    assert isinstance(forward, SharedForward)
    batch = pack(sequences_of(pairs))
    hidden = mx.random.normal((len(batch.tokens), loaded.config["hidden_size"]))
    rows_at, targets = mx.array(batch.rows), mx.array(batch.targets)
    head = forward.anatomy.head
    with evaluating(loaded.model), blas_threads_within(1):
        body = seconds(lambda: forward._bodies(batch, lambda *_: forward.anatomy.layers))
        attention = seconds(lambda: attend(batch, loaded.config))
        plain = seconds(lambda: head.logps(hidden[rows_at], targets, grad=False))
        fused = seconds(lambda: head.logps(hidden[rows_at], targets, grad=True))
    method = DPO(LossSettings(loss_type="sigmoid", beta=0.1))
    loss = method.window_loss(pairs, scorer.reference_logps(sequences_of(pairs)))
    result = scorer.loss_and_grad(pairs, loss)
    optimizer = AdapterOptimizer(loaded.model, TrainRecipe())
    step = seconds(lambda: list(scorer.loss_and_grad(pairs, loss).grad.values()))
    update = seconds(
        lambda: optimizer.update(result.grad, norm=global_norm(result.grad), learning_rate=1e-9) or mx.array(0)
    )
    print(f"{len(batch.tokens)} tokens, {len(batch.targets)} predictions\n")
    print("| part | ms |\n|---|---|")
    for name, value in (
        ("all layers, forward", body),
        ("of that attention", attention),
        ("head, log-probs only", plain),
        ("head, with its gradient", fused),
        ("forward and backward, two streams", step),
        ("clip and AdamW", update),
    ):
        print(f"| {name} | {1e3 * value:.0f} |")


def attend(batch, config):  # type: ignore[no-untyped-def]
    """Attention of every layer over the packed batch, without its projections."""
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    width = config["hidden_size"] // heads
    tokens = len(batch.tokens)
    queries = mx.ones((tokens, heads, 1, width))
    keys = mx.ones((tokens, kv, 1, width))
    cache = PackedCache(LaneAttention(batch, fused=False))
    return [
        cache.attend(queries, *cache.update_and_fetch(keys, keys), width**-0.5, None)
        for _ in range(config["num_hidden_layers"])
    ]


if __name__ == "__main__":
    main()
