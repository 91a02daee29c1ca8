"""An adapter as a GGUF LoRA file, for llama.cpp and what is built on it, with an Ollama Modelfile beside it.

llama.cpp scales B·A·x by alpha / rank, so the file says the alpha that gives our scale. Llama's attention rotates
interleaved pairs there and two halves here: rows of q and k, which come out of lora_b, change places. Tensor names
are those of the ``gguf`` package, which is an extra. The base is any GGUF of the same model, quantised as one likes.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from shlex import quote
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from localdpo.catalogue import STARTER_NAME
from localdpo.errors import EnvironmentFault, InputError, Problem
from localdpo.export.cards import gguf_card, ollama_model
from localdpo.export.modelfile import modelfile, ollama_name
from localdpo.export.names import require_same_names
from localdpo.export.targets import Job, Written
from localdpo.files import environment_faults, require_space
from localdpo.model.load import OpenModel, load_tokenizer, open_model
from localdpo.model.lora import StoredAdapter, read_adapter
from localdpo.model.starter import GGUF_BYTES, fetch_gguf

ADAPTER_FILE, BASE_FILE = "adapter.gguf", "base.gguf"
_MAGIC = b"GGUF"

ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "smollm3": ("smollm3", True),
    "granite": ("granite", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "gemma": ("gemma", False),
    "gemma2": ("gemma2", False),
    "gemma3_text": ("gemma3", False),
    "phi3": ("phi3", False),
    "starcoder2": ("starcoder2", False),
}
"""model_type -> llama.cpp's name of the architecture, and whether its q and k rows are interleaved there."""


def write(job: Job) -> Written:
    """Write adapter.gguf, Modelfile and a README. Raises EnvironmentFault without the gguf package."""
    model = open_model(job.source.model, quantize=job.source.quantize, notify=job.say)
    architecture, interleaved = _architecture(model)
    gguf = _package()
    stored = read_adapter(job.source.adapter, model.model, model)
    require_same_names(model, stored.weights, "a GGUF adapter")
    _require_base(model, job)
    require_space(job.target, 4 * stored.info.trainable + (2 * GGUF_BYTES if job.options.with_base else 0))
    tensors = gguf_tensors(gguf, architecture, interleaved, model, stored)
    with environment_faults(job.target):
        write_adapter(gguf, job.folder / ADAPTER_FILE, architecture, stored, tensors, job.source.name)
    base = job.options.base or ollama_name(model.spec)
    if job.options.with_base:
        fetch_gguf(job.folder / BASE_FILE, job.say)
        base = f"./{BASE_FILE}"
    text, remark = modelfile(base, ADAPTER_FILE, load_tokenizer(model.files))
    (job.folder / "Modelfile").write_text(text, encoding="utf-8")
    card = gguf_card(job.source, model.source.license, base or "…", ADAPTER_FILE)
    (job.folder / "README.md").write_text(card, encoding="utf-8")
    notes = [remark] if remark else []
    if base is None:
        notes.append("Put the base's GGUF file, or its name in Ollama, after FROM in the Modelfile.")
    return Written(
        next_steps=(
            f"cd {quote(str(job.target))}",
            f"llama-cli -m {'base.gguf' if job.options.with_base else 'BASE.gguf'} --lora {ADAPTER_FILE}",
            f"ollama create {ollama_model(job.source)} -f Modelfile",
        ),
        notes=tuple(notes),
        figures={"architecture": architecture, "tensors": len(tensors), "from": base},
    )


def gguf_tensors(
    gguf: Any, architecture: str, interleaved: bool, model: OpenModel, stored: StoredAdapter
) -> dict[str, npt.NDArray[np.float32]]:
    """GGUF name -> float32 array: ``….lora_a`` [rank, input] and ``….lora_b`` [output, rank]."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], len(model.model.layers))
    config = model.config
    heads = {"q_proj": config["num_attention_heads"], "k_proj": _kv_heads(config)}
    tensors = {}
    for name, value in stored.weights.items():
        path, _, matrix = name.rpartition(".")
        found = names.get_name(f"{path}.weight", try_suffixes=(".weight",))
        if found is None:
            raise InputError(Problem(path, f"has no name in a GGUF of the architecture {architecture}"))
        rows = np.array(value.T.astype(mx.float32))
        part = path.rpartition(".")[2]
        if interleaved and matrix == "lora_b" and part in heads:
            rows = interleave(rows, heads[part])
        tensors[f"{found}.{matrix}"] = np.ascontiguousarray(rows)
    return tensors


def interleave(rows: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Reorder output rows [heads · width, n] from two rotary halves a head to interleaved pairs."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(rows.shape)


def write_adapter(
    gguf: Any,
    path: Path,
    architecture: str,
    stored: StoredAdapter,
    tensors: dict[str, npt.NDArray[np.float32]],
    name: str,
) -> None:
    """Write the file of a LoRA adapter."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, stored.info.scale * stored.info.rank)
    writer.add_name(name)
    for tensor, value in sorted(tensors.items()):
        writer.add_tensor(tensor, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _architecture(model: OpenModel) -> tuple[str, bool]:
    kind = model.config.get("model_type")
    if kind not in ARCHITECTURES:
        raise InputError(
            Problem(
                model.spec,
                f"localdpo has no table of tensor names for a {kind!r} model in GGUF",
                "Use --to fused, then llama.cpp's convert_hf_to_gguf.py",
            )
        )
    return ARCHITECTURES[str(kind)]


def _kv_heads(config: dict[str, Any]) -> int:
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def _require_base(model: OpenModel, job: Job) -> None:
    """Refuse what cannot be: a base that is to be put beside the adapter and is not the starter, or no GGUF file."""
    options = job.options
    if options.with_base and model.spec != STARTER_NAME:
        raise InputError(
            Problem(
                "--with-base",
                f"localdpo has no GGUF of {model.spec}",
                "Leave it out, and name the base's GGUF file or Ollama model by --base",
            )
        )
    if options.base is None:
        return
    if any(character in options.base for character in "\r\n"):
        raise InputError(Problem("--base", "has a line break in it"))
    file = Path(options.base).expanduser()
    if file.is_file():
        with file.open("rb") as opened:
            if opened.read(4) != _MAGIC:
                raise InputError(Problem(f"--base {options.base}", "is not a GGUF file"))


def _package() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise EnvironmentFault(
            Problem("--to gguf", "needs the package gguf, which is not installed", "pip install 'localdpo[gguf]'")
        ) from None
