"""Golden values from TRL for the preference losses, their gradients and a short training run.

Run it in an environment of its own; it rewrites the files beside it:

    python -m venv trl && trl/bin/pip install torch==2.13.0 trl==1.16.0 peft==0.21.2 datasets
    trl/bin/python tests/golden/make_trl.py

It knows nothing about localdpo. TRL's own collators, forwards and losses compute every number here; this
script only draws the random weights and token ids, asks, and writes the answers down.

Files
-----
``model/``
    A random two-layer Llama in fp32: grouped-query attention, untied head, Hugging Face names. The tied
    variant is the same weights without ``lm_head``.
``adapter/``
    LoRA on all seven linear modules, A and B both non-zero, in mlx-lm's form: ``….lora_a`` [in, r],
    ``….lora_b`` [r, out], scale = alpha / r.
``peft/``
    The same adapter as PEFT saves it: ``….lora_A.weight`` [r, in], ``….lora_B.weight`` [out, r].
``trl.json``
    Batches of token ids, settings of the cases, and per variant, case and batch the loss (``losses``: of
    each pair alone), rewards and metrics; the trajectories' figures step by step.
``trl_arrays.npz``
    ``<variant>/<batch>/<policy|reference>/<chosen|rejected>``: log-probs per completion token, rows padded
    with NaN. ``<variant>/<batch>/<case>/grad`` and ``trajectory/<case>/adapter``: flat vectors, the tensors
    of ``adapter/`` in sorted order of name, each in its mlx-lm layout.

What TRL 1.16.0 computes
------------------------
Per pair: a and b are the log-ratios (summed policy minus summed reference log-probs) of the chosen and the
rejected completion, n_c and n_r their token counts, d = a - b, ls = log-sigmoid, s = sigmoid,
e = label_smoothing. Log-probs cover completion tokens only. A batch's loss is the mean over its pairs.

``trl/trainer/dpo_trainer.py``, ``DPOTrainer._compute_loss``; the reference is the base, adapters disabled:

- sigmoid: -ls(beta d). ``label_smoothing`` is ignored.
- ipo: (a / n_c - b / n_r - 1 / (2 beta))^2, each log-ratio divided by its own token count.
- hinge: max(0, 1 - beta d).
- robust: (-(1 - e) ls(beta d) + e ls(-beta d)) / (1 - 2 e).
- sppo_hard: (a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2.
- apo_zero: (1 - s(beta a)) + s(beta b).
- apo_down: s(beta a) + (1 - s(beta d)).
- sft: minus the mean log-prob over all chosen completion tokens of the batch, pooled over its pairs. There is
  no ``rpo_alpha``: ``loss_type=["sigmoid", "sft"], loss_weights=[1, alpha]`` stands in for it.
- aot_unpaired: -(1 - e) ls(beta d') - e ls(-beta d') with a and b sorted over the batch first. One pair
  needs no sorting, so one-pair batches give the label-smoothed sigmoid loss (cDPO); their mean is ``cdpo``.
- rewards: beta a and beta b whatever the loss; accuracy counts beta a > beta b strictly.
- rows carry no weights.

``trl/experimental/cpo/cpo_trainer.py``, ``CPOTrainer.cpo_loss`` and ``get_batch_loss_metrics``, no reference;
m_c and m_r are the mean (not summed) log-probs per completion token:

- simpo: z = beta (m_c - m_r) - gamma; -(1 - e) ls(z) - e ls(-z), plus cpo_alpha times the pooled NLL of sft.
- rewards: beta m_c and beta m_r.

``trl/experimental/orpo/orpo_trainer.py``, ``ORPOTrainer.odds_ratio_loss`` and ``get_batch_loss_metrics``:

- log odds o = (m_c - m_r) - (log(1 - exp m_c) - log(1 - exp m_r)); loss = NLL - beta mean(ls(o)).
- this NLL pools all chosen tokens, the prompt's included. Case ``orpo`` is that loss as it is, ``orpo_odds``
  its second term alone. Prompts of batch ``short`` have one token, which nothing predicts: there the NLL is
  the completion's.
- rewards: beta m_c and beta m_r.

``transformers.Trainer`` clips with torch's ``clip_grad_norm_`` (factor min(1, max_norm / (norm + 1e-6)), norm
reported before clipping) and steps torch's AdamW (bias correction, decoupled weight decay).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import numpy as np
import peft
import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

HERE = Path(__file__).resolve().parent
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SEED = 1
RANK, ALPHA = 3, 6
VOCAB, PAD, BOS, EOS = 128, 0, 1, 2
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "torch_dtype": "float32",
}

# Settings in localdpo's recipe names. Hinge's beta puts pairs on both sides of its corner.
CASES: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss_type": "sigmoid", "beta": 0.1},
    "cdpo": {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.1},
    "ipo": {"loss_type": "ipo", "beta": 0.1},
    "hinge": {"loss_type": "hinge", "beta": 0.4},
    "robust": {"loss_type": "robust", "beta": 0.1, "label_smoothing": 0.1},
    "sppo_hard": {"loss_type": "sppo_hard", "beta": 0.1},
    "apo_zero": {"loss_type": "apo_zero", "beta": 0.1},
    "apo_down": {"loss_type": "apo_down", "beta": 0.1},
    "rpo": {"loss_type": "sigmoid", "beta": 0.1, "rpo_alpha": 0.7},
    "sft": {"loss_type": "sft"},
    "simpo": {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5},
    "simpo_nll": {
        "loss_type": "simpo",
        "beta": 2.0,
        "simpo_gamma": 0.3,
        "label_smoothing": 0.1,
        "rpo_alpha": 0.7,
    },
    "orpo": {"loss_type": "orpo", "beta": 0.4},
    "orpo_odds": {"loss_type": "orpo", "beta": 0.4},
}
# Whole-loss ORPO gradients only where prompts have no tokens to predict; the rest keeps the files small.
GRADIENTS = {
    "untied": {
        "mixed": [name for name in CASES if name != "orpo"],
        "long": ["sigmoid", "ipo", "rpo", "simpo", "orpo_odds"],
        "short": ["orpo"],
    },
    "tied": {"mixed": ["sigmoid"]},
}
TRAJECTORIES: dict[str, dict[str, Any]] = {"sigmoid": CASES["sigmoid"], "rpo": CASES["rpo"]}
TRAINING = {
    "steps": 10,
    "batch_size": 4,
    "learning_rate": 2e-3,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "constant",
}

Pair = dict[str, list[int]]


def draw_base(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random base weights in Hugging Face names; norms differ from 1 so that forgetting one shows."""
    state = LlamaForCausalLM(LlamaConfig(**CONFIG)).state_dict()
    return {
        name: (
            1 + 0.2 * rng.standard_normal(value.shape)
            if "norm" in name
            else rng.standard_normal(value.shape) * (0.3 if "lm_head" in name else 0.25)
        ).astype(np.float32)
        for name, value in state.items()
    }


def draw_adapter(base: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A and B for every linear module, in mlx-lm's names and layout."""
    adapter = {}
    for name, weight in base.items():
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and path.rpartition(".")[2] in MODULES:
            out_dims, in_dims = weight.shape
            adapter[f"{path}.lora_a"] = (0.2 * rng.standard_normal((in_dims, RANK))).astype(np.float32)
            adapter[f"{path}.lora_b"] = (0.1 * rng.standard_normal((RANK, out_dims))).astype(np.float32)
    return dict(sorted(adapter.items()))


def draw_pairs(rng: np.random.Generator, lengths: Sequence[tuple[int, int, int]]) -> list[Pair]:
    """Token ids for (prompt, chosen, rejected) lengths; completions end in EOS, the pad id occurs as text."""

    def ids(count: int) -> list[int]:
        return [int(i) for i in rng.choice([i for i in range(VOCAB) if i not in (BOS, EOS)], count)]

    return [
        {
            "prompt_ids": [BOS, *ids(prompt - 1)],
            "chosen_ids": [*ids(chosen - 1), EOS],
            "rejected_ids": [*ids(rejected - 1), EOS],
        }
        for prompt, chosen, rejected in lengths
    ]


def draw_batches(rng: np.random.Generator) -> dict[str, list[Pair]]:
    """Three batches to score and one to train on; in ``long`` sequences share prefixes."""
    long = draw_pairs(rng, [(12, 20, 15), (12, 11, 18), (14, 16, 20), (13, 19, 6)])
    long[1]["prompt_ids"] = list(long[0]["prompt_ids"])
    long[3]["prompt_ids"][:10] = long[2]["prompt_ids"][:10]
    long[2]["rejected_ids"][:9] = long[2]["chosen_ids"][:9]
    return {
        "mixed": draw_pairs(rng, [(3, 2, 9), (14, 8, 5), (6, 13, 2), (9, 4, 20), (5, 7, 7)]),
        "long": long,
        "short": draw_pairs(rng, [(1, 6, 3), (1, 2, 11), (1, 17, 8), (1, 5, 5)]),
        "train": draw_pairs(rng, [tuple(map(int, rng.integers((3, 2, 2), (15, 21, 21)))) for _ in range(16)]),
    }


def peft_name(name: str) -> str:
    path, _, matrix = name.rpartition(".")
    return f"base_model.model.{path}.lora_{matrix[-1].upper()}.weight"


def flat(tensors: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)]).astype(np.float32)


def tokenizer() -> PreTrainedTokenizerFast:
    """The trainers want one; the batches bypass it."""
    words = {f"t{i}": i for i in range(VOCAB)}
    inner = Tokenizer(models.WordLevel(words, unk_token="t3"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="t0", bos_token="t1", eos_token="t2")


def common_arguments(folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 0,
    }


def parameters(trainer: Any) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters by PEFT's saved name."""
    return {name.replace(".default", ""): value for name, value in trainer.model.named_parameters() if "lora_" in name}


def make_trainer(kind: type, config: Any, base: Path, adapter: dict[str, np.ndarray]) -> Any:
    """A TRL trainer over the golden base whose LoRA holds exactly ``adapter``."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    row = {"prompt": "t5 ", "chosen": "t6 t7", "rejected": "t8"}
    trainer = kind(
        model=model,
        args=config,
        train_dataset=Dataset.from_list([row]),
        processing_class=tokenizer(),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, task_type="CAUSAL_LM", target_modules=MODULES
        ),
    )
    own = parameters(trainer)
    assert {peft_name(name) for name in adapter} == set(own)
    with torch.no_grad():
        for name, value in adapter.items():
            own[peft_name(name)].copy_(torch.from_numpy(value.T.copy()))
    trainer.model.train()
    return trainer


def gradients(trainer: Any, loss: torch.Tensor, names: Sequence[str]) -> dict[str, np.ndarray]:
    trainer.model.zero_grad(set_to_none=True)
    loss.backward()
    own = parameters(trainer)
    return {name: own[peft_name(name)].grad.T.contiguous().numpy() for name in names}


def cpo_row(pair: Pair) -> dict[str, list[int]]:
    """A pair as ``tokenize_row`` of the CPO and ORPO trainers hands it to their collator."""
    row = {"prompt_input_ids": pair["prompt_ids"], "prompt_attention_mask": [1] * len(pair["prompt_ids"])}
    for side in ("chosen", "rejected"):
        ids = pair["prompt_ids"] + pair[f"{side}_ids"]
        row[f"{side}_input_ids"] = ids
        row[f"{side}_attention_mask"] = [1] * len(ids)
        row[f"{side}_labels"] = [-100] * len(pair["prompt_ids"]) + pair[f"{side}_ids"]
    return row


Answer = tuple[torch.Tensor, dict[str, float]]
Question = Callable[[Any, list[Pair]], Answer]


def ask_dpo(trainer: Any, pairs: list[Pair]) -> Answer:
    trainer._metrics["train"].clear()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(pairs))
    metrics = {key: value[-1] for key, value in trainer._metrics["train"].items()}
    return loss, {key: metrics[key] for key in metrics if key.startswith(("rewards/", "logps/"))}


def ask_cdpo(trainer: Any, pairs: list[Pair]) -> Answer:
    answers = [ask_dpo(trainer, [pair]) for pair in pairs]
    metrics = {key: float(np.mean([answer[1][key] for answer in answers])) for key in answers[0][1]}
    return torch.stack([answer[0] for answer in answers]).mean(), metrics


def ask_reference_free(trainer: Any, pairs: list[Pair]) -> Answer:
    batch = trainer.data_collator([cpo_row(pair) for pair in pairs])
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    keys = ("rewards/", "logps/", "nll_loss", "log_odds")
    return loss, {key: float(value) for key, value in metrics.items() if key.startswith(keys)}


def ask_orpo_odds(trainer: Any, pairs: list[Pair]) -> Answer:
    batch = trainer.data_collator([cpo_row(pair) for pair in pairs])
    chosen, rejected, *_ = trainer.concatenated_forward(trainer.model, batch)
    ratios, *_ = trainer.odds_ratio_loss(chosen, rejected)
    return -ratios.mean(), ask_reference_free(trainer, pairs)[1]


def dpo_options(case: dict[str, Any], name: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "beta": case.get("beta", 0.1),
        "label_smoothing": case.get("label_smoothing", 0.0),
    }
    if name == "cdpo":
        return {**options, "loss_type": ["aot_unpaired"]}
    if "rpo_alpha" in case:
        return {**options, "loss_type": [case["loss_type"], "sft"], "loss_weights": [1.0, case["rpo_alpha"]]}
    return {**options, "loss_type": [case["loss_type"]]}


def question(name: str, folder: str) -> tuple[type, Any, Question]:
    """The trainer class, its settings and the way to ask it, for one case."""
    case, common = CASES[name], common_arguments(folder)
    if case["loss_type"] == "simpo":
        config = CPOConfig(
            loss_type="simpo",
            beta=case["beta"],
            simpo_gamma=case["simpo_gamma"],
            label_smoothing=case.get("label_smoothing", 0.0),
            cpo_alpha=case.get("rpo_alpha", 0.0),
            remove_unused_columns=False,
            **common,
        )
        return CPOTrainer, config, ask_reference_free
    if case["loss_type"] == "orpo":
        config = ORPOConfig(beta=case["beta"], remove_unused_columns=False, **common)
        return ORPOTrainer, config, ask_orpo_odds if name == "orpo_odds" else ask_reference_free
    return DPOTrainer, DPOConfig(**dpo_options(case, name), **common), ask_cdpo if name == "cdpo" else ask_dpo


def pools_tokens(name: str) -> bool:
    """Whether the batch's loss is not the mean of its pairs' losses."""
    return "rpo_alpha" in CASES[name] or name in ("sft", "orpo")


def run_case(
    name: str, variant: str, base: Path, adapter: dict[str, np.ndarray], batches: dict[str, list[Pair]]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Loss, per-pair losses, metrics and gradient of one case on each batch."""
    figures, arrays = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        kind, config, ask = question(name, folder)
        trainer = make_trainer(kind, config, base, adapter)
        for batch, pairs in batches.items():
            loss, metrics = ask(trainer, pairs)
            if name in GRADIENTS[variant].get(batch, ()):
                arrays[f"{variant}/{batch}/{name}/grad"] = flat(gradients(trainer, loss, list(adapter)))
            figures[batch] = {"loss": loss.item(), **metrics}
            if not pools_tokens(name):
                figures[batch]["losses"] = [ask(trainer, [pair])[0].item() for pair in pairs]
    return figures, arrays


def token_logps(
    variant: str, base: Path, adapter: dict[str, np.ndarray], batches: dict[str, list[Pair]]
) -> dict[str, np.ndarray]:
    """Completion log-probs per token, by the DPO trainer's collator and fused head, NaN where padded."""
    arrays = {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(DPOTrainer, DPOConfig(**common_arguments(folder)), base, adapter)
        for batch, pairs in batches.items():
            inputs = trainer.data_collator(pairs)
            mask = inputs.pop("completion_mask")
            labels = inputs["input_ids"].masked_fill(mask == 0, -100)

            def forward(inputs: Any = inputs, labels: Any = labels) -> np.ndarray:
                with torch.no_grad():
                    return trainer.model(**inputs, labels=labels, fused_lm_head=True, use_cache=False).log_probs.numpy()

            policy = forward()
            with trainer.model.disable_adapter():
                reference = forward()
            for owner, logps in (("policy", policy), ("reference", reference)):
                for side, half in (
                    ("chosen", slice(None, len(pairs))),
                    ("rejected", slice(len(pairs), None)),
                ):
                    arrays[f"{variant}/{batch}/{owner}/{side}"] = completion_rows(logps[half], mask[half, 1:].numpy())
    return arrays


def completion_rows(logps: np.ndarray, mask: np.ndarray) -> np.ndarray:
    rows = [row[keep.astype(bool)] for row, keep in zip(logps, mask, strict=True)]
    out = np.full((len(rows), max(map(len, rows))), np.nan, np.float32)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return out


class RecordingTrainer(DPOTrainer):
    """Keeps each step's figures unrounded; computes nothing of its own."""

    history: list[dict[str, float]]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.history.append({"loss": loss.item()})
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if "grad_norm" in logs:
            keys = [key for key in logs if key.startswith(("rewards/", "logps/"))]
            self.history[-1].update({key: float(logs[key]) for key in ["grad_norm", *keys]})


def trajectory(
    name: str, base: Path, adapter: dict[str, np.ndarray], pairs: list[Pair]
) -> tuple[list[dict[str, float]], np.ndarray]:
    """Ten optimiser steps over ``pairs`` in order, batch after batch, through ``trainer.train()``."""
    options = {key: value for key, value in TRAINING.items() if key not in ("steps", "batch_size")}
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            **dpo_options(TRAJECTORIES[name], name),
            **options,
            max_steps=TRAINING["steps"],
            per_device_train_batch_size=TRAINING["batch_size"],
            train_sampling_strategy="sequential",
            warmup_steps=0,
            logging_steps=1,
            optim="adamw_torch",
            **common_arguments(folder),
        )
        trainer = make_trainer(RecordingTrainer, config, base, adapter)
        trainer.train_dataset = Dataset.from_list(pairs)
        trainer.history = []
        trainer.train()
        own = parameters(trainer)
        final = {name: own[peft_name(name)].detach().T.contiguous().numpy() for name in adapter}
    return trainer.history, flat(final)


def write_model(folder: Path, base: dict[str, np.ndarray], tied: bool) -> Path:
    folder.mkdir(exist_ok=True)
    tensors = {name: value for name, value in base.items() if not (tied and name == "lm_head.weight")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**CONFIG, "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return folder


def write_adapter(base: Path, adapter: dict[str, np.ndarray]) -> None:
    folder = HERE / "adapter"
    folder.mkdir(exist_ok=True)
    save_file(adapter, folder / "adapters.safetensors", metadata={"format": "mlx"})
    keys = sorted({name.split(".", 3)[3].rpartition(".")[0] for name in adapter})
    settings = {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.0, "keys": keys}
    config = {
        "fine_tune_type": "lora",
        "num_layers": CONFIG["num_hidden_layers"],
        "lora_parameters": settings,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(DPOTrainer, DPOConfig(**common_arguments(scratch)), base, adapter)
        trainer.model.peft_config["default"].base_model_name_or_path = "model"
        trainer.model.save_pretrained(scratch)
        (HERE / "peft").mkdir(exist_ok=True)
        tensors = load_file(Path(scratch) / "adapter_model.safetensors")
        save_file(tensors, HERE / "peft" / "adapter_model.safetensors", metadata={"format": "pt"})
        saved = json.loads((Path(scratch) / "adapter_config.json").read_text())
        saved["target_modules"] = sorted(saved["target_modules"])
        (HERE / "peft" / "adapter_config.json").write_text(json.dumps(saved, indent=1, sort_keys=True) + "\n")


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    rng = np.random.default_rng(SEED)
    base_weights = draw_base(rng)
    adapter = draw_adapter(base_weights, rng)
    batches = draw_batches(rng)
    scored = {name: pairs for name, pairs in batches.items() if name != "train"}
    base = write_model(HERE / "model", base_weights, tied=False)
    write_adapter(base, adapter)

    arrays: dict[str, np.ndarray] = {}
    cases: dict[str, dict[str, Any]] = {"untied": {}, "tied": {}}
    with tempfile.TemporaryDirectory() as scratch:
        tied = write_model(Path(scratch) / "tied", base_weights, tied=True)
        for variant, folder, names, asked in (
            ("untied", base, list(CASES), scored),
            ("tied", tied, ["sigmoid", "simpo"], {"mixed": scored["mixed"]}),
        ):
            arrays.update(token_logps(variant, folder, adapter, asked))
            for name in names:
                cases[variant][name], found = run_case(name, variant, folder, adapter, asked)
                arrays.update(found)
    steps = {}
    for name in TRAJECTORIES:
        steps[name], arrays[f"trajectory/{name}/adapter"] = trajectory(name, base, adapter, batches["train"])

    golden = {
        "versions": {m.__name__: m.__version__.split("+")[0] for m in (torch, transformers, trl, peft)},
        "lora": {"rank": RANK, "scale": ALPHA / RANK},
        "batches": batches,
        "settings": CASES,
        "cases": cases,
        "training": {**TRAINING, "batch": "train", "order": "sequential, wrapping round"},
        "trajectories": steps,
    }
    for tensors in (HERE / "model", HERE / "adapter", HERE / "peft"):
        for file in tensors.glob("*.safetensors"):
            file.chmod(0o644)
    (HERE / "trl.json").write_text(json.dumps(golden, indent=None, separators=(",", ":")) + "\n")
    np.savez_compressed(HERE / "trl_arrays.npz", **arrays)


if __name__ == "__main__":
    main()
