"""Generators that yield how far they are and return a result."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from localdpo.steps import Steps, mapped, result_of


class Work:
    """Three steps and a result; notes how it ended."""

    def __init__(self) -> None:
        self.ended = "not"

    def run(self) -> Generator[int, None, str]:
        try:
            yield from range(3)
            self.ended = "done"
        except GeneratorExit:
            self.ended = "left"
            raise
        return "made"


def test_steps_and_the_result():
    steps = Steps(Work().run())
    assert list(steps) == [0, 1, 2]
    assert steps.result == "made"
    assert result_of(Work().run()) == "made"
    changed = Steps(mapped(Work().run(), str))
    assert list(changed) == ["0", "1", "2"]
    assert changed.result == "made"


def test_there_is_no_result_before_the_end():
    steps = Steps(Work().run())
    for _ in steps:
        break
    with pytest.raises(AttributeError, match="result"):
        _ = steps.result


@pytest.mark.parametrize("wrap", [lambda work: work, lambda work: mapped(work, str)])
def test_leaving_half_way_leaves_the_work(wrap):
    work = Work()
    watched = wrap(work.run())
    next(watched)
    watched.close()
    assert work.ended == "left"


def test_what_the_work_raises_comes_through():
    def broken() -> Generator[int, None, None]:
        yield 1
        raise KeyError("a fault")

    for work in (lambda: result_of(broken()), lambda: list(Steps(broken())), lambda: result_of(mapped(broken(), str))):
        with pytest.raises(KeyError, match="a fault"):
            work()
