"""What every competitor's script shares: its arguments, its rows, its BLAS and the one line that it prints.

A script runs as ``python PEER.py MODEL PAIRS FIRST COUNT LAYERS`` in an environment of its own: COUNT rows of PAIRS
from row FIRST on, adapters in the top LAYERS layers of MODEL. Standard library only, so that every environment has it.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
from pathlib import Path
from typing import Any, NamedTuple

BATCH = 4
RANK = 8
ALPHA = 16
BETA = 0.1
LEARNING_RATE = 1e-4
MAX_LENGTH = 512
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Work(NamedTuple):
    """What to train: a model folder, rows of a pair file, and how many of the top layers to adapt."""

    model: str
    pairs: str
    first: int
    count: int
    layers: int

    def rows(self) -> list[dict[str, str]]:
        """The rows as they are in the file: prompt, chosen and rejected, all strings."""
        with open(self.pairs, encoding="utf-8") as lines:
            return [json.loads(line) for line in lines][self.first : self.first + self.count]

    def conversations(self) -> list[dict[str, list[dict[str, str]]]]:
        """The rows in TRL's conversational form."""
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        return [{key: [{"role": role, "content": row[key]}] for key, role in roles.items()} for row in self.rows()]


def work() -> Work:
    """Read the arguments."""
    model, pairs, first, count, layers = sys.argv[1:6]
    return Work(model, pairs, int(first), int(count), int(layers))


def fast_blas() -> None:
    """Give MLX on Linux the same fast BLAS that localdpo gives itself; without it a peer is ten times slower."""
    path = Path(__file__).resolve().parents[2] / "localdpo" / "model" / "blas.py"
    spec = importlib.util.spec_from_file_location("fast_blas", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    status = module.enable_fast_blas()
    if not status.fast:
        raise SystemExit(f"no fast BLAS: {status.detail}")


def report(name: str, steps: list[float], losses: list[float], **more: Any) -> None:
    """Print the result: ``steps`` are seconds of each optimizer step, in order."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    print(json.dumps({"name": name, "steps": steps, "losses": losses, "peak_rss": peak, **more}), flush=True)
