"""`xiling submit`, `wait` and `jobs`: the real command against a simulator, held against the simulator's own ledger."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import io
import json
import os
import pty
import re
import shlex
import signal
import socket
import sqlite3
import struct
import sys
import termios
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from attrs import evolve, fields_dict, frozen
from rich.console import Console
from support import closed_port, model_v, turns_until
from typer.testing import CliRunner

import xiling_async
from xiling_async import (
    ClientClosed,
    ImageToVideo,
    InvalidRequest,
    MemoryStore,
    SQLiteStore,
    State,
    StoreError,
    TaskFailed,
    Video,
    WaitTimeout,
)
from xiling_async._internal.clock import SystemClock
from xiling_async.cli import ages, app, output, progress, report
from xiling_async.cli.commands import jobs
from xiling_async.cli.commands.submit import bought, request_of, submit
from xiling_async.cli.output import clock_of
from xiling_async.cli.report import Ending, Failures, Stopped, as_json, code_of
from xiling_async.cli.session import Session
from xiling_async.cli.watch import Watch
from xiling_async.errors import ConfigurationError, SubmitUncertain
from xiling_async.kinds.image_to_video import MODES, NEVER, NONE
from xiling_async.models.query import JobQuery
from xiling_async.models.record import JobRecord
from xiling_async.simulator import Simulator, faults

SOURCE = Path(xiling_async.__file__).parents[1]
XILING = [sys.executable, "-W", "error", "-m", "xiling_async.cli"]
IMAGE = ("--image", "https://example.com/sea.jpg")
QUICK = ("--poll-every", "0.1")
STORED = ("--store", "jobs.db")
ESCAPE = "\x1b"
DEADLINE_S = 30  # of a whole process; only a failure takes so long


@frozen
class Ran:
    code: int
    out: str
    err: str

    @property
    def urls(self) -> list[str]:
        """Standard output, which holds nothing but URLs."""
        assert all(re.fullmatch(r"https?://\S+", line) for line in self.out.splitlines())
        return self.out.splitlines()

    @property
    def told(self) -> dict[str, Any]:
        """The one JSON object on standard output."""
        (line,) = self.out.splitlines()
        return cast("dict[str, Any]", json.loads(line))

    @property
    def error(self) -> str:
        """The one error line; what stands before it is progress."""
        (line,) = [line for line in self.err.splitlines() if line.startswith("xiling: ")]
        assert self.err.splitlines()[-1] == line
        return line

    def offered(self) -> list[str]:
        """The words of the command that the error offers for going on."""
        return shlex.split(self.error.partition(": xiling ")[2])


def environment(sim: Simulator, **more: str) -> dict[str, str]:
    """What a user of this simulator exports."""
    unwanted = ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "PYTHONIOENCODING")
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    ours = {"PYTHONPATH": str(SOURCE), "PYTHONUTF8": "1", "TERM": "xterm-256color"}
    return {**kept, **ours, "XILING_BASE_URL": sim.base_url, "XILING_API_KEY": sim.api_key, **more}


@asynccontextmanager
async def started(sim: Simulator, *words: str, **more: Any) -> AsyncIterator[asyncio.subprocess.Process]:
    """The command as a process of its own; stopped hard if it is not over at the end."""
    pipe = asyncio.subprocess.PIPE
    streams = {"stdout": pipe, "stderr": more.pop("stderr", pipe)}
    process = await asyncio.create_subprocess_exec(*XILING, *words, env=environment(sim, **more), **streams)
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def ended(process: asyncio.subprocess.Process, before: str = "") -> Ran:
    """What it wrote, when it is over. `before`: what was read of stderr already."""
    out, err = await process.communicate()
    assert process.returncode is not None
    return Ran(process.returncode, out.decode(), before + (err or b"").decode())


async def said(process: asyncio.subprocess.Process, what: str) -> str:
    """What it wrote to stderr, up to this."""
    assert process.stderr is not None
    return (await process.stderr.readuntil(what.encode())).decode()


async def xiling(sim: Simulator, *words: str, **more: str) -> Ran:
    """The same command inside this process, in a thread and a loop of its own."""
    unset = {name: None for name in ("XILING_API_KEY", "KEEVX_API_KEY", "XILING_BASE_URL") if name not in more}
    given = {**unset, "XILING_BASE_URL": sim.base_url, "XILING_API_KEY": sim.api_key, **more}
    kept = {name: value or None for name, value in given.items()}
    done = await asyncio.to_thread(CliRunner().invoke, app.app, list(words), env=kept)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return Ran(done.exit_code, done.stdout, done.stderr)


@contextlib.contextmanager
def terminal(columns: int = 80, lines: int = 24) -> Iterator[tuple[int, list[str]]]:
    """A terminal: the file descriptor to write to, and what was written, complete at the end."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    written: list[str] = []

    def drain() -> None:
        chunks: list[bytes] = []
        with contextlib.suppress(OSError):  # nobody writes any more
            while chunk := os.read(master, 65536):
                chunks.append(chunk)
        written.append(b"".join(chunks).decode())

    reader = threading.Thread(target=drain)
    reader.start()
    try:
        yield slave, written
    finally:
        os.close(slave)
        reader.join()
        os.close(master)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def closed_port_number() -> int:
    """A port of this machine where nobody listens."""
    with closed_port() as port:
        return port


def paid(sim: Simulator) -> tuple[int, int]:
    """POSTs seen, submits paid for."""
    return len(sim.ledger.posts), sim.ledger.paid_submits


# --- a job that goes well --------------------------------------------------------------------------------------------


async def test_standard_output_is_the_urls_alone(sim: Simulator) -> None:
    """One whole signed URL a line in task order; progress on stderr; no colour in a pipe, whatever is wished for."""
    async with started(sim, "submit", "waves", *IMAGE, *QUICK, "--count", "2", FORCE_COLOR="1") as process:
        ran = await ended(process)
    assert ran.code == 0
    assert ESCAPE not in ran.out
    first, second = sim.ledger.task_ids
    assert [re.sub(r"=[0-9a-f]{64}", "=…", url.partition("/media/")[2]) for url in ran.urls] == [
        f"{task_id}.mp4?X-Goog-Signature=…&X-Goog-Expires=604800" for task_id in (first, second)
    ]
    plain = re.sub(rf"{ESCAPE}\[[0-9;]*m", "", ran.err)
    assert re.search(rf"accepted: job [0-9a-f]{{32}}\n  task {first}\n  task {second}\n", plain)
    assert re.search(r"\ndone: 2 of 2 tasks succeeded, after 0:\d\d\n$", plain)
    assert sim.api_key not in ran.out + ran.err and "Signature" not in ran.err


async def test_the_form_of_the_json(sim: Simulator) -> None:
    """--json: one object with every name, every field of the video, and what the service itself said of it."""
    ran = await xiling(sim, "submit", "waves", *IMAGE, *QUICK, *STORED, "--key", "order-42", "--json")
    assert ran.code == 0
    told = ran.told
    assert list(told) == [
        "job_id", "key", "kind", "state", "task_ids", "outcomes", "request", "created_at", "changed_at", "ended_at",
        "retry_of", "metadata", "charged",
        "error", "message",
    ]  # fmt: skip
    (task_id,) = sim.ledger.task_ids
    assert (told["key"], told["kind"], told["state"]) == ("order-42", "image_to_video", "done")
    assert (told["task_ids"], told["charged"], told["error"], told["message"]) == ([task_id], "yes", None, None)
    assert re.fullmatch("[0-9a-f]{32}", told["job_id"])
    assert 0 < told["created_at"] <= told["changed_at"]
    assert told["request"] == {
        "model": "V", "prompt": "waves", "image_url": IMAGE[1], "aspect_ratio": "16:9", "aspect_resolution": "720p",
        "duration": 4, "generate_audio": False, "generate_count": 1,
    }  # fmt: skip
    (outcome,) = told["outcomes"]
    assert set(outcome) == {"ok", *fields_dict(Video)}
    assert (outcome["ok"], outcome["task_id"], outcome["raw"]["status"]) == (True, task_id, "SUCCEEDED")
    assert outcome["raw"]["video_url"] == outcome["video_url"]


async def test_local_pictures(sim: Simulator) -> None:
    """A picture that is no URL is a file: uploaded first, and the same command again is the same job."""
    picture = SOURCE / "xiling_async/simulator/media/samples/landscape.webp"
    words = ["submit", "waves", "--image", str(picture), *QUICK, *STORED, "--key", "k", "--json"]
    first, again = await xiling(sim, *words), await xiling(sim, *words)
    assert (first.code, again.code, first.told) == (0, 0, again.told)
    assert first.told["request"]["image_url"] == str(picture)
    assert str((sim.ledger.posts[0].body or {})["image_url"]).startswith("http")
    absent = await xiling(sim, "submit", "waves", "--image", "no-such-picture.jpg", *QUICK)
    assert (absent.code, absent.out) == (2, "")
    assert "image_url='no-such-picture.jpg'" in absent.err
    assert paid(sim) == (1, 1)


@pytest.mark.parametrize("row", MODES, ids=lambda row: f"{row.model}-{row.name}")
def test_what_is_not_given_is_the_least_that_the_model_offers(row: Any) -> None:
    """Each row of the rule table: a prompt and its pictures are a legal request, of the lowest price."""
    image = None if row.image_url == NEVER else IMAGE[1]
    references = [] if row.reference_images == NONE else [IMAGE[1]]
    request = request_of(
        "waves", model=row.model, image=image, end_image=None, references=references, ratio="9:16", resolution=None,
        duration=None, audio=False, count=1,
    )  # fmt: skip
    assert (request.aspect_resolution, request.duration) == (row.aspect_resolution[0], min(row.duration))


async def test_every_option_is_sent(sim: Simulator) -> None:
    """What was asked for is what the service is asked for."""
    ran = await xiling(
        sim, "submit", "waves", *IMAGE, "--end-image", "https://example.com/end.jpg", "--ratio", "9:16",
        "--resolution", "1080p", "--duration", "6", "--audio", "--count", "3", *QUICK,
    )  # fmt: skip
    assert (ran.code, len(ran.urls)) == (0, 3)
    sent = sim.ledger.posts[0].body
    assert sent == {
        "model": "V", "prompt": "waves", "image_url": IMAGE[1], "end_image_url": "https://example.com/end.jpg",
        "aspect_ratio": "9:16", "aspect_resolution": "1080p", "duration": 6, "generate_audio": True,
        "generate_count": 3,
    }  # fmt: skip
    pictures = ["--reference", "https://example.com/a.jpg", "--reference", "https://example.com/b.jpg"]
    assert (await xiling(sim, "submit", "two", "--model", "KL", *pictures, *QUICK)).code == 0
    assert (sim.ledger.posts[1].body or {})["reference_images"] == pictures[1::2]


async def test_the_example_of_the_help_works(sim: Simulator) -> None:
    """What the help shows is a command that works."""
    example = (submit.__doc__ or "").partition("Example:")[2].replace("\\\n", " ")
    words = shlex.split(example)[1:]
    ran = await xiling(sim, *words, *QUICK)
    assert (ran.code, ran.out) == (0, f"clips/{sim.ledger.task_ids[0]}.mp4\n")
    assert Path(ran.out.rstrip()).stat().st_size


# --- callbacks -------------------------------------------------------------------------------------------------------


async def test_a_port_takes_callbacks(sim: Simulator) -> None:
    """--port 0 with a service on this machine: the end is called back, nothing is asked."""
    ran = await xiling(sim, "submit", "waves", *IMAGE, "--port", "0")
    assert (ran.code, len(ran.urls)) == (0, 1)
    await sim.settled()
    assert (len(sim.ledger.callbacks), len(sim.ledger.gets)) == (1, 0)
    assert not re.search(r"[\w-]{80}", ran.err)


@pytest.mark.parametrize("path", [None, "/xiling"])
async def test_a_port_of_ones_own(sim: Simulator, path: str | None) -> None:
    """A port that was chosen is the one that is called, below the public URL where there is one."""
    with closed_port() as port:
        pass
    public = [] if path is None else ["--public-url", f"http://127.0.0.1:{port}{path}"]
    ran = await xiling(sim, "submit", "waves", *IMAGE, "--port", str(port), *public)
    assert (ran.code, len(ran.urls)) == (0, 1)
    await sim.settled()
    assert sim.ledger.callbacks[0].url.startswith(f"http://127.0.0.1:{port}{path or ''}/")
    assert len(sim.ledger.gets) == 0


async def test_a_receiver_that_nobody_could_reach(sim: Simulator) -> None:
    """--port alone is refused with a service elsewhere, before anything is sent."""
    ran = await xiling(sim, "submit", "waves", *IMAGE, "--port", "8080", "--base-url", "https://api.keevx.com/v1")
    assert ran.code == 2
    assert "cannot reach this receiver" in ran.error


async def test_an_uncertain_job_is_adopted() -> None:
    """With a receiver, an answer that was lost costs nothing: the callback brings the job back."""
    async with Simulator(manual=True) as sim:
        lost = ("submit", "waves [sim:drop_after_accept]", *IMAGE, "--port", "0")
        async with started(sim, *lost) as process:
            before = await said(process, "uncertain: ")
            assert await sim.finish(sim.ledger.task_ids[0]) == 200
            ran = await ended(process, before)
        assert (ran.code, len(ran.urls), paid(sim)) == (0, 1, (1, 1))
        assert re.search(r"uncertain: .*\naccepted: job |uncertain: .*\n.*\ndone: ", ran.err)


# --- what goes wrong -------------------------------------------------------------------------------------------------


async def test_no_key(sim: Simulator) -> None:
    """No key: one line that names the variables, nothing is sent."""
    ran = await xiling(sim, "submit", "waves", *IMAGE, XILING_API_KEY="")
    assert (ran.code, ran.out, paid(sim)) == (2, "", (0, 0))
    assert "XILING_API_KEY" in ran.error and "KEEVX_API_KEY" in ran.error


@pytest.mark.parametrize("machine", [(), ("--json",)])
async def test_a_wrong_key(sim: Simulator, machine: tuple[str, ...]) -> None:
    """A key that is not accepted: exit code 1, one line, and the key is shown nowhere."""
    ran = await xiling(sim, "submit", "waves", *IMAGE, *machine, XILING_API_KEY="not-the-key")
    assert (ran.code, paid(sim)) == (1, (1, 0))
    assert "Invalid token" in ran.error
    assert "not-the-key" not in ran.out + ran.err
    if machine:
        told = ran.told
        assert (told["error"], told["charged"], told["state"], told["task_ids"]) == (
            "Unauthorized",
            "no",
            "rejected",
            [],
        )
        assert f"xiling: {told['message']}" == ran.error


@pytest.mark.parametrize("machine", [(), ("--json",)])
async def test_every_broken_rule_is_shown(sim: Simulator, machine: tuple[str, ...]) -> None:
    """A request that breaks rules: a line for each, exit code 2, nothing is sent."""
    words = [
        "",
        "--model",
        "S",
        "--resolution",
        "4k",
        "--duration",
        "3",
        "--audio",
        "--ratio",
        "1:1",
        "--image",
        "ftp://x",
    ]
    ran = await xiling(sim, "submit", *words, *machine)
    assert (ran.code, paid(sim)) == (2, (0, 0))
    head, *rules = ran.err.splitlines()
    assert head == "xiling: ImageToVideo: 6 rules are broken, nothing was sent:"
    names = ["prompt", "aspect_ratio", "image_url", "aspect_resolution", "duration", "generate_audio"]
    assert [re.match(r"  - (\w+)[=:]", rule) is not None for rule in rules] == [True] * 6
    assert [re.split("[=:]", rule)[0].removeprefix("  - ") for rule in rules] == names
    if machine:
        told = ran.told
        assert (told["error"], told["charged"], told["job_id"], told["task_ids"]) == ("InvalidRequest", "no", None, [])
        assert told["message"].splitlines()[1:] == rules
    else:
        assert ran.out == ""


async def test_a_model_that_nobody_knows(sim: Simulator) -> None:
    """The rules that hang on the model are not guessed at: it alone is named."""
    ran = await xiling(sim, "submit", "waves", "--model", "Q", *IMAGE)
    assert ran.code == 2
    assert "1 rule is broken" in ran.err and "unknown model 'Q'" in ran.err


@pytest.mark.parametrize(
    "words",
    [
        ["submit"],
        ["submit", "waves", "--count", "many"],
        ["submit", "waves", "--key", "order-42"],
        ["submit", "waves", "--no-wait"],
        ["submit", "waves", "--public-url", "https://example.com"],
        ["submit", "waves", "--timeout", "0"],
        ["submit", "waves", "--port", "65536"],
        ["wait"],
        ["wait", "i2v-1", "--public-url", "https://example.com"],
        ["jobs"],
        ["jobs", "--store", "jobs.db", "--state", "bogus"],
    ],
    ids=" ".join,
)
async def test_a_wrong_option(sim: Simulator, words: list[str]) -> None:
    """What is not understood, and what could not keep its promise: exit code 2, nothing is sent, no file is made."""
    ran = await xiling(sim, *words)
    assert (ran.code, ran.out, paid(sim)) == (2, "", (0, 0))
    assert "Usage: " in ran.err and "Error: " in ran.err and "Traceback" not in ran.err
    assert list(Path.cwd().iterdir()) == []


async def test_a_task_that_failed(sim: Simulator) -> None:
    """One of two tasks failed: exit code 1, the service's reason, and the URL of the good one all the same."""
    sim.script(faults.failed("no \x1b[31mface\n found", which=[0]))
    ran = await xiling(sim, "submit", "waves", *IMAGE, "--count", "2", *QUICK, *STORED, "--key", "two")
    bad, good = sim.ledger.task_ids
    assert ran.code == 1
    assert [good in url for url in ran.urls] == [True]
    assert f"{bad}: no \\x1b[31mface found" in ran.error
    assert ESCAPE not in ran.err
    told = (await xiling(sim, "submit", "waves", *IMAGE, "--count", "2", *STORED, "--key", "two", "--json")).told
    assert (told["error"], told["charged"], told["state"], told["task_ids"]) == (
        "TaskFailed",
        "yes",
        "failed",
        [bad, good],
    )
    assert [outcome["ok"] for outcome in told["outcomes"]] == [False, True]
    assert told["outcomes"][0]["message"] == "no \x1b[31mface\n found"
    assert paid(sim) == (1, 1)


async def test_an_answer_that_was_lost(sim: Simulator) -> None:
    """Without a receiver nothing can adopt the job: exit code 1, uncertain, sent once, also by the same command."""
    words = ["submit", "waves [sim:drop_after_accept]", *IMAGE, *QUICK, *STORED, "--key", "lost", "--json"]
    first = await xiling(sim, *words)
    again = await xiling(sim, *words)
    for ran in (first, again):
        assert (ran.code, ran.told["error"], ran.told["charged"]) == (1, "SubmitUncertain", "maybe")
        assert (ran.told["state"], ran.told["task_ids"]) == ("uncertain", [])
        assert "never sent again" in ran.error
    assert first.told["job_id"] == again.told["job_id"]
    assert paid(sim) == (1, 1)
    waited = await xiling(sim, "wait", "lost", *STORED)
    assert (waited.code, waited.out) == (1, "")
    assert "its fate is not known" in waited.error


async def test_the_callback_of_a_lost_answer_can_be_waited_for(sim: Simulator) -> None:
    """`wait` with a receiver: a callback that comes later adopts the job that an earlier process left."""
    sim.manual = True
    with closed_port() as port:
        pass
    public = ("--public-url", f"http://127.0.0.1:{port}", "--port", str(port))
    lost = await xiling(sim, "submit", "waves [sim:drop_after_accept]", *IMAGE, *STORED, *public, "--no-wait")
    assert (lost.code, lost.out) == (1, "")
    (job_id,) = re.findall(r"sending: job (\w+)", lost.err)
    async with started(sim, "wait", job_id, *STORED, *public) as process:
        err = await said(process, "uncertain: ")
        assert await sim.finish(sim.ledger.task_ids[0]) == 200
        ran = await ended(process, err)
    assert (ran.code, len(ran.urls), paid(sim)) == (0, 1, (1, 1))


async def test_a_busy_service(sim: Simulator) -> None:
    """A 429 is waited out, and said."""
    ran = await xiling(sim, "submit", "waves [sim:rate_limited=0]", *IMAGE, *QUICK)
    assert (ran.code, len(ran.urls), paid(sim)) == (0, 1, (2, 1))
    assert re.search(r"busy: the service asks to wait \S+ s\nsending: job \w+, 1 task \(attempt 2\)\n", ran.err)


async def test_fewer_tasks_than_were_asked_for(sim: Simulator) -> None:
    """What was bought is delivered, and the exit code says that it is not what was asked for."""
    ran = await xiling(sim, "submit", "waves [sim:ids=3]", *IMAGE, "--count", "2", *QUICK)
    assert (ran.code, len(ran.urls)) == (1, 3)
    assert "Asked for 2 tasks, the service answered with 3" in ran.error


async def test_a_service_that_is_not_there(sim: Simulator) -> None:
    """`wait` says that the service does not answer, and goes on until its time is over; a store keeps the job."""
    left = await xiling(sim, "submit", "waves", *IMAGE, *STORED, "--key", "k", "--no-wait")
    assert left.code == 0
    with closed_port() as port:
        away = ("--base-url", f"http://127.0.0.1:{port}/v1")
        ran = await xiling(sim, "wait", "k", *STORED, *QUICK, *away, "--timeout", "0.3")
    assert ran.code == 3
    assert "could not be asked" in ran.err
    assert ran.offered()[-3:] == [*away, "k"]


# --- time is over ----------------------------------------------------------------------------------------------------


async def test_a_timeout_ends_the_wait_only(sim: Simulator) -> None:
    """Exit code 3 and a command; that command gives the video, and nothing was bought again."""
    sim.manual = True
    ran = await xiling(sim, "submit", "waves", *IMAGE, *QUICK, "--timeout", "0.3")
    (task_id,) = sim.ledger.task_ids
    assert (ran.code, ran.out) == (3, "")
    assert ran.offered() == ["wait", task_id]
    sim.set_result(task_id)
    waited = await xiling(sim, *ran.offered(), *QUICK)
    assert (waited.code, len(waited.urls), paid(sim)) == (0, 1, (1, 1))


async def test_a_timeout_of_a_stored_job(sim: Simulator) -> None:
    """With a store the job has better names than its task ids; tasks without an end are null in the JSON."""
    sim.manual = True
    words = ["submit", "waves", *IMAGE, *QUICK, *STORED, "--count", "2", "--timeout", "1", "--json"]
    running = asyncio.create_task(xiling(sim, *words))
    await sim.wait_for_posts(1)
    done, still = sim.ledger.task_ids
    sim.set_result(done)
    ran = await running
    told = ran.told
    assert (ran.code, told["error"], told["charged"], told["state"]) == (3, "WaitTimeout", "yes", "accepted")
    assert (told["task_ids"], told["outcomes"][0]["ok"], told["outcomes"][1]) == ([done, still], True, None)
    assert ran.offered() == ["wait", *STORED, told["job_id"]]
    assert "1 of 2 tasks done" in ran.err


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


async def test_ctrl_c_while_waiting(sim: Simulator) -> None:
    """130, what was bought, and how to go on; the same command goes on, pays nothing, and gives the video.

    Neither stream is a terminal: both are plain.
    """
    sim.manual = True
    words = ["submit", "waves", *IMAGE, *QUICK, *STORED, "--key", "order-42"]
    async with started(sim, *words) as process:
        err = await said(process, "  task ")
        process.send_signal(signal.SIGINT)
        ran = await ended(process, err)
    (task_id,) = sim.ledger.task_ids
    assert (ran.code, ran.out) == (130, "")
    assert ESCAPE not in ran.err and "\r" not in ran.err
    assert task_id in ran.error
    assert "The same command goes on waiting, and buys nothing" in ran.error
    assert ran.offered() == ["wait", *STORED, "order-42"]
    sim.set_result(task_id)
    again = await xiling(sim, *words)
    assert (again.code, len(again.urls), paid(sim)) == (0, 1, (1, 1))
    assert "this key already has its job: nothing is bought" in again.err


async def test_ctrl_c_while_the_answer_is_awaited(sim: Simulator) -> None:
    """The ids of a paid request are not lost: the answer is waited for, and the task can be awaited without a store."""
    sim.hold_answers()
    async with started(sim, "submit", "waves", *IMAGE, *QUICK) as process:
        await sim.wait_for_posts(1)
        process.send_signal(signal.SIGINT)
        err = await said(process, "Ctrl-C again ends at once\n")
        assert "waiting for the answer to a paid request, up to 70 s" in err
        sim.release_answers()
        ran = await ended(process, err)
    (task_id,) = sim.ledger.task_ids
    assert (ran.code, ran.out, ran.offered()) == (130, "", ["wait", task_id])
    waited = await xiling(sim, *ran.offered(), *QUICK)
    assert (waited.code, len(waited.urls), paid(sim)) == (0, 1, (1, 1))


async def test_a_second_ctrl_c_ends_at_once(sim: Simulator) -> None:
    """Then the job may have been bought: it is said, remembered, and not sent again by the same command."""
    sim.hold_answers()
    words = ["submit", "waves", *IMAGE, *STORED, "--key", "order-42", "--json"]
    async with started(sim, *words) as process:
        await sim.wait_for_posts(1)
        process.send_signal(signal.SIGINT)
        err = await said(process, "Ctrl-C again ends at once\n")
        process.send_signal(signal.SIGINT)
        ran = await ended(process, err)
    assert (ran.code, ran.told["error"], ran.told["charged"]) == (130, "Stopped", "maybe")
    assert "it may have been bought, and is never sent again" in ran.error
    assert "vendor's own list" in ran.error
    listed = await xiling(sim, "jobs", *STORED)
    assert listed.out.split("\t")[0] == "sending"
    again = await xiling(sim, *words)
    assert (again.code, again.told["error"], again.told["state"]) == (1, "SubmitUncertain", "uncertain")
    assert again.told["job_id"] == ran.told["job_id"]
    assert paid(sim) == (1, 1)


async def pressed(of: Session, work: Coroutine[Any, Any, list[Ending]], *signals: signal.Signals) -> list[Ending]:
    """Run this in our own loop, and send us these while its POST is on its way."""
    running = asyncio.create_task(of.interruptible(work))
    await turns_until(lambda: any(record.state is State.SENDING for record in of.watch.jobs.values()))
    for number in signals:
        signal.raise_signal(number)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    return await running


def session_of(sim: Simulator, out: io.StringIO, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Session:
    """What both commands are given, for work in our own loop."""
    monkeypatch.setenv("XILING_API_KEY", sim.api_key)
    given = {"store": None, "base_url": sim.base_url, "public_url": None, "port": None, "timeout": 9, "poll_every": 0.1}
    return Session(**{**given, **options}, out=Console(file=out, width=200))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
async def test_the_first_press(sim: Simulator, monkeypatch: pytest.MonkeyPatch, how: signal.Signals) -> None:
    """Ctrl-C and SIGTERM alike take the answer home first, and leave the handlers as they were."""
    sim.hold_answers()
    out = io.StringIO()
    of = session_of(sim, out, monkeypatch)
    asyncio.get_running_loop().call_later(0.1, sim.release_answers)
    with pytest.raises(asyncio.CancelledError):
        await pressed(of, bought(of, model_v(), None), how)
    stopped = of.stopped()
    assert "paid request" in out.getvalue()
    assert (stopped.charged, stopped.task_ids) == ("yes", sim.ledger.task_ids)
    assert "is bought, and goes on at the service" in str(stopped)
    assert f"xiling wait --base-url {sim.base_url} {sim.ledger.task_ids[0]}" in str(stopped)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


async def test_the_second_press(sim: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second press does not wait for the answer; without a store nobody will know."""
    sim.hold_answers()
    of = session_of(sim, io.StringIO(), monkeypatch)
    with pytest.raises(asyncio.CancelledError):
        await pressed(of, bought(of, model_v(), None), signal.SIGINT, signal.SIGINT)
    stopped = of.stopped()
    assert (stopped.charged, stopped.task_ids, paid(sim)) == ("maybe", (), (1, 1))
    assert "vendor's own list" in str(stopped)
    sim.release_answers()


def test_ctrl_c_before_anything_was_bought() -> None:
    """Then it says so."""

    def interrupted() -> Any:
        async def work() -> list[Ending]:
            raise asyncio.CancelledError

        return work()

    of = Session(store=None, base_url=None, public_url=None, port=None, timeout=1, poll_every=None)
    (ending,) = of.run(interrupted())
    assert (str(ending.error), ending.record) == ("Stopped. Nothing was bought.", None)


def job_record(job_id: str = "0" * 32, **known: Any) -> JobRecord:
    given = {
        "kind": "image_to_video",
        "key": None,
        "request": model_v(),
        "asked": 1,
        "created_at": 1e9,
        "changed_at": 1e9,
    }
    return JobRecord(id=job_id, **{**given, **known})


def test_what_is_left_is_told_by_its_state() -> None:
    """A job that Ctrl-C leaves behind is named with all that is known of it; its way back fits the options."""
    of = Session(store=Path("my jobs.db"), base_url=None, public_url=None, port=0, timeout=1, poll_every=None)
    of.watch.follow(job_record("a", state=State.UNCERTAIN))
    of.watch.follow(job_record("b", state=State.DONE, task_ids=("t",), key="-k"))
    of.watch.follow(job_record("c", state=State.REJECTED))
    stopped = of.stopped()
    assert str(stopped) == (
        "Stopped: job a was sent, and its fate is not known; job b (tasks t) is done. "
        "Go on waiting with: xiling wait --store 'my jobs.db' -- a -k"
    )
    assert (stopped.job_id, stopped.task_ids, stopped.charged) == (None, ("t",), "maybe")


# --- resume, and not to wait -----------------------------------------------------------------------------------------


async def test_not_to_wait(sim: Simulator) -> None:
    """--no-wait prints the job id and the task ids; each of them, and the key, is the job for `wait`."""
    sim.manual = True
    ran = await xiling(sim, "submit", "waves", *IMAGE, *STORED, "--key", "k", "--count", "2", "--no-wait")
    job_id, *task_ids = ran.out.split()
    assert (ran.code, tuple(task_ids)) == (0, sim.ledger.task_ids)
    for task_id in task_ids:
        sim.set_result(task_id)
    waited = [await xiling(sim, "wait", name, *STORED, *QUICK) for name in ("k", job_id, task_ids[1])]
    assert {(one.code, len(one.urls)) for one in waited} == {(0, 2)}
    told = (
        await xiling(sim, "submit", "waves", *IMAGE, *STORED, "--key", "k", "--count", "2", "--no-wait", "--json")
    ).told
    assert (told["job_id"], told["task_ids"], told["state"]) == (job_id, task_ids, "done")
    assert paid(sim) == (1, 1)


async def test_a_key_of_another_request(sim: Simulator) -> None:
    """The same key with another request is refused: exit code 2, nothing is sent."""
    assert (await xiling(sim, "submit", "waves", *IMAGE, *STORED, "--key", "k", "--no-wait")).code == 0
    ran = await xiling(sim, "submit", "other waves", *IMAGE, *STORED, "--key", "k")
    assert (ran.code, ran.out, paid(sim)) == (2, "", (1, 1))
    assert "task" not in ran.err
    assert "already names a job with another request" in ran.err


async def test_a_key_that_was_refused_is_tried_again(sim: Simulator) -> None:
    """A key whose job was not bought buys it at the next try."""
    words = ["submit", "waves", *IMAGE, *STORED, "--key", "k", *QUICK]
    assert (await xiling(sim, *words, XILING_API_KEY="wrong")).code == 1
    ran = await xiling(sim, *words)
    assert (ran.code, len(ran.urls), paid(sim)) == (0, 1, (2, 1))


async def test_a_key_that_expired_is_not_waited_for(sim: Simulator) -> None:
    """`wait`, and `submit` of a known job, ask at once: a wrong API key is an error now, not after half an hour."""
    sim.manual = True
    words = ["submit", "waves", *IMAGE, *STORED, "--key", "k"]
    assert (await xiling(sim, *words, "--no-wait")).code == 0
    for again in (words, ["wait", "k", *STORED], ["wait", sim.ledger.task_ids[0]]):
        ran = await xiling(sim, *again, XILING_API_KEY="wrong")
        assert ran.code == 1
        assert "Invalid token" in ran.error


# --- wait ------------------------------------------------------------------------------------------------------------


async def test_to_wait_for_several(sim: Simulator) -> None:
    """Several names: URLs in the order of the names, a line for each that failed, the lowest exit code."""
    sim.manual = True
    sold = [await xiling(sim, "submit", f"waves {n}", *IMAGE, *STORED, "--key", f"k{n}", "--no-wait") for n in range(4)]
    good, bad, worse, _ = (ran.out.split()[1] for ran in sold)
    sim.set_result(good)
    sim.set_result(bad, "FAILED", message="no face")
    sim.set_result(worse, "FAILED", message="no light")
    ran = await xiling(sim, "wait", "k1", "k0", "k0", "k3", "k2", *STORED, *QUICK, "--timeout", "1")
    assert (ran.code, [good in url for url in ran.urls]) == (1, [True])
    lines = [line for line in ran.err.splitlines() if line.startswith("xiling: ")]
    assert re.search(rf"^{sold[0].out[:8]}  done: 1 of 1 task succeeded", ran.err, re.MULTILINE)
    assert [word for word in ("no face", "Not finished", "no light") for line in lines if word in line] == [
        "no face", "Not finished", "no light",
    ]  # fmt: skip
    machine = await xiling(sim, "wait", bad, good, *STORED, "--json")
    assert [json.loads(line)["state"] for line in machine.out.splitlines()] == ["failed", "done"]


async def test_a_task_that_nobody_knows(sim: Simulator) -> None:
    """Without a store the service is asked at once, and says no: exit code 1, not a wait of half an hour."""
    ran = await xiling(sim, "wait", "i2v-nobody", "--json")
    assert (ran.code, ran.told["error"], ran.told["charged"], ran.told["state"]) == (1, "Rejected", "no", None)
    assert ran.told["task_ids"] == ["i2v-nobody"]
    assert ran.error == "xiling: The service does not know the task i2v-nobody (Task not found)."


async def test_a_name_that_the_store_does_not_know(sim: Simulator) -> None:
    """A key with a typing error is no job: nothing is asked, nothing is remembered."""
    assert (await xiling(sim, "submit", "waves", *IMAGE, *STORED, "--key", "order-42", "--no-wait")).code == 0
    gets = len(sim.ledger.gets)
    ran = await xiling(sim, "wait", "order-43", *STORED)
    assert (ran.code, ran.out) == (2, "")
    assert "jobs.db has no job with key, id or task id 'order-43'" in ran.error
    assert (await xiling(sim, "jobs", *STORED)).out.count("\n") == 1
    assert {get.task_id for get in sim.ledger.gets[gets:]} <= set(sim.ledger.task_ids)


async def test_a_store_that_is_not_there(sim: Simulator) -> None:
    """`wait` does not make a store."""
    ran = await xiling(sim, "wait", "order-42", *STORED)
    assert (ran.code, ran.error) == (1, "xiling: jobs.db does not exist: no store to look into.")
    assert not Path("jobs.db").exists()


async def test_a_task_that_a_store_remembers_may_become_known(sim: Simulator) -> None:
    """A service that does not know (now) what it sold is no reason to give up."""
    sim.manual = True
    assert (
        await xiling(sim, "submit", "w [sim:no_status_endpoint]", *IMAGE, *STORED, "--key", "k", "--no-wait")
    ).code == 0
    ran = await xiling(sim, "wait", "k", *STORED, *QUICK, "--timeout", "0.4")
    assert ran.code == 3
    assert "The service did not tell the status" in ran.err


async def test_a_task_that_no_service_has_confirmed_is_not_called_bought(sim: Simulator) -> None:
    """`wait foo` without a network, to its timeout and to Ctrl-C: nobody knows whether there is such a task."""
    away = ("--base-url", f"http://127.0.0.1:{closed_port_number()}/v1")
    ran = await xiling(sim, "wait", "foo", *away, "--timeout", "0.4", "--json")
    assert (ran.code, ran.told["error"], ran.told["charged"]) == (3, "WaitTimeout", "maybe")
    assert "the service has not confirmed task foo" in ran.error
    async with started(sim, "wait", "foo", *away) as process:
        err = await said(process, "\n")
        process.send_signal(signal.SIGINT)
        stopped = await ended(process, err)
    assert stopped.code == 130
    for told in (ran.err, stopped.err):
        assert not re.search("bought|paid", told)
    assert stopped.offered() == ["wait", *away, "foo"]
    sim.manual = True
    await xiling(sim, "submit", "waves", *IMAGE, *QUICK, "--timeout", "0.3")
    (task_id,) = sim.ledger.task_ids
    known = await xiling(sim, "wait", task_id, *QUICK, "--timeout", "0.3", "--json")
    assert (known.code, known.told["charged"]) == (3, "yes")
    assert "is bought, and goes on at the service" in known.error


async def test_a_service_that_does_not_answer_in_time(sim: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """--timeout holds for the first question too."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        ran = await xiling(sim, "wait", "i2v-1", "--base-url", url, "--timeout", "0.3")
    assert ran.code == 3
    assert ran.offered() == ["wait", "--base-url", url, "i2v-1"]


# --- stores that are in use, or none ---------------------------------------------------------------------------------


async def test_a_store_in_use(sim: Simulator) -> None:
    """A store that another process holds is an error that names the process, nothing is sent; `jobs` lists it."""
    store = SQLiteStore(Path.cwd() / "jobs.db")
    await store.open()
    try:
        await store.add(old(1))
        async with started(sim, "submit", "waves", *IMAGE, *STORED) as process:
            ran = await ended(process)
        assert (ran.code, ran.out) == (1, "")
        assert f"jobs.db is held by process {os.getpid()} on " in ran.error
        async with started(sim, "jobs", *STORED) as process:
            listed = await ended(process)
        assert (listed.code, listed.out.split("\t")[4], listed.err) == (0, "k1", "")
    finally:
        await store.close()
    assert paid(sim) == (0, 0)


async def test_jobs_makes_no_store(sim: Simulator) -> None:
    """A file that is not there, an empty one, a folder, and somebody else's are errors, and stay what they are."""
    Path("empty.db").touch()
    Path("folder").mkdir()
    Path("text.db").write_text("not a database, but long enough to be looked at" * 9)
    with contextlib.closing(sqlite3.connect("other.db")) as other:
        other.execute("CREATE TABLE things (name)")
    for name, why in (
        ("nope.db", "no such file"),
        ("empty.db", "it is empty"),
        ("folder", "no such file"),
        ("text.db", "not a database"),
        ("other.db", "another application"),
    ):
        ran = await xiling(sim, "jobs", "--store", name)
        assert (ran.code, ran.out) == (1, "")
        assert why in ran.error
    assert not Path("nope.db").exists()
    assert Path("empty.db").stat().st_size == 0


# --- jobs ------------------------------------------------------------------------------------------------------------


async def stored(*records: JobRecord) -> None:
    store = SQLiteStore(Path.cwd() / "jobs.db")
    await store.open()
    for record in records:
        await store.add(record)
    await store.close()


def old(number: int, **known: Any) -> JobRecord:
    """A job of the past; the higher the number, the newer."""
    at = 1e9 + number
    given = {"state": State.DONE, "created_at": at, "changed_at": at, "key": f"k{number}"}
    return job_record(f"{number:032x}", **{**given, **known})


async def test_the_list_in_a_pipe(sim: Simulator) -> None:
    """A line a job, columns with tabs, the newest last, nothing cut; what is not printable is escaped."""
    prompt = "海 \x1b[31m" + "long " * 150
    await stored(
        old(1, request=model_v(prompt), task_ids=("t1", "t2"), outcomes=(None, None), asked=2, state=State.ACCEPTED),
        old(2, key=None, request=None, state=State.EXPIRED),
    )
    ran = await xiling(sim, "jobs", *STORED)
    first, second = (line.split("\t") for line in ran.out.splitlines())
    age = first.pop(1)
    assert re.fullmatch(r"\d{4}d", age)
    assert first == ["accepted", "V", "0/2", "k1", f"{1:032x}", "t1,t2", ("海 \\x1b[31m" + "long " * 150).strip()]
    assert (second[0], second[2:]) == ("expired", ["?", "0/1", "", f"{2:032x}", "", ""])
    assert (ran.code, ran.err) == (0, "")


async def test_what_is_listed(sim: Simulator) -> None:
    """Unfinished jobs however old, and the last ten that ended; --all, and --state, which counts its own."""
    await stored(
        old(0, state=State.UNCERTAIN),
        *(old(n) for n in range(1, 15)),
        old(15, state=State.FAILED),
        old(16, state=State.SENDING),
    )

    async def keys(*options: str) -> tuple[list[str], bool]:
        ran = await xiling(sim, "jobs", *STORED, *options)
        return [line.split("\t")[4] for line in ran.out.splitlines()], "--all shows the others" in ran.err

    assert await keys() == (["k0", *(f"k{n}" for n in range(6, 17))], True)
    assert await keys("--all") == ([f"k{n}" for n in range(17)], False)
    assert await keys("--state", "done") == ([f"k{n}" for n in range(5, 15)], True)
    assert await keys("--state", "failed", "--state", "sending") == (["k15", "k16"], False)
    assert await keys("--state", "uncertain", "--all") == (["k0"], False)
    nothing = await xiling(sim, "jobs", *STORED, "--state", "rejected")
    assert (nothing.code, nothing.out, nothing.err) == (0, "", "No such job in jobs.db.\n")


async def test_the_list_by_metadata_and_age(sim: Simulator) -> None:
    """--metadata (all of several pairs), --since and --state, together: of unfinished and of ended jobs."""
    now = SystemClock().time()
    days = {"a": 1.0, "b": 3.0, "c": 0.5, "d": 0.1}
    words = {"a": {"user": "1"}, "b": {"user": "1", "eq": "x=y"}, "c": {"user": "2"}, "d": {"user": "1", "eq": "x=y"}}
    for name, state in zip("abcd", (State.DONE, State.FAILED, State.ACCEPTED, State.UNCERTAIN), strict=True):
        await stored(old(ord(name), key=name, state=state, metadata=words[name], created_at=now - days[name] * 86400))

    async def keys(*options: str) -> str:
        for more in ((), ("--all",)):
            ran = await xiling(sim, "jobs", *STORED, "--json", *options, *more)
            assert ran.code == 0, ran.err
        return "".join(json.loads(line)["key"] for line in ran.out.splitlines())

    assert await keys() == "bacd"
    assert await keys("--metadata", "user=1") == "bad"
    assert await keys("--metadata", "user=1", "--metadata", "eq=x=y") == "bd"
    assert await keys("--since", "2d") == "acd"
    assert await keys("--since", "12h", "--metadata", "user=1") == "d"
    assert await keys("--state", "done", "--state", "failed", "--metadata", "user=1", "--since", "7d") == "ba"
    assert await keys("--metadata", "user=") == ""
    for wrong in (("--metadata", "user"), ("--metadata", "=1"), ("--metadata=a=1", "--metadata=a=2"), ("--since", "2")):
        ran = await xiling(sim, "jobs", *STORED, *wrong)
        assert (ran.code, ran.out) == (2, "")


async def test_the_list_has_the_newest_ended_jobs_of_its_filter(sim: Simulator) -> None:
    """The ten that are shown are the last ten with this metadata, not those among the last ten."""
    await stored(*(old(number, metadata={"batch": str(number % 2)}) for number in range(40)))
    ran = await xiling(sim, "jobs", *STORED, "--metadata", "batch=1")
    assert [line.split("\t")[4] for line in ran.out.splitlines()] == [f"k{number}" for number in range(21, 41, 2)]
    assert "--all shows the others" in ran.err


async def test_the_list_changes_nothing(sim: Simulator) -> None:
    """A job that a dead process left on its way stays so: nothing is taken over, sent or asked."""
    await stored(
        old(1, state=State.SENDING), old(2, state=State.ACCEPTED, task_ids=("t",), outcomes=(None,), due_at=1.0)
    )
    before = Path("jobs.db").read_bytes()
    ran = await xiling(sim, "jobs", *STORED, "--all", "--json")
    told = [json.loads(line) for line in ran.out.splitlines()]
    assert [(one["state"], one["charged"], one["error"]) for one in told] == [
        ("sending", "maybe", None), ("accepted", "yes", None),
    ]  # fmt: skip
    assert Path("jobs.db").read_bytes() == before
    assert [path.name for path in Path.cwd().iterdir()] == ["jobs.db"]
    assert (len(sim.ledger.gets), paid(sim)) == (0, (0, 0))


async def test_the_list_for_machines(sim: Simulator) -> None:
    """--json: the same object as of `submit --json`, with why a job did not succeed."""
    words = ["submit", "waves [sim:failed]", *IMAGE, *STORED, *QUICK, "--key", "k", "--json"]
    submitted = await xiling(sim, *words)
    listed = await xiling(sim, "jobs", *STORED, "--json")
    assert (listed.code, listed.told) == (0, submitted.told)
    assert listed.told["error"] == "TaskFailed"
    assert (listed.told["metadata"], listed.told["retry_of"]) == ({}, None)
    assert listed.told["ended_at"] == listed.told["changed_at"] > listed.told["created_at"]
    Path("jobs.db").unlink()
    await stored(
        old(1, state=State.ACCEPTED, metadata={"user": "海"}, retry_of="0" * 32, task_ids=("t",), outcomes=(None,))
    )
    told = (await xiling(sim, "jobs", *STORED, "--json")).told
    assert (told["metadata"], told["retry_of"], told["ended_at"]) == ({"user": "海"}, "0" * 32, None)


async def test_a_job_that_cannot_be_read_is_said(sim: Simulator) -> None:
    """One broken row is a line on stderr; all others are listed."""
    await stored(old(1), old(2))
    with contextlib.closing(sqlite3.connect("jobs.db")) as database:
        database.execute("UPDATE jobs SET tasks = 'broken' WHERE key = 'k1'")
        database.commit()
    ran = await xiling(sim, "jobs", *STORED)
    assert [line.split("\t")[4] for line in ran.out.splitlines()] == ["k2"]
    assert f"job {1:032x} of the store cannot be read" in ran.err


async def test_many_jobs(sim: Simulator) -> None:
    """More than one page of the store: each once, the newest first; a memory store the same."""
    records = [old(n) for n in range(603)]
    memory, store = MemoryStore(), SQLiteStore(Path.cwd() / "jobs.db")
    newest_first = JobQuery(newest_first=True)
    for any_store in (memory, store):
        await any_store.open()
        await asyncio.gather(*map(any_store.add, records))
        assert [record.key async for record in any_store.jobs(newest_first)] == [f"k{n}" for n in reversed(range(603))]
        reading = any_store.jobs(newest_first)
        await anext(reading)
        await any_store.purge(1.0)
        assert [record.key async for record in reading] == [
            f"k{n}" for n in reversed(range(403, 602)) if any_store is store
        ]
        await any_store.close()


def test_the_list_on_a_terminal() -> None:
    """80 columns: keys stand in line, prompts are cut, ids never are."""
    with terminal() as (slave, written), os.fdopen(os.dup(slave), "w", encoding="utf-8") as file:
        out = Console(file=file, force_terminal=True, color_system=None, width=80)
        ids = tuple(f"i2v-{n:032x}" for n in range(4))
        records = [
            old(1, key="订单", request=model_v("海浪 " * 50), task_ids=ids, outcomes=(None,) * 4, asked=4),
            old(2, key="a-very-long-key-" * 3, state=State.UNCERTAIN),
            old(3, key=None, state=State.NOT_SENT, metadata={"user": "\x1b[2J海", "order": "7" * 99}),
        ]
        jobs._list(out, records)
        jobs._list(out, [old(3, key=None)])
    (text,) = written
    lines = text.replace("\r", "").splitlines()
    assert all(any(line.endswith(task_id) for line in lines) for task_id in ids)
    assert all(f"  {record.id}" in text for record in records)
    assert max(screen_cells(line) for line in lines) <= 80
    assert [line.index("waves at dawn") for line in lines if "waves" in line] == [53, 53, 27]
    assert "a-very-long-key-a-very-…" in text and "…" in lines[0]
    assert "\n  user=\\x1b[2J海  order=7777777" in "\n".join(lines)


def screen_cells(line: str) -> int:
    return sum(2 if character >= "\u3000" else 1 for character in line)


def test_ages() -> None:
    """Ages have one unit; a clock that went back makes no negative one."""
    assert [ages.age_of(s) for s in (-5, 0, 59.9, 60, 3599, 3600, 86399, 86400, 9e6)] == [
        "0s", "0s", "59s", "1m", "59m", "1h", "23h", "1d", "104d",
    ]  # fmt: skip
    assert [clock_of(s) for s in (0, 61.9, 3600, 36005)] == ["0:00", "1:01", "1:00:00", "10:00:05"]


# --- on a terminal ---------------------------------------------------------------------------------------------------


async def test_progress_on_a_terminal(sim: Simulator) -> None:
    """stderr on a terminal, stdout in a pipe: a line counts time and tasks and is gone at the end; stdout is plain."""
    sim.manual = True
    with terminal() as (slave, written):
        async with started(sim, "submit", "waves", *IMAGE, *QUICK, "--count", "2", stderr=slave) as process:
            await sim.wait_for_posts(1)
            first, second = sim.ledger.task_ids
            sim.set_result(first)
            await sim.ledger.until(lambda: len(sim.ledger.gets) > 4)
            sim.set_result(second)
            ran = await ended(process)
    (text,) = written
    assert (ran.code, len(ran.urls)) == (0, 2)
    assert ESCAPE not in ran.out
    assert re.search(r"0:0\d  accepted  1/2 tasks", text)
    assert text.rindex(f"{ESCAPE}[?25h") > text.rindex(f"{ESCAPE}[?25l")
    assert re.search(r"done: 2 of 2 tasks succeeded, after 0:\d\d\r\n", text)
    assert text.endswith(f"{ESCAPE}[1A{ESCAPE}[2K")


async def test_a_terminal_of_our_own(sim: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in this process."""
    with terminal() as (slave, written), os.fdopen(os.dup(slave), "w", encoding="utf-8") as file:
        of = session_of(sim, io.StringIO(), monkeypatch, port=0)
        of = evolve(of, out=Console(file=file, force_terminal=True, width=80))
        (ending,) = await bought(of, model_v(), None)
    assert ending.error is None
    assert "done: 1 of 1 task succeeded" in written[0]


async def test_the_line_that_counts(sim: Simulator) -> None:
    """The counting line tells of several jobs together, and of questions that the service did not answer."""
    out = io.StringIO()
    teller = progress.JobsDisplay(Console(file=out, width=80), Watch())
    assert str(teller._line().text) == "0:00  getting ready"
    watch = Watch()
    teller = progress.JobsDisplay(Console(file=out, width=80), watch)
    watch.follow(job_record("a", state=State.ACCEPTED, asked=2, task_ids=("t",), outcomes=(None,), failed_asks=3))
    watch.follow(job_record("b", state=State.DONE))
    assert str(teller._line().text) == ("0:00  1 accepted, 1 done  0/3 tasks  (the service did not answer 3 questions)")


def test_lines_are_told_once() -> None:
    """A change that is no news to people has no line; each state has its words."""
    out, watch = io.StringIO(), Watch()
    teller = progress.JobsDisplay(Console(file=out, width=80), watch)
    watch.follow(job_record(state=State.ACCEPTED, task_ids=("t",), outcomes=(None,)))
    watch.follow(job_record(state=State.SENDING))  # an older news of the same job
    watch.saw(job_record(state=State.DONE))  # no newer than what is known
    watch.saw(job_record(state=State.ACCEPTED, task_ids=("t",), outcomes=(None,), version=1, due_at=5.0))
    watch.saw(job_record("somebody's", state=State.DONE))
    teller.tell()
    watch.saw(job_record(state=State.ACCEPTED, task_ids=("t",), outcomes=(None,), version=2, failed_asks=1))
    watch.saw(job_record(state=State.ACCEPTED, task_ids=("t",), outcomes=(None,), version=3, failed_asks=2))
    teller.tell()
    mute = "the service did not answer with a status; asking again"
    assert out.getvalue() == f"accepted: job {'0' * 32}\n  task t\n{mute}\n"
    for version, state in enumerate((State.NOT_SENT, State.REJECTED, State.UNKNOWN, State.EXPIRED), 4):
        watch.saw(job_record(state=state, version=version))
        teller.tell()
    assert out.getvalue().splitlines()[3:] == [
        "not reached: nothing was sent", "unknown: no callback came in time", "expired",
    ]  # fmt: skip


async def test_jobs_without_a_reader(sim: Simulator) -> None:
    """`xiling jobs | head -1` is no error."""
    await stored(*(old(n, request=model_v("x" * 1000)) for n in range(300)))
    async with started(sim, "jobs", *STORED, "--all") as process:
        assert process.stdout is not None
        await process.stdout.readline()
        cast("Any", process.stdout)._transport.close()
        assert process.stderr is not None
        assert await process.stderr.read() == b""
        assert await process.wait() == 0


def test_what_nobody_reads_is_not_written() -> None:
    """When the reader is gone, the rest is silence."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file:
        out = output.console()
        out.file = file
        output.write(out, "nobody reads this")
        output.write(out, "nor this")
        assert out.quiet


# --- endings ---------------------------------------------------------------------------------------------------------


def test_the_exit_codes() -> None:
    """Each error has the exit code that the help promises."""
    codes = {
        TaskFailed("x"): 1, SubmitUncertain("x"): 1, ConfigurationError("x"): 2, StoreError("x"): 1,
        ClientClosed("x"): 1, InvalidRequest("x"): 2, WaitTimeout("x"): 3, Stopped("x"): 130,
    }  # fmt: skip
    assert {error: code_of(error) for error in codes} == codes


def test_endings_raise_what_went_wrong() -> None:
    """Nothing, the one error, or all of them."""
    report.raise_errors([Ending(None)])
    with pytest.raises(StoreError):
        report.raise_errors([Ending(None), Ending(None, StoreError("x"))])
    with pytest.raises(Failures, match="2 jobs did not succeed"):
        report.raise_errors([Ending(None, StoreError("x")), Ending(None, StoreError("y"))])


def test_json_of_what_this_version_does_not_know() -> None:
    """A kind of tomorrow, a field of tomorrow, a local file, an error without a record: each has its JSON."""
    strange = job_record(
        kind="video_of_tomorrow", request=ImageToVideo.unchecked(model="X", prompt="p", mood="calm"),
        state=State.DONE, task_ids=("t",), outcomes=(xiling_async.Succeeded("t", {"url": "https://a.b/c"}),),
    )  # fmt: skip
    told = json.loads(as_json(Ending(strange)))
    assert told["outcomes"] == [{"ok": True, "task_id": "t", "url": "https://a.b/c"}]
    assert told["request"] == {"model": "X", "prompt": "p", "mood": "calm"}
    local = ImageToVideo.restored({"model": "V", "image_url": Path("sea.jpg")})
    assert json.loads(as_json(Ending(job_record(request=local))))["request"]["image_url"] == "sea.jpg"
    lost = StoreError("The job WAS bought", charged="yes", job_id="j", task_ids=["t"])
    told = json.loads(as_json(Ending(None, lost)))
    assert [told[name] for name in ("job_id", "task_ids", "charged", "error")] == ["j", ["t"], "yes", "StoreError"]


def test_the_charge_follows_the_state() -> None:
    """Without an error, `charged` says what the state means for the money."""
    charged = {state: json.loads(as_json(Ending(job_record(state=state))))["charged"] for state in State}
    assert {state for state, word in charged.items() if word == "no"} == {State.NOT_SENT, State.REJECTED}
    assert {state for state, word in charged.items() if word == "maybe"} == {
        State.SENDING, State.UNCERTAIN, State.UNKNOWN,
    }  # fmt: skip
