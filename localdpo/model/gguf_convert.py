"""Convert the starter model's GGUF file into an MLX model folder, weights kept as they were quantised.

``mx.load`` hands out GGUF's 4-bit and 8-bit blocks as MLX affine quantisation (groups of 32, float16 scales and
biases), so nothing is requantised. It knows llama-architecture files with a GPT-2 style tokenizer, and no others.
MLX's GGUF reader is C code that trusts its input: only a file whose hash is pinned may come here (``starter``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx

from localdpo.files import array_faults

GROUP_SIZE = 32
DEFAULT_BITS = 4
_SPECIAL_TOKEN = 3  # gguf's TokenType.CONTROL
_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def convert_gguf(source: Path, folder: Path) -> None:
    """Write model.safetensors, config.json, the tokenizer and generation_config.json into ``folder``.

    ``source`` must be a llama GGUF that the caller trusts byte for byte. Raises ValueError for another layout.
    """
    loaded: Any = mx.load(str(source), return_metadata=True)
    tensors, metadata = loaded
    if metadata.get("general.architecture") != "llama" or metadata.get("tokenizer.ggml.model") != "gpt2":
        raise ValueError(f"{source.name} is not a llama model with a byte-level BPE tokenizer")
    heads = _number(metadata, "llama.attention.head_count")
    kv_heads = _number(metadata, "llama.attention.head_count_kv")
    weights = {}
    for name, value in tensors.items():
        if ".attn_q." in name:
            value = _undo_rope_interleave(value, heads)
        elif ".attn_k." in name:
            value = _undo_rope_interleave(value, kv_heads)
        weights[_mlx_name(name)] = value
    config = _config(metadata, weights)
    with array_faults(folder):
        mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    _write(folder / "config.json", config)
    _write(folder / "tokenizer.json", _tokenizer(metadata))
    _write(folder / "tokenizer_config.json", _tokenizer_config(metadata, config))
    eos, pad = config["eos_token_id"], _number(metadata, "tokenizer.ggml.padding_token_id")
    _write(
        folder / "generation_config.json",
        {"bos_token_id": config["bos_token_id"], "eos_token_id": eos, "pad_token_id": pad},
    )


def _number(metadata: dict[str, Any], key: str) -> int:
    return int(metadata[key].item())


def _undo_rope_interleave(rows: mx.array, heads: int) -> mx.array:
    """Reorder output rows from GGUF's interleaved rotary pairs to the two halves that mlx-lm rotates."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _mlx_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("blk."):
        _, layer, part = stem.split(".")
        return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"
    return f"{_TOP_NAMES[stem]}.{kind}"


def _config(metadata: dict[str, Any], weights: dict[str, mx.array]) -> dict[str, Any]:
    quantization: dict[str, Any] = {"group_size": GROUP_SIZE, "bits": DEFAULT_BITS}
    for name in sorted(weights):
        path, kind = name.rsplit(".", 1)
        if kind == "scales":
            packed, groups = weights[f"{path}.weight"].shape[-1], weights[name].shape[-1]
            bits = packed * 32 // (groups * GROUP_SIZE)
            if bits != DEFAULT_BITS:
                quantization[path] = {"group_size": GROUP_SIZE, "bits": bits}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": _number(metadata, "llama.embedding_length"),
        "num_hidden_layers": _number(metadata, "llama.block_count"),
        "intermediate_size": _number(metadata, "llama.feed_forward_length"),
        "num_attention_heads": _number(metadata, "llama.attention.head_count"),
        "num_key_value_heads": _number(metadata, "llama.attention.head_count_kv"),
        "head_dim": _number(metadata, "llama.rope.dimension_count"),
        # the file holds float32: print the number that was meant
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon'].item():.6g}"),
        "rope_theta": float(metadata["llama.rope.freq_base"].item()),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "max_position_embeddings": _number(metadata, "llama.context_length"),
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "bos_token_id": _number(metadata, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _number(metadata, "tokenizer.ggml.eos_token_id"),
        "torch_dtype": "float16",
        "quantization": quantization,
        "quantization_config": quantization,
    }


def _special_tokens(metadata: dict[str, Any]) -> list[tuple[int, str]]:
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"].tolist()
    return [(number, token) for number, token in enumerate(tokens) if kinds[number] == _SPECIAL_TOKEN]


def _tokenizer(metadata: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer.json of a byte-level BPE that splits digits singly ("smollm" pre-tokenizer).

    Written out rather than saved by the tokenizers package, so that the bytes, and with them the model's
    fingerprint, do not depend on a package version.
    """
    merges = [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]]
    if metadata.get("tokenizer.ggml.pre") != "smollm" or any(len(merge) != 2 for merge in merges):
        raise ValueError("unexpected tokenizer in the GGUF file")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number, token in _special_tokens(metadata)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(metadata["tokenizer.ggml.tokens"])},
            "merges": merges,
        },
    }


def _tokenizer_config(metadata: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[config["bos_token_id"]],
        "eos_token": tokens[config["eos_token_id"]],
        "pad_token": tokens[_number(metadata, "tokenizer.ggml.padding_token_id")],
        "unk_token": tokens[_number(metadata, "tokenizer.ggml.unknown_token_id")],
        "additional_special_tokens": [token for _, token in _special_tokens(metadata)],
        "chat_template": metadata["tokenizer.chat_template"],
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
