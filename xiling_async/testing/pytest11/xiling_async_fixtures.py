"""What pytest loads in every run of everybody who has xiling_async installed: names, and nothing heavy behind them.

It is installed beside the package and not in it (pyproject.toml), for an import of a module of the package imports
all of it. `xiling_async.testing.pytest_plugin` is the plugin, and tells how to use it; the first test that asks
loads it.
"""

import importlib
from typing import Any

import pytest

PLUGIN = "xiling_async.testing.pytest_plugin"


@pytest.fixture
def xiling_simulator_options() -> dict[str, Any]:
    """Keyword arguments of the `Simulator`; override it in a test module or a conftest."""
    return {}


@pytest.fixture
def xiling_client_options() -> dict[str, Any]:
    """Keyword arguments of the `Client`; override it in a test module or a conftest."""
    return {}


@pytest.fixture
def xiling_clock(request: pytest.FixtureRequest) -> Any:
    """The time of `xiling_client`: it stands still while something happens, and then skips to what is waited for."""
    return _made(request, "clock")


@pytest.fixture
def xiling_simulator(request: pytest.FixtureRequest) -> Any:
    """The service on a free port of this machine; `ledger` is what it saw and charged, `script` takes faults."""
    return _made(request, "simulator")


@pytest.fixture
def xiling_client(request: pytest.FixtureRequest) -> Any:
    """An open client of `xiling_simulator` with a receiver of its own, in the time of `xiling_clock`."""
    return _made(request, "client")


@pytest.fixture
def xiling_environment(xiling_simulator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Client()`, which takes base URL and key from the environment, speaks to `xiling_simulator`."""
    monkeypatch.setenv("XILING_BASE_URL", xiling_simulator.base_url)
    monkeypatch.setenv("XILING_API_KEY", xiling_simulator.api_key)


def _made(request: pytest.FixtureRequest, what: str) -> Any:
    plugins = request.config.pluginmanager
    if not plugins.has_plugin(PLUGIN):
        plugins.register(importlib.import_module(PLUGIN), PLUGIN)
    return request.getfixturevalue(f"_xiling_{what}")
