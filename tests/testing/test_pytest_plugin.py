"""The pytest plugin: the documented example runs under each way of running async tests."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from pathlib import Path

import pytest

from xiling_async.testing import pytest_plugin

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "xiling_async/testing/pytest11"
EXAMPLE = textwrap.dedent("    " + (pytest_plugin.__doc__ or "").partition(":\n\n    ")[2].partition("\n\n`xiling_")[0])
READMES = re.findall(r"^```py\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)

MARKED = "import pytest\n\npytestmark = pytest.mark.asyncio\n"
HOW = {
    "pytest-asyncio, auto": ("asyncio_mode = auto", "", ()),
    "pytest-asyncio, strict": ("", MARKED, ()),
    "one loop for the module": ("", MARKED.replace("asyncio\n", "asyncio(loop_scope='module')\n"), ()),
    "one loop for the session": ("asyncio_mode = auto\nasyncio_default_test_loop_scope = session", "", ()),
    "anyio": (
        "",
        MARKED.replace("asyncio", "anyio") + "\n\n@pytest.fixture\ndef anyio_backend():\n    return 'asyncio'\n",
        (),
    ),
    "anyio alone": ("anyio_mode = auto", "", ("-p", "no:asyncio")),
}


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project that uses the fixtures; pytest runs in this process, which is quicker."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{FIXTURES}")
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.syspath_prepend(FIXTURES)
    return pytester


def run(project: pytest.Pytester, source: str, ini: str = "", *options: str) -> pytest.RunResult:
    loop = "" if "no:asyncio" in options else "asyncio_default_fixture_loop_scope = function"
    project.makeini(f"[pytest]\nfilterwarnings = error\n{loop}\n{ini}")
    project.makepyfile(source)
    # By its name, and not by its entry point: this checkout need not be installed.
    return project.runpytest_inprocess("-p", "no:xiling_async", "-p", "xiling_async_fixtures", "-p", "no:cov", *options)


@pytest.mark.parametrize("way", HOW)
def test_the_documented_example_passes(project: pytest.Pytester, way: str) -> None:
    """Paid once; not twice when the answer is lost; minutes of waiting take none. No warning, nothing left open."""
    ini, head, options = HOW[way]
    result = run(project, f"{head}\n{EXAMPLE}", ini, *options)
    result.assert_outcomes(passed=3)


@pytest.mark.parametrize("number", range(len(READMES)))
def test_the_readmes_example_passes(project: pytest.Pytester, number: int) -> None:
    """Its `py` blocks are test modules, and pass as they stand."""
    result = run(project, READMES[number], "asyncio_mode = auto")
    assert result.ret == 0
    assert result.parseoutcomes()["passed"]


def test_a_double_payment_is_seen(project: pytest.Pytester) -> None:
    """The ledger reveals code that buys twice: the example without its key fails."""
    bad = EXAMPLE.replace(', key=f"order-{number}"', "")
    assert bad != EXAMPLE
    result = run(project, bad, "asyncio_mode = auto")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*assert first == again*"])


def test_options_are_fixtures_to_override(project: pytest.Pytester) -> None:
    """The simulator and the client are made with what the test module says."""
    source = """
        import pytest
        from xiling_async import Limits, MemoryStore

        STORE = MemoryStore()

        @pytest.fixture
        def xiling_simulator_options():
            return {"api_key": "another-key"}

        @pytest.fixture
        def xiling_client_options():
            return {"store": STORE, "limits": Limits(submits=1)}

        async def test_it(xiling_client, xiling_simulator):
            assert xiling_simulator.api_key == "another-key"
            assert repr(STORE) in repr(xiling_client)
    """
    run(project, textwrap.dedent(source), "asyncio_mode = auto").assert_outcomes(passed=1)


def test_code_that_makes_its_own_client_reaches_the_simulator(project: pytest.Pytester) -> None:
    """`xiling_environment` sets base URL and key; nothing has to be passed around."""
    source = """
        import pytest
        from xiling_async import Client, Rejected

        async def test_it(xiling_environment, xiling_simulator):
            async with Client() as client:
                with pytest.raises(Rejected):
                    await client.job("i2v-1").refresh()
            assert [get.task_id for get in xiling_simulator.ledger.gets] == ["i2v-1"]
    """
    run(project, textwrap.dedent(source), "asyncio_mode = auto").assert_outcomes(passed=1)


def test_a_test_that_cannot_run_says_why(project: pytest.Pytester) -> None:
    """A test without a loop, and one on trio, get an error that says what to do."""
    result = run(project, "def test_it(xiling_client): pass")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*are for async tests that pytest-asyncio or anyio runs*"])
    on_trio = """
        import pytest

        @pytest.fixture
        def anyio_backend():
            return "trio"

        def test_it(anyio_backend, xiling_client): pass
    """
    result = run(project, textwrap.dedent(on_trio))
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*let your fixture anyio_backend return*"])


def test_unused_fixtures_change_nothing(project: pytest.Pytester) -> None:
    """No test is changed by it: nothing is autouse, and `-p no:xiling_async` leaves it out."""
    result = run(project, "def test_it(request): assert not [n for n in request.fixturenames if 'xiling' in n]")
    result.assert_outcomes(passed=1)


def test_the_entry_point_costs_nothing(project: pytest.Pytester) -> None:
    """What pytest loads in everybody's runs is the module that pyproject.toml names; it imports nothing of ours."""
    assert 'xiling_async = "xiling_async_fixtures"' in (ROOT / "pyproject.toml").read_text("utf-8")
    source = """
        import sys

        def test_it(request):
            assert request.config.pluginmanager.has_plugin("xiling_async_fixtures")
            assert not [name for name in sys.modules if name.partition(".")[0] in ("xiling_async", "aiohttp")]
    """
    project.makepyfile(textwrap.dedent(source))
    project.makeini("[pytest]")
    options = ("-p", "no:cov", "-p", "no:xiling_async", "-p", "xiling_async_fixtures")
    project.run(sys.executable, "-m", "pytest", *options).assert_outcomes(passed=1)


def test_the_library_does_not_import_the_plugin(project: pytest.Pytester) -> None:
    """`import xiling_async` brings neither pytest, nor the plugin, nor the simulator."""
    code = "import sys, xiling_async; print([n for n in sys.modules if n in %r])"
    unwanted = ("pytest", "xiling_async.testing.pytest_plugin", "xiling_async.simulator", "opentelemetry")
    result = project.run(sys.executable, "-c", code % (unwanted,))
    result.stdout.fnmatch_lines(["[[]]"])
