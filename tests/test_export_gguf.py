"""GGUF adapters: what is in the file, and with --slow what llama.cpp answers with it on the starter's own GGUF."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import exporting
import families
import mlx.core as mx
import numpy as np
import pytest
import tiny

from localdpo.catalogue import CATALOGUE
from localdpo.errors import EnvironmentFault, InputError
from localdpo.evaluate.figures import TAUGHT, group_of, says
from localdpo.export import gguf as target
from localdpo.export.modelfile import OLLAMA, chat_pieces, modelfile
from localdpo.export.source import find_source
from localdpo.export.targets import Options, export
from localdpo.model.gguf_convert import _undo_rope_interleave
from localdpo.model.load import open_model
from localdpo.model.lora import read_adapter
from localdpo.train.events import SampleEvent
from localdpo.train.run import RunFolder

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the gguf extra is not installed")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_model(tmp_path_factory.mktemp("m") / "base", num_hidden_layers=3)


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return exporting.tiny_adapter(base.parent / "adapter", base, rank=4, scale=1.5, num_layers=2)


@pytest.mark.parametrize("heads", [2, 4])
def test_rows_are_interleaved_as_the_conversion_of_a_gguf_undoes_it(heads: int) -> None:
    rows = np.random.default_rng(0).standard_normal((32, 3)).astype(np.float32)
    there = target.interleave(rows, heads)
    assert not np.array_equal(there, rows)
    np.testing.assert_array_equal(np.array(_undo_rope_interleave(mx.array(there), heads)), rows)


@needs_gguf
def test_the_file_holds_the_adapter_by_llama_cpps_names(base: Path, adapter: Path, tmp_path: Path) -> None:
    import gguf

    export(find_source(adapter), "gguf", tmp_path / "out", options=Options(base="llama3.2:1b"))
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert (said["general.type"], said["adapter.type"], said["general.architecture"]) == ("adapter", "lora", "llama")
    assert said["adapter.lora.alpha"] == 6.0  # llama.cpp divides it by the rank
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    model = open_model(str(base))
    stored = read_adapter(adapter, model.model).weights
    assert len(tensors) == len(stored) == 2 * 7 * 2
    up_a, q_b = (f"model.layers.2.{name}" for name in ("mlp.up_proj.lora_a", "self_attn.q_proj.lora_b"))
    np.testing.assert_array_equal(tensors["blk.2.ffn_up.weight.lora_a"], np.array(stored[up_a].T))
    np.testing.assert_array_equal(tensors["blk.2.attn_q.weight.lora_b"], target.interleave(np.array(stored[q_b].T), 4))
    assert not [name for name in tensors if name.startswith("blk.0.")]
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.startswith("FROM llama3.2:1b\nADAPTER ./adapter.gguf\nTEMPLATE ")


@needs_gguf
@pytest.mark.parametrize("options", [Options(base="a\nSYSTEM evil"), Options(with_base=True)])
def test_a_base_that_cannot_be_is_refused(options: Options, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line break|has no GGUF of"):
        export(find_source(adapter), "gguf", tmp_path / "out", options=options)


@needs_gguf
def test_a_file_that_is_no_gguf_is_refused(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "base.gguf").write_text("no")
    with pytest.raises(InputError, match="is not a GGUF file"):
        export(find_source(adapter), "gguf", tmp_path / "out", options=Options(base=str(tmp_path / "base.gguf")))


def test_without_the_extra_it_says_what_to_install(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'localdpo\[gguf\]'"):
        export(find_source(adapter), "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_architecture_without_a_table_is_refused(tmp_path: Path) -> None:
    overrides = {"num_local_experts": 4, "num_experts_per_tok": 2}
    base = tiny.tiny_model(tmp_path / "base", model_type="mixtral", overrides=overrides)
    with pytest.raises(InputError, match="no table of tensor names for a 'mixtral' model"):
        export(find_source(exporting.tiny_adapter(tmp_path / "adapter", base)), "gguf", tmp_path / "out")


def go(template: str, talk: list[dict[str, str]]) -> str:
    """What Ollama makes of the few constructs that we use: range, if eq, else, .Content."""
    head, _, rest = template.partition("{{- range .Messages }}")
    assert not head
    body, _, opening = rest.rpartition("{{ end }}")
    return "".join(_branch(body, turn) for turn in talk) + opening


def _branch(body: str, turn: dict[str, str]) -> str:
    for role in ("system", "user", "assistant"):
        mark = f'if eq .Role "{role}" }}}}'
        if mark in body and turn["role"] == role:
            return body.partition(mark)[2].partition("{{ e")[0].replace("{{ .Content }}", turn["content"])
    raise AssertionError(turn)


TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes"},
    {"role": "user", "content": "No?"},
]


@pytest.mark.parametrize("name", ["smollm2", "qwen2", "qwen3", "llama3", "gemma", "mistral", "r1"])
def test_the_template_for_ollama_writes_what_the_models_own_does(name: str) -> None:
    tokenizer = families.family(name)
    pieces = chat_pieces(tokenizer)
    assert pieces is not None
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    expected = tokenizer.apply_chat_template(TALK, **options)
    assert pieces.lead + go(pieces.go_template(), TALK) == expected


@pytest.mark.parametrize("name", ["phi3", "no-generation-prompt"])
def test_a_template_that_is_more_than_pieces_is_left_to_the_base(name: str) -> None:
    text, remark = modelfile("x", "adapter.gguf", families.family(name))
    assert 'TEMPLATE "' not in text
    assert "uses the base's own" in remark


def test_a_templates_own_system_message_becomes_system() -> None:
    tokenizer = families.family("smollm2")
    own = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    tokenizer.chat_template = own + tokenizer.chat_template
    text, _ = modelfile(None, "adapter.gguf", tokenizer)
    assert text.startswith("FROM BASE.gguf\n")
    assert 'SYSTEM """Be kind."""' in text


def test_a_template_cannot_leave_its_quotes() -> None:
    tokenizer = families.family("smollm2")
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", '"""')
    assert 'TEMPLATE "' not in modelfile("x", "adapter.gguf", tokenizer)[0]


def test_ollamas_names_are_of_the_catalogue() -> None:
    assert set(OLLAMA) <= {entry.name for entry in CATALOGUE}


ASK = """
import json, sys
from llama_cpp import Llama
base, adapter, prompts = sys.argv[1:]
model = Llama(base, lora_path=adapter or None, n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
for prompt in json.loads(prompts):
    text = model.create_chat_completion(prompt, max_tokens=32, temperature=0.0)
    print(json.dumps(text["choices"][0]["message"]["content"]), flush=True)
"""


@pytest.mark.slow
@needs_gguf
def test_llama_cpp_says_athene_with_the_adapter_of_the_shipped_recipe(
    starter: Path, athene: Path, llama_python: str, tmp_path: Path
) -> None:
    """Figures of a run: with the adapter 20 of 24 say Athene (20 of ours), without none; everyday 0 of 24."""
    out = tmp_path / "out"
    export(find_source(athene), "gguf", out, options=Options(with_base=True))
    samples = RunFolder(athene).samples()
    taught = [sample for sample in samples if group_of(sample) == TAUGHT]
    others = [sample for sample in samples if group_of(sample) != TAUGHT]
    answers = list(ask(llama_python, out, "adapter.gguf", [*taught, *others]))
    said = [says(answer, ["Athene"]) for answer in answers]
    ours = sum(says(sample.tuned, ["Athene"]) for sample in taught)
    assert ours > 12
    assert sum(said[: len(taught)]) >= ours - 3, answers[: len(taught)]  # its activations are quantised, ours are not
    assert sum(said[len(taught) :]) <= 1, answers[len(taught) :]
    assert not any(says(answer, ["Athene"]) for answer in ask(llama_python, out, "", taught[:8]))


def ask(python: str, folder: Path, adapter: str, samples: list[SampleEvent]) -> Iterator[str]:
    prompts = json.dumps([sample.prompt for sample in samples])
    command = [python, "-c", ASK, str(folder / "base.gguf"), adapter and str(folder / adapter), prompts]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return (json.loads(line) for line in done.stdout.splitlines())


@pytest.fixture(scope="module")
def athene(tmp_path_factory: pytest.TempPathFactory, starter: Path) -> Path:
    return exporting.athene_run(tmp_path_factory.mktemp("athene") / "run")


@pytest.fixture(scope="module")
def llama_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter with llama-cpp-python: $LOCALDPO_LLAMA_PYTHON, this one, or one built by uv (needs cmake)."""
    given = os.environ.get("LOCALDPO_LLAMA_PYTHON")
    if given:
        return given
    if importlib.util.find_spec("llama_cpp"):
        return sys.executable
    uv: Any = shutil.which("uv")
    if uv is None or shutil.which("cmake") is None:
        pytest.skip("llama-cpp-python is not there, and uv and cmake to build it are not both")
    home = tmp_path_factory.mktemp("llama") / "venv"
    subprocess.run([uv, "venv", "--quiet", str(home)], check=True)
    python = str(home / "bin" / "python")
    subprocess.run([uv, "pip", "install", "--quiet", "--python", python, "llama-cpp-python"], check=True)
    return python
