"""The command as a whole: its help, its completion, its exit codes, and Ctrl-C at any moment of its life."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
from test_submit import DEADLINE_S, IMAGE, SOURCE, environment, started, xiling
from typer.testing import CliRunner

from xiling_async.cli import app
from xiling_async.simulator import Simulator

START = [sys.executable, "-W", "error", "-c"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- help, completion ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", app.COMMANDS)
def test_the_line_in_the_help_is_the_first_of_the_commands_own(name: str) -> None:
    """`xiling --help` imports no command: its lines are kept beside their names, and are those of the commands."""
    module, line = app.COMMANDS[name]
    assert getattr(import_module(f"xiling_async.cli.{module}"), name).__doc__.split("\n", 1)[0] == line


def test_help_imports_no_command() -> None:
    """What a command needs is imported when it is used."""
    code = (
        "import sys\nfrom xiling_async.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(*(name for name in sys.modules if name.startswith(('xiling_async.cli.', 'jinja2', 'xiling_async.sim'))))"
    )
    done = subprocess.run([*START, code], env={"PYTHONPATH": str(SOURCE)}, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert loaded == {"xiling_async.cli.app", "xiling_async.cli.output", "xiling_async.cli.report"}


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("xiling su", {"submit"}),
        ("xiling ", set(app.COMMANDS)),
        ("xiling submit --re", {"--reference", "--resolution"}),
        ("xiling jobs --state acc", {"accepted"}),
        ("xiling download --what ", {"video", "thumbnail", "both"}),
    ],
)
def test_shell_completion(typed: str, offered: set[str]) -> None:
    """Commands, options and choices are completed in the shell, and nothing else happens."""
    words = {"_XILING_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    code = "from xiling_async.cli import main; main()"
    env = {"PYTHONPATH": str(SOURCE), **words}
    done = subprocess.run([*START, code], env=env, capture_output=True, text=True, check=False)
    assert (set(done.stdout.split()), done.stderr) == (offered, "")


def test_the_completion_can_be_shown() -> None:
    """For the shells that typer knows, the script that a user installs."""
    for shell in ("bash", "zsh", "fish"):
        done = CliRunner().invoke(app.app, ["--show-completion", shell])
        assert done.exit_code == 0 and "_XILING_COMPLETE" in done.stdout


# --- exit codes ------------------------------------------------------------------------------------------------------

WORDS: dict[str, tuple[str, ...]] = {
    "submit": ("submit", "waves", *IMAGE),
    "wait": ("wait", "i2v-1"),
    "download": ("download", "i2v-1"),
    "batch": ("batch", "jobs.csv", "--out", "out"),
}
ROW = "model,prompt,image_url,aspect_ratio,aspect_resolution,duration\nV,x,https://a.example/x.jpg,16:9,720p,4\n"


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("wrong", ["no key", "bad url", "plain http", "bad public url"])
async def test_a_wrong_environment_is_exit_code_2(sim: Simulator, name: str, wrong: str) -> None:
    """A missing key, a URL that is not one, plain http: one line, nothing sent, and the code for "nothing was sent"."""
    Path("jobs.csv").write_text(ROW)
    more: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
        "no key": ((), {"XILING_API_KEY": ""}),
        "bad url": (("--base-url", "https://["), {}),
        "plain http": (("--base-url", "http://api.example/v1"), {}),
        "bad public url": (("--public-url", "nonsense", "--port", "0"), {}),
    }
    options, variables = more[wrong]
    if name == "download" and wrong == "bad public url":
        options = ("--bogus",)
    ran = await xiling(sim, *WORDS[name], *options, **variables)
    assert (ran.code, ran.out, len(sim.ledger.posts), len(sim.ledger.gets)) == (2, "", 0, 0)
    assert "Traceback" not in ran.err


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------

INTERRUPTED = """
import os, signal, sys
def interrupt(event, arguments):
    if event == "import" and arguments[0] == {module!r}:
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(interrupt)
from {entry} import main
main()
"""


@pytest.mark.parametrize(
    "module",
    ["aiohttp", "attrs", "typer", "rich.console", "xiling_async.cli.app", "xiling_async.cli.report"],
)
async def test_ctrl_c_before_anything_has_begun(sim: Simulator, module: str) -> None:
    """While the command is still being loaded: exit code 130, no traceback."""
    code = INTERRUPTED.format(module=module, entry="xiling_command")
    env = environment(sim, PYTHONPATH=f"{SOURCE}{os.pathsep}{SOURCE / 'xiling_async/cli/script'}")
    done = await asyncio.to_thread(
        subprocess.run, [*START, code], env=env, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


async def test_ctrl_c_pressed_again_and_again(sim: Simulator) -> None:
    """However often, and however late: exit code 130, one line."""
    sim.manual = True
    async with started(sim, "submit", "waves", *IMAGE, "--poll-every", "0.1") as process:
        await sim.wait_for_posts(1)
        await sim.ledger.until(lambda: bool(sim.ledger.gets))
        while process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)  # `send_signal` would look whether it has ended, and take its code
            await asyncio.sleep(0.002)
        assert process.stderr is not None
        told = (await process.stderr.read()).decode()
    assert process.returncode == 130, told
    assert "Traceback" not in told and "Exception ignored" not in told, told
