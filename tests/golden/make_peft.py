"""Golden logits from PEFT for adapters that localdpo exports and imports, and Transformers' names of linear layers.

Run it in an environment of its own; it rewrites ``peft.json`` and ``peft_arrays.npz`` beside it:

    python -m venv peft && peft/bin/pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2
    peft/bin/python tests/golden/make_peft.py

It knows nothing about localdpo. The base is ``model/``, the random two-layer Llama that ``make_trl.py`` wrote; PEFT
attaches the adapters, whose A and B are drawn here, both non-zero, and computes every logit.

Files
-----
``peft.json``
    ``cases``: PEFT's adapter_config.json per case; ``ids``: the token ids asked; ``linears``: per model type, the
    linear layers of a two-layer model of Transformers.
``peft_arrays.npz``
    ``<case>/<PEFT's tensor name>`` as saved, and ``<case>/logits`` [sequences, tokens, vocabulary].
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HERE = Path(__file__).resolve().parent
SEED = 7
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "all": {"r": 3, "lora_alpha": 6, "target_modules": ALL},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ALL},
    "subset": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]},
    "top1": {
        "r": 4,
        "lora_alpha": 2,
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
        "layers_to_transform": [1],
    },
    # Not made by localdpo; read by import-adapter.
    "bottom": {"r": 2, "lora_alpha": 4, "target_modules": ["o_proj"], "layers_to_transform": [0]},
    "patterns": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"up_proj": 5},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 3},
    },
}
MODEL_TYPES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "starcoder2",
    "olmo2",
    "cohere",
    "cohere2",
    "granite",
    "smollm3",
    "glm",
    "helium",
    "seed_oss",
    "hunyuan_v1_dense",
]


def run_case(
    settings: dict[str, Any], ids: torch.Tensor, rng: np.random.Generator
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    base = LlamaForCausalLM.from_pretrained(HERE / "model", dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **settings))
    with torch.no_grad():
        for name, value in sorted(model.named_parameters()):
            if "lora_" in name:
                value.copy_(torch.from_numpy(0.2 * rng.standard_normal(tuple(value.shape)).astype(np.float32)))
        logits = model.eval()(ids).logits.numpy()
    with tempfile.TemporaryDirectory() as folder:
        model.peft_config["default"].base_model_name_or_path = "model"
        model.save_pretrained(folder)
        tensors = load_file(Path(folder) / "adapter_model.safetensors")
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
    config["target_modules"] = sorted(config["target_modules"])
    return config, {**tensors, "logits": logits}


def linears(kind: str) -> list[str]:
    """Names of the linear layers inside the blocks of a tiny model of this type."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = CONFIG_MAPPING[kind](**sizes, intermediate_size=96, vocab_size=384, head_dim=16, pad_token_id=0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sorted(name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in name)


def main() -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(SEED)
    ids = rng.integers(3, 128, (3, 12))
    configs, arrays = {}, {}
    for name, settings in CASES.items():
        configs[name], found = run_case(settings, torch.from_numpy(ids), rng)
        arrays |= {f"{name}/{key}": value for key, value in found.items()}
    golden = {
        "versions": {m.__name__: m.__version__.split("+")[0] for m in (torch, transformers, peft)},
        "ids": ids.tolist(),
        "cases": configs,
        "linears": {kind: linears(kind) for kind in MODEL_TYPES},
    }
    (HERE / "peft.json").write_text(json.dumps(golden, separators=(",", ":"), sort_keys=True) + "\n")
    np.savez_compressed(HERE / "peft_arrays.npz", **arrays)


if __name__ == "__main__":
    main()
