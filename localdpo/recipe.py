"""The recipe: every setting of a run, declared once with its type, default, bounds and description.

`load_recipe` reads YAML, applies `--set` overrides and reports every problem at once, each with its line.
The names are those of TRL, grouped. This module knows nothing about models or pairs: it checks that the
files a recipe names exist, not what is in them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from localdpo.catalogue import find_entry
from localdpo.errors import InputError, Problem
from localdpo.paths import follow_recipe
from localdpo.settings import Finding, Settings, conflict, to_yaml, validate
from localdpo.yamlfile import KeyPath, parse_yaml, read_yaml

METHODS: dict[str, str] = {"dpo": "localdpo.methods.dpo"}
"""The ways to teach, by the name that a recipe gives: the module of each."""

__all__ = [
    "METHODS",
    "AlarmName",
    "DPORecipe",
    "DataRecipe",
    "LoraRecipe",
    "LossType",
    "Recipe",
    "TrackerName",
    "TrainRecipe",
    "Truncation",
    "check_recipe",
    "dump_recipe",
    "load_recipe",
    "recipe_schema",
]

LossType = Literal[
    "sigmoid", "ipo", "hinge", "robust", "sppo_hard", "apo_zero", "apo_down", "simpo", "orpo"
]  # fmt: skip
Truncation = Literal["keep_start", "keep_end", "skip"]
AlarmName = Literal[
    "chosen-falling", "loss-zero", "rewards-saturated", "gradient-spike", "retained-changing", "facts-lost",
    "answers-growing", "held-out-rising",
]  # fmt: skip
TrackerName = Literal["tensorboard", "wandb", "trackio"]

REFERENCE_FREE_LOSSES: frozenset[str] = frozenset({"simpo", "orpo"})
LABEL_SMOOTHING_LOSSES: frozenset[str] = frozenset({"sigmoid", "robust", "simpo"})

_Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
_File = Annotated[Path, Field(strict=False)]
_Fraction = Annotated[float, Field(ge=0, le=0.5)]
_Positive = Annotated[int, Field(ge=1)]


def _method(name: str) -> str:
    """``name`` when there is such a method."""
    if name not in METHODS:
        raise PydanticCustomError(
            "method", "is {name}, and must be {known}", {"name": repr(name), "known": " or ".join(METHODS)}
        )
    return name


def _alarm(text: str) -> str:
    """``text`` when it is an alarm's name, with a threshold after = or without."""
    name, equals, number = text.partition("=")
    if name not in get_args(AlarmName):
        raise PydanticCustomError("alarm", "names no alarm in {text}", {"text": repr(text)})
    if equals and not _threshold(number) > 0:
        raise PydanticCustomError("alarm", "needs a number above 0 after = in {text}", {"text": repr(text)})
    return text


def _threshold(number: str) -> float:
    try:
        value = float(number)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) else 0.0


_Alarm = Annotated[str, AfterValidator(_alarm), Field(examples=["chosen-falling", "retained-changing=0.8"])]


class _Section(BaseModel):
    # Strict: `r: "8"` and `seed: true` are mistakes to report, not values to guess at.
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class DataRecipe(_Section):
    """Which pairs to learn from, and how they are cut."""

    train: _File = Field(description="JSONL file of preference pairs. Relative to the recipe.")
    eval: _Fraction | _File | None = Field(
        default=0.1,
        union_mode="left_to_right",
        description="Pairs held out to measure progress: a fraction of the training prompts from 0 to 0.5, a "
        "JSONL file relative to the recipe, or null for none.",
    )
    retain: Literal["everyday"] | _File | None = Field(
        default="everyday",
        union_mode="left_to_right",
        description="Prompts whose answers must stay as they are: everyday (a set that comes with localdpo), "
        "a JSONL file relative to the recipe, or null for none.",
    )
    retain_weight: float = Field(
        default=0.3,
        gt=0,
        description="What a retain row counts for beside a pair. Higher keeps more of the base and learns the "
        "preference more slowly.",
    )
    probes: _File | None = Field(
        default=None,
        description="JSONL file of prompts that the base and the tuned model answer after training. They are "
        "never trained on. Relative to the recipe.",
    )
    max_length: int = Field(
        default=1024,
        ge=8,
        description="Longest prompt and answer together, in tokens. Longer pairs are truncated.",
    )
    truncation: Truncation = Field(
        default="keep_start",
        description="What to do with a pair longer than max_length: keep_start cuts the end of its answers, "
        "keep_end cuts the start of its prompt, skip leaves the pair out.",
    )


class LoraRecipe(_Section):
    """The adapter: small trainable matrices beside the frozen weights."""

    r: int = Field(default=8, ge=1, description="Rank of the adapter. A higher rank can learn more, and forget more.")
    alpha: float = Field(default=16.0, gt=0, description="Strength of the adapter: its scale is alpha / r.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapter's input while training.")
    use_rslora: bool = Field(
        default=False,
        description="Use alpha / sqrt(r) as the scale, which keeps high ranks effective (rsLoRA).",
    )
    target_modules: (
        Literal["all-linear", "attention", "mlp"] | Annotated[tuple[_Text, ...], Field(strict=False, min_length=1)]
    ) = Field(
        default="all-linear",
        description="Which layers get an adapter: all-linear, attention, mlp, or a list of names such as "
        "[q_proj, v_proj].",
    )
    num_layers: Literal["all"] | _Positive = Field(
        default="all", description="How many of the model's last blocks get an adapter: all, or a number."
    )
    init_from: _File | None = Field(
        default=None,
        description="Folder of an adapter to go on from, such as the adapter of an earlier run; null starts with a "
        "fresh one. It must have the rank, alpha and layers given here. Relative to the recipe.",
    )


class DPORecipe(_Section):
    """The loss."""

    loss_type: LossType = Field(default="sigmoid", description="The preference loss. sigmoid is DPO as published.")
    beta: float = Field(
        default=0.1,
        gt=0,
        description="How far the model may move from the base: lower values let it move further.",
    )
    reference: Literal["base", "init"] = Field(
        default="base",
        description="What the model may not move far from: base is the model without an adapter, init the model as "
        "this run starts, with the adapter of lora.init_from.",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="The fraction of pairs thought to be labelled the wrong way round, below 0.5. Only for "
        "the losses sigmoid, robust and simpo; robust needs it.",
    )
    rpo_alpha: float = Field(
        default=1.0,
        ge=0,
        description="Weight of learning the chosen answer itself (its negative log-likelihood) beside the "
        "preference. 0 switches it off; some of it keeps small models fluent.",
    )
    simpo_gamma: float = Field(
        default=0.5,
        ge=0,
        description="The margin SimPO asks for between both answers. Only for the loss simpo.",
    )

    @property
    def reference_free(self) -> bool:
        """Whether the loss needs no log-probs of the base model."""
        return self.loss_type in REFERENCE_FREE_LOSSES


class TrainRecipe(_Section):
    """Optimiser, schedule, evaluation and when to stop."""

    learning_rate: float = Field(default=1e-4, gt=0, le=1, description="The highest learning rate of the schedule.")
    num_train_epochs: float = Field(default=3.0, gt=0, description="How many times to go through all pairs.")
    max_steps: int = Field(default=-1, ge=-1, description="Stop after so many steps; -1 goes by num_train_epochs.")
    per_device_train_batch_size: int = Field(default=4, ge=1, description="Pairs in one forward and backward pass.")
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, description="Passes whose gradients are added up before the adapter changes."
    )
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        default="cosine",
        description="How the learning rate goes on after the warm-up: constant, linear or cosine.",
    )
    warmup_ratio: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="The fraction of all steps over which the learning rate rises from 0.",
    )
    warmup_steps: int | None = Field(
        default=None,
        ge=0,
        description="The same as a number of steps. Goes before warmup_ratio when it is given.",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay of AdamW.")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of AdamW's mean of gradients.")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="Decay of AdamW's mean of squared gradients.")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="Added to AdamW's denominator.")
    max_grad_norm: float | None = Field(
        default=1.0,
        gt=0,
        description="Gradients with a larger norm are scaled down to it; null never scales.",
    )
    gradient_checkpointing: Literal["auto"] | bool = Field(
        default="auto",
        description="Compute activations again instead of storing them: less memory, more time. auto decides "
        "by the memory there is.",
    )
    eval_steps: int | None = Field(
        default=None, ge=1, description="Evaluate every so many steps; null does so once an epoch."
    )
    save_steps: int | None = Field(
        default=None, ge=1, description="Save a checkpoint every so many steps; null does so once an epoch."
    )
    save_total_limit: int | None = Field(
        default=2, ge=1, description="How many checkpoints to keep; null keeps all of them."
    )
    sample_prompts: int = Field(
        default=2,
        ge=0,
        le=16,
        description="How many prompts of the probes, or of the held-out pairs, the model answers after each epoch, "
        "to see it change; each takes a second or two. 0 asks for none.",
    )
    stop_loss: float | None = Field(
        default=None,
        description="Stop when the mean training loss of an epoch falls below this; null never does.",
    )
    early_stopping_patience: int | None = Field(
        default=None, ge=1, description="Stop after so many evaluations without improvement; null never does."
    )
    load_best_model_at_end: bool = Field(
        default=True, description="Keep the adapter of the best evaluation rather than the last one."
    )
    memory: Literal["auto", "fast", "lean"] = Field(
        default="auto",
        description="fast keeps unpacked weights in memory, lean unpacks them layer by layer, auto decides "
        "by the memory there is. The results are the same.",
    )
    alarms: Annotated[tuple[_Alarm, ...], Field(strict=False)] | bool = Field(
        default=True,
        description="Warn in words when training goes wrong: true for all alarms, false for none, or a list of some "
        f"of {', '.join(get_args(AlarmName))}. A threshold of your own follows a name, as in "
        "retained-changing=0.8.",
    )
    stop_on: Annotated[tuple[AlarmName, ...], Field(strict=False)] = Field(
        default=(), description="Alarms that end the run, such as [chosen-falling]; the best adapter is kept."
    )
    report_to: Annotated[tuple[TrackerName, ...], Field(strict=False)] = Field(
        default=(),
        description="Also report the run to tensorboard, wandb or trackio, each an extra of localdpo. tensorboard and "
        "trackio write to this machine; wandb sends figures, settings and sample answers to its server unless "
        "WANDB_MODE=offline is set.",
    )

    @property
    def alarm_thresholds(self) -> dict[str, float | None]:
        """The alarms that are on, each with the threshold given for it, None for the one it comes with."""
        if isinstance(self.alarms, bool):
            return dict.fromkeys(get_args(AlarmName) if self.alarms else ())
        parts = (entry.partition("=") for entry in self.alarms)
        return {name: float(number) if equals else None for name, equals, number in parts}


class Recipe(_Section):
    """Everything a run is made of. A recipe of two lines, model and data.train, is complete."""

    model: _Text = Field(
        description="A name from `localdpo models`, a Hub id such as org/name or org/name@revision, or a "
        "folder. A folder starts with / ~ ./ or ../ and is relative to the recipe."
    )
    quantize: Literal[2, 3, 4, 6, 8] | None = Field(
        default=None,
        description="Bits to quantise an unquantised model to when it is loaded; null leaves it as it is.",
    )
    method: Annotated[str, AfterValidator(_method)] = Field(
        default="dpo",
        description="How to teach: dpo learns from pairs of a chosen and a rejected answer.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        le=2**32 - 1,
        description="Starts every random choice: split, order, adapter, dropout.",
    )
    output_dir: _File = Field(
        default=Path("runs/recipe"),
        description="The run folder. Relative to the current folder, unlike the paths under data. By default "
        "runs/ and the recipe's file name.",
    )
    data: DataRecipe = Field(description=DataRecipe.__doc__)
    lora: LoraRecipe = Field(default_factory=lambda: LoraRecipe(), description=LoraRecipe.__doc__)
    dpo: DPORecipe = Field(default_factory=lambda: DPORecipe(), description=DPORecipe.__doc__)
    train: TrainRecipe = Field(default_factory=lambda: TrainRecipe(), description=TrainRecipe.__doc__)

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        findings = [*_loss_findings(self.dpo), *_schedule_findings(self.train), *_eval_findings(self)]
        if findings:
            raise conflict(findings)
        return self


def _loss_findings(dpo: DPORecipe) -> list[Finding]:
    keys = ("dpo.label_smoothing", "dpo.loss_type")
    findings = []
    if dpo.loss_type == "robust" and dpo.label_smoothing == 0:
        message = "must be above 0 for the loss robust"
        findings.append(Finding(keys, message, "Set it to the fraction of wrong labels you expect, such as 0.1"))
    if dpo.label_smoothing > 0 and dpo.loss_type not in LABEL_SMOOTHING_LOSSES:
        message = f"is {dpo.label_smoothing}, but the loss {dpo.loss_type} has no label smoothing"
        findings.append(Finding(keys, message, "Set it to 0, or use sigmoid, robust or simpo"))
    if dpo.reference != "base" and dpo.reference_free:
        message = f"has no effect on the loss {dpo.loss_type}, which has no reference"
        findings.append(Finding(("dpo.reference", "dpo.loss_type"), message, "Remove it, or use another loss"))
    if dpo.loss_type != "simpo" and dpo.simpo_gamma != DPORecipe.model_fields["simpo_gamma"].default:
        message = f"has no effect on the loss {dpo.loss_type}"
        findings.append(Finding(("dpo.simpo_gamma", "dpo.loss_type"), message, "Remove it, or use simpo"))
    return findings


def _schedule_findings(train: TrainRecipe) -> list[Finding]:
    findings = []
    if train.max_steps == 0:
        message = "is 0, which trains nothing"
        findings.append(Finding(("train.max_steps",), message, "Set it to -1 or to 1 and more"))
    if train.warmup_steps is not None and 0 < train.max_steps <= train.warmup_steps:
        message = f"is {train.warmup_steps}, which leaves none of the {train.max_steps} steps after the warm-up"
        findings.append(Finding(("train.warmup_steps", "train.max_steps"), message, "Lower it"))
    off = [name for name in train.stop_on if name not in train.alarm_thresholds]
    if off:
        message = f"names {', '.join(off)}, which train.alarms leaves out"
        findings.append(Finding(("train.stop_on", "train.alarms"), message, "Add it there, or remove it here"))
    return findings


def _eval_findings(recipe: Recipe) -> list[Finding]:
    # 0 == 0.0, and False cannot get here: the models are strict.
    if recipe.data.eval is not None and recipe.data.eval != 0:
        return []
    fix = "Set data.eval, or remove this key"
    return [
        Finding((f"train.{key}", "data.eval"), "needs held-out pairs, and data.eval holds out none", fix)
        for key in ("eval_steps", "early_stopping_patience")
        if getattr(recipe.train, key) is not None
    ]


# What other trainers call these settings.
_SYNONYMS = {
    "lr": "train.learning_rate",
    "epochs": "train.num_train_epochs",
    "num_epochs": "train.num_train_epochs",
    "iters": "train.max_steps",
    "steps": "train.max_steps",
    "batch_size": "train.per_device_train_batch_size",
    "grad_accumulation_steps": "train.gradient_accumulation_steps",
    "lr_scheduler": "train.lr_scheduler_type",
    "scheduler": "train.lr_scheduler_type",
    "warmup": "train.warmup_steps",
    "report": "train.report_to",
    "logger": "train.report_to",
    "grad_checkpoint": "train.gradient_checkpointing",
    "max_grad": "train.max_grad_norm",
    "rank": "lora.r",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "scale": "lora.alpha",
    "lora_layers": "lora.num_layers",
    "loss": "dpo.loss_type",
    "gamma": "dpo.simpo_gamma",
    "simpo_gamma": "dpo.simpo_gamma",
    "delta": "dpo.beta",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "max_prompt_length": "data.max_length",
    "dataset": "data.train",
    "pairs": "data.train",
    "valid": "data.eval",
    "val": "data.eval",
    "test": "data.eval",
    "base_model": "model",
    "model_name_or_path": "model",
    "adapter_path": "output_dir",
    "bits": "quantize",
    "load_in_4bit": "quantize",
}
_SNAPSHOT = "recipe.yaml"
_DATA_FILES = ("train", "eval", "retain", "probes")


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, check_files: bool = True) -> Recipe:
    """Read a recipe and apply overrides of the form `section.key=value`, whose values are YAML.

    The data files, and a model given as a folder, are relative to the recipe's own folder; those in an
    override are relative to the current folder, as on any command line. `check_files=False` leaves out
    whether the data files exist. Raises `InputError` with every problem, each with its key and line.
    """
    return _checked(_read(Path(path)), Path(path), overrides, check_files)


def check_recipe(text: str, path: str | Path, *, check_files: bool = True) -> Recipe:
    """`load_recipe` for `text` that would be written to `path`."""
    return _checked(Settings.of(parse_yaml(text, str(path)), str(path)), Path(path), (), check_files)


def _checked(settings: Settings, path: Path, overrides: Sequence[str], check_files: bool) -> Recipe:
    if path.name == _SNAPSHOT and (path.parent / "run.json").is_file():
        # A run's own copy of its recipe: the run is where it is now, wherever it was started or moved from.
        settings.values.update(follow_recipe(settings.values, path.parent), output_dir=str(path.parent))
    problems = settings.override(overrides)
    _resolve_paths(settings, path.absolute().parent)
    settings.values.setdefault("output_dir", f"runs/{path.stem}")
    try:
        recipe = validate(Recipe, settings, _SYNONYMS)
    except InputError as error:
        raise InputError(*problems, *error.problems) from None
    if check_files:
        problems += _missing_files(recipe, settings)
    if problems:
        raise InputError(*problems)
    return recipe


def _read(path: Path) -> Settings:
    try:
        data = path.read_bytes()
    except OSError as error:
        what = "there is no such recipe" if isinstance(error, FileNotFoundError) else str(error.strerror)
        raise InputError(Problem(str(path), what, "`localdpo init` writes one to start from")) from None
    return Settings.of(read_yaml(data, str(path)), str(path))


def _resolve_paths(settings: Settings, folder: Path) -> None:
    data = settings.values.get("data")
    if isinstance(data, dict):
        for key in _DATA_FILES:
            value = data.get(key)
            if isinstance(value, str) and not (key == "retain" and value == "everyday"):
                data[key] = _absolute(value, settings, ("data", key), folder)
    lora = settings.values.get("lora")
    if isinstance(lora, dict) and isinstance(lora.get("init_from"), str):
        lora["init_from"] = _absolute(lora["init_from"], settings, ("lora", "init_from"), folder)
    model = settings.values.get("model")
    if isinstance(model, str):
        settings.values["model"] = _anchored_model(model.strip(), settings, folder)
    output = settings.values.get("output_dir")
    if isinstance(output, str):
        settings.values["output_dir"] = os.path.expanduser(output)


def _anchored_model(model: str, settings: Settings, folder: Path) -> str:
    """A folder's absolute path, whatever the current folder is later; a catalogue name or a Hub id as it is.

    A folder named without ./ is looked for beside the recipe first, then in the current folder.
    """
    if model in {".", ".."} or model.startswith(("/", "~", "./", "../")):
        return _absolute(model, settings, ("model",), folder)
    entry = find_entry(model)
    if entry is not None and entry.name == model:
        return model
    places = [Path.cwd()] if settings.overridden(("model",)) else [folder, Path.cwd()]
    return next((str(place / model) for place in places if model and os.path.isdir(place / model)), model)


def _absolute(value: str, settings: Settings, key: KeyPath, folder: Path) -> str:
    base = Path.cwd() if settings.overridden(key) else folder
    return os.path.normpath(base / Path(value).expanduser())


def _missing_files(recipe: Recipe, settings: Settings) -> list[Problem]:
    problems = []
    for key in _DATA_FILES:
        file = getattr(recipe.data, key)
        # os.path, for pathlib raises where a name is longer than the system allows or a folder may not be entered.
        if isinstance(file, Path) and not os.path.isfile(file):
            what = "is a folder, not a file" if os.path.isdir(file) else "there is no such file"
            fix = "Paths in a recipe are relative to its folder"
            problems.append(Problem(settings.where(("data", key)), f"{file}: {what}", fix))
    start = recipe.lora.init_from
    if start is not None and not os.path.isfile(start / "adapter_config.json"):
        fix = "Name the adapter folder of a run, such as runs/first/adapter"
        problems.append(Problem(settings.where(("lora", "init_from")), f"{start}: there is no adapter", fix))
    return problems


def anchored(recipe: Recipe) -> Recipe:
    """The same recipe with every file and folder absolute: what is kept of a run is the same from anywhere."""

    def absolute(section: BaseModel, *keys: str) -> Any:
        paths = {key: value for key in keys if isinstance(value := getattr(section, key), Path)}
        return section.model_copy(update={key: Path(os.path.abspath(path)) for key, path in paths.items()})

    sections = {"data": absolute(recipe.data, *_DATA_FILES), "lora": absolute(recipe.lora, "init_from")}
    whole: Recipe = absolute(recipe.model_copy(update=sections), "output_dir")
    return whole


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML, every key under its description; loading it gives an equal recipe."""
    return to_yaml(recipe, "A localdpo recipe with every setting.")


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes, for editors that complete and check YAML."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "localdpo recipe"}
