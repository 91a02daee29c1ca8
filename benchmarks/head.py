"""The vocabulary head alone: `python benchmarks/head.py '{"rows": 512, "whole": false}'` prints a line of JSON.

Log-probs of random targets from random hidden states, and their gradient; ``whole`` makes the [rows, vocabulary] logits
as other trainers do, otherwise `dpo/head.py` walks the vocabulary in tiles.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mlx.core as mx
import mlx.nn as nn

from localdpo.dpo.forward import exact_logps
from localdpo.dpo.head import Head
from localdpo.model.blas import enable_fast_blas

WIDTH, VOCABULARY = 896, 151_936
ROUNDS = 3


def main() -> None:
    spec = {"rows": 512, "whole": False, **json.loads(sys.argv[1])}
    enable_fast_blas()
    embedding = nn.Embedding(VOCABULARY, WIDTH)
    hidden = mx.random.normal((spec["rows"], WIDTH))
    targets = mx.random.randint(0, VOCABULARY, (spec["rows"],))
    mx.eval(embedding.parameters(), hidden, targets)
    held = mx.get_active_memory()
    head = Head(embedding)

    def total(hidden: mx.array) -> mx.array:
        if spec["whole"]:
            return mx.sum(exact_logps(embedding.as_linear(hidden), targets))
        return mx.sum(head.logps(hidden, targets))

    step = mx.value_and_grad(total)
    mx.reset_peak_memory()
    seconds = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        mx.eval(step(hidden))
        seconds.append(time.perf_counter() - begun)
    print(json.dumps({**spec, "seconds": median(seconds), "peak": mx.get_peak_memory() - held}))


if __name__ == "__main__":
    main()
