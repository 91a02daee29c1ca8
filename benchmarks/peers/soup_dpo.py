"""soup-cli's MLX DPO trainer; it adapts every layer, so LAYERS is ignored and said so in the result."""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
import time

import common

common.fast_blas()
from soup_cli.config.schema import SoupConfig
from soup_cli.trainer import mlx_dpo

work = common.work()
rows, pairs, model = work.conversations(), os.path.abspath(work.pairs), os.path.abspath(work.model)
targets = [("self_attn." if name[0] in "qkvo" else "mlp.") + name for name in common.TARGETS]
starts: list[float] = []
collate = mlx_dpo.collate_pairs


def timed(examples):
    result = collate(examples)
    starts.append(time.perf_counter())
    return result


mlx_dpo.collate_pairs = timed
home = os.getcwd()
with tempfile.TemporaryDirectory() as out:
    os.chdir(out)
    peer = mlx_dpo.MLXDPOTrainerWrapper(
        SoupConfig.model_validate(
            {
                "base": model,
                "task": "dpo",
                "backend": "mlx",
                "data": {"train": pairs, "format": "dpo", "max_length": common.MAX_LENGTH},
                "output": "out",
                "training": {
                    "epochs": 1,
                    "lr": common.LEARNING_RATE,
                    "batch_size": common.BATCH,
                    "gradient_accumulation_steps": 1,
                    "optimizer": "adamw_torch",
                    "scheduler": "constant",
                    "warmup_ratio": 0.0,
                    "quantization": "none",
                    "dpo_beta": common.BETA,
                    "gradient_checkpointing": False,
                    "logging_steps": 1,
                    "save_steps": 100000,
                    "lora": {"r": common.RANK, "alpha": common.ALPHA, "dropout": 0.0, "target_modules": targets},
                },
            }
        )
    )
    stdout, sys.stdout = sys.stdout, sys.stderr
    peer.setup({"train": rows, "val": []})
    begun = time.perf_counter()
    result = peer.train()
    end = time.perf_counter()
    sys.stdout = stdout
    os.chdir(home)
count = result["total_steps"]
marks = [*starts[-count:], end]
steps = [stop - start for start, stop in itertools.pairwise(marks)]
common.report("soup-cli (MLX)", steps, [float(loss) for loss in result["losses"]], reference_seconds=marks[0] - begun)
