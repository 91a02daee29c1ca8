"""Tiny random models and tokenizers as ordinary model folders, so tests never need a download.

Every builder is deterministic in its seed. The tokenizer is a byte-level BPE over all 256 bytes with a few
merges, ChatML special tokens and a ChatML template by default: any text encodes, and decodes to itself.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>")
_CORPUS = ("the quick brown fox", "what is your name", "my name is", "system user assistant", "hello there") * 4


@dataclass(frozen=True)
class TinySpec:
    """What to build. ``overrides`` go into config.json as they are."""

    model_type: str = "llama"
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    intermediate_size: int = 96
    vocab_size: int = 384
    tie_word_embeddings: bool = True
    seed: int = 0
    dtype: mx.Dtype = mx.float32
    quantize: int | None = None
    group_size: int = 32
    chat_template: str | None = CHATML
    overrides: dict[str, Any] = field(default_factory=dict)


def tiny_tokenizer(folder: Path, chat_template: str | None = CHATML) -> Path:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<pad>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    return folder


def tiny_config(spec: TinySpec) -> dict[str, Any]:
    """The config.json of a tiny model, good for llama, mistral, qwen2, qwen3 and, with overrides, others."""
    return {
        "model_type": spec.model_type,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_hidden_layers,
        "num_attention_heads": spec.num_attention_heads,
        "num_key_value_heads": spec.num_key_value_heads,
        "head_dim": spec.hidden_size // spec.num_attention_heads,
        "intermediate_size": spec.intermediate_size,
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "eos_token_id": 2,
        **spec.overrides,
    }


def tiny_model(folder: Path, spec: TinySpec | None = None, **changes: Any) -> Path:
    """Write a whole model folder; keyword arguments override fields of ``TinySpec``. Returns the folder."""
    spec = TinySpec(**{**(spec.__dict__ if spec else {}), **changes})
    tiny_tokenizer(folder, spec.chat_template)
    config = tiny_config(spec)
    module = importlib.import_module(f"mlx_lm.models.{'llama' if spec.model_type == 'mistral' else spec.model_type}")
    model: nn.Module = module.Model(module.ModelArgs.from_dict(config))
    keys = mx.random.split(mx.random.key(spec.seed), 10_000)
    weights = []
    for number, (name, value) in enumerate(sorted(tree_flatten(model.parameters()))):
        noise = mx.random.normal(value.shape, key=keys[number])
        if value.ndim > 1:  # layers outweigh the embedding, or a tied model would repeat its input for ever
            value = noise * (0.5 if "embed" in name or "lm_head" in name else 2.5 * value.shape[-1] ** -0.5)
        else:
            value = value + 0.1 * noise
        weights.append((name, value.astype(spec.dtype)))
    model.update(tree_unflatten(weights))
    if spec.quantize:
        settings = {"group_size": spec.group_size, "bits": spec.quantize}
        nn.quantize(model, **settings)
        config |= {"quantization": settings, "quantization_config": settings}
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), metadata={"format": "mlx"}
    )
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def randomise_adapter(model: nn.Module, seed: int = 0, scale: float = 0.05) -> None:
    """Give every ``lora_a`` and ``lora_b`` in the model random non-zero values: at B = 0 most errors hide."""
    names = [name for name, _ in tree_flatten(model.parameters()) if name.endswith((".lora_a", ".lora_b"))]
    shapes = dict(tree_flatten(model.parameters()))
    keys = mx.random.split(mx.random.key(seed), max(len(names), 1))
    update = [
        (name, scale * mx.random.normal(shapes[name].shape, key=keys[number]))
        for number, name in enumerate(sorted(names))
    ]
    model.update(tree_unflatten(update))
    mx.eval(model.parameters())
