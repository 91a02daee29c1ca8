"""localdpo beside its peers on the same pairs: `python benchmarks/compare.py` makes the table in docs/benchmarks.md.

Each competitor runs in an environment of its own (made on the first run, with the versions pinned below), one process
at a time, in turn with ours: round after round over the next 16 of the 64 pairs, so that what else the machine does
meets everybody. Ratios are taken within a round, and the median over rounds is quoted. Peak memory is the process's.

It measures; it knows nothing of how anything is computed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WORK = HERE / ".work"
DOCS = ROOT / "docs" / "benchmarks.md"
PAIRS = HERE / "data" / "pandalm_64.jsonl"
ROWS_A_ROUND = 16
OURS = "localdpo"
MLX = ["mlx[cpu]==0.32.4", "mlx-lm==0.32.2", "scipy-openblas32"]


@dataclass(frozen=True)
class Peer:
    """A competitor: its script, what to install (one pip call each), and whether it can adapt the top layers only."""

    name: str
    script: str
    installs: tuple[tuple[str, ...], ...]
    top_layers: bool = True


PEERS = {
    "trl": Peer(
        "TRL 1.16 + PEFT 0.21",
        "trl_dpo.py",
        (
            ("torch==2.13.0",),
            ("trl==1.16.0", "peft==0.21.2", "datasets"),
        ),
    ),
    "unsloth": Peer(
        "unsloth-zoo 2026.10.9 (MLX)",
        "unsloth_dpo.py",
        ((*MLX, "datasets"), ("--no-deps", "unsloth-zoo==2026.10.9")),
    ),
    "soup": Peer("soup-cli 0.77 (MLX)", "soup_dpo.py", ((*MLX, "soup-cli==0.77.0"),), top_layers=False),
    "troy": Peer("troy-cli 0.5 (MLX)", "troy_dpo.py", ((*MLX, "troy-cli==0.5.0"),)),
    "mlx-lm-lora": Peer("mlx-lm-lora 5.10.2", "mlx_lm_lora_dpo.py", ((*MLX, "mlx-lm-lora==5.10.2"),)),
}


def main() -> None:
    arguments = _arguments()
    WORK.mkdir(exist_ok=True)
    model = float32_starter(WORK / "starter-fp32")
    record = Path(arguments.record)
    runs: list[dict[str, Any]] = json.loads(record.read_text()) if record.exists() else []
    pythons = {key: environment(key, arguments.env) for key in arguments.peers}
    for number in range(arguments.rounds):
        for layers in arguments.layers:
            for key in (OURS, *arguments.peers):
                wanted = {"round": number, "layers": layers, "key": key}
                if any(wanted.items() <= run.items() for run in runs) or not _can(key, layers):
                    continue
                runs.append({**wanted, **measure(key, pythons.get(key), model, number, layers)})
                record.write_text(json.dumps(runs, indent=1))
                print(_line(runs[-1]), flush=True)
    write_section("peers", "\n".join(table(runs)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--layers", nargs="*", type=int, default=[30, 8])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--record", default=str(WORK / "compare.json"), help="Runs so far; finished ones are kept.")
    parser.add_argument("--env", action="append", default=[], metavar="PEER=PYTHON", help="An environment at hand.")
    arguments = parser.parse_args()
    for given in arguments.env:
        name, _, python = given.partition("=")
        if name not in PEERS or not Path(python).is_file():
            parser.error(f"--env {given}: not PEER=PYTHON with a peer of {', '.join(PEERS)} and a file")
    return arguments


def _can(key: str, layers: int) -> bool:
    return key == OURS or layers == 30 or PEERS[key].top_layers


def float32_starter(folder: Path) -> Path:
    """The starter model as a float32 Hugging Face folder: what every peer loads, ours included."""
    if (folder / "model.safetensors").exists():
        return folder
    sys.path.insert(0, str(ROOT))
    import mlx.core as mx

    from localdpo.model.resolve import resolve_model

    source = resolve_model("smollm2-135m").path
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    packed = config.pop("quantization")
    config.pop("quantization_config", None)
    weights = mx.load(str(source / "model.safetensors"))
    assert isinstance(weights, dict)
    dense = {}
    for name, value in weights.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.scales" in weights:
            how = packed.get(layer) or packed
            scales, biases = (weights[f"{layer}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
            value = mx.dequantize(value, scales, biases, group_size=how["group_size"], bits=how["bits"])
        if not name.endswith((".scales", ".biases")):
            dense[name] = value.astype(mx.float32)
    for file in source.iterdir():
        if file.name not in ("config.json", "model.safetensors") and file.is_file():
            shutil.copy(file, folder / file.name)
    (folder / "config.json").write_text(
        json.dumps({**config, "torch_dtype": "float32", "hidden_act": "silu"}, indent=1)
    )
    mx.save_safetensors(str(folder / "model.safetensors"), dense, metadata={"format": "pt"})
    return folder


def environment(key: str, at_hand: list[str]) -> str:
    """The Python of a peer's environment; made and filled where it is missing."""
    for given in at_hand:
        name, _, python = given.partition("=")
        if name == key:
            return python
    folder = WORK / "env" / key
    python = str(folder / "bin" / "python")
    if not (folder / "done").exists():
        print(f"making the environment of {PEERS[key].name}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        for packages in PEERS[key].installs:
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        (folder / "done").touch()
    return python


def measure(key: str, python: str | None, model: Path, number: int, layers: int) -> dict[str, Any]:
    """One run over the round's rows: what its script reports, or the last line of its error."""
    script = HERE / "ours.py" if key == OURS else HERE / "peers" / PEERS[key].script
    rows = 64 // ROWS_A_ROUND
    command = [python or sys.executable, str(script), str(model), str(PAIRS), str(number % rows * ROWS_A_ROUND)]
    done = subprocess.run(
        [*command, str(ROWS_A_ROUND), str(layers)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "false"},
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        error = (done.stderr.strip() or "no result").splitlines()[-1]
        return {"error": error}
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def _line(run: dict[str, Any]) -> str:
    at = f"round {run['round'] + 1}, top {run['layers']}, {run['key']}:"
    if "error" in run:
        return f"{at} {run['error']}"
    return f"{at} {median(run['steps']):.2f} s a step, peak {run['peak_rss'] / 2**20:,.0f} MB"


@dataclass(frozen=True)
class Cost:
    """Seconds a pair of one run: the first epoch with what it prepares, the later ones, and its peak memory."""

    first: float
    later: float
    peak: int


def cost(run: dict[str, Any]) -> Cost:
    """What a run cost. Ours has two epochs; a peer's later epochs are its first without preparing the reference."""
    steps = run["steps"]
    count = ROWS_A_ROUND // 4
    prepared = run.get("reference_seconds", 0.0)
    return Cost((prepared + sum(steps[:count])) / ROWS_A_ROUND, sum(steps[-count:]) / ROWS_A_ROUND, run["peak_rss"])


def table(runs: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: seconds a pair and how many times ours, medians over rounds."""
    for layers in sorted({run["layers"] for run in runs}, reverse=True):
        ours = {run["round"]: cost(run) for run in runs if run["layers"] == layers and run["key"] == OURS}
        yield f"\n### {'All 30 layers' if layers == 30 else f'The top {layers} layers'} adapted\n"
        yield "| | first epoch, s a pair | x ours | later epochs, s a pair | x ours | peak memory, MB | x ours |"
        yield "|---|---|---|---|---|---|---|"
        for key in (OURS, *PEERS):
            mine = [run for run in runs if run["layers"] == layers and run["key"] == key]
            name = f"**{OURS}**" if key == OURS else PEERS[key].name
            fine = [(cost(run), ours[run["round"]]) for run in mine if "error" not in run and run["round"] in ours]
            if fine:
                yield f"| {name} | {_cells(fine)} |"
            elif mine:
                yield f"| {name} | stopped: {mine[0]['error']} |"
    yield f"\n{_basis(runs)}"


def _cells(pairs: list[tuple[Cost, Cost]]) -> str:
    def both(part: str, scale: float, form: str) -> str:
        theirs = median(getattr(cost, part) / scale for cost, _ in pairs)
        ratio = median(getattr(cost, part) / getattr(own, part) for cost, own in pairs)
        return f"{theirs:{form}} | {ratio:.1f}"

    return " | ".join((both("first", 1, ".2f"), both("later", 1, ".2f"), both("peak", 2**20, ",.0f")))


def _basis(runs: list[dict[str, Any]]) -> str:
    rounds = len({run["round"] for run in runs})
    real = [run for run in runs if run["key"] == OURS and run["layers"] == 30]
    tokens = sum(run["tokens"] for run in real) / (len(real) * ROWS_A_ROUND) if real else 0
    of_peer = {key: len({run["round"] for run in runs if run["key"] == key}) for key in PEERS}
    fewer = ", ".join(f"{count} of {PEERS[key].name}" for key, count in of_peer.items() if 0 < count < rounds)
    return (
        f"Medians of {rounds} rounds{f' ({fewer})' if fewer else ''} of {ROWS_A_ROUND} pairs in batches of 4; "
        "ratios within a round. "
        f"Ours runs {tokens:.0f} tokens a pair. Machine: {machine()}."
    )


def machine() -> str:
    """The processor, its cores and the system, in words."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"


def write_section(name: str, text: str) -> None:
    """Put ``text`` between the marks of a section of docs/benchmarks.md."""
    start, stop = f"<!-- {name} -->", f"<!-- /{name} -->"
    page = DOCS.read_text("utf-8") if DOCS.exists() else ""
    if start not in page:
        page += f"\n{start}\n{stop}\n"
    before, _, rest = page.partition(start)
    DOCS.write_text(f"{before}{start}\n{text}\n{stop}{rest.partition(stop)[2]}", "utf-8")


if __name__ == "__main__":
    main()
