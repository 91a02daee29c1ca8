"""`localdpo pairs generate` and `localdpo pairs round`: options into settings, progress, and what came of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localdpo.console.fetch import fetch
from localdpo.console.talk import DEFAULT_MODEL, find_target
from localdpo.console.terminal import is_live, say
from localdpo.data.output import STDOUT, open_output, refuse_existing
from localdpo.data.pairs import pair_to_json, read_prompts
from localdpo.errors import InputError, Problem
from localdpo.steps import mapped, result_of
from localdpo.text import sanitise

if TYPE_CHECKING:
    from localdpo.evaluate.generate.speakers import Source
    from localdpo.evaluate.generate.work import Generated, GenerateSettings, Method
    from localdpo.train.events import ProgressEvent

__all__ = ["MethodOptions", "run_generate", "sampling_of"]

_STAGES = {"answers": "answering", "rewrites": "rewriting", "verdicts": "judging", "load": "loading"}


@dataclass(frozen=True, slots=True)
class MethodOptions:
    """The options that say how pairs are made of answers, as given; exactly one way must be."""

    rewards: Sequence[str] = ()
    rewards_file: Path | None = None
    allow_code: bool = False
    min_gap: float = 0.0
    unfinished: str = "rejected"
    judge: str | None = None
    criterion: str | None = None
    replace: Sequence[str] = ()
    regex: bool = False
    edits: Path | None = None
    rewrite: str | None = None
    instruction: str | None = None

    def method(self) -> Method:
        """The method. Raises InputError for none, for two, and for what is wrong with it."""
        from localdpo.data.judging import CRITERION
        from localdpo.data.pairing import REWRITE, Edits, parse_substitutions
        from localdpo.evaluate.generate.work import ByEdits, ByJudge, ByRewards, ByRewrite, BySubstitution

        given = {
            "--reward": bool(self.rewards or self.rewards_file),
            "--judge": self.judge is not None,
            "--replace": bool(self.replace),
            "--edits": self.edits is not None,
            "--rewrite": self.rewrite is not None,
        }
        named = [name for name, there in given.items() if there]
        if len(named) != 1:
            what = "these exclude each other" if named else "nothing says how to make pairs of the answers"
            raise InputError(Problem(" ".join(named), what, f"Give one of {', '.join(given)}"))
        if self.judge is not None:
            return ByJudge(self._source(self.judge), self.criterion or CRITERION)
        if self.replace:
            return BySubstitution(parse_substitutions(self.replace, self.regex))
        if self.edits is not None:
            return ByEdits(Edits(self.edits))
        if self.rewrite is not None:
            return ByRewrite(self._source(self.rewrite), self.instruction or REWRITE)
        return ByRewards(self._rewards(), self._unfinished(), self.min_gap)

    @staticmethod
    def _source(model: str) -> Source:
        from localdpo.evaluate.generate.speakers import Source

        fetch(model)
        return Source(model)

    def _rewards(self) -> Any:
        from localdpo.data.rewards import parse_rewards, read_rewards

        if self.rewards_file is None:
            return parse_rewards(self.rewards, self.allow_code)
        if self.rewards:
            raise InputError(Problem("--rewards", "is given beside --reward", "Put all of them into the file"))
        return read_rewards(self.rewards_file, self.allow_code)

    def _unfinished(self) -> Any:
        known = ("rejected", "keep", "leave-out")
        if self.unfinished not in known:
            raise InputError(Problem("--unfinished", f"{self.unfinished!r} is not known", f"One of {', '.join(known)}"))
        return self.unfinished


@dataclass(frozen=True, slots=True)
class Speakers:
    """Who answers, as given: a run, a model, and whom of `base`, `tuned` and other models to ask."""

    run: Path | None = None
    model: str | None = None
    who: Sequence[str] = field(default_factory=tuple)

    def sources(self) -> tuple[Source, ...]:
        """What to load, every model fetched. Raises InputError."""
        from localdpo.evaluate.generate.speakers import Source

        target = find_target(self.run, self.model)
        names = self.who or (["tuned"] if target.adapter is not None else ["base"])
        found = []
        for name in dict.fromkeys(names):
            if name == "tuned" and target.adapter is None:
                raise InputError(Problem("--from tuned", "there is no tuned model", "Name a run with --run"))
            own = name in ("base", "tuned")
            model = (target.model or DEFAULT_MODEL) if own else name
            fetch(model)
            adapter = target.adapter if name == "tuned" else None
            found.append(Source(model, adapter, target.quantize, target.memory) if own else Source(model))
        return tuple(found)


def sampling_of(settings: dict[str, Any]) -> Any:
    """`SamplingOptions` from the options of the command line. Raises InputError."""
    from localdpo.model.sampling import SamplingOptions

    return SamplingOptions(**settings)


def run_generate(
    prompts: Path,
    out: str,
    speakers: Speakers,
    options: MethodOptions,
    *,
    samples: int,
    sampling: dict[str, Any],
    seed: int,
    answers: Path | None,
    ties: Path | None,
    force: bool,
    json_lines: bool,
) -> None:
    """Serve `localdpo pairs generate`. Raises LocalDPOError; Ctrl-C leaves what is answered in the journal."""
    refuse_existing(out, force)
    rows = read_prompts(prompts)
    if answers is None:
        if out == STDOUT:
            raise InputError(Problem("--answers", "standard output has no file beside it", "Give --answers FILE"))
        answers = Path(out).with_suffix(".answers.jsonl")
    method = options.method()
    ties = ties or answers.with_name(f"{answers.name.partition('.')[0]}.ties.jsonl")
    if options.judge is not None:
        refuse_existing(ties, force)

    from localdpo.data.candidates import CandidateJournal
    from localdpo.evaluate.generate.work import GenerateSettings, generate_pairs

    settings = GenerateSettings(speakers.sources(), method, samples, sampling_of(sampling), seed)
    journal = CandidateJournal.open(answers)
    known = len(journal)
    if known and not json_lines:
        print(sanitise(f"{answers}: {known:,} answers are there already"), file=sys.stderr)
    try:
        with shown_progress(json_lines) as show:
            made = result_of(mapped(generate_pairs(rows, settings, journal), show))
    except KeyboardInterrupt:
        print(sanitise(f"{len(journal):,} answers are kept in {answers}: the same command goes on"), file=sys.stderr)
        raise
    _write(made, out, ties, options, force)
    _report(made, settings, out, ties, answers, options, json_lines)


def _write(made: Generated, out: str, ties: Path, options: MethodOptions, force: bool) -> None:
    if made.to_edit and options.edits is not None:
        with open_output(options.edits) as file:
            file.write("".join(f"{line}\n" for line in made.to_edit).encode())
        return
    if not made.pairs and not made.ties:
        reasons = [Problem("", sentence) for sentence in made.left_out.sentences()[:10]]
        raise InputError(Problem("", f"0 pairs of {made.answers:,} answers to {made.prompts:,} prompts"), *reasons)
    if made.pairs:
        with open_output(out, force) as file:
            file.write("".join(_line(pair_to_json(pair)) for pair in made.pairs).encode())
    if made.ties:
        with open_output(ties, force) as file:
            file.write("".join(_line(tie) for tie in made.ties).encode())


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _report(
    made: Generated,
    settings: GenerateSettings,
    out: str,
    ties: Path,
    answers: Path,
    options: MethodOptions,
    json_lines: bool,
) -> None:
    stream = sys.stderr if out == STDOUT else sys.stdout
    if json_lines:
        data = {
            "prompts": made.prompts, "answers": made.answers, "unfinished": made.unfinished,
            "pairs": len(made.pairs), "ties": len(made.ties), "to_edit": len(made.to_edit),
            "compared": made.compared, "same_place": made.same_place, "left_out": made.left_out.to_json(),
            "out": out, "answers_file": str(answers), "seed": settings.seed,
        }  # fmt: skip
        print(json.dumps(data), file=stream)
        return
    cut = f", {made.unfinished:,} of them cut off at {settings.sampling.max_tokens} tokens" if made.unfinished else ""
    lines = [f"{made.prompts:,} prompts, {made.answers:,} answers{cut}, kept in {answers}"]
    if made.to_edit:
        lines.append(f'{len(made.to_edit):,} answers are in {options.edits}: correct "edited", then run this again')
    else:
        lines.append(f"{len(made.pairs):,} pairs" + (f" written to {out}" if made.pairs and out != STDOUT else ""))
    if made.compared:
        lines.append(
            f"{made.compared:,} comparisons in both orders; in {made.same_place:,} the judge named the same place twice"
        )
    if made.ties:
        lines.append(f"{len(made.ties):,} ties written to {ties}")
    lines += [f"  {sentence}" for sentence in made.left_out.sentences()]
    print(sanitise("\n".join(lines)), file=stream)


@contextmanager
def shown_progress(quiet: bool) -> Iterator[Any]:
    """A function that shows progress events: a line redrawn on a terminal, a line a stage elsewhere."""
    live, last, width = is_live(sys.stderr), "", 0

    def show(event: ProgressEvent) -> None:
        nonlocal last, width
        head = sanitise(f"{_STAGES.get(event.stage, event.stage)}: {event.detail}")
        if quiet or (not live and head == last):
            return
        last = head
        if not live:
            say(head, file=sys.stderr, flush=True)
            return
        text = f"{head} ({event.done:,}/{event.total:,})" if event.total > 1 else head
        print(f"\r{text.ljust(width)}", end="", file=sys.stderr, flush=True)
        width = len(text)

    try:
        yield show
    finally:
        if live and width:
            print(f"\r{' ' * width}\r", end="", file=sys.stderr, flush=True)
