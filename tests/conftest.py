"""What every test stands on: nothing blocks the loop, nothing is left behind, nothing comes from the environment."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator

import hypothesis
import pg
import pytest
from blockbuster import blockbuster_ctx

from xiling_async.simulator import Simulator


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--deep", action="store_true", help="many more generated examples: minutes, not seconds")


def pytest_configure(config: pytest.Config) -> None:
    deep = bool(config.getoption("--deep"))
    hypothesis.settings.register_profile(
        "xiling",
        deadline=None,
        max_examples=5_000 if deep else 50,
        database=None,  # what a test does depends on nothing that an earlier run has left
        derandomize=not deep,  # the short form tries the same examples every time
    )
    hypothesis.settings.load_profile("xiling")


def pytest_unconfigure(config: pytest.Config) -> None:
    pg.end()


@pytest.fixture
def deep(request: pytest.FixtureRequest) -> bool:
    """Whether the long form of a test is wanted."""
    return bool(request.config.getoption("--deep"))


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, URL or secret of whoever runs the tests."""
    for name in tuple(os.environ):
        if name.startswith(("XILING_", "KEEVX_")):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def careful_loop(request: pytest.FixtureRequest, empty_environment: None) -> Iterator[None]:
    """Async tests: no blocking call of the package in the loop, and no task left over."""
    if request.node.get_closest_marker("asyncio") is None:
        yield
        return
    request.getfixturevalue("no_task_left")
    with blockbuster_ctx("xiling_async"):
        yield


@pytest.fixture
async def no_task_left() -> AsyncIterator[None]:
    yield
    await asyncio.sleep(0)  # what was cancelled last may end
    left = [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert not left, f"{len(left)} asyncio tasks were left over by this test: {', '.join(sorted(left))}"


@pytest.fixture
async def sim() -> AsyncIterator[Simulator]:
    """The service in miniature, on a free port of this machine."""
    async with Simulator() as simulator:
        yield simulator
