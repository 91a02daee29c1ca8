"""An adapter folder that mlx-lm's own commands run, with the commands in its README.

The adapter's files are copied as they are. Its base is named by Hub id where it has one; else, or when asked, it is
put beside the adapter: the starter has no Hub id, and a base that was quantised at load is not to be had elsewhere.
"""

from __future__ import annotations

import shutil
from shlex import quote

from localdpo.catalogue import find_entry
from localdpo.export.cards import mlx_card
from localdpo.export.folder import copy_base, folder_bytes, write_model
from localdpo.export.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from localdpo.export.targets import Job, Written
from localdpo.files import environment_faults, require_space
from localdpo.model.load import OpenModel, open_model
from localdpo.model.lora import read_adapter

BASE = "base"


def write(job: Job) -> Written:
    """Write the adapter, the base where it is needed, and a README."""
    model = open_model(job.source.model, quantize=job.source.quantize, notify=job.say)
    read_adapter(job.source.adapter, model.model, model)
    included = job.options.with_base or model.quantized_at_load is not None or model.source.path.name in _unnamed()
    weights = (job.source.adapter / ADAPTER_WEIGHTS).stat().st_size
    require_space(job.target, weights + (folder_bytes(model) if included else 0))
    with environment_faults(job.target):
        for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
            shutil.copyfile(job.source.adapter / name, job.folder / name)
    base = BASE if included else _name(model)
    if model.quantized_at_load is not None:
        job.say(f"Writing the base as it was trained on, at {model.quantized_at_load} bits")
        write_model(model, job.folder / BASE)
    elif included:
        copy_base(model, job.folder / BASE)
    commands = (
        f'mlx_lm.generate --model {quote(base)} --adapter-path . --prompt "Hello"',
        f"mlx_lm.chat --model {quote(base)} --adapter-path .",
        f"mlx_lm.server --model {quote(base)} --adapter-path .",
    )
    (job.folder / "README.md").write_text(mlx_card(job.source, model.source.license, base, commands), encoding="utf-8")
    note = f"The base is in {BASE}/, so the folder works by itself." if included else f"The base is {base}."
    return Written(
        next_steps=(f"cd {quote(str(job.target))}", *commands), notes=(note,), figures={"base_included": included}
    )


def _unnamed() -> set[str]:
    from localdpo.model.starter import starter_folder

    return {starter_folder().name}


def _name(model: OpenModel) -> str:
    entry = find_entry(model.spec)
    if entry is not None and entry.hub_id:
        return entry.hub_id
    return str(model.source.path) if model.source.kind == "folder" else model.spec.partition("@")[0]
