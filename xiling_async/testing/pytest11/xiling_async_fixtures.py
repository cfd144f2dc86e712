"""The fixture names, which pytest loads in every run where xiling_async is installed; it imports nothing heavy.

It is installed beside the package and not in it (pyproject.toml), because importing a module of the package imports
the whole package. The plugin and its documentation are in `xiling_async.testing.pytest_plugin`, which is loaded by
the first test that uses a fixture.
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
    """The clock of `xiling_client`: it stands still while something happens, then skips to the next timer."""
    return _plugin_fixture(request, "clock")


@pytest.fixture
def xiling_simulator(request: pytest.FixtureRequest) -> Any:
    """The service on a free local port; `ledger` is what it received and charged, `script` takes faults."""
    return _plugin_fixture(request, "simulator")


@pytest.fixture
def xiling_client(request: pytest.FixtureRequest) -> Any:
    """An open client for `xiling_simulator` with its own receiver, on `xiling_clock`."""
    return _plugin_fixture(request, "client")


@pytest.fixture
def xiling_environment(xiling_simulator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Client()`, which takes base URL and key from the environment, uses `xiling_simulator`."""
    monkeypatch.setenv("XILING_BASE_URL", xiling_simulator.base_url)
    monkeypatch.setenv("XILING_API_KEY", xiling_simulator.api_key)


def _plugin_fixture(request: pytest.FixtureRequest, name: str) -> Any:
    plugins = request.config.pluginmanager
    if not plugins.has_plugin(PLUGIN):
        plugins.register(importlib.import_module(PLUGIN), PLUGIN)
    return request.getfixturevalue(f"_xiling_{name}")
