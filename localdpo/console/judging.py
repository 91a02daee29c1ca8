"""`localdpo blind`: two answers without names at a terminal, a key a verdict, the journal shared with the UI."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from localdpo.console.fetch import fetch
from localdpo.console.terminal import say
from localdpo.data.candidates import Candidate, CandidateJournal, Request
from localdpo.data.fields import Message
from localdpo.data.pairs import prompt_key
from localdpo.errors import InputError, Problem
from localdpo.evaluate.blind import BlindTest, Choice, Comparison, Shown
from localdpo.evaluate.contest import ANSWER_TOKENS, Contest, held_out_prompts, journal_of, open_test, settle, undo
from localdpo.evaluate.wording import prompt_text
from localdpo.recipe import Recipe, load_recipe
from localdpo.steps import result_of
from localdpo.train.run import RunFolder

if TYPE_CHECKING:
    from localdpo.evaluate.generate.speakers import Answered, Models

__all__ = ["judge_all", "run"]

KEYS: dict[str, Choice] = {"1": "first", "2": "second", "t": "tie", "3": "tie", "s": "skip"}
_HELP = "1 or 2: that answer is better; t: tie, s: skip, u: undo, q: leave (every verdict is kept)"
_AHEAD = 8  # answers made before the first is judged; the rest when those are used up

Read = Callable[[], str]
"""The next key, or line, of the judge; raises EOFError at the end."""


def run(folder: Path, other: Path | None, prompts_file: Path | None, *, limit: int | None, as_json: bool) -> None:
    """Judge the runs' answers until all prompts are judged or the judge leaves. Raises LocalDPOError.

    With ``as_json`` nobody is asked: the result so far is printed.
    """
    contest = Contest(folder, other)
    recipe = _recipe(folder)
    if other is not None and _recipe(other).model != recipe.model:
        raise InputError(Problem(str(other), f"is not a run of {recipe.model}", "Compare runs of one base"))
    prompts = held_out_prompts(folder, prompts_file)
    journal = journal_of(contest, prompts)
    if as_json:
        found = BlindTest.resume(journal, to_write=False).win_rate().to_json() if journal.exists() else None
        print(json.dumps({"a": contest.sides[0], "b": contest.sides[1], "prompts": len(prompts), "result": found}))
        return
    fetch(recipe.model)
    test = open_test(contest, prompts, prompts_file)
    with closing(_Answers(contest, recipe)) as answers, _keys(sys.stdin) as read:
        judge_all(test, prompts, answers, read, sys.stdout, limit)


def _recipe(folder: Path) -> Recipe:
    run_folder = RunFolder(folder)
    if not run_folder.recipe_file.is_file():
        raise InputError(Problem(str(folder), "this is no run folder", "`localdpo runs` lists those there are"))
    return load_recipe(run_folder.recipe_file, check_files=False)


def judge_all(
    test: BlindTest,
    prompts: Sequence[tuple[Message, ...]],
    answer: Callable[[Sequence[tuple[Message, ...]]], Sequence[Comparison]],
    read: Read,
    out: TextIO,
    limit: int | None = None,
) -> None:
    """Show what is to judge, take verdicts from ``read``, and say the result; ``answer`` makes what is missing.

    ``limit`` bounds the verdicts of this sitting.
    """
    say(f"{test.sides[1]} against {test.sides[0]}, blind. {_HELP}", file=out)
    missing = [prompt for prompt in prompts if prompt_key(prompt).hex() not in test.comparisons]
    given, left = 0, False
    while not left and (limit is None or given < limit):
        shown = test.current()
        if shown is None:
            if not missing:
                break
            for comparison in answer(missing[:_AHEAD]):
                test.add(comparison)
            missing = missing[_AHEAD:]
            settle(test)
            continue
        done = len(test.judgements)
        say(_shown(shown, done, len(prompts)), file=out, flush=True)
        change = _take(test, read, out)
        left, given = change is None, given + (change or 0)
    sides = test.sides
    say(f"\n{test.win_rate().sentence(sides[1], sides[0])}", f"kept in {test.path}", file=out)


def _take(test: BlindTest, read: Read, out: TextIO) -> int | None:
    """Obey one key: by how many verdicts there are more now, None to leave."""
    try:
        key = read().strip().lower()
    except (EOFError, KeyboardInterrupt):
        return None
    if key in ("q", "\x03", "\x04"):
        return None
    if key == "u":
        if undo(test):
            return -1
        print("there is no verdict to take back", file=out)
        return 0
    if key not in KEYS:
        say(_HELP, file=out)
        return 0
    test.judge(KEYS[key])
    settle(test)
    return 1


def _shown(shown: Shown, done: int, wanted: int) -> str:
    parts = [f"\n[{done + 1} of {wanted}] {prompt_text(shown.prompt)}"]
    parts += [f"\n  {number}) {_indented(text)}" for number, text in ((1, shown.first), (2, shown.second))]
    return "\n".join(parts)


def _indented(text: str) -> str:
    return (text.strip() or "(nothing)").replace("\n", "\n     ")


class _Answers:
    """Makes both sides' greedy answers; the model is loaded by the first call and stays."""

    def __init__(self, contest: Contest, recipe: Recipe) -> None:
        self._folders = (contest.other, contest.run)
        self._recipe = recipe
        self._models: Models | None = None

    def __call__(self, prompts: Sequence[tuple[Message, ...]]) -> list[Comparison]:
        """Both answers to each prompt; a prompt that a model cannot be asked is left out."""
        from localdpo.evaluate.generate.speakers import Models

        self._models = self._models or Models()
        print("the models are answering …", file=sys.stderr, flush=True)
        a, b = (self._side(self._models, folder, prompts) for folder in self._folders)
        return [
            Comparison(prompt_key(prompt).hex(), prompt, (ours.text.strip(), theirs.text.strip()),
                       (ours.origin, theirs.origin))
            for prompt, ours, theirs in zip(prompts, a, b, strict=True)
            if isinstance(ours, Candidate) and isinstance(theirs, Candidate)
        ]  # fmt: skip

    def _side(self, models: Models, folder: Path | None, prompts: Sequence[tuple[Message, ...]]) -> list[Answered]:
        from localdpo.evaluate.generate.speakers import Source, answer_all
        from localdpo.model.sampling import SamplingOptions

        recipe = self._recipe
        adapter = RunFolder(folder).adapter if folder is not None else None
        speaker = models.speaker(Source(recipe.model, adapter, recipe.quantize, recipe.train.memory))
        options, requests = SamplingOptions(max_tokens=ANSWER_TOKENS), [Request(prompt) for prompt in prompts]
        return result_of(answer_all(speaker, requests, options, 0, CandidateJournal(None)))

    def close(self) -> None:
        """Let go of the model."""
        if self._models is not None:
            self._models.close()


@contextmanager
def _keys(stdin: TextIO) -> Iterator[Read]:
    """Read single keys from a terminal, lines from anything else."""
    if not stdin.isatty():
        yield lambda: _line(stdin)
        return
    import termios
    import tty

    fd = stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield lambda: stdin.read(1) or _end()
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _line(stdin: TextIO) -> str:
    return stdin.readline() or _end()


def _end() -> str:
    raise EOFError
