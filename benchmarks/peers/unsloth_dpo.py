"""unsloth-zoo's MLXDPOTrainer with its fastest options on a CPU: not compiled, reference precomputed."""

from __future__ import annotations

import os
import sys
import tempfile
import time

import common

common.fast_blas()
os.environ.setdefault("UNSLOTH_ZOO_DISABLE_GPU_INIT", "1")  # else the package wants torch where there is no Apple GPU
os.environ.setdefault("HF_HUB_OFFLINE", "1")
from datasets import Dataset
from unsloth_zoo.mlx import trainer as zoo
from unsloth_zoo.mlx.loader import FastMLXModel

work = common.work()
stdout, sys.stdout = sys.stdout, sys.stderr
model, tokenizer = FastMLXModel.from_pretrained(
    work.model, max_seq_length=common.MAX_LENGTH, dtype="float32", load_in_4bit=False, text_only=True
)
model = FastMLXModel.get_peft_model(
    model,
    r=common.RANK,
    lora_alpha=common.ALPHA,
    lora_dropout=0,
    target_modules=common.TARGETS,
    use_gradient_checkpointing=False,
    max_seq_length=common.MAX_LENGTH,
    finetune_last_n_layers=None if work.layers >= len(model.layers) else work.layers,
)
marks: list[tuple[float, float]] = []
with tempfile.TemporaryDirectory() as out:
    trainer = zoo.MLXDPOTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=Dataset.from_list(work.conversations()),
        args=zoo.MLXDPOConfig(
            per_device_train_batch_size=common.BATCH,
            gradient_accumulation_steps=1,
            max_steps=work.count // common.BATCH,
            num_train_epochs=-1,
            warmup_steps=0,
            learning_rate=common.LEARNING_RATE,
            lr_scheduler_type="constant",
            optim="adamw",
            weight_decay=0.0,
            logging_steps=1,
            output_dir=out,
            beta=common.BETA,
            loss_type="sigmoid",
            max_length=common.MAX_LENGTH,
            max_prompt_length=None,
            max_seq_length=common.MAX_LENGTH,
            preserve_dataset_order=True,
            use_cce=True,
            compile=False,
            gradient_checkpointing=False,
            precompute_ref_log_probs=True,
        ),
    )
    trainer.add_step_callback(lambda *a, **k: marks.append((a[2], a[6])))  # loss, seconds since the first step began
    begun = time.perf_counter()
    trainer.train()
    total = time.perf_counter() - begun
sys.stdout = stdout
ends = [mark[1] for mark in marks]
steps = [end - start for start, end in zip([0.0, *ends], ends, strict=False)]
common.report("unsloth-zoo (MLX)", steps, [float(mark[0]) for mark in marks], reference_seconds=total - ends[-1])
