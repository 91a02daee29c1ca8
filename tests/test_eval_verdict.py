"""The verdict: every threshold on both its sides, what cannot be judged, and what a run folder alone says."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from localdpo.evaluate.evidence import EVAL_FILE, evidence_of_evaluation, evidence_of_events, verdict_of_run
from localdpo.evaluate.intervals import Figure, share
from localdpo.evaluate.verdict import KEPT_LIMITS, Evidence, Verdict, judge, verdict_from_json
from localdpo.train.events import EndEvent, EvalEvent, Event, SampleEvent, StartEvent, StepEvent, event_line
from localdpo.train.run import RunFolder

HELD_OUT = Evidence(accuracy=share(18, 20), nats=Figure(4.0), pairs=20)


def probed(right: int, count: int = 24, base: int = 0) -> Evidence:
    return Evidence(taught=share(right, count), taught_base=base / count, taught_count=count)


@pytest.mark.parametrize(
    ("right", "pairs", "nats", "word"),
    [
        (18, 20, 4.0, "learned"),
        (15, 20, 1.0, "learned"),  # 75 %, its interval above a half, and 1 nat
        (14, 20, 4.0, "partly"),  # 70 %
        (15, 20, 0.99, "partly"),
        (20, 20, 0.31, "partly"),
        (20, 20, 0.29, "not"),  # signs turn before anything is learned
        (20, 20, -1.0, "not"),
        (12, 20, 4.0, "partly"),
        (11, 20, 4.0, "not"),  # below 60 %
        (3, 4, 4.0, "partly"),  # 75 %, but of four
        (2, 4, 4.0, "not"),
    ],
)
def test_learned_by_held_out_pairs(right: int, pairs: int, nats: float, word: str):
    verdict = judge(Evidence(accuracy=share(right, pairs), nats=Figure(nats), pairs=pairs))
    assert verdict.learned == word
    (reason,) = verdict.reasons
    assert reason.word == word
    assert f"of {pairs} held-out pairs" in verdict.words


@pytest.mark.parametrize(
    ("right", "count", "base", "word"),
    [
        (20, 24, 0, "learned"),
        (17, 24, 0, "learned"),  # 71 %
        (16, 24, 0, "partly"),  # 67 %
        (1, 24, 0, "partly"),  # above the base's none at all, and no more
        (0, 24, 0, "not"),
        (20, 24, 20, "not"),  # the base says it as well
        (22, 24, 17, "learned"),
        (20, 24, 17, "not"),  # 17 may be chance
    ],
)
def test_learned_by_probes(right: int, count: int, base: int, word: str):
    assert judge(probed(right, count, base)).learned == word


def both(held_out: Evidence, probes: Evidence) -> Evidence:
    taught = {name: getattr(probes, name) for name in ("taught", "taught_base", "taught_count")}
    return replace(held_out, **taught)


@pytest.mark.parametrize(
    ("held_out", "right", "word"),
    [
        (HELD_OUT, 20, "learned"),
        (HELD_OUT, 0, "partly"),  # log-probs say yes, answers no
        (Evidence(accuracy=share(10, 20), nats=Figure(0.0), pairs=20), 20, "partly"),
        (Evidence(accuracy=share(10, 20), nats=Figure(0.0), pairs=20), 0, "not"),
        (Evidence(accuracy=share(4, 4), nats=Figure(4.0), pairs=4), 20, "learned"),
        (Evidence(accuracy=share(3, 4), nats=Figure(4.0), pairs=4), 20, "learned"),  # only too few to tell
        (Evidence(accuracy=share(3, 4), nats=Figure(4.0), pairs=4), 0, "not"),
    ],
)
def test_when_both_speak(held_out: Evidence, right: int, word: str):
    verdict = judge(both(held_out, probed(right)))
    assert verdict.learned == word
    assert {reason.figure for reason in verdict.reasons} >= {"taught answers"}


@pytest.mark.parametrize(
    ("accuracy", "nats", "word"), [(1.0, 5.0, "partly"), (1.0, 0.5, "not"), (0.6, 5.0, "not"), (0.9, None, "partly")]
)
def test_training_pairs_alone_never_say_learned(accuracy: float, nats: float | None, word: str):
    verdict = judge(Evidence(trained_accuracy=accuracy, trained_nats=nats))
    assert verdict.learned == word
    assert judge(replace(HELD_OUT, trained_accuracy=0.0)).learned == "learned"  # held-out pairs go before


KEPT = {
    "facts kept": lambda value: {"facts": Figure(value), "facts_count": 20},
    "leakage": lambda value: {"leakage": Figure(value), "unrelated": 20},
    "repetition": lambda value: {"repetition": Figure(value)},
    "KL a token": lambda value: {"kl": Figure(value)},
    "retain drift": lambda value: {"retain_drift": value},
    "chosen log-prob": lambda value: {"chosen_nll": value},
}


@pytest.mark.parametrize("name", KEPT_LIMITS)
def test_each_figure_of_what_was_kept_has_two_limits(name: str):
    limits = KEPT_LIMITS[name]
    towards = 1 if limits.broken > limits.kept else -1
    for value, word in [
        (limits.kept, "kept"),
        (limits.kept - towards * 0.01, "kept"),
        (limits.kept + towards * 0.01, "drifted"),
        (limits.broken - towards * 0.01, "drifted"),
        (limits.broken, "broken"),
        (limits.broken + towards * 0.01, "broken"),
    ]:
        verdict = judge(Evidence(**KEPT[name](value)))
        assert (verdict.kept, verdict.learned) == (word, None), value
        (reason,) = verdict.reasons
        assert (reason.figure, reason.value) == (name, value)
        assert reason.threshold == (limits.broken if word == "broken" else limits.kept)


def test_the_worst_figure_decides_and_comes_first():
    evidence = replace(probed(20), facts=share(20, 20), facts_count=20, repetition=Figure(0.4), kl=Figure(0.1))
    verdict = judge(evidence)
    assert verdict.kept == "broken"
    assert "repetition" in verdict.words
    assert [reason.word for reason in verdict.reasons] == ["learned", "broken", "kept", "kept"]


def test_a_share_of_a_few_answers_decides_nothing():
    assert judge(Evidence(facts=share(0, 4), facts_count=4, leakage=share(4, 4), unrelated=4)).kept is None
    assert judge(Evidence(facts=share(0, 5), facts_count=5)).kept == "broken"


def test_what_there_is_no_figure_for_is_said():
    verdict = judge(Evidence())
    assert (verdict.learned, verdict.kept, verdict.reasons) == (None, None, ())
    assert "whether it learned could not be judged" in verdict.words
    assert "no pair was held out" in verdict.words
    assert "what it kept could not be judged" in judge(HELD_OUT).words
    assert "\n" not in verdict.words


def test_a_verdict_comes_back_from_json():
    verdict = judge(replace(probed(20), facts=share(20, 20), facts_count=20, chosen_nll=1.5))
    assert verdict_from_json(json.loads(json.dumps(verdict.to_json()))) == verdict


@pytest.mark.parametrize(
    "data", [None, [], {}, {"words": 3}, {"words": "w", "learned": "yes"}, {"words": "w", "kept": []}]
)
def test_what_is_no_verdict_is_none(data: Any):
    assert verdict_from_json(data) is None


def test_reasons_that_cannot_be_read_are_left_out():
    data = judge(HELD_OUT).to_json()
    rows = [*data["reasons"], 3, {}, {**data["reasons"][0], "word": "x"}, {**data["reasons"][0], "value": None}]
    found = verdict_from_json({**data, "reasons": rows})
    assert found is not None
    assert len(found.reasons) == 1


def step(number: int, chosen: float, rejected: float = -20.0, drift: float | None = None, **extra: float) -> StepEvent:
    metrics = {
        "loss": 0.5, "logps/chosen": chosen, "logps/rejected": rejected, "rewards/accuracies": 1.0,
        "rewards/margins": 0.4, **extra,
    }  # fmt: skip
    return StepEvent(step=number, metrics=metrics if drift is None else {**metrics, "retain/drift": drift})


def evaluation(number: int, accuracy: float, chosen: float, rejected: float) -> EvalEvent:
    return EvalEvent(
        step=number,
        metrics={
            "eval_loss": 1.0,
            "eval_rewards/accuracies": accuracy,
            "eval_logps/chosen": chosen,
            "eval_logps/rejected": rejected,
        },
    )


def answer(tag: str, base: str, tuned: str, right: tuple[bool, bool]) -> SampleEvent:
    prompt = [{"role": "user", "content": "q"}]
    return SampleEvent(
        prompt=prompt, base=base, tuned=tuned, tags=[tag], accept=["Athene" if tag == "identity" else "Paris"],
        base_right=right[0], tuned_right=right[1],
    )  # fmt: skip


START = StartEvent(
    total_steps=4, steps_per_epoch=2, plan={"held_out_pairs": 20, "loss": {"beta": 0.1, "loss_type": "sigmoid"}}
)


def test_evidence_is_of_the_step_that_was_published():
    events: list[Event] = [
        START,
        evaluation(0, 0.0, -40.0, -20.0),
        step(1, -40.0, drift=0.1),
        step(2, -30.0, drift=0.3),
        evaluation(2, 0.9, -30.0, -25.0),
        step(3, -20.0, drift=2.0),
        step(4, -20.0, drift=2.0),
        evaluation(4, 0.5, -90.0, -95.0),
    ]
    found = evidence_of_events(events, [], 2)
    assert found.accuracy == share(18, 20)
    assert found.nats == Figure(15.0)  # -5 now, -20 before
    assert found.chosen_nll == pytest.approx(0.75)
    assert found.retain_drift == pytest.approx(0.2)
    last = evidence_of_events(events, [], 4)
    assert last.retain_drift == pytest.approx(2.0)
    assert last.chosen_nll == pytest.approx(2.25)


@pytest.mark.parametrize(
    "plan", [{}, {"held_out_pairs": "many", "loss": 3}, {"held_out_pairs": -4, "loss": {"beta": []}}]
)
def test_events_from_anywhere_are_survived(plan: dict[str, Any]):
    strange = EvalEvent(step=2, metrics={"eval_rewards/accuracies": 7.0})
    events = [replace(START, plan=plan), evaluation(0, 0.0, -1, -1), StepEvent(step=2), step(2, 3.0), strange]
    found = evidence_of_events(events, [], 2)
    assert found.accuracy == Figure(1.0)
    assert found.nats is None
    assert judge(found).words


def test_evidence_of_training_alone():
    found = evidence_of_events([START, *(step(n, -40.0 / n) for n in range(1, 5))], [], 4)
    assert found.accuracy is None
    assert found.trained_accuracy == 1.0
    assert found.trained_nats == pytest.approx(4.0)  # margin over beta
    before, after = (40 + 20 + 40 / 3 + 10) / 4, (40 / 3 + 10) / 2
    assert found.chosen_nll == pytest.approx(after / before)


def test_rewards_without_a_reference_are_no_change_in_odds():
    plan = {**START.plan, "loss": {"beta": 2.0, "loss_type": "simpo"}}
    assert evidence_of_events([replace(START, plan=plan), step(1, -9.0)], [], 1).trained_nats is None


def test_evidence_of_the_closing_answers():
    samples = [answer("identity", "SmolLM", "Athene", (False, True))] * 3
    samples += [answer("identity", "SmolLM", "SmolLM", (False, False))]
    samples += [answer("everyday", "Paris", "Paris", (True, True))] * 5
    samples += [answer("everyday", "Paris", "Athene own you own you own you", (True, False))] * 2
    samples += [answer("everyday", "Lyon", "Paris", (False, True))]
    found = evidence_of_events([START, step(1, -9.0)], samples, 1)
    assert (found.taught, found.taught_base, found.taught_count) == (share(3, 4), 0.0, 4)
    assert (found.facts, found.facts_count) == (share(5, 7), 7)
    assert (found.leakage, found.unrelated) == (share(2, 8), 8)
    assert found.repetition is not None
    assert found.repetition.value == pytest.approx(2 * 0.4 / 12)  # 5 trigrams, 3 of them new
    glimpses = [replace(sample, final=False) for sample in samples]
    assert evidence_of_events([START], glimpses, 1).taught is None


def run_folder(path: Path, *events: Event, state: str = "finished", adapter_step: int | None = 2) -> RunFolder:
    path.mkdir()
    run = RunFolder(path)
    run.metrics_file.write_text("".join(map(event_line, events)))
    run.status_file.write_text(json.dumps({"state": state, "step": 2, "adapter_step": adapter_step}))
    run.adapter.mkdir()
    (run.adapter / "adapter_config.json").write_text("{}")
    return run


def test_a_run_folder_alone_gives_a_verdict(tmp_path: Path):
    events = (START, evaluation(0, 0.0, -40, -20), step(2, -30), evaluation(2, 0.95, -30, -30), EndEvent(step=2))
    verdict = verdict_of_run(run_folder(tmp_path / "a", *events))
    assert verdict is not None
    assert (verdict.learned, verdict.kept) == ("learned", "kept")
    assert verdict.words.startswith("learned, kept what it knew: 95% of 20 held-out pairs")


def test_a_run_that_diverged_or_published_nothing(tmp_path: Path):
    verdict = verdict_of_run(run_folder(tmp_path / "a", START, state="diverged"))
    assert verdict is not None
    assert (verdict.learned, verdict.kept) == ("not", None)
    assert "diverged" in verdict.words
    assert verdict_of_run(run_folder(tmp_path / "b", START, adapter_step=None)) is None
    assert verdict_of_run(run_folder(tmp_path / "c", START, state="training")) is not None  # its trainer is gone
    assert verdict_of_run(RunFolder(tmp_path / "none")) is None


def test_an_evaluation_of_the_published_adapter_goes_before(tmp_path: Path):
    run = run_folder(tmp_path / "a", START, step(2, -30))
    own = verdict_of_run(run)
    assert own is not None
    measured = Verdict("partly", "drifted", "measured")
    made = (run.adapter / "adapter_config.json").stat().st_mtime + 5
    data = {"format": 1, "step": 2, "created": made, "verdict": measured.to_json()}
    for change, expected in [
        ({}, measured),
        ({"step": 1}, own),  # of an adapter that was replaced
        ({"created": made - 60}, own),
        ({"created": "x"}, own),
        ({"format": 2}, own),
        ({"verdict": None}, own),
        ({"verdict": Verdict(None, None, "neither could be judged").to_json()}, own),  # as one of fairness alone
    ]:
        (run.path / EVAL_FILE).write_text(json.dumps({**data, **change}))
        assert verdict_of_run(run) == expected, change
    (run.path / EVAL_FILE).write_text("{")
    assert verdict_of_run(run) == own


def test_evidence_of_an_evaluation_prefers_probes_and_tolerates_gaps():
    kl = {"value": 0.2, "low": 0.1, "high": 0.3}
    part = {"kl_per_token": kl, "facts": 7, "facts_kept": {"value": 1.0, "low": 0.6, "high": 1.0}, "judged": 0}
    drift = {
        "retain": {**part, "kl_per_token": {**kl, "value": 9.0}},
        "probes": part,
        "taught": {**part, "judged": 10, "right": {"base": 0.1, "tuned": 0.9}},
        "leakage": None,
        "repetition": {"value": 0.0, "low": None, "high": None},
    }
    found = evidence_of_evaluation(None, drift)
    assert found.kl == Figure(0.2, 0.1, 0.3)
    assert (found.taught, found.taught_base, found.taught_count) == (share(9, 10), 0.1, 10)
    assert found.facts_count == 7
    alone = evidence_of_evaluation(None, {**drift, "probes": None, "taught": None})
    assert alone.kl is not None
    assert alone.kl.value == 9.0
    assert evidence_of_evaluation(None, None) == Evidence()
    held_out = {"accuracy": kl, "nats": kl, "pairs": 3, "chosen_nll": 0.5}
    assert math.isclose(evidence_of_evaluation(held_out, None).chosen_nll or 0, 0.5)
