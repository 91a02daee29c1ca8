"""What the tests of exports start from: PEFT's golden adapters, and tiny bases with an adapter on them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import tiny

from localdpo.model.load import load_model
from localdpo.model.lora import LoraSettings, attach_lora, save_adapter
from localdpo.paths import recipes_dir

GOLDEN = Path(__file__).parent / "golden"
PEFT: dict[str, Any] = json.loads((GOLDEN / "peft.json").read_text())
ARRAYS: dict[str, np.ndarray] = dict(np.load(GOLDEN / "peft_arrays.npz"))


def golden_base(folder: Path) -> Path:
    """The golden base as a whole model folder; its tokenizer is there to be copied, not to be used."""
    shutil.copytree(GOLDEN / "model", folder)
    tiny.tiny_tokenizer(folder)
    return folder


def golden_tensors(case: str) -> dict[str, np.ndarray]:
    """PEFT's saved tensors of a case, by PEFT's names."""
    prefix = f"{case}/"
    return {n.removeprefix(prefix): v for n, v in ARRAYS.items() if n.startswith(prefix) and not n.endswith("logits")}


def golden_peft(case: str, folder: Path) -> Path:
    """The adapter folder that PEFT saved."""
    folder.mkdir(parents=True)
    tensors = {name: mx.array(value) for name, value in golden_tensors(case).items()}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors, metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(PEFT["cases"][case]))
    return folder


def golden_logits(case: str) -> np.ndarray:
    return ARRAYS[f"{case}/logits"]


def logits(model: Any) -> np.ndarray:
    """[sequences, tokens, vocabulary] on the golden token ids."""
    return np.array(model(mx.array(PEFT["ids"])))


def tiny_adapter(folder: Path, base: Path, *, quantize: int | None = None, **settings: Any) -> Path:
    """An adapter folder for the model at ``base``, A and B random and non-zero."""
    loaded = load_model(str(base), quantize=quantize)
    info = attach_lora(loaded.model, LoraSettings(**settings))
    tiny.randomise_adapter(loaded.model, seed=3, scale=0.2)
    save_adapter(folder, loaded.model, info, loaded)
    return folder


def athene_run(folder: Path) -> Path:
    """A run of recipes/athene.yaml: that of $LOCALDPO_ATHENE_RUN, or one trained now into ``folder``."""
    given = os.environ.get("LOCALDPO_ATHENE_RUN")
    if given:
        return Path(given)
    command = [sys.executable, "-m", "localdpo", "train", str(recipes_dir() / "athene.yaml"), "--set"]
    subprocess.run([*command, f"output_dir={folder}"], check=True, capture_output=True)
    return folder
