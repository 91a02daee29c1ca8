"""Ranking and blind A/B without a screen: verdicts, the pairs they make, what is found again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from localdpo_tui.services.blind_ab import BlindAB, Contest, held_out_prompts, journal_of
from localdpo_tui.services.candidates import Candidate, CandidateStore, Finished, Piece
from localdpo_tui.services.pairfile import add_pairs, remove_pairs
from localdpo_tui.services.ranking import Ranking

from localdpo.data.fields import Message
from localdpo.data.pairs import read_pairs
from localdpo.data.provenance import AnswerOrigin, origin_of, provenance_of
from localdpo.data.rows import PairDraft
from localdpo.data.store import PairStore
from localdpo.errors import EnvironmentFault, InputError
from localdpo.evaluate.blind import blind_tests

PROMPT = ({"role": "user", "content": "Who are you?"},)


def row(prompt: str, **more: Any) -> bytes:
    return json.dumps({"prompt": prompt, "chosen": "a", "rejected": "b", **more}).encode()


def stored(folder: Path, *answers: str) -> CandidateStore:
    store = CandidateStore(folder / "candidates.jsonl")
    for seed, answer in enumerate(answers):
        store.add(Candidate(PROMPT, answer, AnswerOrigin("model", "tiny", seed=seed)))
    return store


def ranking(folder: Path, store: CandidateStore) -> Ranking:
    return Ranking.open(store, folder / "rank.jsonl", folder / "pairs.jsonl", "Rank")


def test_pairs_are_appended_and_every_other_byte_stays(tmp_path: Path):
    file = tmp_path / "new" / "pairs.jsonl"
    add_pairs(file, [PairDraft.of("p", "c", "r")])
    assert read_pairs(file).pairs[0].chosen == "c"
    odd = b'\xef\xbb\xbf{"chosen":"a" , "prompt":"\\u00e9", "rejected":"b"}\r\n\r\n' + row("no end")
    file.write_bytes(odd)
    add_pairs(file, [PairDraft.of("p", "c", "r", tags=("x",))])
    data = file.read_bytes()
    assert data.startswith(odd + b"\r\n")
    assert data.endswith(b"}\r\n")
    assert [pair.prompt[0]["content"] for pair in read_pairs(file).pairs] == ["é", "no end", "p"]


def test_a_pair_with_an_id_replaces_its_row_and_is_taken_back_by_it(tmp_path: Path):
    file = tmp_path / "pairs.jsonl"
    rows = [row("one", id="x"), b'{"broken": "x"', row("two", note="x"), row("three", id="y")]
    file.write_bytes(b"\n".join(rows) + b"\n")
    add_pairs(file, [PairDraft.of("new", "c", "r", id="x")])
    assert file.read_bytes().split(b"\n")[:3] == rows[1:]
    assert remove_pairs(file, ["x", "nobody"]) == 1
    assert file.read_bytes() == b"\n".join(rows[1:]) + b"\n"


def test_an_editor_that_has_the_file_open_takes_the_new_pair_in_and_keeps_its_edits(tmp_path: Path):
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(row("one") + b"\n")
    with PairStore.open(file) as editor:
        editor.update(int(editor.keys[0]), PairDraft.of("one", "edited", "b"))
        add_pairs(file, [PairDraft.of("two", "c", "r")])
        assert editor.changed_on_disk()
        assert editor.save().status == "saved"
    assert [(pair.prompt[0]["content"], pair.chosen) for pair in read_pairs(file).pairs] == [
        ("one", "edited"),
        ("two", "c"),
    ]


def test_verdicts_become_pairs_with_both_origins(tmp_path: Path):
    rank = ranking(tmp_path, stored(tmp_path, "a", "b", "c", "d", "e", "f"))
    assert rank.position() == "0 of 3 judged"
    shown = rank.current()
    assert shown is not None
    rank.judge("first")
    rank.judge("tie")
    rank.judge("skip")
    (pair,) = read_pairs(tmp_path / "pairs.jsonl").pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == (PROMPT, shown.first, shown.second)
    assert provenance_of(pair.extra)["how"] == "rank"
    for side in ("chosen", "rejected"):
        origin = origin_of(pair.extra, side)  # type: ignore[arg-type]
        assert origin is not None
        assert "abcdef"[origin.seed or 0] == getattr(pair, side)
    assert (rank.current(), rank.position()) == (None, "3 of 3 judged")
    assert rank.result().startswith("1 pair made, 1 tie, 1 skipped")


def test_the_position_is_remembered_and_new_candidates_join(tmp_path: Path):
    store = stored(tmp_path, "a", "b", "c", "d")
    first = ranking(tmp_path, store)
    first.judge("second")
    here = first.current()
    again = ranking(tmp_path, store)
    assert again.current() == here
    store.add(Candidate(({"role": "user", "content": "else"},), "x", AnswerOrigin("model", "tiny")))
    store.add(Candidate(({"role": "user", "content": "else"},), "y", AnswerOrigin("model", "tiny")))
    third = ranking(tmp_path, store)
    assert (third.current(), third.position()) == (here, "1 of 3 judged")


def test_undo_takes_the_pair_out_of_the_file(tmp_path: Path):
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(row("mine") + b"\n")
    rank = ranking(tmp_path, stored(tmp_path, "a", "b"))
    before = rank.current()
    rank.judge("first")
    assert len(read_pairs(file).pairs) == 2
    assert rank.undo()
    assert not rank.undo()
    assert file.read_bytes() == row("mine") + b"\n"
    assert rank.current() == before


def test_a_crash_between_pair_and_verdict_leaves_no_second_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise EnvironmentFault("the disk is full")

    store = stored(tmp_path, "a", "b")
    rank = ranking(tmp_path, store)
    shown = rank.current()
    assert shown is not None
    with monkeypatch.context() as patch:
        patch.setattr("localdpo.evaluate.blind.append_line", full)
        with pytest.raises(EnvironmentFault):
            rank.judge("first")
    again = ranking(tmp_path, store)
    assert again.current() == shown
    again.judge("second")
    (pair,) = read_pairs(tmp_path / "pairs.jsonl").pairs
    assert pair.chosen == shown.second


def test_nothing_to_rank_says_what_to_do(tmp_path: Path):
    rank = ranking(tmp_path, stored(tmp_path, "a", "a"))
    assert rank.empty
    assert "Generate two or more" in rank.waiting()


class Speaker:
    """Answers with its name and the prompt; to prompts in `same` as everybody does."""

    def __init__(self, name: str, same: Sequence[str] = ()) -> None:
        self.name, self.same, self.asked = name, same, []  # type: ignore[var-annotated]

    async def answer(self, prompt: Sequence[Message], sampling: Mapping[str, Any]) -> AsyncIterator[Piece | Finished]:
        question = prompt[-1]["content"]
        self.asked.append(question)
        yield Piece("same" if question in self.same else f"{self.name}: {question}")
        yield Finished(AnswerOrigin("model", self.name))


def run_folder(root: Path, held_out: int = 4, weights: bytes = b"weights") -> Path:
    """A folder as a finished run leaves it, as far as a contest looks at it."""
    run = root / "runs" / "athene"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "adapters.safetensors").write_bytes(weights)
    (run / "run.json").write_text("{}")
    (root / "pairs.jsonl").write_bytes(row("trained on") + b"\n")
    (root / "eval.jsonl").write_bytes(b"".join(row(f"q{n}") + b"\n" for n in range(held_out)))
    (run / "recipe.yaml").write_text(
        f"model: smollm2-135m\ndata: {{train: {root / 'pairs.jsonl'}, eval: {root / 'eval.jsonl'}, retain: null}}\n"
    )
    sample = {"event": "sample", "step": 1, "time": 0, "base": "x", "tuned": "y"}
    asked = [[{"role": "user", "content": text}] for text in ("q1", "probe")]
    (run / "samples.jsonl").write_text("".join(json.dumps({**sample, "prompt": p}) + "\n" for p in asked))
    return run


async def filled(ab: BlindAB, a: Speaker, b: Speaker, stop_after: int = 10**6) -> None:
    async with aclosing(ab.fill(a, b)) as steps:
        async for _ in steps:
            stop_after -= 1
            if not stop_after:
                break


def test_prompts_are_what_the_run_held_out_and_its_probes_each_once(tmp_path: Path):
    run = run_folder(tmp_path)
    assert [prompt[0]["content"] for prompt in held_out_prompts(run)] == ["q0", "q1", "q2", "q3", "probe"]
    own = tmp_path / "own.jsonl"
    own.write_text('{"prompt": "mine"}\n{"prompt": "mine"}\n')
    assert [prompt[0]["content"] for prompt in held_out_prompts(run, own)] == ["mine"]


def test_a_contest_ends_in_a_win_rate_beside_the_run(tmp_path: Path):
    run = run_folder(tmp_path)
    ab = BlindAB.open(Contest(run))
    asyncio.run(filled(ab, Speaker("base", ["q1"]), Speaker("tuned", ["q1"])))
    for _ in range(4):
        shown = ab.current()
        assert shown is not None
        assert shown.first != shown.second  # equal answers are a tie already
        ab.judge("first" if shown.first.startswith("tuned") else "second")
    assert ab.current() is None
    (test,) = blind_tests(run)
    result = test.win_rate()
    assert (result.wins, result.losses, result.ties) == (4, 0, 1)
    assert test.sides == ("base", "athene")
    assert test.path.parent == run / "blind"
    assert "athene won 4, base won 0, 1 tie: win rate 90%" in ab.result()


def test_going_on_later_makes_no_answer_twice_and_keeps_the_place(tmp_path: Path):
    run = run_folder(tmp_path)
    base, tuned = Speaker("base"), Speaker("tuned")
    first = BlindAB.open(Contest(run))
    asyncio.run(filled(first, base, tuned, stop_after=6))  # two prompts are answered
    first.judge("first")
    again = BlindAB.open(Contest(run))
    here = again.current()
    assert here == first.current()
    asyncio.run(filled(again, base, tuned))
    assert base.asked == tuned.asked == ["q0", "q1", "q2", "q3", "probe"]
    assert again.current() == here
    assert again.position() == "1 of 5 judged"


def test_undo_goes_back_to_what_somebody_judged(tmp_path: Path):
    run = run_folder(tmp_path, held_out=3)
    ab = BlindAB.open(Contest(run))
    asyncio.run(filled(ab, Speaker("base", ["q0", "q2"]), Speaker("tuned", ["q0", "q2"])))
    assert not ab.undo()  # the tie on q0 was nobody's verdict
    shown = ab.current()
    assert shown is not None
    assert shown.prompt[0]["content"] == "q1"
    ab.judge("tie")
    assert ab.undo()
    assert ab.current() == shown


def test_another_adapter_is_another_test(tmp_path: Path):
    run = run_folder(tmp_path)
    prompts = held_out_prompts(run)
    before = journal_of(Contest(run), prompts)
    (run / "adapter" / "adapters.safetensors").write_bytes(b"trained on")
    assert journal_of(Contest(run), prompts) != before
    (run / "adapter" / "adapters.safetensors").unlink()
    with pytest.raises(InputError, match="no adapter yet"):
        journal_of(Contest(run), prompts)


def test_a_run_without_held_out_prompts_says_so(tmp_path: Path):
    run = run_folder(tmp_path)
    (run / "samples.jsonl").unlink()
    (run / "recipe.yaml").write_text(
        f"model: smollm2-135m\ndata: {{train: {tmp_path / 'pairs.jsonl'}, eval: null, retain: null}}\n"
    )
    with pytest.raises(InputError, match="held out no pairs and has no probes"):
        BlindAB.open(Contest(run))
