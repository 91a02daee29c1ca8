"""How long `localdpo pairs check` takes for 100,000 pairs, and how much memory: ``python benchmarks/check_speed.py``.

Made-up pairs of two sizes: short ones (about 60 + 40 + 25 tokens, like hand-written instruction data) and long ones
(about 130 + 330 + 330, like exported chat data). Each check runs in a process of its own with two threads at most.
Figures: wall and CPU seconds, and the peak of resident memory beside that of a check of 1,000 pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPES = {"short": (45, 30, 20), "long": (100, 250, 250)}


def write_pairs(path: Path, rows: int, shape: tuple[int, int, int], seed: int = 0) -> None:
    """Write pairs of random words, with word frequencies that fall off as in a language."""
    rng = random.Random(seed)
    letters = "etaoinshrdlcumwfgypbvk"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(20_000)]
    weights = [1 / (rank + 5) for rank in range(len(words))]
    pool = rng.choices(words, weights, k=1_000_000)

    def text(mean: int) -> str:
        length = max(3, round(rng.gauss(mean, mean / 4)))
        start = rng.randrange(len(pool) - length)
        return " ".join(pool[start : start + length]).capitalize() + "."

    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            row = dict(zip(("prompt", "chosen", "rejected"), map(text, shape), strict=True))
            file.write(json.dumps(row) + "\n")


def measure(path: Path) -> dict[str, float]:
    """Check a file in a child process; seconds and megabytes."""
    code = (
        "import resource, sys; from pathlib import Path; from localdpo.data.check.report import check_file\n"
        "report = check_file(Path(sys.argv[1]))\n"
        "print(report.pairs, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "2", "VECLIB_MAXIMUM_THREADS": "2"}
    output = subprocess.run(
        [sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True, env=environment
    ).stdout.split()
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "pairs": int(output[0]),
        "wall_seconds": round(wall, 1),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_mb": round(int(output[1]) * unit / 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for shape in options.shapes:
            for rows in (1_000, options.rows):
                path = Path(folder) / f"{shape}-{rows}.jsonl"
                write_pairs(path, rows, SHAPES[shape])
                figures = {"shape": shape, "file_mb": round(path.stat().st_size / 1e6, 1), **measure(path)}
                print(json.dumps(figures), flush=True)
                path.unlink()


if __name__ == "__main__":
    main()
