"""Small real tokenizers with the chat templates of well-known model families, written out here.

The vocabulary is the byte alphabet plus a few merges, so that ids are the same on every machine and version.
"""

from __future__ import annotations

import string
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Ignores add_generation_prompt: the assistant's header comes with its answer only.
CHATML_WITHOUT_GENERATION_PROMPT = CHATML.split("{% if add_generation_prompt")[0]
QWEN3 = """
{%- for m in messages %}
{%- if m['role'] == 'assistant' %}
{%- set content = m['content'] %}
{%- set thought = '' %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{%- if loop.last %}
{{- '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n' + content.lstrip('\n') + '<|im_end|>\n' }}
{%- else %}
{{- '<|im_start|>assistant\n' + content + '<|im_end|>\n' }}
{%- endif %}
{%- else %}
{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\n\n</think>\n\n' }}
{%- endif %}
{%- endif %}
"""
# Opens a thought in the generation prompt and writes no thought with a past answer.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|assistant|>' + m['content'].split('</think>')[-1] + eos_token }}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + (m['content'] | trim) + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + (m['content'] | trim)"
    " + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# No special token anywhere: the end of a turn is up to EOS.
ALPACA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '### Instruction:\n' + m['content'] + '\n\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ '### Response:\n' + m['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
TOOLS = "{% if tools %}{{ '<|im_start|>tools\n' }}{{ tools | tojson }}{{ '<|im_end|>\n' }}{% endif %}" + CHATML

# How Llama 3 and Qwen split text: words with what is before them, single digits here, newlines together.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MERGES = [
    ("H", "i"), ("Y", "e"), ("Ye", "s"), ("N", "o"), ("Ċ", "Ċ"), ("u", "s"), ("e", "r"), ("us", "er"),
    ("Ġ", "Y"), ("ĠY", "e"), ("ĠYe", "s"), ("Ġ", "N"), ("ĠN", "o"),
]  # fmt: skip


def byte_level(template: str | None, special: list[str], *, plain: tuple[str, ...] = (), **names: str) -> Any:
    """Return a byte-level tokenizer; ids 0..255 are bytes, then merges, then `special`, then `plain` tokens."""
    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for pair in _MERGES:
        vocab.setdefault("".join(pair), len(vocab))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=_MERGES))
    words = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_])
    backend.decoder = decoders.ByteLevel()
    return _wrapped(backend, template, special, plain, names)


def metaspace(template: str | None, special: list[str], scheme: str = "first", **names: str) -> Any:
    """Return a sentencepiece style tokenizer, where a space is part of the word after it."""
    vocab = {char: index for index, char in enumerate("▁\n" + string.ascii_letters + string.punctuation)}
    vocab["<unk>"] = len(vocab)
    merges = [("▁", "Y"), ("▁Y", "e"), ("▁Ye", "s"), ("▁", "N"), ("▁N", "o"), ("▁", "▁")]
    for pair in merges:
        vocab["".join(pair)] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme, split=False)
    return _wrapped(backend, template, special, (), names | {"unk_token": "<unk>"})


def _wrapped(
    backend: Tokenizer,
    template: str | None,
    special: list[str],
    plain: tuple[str, ...],
    names: dict[str, str],
) -> Any:
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    backend.add_tokens([AddedToken(token, special=False) for token in plain])
    bos = names.get("bos_token")
    if bos is not None:
        # As Llama does: encode() by itself starts every text with BOS.
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = template
    return tokenizer


def family(name: str) -> Any:
    """Return the tokenizer of a family."""
    chatml = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    llama = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    phi = ["<s>", "<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    eos = {"eos_token": "<|im_end|>"}
    made = {
        # pad == eos, and bos is the token every turn starts with
        "smollm2": lambda: byte_level(
            CHATML, chatml, bos_token="<|im_start|>", pad_token="<|im_end|>", unk_token="<|endoftext|>", **eos
        ),
        "qwen2": lambda: byte_level(CHATML, chatml, pad_token="<|endoftext|>", **eos),
        "qwen3": lambda: byte_level(QWEN3, chatml, plain=("<think>", "</think>"), **eos),
        "llama3": lambda: byte_level(LLAMA3, llama, bos_token=llama[0], eos_token="<|eot_id|>"),
        "gemma": lambda: byte_level(
            GEMMA,
            ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
            bos_token="<bos>",
            eos_token="<eos>",
        ),
        "mistral": lambda: metaspace(
            MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], bos_token="<s>", eos_token="</s>"
        ),
        "phi3": lambda: byte_level(PHI3, phi, eos_token="<|endoftext|>"),
        "r1": lambda: byte_level(
            R1, ["<bos>", "<eos>", "<|user|>", "<|assistant|>"], plain=("<think>", "</think>"),
            bos_token="<bos>", eos_token="<eos>",
        ),
        "alpaca": lambda: byte_level(ALPACA, ["</s>"], eos_token="</s>"),
        "no-generation-prompt": lambda: byte_level(CHATML_WITHOUT_GENERATION_PROMPT, chatml, **eos),
        "tools": lambda: byte_level(TOOLS, chatml, **eos),
    }  # fmt: skip
    return made[name]()


FAMILIES = [
    "smollm2", "qwen2", "qwen3", "llama3", "gemma", "mistral", "phi3", "r1", "alpaca", "no-generation-prompt",
    "tools",
]  # fmt: skip
