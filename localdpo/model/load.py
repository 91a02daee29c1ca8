"""Load a model and its tokenizer from a checked folder, ready to compute on this machine.

On a CPU the frozen base computes in float32 (``frozen``) through a fast BLAS (``blas``); on a GPU mlx-lm's layers
stay as they are. The fingerprint names the base by content, whatever the folder, sharding or device. It knows
nothing about adapters, data or training.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import psutil
from mlx.utils import tree_flatten
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from localdpo.data.encode import check_template
from localdpo.errors import EnvironmentFault, InputError, Problem
from localdpo.files import atomic_write, write_json
from localdpo.model.blas import enable_fast_blas
from localdpo.model.device import keep_no_freed_buffers, on_cpu, prepare_device
from localdpo.model.frozen import compute_in_float32
from localdpo.model.resolve import ModelSource, Notify, resolve_model
from localdpo.model.safety import (
    ModelFiles,
    TensorEntry,
    check_model_folder,
    config_parts,
    foreign_quantisation,
    foreign_quantisation_problem,
    read_json,
)
from localdpo.paths import cache_dir

Memory = Literal["auto", "fast", "lean"]
QUANTIZE_BITS = (2, 3, 4, 6, 8)
QUANTIZE_GROUP = 64
FAST_SHARE = 0.5  # of the available memory that dense weights may take before "auto" turns lean


@dataclass
class LoadedModel:
    """A model ready to run.

    ``quantization`` is how the base is stored (None when it is not quantised), ``memory`` how a CPU computes it:
    "fast" or "lean"; "native" on a GPU. ``fingerprint`` identifies the base by content, the same on every machine.
    """

    model: nn.Module
    tokenizer: TokenizerWrapper
    config: dict[str, Any]
    path: Path
    fingerprint: str
    num_parameters: int
    device: str
    source: ModelSource
    quantization: dict[str, Any] | None
    memory: Literal["fast", "lean", "native"]

    @property
    def spec(self) -> str:
        """The model as the user named it."""
        return self.source.spec


def load_model(
    spec: str,
    *,
    quantize: int | None = None,
    memory: Memory = "auto",
    dtype: mx.Dtype | None = None,
    notify: Notify | None = None,
) -> LoadedModel:
    """Resolve, check and load a model.

    ``quantize`` packs an unquantised model into that many bits at load; ``dtype`` casts what is stored in
    floating point (on a GPU only: a CPU computes in float32); ``notify`` receives a sentence before a download.
    Raises InputError for a model that is damaged, unsafe, not supported by mlx-lm, or already quantised
    otherwise; EnvironmentFault when it cannot be fetched.
    """
    source = resolve_model(spec, notify)
    files = check_model_folder(source.path)
    if on_cpu():
        enable_fast_blas()
    prepare_device()
    model, config = _build(files)
    added_bits = None if config.get("quantization") else quantize
    if quantize is not None:
        config = _quantise(model, config, quantize, str(source.path))
    parameters = int(mlx_lm_utils.get_total_parameters(model))
    own_fingerprint = fingerprint(files, added_bits)
    _require_finite(model, files, own_fingerprint)
    used = _place(model, parameters, memory, dtype)
    tokenizer = load_tokenizer(files)
    tokenizer.embedding_rows = _embedding_rows(config)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        config=config,
        path=source.path,
        fingerprint=own_fingerprint,
        num_parameters=parameters,
        device="cpu" if on_cpu() else "gpu",
        source=source,
        quantization=config.get("quantization"),
        memory=used,
    )


@dataclass
class OpenModel:
    """A model whose weights are still on disk: each array is read when it is computed with, or never.

    For what needs names, shapes or one layer at a time. ``quantized_at_load`` are the bits that an unquantised
    model is packed into, layer by layer as it is read.
    """

    model: nn.Module
    config: dict[str, Any]
    files: ModelFiles
    source: ModelSource
    quantized_at_load: int | None

    @property
    def spec(self) -> str:
        """The model as the user named it."""
        return self.source.spec

    @cached_property
    def fingerprint(self) -> str:
        """The same as that of the loaded model."""
        return fingerprint(self.files, self.quantized_at_load)


def open_model(spec: str, *, quantize: int | None = None, notify: Notify | None = None) -> OpenModel:
    """Resolve and check a model like :func:`load_model`, and read none of its weights. Raises the same."""
    source = resolve_model(spec, notify)
    files = check_model_folder(source.path)
    model, config = _build(files)
    added_bits = None if config.get("quantization") else quantize
    if quantize is not None:
        config = _quantise(model, config, quantize, str(source.path))
    model.eval()
    return OpenModel(model, config, files, source, added_bits)


def load_tokenizer(files: ModelFiles) -> TokenizerWrapper:
    """The tokenizer of a checked folder, without running any code from it. Raises InputError."""
    where = str(files.path)
    try:
        config = mlx_lm_utils.load_config(files.path)
        tokenizer: TokenizerWrapper = mlx_lm_utils.load_tokenizer(
            files.path,
            {"trust_remote_code": False, **_template_of_old(files)},
            eos_token_ids=config.get("eos_token_id"),
        )
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of the Rust library is no Exception
        raise InputError(Problem(where, f"its tokenizer cannot be loaded ({_line(error)})")) from error
    template = tokenizer.chat_template
    for text in template.values() if isinstance(template, dict) else (template,):
        if isinstance(text, str):
            check_template(text, where)
    return tokenizer


def _template_of_old(files: ModelFiles) -> dict[str, str]:
    """The template in chat_template.json, where nothing newer holds one: transformers passes over that file."""
    named = {path.name: path for path in files.tokenizer_files}
    settings = read_json(named["tokenizer_config.json"]) if "tokenizer_config.json" in named else {}
    if "chat_template.json" not in named or "chat_template.jinja" in named or settings.get("chat_template"):
        return {}
    template = read_json(named["chat_template.json"]).get("chat_template")
    return {"chat_template": template} if isinstance(template, str) else {}


def choose_memory(parameters: int, memory: Memory) -> Literal["fast", "lean"]:
    """``fast`` when ``parameters`` float32 numbers take at most half of the memory available now."""
    if memory != "auto":
        return memory
    return "fast" if 4 * parameters <= FAST_SHARE * psutil.virtual_memory().available else "lean"


def fingerprint(files: ModelFiles, quantize: int | None = None) -> str:
    """sha256 over config, tensors and tokenizer: equal for the same model on any machine and in any sharding.

    ``quantize``: the bits an unquantised model was packed into at load, which makes it another base.
    """
    digest = hashlib.sha256(json.dumps(files.config, sort_keys=True).encode())
    tensors: dict[str, str] = {}
    for path, entries in files.tensors.items():
        tensors.update(_tensor_digests(path, entries))
    digest.update(json.dumps(tensors, sort_keys=True).encode())
    for path in sorted(files.tokenizer_files):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    if quantize is not None:
        digest.update(f"quantize={quantize}/{QUANTIZE_GROUP}".encode())
    return digest.hexdigest()


def _build(files: ModelFiles) -> tuple[nn.Module, dict[str, Any]]:
    try:
        model, config = mlx_lm_utils.load_model(files.path, lazy=True, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # every model of mlx-lm reads the config in its own way, and fails in its own way
        model_type = files.config.get("model_type")
        method = foreign_quantisation(files.config)
        if method is not None:
            raise InputError(foreign_quantisation_problem(method, str(files.path), _line(error))) from error
        raise InputError(
            Problem(
                str(files.path),
                f"mlx-lm cannot load this {model_type!r} model ({_line(error)})",
                "Check that the weights belong to config.json, or update mlx-lm",
            )
        ) from error
    model.freeze()
    return model, config


def _require_finite(model: nn.Module, files: ModelFiles, key: str) -> None:
    """Raise InputError for weights, scales or biases that are infinite or NaN; asked once for each base."""
    sound = cache_dir() / "digests" / f"finite-{key[:32]}"
    if sound.exists():
        return
    flat: Any = tree_flatten(model.parameters())
    bad = [name for name, value in flat if _holds_floats(value) and not mx.all(mx.isfinite(value)).item()]
    if bad:
        stored = {name: path for path, entries in files.tensors.items() for name in entries}
        fix = "The file is damaged: download or copy it again, or take another version of the model"
        raise InputError(
            *(
                Problem(str(stored.get(name, files.path)), f"{name} holds values that are not finite", fix)
                for name in bad[:10]
            )
        )
    with suppress(OSError, EnvironmentFault):  # a cache that cannot be written only costs time
        sound.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(sound, "")


def _holds_floats(value: mx.array) -> bool:
    return bool(mx.issubdtype(value.dtype, mx.floating))


def _embedding_rows(config: dict[str, Any]) -> int | None:
    """How many ids the model has an embedding of, which the weights are held to when they are loaded."""
    for part in config_parts(config):
        rows = part.get("vocab_size")
        if isinstance(rows, int):
            return rows
    return None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _quantise(model: nn.Module, config: dict[str, Any], bits: int, where: str) -> dict[str, Any]:
    stored = config.get("quantization")
    if stored:
        if stored.get("bits") == bits:
            return config
        raise InputError(
            Problem(
                where, f"is already quantised to {stored.get('bits')} bits; quantize: {bits} cannot change that",
                "Leave out 'quantize', or name an unquantised version of the model",
            )
        )  # fmt: skip
    if bits not in QUANTIZE_BITS:
        raise InputError(Problem("quantize", f"{bits} is not one of {', '.join(map(str, QUANTIZE_BITS))}"))
    quantization: dict[str, Any] = {"group_size": QUANTIZE_GROUP, "bits": bits}
    rule = getattr(model, "quant_predicate", None)  # some models keep parts, such as routers, more precise

    def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % QUANTIZE_GROUP:
            return False
        chosen: bool | dict[str, Any] = rule(path, module) if rule else True
        if isinstance(chosen, dict):
            quantization[path] = chosen
        return chosen

    nn.quantize(model, QUANTIZE_GROUP, bits, class_predicate=choose)
    model.freeze()  # the new layers' scales and biases too
    return config | {"quantization": quantization, "quantization_config": quantization}


def _place(
    model: nn.Module, parameters: int, memory: Memory, dtype: mx.Dtype | None
) -> Literal["fast", "lean", "native"]:
    model.eval()
    if not on_cpu():
        if dtype is not None:
            model.set_dtype(dtype)
        mx.eval(model.parameters())
        return "native"
    chosen = choose_memory(parameters, memory)
    if chosen == "lean":
        keep_no_freed_buffers()
    compute_in_float32(model, chosen)
    return chosen


def _tensor_digests(path: Path, entries: dict[str, TensorEntry]) -> dict[str, str]:
    """Tensor name -> digest of its dtype, shape and bytes; remembered while the file's size and time stay."""
    status = path.stat()
    state = [status.st_size, status.st_mtime_ns]
    memo = cache_dir() / "digests" / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]}.json"
    try:
        stored = json.loads(memo.read_text(encoding="utf-8"))
        if stored["state"] == state and set(stored["tensors"]) == set(entries):
            return dict(stored["tensors"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    digests = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        view = memoryview(data)
        for name, entry in entries.items():
            digest = hashlib.sha256(f"{entry.dtype}{list(entry.shape)}".encode())
            with view[entry.start : entry.end] as part:
                digest.update(part)
            digests[name] = digest.hexdigest()
        view.release()
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_json(memo, {"state": state, "tensors": digests})
    except (OSError, EnvironmentFault):  # a cache that cannot be written only costs time
        pass
    return digests
