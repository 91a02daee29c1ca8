"""Generating pairs on a tiny model: seeded, resumable, by every method, from base, tuned and other models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from replies import replying
from tiny import randomise_adapter, tiny_model

from localdpo.data.candidates import Candidate, CandidateJournal, Request
from localdpo.data.pairing import Edits, Substitution
from localdpo.data.pairs import PromptRow, pair_to_json
from localdpo.data.provenance import PROVENANCE, origin_of, provenance_of
from localdpo.data.rewards import parse_rewards
from localdpo.errors import InputError
from localdpo.evaluate.generate import speakers
from localdpo.evaluate.generate.speakers import Models, Source, answer_all
from localdpo.evaluate.generate.work import (
    ByEdits,
    ByJudge,
    ByRewards,
    ByRewrite,
    BySubstitution,
    Generated,
    GenerateSettings,
    Method,
    generate_pairs,
)
from localdpo.model.load import load_model
from localdpo.model.lora import LoraSettings, attach_lora, save_adapter
from localdpo.model.sampling import SamplingOptions
from localdpo.steps import result_of

HOT = SamplingOptions(max_tokens=10, temperature=1.5)
SHORT = parse_rewards(["length:max=1;unit=characters"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Not tied: a tied tiny model repeats its prompt's last token for ever.
    return tiny_model(tmp_path_factory.mktemp("m") / "model", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    loaded = load_model(str(model))
    info = attach_lora(loaded.model, LoraSettings(rank=4))
    randomise_adapter(loaded.model, scale=0.3)
    folder = tmp_path_factory.mktemp("a") / "adapter"
    save_adapter(folder, loaded.model, info, loaded)
    return folder


def rows(count: int = 6) -> list[PromptRow]:
    return [
        PromptRow(({"role": "user", "content": f"question {n} " + "x" * (n % 3)},), line=n + 1, source="p")
        for n in range(count)
    ]


def run(prompts: list[PromptRow], settings: GenerateSettings, journal: CandidateJournal | None = None) -> Generated:
    made: Generated = result_of(
        generate_pairs(prompts, settings, CandidateJournal.open(None) if journal is None else journal)
    )
    return made


def settings(model: Path, method: Method | None = None, **changes: Any) -> GenerateSettings:
    values = {"samples": 3, "sampling": HOT, **changes}
    return GenerateSettings((Source(str(model)),), method or ByRewards(SHORT, "keep"), **values)


def plain(made: Generated) -> list[Any]:
    return [(pair.prompt, pair.chosen, pair.rejected) for pair in made.pairs]


def test_equal_seeds_give_equal_pairs_and_others_others(model: Path) -> None:
    first = run(rows(), settings(model, seed=3))
    assert len(first.pairs) >= 5
    assert first.answers == 18
    assert plain(run(rows(), settings(model, seed=3))) == plain(first)
    assert plain(run(rows(), settings(model, seed=4))) != plain(first)


def test_provenance_is_enough_to_make_an_answer_again(model: Path) -> None:
    (pair, *_) = run(rows(2), settings(model, seed=5)).pairs
    origin = origin_of(pair.extra, "chosen")
    assert origin is not None
    assert (origin.by, origin.model, origin.seed) == ("model", str(model), 5)
    assert (origin.sampling["temperature"], origin.sampling["max_tokens"]) == (1.5, 10)
    assert origin.sample is not None
    models = Models()
    speaker = models.speaker(Source(str(model)))
    request = Request(pair.prompt, origin.sample)
    steps = answer_all(speaker, [request], SamplingOptions(**origin.sampling), 5, CandidateJournal.open(None))
    (answer,) = result_of(steps)
    assert answer.text == pair.chosen
    assert pair_to_json(pair)[PROVENANCE]["rewards"][0]["reward"] == "length"


@pytest.mark.parametrize("chunks", [1, 2])
def test_an_interrupted_run_goes_on_to_the_same_pairs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunks: int
) -> None:
    monkeypatch.setattr(speakers, "CHUNK", 5)
    whole = run(rows(), settings(model, seed=1), CandidateJournal.open(tmp_path / "whole.jsonl"))
    decoded: list[int] = []
    real = speakers._decode

    def counted(speaker: Any, requests: Any, *rest: Any) -> list[Candidate]:
        if len(decoded) == chunks and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        decoded.append(len(requests))
        return real(speaker, requests, *rest)

    monkeypatch.setattr(speakers, "_decode", counted)
    path = tmp_path / "cut.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(rows(), settings(model, seed=1), CandidateJournal.open(path))
    assert len(CandidateJournal.open(path)) == 5 * chunks
    with path.open("ab") as file:
        file.write(b'{"key": "half a li')  # what a killed process may leave
    (tmp_path / "again").touch()
    resumed = run(rows(), settings(model, seed=1), CandidateJournal.open(path))
    assert plain(resumed) == plain(whole)
    assert sum(decoded) == 18  # nothing was decoded twice
    run(rows(), settings(model, seed=1), CandidateJournal.open(path))
    assert sum(decoded) == 18


def test_a_chunk_that_was_half_on_disk_ends_as_if_it_had_not_been(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "answers.jsonl"
    whole = run(rows(), settings(model), CandidateJournal.open(path))
    lines = path.read_text("utf-8").split("\n")
    path.write_text("\n".join(lines[:7]) + "\n", encoding="utf-8")
    assert plain(run(rows(), settings(model), CandidateJournal.open(path))) == plain(whole)
    assert sorted(json.loads(line)["key"] for line in path.read_text("utf-8").split("\n") if line) == sorted(
        json.loads(line)["key"] for line in lines if line
    )


def test_base_and_tuned_answer_side_by_side(model: Path, adapter: Path) -> None:
    base, tuned = Source(str(model)), Source(str(model), adapter)
    both = GenerateSettings((base, tuned), ByRewards(SHORT, "keep"), 1, SamplingOptions(max_tokens=8))
    made = run(rows(), both)
    assert made.answers == 12
    origins = [origin_of(pair.extra, side) for pair in made.pairs for side in ("chosen", "rejected")]
    assert {origin.adapter for origin in origins if origin} == {"", str(adapter)}
    assert {bool(origin.adapter_sha256) == bool(origin.adapter) for origin in origins if origin} == {True}
    # Whatever answered before, the base is the base.
    models, texts = Models(), []
    for source in (base, tuned, base):
        steps = answer_all(
            models.speaker(source), [Request(rows()[0].prompt)], SamplingOptions(max_tokens=8), 0,
            CandidateJournal.open(None),
        )  # fmt: skip
        texts.append(result_of(steps)[0].text)
    assert texts[0] == texts[2] != texts[1]


def test_what_gives_no_pair_is_counted_with_its_line(model: Path) -> None:
    prompts = [*rows(3), rows(1)[0]]
    prompts[3] = PromptRow(prompts[3].prompt, line=9, source="p")
    made = run(prompts, settings(model, ByRewards(parse_rewards(["regex:pattern=zzz"]), "keep")))
    assert made.pairs == []
    text = "\n".join(made.left_out.sentences())
    assert "3 answers: the rewards of its answers do not differ (lines 1, 2 and 3)" in text
    assert "3 answers: its prompt is an earlier one (line 9)" in text


def test_prompts_that_are_too_long_are_left_out(model: Path, tmp_path: Path) -> None:
    small = tiny_model(tmp_path / "m", tie_word_embeddings=False, overrides={"max_position_embeddings": 48})
    prompts = [*rows(1), PromptRow(({"role": "user", "content": "long " * 60},), line=2, source="p")]
    made = run(prompts, settings(small))
    assert (made.prompts, made.answers) == (2, 3)
    assert "has room for 38 (line 2)" in "\n".join(made.left_out.sentences())


def finished_at(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every answer count as finished: a tiny model never ends its turn."""
    real = speakers.batch_sample

    def sampled(*args: Any) -> list[Any]:
        return [replace(answer, finish="stop") for answer in real(*args)]

    monkeypatch.setattr(speakers, "batch_sample", sampled)


def test_a_substitution_that_applies(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished_at(model, monkeypatch)
    method = BySubstitution((Substitution("^", "Well: ", True),))
    made = run(rows(2), settings(model, method, samples=1, sampling=SamplingOptions(max_tokens=6)))
    assert len(made.pairs) == 2
    for pair in made.pairs:
        assert pair.chosen == f"Well: {pair.rejected}"
        origin = origin_of(pair.extra, "chosen")
        assert origin is not None
        assert origin.by == "substitution"


def test_edits_are_written_first_and_read_then(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished_at(model, monkeypatch)
    method = ByEdits(Edits(tmp_path / "edits.jsonl"))
    journal = CandidateJournal.open(tmp_path / "answers.jsonl")
    first = run(rows(3), settings(model, method, samples=1), journal)
    assert (len(first.to_edit), first.pairs) == (3, [])
    edited = [json.loads(line) for line in first.to_edit]
    edited[0]["edited"] = "a person's answer"
    method.edits.path.write_text("".join(json.dumps(row) + "\n" for row in edited[:2]))
    second = run(rows(3), settings(model, method, samples=1), journal)
    assert [(pair.chosen, pair.rejected) for pair in second.pairs] == [("a person's answer", edited[0]["answer"])]
    text = "\n".join(second.left_out.sentences())
    assert "its answer was not edited (line 2)" in text
    assert "is not in edits.jsonl (line 3)" in text


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "other", tie_word_embeddings=False, seed=1)


def shorter(text: str) -> str:
    first, second = text.split("[Answer A]\n")[1].split("\n\n[Answer B]\n")
    return "A" if len(first) < len(second.split("\n\n")[0]) else "B"


def test_a_judge_is_asked_in_both_orders_and_makes_pairs(
    model: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished_at(model, monkeypatch)
    asked = replying(monkeypatch, other, shorter)
    made = run(rows(4), settings(model, ByJudge(Source(str(other))), samples=2))
    assert len(asked) == 2 * made.compared
    assert len(made.pairs) + len(made.ties) == 4
    assert made.pairs
    for pair in made.pairs:
        assert len(pair.chosen) < len(pair.rejected)
        notes = provenance_of(pair.extra)
        assert notes["judge"]["model"] == str(other)
        assert notes["how"] == "judged"


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_biased_judge_gives_ties_and_no_pairs(
    model: Path, other: Path, monkeypatch: pytest.MonkeyPatch, letter: str
) -> None:
    finished_at(model, monkeypatch)
    replying(monkeypatch, other, lambda _text: letter)
    made = run(rows(3), settings(model, ByJudge(Source(str(other))), samples=3))
    assert made.pairs == []
    assert len(made.ties) == 3
    assert made.same_place == made.compared == 9
    assert len(made.ties[0]["answers"]) == 3
    assert made.ties[0][PROVENANCE]["how"] == "tie"


def test_a_rewrite_by_another_model_is_chosen(model: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished_at(model, monkeypatch)
    asked = replying(monkeypatch, other, lambda _text: "Answer: Better.")
    made = run(rows(2), settings(model, ByRewrite(Source(str(other)), "Be kind."), samples=1))
    assert {pair.chosen for pair in made.pairs} == {"Better."}
    assert all("Be kind." in text for text in asked)
    origin = origin_of(made.pairs[0].extra, "chosen")
    assert origin is not None
    assert (origin.by, origin.model) == ("rewrite", str(other))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 1}, "has no best and worst"),
        ({"sampling": SamplingOptions(max_tokens=4)}, "the same answer"),
        ({"samples": 9, "method": ByJudge(Source("m"))}, "at most 6"),
        ({"samples": 0}, "must be 1 or more"),
    ],
)
def test_settings_that_cannot_give_a_pair(model: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings(model, changes.pop("method", None), **changes)
