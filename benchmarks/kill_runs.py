"""Kill training at random moments, resume, compare with a run left alone: ``python benchmarks/kill_runs.py [KILLS]``.

Every attempt is a real ``localdpo train`` of a tiny model, ended by SIGKILL (four of five), SIGTERM or SIGINT at a
random moment, then resumed. A run that gets to its end must have the metrics, the adapter bytes and the answers of the
run left alone. Figures: kills, where they hit, and the runs compared; the script ends with an error at any difference.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from killing import Killer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kills", type=int, nargs="?", default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        killer = Killer(Path(folder), options.seed)
        while killer.kills < options.kills:
            killer.kill(min(20, options.kills - killer.kills))
            print(f"{killer.kills} kills, {killer.finished} runs equal", file=sys.stderr, flush=True)
    figures = {
        "kills": killer.kills,
        "signals": dict(killer.signals.most_common()),
        "hit": dict(killer.hit.most_common()),
        "runs_compared_and_equal": killer.finished,
        "steps_a_run": sum(event["event"] == "step" for event in killer.expected["metrics"]),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
