"""LoRA adapters on a frozen base: attach, switch off exactly, save and load in mlx-lm's format.

The modules are mlx-lm's own (``mlx_lm.tuner.lora``), so an adapter folder works with ``mlx_lm.generate
--adapter-path`` and a folder made by ``mlx_lm.lora`` works here. LoRA: Hu et al. 2021, arXiv:2106.09685;
rank-stabilised scale: Kalajdzievski 2023, arXiv:2312.03732. It knows nothing about losses or optimizers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

from localdpo import __version__
from localdpo.errors import InputError, Problem
from localdpo.files import array_faults, atomic_folder
from localdpo.model.frozen import linear_dims
from localdpo.model.load import LoadedModel
from localdpo.model.safety import TensorEntry, read_json, read_safetensors_header

WEIGHTS_FILE, CONFIG_FILE = "adapters.safetensors", "adapter_config.json"
ATTENTION_PARTS = frozenset({"self_attn", "attn", "attention", "self_attention", "linear_attn"})
MLP_PARTS = frozenset({"mlp", "feed_forward", "ffn", "moe", "block_sparse_moe"})
ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})

_LORA_TYPES = (LoRALinear, LoRASwitchLinear, LoRAEmbedding)
_SWITCH_TYPES = (SwitchLinear, QuantizedSwitchLinear)
_LINEAR_TYPES = (nn.Linear, nn.QuantizedLinear, *_SWITCH_TYPES)


@dataclass(frozen=True)
class LoraSettings:
    """What to attach.

    rank: columns of A. scale: what B·A·x is multiplied by, alpha/rank (``lora_scale``). dropout: probability on
    A's input. target_modules: "all-linear", "attention", "mlp", or module names ("q_proj", "self_attn.q_proj").
    num_layers: the top n layers, None for all. seed: of A's initial values; B starts at 0.
    """

    rank: int = 8
    scale: float = 2.0
    dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    num_layers: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class LoraInfo:
    """What is attached: module names relative to a layer, how many top layers, and the trainable count."""

    rank: int
    scale: float
    dropout: float
    num_layers: int
    keys: tuple[str, ...]
    trainable: int


class Base(Protocol):
    """A base an adapter can belong to: loaded, or only opened."""

    @property
    def spec(self) -> str:
        """The model as the user named it."""

    @property
    def fingerprint(self) -> str:
        """What identifies it by content."""


def lora_scale(alpha: float, rank: int, use_rslora: bool = False) -> float:
    """alpha/rank, or alpha/sqrt(rank) for rank-stabilised LoRA."""
    return alpha / (rank**0.5 if use_rslora else rank)


class FastLoRALinear(LoRALinear):
    """mlx-lm's LoRALinear with fewer temporaries: the same function in float32, within rounding."""

    def __call__(self, x: mx.array) -> mx.array:
        """x: [..., input] -> [..., output] = W x + scale · B A dropout(x)."""
        if x.dtype != mx.float32:  # mixed precision: follow mlx-lm's order of casts exactly
            return cast(mx.array, super().__call__(x))  # type: ignore[no-untyped-call]
        # Flat: MLX flattens a product's leading axes but not addmm's, which would become a product a token.
        rows = x.reshape(-1, x.shape[-1])
        y: mx.array = self.linear(rows)
        out = mx.addmm(y, self.dropout(rows) @ self.lora_a, self.lora_b, alpha=self.scale)
        return out.reshape(*x.shape[:-1], -1)


def attach_lora(model: nn.Module, settings: LoraSettings) -> LoraInfo:
    """Freeze ``model`` and put LoRA modules into its top layers; only ``lora_a`` and ``lora_b`` train.

    "all-linear" means every linear layer inside the transformer layers, expert layers of a mixture included; its
    routers only when named, because a router trained on few pairs unbalances the experts. Embeddings and the
    vocabulary head are never adapted. Raises InputError when a name matches nothing, or adapters are already on.
    """
    if _lora_modules(model):
        raise InputError(Problem("lora", "the model already has an adapter attached"))
    layers = _top_layers(model, settings.num_layers)
    keys = _select_keys(layers, settings.target_modules)
    return _attach(model, layers, keys, settings)


def _attach(model: nn.Module, layers: Sequence[nn.Module], keys: Sequence[str], settings: LoraSettings) -> LoraInfo:
    modules = _adapter_modules(model, layers, keys)
    model.freeze()
    random_keys = mx.random.split(mx.random.key(settings.seed), len(modules))
    for number, (name, module) in enumerate(modules):
        lora = _wrap(module, settings, random_keys[number])
        lora.train(model.training)  # a new module trains: its dropout would be on in a model that answers
        model.update_modules(tree_unflatten([(name, lora)]))
    trainable = sum(value.size for value in adapter_weights(model).values())
    mx.eval(model.trainable_parameters())
    return LoraInfo(settings.rank, settings.scale, settings.dropout, len(layers), tuple(keys), trainable)


def detach_lora(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Take every LoRA module out, leaving exactly the base; ``reattach_lora`` puts what is returned back."""
    modules = _lora_modules(model)
    _swap(model, [(name, _base(module)) for name, module in modules])
    return modules


def reattach_lora(model: nn.Module, modules: list[tuple[str, nn.Module]]) -> None:
    """Put modules that ``detach_lora`` took out of this very model back, in place of an adapter that is on."""
    detach_lora(model)
    _swap(model, modules)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within the block ``model`` is exactly its base: every LoRA module is swapped for the layer it wraps.

    Scale 0 would not do: a compiled function has the scale baked in, and DoRA differs from its base even then.
    Safe to nest and to leave by an exception. Raises InputError for DoRA.
    """
    modules = detach_lora(model)
    try:
        yield
    finally:
        _swap(model, modules)


def adapter_weights(model: nn.Module) -> dict[str, mx.array]:
    """The adapter's arrays by full name: ``….lora_a`` [input, rank] and ``….lora_b`` [rank, output]."""
    arrays = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    return {name: value for name, value in arrays if name.endswith((".lora_a", ".lora_b"))}


def save_adapter(folder: str | Path, model: nn.Module, info: LoraInfo, base: LoadedModel | None = None) -> None:
    """Write an adapter folder for mlx-lm, whole or not at all; ``base`` adds what the adapter belongs to."""
    belongs = {} if base is None else {"model": base.spec, "base_fingerprint": base.fingerprint}
    write_adapter(folder, adapter_weights(model), info, belongs)


def write_adapter(
    folder: str | Path, weights: dict[str, mx.array], info: LoraInfo, extra: Mapping[str, Any] | None = None
) -> None:
    """Write the adapter folder of ``weights`` (named as in :func:`adapter_weights`), whole or not at all.

    ``extra`` are further keys of its config, such as the base it belongs to: mlx-lm ignores those it does not know.
    """
    config: dict[str, Any] = {
        "fine_tune_type": "lora",
        "num_layers": info.num_layers,
        "lora_parameters": {
            "rank": info.rank,
            "scale": info.scale,
            "dropout": info.dropout,
            "keys": list(info.keys),
        },
        "localdpo_version": __version__,
        **(extra or {}),
    }
    with array_faults(Path(folder)), atomic_folder(folder) as temporary:
        mx.save_safetensors(str(temporary / WEIGHTS_FILE), weights, metadata={"format": "mlx"})
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_adapter(
    folder: str | Path, loaded: LoadedModel, *, any_base: bool = False, dropout: float | None = None
) -> LoraInfo:
    """Put the adapter of ``folder`` on the model, in place of one that is attached.

    Everything is validated before the model is touched: the config, the base's fingerprint (``any_base`` skips
    it), the file's header, that no tensor is missing, extra or misshapen, and that all values are finite.
    ``dropout`` replaces the stored one, for training on. Raises InputError.
    """
    stored = read_adapter(folder, loaded.model, None if any_base else loaded)
    info = stored.info if dropout is None else replace(stored.info, dropout=dropout)
    detach_lora(loaded.model)
    settings = LoraSettings(info.rank, info.scale, info.dropout, info.keys, info.num_layers)
    attached = _attach(loaded.model, _top_layers(loaded.model, info.num_layers), info.keys, settings)
    loaded.model.update(tree_unflatten(list(stored.weights.items())))
    mx.eval(loaded.model.parameters())
    return attached


@dataclass(frozen=True)
class StoredAdapter:
    """A checked adapter folder: what it attaches, its arrays by full name, and its whole config."""

    info: LoraInfo
    weights: dict[str, mx.array]
    config: dict[str, Any]


def read_adapter(folder: str | Path, model: nn.Module, base: Base | None = None) -> StoredAdapter:
    """Check the adapter of ``folder`` against ``model``, whose weights are not looked at, and read it.

    ``base`` is what it must have been trained on; None skips that. Raises InputError as :func:`load_adapter` does.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG_FILE)
    where = str(folder / CONFIG_FILE)
    settings = _settings_from(config, where)
    if base is not None:
        _check_base(config, base, folder)
    with adapters_off(model):
        layers = _top_layers(model, settings.num_layers)
        keys = _stored_keys(config, layers, where)
        expected = _expected_shapes(_adapter_modules(model, layers, keys), settings.rank)
    weights = _read_weights(folder / WEIGHTS_FILE, expected)
    trainable = sum(value.size for value in weights.values())
    info = LoraInfo(settings.rank, settings.scale, settings.dropout, len(layers), tuple(keys), trainable)
    return StoredAdapter(info, weights, config)


def _lora_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if isinstance(module, DoRALinear | DoRAEmbedding):
            raise InputError(Problem(name, "is a DoRA module, which cannot be switched off", "Use a LoRA adapter"))
        if isinstance(module, _LORA_TYPES):
            found.append((name, module))
    return found


def _base(module: nn.Module) -> nn.Module:
    inner: nn.Module = module.embedding if isinstance(module, LoRAEmbedding) else module.linear
    return inner


def _swap(model: nn.Module, modules: list[tuple[str, nn.Module]]) -> None:
    if modules:
        model.update_modules(tree_unflatten(modules))


def _top_layers(model: nn.Module, count: int | None) -> list[nn.Module]:
    layers: list[nn.Module] = list(model.layers)
    if count is None or count == -1:
        return layers
    if not 1 <= count <= len(layers):
        raise InputError(Problem("lora.num_layers", f"{count} is not within 1 to {len(layers)}, this model's layers"))
    return layers[-count:]


def _linear_names(layers: Sequence[nn.Module]) -> list[str]:
    """Names, relative to their layer, of every linear layer, in the order the layers declare them."""
    names: dict[str, None] = {}
    for layer in layers:
        for name, module in sorted(layer.named_modules(), key=lambda item: item[0]):
            if isinstance(module, _LINEAR_TYPES):
                names[name] = None
    return list(names)


def _select_keys(layers: Sequence[nn.Module], target: str | Sequence[str]) -> list[str]:
    names = _linear_names(layers)
    groups = {"attention": ATTENTION_PARTS, "mlp": MLP_PARTS}
    if isinstance(target, str) and target in ("all-linear", *groups):
        parts = groups.get(target)
        chosen = [name for name in names if _in_group(name, parts)]
        if not chosen:
            raise InputError(_no_match(target, names))
        return chosen
    wanted = [target] if isinstance(target, str) else list(target)
    matches = {want: [name for name in names if name == want or name.endswith(f".{want}")] for want in wanted}
    problems = [_no_match(want, names) for want, found in matches.items() if not found]
    if problems or not wanted:
        raise InputError(*(problems or [_no_match("(none)", names)]))
    chosen_names = {name for found in matches.values() for name in found}
    return [name for name in names if name in chosen_names]


def _in_group(name: str, parts: frozenset[str] | None) -> bool:
    components = name.split(".")
    return components[-1] not in ROUTERS and (parts is None or not parts.isdisjoint(components[:-1]))


def _no_match(want: object, names: list[str], where: str = "lora.target_modules") -> Problem:
    return Problem(where, f"{want!r} matches no linear layer of this model", f"It has {', '.join(names)}")


def _adapter_modules(model: nn.Module, layers: Sequence[nn.Module], keys: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """Full name and module of everything ``keys`` selects in ``layers``, in model order."""
    chosen = {id(layer): None for layer in layers}
    prefixes = [(name, module) for name, module in model.named_modules() if id(module) in chosen]
    prefixes.sort(key=lambda item: next(n for n, layer in enumerate(layers) if layer is item[1]))
    modules = []
    for prefix, layer in prefixes:
        inner = dict(layer.named_modules())
        modules += [(f"{prefix}.{key}", inner[key]) for key in keys if isinstance(inner.get(key), _LINEAR_TYPES)]
    return modules


def _wrap(module: nn.Module, settings: LoraSettings, key: mx.array) -> nn.Module:
    lora: nn.Module
    if isinstance(module, _SWITCH_TYPES):
        lora = LoRASwitchLinear.from_base(module, r=settings.rank, dropout=settings.dropout, scale=settings.scale)
        bound = lora.lora_a.shape[-1] ** -0.5
    else:
        width, rows = linear_dims(module)
        lora = FastLoRALinear(width, rows, r=settings.rank, dropout=settings.dropout, scale=settings.scale)
        lora.linear = module  # type: ignore[assignment]
        bound = width**-0.5
    lora.lora_a = mx.random.uniform(-bound, bound, lora.lora_a.shape, key=key)
    lora.freeze()
    lora.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
    return lora


def _expected_shapes(modules: list[tuple[str, nn.Module]], rank: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in modules:
        width, rows = linear_dims(module)
        if isinstance(module, _SWITCH_TYPES):
            experts = module.weight.shape[0]
            shapes |= {f"{name}.lora_a": (experts, rank, width), f"{name}.lora_b": (experts, rows, rank)}
        else:
            shapes |= {f"{name}.lora_a": (width, rank), f"{name}.lora_b": (rank, rows)}
    return shapes


def _settings_from(config: dict[str, Any], where: str) -> LoraSettings:
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise InputError(Problem(where, f"fine_tune_type is {kind!r}; only LoRA adapters are supported"))
    parameters, layers = config.get("lora_parameters"), config.get("num_layers")
    if not isinstance(parameters, dict) or type(layers) is not int:
        raise InputError(Problem(where, "lacks 'lora_parameters' or 'num_layers'", "It must be an mlx-lm adapter"))
    rank, scale, dropout = (parameters.get(name) for name in ("rank", "scale", "dropout"))
    if type(rank) is not int or not 1 <= rank <= 65536:
        raise InputError(Problem(where, f"rank {rank!r} is not a whole number from 1"))
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 < abs(scale) < 1e6:
        raise InputError(Problem(where, f"scale {scale!r} is not a number other than 0"))
    if not isinstance(dropout, int | float) or isinstance(dropout, bool) or not 0 <= dropout < 1:
        raise InputError(Problem(where, f"dropout {dropout!r} is not a number from 0 up to 1"))
    return LoraSettings(rank, float(scale), float(dropout), num_layers=None if layers < 0 else layers)


def _stored_keys(config: dict[str, Any], layers: Sequence[nn.Module], where: str) -> list[str]:
    """Module names of a stored adapter; mlx-lm leaves them out when it adapted every linear layer."""
    keys, names = config["lora_parameters"].get("keys"), _linear_names(layers)
    if keys is None:
        return names
    if not isinstance(keys, list) or not keys:
        raise InputError(Problem(where, "'keys' must be a list of module names"))
    unknown = [key for key in keys if key not in names]
    if unknown:
        raise InputError(*(_no_match(key, names, where) for key in unknown[:10]))
    return [name for name in names if name in keys]


def _check_base(config: dict[str, Any], loaded: Base, folder: Path) -> None:
    stored = config.get("base_fingerprint")
    if stored is not None and stored != loaded.fingerprint:
        raise InputError(
            Problem(
                str(folder),
                f"this adapter was trained on another base ({config.get('model')!r}), not on {loaded.spec!r}",
                "Load it on the model it was trained on",
            )
        )


def _read_weights(path: Path, expected: dict[str, tuple[int, ...]]) -> dict[str, mx.array]:
    if not path.is_file():
        raise InputError(Problem(str(path), "is missing"))
    problems = _shape_problems(path, read_safetensors_header(path), expected)
    if problems:
        raise InputError(*problems)
    weights = cast(dict[str, mx.array], mx.load(str(path)))
    bad = [name for name, value in weights.items() if not mx.isfinite(value).all().item()]
    if bad:
        raise InputError(*(Problem(str(path), f"{name} holds values that are not finite") for name in bad[:10]))
    return weights


def _shape_problems(path: Path, header: dict[str, TensorEntry], expected: dict[str, tuple[int, ...]]) -> list[Problem]:
    problems = [Problem(str(path), f"lacks {name}") for name in expected if name not in header]
    problems += [Problem(str(path), f"holds {name}, which has no place in this model")
                 for name in header if name not in expected]  # fmt: skip
    problems += [
        Problem(str(path), f"{name} has shape {list(entry.shape)}, expected {list(expected[name])}")
        for name, entry in header.items()
        if name in expected and entry.shape != expected[name]
    ]
    if len(problems) > 10:
        problems = [*problems[:10], Problem(str(path), f"and {len(problems) - 10} more such problems")]
    return problems
