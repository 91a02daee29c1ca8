"""How localdpo grows: `python benchmarks/scale.py` fills the sections of docs/benchmarks.md after the peers' tables.

Each figure is a process of its own (step.py). What is compared within a table runs in turn, round after round.
`--only NAME` measures one table: tokens, pairs, models, memory, lean, head, decode.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from compare import machine, write_section

HERE = Path(__file__).resolve().parent
MB = 2**20

SMALL = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 768,
    "vocab_size": 8192,
}
WIDE = {
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 4096,
    "vocab_size": 32000,
}
SHAPES: dict[str, dict[str, int]] = {
    "360M": {
        "hidden_size": 960,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "intermediate_size": 2560,
        "vocab_size": 49152,
    },
    "0.5B": {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
    },
    "1.5B": {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 151936,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    for name in arguments.only:
        lines = list(TABLES[name](arguments.rounds))
        write_section(name, "\n".join([*lines, "", f"Machine: {machine()}."]))
        print("\n".join(lines), flush=True)


def run(spec: dict[str, Any], script: str = "step.py") -> dict[str, Any]:
    """Measure one spec in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(HERE / script), json.dumps(spec)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{spec}: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def in_turn(specs: list[dict[str, Any]], rounds: int) -> list[list[dict[str, Any]]]:
    """Every spec's results, one a round, all specs in each round."""
    results: list[list[dict[str, Any]]] = [[] for _ in specs]
    for _ in range(rounds):
        for at, spec in zip(results, specs, strict=True):
            at.append(run(spec))
    return results


def rate(result: dict[str, Any]) -> float:
    """Tokens a second of the measured steps."""
    return float(result["tokens_measured"] / sum(result["seconds"]))


def share(result: dict[str, Any]) -> float:
    """The share of the machine's matrix products at 4 operations a parameter and token; trunk layers not counted."""
    return 4 * result["parameters"] * rate(result) / result["matmul_flops"]


def tokens(rounds: int) -> Iterator[str]:
    sizes = ((128, 1), (128, 4), (512, 4), (1024, 4), (2048, 4))
    specs = [{"tokens": size, "batch": batch, "pairs": 2 * batch, "steps": 1024 // size or 1} for size, batch in sizes]
    results = in_turn(specs, rounds)
    usual = results[sizes.index((512, 4))]
    yield "### Longer pairs, starter model, all 30 layers\n"
    yield (
        "| tokens a pair | pairs a step | tokens a second | against 512 | share of the matrix-product rate "
        "| peak memory, MB |"
    )
    yield "|---|---|---|---|---|---|"
    for spec, mine in zip(specs, results, strict=True):
        ratio = median(rate(own) / rate(other) for own, other in zip(mine, usual, strict=True))
        yield (
            f"| {spec['tokens']} | {spec['batch']} | {median(map(rate, mine)):.0f} | {ratio:.2f} | "
            f"{median(map(share, mine)):.0%} | {_peak(mine):,.0f} |"
        )


def pairs(rounds: int) -> Iterator[str]:
    base = {"shape": SMALL, "tokens": 120, "batch": 8, "layers": 3}
    specs = [{**base, "pairs": count, "steps": count // 8} for count in (200, 2000)]
    results = in_turn(specs, rounds)
    yield "### More pairs, a small random model with its top 3 of 6 layers adapted, batches of 8\n"
    yield "| pairs | ms a pair, reference and trunk | ms a pair, an epoch | against 200 | peak memory, MB |"
    yield "|---|---|---|---|---|"
    for spec, mine in zip(specs, results, strict=True):
        own = [sum(result["seconds"]) / (8 * len(result["seconds"])) for result in mine]
        few = [sum(result["seconds"]) / (8 * len(result["seconds"])) for result in results[0]]
        ratio = median(a / b for a, b in zip(own, few, strict=True))
        prepared = median(result["prepare_seconds"] / result["pairs"] for result in mine)
        yield f"| {spec['pairs']} | {1e3 * prepared:.1f} | {1e3 * median(own):.1f} | {ratio:.2f} | {_peak(mine):,.0f} |"


def models(rounds: int) -> Iterator[str]:
    yield "### Larger models, random weights in 4 bits, the top 8 layers adapted, 4 pairs of 160 tokens a step\n"
    yield "| parameters | seconds a step | share of the matrix-product rate | peak memory, MB | of that the weights |"
    yield "|---|---|---|---|---|"
    for name, shape in SHAPES.items():
        result = run({"shape": shape, "layers": 8, "pairs": 4, "steps": 2})
        work = result["trained_share"]
        weights = result["estimate"]["weights"] / MB
        size = f"{name} ({result['parameters'] / 1e6:,.0f}M, {result['memory_mode']})"
        speed = f"{median(result['seconds']):.1f} | {share(result) * work:.0%}"
        yield f"| {size} | {speed} | {_peak([result]):,.0f} | {weights:,.0f} |"


def memory(rounds: int) -> Iterator[str]:
    yield "### The estimate before training beside the peak measured\n"
    yield "| model | tokens a pair | gradient checkpointing | estimate, MB | measured, MB | estimate / measured |"
    yield "|---|---|---|---|---|---|"
    shapes = (("starter", None, 8), ("wide, 8 layers", WIDE, 8), ("0.5B", SHAPES["0.5B"], 8))
    for name, shape, layers in (*shapes, ("starter, all layers", None, None)):
        for size in (128, 512, 1024):
            for checkpointing in (False, True):
                spec = {"shape": shape, "tokens": size, "pairs": 4, "steps": 1, "checkpointing": checkpointing}
                result = run({**spec, "layers": layers})
                guess, real = result["estimate"]["total"] / MB, _peak([result])
                mark = "yes" if checkpointing else "no"
                yield f"| {name} | {size} | {mark} | {guess:,.0f} | {real:,.0f} | {guess / real:.2f} |"
    yield "\nThe top 8 layers adapted, four pairs a step, but for the starter with all of its 30."


def head(rounds: int) -> Iterator[str]:
    yield "### The vocabulary head alone, 151,936 tokens by 896, forward and backward: memory beside the weights\n"
    yield "| predictions | whole logits, MB | tiles, MB | whole logits, s | tiles, s |"
    yield "|---|---|---|---|---|"
    for rows in (128, 512):
        specs = [{"rows": rows, "whole": whole} for whole in (True, False)]
        both = [[run(spec, "head.py") for spec in specs] for _ in range(rounds)]
        peaks = [median(pair[at]["peak"] for pair in both) / MB for at in (0, 1)]
        seconds = [median(pair[at]["seconds"] for pair in both) for at in (0, 1)]
        yield f"| {rows} | {peaks[0]:,.0f} | {peaks[1]:,.0f} | {seconds[0]:.2f} | {seconds[1]:.2f} |"


def lean(rounds: int) -> Iterator[str]:
    yield "### `train.memory: lean` keeps the base in its 4 bits\n"
    yield "| model | mode | seconds a step | peak memory, MB | against fast |"
    yield "|---|---|---|---|---|"
    for name, shape in (("starter", None), ("0.5B", SHAPES["0.5B"])):
        specs = [{"shape": shape, "layers": 8, "pairs": 4, "steps": 2, "memory": mode} for mode in ("fast", "lean")]
        results = in_turn(specs, rounds)
        fast = _peak(results[0])
        for spec, mine in zip(specs, results, strict=True):
            seconds = median(median(result["seconds"]) for result in mine)
            yield f"| {name} | {spec['memory']} | {seconds:.2f} | {_peak(mine):,.0f} | {_peak(mine) / fast:.0%} |"


def decode(rounds: int) -> Iterator[str]:
    results = [run({}, "decode.py") for _ in range(rounds)]
    yield "### One chat turn, starter model on the CPU, greedy\n"
    yield "| | tokens a second |"
    yield "|---|---|"
    for key, name in (("localdpo", "localdpo"), ("mlx_lm", "mlx_lm.generate, same weights and BLAS")):
        yield f"| {name} | {median(result[key] for result in results):.1f} |"
    bound = median(result["bandwidth_bound"] for result in results)
    yield f"| every weight read once a token, at the rate one core reads | {bound:.1f} |"
    reached = median(result["localdpo"] / result["bandwidth_bound"] for result in results)
    against = median(result["localdpo"] / result["mlx_lm"] for result in results)
    yield f"\nThat is {reached:.0%} of the bound and {against:.2f} times mlx_lm.generate."


def _peak(results: list[dict[str, Any]]) -> float:
    return median(result["peak_rss"] for result in results) / MB


TABLES: dict[str, Callable[[int], Iterator[str]]] = {
    "tokens": tokens,
    "pairs": pairs,
    "models": models,
    "memory": memory,
    "lean": lean,
    "head": head,
    "decode": decode,
}

if __name__ == "__main__":
    main()
