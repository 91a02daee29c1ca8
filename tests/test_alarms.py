"""Alarms: each goes off on what it is for, once an episode, never in a sound run, and the same after a resume."""

from __future__ import annotations

import io
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from training import collect, of, recipe_for, stopped_at, workspace, write_rows

from localdpo.console.display import make_display
from localdpo.errors import InputError
from localdpo.evaluate.figures import says
from localdpo.evaluate.probes import closing, glimpse
from localdpo.recipe import Recipe, TrainRecipe, check_recipe
from localdpo.train.alarms import THRESHOLDS, Alarms
from localdpo.train.events import EndEvent, EvalEvent, Event, SampleEvent, StartEvent, StepEvent, WarningEvent
from localdpo.train.run import RunFolder, read_events

RUNS = Path(__file__).parent / "data" / "recorded"
DOCS = Path(__file__).parents[1] / "docs" / "alarms.md"


def alarms(steps_per_epoch: int = 100, chosen: tuple[str, ...] = ("x" * 20,), **settings) -> Alarms:
    values = {"model": "-", "data": {"train": "-"}, "dpo": {}, "train": {}}
    for key, value in settings.items():
        section, _, name = key.partition("__")
        values[section][name] = value
    return Alarms.of(Recipe.model_validate(values), steps_per_epoch, chosen)


def warnings(watch: Alarms, events: list[Event]) -> list[WarningEvent]:
    return [warning for event in events for warning in (*watch.settle(event), *watch.see(event))]


def codes(watch: Alarms, events: list[Event]) -> list[tuple[str, int]]:
    return [(warning.code, warning.step) for warning in warnings(watch, events)]


def steps(count: int, **series) -> list[StepEvent]:
    """Steps with a sound step's metrics but for the given ones (_ for /), single values or one a step."""
    columns = {"loss": 0.6, "grad_norm": 1.0}
    columns |= {name.replace("_", "/", 1) if name != "grad_norm" else name: values for name, values in series.items()}
    rows = {name: np.broadcast_to(values, count) for name, values in columns.items()}
    return [
        StepEvent(step=step + 1, metrics={name: float(values[step]) for name, values in rows.items()})
        for step in range(count)
    ]


def falling(last: float, count: int = 20, reference: float = -50.0, **changes) -> list[StepEvent]:
    rewards = np.linspace(0.0, last, count)
    values = {
        "loss": np.linspace(0.7, 0.3, count),
        "rewards_chosen": rewards,
        "logps_chosen": reference + rewards / 0.1,
    }
    return steps(count, **{**values, **changes})


def answers(step: int, pairs: list[tuple[str, str]], right: list[tuple[bool, bool]] | None = None) -> list[SampleEvent]:
    judged = right or [(None, None)] * len(pairs)
    return [
        SampleEvent(step=step, base=base, tuned=tuned, base_right=was, tuned_right=now, final=False)
        for (base, tuned), (was, now) in zip(pairs, judged, strict=True)
    ]


def evaluations(*losses: float) -> list[EvalEvent]:
    return [EvalEvent(step=step, metrics={"eval_loss": loss}) for step, loss in enumerate(losses)]


# -- each alarm, by made-up series


def test_chosen_answers_that_flee_are_said_once():
    found = warnings(alarms(), falling(-1.0))
    assert [warning.code for warning in found] == ["chosen-falling"]
    assert 10 <= found[0].step <= 14
    # At step 12 rewards of 9 to 12 are -0.42 to -0.58: 5 nats of 50.
    assert re.search(r"by 5\.0 nats of 50 an answer \(rewards/chosen -0\.50\)", found[0].message)
    assert "dpo.rpo_alpha" in found[0].fix


@pytest.mark.parametrize(
    ("events", "settings"),
    [
        (falling(1.0), {}),  # the chosen answers rise
        (falling(-1.0, loss=np.linspace(0.3, 0.7, 20)), {}),  # the loss rises too
        (falling(-0.19), {}),  # less than 2 nats
        (falling(-1.0, reference=-200.0), {}),  # 10 nats of a long answer's 200
        (falling(-1.0), {"dpo__loss_type": "simpo"}),  # its rewards know no reference
    ],
)
def test_chosen_answers_that_do_well_are_not_warned_about(events, settings):
    assert codes(alarms(**settings), events) == []


def test_a_loss_near_zero_in_the_first_epoch_is_said_without_its_nll():
    events = steps(8, loss=[0.7, 0.3] + [2.001] * 6)
    for event in events[2:]:
        event.metrics["nll_loss"] = 2.0
    assert codes(alarms(8), events) == [("loss-zero", 5)]
    assert codes(alarms(4), events) == []  # by then it is the second epoch
    assert codes(alarms(8, dpo__loss_type="hinge"), events) == []
    assert codes(alarms(8, dpo__label_smoothing=0.1), events) == []


def test_margins_without_a_gradient_are_said():
    events = steps(30, rewards_margins=np.linspace(5.0, 20.0, 30), rewards_accuracies=1.0)
    found = warnings(alarms(), events)
    assert [warning.code for warning in found] == ["rewards-saturated"]
    # The mean of eight is 5 + 15/29 (step - 4.5): above 12 from step 19 on, where sigmoid(-12.5) / 0.5 is 7.5e-6.
    assert found[0].step == 19
    assert "+12.5" in found[0].message
    assert "7e-06 of its first gradient" in found[0].message
    assert codes(alarms(dpo__loss_type="ipo"), events) == []
    assert codes(alarms(), steps(30, rewards_margins=20.0, rewards_accuracies=0.9)) == []
    assert codes(alarms(), steps(30, rewards_margins=11.0, rewards_accuracies=1.0)) == []


@pytest.mark.parametrize(("limit", "words"), [(1.0, "it was scaled down to 1"), (None, "nothing scales it down")])
def test_a_gradient_that_jumps_is_said(limit, words):
    events = steps(40, grad_norm=[1.0] * 20 + [48.0] + [1.0] * 19)
    found = warnings(alarms(train__max_grad_norm=limit), events)
    assert [(warning.code, warning.step) for warning in found] == [("gradient-spike", 21)]
    assert "jumped to 48, 48 times the median of the 20 steps before (1)" in found[0].message
    assert words in found[0].message


@pytest.mark.parametrize(
    "norms",
    [
        [1.0] * 20 + [9.0] * 20,  # not ten times
        [0.01] * 20 + [0.9] + [0.01] * 19,  # below what is scaled down at all
        [50.0, 1.0] * 20,  # like that from the first step
        [1.0] * 5 + [40.0] + [1.0] * 34,  # too early to know what is usual
    ],
)
def test_gradients_that_vary_are_not_warned_about(norms):
    assert codes(alarms(), steps(40, grad_norm=norms)) == []


def test_retained_answers_that_are_lost_are_said():
    events = steps(20, retain_drift=[0.0] * 10 + [1.0] * 10)
    found = warnings(alarms(), events)
    assert [(warning.code, warning.step) for warning in found] == [("retained-changing", 15)]
    assert "0.62 nats less likely than before training (54% of its probability is left)" in found[0].message
    assert codes(alarms(), steps(20, retain_drift=[0.0, 0.9] * 10)) == []
    assert codes(alarms(train__alarms=["retained-changing=0.4"]), steps(20, retain_drift=[0.0, 0.9] * 10)) != []


def test_facts_that_are_lost_are_said_when_all_answers_are_in():
    right = [(True, False)] * 3 + [(True, True)] * 5 + [(False, False)] * 4
    found = warnings(alarms(), [*answers(6, [("a", "b")] * 12, right), *steps(1)])
    assert [(warning.code, warning.step) for warning in found] == [("facts-lost", 6)]
    assert found[0].message.startswith("3 of 8 sample questions")
    few = [(True, False)] * 2 + [(True, True)] * 3
    assert codes(alarms(), [*answers(6, [("a", "b")] * 5, few), *steps(1)]) == []
    quarter = [(True, False)] * 3 + [(True, True)] * 9
    assert codes(alarms(), [*answers(6, [("a", "b")] * 12, quarter), *steps(1)]) == []


def test_answers_that_grow_are_said():
    long = [("a" * 30, "b" * 90), ("a" * 40, "b" * 80)]
    found = warnings(alarms(), [*answers(4, long), *steps(1)])
    assert [(warning.code, warning.step) for warning in found] == [("answers-growing", 4)]
    assert "85 characters in the mean of 2 samples, 2.4 times the base's 35" in found[0].message
    assert codes(alarms(chosen=("x" * 100,)), [*answers(4, long), *steps(1)]) == []  # that is what is taught
    assert codes(alarms(), [*answers(4, long[:1]), *steps(1)]) == []  # one answer says nothing
    assert codes(alarms(), [*answers(4, [("yes", "yes, it is")] * 4), *steps(1)]) == []  # longer by a few characters
    one = [("a" * 30, "b" * 300), ("a" * 40, "b" * 40), ("a" * 40, "b" * 40)]
    assert codes(alarms(), [*answers(4, one), *steps(1)]) == []


def test_answers_of_two_moments_are_not_mixed():
    short, long = [("a" * 30, "b" * 30)] * 2, [("a" * 30, "b" * 100)] * 2
    assert codes(alarms(), [*answers(4, short), *answers(8, long), *steps(1)]) == [("answers-growing", 8)]


def test_a_rising_held_out_loss_is_said():
    assert codes(alarms(), evaluations(1.0, 0.5, 0.6, 0.7, 0.8, 0.9)) == [("held-out-rising", 4)]
    assert codes(alarms(), evaluations(1.0, 0.5, 0.6, 0.55, 0.7, 0.6)) == []
    assert codes(alarms(), evaluations(0.5, 0.6, 0.7)) == []


# -- episodes, replay, settings


@pytest.mark.parametrize(
    ("code", "bad", "good"),
    [
        ("rewards-saturated", {"rewards_margins": 14.0, "rewards_accuracies": 1.0}, {"rewards_margins": 5.0}),
        ("retained-changing", {"retain_drift": 0.9}, {"retain_drift": 0.0}),
        ("gradient-spike", {"grad_norm": 40.0}, {"grad_norm": 1.0}),
    ],
)
def test_an_alarm_goes_off_anew_after_a_calm_and_not_while_it_wavers(code, bad, good):
    calm = {**bad, **good}
    wavering = {name: np.where(np.arange(6) % 2, values, np.mean([values, bad[name]])) for name, values in bad.items()}
    episodes = [(20, calm), (3 if code == "gradient-spike" else 12, bad), (6, wavering), (24, calm), (12, bad)]
    parts = [steps(count, **values) for count, values in episodes]
    events = [StepEvent(step=n, metrics=event.metrics) for n, event in enumerate([e for p in parts for e in p], 1)]
    found = codes(alarms(train__alarms=[code]), events)
    assert [name for name, _ in found] == [code, code]
    first_bad, second_bad = 20, sum(count for count, _ in episodes[:4])
    assert first_bad < found[0][1] <= first_bad + 12
    assert second_bad < found[1][1]


def recorded(name: str) -> list[Event]:
    return read_events(RUNS / f"{name}.jsonl").events


def watching(name: str, events: list[Event], **settings) -> Alarms:
    start = of(events, StartEvent)[0]
    return alarms(start.steps_per_epoch, dpo__rpo_alpha=0.0 if name == "broken" else 1.0, **settings)


@pytest.mark.parametrize("name", ["sound-1", "sound-2"])
def test_a_sound_run_sets_nothing_off(name):
    events = recorded(name)
    assert len(of(events, StepEvent)) >= 60
    assert len(of(events, SampleEvent)) >= 40
    assert codes(watching(name, events), events) == []


def test_a_run_that_broke_the_model_was_said_to_in_its_first_epoch():
    events = recorded("broken")
    found = warnings(watching("broken", events), events)
    assert {(warning.code, warning.step) for warning in found} == {("retained-changing", 10), ("chosen-falling", 11)}
    assert of(events, StartEvent)[0].steps_per_epoch == 19


def everything() -> list[Event]:
    """A run in which all goes wrong, each thing twice or so."""
    events: list[Event] = []
    for part in range(2):
        bad = falling(
            -3.0,
            rewards_margins=np.linspace(0, 30, 20),
            rewards_accuracies=1.0,
            retain_drift=np.linspace(0, 2, 20),
            grad_norm=[1.0] * 15 + [60.0] + [1.0] * 4,
        )
        good = falling(0.5, rewards_margins=1.0, rewards_accuracies=0.7, retain_drift=0.0)
        for number, event in enumerate([*bad, *good], 40 * part + 1):
            events.append(StepEvent(step=number, metrics=event.metrics))
            if number % 5 == 0:
                events.append(EvalEvent(step=number, metrics={"eval_loss": 0.5 + 0.1 * (number % 20)}))
                right = [(True, number % 20 != 0)] * 4
                events += answers(number, [("a" * 30, "b" * (100 if number % 20 == 0 else 30))] * 4, right)
    return [*events, EndEvent(step=80, reason="finished")]


def test_wherever_a_run_is_resumed_the_same_alarms_go_off():
    events = everything()
    whole = each(alarms(), events)
    assert {code for found in whole for code, _, _ in found} == set(THRESHOLDS) - {"loss-zero"}
    assert sum(map(len, whole)) > len(THRESHOLDS)
    for cut in range(len(events)):
        resumed = alarms()
        resumed.replay(events[:cut])
        assert each(resumed, events[cut:]) == whole[cut:], cut


def each(watch: Alarms, events: list[Event]) -> list[list[tuple[str, int, str]]]:
    """What every event gives rise to."""
    return [[(w.code, w.step, w.message) for w in (*watch.settle(event), *watch.see(event))] for event in events]


def test_every_alarm_has_a_name_in_the_recipe_and_a_place_in_the_docs():
    recipe = TrainRecipe()
    assert recipe.alarm_thresholds == dict.fromkeys(THRESHOLDS)
    assert TrainRecipe(alarms=False).alarm_thresholds == {}
    assert TrainRecipe(alarms=["loss-zero=0.2", "facts-lost"]).alarm_thresholds == {
        "loss-zero": 0.2,
        "facts-lost": None,
    }
    rows = dict(re.findall(r"^\| `([a-z-]+)` \|.*\| ([\d.]+) \|$", DOCS.read_text("utf-8"), re.MULTILINE))
    assert {name: float(number) for name, number in rows.items()} == dict(THRESHOLDS)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("alarms: [loss-near-0]", "r.yaml:4 train.alarms: .* names no alarm in 'loss-near-0'"),
        ("alarms: [loss-zero=much]", "needs a number above 0 after = in 'loss-zero=much'"),
        ("alarms: [loss-zero=-1]", "needs a number above 0"),
        ("alarms: sometimes", "train.alarms: 'sometimes' is not accepted here"),
        ("stop_on: [loss]", "train.stop_on: .* should be 'chosen-falling', "),
        ("{alarms: [loss-zero], stop_on: [facts-lost]}", "names facts-lost, which train.alarms leaves out"),
    ],
)
def test_what_the_recipe_has_wrong_is_said(line, complaint):
    text = f"model: x\ndata: {{train: y}}\ntrain:\n  {line}\n"
    with pytest.raises(InputError, match=complaint):
        check_recipe(text, "r.yaml", check_files=False)


# -- real runs of a tiny model


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = workspace(tmp_path_factory.mktemp("work"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCALDPO_CACHE", str(folder / "cache"))
        yield folder


STEADY = {"train__lr_scheduler_type": "constant", "train__warmup_ratio": 0.0, "data__eval": None}
HARD = {**STEADY, "dpo__rpo_alpha": 0.0, "dpo__beta": 0.5, "train__learning_rate": 0.05, "train__num_train_epochs": 3.0}


def said(events: list[Event]) -> list[str]:
    return [warning.code for warning in of(events, WarningEvent) if warning.code in THRESHOLDS]


def pairs_at(root: Path, name: str, rows: list[tuple[str, str]]) -> Path:
    return write_rows(
        root / name, [{"prompt": f"say {n}", "chosen": c, "rejected": r} for n, (c, r) in enumerate(rows)]
    )


@pytest.fixture(scope="module")
def heart(root):
    """The events of a run that learns its pairs by heart."""
    return collect(recipe_for(root, output_dir=root / "runs" / "heart", **HARD))


def test_learning_by_heart_sets_off_the_alarms_for_it(root, heart):
    assert said(heart) == ["loss-zero", "rewards-saturated"]
    assert RunFolder(root / "runs" / "heart").events().events == [event for event in heart if event.kind != "progress"]


@pytest.mark.slow
def test_a_sound_run_of_a_tiny_model_sets_nothing_off(root):
    assert said(collect(recipe_for(root, data__retain=root / "keep.jsonl", output_dir=root / "runs" / "sound"))) == []


@pytest.mark.slow
def test_answers_that_hardly_differ_make_the_chosen_ones_fall(root):
    rows = [(f"my name is quick fox number {n}", f"my name is quick fox number {n}!") for n in range(24)]
    recipe = recipe_for(
        root,
        data__train=pairs_at(root, "near.jsonl", rows),
        output_dir=root / "runs" / "near",
        dpo__rpo_alpha=0.0,
        train__learning_rate=0.01,
        train__num_train_epochs=4.0,
        **STEADY,
    )
    assert "chosen-falling" in said(collect(recipe))


@pytest.mark.slow
def test_a_retain_weight_of_next_to_nothing_loses_the_retained_answers(root):
    recipe = recipe_for(
        root,
        data__retain=root / "keep.jsonl",
        data__retain_weight=0.001,
        output_dir=root / "runs" / "retain",
        train__learning_rate=0.02,
        train__num_train_epochs=3.0,
        train__alarms=["retained-changing"],
        **STEADY,
    )
    assert said(collect(recipe)) == ["retained-changing"]


@pytest.mark.slow
def test_one_odd_pair_makes_the_gradient_jump(root):
    rows = [*[("my name is fox", "hello")] * 23, ("\x07 Zq9^ %% ~~ kJ ||| ÿ", "my name is fox")]
    recipe = recipe_for(
        root,
        data__train=pairs_at(root, "odd.jsonl", rows),
        output_dir=root / "runs" / "odd",
        train__per_device_train_batch_size=1,
        train__learning_rate=0.01,
        train__alarms=["gradient-spike"],
        **STEADY,
    )
    events = collect(recipe)
    assert said(events) == ["gradient-spike"]
    (step,) = [warning.step for warning in of(events, WarningEvent) if warning.code == "gradient-spike"]
    norms = {event.step: event.metrics["grad_norm"] for event in of(events, StepEvent)}
    assert norms[step] == max(norms[n] for n in norms if n >= step)


@pytest.mark.slow
def test_answers_that_grow_are_seen_between_epochs_and_end_the_run(root):
    model = root / "brief"
    model.mkdir()
    for file in (root / "model").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    weights = dict(mx.load(str(model / "model.safetensors")))
    # A louder end of turn: this model's answers are short, and some are empty.
    weights["lm_head.weight"][2] = weights["lm_head.weight"][2] * 4
    mx.save_safetensors(str(model / "model.safetensors"), weights, metadata={"format": "mlx"})
    answer = "hello there"
    rows = [
        {"prompt": f"what is your name {n}", "chosen": f"{answer} {answer} {answer}", "rejected": answer}
        for n in range(24)
    ]
    recipe = recipe_for(
        root,
        model=str(model),
        data__train=write_rows(root / "long.jsonl", rows),
        data__probes=write_rows(root / "name.jsonl", [{"prompt": f"your name {n}"} for n in range(6)]),
        output_dir=root / "runs" / "grow",
        dpo__rpo_alpha=0.3,
        train__learning_rate=0.01,
        train__num_train_epochs=3.0,
        train__sample_prompts=6,
        train__stop_on=["answers-growing"],
        **STEADY,
    )
    events = collect(recipe, glimpse=glimpse, closing=closing)
    warning = next(warning for warning in of(events, WarningEvent) if warning.code == "answers-growing")
    assert any(sample.step == warning.step and not sample.final for sample in of(events, SampleEvent))
    assert events[-1].reason == "alarm"
    assert events[-1].step < of(events, StartEvent)[0].total_steps


@pytest.mark.slow
def test_facts_that_are_lost_are_counted_at_the_end_before_the_end_event(root):
    prompts = [{"prompt": f"capital {n}"} for n in range(12)]
    settings = {"output_dir": root / "runs" / "facts", "train__sample_prompts": 0, **HARD}
    first = collect(
        recipe_for(root, data__probes=write_rows(root / "ask.jsonl", prompts), **settings),
        glimpse=glimpse,
        closing=closing,
    )
    for row, sample in zip(prompts, of(first, SampleEvent), strict=True):
        # What this random model "knows" is whatever it says, where that has a letter to look for.
        words = [word for word in re.findall(r"\w+", sample.base) if says(sample.base, [word])]
        row["accept"] = [max(words, key=len)] if words else ["unknown"]
    events = collect(
        recipe_for(root, data__probes=write_rows(root / "known.jsonl", prompts), **settings),
        glimpse=glimpse,
        closing=closing,
    )
    assert said(events)[-1] == "facts-lost"
    assert events[-2].code == "facts-lost"
    assert isinstance(events[-1], EndEvent)


@pytest.mark.parametrize("step", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_resumed_run_says_what_an_uninterrupted_one_says(root, heart, step):
    halves = recipe_for(root, output_dir=root / "runs" / f"halves-{step}", **HARD)
    first = stopped_at(halves, step)
    # The first alarm goes off at step 4: after the first cut, before the second.
    assert said(first) == (["loss-zero"] if step == 5 else [])
    collect(halves, resume=True)
    kept = of(RunFolder(halves.output_dir).events().events, WarningEvent)
    assert [(w.code, w.step, w.message) for w in kept] == [(w.code, w.step, w.message) for w in of(heart, WarningEvent)]
    assert len(kept) == 2


def test_an_alarm_may_end_the_run_and_a_resume_may_leave_it_out(root):
    folder = root / "runs" / "ended"
    events = collect(recipe_for(root, output_dir=folder, **HARD, train__stop_on=["loss-zero"]))
    end = events[-1]
    assert (end.reason, end.step, end.adapter_step) == ("alarm", 4, 4)
    assert "loss-zero" in end.message
    assert (folder / "adapter" / "adapters.safetensors").is_file()
    with pytest.raises(InputError, match="finished"):
        collect(recipe_for(root, output_dir=folder, **HARD, train__stop_on=["loss-zero"]), resume=True)
    again = collect(recipe_for(root, output_dir=folder, **HARD), resume=True)
    assert again[-1].reason == "finished"
    assert said(again) == ["rewards-saturated"]


def test_alarms_can_be_switched_off(root):
    events = collect(
        recipe_for(root, output_dir=root / "runs" / "off", **HARD, train__alarms=False, train__max_steps=6)
    )
    assert said(events) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_the_console_shows_every_alarm_with_its_advice(stream, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    found = warnings(alarms(), everything())
    out = stream()
    with make_display(False, out) as display:
        for warning in found:
            display.show(warning)
    plain = " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).split())
    for warning in found:
        assert f"warning: {warning.message} {warning.fix}" in plain
