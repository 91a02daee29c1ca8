"""localdpo on the peers' work, through the modules that `localdpo train` is made of.

``python benchmarks/ours.py MODEL PAIRS FIRST COUNT LAYERS``: two epochs over the same rows in the same batches, with
empty caches, so that the first has the reference pass and the hidden states of the trunk in it and the second neither.
Rows come in the order of the file, as the peers take them, so that losses can be compared step by step.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent / "peers")]

import common

from localdpo.core.losses import LossSettings
from localdpo.core.reference import ReferenceCache
from localdpo.data.encode import encode_pairs
from localdpo.data.pairs import read_pairs
from localdpo.dpo.scorer import make_scorer
from localdpo.methods.dpo import DPO
from localdpo.model.load import load_model
from localdpo.model.lora import LoraSettings, attach_lora
from localdpo.recipe import TrainRecipe
from localdpo.sequences import RowValues
from localdpo.train.optimizer import AdapterOptimizer, global_norm


def main() -> None:
    import mlx.core as mx

    work = common.work()
    memory = sys.argv[6] if len(sys.argv) > 6 else "auto"
    loaded = load_model(work.model, memory=memory)  # type: ignore[arg-type]
    attach_lora(
        loaded.model, LoraSettings(rank=common.RANK, scale=common.ALPHA / common.RANK, num_layers=work.layers, seed=0)
    )
    rows = read_pairs(work.pairs).pairs[work.first : work.first + work.count]
    pairs = encode_pairs(rows, loaded.tokenizer, common.MAX_LENGTH, "keep_start").pairs
    method = DPO(LossSettings(loss_type="sigmoid", beta=common.BETA, rpo_alpha=0.0))
    seconds: dict[str, float] = {}
    steps: list[float] = []
    losses: list[float] = []
    tokens = 0
    with tempfile.TemporaryDirectory() as cache:
        scorer = make_scorer(loaded.model)
        begun = time.perf_counter()
        scorer.use_trunk(Path(cache), loaded.fingerprint)
        known = ReferenceCache(Path(cache), loaded.fingerprint, loaded.device).get(scorer, pairs)
        reference = RowValues.of(known, pairs)
        seconds["reference_seconds"] = time.perf_counter() - begun
        optimizer = AdapterOptimizer(loaded.model, TrainRecipe(learning_rate=common.LEARNING_RATE))
        loaded.model.train()
        for _ in range(2):
            for start in range(0, len(pairs), common.BATCH):
                begun = time.perf_counter()
                window = pairs[start : start + common.BATCH]
                known = reference.take(range(start, start + len(window)))
                result = scorer.loss_and_grad(window, method.window_loss(window, known))
                optimizer.update(result.grad, norm=global_norm(result.grad), learning_rate=common.LEARNING_RATE)
                steps.append(time.perf_counter() - begun)
                losses.append(result.loss)
                tokens += result.tokens
    common.report(
        "localdpo", steps, losses, tokens=tokens // 2, mlx_peak=mx.get_peak_memory(), path=scorer.path, **seconds
    )


if __name__ == "__main__":
    main()
