"""The model card of a run on the Hub: what it is, what it learned from, what it changed, how to use it.

Figures are those the run measured; nothing is promised. Knows nothing about the Hub's interface.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from localdpo.recipe import Recipe
from localdpo.text import sanitise

__all__ = ["CardFacts", "hub_card"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class CardFacts:
    """What the card tells. ``pairs`` is the number of rows and the sha256 of their file; None when unknown."""

    name: str
    base: str
    license: str
    quantization: Mapping[str, Any] | None
    peft: bool
    pairs: tuple[int, str] | None
    recipe: Recipe | None
    figures: tuple[str, ...]


def hub_card(facts: CardFacts) -> str:
    """The README.md, with the metadata that the Hub reads."""
    parts = [
        _metadata(facts),
        f"# {_inert(facts.name)}",
        f"A LoRA adapter for `{_inert(facts.base)}`, trained with localdpo on pairs of a preferred and a rejected "
        "answer (Direct Preference Optimization). It holds one person's preferences; nobody has checked what it says.",
        "\n".join(_data(facts)),
        "\n".join(_recipe(facts)),
        "\n".join(_figures(facts)),
        "\n".join(_use(facts)),
        "\n".join(_license(facts)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(facts: CardFacts) -> str:
    values: dict[str, Any] = {
        "library_name": "peft" if facts.peft else "mlx",
        "pipeline_tag": "text-generation",
        "tags": ["localdpo", "dpo", "lora", "mlx"],
    }
    if _HUB_ID.fullmatch(facts.base):
        values |= {"base_model": facts.base, "base_model_relation": "adapter"}
    if facts.license != "unknown":
        values["license"] = facts.license
    # JSON is YAML, and quotes what needs it.
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in sorted(values.items())]
    return "\n".join(["---", *lines, "---"])


def _data(facts: CardFacts) -> Iterator[str]:
    if facts.pairs is not None:
        count, digest = facts.pairs
        yield "## What it learned from\n"
        yield f"{count:,} rows of preferences, which are not published here. sha256 of their file:\n"
        yield f"    {digest}"


def _recipe(facts: CardFacts) -> Iterator[str]:
    recipe = facts.recipe
    if recipe is None:
        return
    dpo, lora, train = recipe.dpo, recipe.lora, recipe.train
    yield "## Recipe\n"
    yield f"- loss {dpo.loss_type}, beta {dpo.beta:g}, rpo_alpha {dpo.rpo_alpha:g}"
    yield f"- LoRA rank {lora.r}, alpha {lora.alpha:g}, layers {lora.num_layers}, modules {lora.target_modules}"
    yield f"- learning rate {train.learning_rate:g}, {train.num_train_epochs:g} epochs, seed {recipe.seed}"
    if facts.quantization:
        yield f"- trained on the base at {facts.quantization.get('bits')} bits"
    yield "\nEvery setting is in `recipe.yaml`."


def _figures(facts: CardFacts) -> Iterator[str]:
    if facts.figures:
        yield "## What it changed\n"
        yield "Answers of the base and of the tuned model to prompts that were not trained on:\n"
        yield from (f"    {_inert(line)}" for line in facts.figures)


def _use(facts: CardFacts) -> Iterator[str]:
    base = _inert(facts.base)
    yield "## Use\n"
    yield "With mlx-lm, from a copy of this repository:\n"
    yield f'    mlx_lm.generate --model {base} --adapter-path mlx --prompt "Hello"'
    if facts.peft:
        yield "\nWith PEFT: `adapter_config.json` names the base.\n"
        yield "    from peft import AutoPeftModelForCausalLM\n"
        yield '    model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/repository")'
    if facts.quantization:
        yield "\nOn a base of another precision than it was trained on, answers can differ a little."


def _license(facts: CardFacts) -> Iterator[str]:
    yield "## License\n"
    known = "is not known to localdpo: look it up before you share this" if facts.license == "unknown" else None
    yield f"The license of the base {known}." if known else f"As the base: {_inert(facts.license)}."


def _inert(text: str) -> str:
    return " ".join(sanitise(text).split()).replace("`", "'")
