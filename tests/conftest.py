"""Fixtures for all tests: a cache of their own, the starter model, and --slow for what takes minutes."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from localdpo.paths import cache_dir

# Before anything imports huggingface_hub, which reads it once: no test reaches the Hub.
os.environ["HF_HUB_OFFLINE"] = "1"

_USER_CACHE = cache_dir()
SLOW_SECONDS = 3600


def pytest_configure() -> None:
    """Hear the signals that whoever started this ignores, as nohup and background jobs of scripts do.

    Tests send them, and to children too, which inherit what is ignored but not what is handled. A hang-up still
    leaves the suite running.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes as well")
    parser.addoption("--update-snapshots", action="store_true", help="write tests/snapshots anew instead of comparing")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.timeout(SLOW_SECONDS))
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is a coroutine in an event loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    asyncio.run(pyfuncitem.obj(**arguments))
    return True


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder for this session; only converted models are shared with the user's own cache."""
    folder = tmp_path_factory.mktemp("cache")
    (_USER_CACHE / "models").mkdir(parents=True, exist_ok=True)
    (folder / "models").symlink_to(_USER_CACHE / "models")
    before = os.environ.get("LOCALDPO_CACHE")
    os.environ["LOCALDPO_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["LOCALDPO_CACHE"]
    else:
        os.environ["LOCALDPO_CACHE"] = before


@pytest.fixture(scope="session")
def starter(_cache: Path) -> Path:
    """The starter model's folder, fetched the first time and kept in the user's cache."""
    from localdpo.model.starter import ensure_starter

    return ensure_starter()
