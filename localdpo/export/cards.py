"""The short READMEs of exported folders: what it is, on which base, how to load it. No figures, no promises."""

from __future__ import annotations

import re
from collections.abc import Sequence

from localdpo.export.source import Source

_PROJECT = "localdpo"


def ollama_model(source: Source) -> str:
    """What to call the model in Ollama, whose names are lower case without spaces."""
    return re.sub(r"[^a-z0-9._-]+", "-", source.name.lower()).strip("-._") or _PROJECT


def _front(fields: dict[str, str]) -> str:
    lines = "".join(f"{key}: {value}\n" for key, value in fields.items() if value)
    return f"---\n{lines}---\n"


def _made(source: Source) -> str:
    recipe = source.recipe
    if recipe is None:
        return f"Exported by {_PROJECT}."
    return (
        f"Trained with {_PROJECT}: {recipe.dpo.loss_type} loss, beta {recipe.dpo.beta:g}, LoRA rank {recipe.lora.r}. "
        "It learned from preference pairs; what it says is not checked by anyone."
    )


def peft_card(source: Source, license_name: str, base: str) -> str:
    """The README of a PEFT adapter on ``base``."""
    known = license_name if license_name != "unknown" else ""
    hub_id = base if base.count("/") == 1 and not base.startswith((".", "/", "~")) else ""
    front = _front({"base_model": hub_id, "library_name": "peft", "license": known, "tags": "[lora, dpo]"})
    return f"""{front}
# {source.name}

A LoRA adapter for `{base}`. {_made(source)}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, ".")
```

License of the base: {license_name}.
"""


def mlx_card(source: Source, license_name: str, base: str, commands: Sequence[str]) -> str:
    """The README of an mlx-lm adapter; ``commands`` run in its folder."""
    shown = "\n".join(f"    {command}" for command in commands)
    return f"""# {source.name}

A LoRA adapter for mlx-lm on `{base}`. {_made(source)}

In this folder, with `pip install mlx-lm`:

{shown}

License of the base: {license_name}.
"""


def gguf_card(source: Source, license_name: str, base: str, adapter: str) -> str:
    """The README of a GGUF adapter on ``base``, a GGUF file or an Ollama model."""
    return f"""# {source.name}

A GGUF LoRA adapter. {_made(source)} It belongs on a GGUF of `{source.model}`, at any quantisation.

llama.cpp:

    llama-cli -m BASE.gguf --lora {adapter}

Ollama, in this folder (the Modelfile builds on `{base}`):

    ollama create {ollama_model(source)} -f Modelfile
    ollama run {ollama_model(source)}

License of the base: {license_name}.
"""


def fused_card(source: Source, license_name: str, lines: Sequence[str]) -> str:
    """The README of a fused model; ``lines`` say how far it agrees with the adapter."""
    shown = "\n".join(f"- {line}" for line in lines)
    return f"""# {source.name}

`{source.model}` with a LoRA adapter folded in. {_made(source)}

{shown}

    mlx_lm.generate --model . --prompt "Hello"

License of the base: {license_name}.
"""
