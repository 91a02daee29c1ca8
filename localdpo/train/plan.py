"""The preflight: what a run is about to do, before it does it.

Counts are exact; memory is arithmetic over the model's dimensions, and time that arithmetic over a
measured matrix product. This module decides nothing but gradient checkpointing under "auto".
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from typing import Any, Literal

import mlx.core as mx
from mlx.utils import tree_flatten

from localdpo.data.pairs import Skipped
from localdpo.dpo.budget import CPU_STREAMS, mode_of
from localdpo.errors import EnvironmentFault, Problem
from localdpo.model.blas import blas_threads_within
from localdpo.model.device import core_streams, describe_device
from localdpo.model.load import LoadedModel
from localdpo.model.lora import LoraInfo
from localdpo.model.resolve import resolve_model
from localdpo.recipe import Recipe, TrainRecipe
from localdpo.sequences import EncodedRow
from localdpo.train.memory import MemoryEstimate, ModelShape, estimate_step
from localdpo.train.optimizer import warmup_steps

CPU_EFFICIENCY, GPU_EFFICIENCY = 0.45, 0.3
"""The share of a plain matrix product's speed that a training step reaches."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do. ``seconds`` is a rough guess at its steps, None where there is nothing to go by.

    ``rows`` are preference and retain rows together, the rows of an epoch; ``tokens_per_epoch``
    counts every prompt once with both answers. ``lengths`` is a histogram of the rows' tokens: the
    largest length of each bin, all of one width, and how many rows are in it.
    """

    model: str
    device: str
    memory_mode: str
    parameters: int
    trainable_parameters: int
    train_pairs: int
    held_out_pairs: int
    retain_prompts: int
    probes: int
    rows_per_step: int
    epochs: float
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    tokens_per_epoch: int
    longest_tokens: int
    truncated: int
    gradient_checkpointing: bool
    memory: MemoryEstimate | None
    memory_available: int
    seconds: float | None
    skipped: tuple[Skipped, ...] = ()
    warnings: tuple[Problem, ...] = ()
    loss: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[tuple[int, int], ...] = ()

    @property
    def memory_verdict(self) -> Literal["safe", "tight", "too big", "unknown"]:
        """How the estimate compares with the memory available now."""
        return "unknown" if self.memory is None else self.memory.verdict(self.memory_available)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values, for the start event."""
        plain = {name: getattr(self, name) for name in self.__slots__}
        return plain | {
            "memory": None if self.memory is None else self.memory.to_json(),
            "memory_verdict": self.memory_verdict,
            "lengths": [list(bin) for bin in self.lengths],
            "skipped": [{"source": row.source, "line": row.line, "reason": row.reason} for row in self.skipped],
            "warnings": [
                {"where": problem.where, "message": problem.message, "fix": problem.fix} for problem in self.warnings
            ],
        }


def total_steps(settings: TrainRecipe, steps_per_epoch: int) -> int:
    """``max_steps`` when it is given, else ``num_train_epochs`` of steps, a part of an epoch rounded up."""
    if settings.max_steps > 0:
        return settings.max_steps
    return max(1, ceil(settings.num_train_epochs * steps_per_epoch - 1e-9))


def rows_per_step(settings: TrainRecipe) -> int:
    """Rows of one optimizer step: the batch size times the accumulation."""
    return settings.per_device_train_batch_size * settings.gradient_accumulation_steps


def make_plan(
    recipe: Recipe,
    loaded: LoadedModel,
    info: LoraInfo,
    train: Sequence[EncodedRow],
    *,
    held_out: int,
    retain_tokens: Sequence[int],
    probes: int,
    truncated: int,
    skipped: Sequence[Skipped],
    warnings: Sequence[Problem],
) -> Plan:
    """Put the plan together; ``retain_tokens`` are the tokens each retain row is expected to have."""
    lengths = [pair.num_tokens for pair in train] + list(retain_tokens)
    settings = recipe.train
    window = rows_per_step(settings)
    per_epoch = ceil(len(lengths) / window)
    steps = total_steps(settings, per_epoch)
    shape = _shape(loaded)
    available = describe_device().memory_available + _weight_bytes(loaded)
    checkpointing, memory = _fit_memory(recipe, loaded, info, shape, lengths, available)
    tokens = sum(lengths)
    return Plan(
        model=loaded.spec,
        device=loaded.device,
        memory_mode=loaded.memory,
        parameters=loaded.num_parameters,
        trainable_parameters=info.trainable,
        train_pairs=len(train),
        held_out_pairs=held_out,
        retain_prompts=len(retain_tokens),
        probes=probes,
        rows_per_step=min(window, len(lengths)),
        epochs=steps / per_epoch,
        steps_per_epoch=per_epoch,
        total_steps=steps,
        warmup_steps=warmup_steps(settings, steps),
        tokens_per_epoch=tokens,
        longest_tokens=max(lengths),
        truncated=truncated,
        gradient_checkpointing=checkpointing,
        memory=memory,
        memory_available=available,
        seconds=_seconds(loaded, info, shape, tokens * steps / per_epoch, checkpointing),
        skipped=tuple(skipped),
        warnings=tuple(warnings),
        loss=recipe.dpo.model_dump(mode="json"),
        lengths=length_histogram(lengths),
    )


def length_histogram(lengths: Sequence[int], most: int = 12) -> tuple[tuple[int, int], ...]:
    """At most ``most`` bins of one round width (1, 2 or 5 times a power of ten): upper edge, number of rows."""
    if not lengths:
        return ()
    widths = (factor * 10**power for power in range(9) for factor in (1, 2, 5))
    width = next(width for width in widths if ceil(max(lengths) / width) <= most)
    counts = Counter(ceil(length / width) for length in lengths)
    return tuple((number * width, counts[number]) for number in range(min(counts), max(counts) + 1))


def require_memory(plan: Plan) -> None:
    """Raise EnvironmentFault when the run cannot fit into this machine at all."""
    if plan.memory is None or plan.memory.total <= describe_device().memory_total:
        return
    total, device = plan.memory.total / 1e9, describe_device().memory_total / 1e9
    raise EnvironmentFault(
        Problem(
            "memory",
            f"this run would need about {total:.1f} GB, and the machine has {device:.1f} GB",
            "Lower train.per_device_train_batch_size, data.max_length or lora.num_layers, set "
            "train.gradient_checkpointing or train.memory to save memory, or choose a smaller model",
        )
    )


def require_memory_to_load(recipe: Recipe) -> None:
    """Raise EnvironmentFault when the weights alone are larger than the machine's memory."""
    files = resolve_model(recipe.model).path.glob("*.safetensors")
    weights, memory = sum(file.stat().st_size for file in files), describe_device().memory_total
    if weights <= memory or recipe.quantize is not None:
        return
    raise EnvironmentFault(
        Problem(
            "memory",
            f"the weights of {recipe.model} are {weights / 1e9:.1f} GB, and the machine has {memory / 1e9:.1f} GB",
            "Choose a smaller or a quantised model; `localdpo models` lists some",
        )
    )


def _shape(loaded: LoadedModel) -> ModelShape | None:
    try:
        return ModelShape.from_config(loaded.config)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _weight_bytes(loaded: LoadedModel) -> int:
    flat: Any = tree_flatten(loaded.model.parameters())
    return sum(int(value.nbytes) for _, value in flat)


def _fit_memory(
    recipe: Recipe,
    loaded: LoadedModel,
    info: LoraInfo,
    shape: ModelShape | None,
    lengths: Sequence[int],
    available: int,
) -> tuple[bool, MemoryEstimate | None]:
    """Whether to checkpoint gradients, and the estimate with that."""
    asked = recipe.train.gradient_checkpointing
    if shape is None:
        return asked is True, None
    estimate = partial(
        estimate_step,
        shape,
        mode_of(loaded.device, loaded.memory),
        window=sum(sorted(lengths)[-rows_per_step(recipe.train) :]),
        longest=max(lengths),
        trainable=info.trainable,
        lora_layers=info.num_layers,
        weight_bytes=_weight_bytes(loaded),
    )
    checkpointing = asked is True or (asked == "auto" and estimate(checkpointing=False).verdict(available) != "safe")
    return checkpointing, estimate(checkpointing=checkpointing)


def _seconds(
    loaded: LoadedModel, info: LoraInfo, shape: ModelShape | None, tokens: float, checkpointing: bool
) -> float | None:
    if shape is None:
        return None
    # Forward and backward through the trained blocks: two operations a weight each. What is below them runs once
    # a run and is left out; the weights are frozen, so the backward pass has the gradient of activations only.
    passes = 3 if checkpointing else 2
    operations = 2 * tokens * (info.num_layers * shape.block_parameters * passes + 2 * shape.vocab * shape.hidden)
    efficiency = CPU_EFFICIENCY if loaded.device == "cpu" else GPU_EFFICIENCY
    return operations / (efficiency * _matmul_speed(shape, loaded.device))


def _matmul_speed(shape: ModelShape, device: str) -> float:
    """Operations a second of products of the model's own width, as a step runs them; the best of three."""
    dtype = mx.float32 if device == "cpu" else mx.float16
    left = mx.ones((512, shape.hidden), dtype=dtype)
    right = mx.ones((shape.hidden, 2 * shape.intermediate), dtype=dtype)
    mx.eval(left, right)
    best = float("inf")
    lanes = core_streams(CPU_STREAMS["cpu"])
    with blas_threads_within(1):
        for _ in range(3):
            began = time.perf_counter()
            mx.eval([mx.matmul(left, right, stream=lane) for lane in lanes])
            best = min(best, time.perf_counter() - began)
    return len(lanes) * 2 * 512 * shape.hidden * 2 * shape.intermediate / best
