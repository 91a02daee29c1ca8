"""mlx-lm-lora's train_dpo. As released it stops on a CPU, where it asks for a Metal working-set size."""

from __future__ import annotations

import os
import tempfile

import common

common.fast_blas()
import mlx.core as mx
import mlx.optimizers as optim

device_info = mx.device_info
mx.device_info = lambda *args: {**device_info(*args), "max_recommended_working_set_size": 10**10}
mx.set_wired_limit = lambda limit: None
from mlx_lm import load
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm_lora.trainer import dpo_trainer
from mlx_lm_lora.trainer.datasets import DPODataset

work = common.work()
model, tokenizer = load(work.model)
reference, _ = load(work.model)
model.freeze()
keys = [("self_attn." if name[0] in "qkvo" else "mlp.") + name for name in common.TARGETS]
linear_to_lora_layers(
    model, work.layers, {"rank": common.RANK, "scale": common.ALPHA / common.RANK, "dropout": 0.0, "keys": keys}
)
dataset = DPODataset(work.rows(), tokenizer)
reports = []


class Recorder:
    def on_train_loss_report(self, info):
        reports.append(info)

    def on_val_loss_report(self, info):
        pass


with tempfile.TemporaryDirectory() as out:
    args = dpo_trainer.DPOTrainingArgs()
    args.batch_size, args.iters, args.steps_per_report = common.BATCH, work.count // common.BATCH, 1
    args.steps_per_eval, args.max_seq_length, args.beta = 10**9, common.MAX_LENGTH, common.BETA
    args.adapter_file = os.path.join(out, "adapter.safetensors")
    dpo_trainer.train_dpo(
        model, reference, optim.AdamW(common.LEARNING_RATE), dataset, dataset, args, training_callback=Recorder()
    )
steps = [1 / report["iterations_per_second"] for report in reports]
common.report("mlx-lm-lora", steps, [float(report["train_loss"]) for report in reports])
