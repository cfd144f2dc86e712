"""Fixtures for your own tests: the simulated service, a client for it, and a clock that skips every wait.

Pytest finds them as soon as the package is installed. Example tests:

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

The simulator runs in real time. If its `latency`, or tasks that a test ends itself (`manual=True`), take real time,
set `xiling_clock.skips = False` and move the clock by `xiling_clock.advance(seconds)`.

Tests may be run by pytest-asyncio (strict or auto, with loops of any scope) or by anyio (on asyncio). A simulator and
a client belong to the loop of their test, so each has one fixture for every kind of loop. The public fixtures are in
`pytest11/xiling_async_fixtures.py`.
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
    asyncio_fixture: Any = None  # tests run on anyio
else:
    asyncio_fixture = pytest_asyncio.fixture

LOOP_SCOPES: Final = ("function", "class", "module", "package", "session")
ANYIO: Final = "anyio"


def pytest_configure(config: pytest.Config) -> None:
    module = ModuleType("xiling_async_loop_fixtures")  # pytest collects generated fixtures from a module
    for runner in (ANYIO, *LOOP_SCOPES) if asyncio_fixture else (ANYIO,):
        for suffix, function in _fixture_functions().items():
            name = f"_xiling_{suffix}_{runner}"
            decorator = pytest.fixture(name=name) if runner == ANYIO else asyncio_fixture(name=name, loop_scope=runner)
            setattr(module, name, decorator(function))
    config.pluginmanager.register(module, module.__name__)


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


def _fixture_functions() -> dict[str, Callable[..., AsyncIterator[Any]]]:
    """New functions for each call: the fixture decorator stores the loop scope on the function."""

    async def simulator(xiling_simulator_options: dict[str, Any]) -> AsyncIterator[Simulator]:
        async with Simulator(**xiling_simulator_options) as simulator:
            yield simulator

    async def client(
        xiling_simulator: Simulator, xiling_clock: SkippingClock, xiling_client_options: dict[str, Any]
    ) -> AsyncIterator[Client]:
        options = {
            "api_key": xiling_simulator.api_key,
            "base_url": xiling_simulator.base_url,
            "receiver": WebhookReceiver(port=0),
            "clock": xiling_clock,
            "allow_private": True,
        }
        async with Client(**{**options, **xiling_client_options}) as client:
            yield client

    return {"simulator": simulator, "client": client}


def _runner_of(request: pytest.FixtureRequest) -> str:
    """What runs this test: anyio, or the loop scope of pytest-asyncio."""
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
