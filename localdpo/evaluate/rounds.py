"""On-policy rounds: the model answers, pairs are made of its answers, it is trained on them, and again.

Each round keeps its own folder with the answers, the pairs and the run, adapter included, and goes on from the
adapter of the round before. The recipe says whether the reference stays the base (`dpo.reference: base`) or moves
along (`init`: the model that gave the round's answers). A series that was ended goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from localdpo.data.candidates import CandidateJournal
from localdpo.data.pairs import PreferencePair, PromptRow, pair_to_json, read_pairs
from localdpo.data.provenance import provenance_of
from localdpo.errors import InputError, Problem
from localdpo.evaluate.generate.speakers import Models, Source
from localdpo.evaluate.generate.work import ByEdits, Generated, GenerateSettings, generate_pairs
from localdpo.files import atomic_write, environment_faults, write_json
from localdpo.paths import recipe_paths
from localdpo.recipe import Recipe, anchored, dump_recipe
from localdpo.steps import Steps
from localdpo.train.events import EndEvent, Event, WarningEvent
from localdpo.train.loop import train
from localdpo.train.run import Control, RunFolder

__all__ = ["RoundDone", "RoundStart", "Rounds", "prompts_of_pairs", "run_rounds"]

ANSWERS, PAIRS, TIES, SUMMARY, SERIES = "answers.jsonl", "pairs.jsonl", "ties.jsonl", "round.json", "rounds.json"


@dataclass(frozen=True, slots=True)
class RoundStart:
    """A round begins: its number from 1, of how many, and whose answers it is made of."""

    number: int
    rounds: int
    source: str


@dataclass(frozen=True, slots=True)
class RoundDone:
    """A round is on disk: how many pairs, the mean words of their answers, the mean score gap, and the adapter."""

    number: int
    pairs: int
    left_out: int
    words_chosen: float
    words_rejected: float
    gap: float | None
    folder: str
    adapter: str | None
    seconds: float
    skipped: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {name: getattr(self, name) for name in self.__slots__}


Happening = Event | RoundStart | RoundDone


@dataclass(frozen=True, slots=True)
class Rounds:
    """What to do: ``generate.sources`` is filled in by each round; its seed grows by one with each."""

    folder: Path
    rounds: int
    generate: GenerateSettings

    def __post_init__(self) -> None:
        """Raise InputError for what cannot be repeated without a person."""
        if self.rounds < 1:
            raise InputError(Problem("--rounds", f"{self.rounds} must be 1 or more"))
        if isinstance(self.generate.method, ByEdits):
            raise InputError(Problem("--edits", "a round cannot wait for a person", "Score by rewards or a judge"))


def prompts_of_pairs(pairs: Sequence[PreferencePair]) -> list[PromptRow]:
    """The prompts of some pairs, as rows of prompts; the chosen answers are their ``target``."""
    return [
        PromptRow(
            pair.prompt, tags=pair.tags, id=pair.id, extra={"target": pair.chosen}, line=pair.line, source=pair.source
        )
        for pair in pairs
        if pair.kind == "preference"
    ]


def run_rounds(
    recipe: Recipe, prompts: Sequence[PromptRow], plan: Rounds, control: Control | None = None
) -> Iterator[Happening]:
    """Go through the rounds; finished ones are passed over, one that was cut short goes on.

    ``recipe.data.train`` and ``output_dir`` are each round's own; all else is as the recipe says. Raises InputError
    when the folder holds another series or a first round gives no pair, and what generating and training raise.
    """
    control = control or Control()
    plan = replace(plan, folder=plan.folder.absolute())
    _claim(recipe, prompts, plan)
    adapter = recipe.lora.init_from
    for number in range(1, plan.rounds + 1):
        folder = plan.folder / f"round-{number:02d}"
        source = Source(recipe.model, adapter, recipe.quantize, recipe.train.memory)
        yield RoundStart(number, plan.rounds, source.name)
        done = _finished(folder)
        if done is None:
            done = yield from _round(recipe, prompts, plan, number, folder, source, control)
        if done is None:
            return
        yield done
        if done.adapter is None:
            return
        adapter = Path(done.adapter)


def _claim(recipe: Recipe, prompts: Sequence[PromptRow], plan: Rounds) -> None:
    """Make the series' folder, or see that it holds this very series; more rounds of one are fine."""
    plain = recipe.model_dump(mode="json", exclude={"output_dir": True, "data": {"train", "probes"}})
    asked = [[dict(turn) for turn in row.prompt] for row in prompts]
    generate = plan.generate
    method = [type(generate.method).__name__, repr(_method_json(generate.method))]
    rest = [asked, generate.samples, repr(generate.sampling), generate.seed, method]
    # Paths count as seen from the series, which may be moved together with what it names; once they were absolute.
    portable = recipe_paths(plain, lambda path: os.path.relpath(path, plan.folder))
    digest, absolute = (_digest([settings, *rest]) for settings in (portable, plain))
    file = plan.folder / SERIES
    with environment_faults(plan.folder):
        plan.folder.mkdir(parents=True, exist_ok=True)
        known = json.loads(file.read_text("utf-8")).get("series") if file.is_file() else None
        if known is None and any(plan.folder.iterdir()):
            raise InputError(Problem(str(plan.folder), "is not empty and holds no rounds", "Give another --out"))
    if known not in (None, digest, absolute):
        message = "holds rounds of another recipe, other prompts or other settings"
        raise InputError(Problem(str(plan.folder), message, "Give another --out, or the settings it was begun with"))
    write_json(file, {"series": digest, "rounds": plan.rounds, "recipe": anchored(recipe).model_dump(mode="json")})


def _digest(decides: list[Any]) -> str:
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _method_json(method: Any) -> Any:
    rewards = getattr(method, "rewards", None)
    if rewards is None:
        return method
    return [[reward.to_json() for reward in rewards.rewards], method.unfinished, method.min_gap]


def _finished(folder: Path) -> RoundDone | None:
    try:
        data = json.loads((folder / SUMMARY).read_bytes())
        # What it remembers of its folder may be relative to another place, or from before it was moved.
        adapter = folder / "run" / "adapter"
        done = RoundDone(**{**data, "folder": str(folder), "adapter": str(adapter), "skipped": True})
    except (OSError, ValueError, TypeError):
        return None
    return done if (adapter / "adapter_config.json").is_file() else None


def _round(
    recipe: Recipe,
    prompts: Sequence[PromptRow],
    plan: Rounds,
    number: int,
    folder: Path,
    source: Source,
    control: Control,
) -> Generator[Happening, None, RoundDone | None]:
    """One round; None when it was stopped half way."""
    began = time.monotonic()
    with environment_faults(folder):
        folder.mkdir(parents=True, exist_ok=True)
    left_out = 0
    if not (folder / PAIRS).is_file():
        made = yield from _generate(prompts, plan, number, folder, source, control)
        if made is None:
            return None
        left_out = made.left_out.total
        yield from _said(made, number)
    pairs = read_pairs(folder / PAIRS).pairs
    values = {
        "data": recipe.data.model_copy(update={"train": folder / PAIRS}),
        "lora": recipe.lora.model_copy(update={"init_from": source.adapter}),
        "output_dir": folder / "run",
    }
    own = recipe.model_copy(update=values)
    atomic_write(folder / "recipe.yaml", dump_recipe(anchored(own)))
    adapter = yield from _train(own, control)
    if adapter is None:
        return None
    done = _summary(number, pairs, left_out, folder, adapter, round(time.monotonic() - began, 1))
    write_json(folder / SUMMARY, done.to_json())
    return done


def _said(made: Generated, number: int) -> Iterator[Happening]:
    for sentence in made.left_out.sentences():
        yield WarningEvent(code="left-out", where=f"round {number}", message=sentence)


def _generate(
    prompts: Sequence[PromptRow], plan: Rounds, number: int, folder: Path, source: Source, control: Control
) -> Generator[Happening, None, Generated | None]:
    """The round's pairs, on disk; None when a stop was asked for. Raises InputError when there are none."""
    settings = replace(plan.generate, sources=(source,), seed=plan.generate.seed + number - 1)
    models = Models()
    work = generate_pairs(prompts, settings, CandidateJournal.open(folder / ANSWERS), models)
    try:
        for event in (steps := Steps(work)):
            yield event
            if control.request == "stop":
                work.close()
                return None
    finally:
        models.close()  # training loads its own
    made = steps.result
    if not made.pairs:
        reasons = [Problem("", sentence) for sentence in made.left_out.sentences()[:5]]
        ties = f", {len(made.ties):,} ties" if made.ties else ""
        raise InputError(Problem(f"round {number}", f"0 pairs of {made.answers:,} answers{ties}"), *reasons)
    if made.ties:
        atomic_write(folder / TIES, _lines(made.ties))
    atomic_write(folder / PAIRS, _lines([pair_to_json(pair) for pair in made.pairs]))
    return made


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _train(recipe: Recipe, control: Control) -> Generator[Happening, None, Path | None]:
    """The adapter of the round's run, which goes on if it was begun; None when it was stopped."""
    run = RunFolder(recipe.output_dir)
    status = run.status()
    if status is not None and status.state == "finished" and run.adapter.is_dir():
        return run.adapter
    begun = run.checkpoints.is_dir() and any(run.checkpoints.iterdir())
    reason = ""
    for event in train(recipe, resume=begun, control=control):
        yield event
        reason = event.reason if isinstance(event, EndEvent) else reason
    return None if reason == "stopped" else run.adapter


def _summary(
    number: int, pairs: Sequence[PreferencePair], left_out: int, folder: Path, adapter: Path, seconds: float
) -> RoundDone:
    notes = [provenance_of(pair.extra) for pair in pairs]
    gaps = [n["score_chosen"] - n["score_rejected"] for n in notes if "score_chosen" in n and "score_rejected" in n]
    return RoundDone(
        number,
        len(pairs),
        left_out,
        _mean([len(pair.chosen.split()) for pair in pairs]),
        _mean([len(pair.rejected.split()) for pair in pairs]),
        _mean(gaps) if gaps else None,
        str(folder),
        str(adapter),
        seconds,
    )


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4) if values else 0.0
