"""The memory estimate against counts made by hand, real configs, and peaks that were measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from localdpo.catalogue import CATALOGUE
from localdpo.train.memory import MemoryEstimate, ModelShape, Workload, estimate_memory, estimate_step

STARTER = ModelShape(30, 576, 9, 3, 64, 1536, 49152)


def test_parameters_of_the_starter():
    assert STARTER.block_parameters == 576 * 576 * 2 + 2 * 576 * 192 + 3 * 576 * 1536
    assert STARTER.parameters == 134_479_872  # 134,515,008 with its norms
    assert STARTER.lora_parameters(8, None, "all-linear") == 2_442_240
    assert STARTER.lora_parameters(8, 8, "all-linear") == 2_442_240 * 8 // 30
    assert STARTER.lora_parameters(4, 1, ("self_attn.q_proj",)) == 4 * (576 + 576)
    assert STARTER.lora_parameters(8, None, "attention") + STARTER.lora_parameters(8, None, "mlp") == 2_442_240


def test_shapes_are_read_from_configs():
    config = {
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 30,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    }
    assert ModelShape.from_config(config) == STARTER
    assert ModelShape.from_config({"text_config": config, "vision_config": {}}) == STARTER
    mixture = ModelShape.from_config(
        {**config, "num_experts": 8, "moe_intermediate_size": 64, "num_key_value_heads": None}
    )
    assert (mixture.experts, mixture.intermediate, mixture.kv_heads) == (8, 64, 9)
    with pytest.raises(KeyError):
        ModelShape.from_config({"hidden_size": 8})


@pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry.name)
def test_catalogue_models_have_the_sizes_in_their_names(entry):
    shape = ModelShape.of(entry)
    assert shape.parameters == entry.parameters
    estimate = estimate_memory(shape, Workload(1024, 512), trainable=shape.lora_parameters(8, None, "all-linear"))
    # Four bits and their scales, near what is on disk (the starter has an embedding of eight).
    assert 0.75 < estimate.weights / entry.disk_bytes < 1.35
    assert estimate.total < 16e9


WIDE = ModelShape(8, 1024, 16, 4, 64, 4096, 32000)
HALF_BILLION = ModelShape(24, 896, 14, 2, 64, 4864, 151936)

# Peaks of whole processes in MB, four pairs a step, the top 8 layers adapted (benchmarks/scale.py --only memory):
# (shape, weights in MB, tokens a pair, measured, measured with gradient checkpointing)
MEASURED = [
    (STARTER, 515, 128, 872, 776),
    (STARTER, 515, 512, 1060, 875),
    (STARTER, 515, 1024, 1072, 907),
    (WIDE, 594, 128, 1096, 915),
    (WIDE, 594, 512, 1510, 1114),
    (WIDE, 594, 1024, 1533, 1161),
    (HALF_BILLION, 1890, 128, 2474, 2288),
    (HALF_BILLION, 1890, 512, 2833, 2451),
    (HALF_BILLION, 1890, 1024, 2870, 2513),
]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("shape", "weights", "tokens", "plain", "checkpointed"), MEASURED)
def test_estimates_are_within_a_tenth_of_what_was_measured(shape, weights, tokens, plain, checkpointed, checkpointing):
    estimate = estimate_step(
        shape,
        "cpu",
        4 * tokens,
        tokens,
        trainable=shape.lora_parameters(8, 8, "all-linear"),
        lora_layers=8,
        weight_bytes=weights << 20,
        checkpointing=checkpointing,
    )
    assert estimate.total >> 20 == pytest.approx(checkpointed if checkpointing else plain, rel=0.1)


# The same for one pair of 2,048 tokens, whose scores would be the most of it if all were alive at once.
LONG = [("cpu", 515, 8, 1441), ("cpu", 515, 30, 2953), ("lean", 96, 8, 969)]


@pytest.mark.parametrize(("mode", "weights", "layers", "measured"), LONG)
def test_estimates_of_a_long_pair_are_within_a_tenth_of_what_was_measured(mode, weights, layers, measured):
    estimate = estimate_step(
        STARTER,
        mode,
        2048,
        2048,
        trainable=STARTER.lora_parameters(8, layers, "all-linear"),
        lora_layers=layers,
        weight_bytes=weights << 20,
        checkpointing=False,
    )
    assert estimate.total >> 20 == pytest.approx(measured, rel=0.1)


def test_fewer_trained_layers_keep_less():
    def activations(layers):
        return estimate_memory(STARTER, Workload(512, 128), trainable=1, lora_layers=layers).activations

    assert activations(30) / activations(8) == pytest.approx(30 / 8)
    assert activations(None) == activations(30) == activations(99)


def test_verdicts():
    estimate = MemoryEstimate(50, 10, 10, 10, 10, 10, runtime=0)
    assert estimate.total == 100
    assert [estimate.verdict(available) for available in (200, 143, 120, 100, 99)] == [
        *("safe", "safe", "tight", "tight", "too big")
    ]
    assert estimate.to_json()["total"] == 100


def test_dense_weights_are_float32():
    estimate = estimate_memory(STARTER, Workload(1, 1), trainable=0, dense=True)
    assert estimate.weights == 4 * STARTER.parameters


def test_it_never_loads_mlx():
    code = "import sys, localdpo.train.memory; sys.exit('mlx' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
