"""troy-cli's DPO, as `troy train` calls it, with AdamW for its Adam (the same cost)."""

from __future__ import annotations

import sys
import tempfile
import time

import common

common.fast_blas()
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from troy import train_dpo
from troy.config import TroyConfig

work = common.work()
ends: list[float] = []
losses: list[mx.array] = []
first = [0.0]


class Timed(optim.AdamW):
    def update(self, model, grads):
        super().update(model, grads)
        mx.eval(model.parameters(), self.state)
        ends.append(time.perf_counter())


value_and_grad = nn.value_and_grad
encode = train_dpo._encode_pair


def recorded(model, function):
    inner = value_and_grad(model, function)

    def call(*args):
        out = inner(*args)
        losses.append(out[0][0])
        return out

    return call


def timed_encode(*args):
    out = encode(*args)
    first[0] = time.perf_counter()  # the last encoding ends just before the first step
    return out


train_dpo.optim.Adam = Timed
train_dpo.nn.value_and_grad = recorded
train_dpo._encode_pair = timed_encode
rows = work.rows()
with tempfile.TemporaryDirectory() as out:
    config = TroyConfig.model_validate(
        {
            "base": work.model,
            "task": "dpo",
            "data": {"train": work.pairs},
            "output": out,
            "training": {
                "iters": work.count // common.BATCH,
                "lr": common.LEARNING_RATE,
                "batch_size": common.BATCH,
                "seq_len": common.MAX_LENGTH,
                "lora": {"r": common.RANK, "alpha": float(common.ALPHA), "dropout": 0.0, "layers": work.layers},
                "dpo": {"beta": common.BETA},
            },
        }
    )
    stdout, sys.stdout = sys.stdout, sys.stderr
    train_dpo.run_dpo(config, rows, rows[:1])
    sys.stdout = stdout
steps = [stop - start for start, stop in zip([first[0], *ends], ends, strict=False)]
common.report("troy-cli (MLX)", steps, [float(loss) for loss in losses])
