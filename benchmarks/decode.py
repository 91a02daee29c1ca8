"""Decoding speed of one chat turn, in turn with mlx_lm.generate; prints a line of JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlx.utils import tree_flatten
from mlx_lm import stream_generate

from localdpo.data.encode import encode_prompt
from localdpo.model.generate import SamplingOptions, stream
from localdpo.model.load import load_model

TOKENS = 100
PROMPT = [{"role": "user", "content": "Tell me a long story about a river."}]


def main() -> None:
    loaded = load_model("smollm2-135m")
    ids = [int(token) for token in encode_prompt(PROMPT, loaded.tokenizer)]
    weights = sum(value.nbytes for _, value in tree_flatten(loaded.model.parameters()))

    def ours() -> float:
        marks = [time.perf_counter() for _ in stream(loaded, ids, SamplingOptions(max_tokens=TOKENS))]
        return (len(marks) - 1) / (marks[-1] - marks[0])

    plain = _plain_model()

    def theirs() -> float:
        model, tokenizer = plain
        marks = [time.perf_counter() for _ in stream_generate(model, tokenizer, ids, max_tokens=TOKENS)]
        return (len(marks) - 1) / (marks[-1] - marks[0])

    ours(), theirs()
    both = [(ours(), theirs()) for _ in range(3)]
    print(
        json.dumps(
            {
                "localdpo": sorted(a for a, _ in both)[1],
                "mlx_lm": sorted(b for _, b in both)[1],
                "bandwidth_bound": read_rate() / weights,
            }
        )
    )


def _plain_model():  # type: ignore[no-untyped-def]
    """The same float32 weights in mlx-lm's own layers."""
    from compare import WORK, float32_starter
    from mlx_lm import load

    WORK.mkdir(exist_ok=True)
    return load(str(float32_starter(WORK / "starter-fp32")))


def read_rate() -> float:
    """Bytes a second that one core reads from memory: summing 256 MB, the best of five."""
    import numpy as np

    block = np.ones(64 << 20, np.float32)
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        block.view(np.int64).max()
        best = min(best, time.perf_counter() - begun)
    return block.nbytes / best


if __name__ == "__main__":
    main()
