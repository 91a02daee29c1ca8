"""How much memory a run will take, from the model's dimensions alone.

Plain arithmetic: it loads nothing and never imports mlx, so a catalogue, a preflight and the UI can
all ask. The figures are for the peak of a training step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isqrt
from typing import Any, Literal, Protocol

from localdpo.dpo.budget import CALL_COST, CPU_STREAMS, IN_FLIGHT, Mode, block_rows, tokens_alive

Verdict = Literal["safe", "tight", "too big"]

SAFE_SHARE = 0.7
"""Up to this share of the available memory other programs keep enough to stay responsive."""
RUNTIME_BYTES = 210 << 20
"""Python, mlx, the tokenizer, and what malloc cannot give back."""

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


class Dimensions(Protocol):
    """What ``ModelShape.of`` reads from a catalogue entry."""

    @property
    def layers(self) -> int: ...  # noqa: D102
    @property
    def hidden(self) -> int: ...  # noqa: D102
    @property
    def heads(self) -> int: ...  # noqa: D102
    @property
    def kv_heads(self) -> int: ...  # noqa: D102
    @property
    def head_dim(self) -> int: ...  # noqa: D102
    @property
    def intermediate(self) -> int: ...  # noqa: D102
    @property
    def vocab(self) -> int: ...  # noqa: D102
    @property
    def tied(self) -> bool: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The dimensions of a decoder with attention and a gated MLP; ``experts`` of them in a mixture."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = True
    experts: int = 1

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read a config.json, or a multimodal one's ``text_config``. Raises KeyError without the sizes."""
        text = config.get("text_config") or config
        hidden, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
        return cls(
            layers=int(text["num_hidden_layers"]),
            hidden=hidden,
            heads=heads,
            kv_heads=int(text.get("num_key_value_heads") or heads),
            head_dim=int(text.get("head_dim") or hidden // heads),
            intermediate=int(text.get("moe_intermediate_size") or text["intermediate_size"]),
            vocab=int(text["vocab_size"]),
            tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", True))),
            experts=int(text.get("num_local_experts") or text.get("num_experts") or 1),
        )

    @classmethod
    def of(cls, entry: Dimensions) -> ModelShape:
        """The shape of a catalogue entry."""
        names = ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab", "tied")
        return cls(**{name: getattr(entry, name) for name in names})

    def linears(self) -> dict[str, tuple[int, int]]:
        """(input, output) of the linear layers of one block, by their usual names."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = ((self.hidden, query), (self.hidden, key), (self.hidden, key), (query, self.hidden))
        mlp = (
            (self.hidden, self.intermediate),
            (self.hidden, self.intermediate),
            (self.intermediate, self.hidden),
        )
        return dict(zip((*_ATTENTION, *_MLP), (*attention, *mlp), strict=True))

    @property
    def block_parameters(self) -> int:
        """Weights in the matrices of one block."""
        return sum(
            rows * columns * (self.experts if name in _MLP else 1) for name, (rows, columns) in self.linears().items()
        )

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding, and of the head where it has its own."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All weights but norms and biases, which come to less than one in a thousand."""
        return self.layers * self.block_parameters + self.embedding_parameters

    def lora_parameters(self, rank: int, layers: int | None, targets: str | tuple[str, ...]) -> int:
        """Trainable numbers of LoRA at ``rank`` on ``targets`` of the top ``layers`` (None: all)."""
        groups: dict[str, tuple[str, ...]] = {
            "all-linear": _ATTENTION + _MLP,
            "attention": _ATTENTION,
            "mlp": _MLP,
        }
        names = groups.get(targets, (targets,)) if isinstance(targets, str) else targets
        wanted = {name.rsplit(".", 1)[-1] for name in names}
        block = sum(
            rank * (rows + columns) * (self.experts if name in _MLP else 1)
            for name, (rows, columns) in self.linears().items()
            if name in wanted
        )
        return block * min(self.layers if layers is None else layers, self.layers)


@dataclass(frozen=True, slots=True)
class Workload:
    """What a forward and backward pass holds.

    Its ``tokens``, the longest ``context`` one of those attends to, the rows of scores that are alive at once (None:
    those of all tokens), and ``head_tile`` logits at once.
    """

    tokens: int
    context: int
    score_rows: int | None = None
    head_tile: int = 1 << 19

    @classmethod
    def of_step(cls, mode: Mode, window: int, longest: int, heads: int) -> Workload:
        """A step over pairs of ``window`` tokens altogether, the longest of which has ``longest``."""
        tokens = min(window, tokens_alive(mode, longest))
        if mode == "gpu":
            # Short segments share an attention call, with what each must not see masked.
            return cls(tokens, context=longest + 2 * isqrt(CALL_COST["gpu"] // heads), head_tile=1 << 25)
        block = int(block_rows(CALL_COST["cpu"] // heads))
        return cls(tokens, context=longest, score_rows=CPU_STREAMS[mode] * IN_FLIGHT * block)


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes at the peak of a training step, by what they are for."""

    weights: int
    adapters: int
    optimizer: int
    activations: int
    logits: int
    caches: int
    runtime: int = RUNTIME_BYTES

    @property
    def total(self) -> int:
        """Bytes altogether."""
        return sum(asdict(self).values())

    def verdict(self, available: int) -> Verdict:
        """How ``total`` compares with ``available`` bytes: safe, tight, or too big."""
        if self.total > available:
            return "too big"
        return "safe" if self.total <= SAFE_SHARE * available else "tight"

    def to_json(self) -> dict[str, int]:
        """The parts and their total, in bytes."""
        return {**asdict(self), "total": self.total}


def estimate_memory(
    shape: ModelShape,
    workload: Workload,
    *,
    trainable: int,
    lora_layers: int | None = None,
    stored_bits: float = 4.5,
    dense: bool = False,
    compute_bytes: int = 2,
    checkpointing: bool = False,
    weight_bytes: int | None = None,
) -> MemoryEstimate:
    """The peak of a DPO step with ``trainable`` adapter weights in the top ``lora_layers`` blocks.

    ``stored_bits`` a weight as the base is stored (4.5: four bits with a scale and bias for 64),
    ``dense``: held as float32 instead (the fast path of a CPU); ``compute_bytes`` of one activation.
    ``weight_bytes`` is the base as it was measured, where it is loaded already.
    """
    if weight_bytes is None:
        weight_bytes = int(shape.parameters * (4 if dense else stored_bits / 8))
    trained = min(shape.layers if lora_layers is None else lora_layers, shape.layers)
    return MemoryEstimate(
        weights=weight_bytes,
        adapters=2 * 4 * trainable,  # float32, and as many gradients
        optimizer=2 * 4 * trainable,
        activations=_activations(shape, workload, trained, checkpointing) * compute_bytes,
        # Logits, their exponentials and the rows of the head they are made with, a tile at a time.
        logits=4 * 4 * min(workload.head_tile, workload.tokens * shape.vocab),
        caches=_at_work(shape, workload) * compute_bytes,
    )


def estimate_step(
    shape: ModelShape,
    mode: Mode,
    window: int,
    longest: int,
    *,
    trainable: int,
    lora_layers: int | None,
    weight_bytes: int,
    checkpointing: bool,
) -> MemoryEstimate:
    """The peak of a step as a model in ``mode`` runs it, over pairs of ``window`` tokens, the longest ``longest``."""
    return estimate_memory(
        shape,
        Workload.of_step(mode, window, longest, shape.heads),
        trainable=trainable,
        lora_layers=lora_layers,
        compute_bytes=2 if mode == "gpu" else 4,
        checkpointing=checkpointing,
        weight_bytes=weight_bytes,
    )


def _activations(shape: ModelShape, workload: Workload, trained: int, checkpointing: bool) -> int:
    """Numbers that the trained blocks keep for the backward pass.

    With checkpointing a block keeps its input, and the keys and values that streams exchange. What a token keeps was
    fitted, as :func:`_at_work`, to peaks measured on a CPU for three shapes, from 128 to 1,024 tokens a pair
    (docs/benchmarks.md).
    """
    if checkpointing:
        kept = shape.hidden + 2 * shape.kv_heads * shape.head_dim
    else:
        kept = _narrow(shape) + 5 * shape.intermediate // 2 + 2 * shape.heads
    return trained * kept * workload.tokens


def _at_work(shape: ModelShape, workload: Workload) -> int:
    """Numbers of the one block that is at work, forward and backward, and buffers that wait to be used again."""
    rows = workload.tokens if workload.score_rows is None else min(workload.score_rows, workload.tokens)
    scores = shape.heads * workload.context * rows
    return (6 * _narrow(shape) + 9 * shape.intermediate // 2) * workload.tokens + 3 * scores // 2


def _narrow(shape: ModelShape) -> int:
    """Numbers of a token, in one block, that are as wide as the model: four hidden states, query, key and value."""
    return 4 * shape.hidden + (shape.heads + 2 * shape.kv_heads) * shape.head_dim
