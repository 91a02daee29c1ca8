"""The adapter folded into the base: an ordinary model folder, after proof that it answers as the adapter does.

A small change is lost when a layer is packed into 4 bits again, without a word from any tool. So the fused model is
first made in memory and compared with base and adapter; one that disagrees is refused unless insisted on. Writing
streams: a shard of weights is in memory at a time.
"""

from __future__ import annotations

from shlex import quote

import mlx.core as mx

from localdpo.data.encode import encode_prompt
from localdpo.data.pairs import Message
from localdpo.errors import InputError, Problem
from localdpo.export.agreement import PROMPTS, Agreement, find_prompts, measure, spread
from localdpo.export.cards import fused_card
from localdpo.export.fold import Delta, Form, deltas, fused_config, plan, put, stored_layer
from localdpo.export.folder import folder_bytes, write_model
from localdpo.export.source import Source
from localdpo.export.targets import Job, Written
from localdpo.files import require_space
from localdpo.model.load import LoadedModel, OpenModel, load_model, open_model
from localdpo.model.lora import load_adapter, read_adapter
from localdpo.sequences import Ids

_ANSWER_ROOM = 64


def write(job: Job) -> Written:
    """Measure, then write a model folder with the base's tokenizer and licence. Raises InputError when lossy."""
    source, bits = job.source, job.options.quantize
    model = open_model(source.model, quantize=source.quantize, notify=job.say)
    stored = read_adapter(source.adapter, model.model, model)
    adapted = deltas(stored)
    forms = plan(model, adapted, bits)
    require_space(job.target, _estimate(model, forms))
    job.say("Comparing the fused model with the adapter")
    agreement = _agreement(source, forms, adapted)
    if agreement.lossy and not job.options.accept_loss:
        raise _refusal(agreement, bits)
    mx.clear_cache()  # what was measured is gone: the next thing in memory is a shard
    modules = dict(model.model.named_modules())
    for name, form in forms.items():
        put(model.model, name, stored_layer(modules.pop(name), form, adapted.get(name)))
    modules.clear()
    model.config = fused_config(model.config, forms, bits)
    job.say("Writing the model")
    write_model(model, job.folder)
    card = fused_card(source, model.source.license, agreement.lines())
    (job.folder / "README.md").write_text(card, encoding="utf-8")
    lossy = ("It does not answer as the adapter does: it was written because --accept-loss was given.",)
    return Written(
        next_steps=(
            f'mlx_lm.generate --model {quote(str(job.target))} --prompt "Hello"',
            f"localdpo chat --model {quote(str(job.target))}",
        ),
        notes=(*agreement.lines(), *(lossy if agreement.lossy else ())),
        figures={"bits": bits, "agreement": agreement.to_json()},
    )


def _agreement(source: Source, forms: dict[str, Form], adapted: dict[str, Delta]) -> Agreement:
    loaded = load_model(source.model, quantize=source.quantize, memory=source.memory)
    load_adapter(source.adapter, loaded)
    asked, conversations = find_prompts(source)
    prompts = spread(list(_encoded(loaded, conversations, source)), PROMPTS)
    if not prompts:
        raise InputError(Problem(str(source.path), "has no prompt that its model's template takes"))
    return measure(loaded, prompts, asked, forms, adapted)


def _encoded(loaded: LoadedModel, conversations: list[list[Message]], source: Source) -> list[Ids]:
    longest = (source.recipe.data.max_length if source.recipe is not None else 1024) - _ANSWER_ROOM
    found = []
    for conversation in conversations:
        try:
            ids = encode_prompt(conversation, loaded.tokenizer)
        except InputError:
            continue
        if len(ids) <= max(longest, _ANSWER_ROOM):
            found.append(ids)
    return found


def _refusal(agreement: Agreement, bits: int | None) -> InputError:
    wider = [width for width in (6, 8) if bits is not None and width > bits]
    other = f", --quantize {wider[-1]}" if wider else ""
    full = "leave out --quantize for full precision" if bits is not None else "load the adapter beside the base"
    return InputError(
        Problem(
            "--to fused" if bits is None else f"--quantize {bits}",
            f"the fused model no longer answers as the adapter does: {'; '.join(agreement.lines())}. "
            "Nothing was written",
            f"Keep the adapter beside the base (--to mlx, --to gguf), or {full}{other}; "
            "--accept-loss writes it all the same",
        )
    )


def _estimate(model: OpenModel, forms: dict[str, Form]) -> int:
    """Bytes of the fused folder, a little too many rather than too few."""
    modules = dict(model.model.named_modules())
    total = folder_bytes(model)
    for name, form in forms.items():
        module = modules[name]
        weights = module.weight.size * (32 // module.bits if "scales" in module else 1)
        total += weights * (form.dtype.size if form.bits is None else 1)
    return total
