"""TRL's DPOTrainer with PEFT, float32 on the CPU, two threads."""

from __future__ import annotations

import tempfile
import time

import common
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

torch.set_num_threads(2)
work = common.work()
steps: list[float] = []


class StepTimer(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        steps.append(time.perf_counter() - self.started)


model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32)
depth = model.config.num_hidden_layers
with tempfile.TemporaryDirectory() as out:
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=out,
            per_device_train_batch_size=common.BATCH,
            num_train_epochs=1,
            learning_rate=common.LEARNING_RATE,
            lr_scheduler_type="constant",
            beta=common.BETA,
            max_length=common.MAX_LENGTH,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            gradient_checkpointing=False,
            bf16=False,
            disable_tqdm=True,
            seed=0,
            train_sampling_strategy="sequential",
        ),
        train_dataset=Dataset.from_list(work.conversations()),
        processing_class=AutoTokenizer.from_pretrained(work.model),
        peft_config=LoraConfig(
            r=common.RANK,
            lora_alpha=common.ALPHA,
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
            layers_to_transform=list(range(depth - work.layers, depth)),
            target_modules=common.TARGETS,
        ),
    )
    trainer.add_callback(StepTimer())
    trainer.train()
common.report("TRL + PEFT", steps, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
