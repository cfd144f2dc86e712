"""The command line, as people run it: real processes, real sockets, real terminals."""

from __future__ import annotations

import asyncio
import fcntl
import io
import os
import pty
import re
import runpy
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import IO

import attrs
import pytest
from rich.console import Console
from support import turns_until
from typer.testing import CliRunner

import xiling_async
from xiling_async import Client, ImageToVideo, State, WebhookReceiver
from xiling_async.cli import app as cli_app
from xiling_async.cli import main, output
from xiling_async.cli.commands.simulate import serve
from xiling_async.cli.demo import checks, display
from xiling_async.cli.demo.command import demo, play
from xiling_async.cli.demo.plan import FAULTS, NONE, PlannedJob, Row, plan
from xiling_async.errors import ConfigurationError
from xiling_async.simulator import Ledger, Simulator

SOURCE = Path(xiling_async.__file__).parents[1]
SAMPLES = {path.read_bytes() for path in (SOURCE / "xiling_async/simulator/media/samples").glob("*.mp4")}
COMMANDS = list(cli_app.COMMANDS)
XILING = [sys.executable, "-W", "error", "-m", "xiling_async.cli"]
ESCAPE = "\x1b"
COLOUR = rf"{ESCAPE}\[[0-9;]*3[0-9]"
DEADLINE_S = 30  # of a whole process; only a failure takes so long


def environment(**more: str) -> dict[str, str]:
    """This process's own, without what would change how things look."""
    unwanted = ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "PYTHONIOENCODING")
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    return {**kept, "PYTHONPATH": str(SOURCE), "PYTHONUTF8": "1", "TERM": "xterm-256color", **more}


def xiling(*words: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*XILING, *words], cwd=cwd, env=environment(**more), capture_output=True, encoding="utf-8", timeout=DEADLINE_S
    )


@contextmanager
def started(*words: str, cwd: Path, **more: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [*XILING, *words], cwd=cwd, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def line_with(stream: IO[str] | None, what: str) -> str:
    """Read on until a line holds this; the end of the stream is a failure."""
    assert stream is not None
    for line in stream:
        if what in line:
            return line
    raise AssertionError(f"the process ended without {what!r}")


@contextmanager
def terminal(columns: int, lines: int) -> Iterator[tuple[int, list[str]]]:
    """A terminal of this size: the file descriptor to write to, and what was written, complete at the end."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    written: list[str] = []
    reader = threading.Thread(target=_drain, args=(master, written))
    reader.start()
    try:
        yield slave, written
    finally:
        os.close(slave)
        reader.join()
        os.close(master)


def _drain(master: int, written: list[str]) -> None:
    chunks: list[bytes] = []
    try:
        while chunk := os.read(master, 65536):
            chunks.append(chunk)
    except OSError:  # nobody writes any more
        pass
    written.append(b"".join(chunks).decode())


class Interrupted(io.StringIO):
    """Output that has Ctrl-C pressed once this was written to it."""

    def __init__(self, cue: str) -> None:
        super().__init__()
        self.cue = cue

    def write(self, text: str) -> int:
        written = super().write(text)
        if self.cue and self.cue in self.getvalue():
            self.cue = ""
            signal.raise_signal(signal.SIGINT)
        return written


def one_error_line(stderr: str) -> str:
    """The one line that an error may have."""
    (line,) = stderr.splitlines()
    assert line.startswith("xiling: ")
    return line


# --- the demo, run once ----------------------------------------------------------------------------------------------


@attrs.frozen
class Ran:
    folder: Path
    result: subprocess.CompletedProcess[str]

    @property
    def lines(self) -> list[str]:
        return self.result.stdout.splitlines()

    def figures(self, pattern: str) -> list[int]:
        found = re.search(pattern, self.result.stdout)
        assert found is not None, pattern
        return [int(figure) for figure in found.groups()]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("demo")
    return Ran(folder / "videos", xiling("demo", "--jobs", "20", "--speed", "20", "--out", "videos", cwd=folder))


def test_the_demo_delivers_and_says_so(ran: Ran) -> None:
    """The demo ends with 0, nothing on stderr, and the claim in its last line."""
    assert (ran.result.returncode, ran.result.stderr, ran.lines[-1]) == (0, "", checks.DELIVERED)


def test_the_files_of_the_demo_are_whole(ran: Ran) -> None:
    """Each succeeded task has its file, byte for byte the video that the service offers."""
    files = sorted(ran.folder.iterdir())
    assert len(files) == ran.figures(r"(\d+) succeeded")[0]
    assert all(re.fullmatch(r"i2v-[0-9a-f]{32}\.mp4", file.name) for file in files)
    assert {file.read_bytes() for file in files} <= SAMPLES


def test_the_figures_of_the_demo_agree(ran: Ran) -> None:
    """Jobs, tasks, POSTs, files and the lines of the faults tell one story."""
    jobs, tasks, succeeded, failed = ran.figures(r"(\d+) jobs, (\d+) tasks: (\d+) succeeded, (\d+) failed")
    posts, paid, received, gets = ran.figures(
        r"(\d+) POSTs, (\d+) paid submits, (\d+) callbacks received, (\d+) status GETs"
    )
    by_fault = {
        name: int(n) for name, n in re.findall(rf"^([\w ]+) {display.TIMES}(\d+): ", ran.result.stdout, re.MULTILINE)
    }
    assert tasks == succeeded + failed
    assert paid == jobs == 20 == sum(by_fault.values())
    assert posts == paid + by_fault["rate_limited"]
    assert received > tasks
    assert gets == 0
    assert ran.figures(r"(\d+) videos in videos") == [succeeded]
    assert sum(line.startswith("[") for line in ran.lines) == jobs


def test_the_demo_shows_every_fault(ran: Ran) -> None:
    """Each fault of the plan is in the summary, with what became of it."""
    told = {trouble.label: next(line for line in ran.lines if line.startswith(trouble.label)) for trouble in FAULTS}
    for label in ("drop_after_accept", "status 500", "garbage"):
        assert told[label].endswith("→ adopted by callback, 1 POST each")
    assert told["early_callback"].endswith("→ done when submit returned, 1 POST each")
    assert told["rate_limited"].endswith("→ 2 POSTs each, 1 paid")
    for label in ("duplicate_callback", "progress_callback", "out_of_order"):
        callbacks, tasks = map(int, re.findall(r"(\d+) (?:callback|task)", told[label]))
        assert callbacks == 2 * tasks
    assert "say so" in told["failed"]


def test_piped_output_is_plain(ran: Ran) -> None:
    """No escape code and no secret is in what a pipe gets."""
    assert ESCAPE not in ran.result.stdout
    assert not re.search(r"[\w-]{80}|sim-key|Bearer", ran.result.stdout)


def test_the_same_seed_is_the_same_plan() -> None:
    """A plan depends on its seed and nothing else."""
    assert plan(30, seed=3, speed=2) == plan(30, seed=3, speed=2) != plan(30, seed=4, speed=2)


def test_the_demo_plans_every_model_and_mode() -> None:
    """All models, both modes of V and several outputs are in the demo as it comes."""
    requests = [take.request for take in plan(36, seed=7, speed=1)]
    assert {(request.model, request.image_url is None) for request in requests} == {
        ("V", True), ("V", False), ("KL", True), ("S", False),
    }  # fmt: skip
    assert {request.generate_count for request in requests} == {1, 2, 3, 4}


# --- the demo in other surroundings ----------------------------------------------------------------------------------


def test_ctrl_c_stops_the_demo(tmp_path: Path) -> None:
    """Ctrl-C: exit code 130, one line, no traceback."""
    with started("demo", cwd=tmp_path) as process:
        line_with(process.stdout, "[ 1/36]")
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert re.search(r"stopped with \d+ of 36 jobs done, \d+ videos? in xiling-demo$", one_error_line(stderr))


def test_ctrl_c_leaves_nothing_of_the_demo_behind(tmp_path: Path) -> None:
    """The same in this process: the exit is an orderly one, with the sockets and threads that were open."""
    out, err = Interrupted("[1/"), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
        main(["demo", "--jobs", "9", "--speed", "5", "--out", str(tmp_path)])
    assert end.value.code == 130
    assert "stopped with " in one_error_line(err.getvalue())
    assert checks.DELIVERED not in out.getvalue()


def test_the_demo_on_a_terminal(tmp_path: Path) -> None:
    """On a terminal the jobs are a live table that leaves the cursor visible; NO_COLOR is obeyed."""
    with terminal(80, 24) as (slave, written):
        done = subprocess.run(
            [*XILING, "demo", "--jobs", "8", "--speed", "20"],
            cwd=tmp_path, env=environment(NO_COLOR="1"), stdout=slave, stderr=subprocess.PIPE, timeout=DEADLINE_S,
        )  # fmt: skip
    (text,) = written
    assert (done.returncode, done.stderr) == (0, b"")
    assert "8/8 jobs" in text
    assert text.rindex(f"{ESCAPE}[?25h") > text.rindex(f"{ESCAPE}[?25l")
    assert not re.search(COLOUR, text)
    assert checks.DELIVERED in text


def test_a_pipe_gets_lines_whatever_the_colour(tmp_path: Path) -> None:
    """FORCE_COLOR is a wish for colour: nothing that moves a cursor goes into a pipe."""
    done = xiling("demo", "--jobs", "2", "--speed", "50", cwd=tmp_path, FORCE_COLOR="1")
    assert done.returncode == 0
    assert re.search(COLOUR, done.stdout)
    assert f"{ESCAPE}[?25l" not in done.stdout
    assert "[2/2]" in done.stdout


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that cannot move its cursor is written to line by line."""
    with terminal(80, 24) as (slave, _), os.fdopen(os.dup(slave), "w") as file:
        for term, expected in (("xterm", True), ("dumb", False)):
            monkeypatch.setenv("TERM", term)
            assert output.is_live(Console(file=file)) is expected


def test_the_reader_of_the_output_may_go_away(tmp_path: Path) -> None:
    """`xiling demo | head -1` is no error."""
    with started("demo", "--jobs", "4", "--speed", "20", cwd=tmp_path) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(DEADLINE_S) == 0


def test_an_old_terminal_is_no_error(tmp_path: Path) -> None:
    """What the encoding of the output has no character for is replaced."""
    done = xiling("demo", "--jobs", "2", "--speed", "50", cwd=tmp_path, PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert " ?1: taken, answer lost ? adopted by callback" in done.stdout


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """A folder that cannot be made is one line and exit code 1."""
    (tmp_path / "file").touch()
    done = CliRunner().invoke(cli_app.app, ["demo", "--out", str(tmp_path / "file/videos")])
    assert done.exit_code == 1
    assert one_error_line(done.stderr) == f"xiling: {tmp_path}/file/videos: Not a directory"


def test_a_video_that_cannot_be_written(tmp_path: Path) -> None:
    """The demo does not claim what the disk did not take: one line, exit code 1."""
    command = ["demo", "--jobs", "2", "--speed", "50", "--out"]
    assert CliRunner().invoke(cli_app.app, [*command, str(tmp_path / "a")]).exit_code == 0
    taken = next((tmp_path / "a").iterdir()).name
    (tmp_path / "b" / taken).mkdir(parents=True)
    done = CliRunner().invoke(cli_app.app, [*command, str(tmp_path / "b")])
    assert done.exit_code == 1
    line = one_error_line(done.stderr)
    assert line.startswith("xiling: the demo failed: 1 video not saved; job #")
    assert line.endswith(f"cannot be saved in '{tmp_path}/b': is a directory.")
    assert checks.DELIVERED not in done.stdout


# --- the command itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_has_an_example(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """Every help has an example and fits 80 columns; `xiling` alone is its help."""
    monkeypatch.setenv("COLUMNS", "80")
    done = CliRunner().invoke(cli_app.app, words)
    assert (done.exit_code, done.stderr) == (0, "")
    assert re.search(r"Example.*:\n +xiling \w+", done.stdout)
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert ESCAPE not in done.stdout


def test_the_real_command_shows_its_help(tmp_path: Path) -> None:
    """`xiling` alone, as a process: the help, exit code 0."""
    done = xiling(cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(re.search(rf"^  {name} ", done.stdout, re.MULTILINE) for name in COMMANDS)


@pytest.mark.parametrize(
    "words", [["--bogus"], ["bogus"], ["demo", "--bogus"], ["demo", "--jobs", "0"], ["simulate", "--host", " "]]
)
def test_a_wrong_option(words: list[str]) -> None:
    """What is not understood is a usage error: exit code 2, and where the help is."""
    done = CliRunner().invoke(cli_app.app, words)
    assert done.exit_code == 2
    assert "Usage: " in done.stderr and "Error: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_option_of_the_real_command(tmp_path: Path) -> None:
    """The process ends with 2, too."""
    done = xiling("demo", "--bogus", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "No such option: --bogus" in done.stderr


def test_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """--version is that of the installed distribution, and no error where there is none."""
    assert CliRunner().invoke(cli_app.app, ["--version"]).output.startswith("xiling-async ")
    metadata = tmp_path / "xiling_async-9.8.7.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: xiling-async\nVersion: 9.8.7\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert (end.value.code, capsys.readouterr().out) == (0, "xiling-async 9.8.7\n")


@pytest.mark.parametrize("absent", ["typer", "rich"])
def test_without_the_extra(tmp_path: Path, absent: str) -> None:
    """Without typer or rich: one line that says what to install, exit code 2."""
    code = f"import sys; sys.modules[{absent!r}] = None; from xiling_async.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'xiling-async[cli]'" in one_error_line(done.stderr)


@pytest.mark.parametrize(("absent", "expected"), [("typer", SystemExit), ("attrs", ModuleNotFoundError)])
def test_only_the_extra_is_excused(monkeypatch: pytest.MonkeyPatch, absent: str, expected: type[BaseException]) -> None:
    """Another missing module is not taken for the missing extra."""
    for name in [name for name in sys.modules if name.startswith("xiling_async.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(expected):
        runpy.run_path(str(SOURCE / "xiling_async/cli/__init__.py"))["main"]()


# --- simulate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
async def test_simulate_serves_until_it_is_told_to_end(tmp_path: Path, how: signal.Signals) -> None:
    """The printed address and key work; each create and callback is a line; a signal ends it with 0."""
    process = await asyncio.create_subprocess_exec(
        *XILING, "simulate", "--port", "0", "--latency", "0", cwd=tmp_path, env=environment(),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        async with asyncio.timeout(DEADLINE_S):
            said = await process.stdout.readuntil(b"[sim:status_fault")
            exported = dict(re.findall(r"(XILING_\w+)=(\S+)", said.decode()))
            receiver = WebhookReceiver(port=0)
            async with Client(exported["XILING_API_KEY"], base_url=exported["XILING_BASE_URL"], receiver=receiver) as c:
                request = plan(1, seed=1, speed=50)[0].request
                job = await c.submit(attrs.evolve(request, prompt="waves [sim:duplicate_callback]", generate_count=1))
                (task_id,) = job.task_ids or [video.task_id for video in await job]
                await job
                said = await process.stdout.readuntil(b"callback of")
                said += await process.stdout.readuntil(b"callback of")
            process.send_signal(how)
            rest, stderr = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert (process.returncode, stderr) == (0, b"")
    assert f"create #1: paid, HTTP 200  {task_id}  (duplicate_callback)" in said.decode()
    assert f" {task_id}: SUCCEEDED, HTTP 200" in rest.decode()
    assert rest.decode().endswith("1 POST, 1 paid submit, 1 task, 2 callbacks, 0 status GETs\n")


def test_ctrl_c_ends_simulate_with_a_summary() -> None:
    """The same in this process: Ctrl-C is how it is meant to end."""
    with redirect_stdout(Interrupted("export")) as out, pytest.raises(SystemExit) as end:
        main(["simulate", "--port", "0"])
    assert end.value.code == 0
    assert out.getvalue().endswith("0 POSTs, 0 paid submits, 0 tasks, 0 callbacks, 0 status GETs\n")


def test_simulate_on_a_busy_port(tmp_path: Path) -> None:
    """A port that is taken is one line and exit code 2."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = xiling("simulate", "--port", str(port), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert one_error_line(done.stderr) == (
        f"xiling: cannot listen on 127.0.0.1:{port}: Address already in use. Choose another --port; 0 takes a free one."
    )


@pytest.mark.parametrize("host", ["a..b", "no such host"])
async def test_simulate_on_a_host_that_is_none(host: str) -> None:
    """A host that is no name is said so, in our own error."""
    with pytest.raises(ConfigurationError, match=f"cannot listen on {host}:0: "):
        await serve(Simulator(host=host), Console(file=io.StringIO()), asyncio.Event())


async def test_simulate_on_all_addresses_prints_one_that_can_be_called() -> None:
    """0.0.0.0 is an address to listen on; what is printed is one to call."""
    out, stop = io.StringIO(), asyncio.Event()
    stop.set()
    await serve(Simulator("key with space", host="0.0.0.0"), Console(file=out, width=80), stop)
    assert re.search(
        r"export XILING_BASE_URL=http://127\.0\.0\.1:\d+/v1 XILING_API_KEY='key with space'\n", out.getvalue()
    )
    assert max(map(len, out.getvalue().splitlines())) <= 90
    assert out.getvalue().endswith("0 POSTs, 0 paid submits, 0 tasks, 0 callbacks, 0 status GETs\n")


async def test_simulate_tells_nothing_that_is_the_callers_own() -> None:
    """A create's line has neither prompt nor key nor callback URL, whatever the create was."""
    out, stop = io.StringIO(), asyncio.Event()
    sim = Simulator("its-key")
    serving = asyncio.create_task(serve(sim, Console(file=out, width=200), stop))
    await turns_until(lambda: "export" in out.getvalue())
    async with Client("its-key", base_url=sim.base_url, receiver=WebhookReceiver(port=0)) as client:
        request = plan(1, seed=1, speed=50)[0].request
        job = await client.submit(attrs.evolve(request, prompt="\x1b[31msecret [sim:drop_after_accept]"))
        await job
        await sim.settled()
    stop.set()
    await serving
    told = out.getvalue().partition("create #1")[2]
    assert told.startswith(": paid, no answer  i2v-")
    assert not re.search(r"secret|its-key|[\w-]{80}|\x1b", told)


# --- what the demo may claim -----------------------------------------------------------------------------------------


def row_of(prompt: str, *, count: int = 1) -> Row:
    request = ImageToVideo(
        model="S", prompt=prompt, image_url="https://example.com/a.jpg", aspect_ratio="16:9", aspect_resolution="720p",
        duration=6, generate_count=count,
    )  # fmt: skip
    return Row(PlannedJob(number=1, title="a title", request=request, fault=NONE))


async def played(rows: Sequence[Row], folder: Path, *, out: Console | None = None, wait_s: float = 60) -> Ledger:
    return await play(rows, folder=folder, seed=1, console=out or Console(file=io.StringIO()), wait_s=wait_s)


def complaints_of(rows: Sequence[Row], ledger: Ledger) -> list[str]:
    return checks.complaints(checks.facts(rows, ledger), ledger)


async def test_the_audit_sees_what_is_wrong(tmp_path: Path) -> None:
    """Each promise of the last line is broken by hand once, and the audit says which one."""
    rows = [row_of("one", count=2), row_of("two")]
    ledger = await played(rows, tmp_path)
    first, second = rows
    assert complaints_of(rows, ledger) == []

    outcomes, first.outcomes = first.outcomes, first.outcomes[:1]
    assert complaints_of(rows, ledger) == ["1 job paid for, and not delivered as the service knows it"]
    first.outcomes = outcomes
    second.saved.clear()
    assert complaints_of(rows, ledger) == ["1 video not saved"]
    first.problem, second.problem = "broke", "broke too"
    assert complaints_of(rows, ledger) == ["1 video not saved", "job #1: broke", "and 1 problem more"]
    assert first.state == "problem"
    assert complaints_of([first], ledger) == ["1 job paid for without an order", "job #1: broke"]
    first.problem = second.problem = ""
    second.saved.extend(outcome.task_id for outcome in second.outcomes)

    ledger.post(ledger.posts[0])
    assert complaints_of(rows, ledger) == ["1 job paid for more than once"]
    ledger.posts[:] = [post for post in ledger.posts if post.body is not None and post.body["prompt"] != "one"]
    assert "1 job never bought" in complaints_of(rows, ledger)


async def test_what_became_of_jobs_is_counted(tmp_path: Path) -> None:
    """Where jobs of one fault fared differently, the words say how many did."""
    rows = [row_of("one"), row_of("two [sim:garbage]"), row_of("three [sim:rate_limited=0]"), row_of("four")]
    ledger = await played(rows, tmp_path)
    assert rows[1].at_submit is State.UNCERTAIN
    rows[3].outcomes = ()
    told = checks.became(checks.facts(rows, ledger), ledger)
    assert "1 of 4 adopted by callback" in told
    assert told.endswith("5 POSTs, 4 paid, 1 NOT DELIVERED")


async def test_a_fault_that_did_not_happen_is_not_told(tmp_path: Path) -> None:
    """A fault is in the summary because the ledger has it, not because it was planned."""
    row = row_of("no directive")
    hoped = Row(attrs.evolve(row.planned, fault=FAULTS[0]))
    ledger = await played([hoped], tmp_path)
    assert checks.by_fault(checks.facts([hoped], ledger), ledger) == []


async def test_a_job_that_ends_badly_ends(tmp_path: Path) -> None:
    """A refused job and one that is never told about are problems of their rows, and the demo goes on."""
    rows = [row_of("[sim:business_error=100004]"), row_of("[sim:lost_callback]"), row_of("fine")]
    ledger = await played(rows, tmp_path, wait_s=0.5)
    refused, silent, fine = rows
    assert refused.job is None and "code 100004" in refused.problem
    assert "still accepted" in silent.problem
    assert (fine.problem, len(fine.saved)) == ("", 1)
    assert complaints_of(rows, ledger)[:2] == [
        "1 job paid for, and not delivered as the service knows it",
        "1 job never bought",
    ]


# --- what is drawn ---------------------------------------------------------------------------------------------------


def drawn(rows: Sequence[Row], ledger: Ledger, width: int, height: int) -> list[str]:
    out = Console(file=io.StringIO(), width=width, height=height)
    out.print(display.status_view(rows, ledger, out))
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue().splitlines()


def test_the_board_fits() -> None:
    """80x24 and 140x40: no line is too long, none too many, no word of a fault is cut."""
    rows = [Row(take, is_sent=True) for take in plan(60, seed=1, speed=1)]
    for width, height in ((80, 24), (140, 40)):
        lines = drawn(rows, Ledger(), width, height)
        assert max(map(len, lines)) <= width
        assert len(lines) < height
        text = "\n".join(lines)
        assert "duplicate_callback" in text and "drop_after_accept" in text
        assert "…" not in text


def test_the_board_keeps_what_is_under_way() -> None:
    """Jobs under way are shown before those that are over; jobs that were not sent are not shown."""
    rows = [Row(take, is_sent=take.number <= 9, is_over=take.number > 3) for take in plan(12, seed=1, speed=1)]
    assert [row.planned.number for row in display.window(rows, 5)] == [1, 2, 3, 8, 9]
    assert [row.planned.number for row in display.window(rows, -1)] == [3]
    assert display.window([Row(take) for take in plan(2, seed=1, speed=1)], 5) == []


def test_a_live_table_in_this_process(tmp_path: Path) -> None:
    """The table shows jobs, the bar ends full, and the summary's columns stand in line."""
    with terminal(80, 24) as (slave, written), os.fdopen(os.dup(slave), "w", encoding="utf-8") as file:
        out = Console(file=file, force_terminal=True, width=80, height=24, highlight=False)
        assert output.is_live(out)
        rows = [Row(take) for take in plan(6, seed=1, speed=20)]
        ledger = asyncio.run(played(rows, tmp_path, out=out))
        display.summary(out, checks.facts(rows, ledger), ledger, tmp_path)
    (text,) = written
    assert "6/6 jobs" in text
    assert all(row.job is not None and row.job.id[:8] in text for row in rows)
    assert re.search(COLOUR, text)
    assert re.search(rf"no fault {display.TIMES}2 +1 POST each", re.sub(rf"{ESCAPE}\[[0-9;]*m", "", text))


def test_output_without_a_reader() -> None:
    """When the reader is gone the console falls silent, and its file stays usable."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file:
        out = output.console()
        out.file = file
        output.say(out, "nobody reads this")
        output.say(out, "nor this")
        assert out.quiet


def test_demo_and_help_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example in the demo's help is a command that works."""
    example = next(line for line in (demo.__doc__ or "").splitlines() if line.strip().startswith("xiling "))
    words = example.split()[1:]
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli_app.app, [*words, "--speed", "50"])
    assert (done.exit_code, done.output.splitlines()[-1]) == (0, checks.DELIVERED)
