"""The chat's conversation, commands and reader, with a speaker that is a script instead of a model."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from localdpo.console.chat import Conversation, Message, Mode, Repl, Side, Turn, save, stop_on_interrupt
from localdpo.console.talk import answer_once
from localdpo.errors import InputError


class Script:
    """A speaker that says its name, how many messages it saw and the last of them, a word at a time."""

    def __init__(self, sides: tuple[Side, ...] = ("base", "tuned"), interrupt_after: int | None = None) -> None:
        self.sides = sides
        self.seen: list[tuple[Side, list[Message]]] = []
        self.interrupt_after = interrupt_after

    def stream(self, side: Side, messages: Sequence[Message], cancelled: Callable[[], bool]) -> Iterator[str]:
        self.seen.append((side, list(messages)))
        for number, word in enumerate([side, f" {len(messages)}", " ", messages[-1]["content"]]):
            if number == self.interrupt_after:
                os.kill(os.getpid(), signal.SIGINT)
            if cancelled():
                return
            yield word


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def chat(lines: Sequence[str], mode: Mode = "tuned", speaker: Script | None = None, labels: bool = False):
    speaker = speaker or Script()
    out = io.StringIO()
    repl = Repl(Conversation(mode), speaker, out, labels)
    rest = iter(lines)

    def read() -> str:
        line = next(rest, None)
        if line is None:
            raise EOFError
        return line

    repl.run(read)
    return out.getvalue(), repl.conversation, speaker


def test_turns_carry_the_history_of_the_side_that_answers():
    out, conversation, _ = chat(["hello", "again"])
    assert out == "tuned 1 hello\ntuned 3 again\n"
    assert conversation.messages("tuned") == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "tuned 1 hello"},
        {"role": "user", "content": "again"},
    ]


def test_comparing_asks_both_with_their_own_history_and_labels_them():
    out, _, speaker = chat(["one", "two"], "compare")
    assert out.splitlines() == [
        "base> base 1 one",
        "tuned> tuned 1 one",
        "base> base 3 two",
        "tuned> tuned 3 two",
    ]
    # The tuned side must not see what the base answered to the same question, nor to the one before.
    assert [m["content"] for m in speaker.seen[1][1]] == ["one"]
    assert [m["content"] for m in speaker.seen[3][1]] == ["one", "tuned 1 one", "two"]


def test_a_side_that_joins_later_reads_what_the_user_read():
    _, _, speaker = chat(["one", "/base", "two"])
    assert speaker.seen[1] == (
        "base",
        [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "tuned 1 one"},
            {"role": "user", "content": "two"},
        ],
    )


def test_system_message_starts_afresh_and_can_be_removed():
    out, _, speaker = chat(["one", "/system Be brief.", "two", "/system", "three"])
    assert speaker.seen[1][1][0] == {"role": "system", "content": "Be brief."}
    assert [len(messages) for _, messages in speaker.seen] == [1, 2, 1]
    assert "set" in out
    assert "removed" in out


def test_reset_help_quit_unknown_and_literal_slash():
    out, _, speaker = chat(["one", "/reset", "two", "/help", "/nosuch", "//path", "/quit", "never"])
    assert [len(messages) for _, messages in speaker.seen] == [1, 1, 3]
    assert "/save" in out
    assert "unknown command /nosuch" in out
    assert speaker.seen[-1][1][-1]["content"] == "/path"


def test_without_an_adapter_only_the_base_answers():
    out, conversation, _ = chat(["/compare", "/tuned", "hi"], "base", Script(("base",)))
    assert conversation.mode == "base"
    assert out.count("no tuned model") == 2


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said():
    out, conversation, _ = chat(["one", "two"], speaker=Script(interrupt_after=2))
    assert out.splitlines() == ["tuned 1 [stopped]", "tuned 3 [stopped]"]
    assert conversation.turns[0].answers == {"tuned": "tuned 1"}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_answer_stopped_before_its_first_word_is_forgotten():
    _, conversation, _ = chat(["one"], "compare", Script(interrupt_after=0))
    assert conversation.turns == []


def test_a_second_ctrl_c_leaves():
    with pytest.raises(KeyboardInterrupt), stop_on_interrupt() as stopped:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped()
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_at_the_prompt_says_how_to_leave():
    out = io.StringIO()
    lines: list[type[BaseException]] = [EOFError, KeyboardInterrupt]

    def read() -> str:
        raise lines.pop()

    Repl(Conversation("base"), Script(), out).run(read)
    assert "Ctrl-D" in out.getvalue()


def test_what_a_model_says_is_shown_inert_and_kept_as_it_was():
    out, conversation, _ = chat(["\x1b]52;c;AAAA\x07 \u202egnp"])
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "␛" in out
    assert "\x1b]52" in conversation.turns[0].answers["tuned"]


def test_an_error_of_one_turn_does_not_end_the_chat():
    class Failing(Script):
        def stream(self, side, messages, cancelled):
            if messages[-1]["content"] == "bad":
                raise InputError("the prompt is too long")
            yield from super().stream(side, messages, cancelled)

    out, conversation, _ = chat(["bad", "good"], speaker=Failing())
    assert out.splitlines() == ["error: the prompt is too long.", "tuned 1 good"]
    assert len(conversation.turns) == 1


def test_save_writes_one_row_a_turn_and_never_overwrites(tmp_path: Path):
    target = tmp_path / "talk.jsonl"
    out, _, _ = chat(["/system Be brief.", "one", "two", f"/save {target}", f"/save {target}"], "compare")
    rows = [json.loads(line) for line in target.read_text("utf-8").splitlines()]
    assert [[m["content"] for m in row["prompt"]] for row in rows] == [
        ["Be brief.", "one"],
        ["Be brief.", "one", "tuned 2 one", "two"],
    ]
    assert rows[0]["base"] == "base 2 one"
    assert rows[1]["tuned"] == "tuned 4 two"
    assert "2 turns saved" in out
    assert "exists" in out.splitlines()[-1]


def test_nothing_to_save_is_said(tmp_path: Path):
    with pytest.raises(InputError, match="no turn"):
        save(Conversation("base"), tmp_path / "x.jsonl")


def test_one_question_as_json(capsys: pytest.CaptureFixture[str]):
    answer_once(Conversation("compare"), Script(), "hi", json_lines=True)
    assert json.loads(capsys.readouterr().out) == {"prompt": "hi", "base": "base 1 hi", "tuned": "tuned 1 hi"}


def test_one_question_in_a_pipe_is_the_answer_alone(capsys: pytest.CaptureFixture[str]):
    answer_once(Conversation("tuned"), Script(), "hi", json_lines=False)
    assert capsys.readouterr().out == "tuned 1 hi\n"


@pytest.mark.parametrize("as_json", [False, True])
def test_one_question_cut_short_is_printed_and_ends_as_interrupted(as_json: bool, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(KeyboardInterrupt):
        answer_once(Conversation("tuned"), Script(interrupt_after=2), "hi", json_lines=as_json)
    assert "tuned 1" in capsys.readouterr().out


def test_side_by_side_on_a_wide_terminal(monkeypatch: pytest.MonkeyPatch):
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    answer_once(Conversation("compare"), Script(), "hi \x1b[31m", json_lines=False)
    last = [line for line in out.getvalue().splitlines() if "base 1 hi" in line][-1]
    assert "tuned 1 hi ␛[31m" in last


def test_rows_of_a_one_sided_conversation():
    conversation = Conversation("base", turns=[Turn("q", {"base": "a"})])
    assert conversation.rows() == [{"prompt": [{"role": "user", "content": "q"}], "base": "a"}]
