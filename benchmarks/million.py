"""A million pairs: seconds and peak memory of everything that meets them: ``python benchmarks/million.py [PAIRS…]``.

For each number of pairs a file of short made-up ones is written, and each of these is done in a process of its own:
``pairs check``, opening the file as the terminal UI does and going through its index, saving it after an edit, and the
start of a training run (read, split, encode, plan) on a tiny model. Figures: seconds, the peak of resident memory, and
bytes a pair between the smallest and the largest file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MEASURED = """
import json, resource, sys, time
from pathlib import Path
began = time.perf_counter()
path = Path(sys.argv[1])
{work}
unit = 1 if sys.platform == "darwin" else 1024
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
print(json.dumps({{"pairs": pairs, "seconds": round(time.perf_counter() - began, 1), "peak_mb": round(peak)}}))
"""
WORK = {
    "pairs check": """
from localdpo.data.check.report import check_file
pairs = check_file(path).pairs
""",
    "open in the UI": """
from localdpo.data.store import PairStore
with PairStore.open(path) as store:
    store.build_index()
    pairs = len(store)
""",
    "edit and save": """
from localdpo.data.store import PairDraft, PairStore
with PairStore.open(path) as store:
    store.insert(PairDraft.of("mine", "a", "b"), after=int(store.keys[len(store) // 2]))
    store.save()
    store.undo()
    store.save()
    pairs = len(store)
""",
    "start of training": """
from localdpo.recipe import Recipe
from localdpo.train.loop import plan
data = {"train": path, "retain": None, "max_length": 1024}
recipe = Recipe.model_validate({"model": str(path.parent / "model"), "output_dir": path.parent / "run", "data": data})
pairs = plan(recipe).train_pairs
""",
}


def environment(folder: Path) -> dict[str, str]:
    """The environment of the measured processes; caches are in ``folder``."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**os.environ, "PYTHONPATH": path, "LOCALDPO_CACHE": str(folder / "cache")}


def measure(name: str, path: Path) -> dict[str, Any]:
    """Do one thing with the file in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED.format(work=WORK[name]), str(path)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(path.parent),
    )
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def write(path: Path, pairs: int) -> None:
    """Write the pairs of ``check_speed``, whose million words must not be in this process."""
    code = "import sys; from pathlib import Path; from check_speed import SHAPES, write_pairs; "
    code += "write_pairs(Path(sys.argv[1]), int(sys.argv[2]), SHAPES['short'])"
    subprocess.run([sys.executable, "-c", code, str(path), str(pairs)], check=True, cwd=ROOT / "benchmarks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pairs", type=int, nargs="*", default=[10_000, 1_000_000])
    parser.add_argument("--only", choices=list(WORK), action="append")
    options = parser.parse_args()
    figures: dict[str, dict[int, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own as well: a child's peak begins with what its parent had.
        make = "import sys; from pathlib import Path; from tiny import tiny_model; tiny_model(Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", make, f"{folder}/model"], check=True, env=environment(Path(folder)))
        for pairs in options.pairs:
            path = Path(folder) / "pairs.jsonl"
            write(path, pairs)
            for name in options.only or WORK:
                found = figures.setdefault(name, {})[pairs] = measure(name, path)
                print(json.dumps({"what": name, "file_mb": round(path.stat().st_size / 1e6), **found}), flush=True)
    if len(options.pairs) > 1:
        least, most = min(options.pairs), max(options.pairs)
        for name, found in figures.items():
            grown = (found[most]["peak_mb"] - found[least]["peak_mb"]) * 1e6 / (most - least)
            print(json.dumps({"what": name, "bytes_a_pair": round(grown)}))


if __name__ == "__main__":
    main()
