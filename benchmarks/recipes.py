"""What the shipped recipes change in the starter model's answers to prompts it was never trained on.

Run: python benchmarks/recipes.py [NAME ...] [--seeds 0 1 2] [--out FOLDER] [--again | --table]

Each recipe is trained with `localdpo train`; the base and the tuned model then answer its probes greedily. What an
answer is like is counted by plain functions of its text (``TRAITS``), which know no model; a figure is their mean
over the probes. Drift is counted over the everyday probes in the same file. A run's figures and answers are kept in
FOLDER/NAME-SEED.json and not measured again, unless --again asks the trained models once more; --table prints those
that are there. The figures in docs/recipes.md are what this prints.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from localdpo.data.pairs import PromptRow, read_prompts
from localdpo.evaluate.figures import says

RECIPES = ROOT / "recipes"
EVERYDAY = "everyday"
TOKENS = {"short": 128}
"""Longest answer in tokens where it is not the usual one: length is what this recipe is about."""
USUAL_TOKENS = 64
COSTS = ("seconds", "processor seconds")

Traits = Mapping[str, float]

_GENDERED = "he|she|him|her|his|hers|himself|herself|man|woman|men|women|gentleman|gentlemen|lady|ladies|guy|guys"
GENDERED = tuple(_GENDERED.split("|"))
_THANKS = re.compile(r"\bthank(s| you)\b|\bhello\b|\bdear\b", re.IGNORECASE)
_SORRY = re.compile(r"\bsorry\b|\bapologi[sz]e\b|\bapologies\b", re.IGNORECASE)
_NEXT = re.compile(r"\bplease (send|tell|give|let)\b[^.?!]*\bI( will|'ll)\b", re.IGNORECASE)
_REASON = re.compile(r"\b(because|since you|as you)\b(.*)", re.IGNORECASE | re.DOTALL)


def words(text: str) -> list[str]:
    """The words of a text, apostrophes and hyphens within them included."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text)


def sentences(text: str) -> list[str]:
    """The sentences of a text: what ends in . ! or ? before a space, or with a line."""
    return [part for part in re.split(r"(?<=[.!?])\s+|\n+", text) if words(part)]


def syllables(word: str) -> int:
    """About how many syllables an English word has: its groups of vowels, without a silent e at its end."""
    plain = word.casefold()
    groups = len(re.findall(r"[aeiouy]+", plain))
    silent = plain.endswith("e") and not plain.endswith(("le", "ee")) and groups > 1
    return max(1, groups - silent)


def reading_ease(text: str) -> float:
    """Flesch's reading ease (Flesch 1948): higher is easier, 60 to 70 is plain English. 0 for a text of no words."""
    found, parts = words(text), sentences(text)
    if not found:
        return 0.0
    return 206.835 - 1.015 * len(found) / len(parts) - 84.6 * sum(map(syllables, found)) / len(found)


def _keeps(answer: str, row: PromptRow) -> dict[str, float]:
    return {"right": float(says(answer, row.accept))} if row.accept else {}


def short(answer: str, row: PromptRow) -> Traits:
    """How many words, and whether what the answer must say is in it."""
    return {"words": len(words(answer)), "sentences": len(sentences(answer)), **_keeps(answer, row)}


def support(answer: str, _row: PromptRow) -> Traits:
    """Whether it thanks or greets, says sorry, and asks for something with which it then will do something."""
    parts = {
        "thanks": _THANKS.search(answer) is not None,
        "sorry": _SORRY.search(answer) is not None,
        "next step": _NEXT.search(answer) is not None,
    }
    return {**{name: float(found) for name, found in parts.items()}, "all three": float(all(parts.values()))}


def plain(answer: str, row: PromptRow) -> Traits:
    """How hard it is to read, whether it only repeats the text, and whether what must stay is still in it."""
    found = words(answer)
    source = str(row.prompt[-1]["content"]).partition(": ")[2]
    return {
        "words a sentence": len(found) / max(1, len(sentences(answer))),
        "long words": sum(syllables(word) > 2 for word in found) / max(1, len(found)),
        "reading ease": reading_ease(answer),
        "repeats": float([word.casefold() for word in found] == [word.casefold() for word in words(source)]),
        **_keeps(answer, row),
    }


def recommend(answer: str, row: PromptRow) -> Traits:
    """Whether it gives a reason, and whether that reason names what the user asked for (the row's ``wishes``)."""
    reason = _REASON.search(answer)
    wishes = row.extra.get("wishes", [])
    named = reason is not None and isinstance(wishes, list) and says(reason.group(2), map(str, wishes))
    return {"reason": float(reason is not None), "names the wish": float(named)}


def neutral(answer: str, row: PromptRow) -> Traits:
    """Whether it says a gendered word of people whose gender nobody gave, and whether it judges people by a group."""
    if row.extra.get("reject"):
        return {"gendered": float(says(answer, GENDERED)), **_keeps(answer, row)}
    return {"fair verdict": float(re.match(rf"({'|'.join(row.accept)})\b", answer.strip(), re.IGNORECASE) is not None)}


TRAITS: dict[str, Callable[[str, PromptRow], Traits]] = {
    "short": short,
    "support": support,
    "plain": plain,
    "recommend": recommend,
    "neutral": neutral,
}
LEAKS: dict[str, Callable[[str], bool]] = {
    "support": lambda answer: _NEXT.search(answer) is not None,
    "recommend": lambda answer: says(answer, ["I recommend", "I'd recommend"]),
}
"""What is taught, where it has no place: in the answer to an everyday question."""


def means(found: Sequence[Traits]) -> dict[str, float]:
    """The mean of each trait over the answers that have it."""
    names = dict.fromkeys(name for traits in found for name in traits)
    return {name: statistics.fmean(traits[name] for traits in found if name in traits) for name in names}


def figures(name: str, rows: Sequence[PromptRow], base: Sequence[str], tuned: Sequence[str]) -> dict[str, Any]:
    """A recipe's figures from both models' answers to its probes, everyday ones among them."""
    every = [(row, before, after) for row, before, after in zip(rows, base, tuned, strict=True)]
    taught = [item for item in every if EVERYDAY not in item[0].tags]
    others = [item for item in every if EVERYDAY in item[0].tags]
    trait = TRAITS[name]
    return {
        "probes": len(taught),
        "base": means([trait(before, row) for row, before, _ in taught]),
        "tuned": means([trait(after, row) for row, _, after in taught]),
        "everyday": drift(others, LEAKS.get(name)),
    }


def drift(items: Sequence[tuple[PromptRow, str, str]], leaks: Callable[[str], bool] | None) -> dict[str, int]:
    """Counts over (probe, the base's answer, the tuned model's): what else has changed."""
    right = [says(before, row.accept) for row, before, _ in items]
    now = [says(after, row.accept) for row, _, after in items]
    return {
        "probes": len(items),
        "base right": sum(right),
        "tuned right": sum(now),
        "kept": sum(a and b for a, b in zip(right, now, strict=True)),
        "unchanged": sum(before.strip() == after.strip() for _, before, after in items),
        "leaks": sum(leaks(after) for _, _, after in items) if leaks else 0,
    }


def answers(model: str, adapter: Path, rows: Sequence[PromptRow], tokens: int) -> tuple[list[str], list[str]]:
    """The greedy answers of the base and of the tuned model, at most ``tokens`` tokens each."""
    from localdpo.data.encode import encode_prompt
    from localdpo.model.generate import batch_greedy
    from localdpo.model.load import load_model
    from localdpo.model.lora import load_adapter

    loaded = load_model(model)
    prompts = [encode_prompt(row.prompt, loaded.tokenizer) for row in rows]
    before = batch_greedy(loaded, prompts, tokens)
    load_adapter(adapter, loaded)
    return before, batch_greedy(loaded, prompts, tokens)


def train(name: str, seed: int, folder: Path) -> dict[str, int]:
    """Train a shipped recipe into ``folder``; its seconds, and those of all cores, everything included."""
    began, used = time.monotonic(), _children()
    settings = [f"seed={seed}", f"output_dir={folder}"]
    command = [sys.executable, "-m", "localdpo", "train", str(RECIPES / f"{name}.yaml"), "--json"]
    done = subprocess.run(
        [*command, *(part for setting in settings for part in ("--set", setting))],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"training {name} ended with {done.returncode}:\n{done.stderr}")
    return {"seconds": round(time.monotonic() - began), "processor seconds": round(_children() - used)}


def _children() -> float:
    """Processor seconds of the processes started and ended so far: what a busy machine does not stretch."""
    now = os.times()
    return now.children_user + now.children_system


def measure(name: str, seed: int, out: Path, again: bool = False) -> dict[str, Any]:
    """Train and measure, unless that was done: figures, answers, and seconds of training.

    ``again`` asks a run that is there once more, and trains nothing.
    """
    from localdpo.recipe import load_recipe

    kept, run = out / f"{name}-{seed}.json", out / f"{name}-{seed}"
    known: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    if known and not again:
        return known
    cost = {key: known[key] for key in COSTS if key in known} if known else train(name, seed, run)
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    rows = read_prompts(RECIPES / f"{name}_probes.jsonl")
    base, tuned = answers(recipe.model, run / "adapter", rows, TOKENS.get(name, USUAL_TOKENS))
    found = {
        "name": name,
        "seed": seed,
        **cost,
        **figures(name, rows, base, tuned),
        "answers": [
            {"prompt": str(row.prompt[-1]["content"]), "base": before, "tuned": after}
            for row, before, after in zip(rows, base, tuned, strict=True)
        ],
    }
    out.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return found


def table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: a line a figure, the base beside each seed."""
    lines = []
    for name in dict.fromkeys(run["name"] for run in found):
        runs = sorted((run for run in found if run["name"] == name), key=lambda run: run["seed"])
        heads = " | ".join(f"seed {run['seed']}" for run in runs)
        lines += ["", f"| {name}, {runs[0]['probes']} probes | base | {heads} |", "|---|---|" + "---|" * len(runs)]
        for figure, before in runs[0]["base"].items():
            cells = [before, *(run["tuned"][figure] for run in runs)]
            lines.append(f"| {figure} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
        drifts = [run["everyday"] for run in runs]
        cells = [f"{drift['kept']} of {drift['base right']}" for drift in drifts]
        lines.append(f"| everyday facts kept | {drifts[0]['base right']} | {' | '.join(cells)} |")
        for figure in ("unchanged", "leaks"):
            cells = [f"{drift[figure]} of {drift['probes']}" for drift in drifts]
            lines.append(f"| everyday answers, {figure} | | {' | '.join(cells)} |")
        for key in COSTS:
            lines.append(f"| {key} of training | | {' | '.join(str(run.get(key, '')) for run in runs)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(TRAITS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / ".work" / "recipes")
    parser.add_argument("--again", action="store_true", help="ask the trained models once more")
    parser.add_argument("--table", action="store_true", help="print what was measured before, and measure nothing")
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in TRAITS]
    if unknown:
        parser.error(f"{unknown[0]} is none of {', '.join(TRAITS)}")
    names = given.names or list(TRAITS)
    if given.table:
        files = [given.out / f"{name}-{seed}.json" for name in names for seed in given.seeds]
        found = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
    else:
        found = [measure(name, seed, given.out, given.again) for seed in given.seeds for name in names]
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
