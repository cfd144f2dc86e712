"""Fixtures for people's own tests: the service in miniature, a client of it, and a clock that waits for nothing.

Pytest knows them as soon as the package is installed. What a test looks like:

    from xiling_async import ImageToVideo
    from xiling_async.simulator import faults


    async def order(client, number):
        request = ImageToVideo(
            model="V",
            prompt="waves at dawn",
            image_url="https://example.com/sea.jpg",
            aspect_ratio="16:9",
            aspect_resolution="1080p",
            duration=8,
        )
        return await client.run(request, key=f"order-{number}")


    async def test_an_order_is_paid_once(xiling_client, xiling_simulator):
        first, again = await order(xiling_client, 42), await order(xiling_client, 42)
        assert first == again
        assert xiling_simulator.ledger.paid_submits == 1


    async def test_a_lost_answer_is_not_paid_twice(xiling_client, xiling_simulator):
        xiling_simulator.script(faults.drop_after_accept())
        await order(xiling_client, 42)
        assert xiling_simulator.ledger.paid_submits == 1


    async def test_a_lost_callback_costs_no_real_minutes(xiling_client, xiling_simulator, xiling_clock):
        began_at = xiling_clock.time()
        xiling_simulator.script(faults.lost_callback())
        await order(xiling_client, 42)
        assert xiling_clock.time() - began_at > 240
        assert len(xiling_simulator.ledger.gets) == 1

`xiling_simulator_options` and `xiling_client_options` are fixtures to override: the keyword arguments of `Simulator`
and of `Client`. `xiling_environment` is for code that makes its own `Client()`.

The simulator itself lives in real time. Where its `latency`, or tasks that it holds (`manual=True`), take some of it,
say `xiling_clock.skips = False`, and move the clock by `xiling_clock.advance(seconds)`.

Tests may be run by pytest-asyncio (strict or auto, with loops of any scope) or by anyio (on asyncio). What is open
lives in the loop of the test that asks for it, so there is a fixture of each kind for every loop that a test may run
in. The names of the public ones are in `pytest11/xiling_async_fixtures.py`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from types import ModuleType
from typing import Any, Final

import pytest

from xiling_async.client import Client
from xiling_async.simulator import Simulator
from xiling_async.testing.clock import SkippingClock
from xiling_async.webhooks.receiver import WebhookReceiver

try:
    import pytest_asyncio
except ImportError:
    asyncio_fixture: Any = None  # it does not run the tests either
else:
    asyncio_fixture = pytest_asyncio.fixture

LOOP_SCOPES: Final = ("function", "class", "module", "package", "session")
ANYIO: Final = "anyio"


def pytest_configure(config: pytest.Config) -> None:
    opened = ModuleType("xiling_async_opened")  # of nothing else does pytest take fixtures that were made
    for runner in (ANYIO, *LOOP_SCOPES) if asyncio_fixture else (ANYIO,):
        for what, made in _opened().items():
            name = f"_xiling_{what}_{runner}"
            decorated = pytest.fixture(name=name) if runner == ANYIO else asyncio_fixture(name=name, loop_scope=runner)
            setattr(opened, name, decorated(made))
    config.pluginmanager.register(opened, opened.__name__)


@pytest.fixture
def _xiling_clock() -> SkippingClock:
    return SkippingClock()


@pytest.fixture
def _xiling_simulator(request: pytest.FixtureRequest) -> Simulator:
    simulator: Simulator = request.getfixturevalue(f"_xiling_simulator_{_runner_of(request)}")
    return simulator


@pytest.fixture
def _xiling_client(request: pytest.FixtureRequest) -> Client:
    client: Client = request.getfixturevalue(f"_xiling_client_{_runner_of(request)}")
    return client


def _opened() -> dict[str, Callable[..., AsyncIterator[Any]]]:
    """New functions each time: a fixture decorator writes on the function in which loop it runs."""

    async def simulator(xiling_simulator_options: dict[str, Any]) -> AsyncIterator[Simulator]:
        async with Simulator(**xiling_simulator_options) as simulator:
            yield simulator

    async def client(
        xiling_simulator: Simulator, xiling_clock: SkippingClock, xiling_client_options: dict[str, Any]
    ) -> AsyncIterator[Client]:
        given = {
            "api_key": xiling_simulator.api_key,
            "base_url": xiling_simulator.base_url,
            "receiver": WebhookReceiver(port=0),
            "clock": xiling_clock,
            "allow_private": True,
        }
        async with Client(**{**given, **xiling_client_options}) as client:
            yield client

    return {"simulator": simulator, "client": client}


def _runner_of(request: pytest.FixtureRequest) -> str:
    """Who runs this test: anyio, or pytest-asyncio in a loop of this scope."""
    if "anyio_backend" in request.fixturenames:
        if request.getfixturevalue("anyio_backend_name") != "asyncio":
            pytest.fail("xiling_async runs on asyncio: let your fixture anyio_backend return 'asyncio'.", pytrace=False)
        return ANYIO
    marker = request.node.get_closest_marker("asyncio")
    if marker is None or asyncio_fixture is None:
        pytest.fail(
            "The fixtures of xiling_async are for async tests that pytest-asyncio or anyio runs: mark this one with "
            "@pytest.mark.asyncio or @pytest.mark.anyio.",
            pytrace=False,
        )
    scope: str | None = marker.kwargs.get("loop_scope") or marker.kwargs.get("scope")
    return scope or str(request.config.getini("asyncio_default_test_loop_scope"))
