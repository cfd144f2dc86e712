"""`xiling receive`: the real command between a simulator and submitters elsewhere, all of them on one PostgreSQL."""

from __future__ import annotations

import asyncio
import io
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import quote

import pytest
from attrs import define
from pg import PASSWORD, Wire, fresh_schema, pg_store, server
from rich.console import Console
from support import callback_body, client_of, closed_port, model_v, plain_session, post, token_of
from typer.testing import CliRunner

import xiling_async
from xiling_async import Client, MemoryStore, SQLiteStore, State, WebhookReceiver
from xiling_async.cli import app
from xiling_async.cli.commands.receive import serve
from xiling_async.errors import ConfigurationError
from xiling_async.jobs.callbacks import CallbackWorker
from xiling_async.simulator import Simulator
from xiling_async.telemetry.events import Event
from xiling_async.webhooks.tokens import SECRET_BYTES

SOURCE: Final = Path(xiling_async.__file__).parents[1]
XILING: Final = [sys.executable, "-W", "error", "-m", "xiling_async.cli"]
PUBLIC: Final = ("--public-url", "https://media.example.com/xiling")
OWN_SECRET: Final = "the deployment's own secret"
DEADLINE_S: Final = 30  # of a whole process; only a failure takes so long


def environment(**more: str) -> dict[str, str]:
    unwanted = ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "PYTHONIOENCODING")
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    return {**kept, "PYTHONPATH": str(SOURCE), "PYTHONUTF8": "1", "TERM": "xterm-256color", **more}


@pytest.fixture
def schema() -> str:
    return fresh_schema()


@pytest.fixture
async def sim() -> AsyncIterator[Simulator]:
    """Tasks end, and are called back, when the test says so."""
    async with Simulator(manual=True) as simulator:
        yield simulator


def within(dsn: str, schema: str) -> str:
    """The command has no option for a schema: the search path of the DSN names it."""
    return f"{dsn}&options=-c%20search_path%3D{schema}"


class Front:
    """The public address: it passes connections on to whatever `port` is now, as a proxy would."""

    def __init__(self) -> None:
        self.port = 0
        self.url = ""
        self._links: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}/xiling"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        for link in self._links:
            link.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._link(reader, writer))
        self._links.add(task)
        task.add_done_callback(self._links.discard)

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        try:
            there, away = await asyncio.open_connection("127.0.0.1", self.port)
            ends.append(away)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pass_on(reader, away))
                both.create_task(self._pass_on(there, writer))
        finally:
            for end in ends:
                end.transport.abort()

    async def _pass_on(self, source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                to.write(data)
                await to.drain()
        to.transport.abort()


@define
class Receiving:
    """The command as a process of its own, and what it has said on standard output."""

    process: asyncio.subprocess.Process
    port: int
    said: str = ""
    errors: str = ""

    async def hears(self, what: str) -> None:
        assert self.process.stdout is not None
        self.said += (await self.process.stdout.readuntil(what.encode())).decode()

    async def ended(self, how: signal.Signals | None = None) -> int | None:
        if how is not None:
            self.process.send_signal(how)
        out, err = await self.process.communicate()
        self.said, self.errors = self.said + out.decode(), self.errors + err.decode()
        return self.process.returncode

    def shows_none_of(self, *secrets: str) -> None:
        for secret in (*secrets, PASSWORD, quote(PASSWORD, safe="")):
            assert secret not in self.said + self.errors


@asynccontextmanager
async def receiving(front: Front, dsn: str, **more: str) -> AsyncIterator[Receiving]:
    process = await asyncio.create_subprocess_exec(
        *XILING, "receive", "--store", dsn, "--public-url", front.url, "--port", "0",
        env=environment(**more), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(DEADLINE_S):
            assert process.stdout is not None and process.stderr is not None
            said = ""
            async for line in process.stdout:
                said += line.decode()
                if found := re.match(r"Listening on port (\d+)\.$", line.decode()):
                    front.port = int(found[1])
                    break
            else:
                raise AssertionError(said + (await process.stderr.read()).decode())
            yield Receiving(process, front.port, said)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def submitter(sim: Simulator, schema: str, front: Front) -> Client:
    """A client that listens nowhere: its receiver only knows the public address."""
    return client_of(sim, store=pg_store(schema=schema), receiver=WebhookReceiver(front.url))


async def health(port: int) -> int:
    async with plain_session() as session, session.get(f"http://127.0.0.1:{port}/healthz") as answer:
        return answer.status


async def is_refused(port: int) -> None:
    """Until nobody listens there any more."""
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return
        writer.transport.abort()


# --- what it is for --------------------------------------------------------------------------------------------------


async def test_a_submitter_that_does_not_listen_is_woken(sim: Simulator, schema: str) -> None:
    """A callback that the command took wakes whoever waits in another process; SIGTERM ends it with its summary."""
    async with Front() as front, submitter(sim, schema, front) as client:
        secret = await pg_secret(schema)
        async with receiving(front, within(server().dsn, schema)) as command:
            assert front.url in command.said and "<PostgresStore" in command.said
            assert await health(command.port) == 200
            job = await client.submit(model_v())
            (task_id,) = job.task_ids
            waiter = asyncio.create_task(job.result())
            assert await sim.finish(task_id) == 200
            (video,) = await waiter
            url = sim.ledger.posts[0].callback_url
            async with plain_session() as session:
                assert await post(session, str(url), callback_body(task_id)) == 200
                for _ in range(3):
                    assert await post(session, f"{front.url}/{token_of(url)[::-1]}", callback_body(task_id)) == 404
            assert await command.ended(signal.SIGTERM) == 0
    assert (video.task_id, job.state) == (task_id, State.DONE)
    assert (len(sim.ledger.posts), sim.ledger.paid_submits, len(sim.ledger.gets)) == (1, 1, 0)
    told = f"callback of {task_id} (job {job.id}): "
    assert f"{told}applied\n{told}repeat\n1 request answered 404, with no callback URL" in command.said
    assert "\n2 requests answered 404" in command.said and "3 requests answered" not in command.said
    assert command.said.endswith("\n2 callbacks, 1 of them news; 3 requests refused.\n")
    assert command.errors == ""
    command.shows_none_of(token_of(url), secret.hex(), repr(secret), sim.api_key)


async def pg_secret(schema: str) -> bytes:
    """The secret of callback URLs that the store keeps."""
    store = pg_store(schema=schema)
    await store.open()
    try:
        return await store.secret(b"\0" * SECRET_BYTES)
    finally:
        await store.close()


async def test_the_submitter_is_gone_when_the_callback_comes(sim: Simulator, schema: str) -> None:
    """A later client finds the result without a single status GET. Ctrl-C ends the command with its summary, too."""
    async with Front() as front:
        async with submitter(sim, schema, front) as client:
            job = await client.submit(model_v(), key="order-42")
        async with receiving(front, within(server().dsn, schema)) as command:
            assert await sim.finish(job.task_ids[0]) == 200
            await command.hears("applied")
            assert await command.ended(signal.SIGINT) == 0
        async with submitter(sim, schema, front) as later:
            found = await later.find("order-42")
            assert found is not None and found.state is State.DONE
            (video,) = await found
            again = await later.submit(model_v(), key="order-42")
    assert (video.task_id, again.id) == (job.task_ids[0], job.id)
    assert (len(sim.ledger.posts), len(sim.ledger.gets)) == (1, 0)
    assert command.said.endswith("\n1 callback, 1 of them news; 0 requests refused.\n")
    assert command.errors == ""


async def test_the_database_is_away(sim: Simulator, schema: str) -> None:
    """Callbacks are answered 503 while it is away and 200 when it is back. SIGTERM waits for the one that is being
    written: it is answered 200, and counted."""
    async with Wire() as wire, Front() as front, submitter(sim, schema, front) as client, plain_session() as session:
        jobs = [await client.submit(model_v(f"waves {number}")) for number in range(2)]
        urls = [str(record.callback_url) for record in sim.ledger.posts]
        bodies = [callback_body(job.task_ids[0]) for job in jobs]
        async with receiving(front, within(wire.dsn, schema)) as command:
            await wire.down()
            assert [await post(session, urls[0], bodies[0]) for _ in range(2)] == [503, 503]
            assert (await health(command.port), jobs[0].state) == (200, State.ACCEPTED)
            await wire.up()
            assert await post(session, urls[0], bodies[0]) == 200
            await jobs[0]

            is_writing = asyncio.Event()
            wire.cut_at, wire.hangs, wire.when_cut = [jobs[1].id.encode()], True, is_writing.set
            last = asyncio.create_task(post(session, urls[1], bodies[1]))
            await is_writing.wait()
            command.process.send_signal(signal.SIGTERM)
            await is_refused(command.port)
            wire.passes.set()
            assert await last == 200
            assert await command.ended() == 0
        await jobs[1]
    assert (len(sim.ledger.posts), len(sim.ledger.gets)) == (2, 0)
    assert command.said.endswith("\n2 callbacks, 2 of them news; 2 requests refused.\n")
    assert command.errors.count("the store could not write a callback; answered 503\n") == 2
    assert "Traceback" not in command.errors
    command.shows_none_of(*map(token_of, urls))


async def test_a_secret_of_ones_own(sim: Simulator, schema: str) -> None:
    """Submitters and command with the same XILING_WEBHOOK_SECRET understand each other; with another one it is a 404
    that the command tells of. The secret is not shown."""
    async with Front() as front:
        own = WebhookReceiver(front.url, secret=OWN_SECRET)
        async with client_of(sim, store=pg_store(schema=schema), receiver=own) as client:
            job = await client.submit(model_v())
            out, stop = io.StringIO(), asyncio.Event()
            other = WebhookReceiver(front.url, secret="another secret of the same length", port=0)
            serving = asyncio.create_task(serve(other, pg_store(schema=schema), Console(file=out, width=200), stop))
            await said(out, "Listening on port ")
            front.port = other.port or 0
            assert await sim.finish(job.task_ids[0]) == 404
            stop.set()
            await serving
            assert "1 request answered 404" in out.getvalue()
            async with receiving(front, within(server().dsn, schema), XILING_WEBHOOK_SECRET=OWN_SECRET) as command:
                async with plain_session() as session:
                    url = str(sim.ledger.posts[0].callback_url)
                    assert await post(session, url, callback_body(job.task_ids[0])) == 200
                await job
                assert await command.ended(signal.SIGTERM) == 0
    assert command.errors == ""
    command.shows_none_of(OWN_SECRET, token_of(url))


async def said(out: io.StringIO, what: str) -> None:
    """Until it was written, by a task that waits for the database in between."""
    async with asyncio.timeout(DEADLINE_S):
        while what not in out.getvalue():
            await asyncio.sleep(0)


# --- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--store", "jobs.db", *PUBLIC), "--store: must be postgresql://…, the store that the submitters share"),
        (("--store", ":memory:", *PUBLIC), "a SQLite file serves one process, and memory none but its own"),
        (("--store", "", *PUBLIC), "Nothing was started."),
        (PUBLIC, "Missing option '--store'."),
        (("--store", "postgresql:///db"), "Missing option '--public-url'."),
        (("--store", "postgresql:///db", "--public-url", " "), "--public-url: must not be blank."),
        (("--store", "postgresql:///db", *PUBLIC, "--host", ""), "--host: must not be blank."),
    ],
)
def test_what_is_not_understood(
    words: tuple[str, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that nobody shares, or none: a usage error with its reason, exit code 2; no file, nobody listens."""
    monkeypatch.chdir(tmp_path)
    with taken_port() as port:  # who listens there before the options are read is told so instead
        done = CliRunner().invoke(app.app, ["receive", *words, "--port", str(port)], env={"COLUMNS": "200"})
    assert (done.exit_code, done.stdout) == (2, "")
    assert told in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield int(other.getsockname()[1])


def test_what_keeps_it_from_starting(schema: str) -> None:
    """A database that is away, a DSN or a public URL that is none, a port that is taken: one line that shows no
    password, an exit code, and no summary of what never began."""
    with closed_port() as nobody, taken_port() as port:
        away = f"postgresql://me:{quote(PASSWORD, safe='')}@127.0.0.1:{nobody}/db?sslmode=disable"
        for words, why in (
            (("--store", away, *PUBLIC, "--port", "0"), "PostgreSQL at 127.0.0.1"),
            (("--store", f"{server().dsn} x", *PUBLIC), "It is not shown here"),
            (("--store", server().dsn, "--public-url", "media.example.com"), "public URL"),
            (("--store", server().dsn, *PUBLIC, "--port", str(port)), f"cannot listen on 127.0.0.1:{port}"),
        ):
            done = CliRunner().invoke(app.app, ["receive", *words])
            assert (done.exit_code, done.stdout) == (1 if "PostgreSQL" in why else 2, "")
            (line,) = done.stderr.splitlines()
            assert line.startswith("xiling: ") and why in line
            assert PASSWORD not in line and quote(PASSWORD, safe="") not in line


async def test_a_reception_needs_a_store_that_others_share(tmp_path: Path) -> None:
    """Also in Python: memory and a SQLite file are refused, and so is a receiver that would have to ask."""
    for store in (MemoryStore(), SQLiteStore(tmp_path / "jobs.db")):
        with pytest.raises(ConfigurationError, match="a store that the submitters share"):
            CallbackWorker(WebhookReceiver(port=0), store)
    with pytest.raises(ConfigurationError, match="asks for no status"):
        CallbackWorker(WebhookReceiver(port=0, trust="status"), pg_store())
    assert list(tmp_path.iterdir()) == []


async def test_what_listens_to_a_reception_may_fail(
    sim: Simulator, schema: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What is written down is answered 200, whatever becomes of telling about it here; that is logged once."""

    def on_event(event: Event) -> None:
        raise OSError("no space left for what is told")

    async with Front() as front, submitter(sim, schema, front) as client:
        receiver = WebhookReceiver(front.url, port=0)
        async with CallbackWorker(receiver, pg_store(schema=schema), on_event=on_event):
            front.port = receiver.port or 0
            jobs = [await client.submit(model_v(f"waves {number}")) for number in range(2)]
            assert [await sim.finish(job.task_ids[0]) for job in jobs] == [200, 200]
            await asyncio.gather(*jobs)
    assert ["hook failed" in record.getMessage() for record in caplog.records if record.exc_info] == [True]


async def test_a_job_that_the_database_has_lost_is_adopted(sim: Simulator, schema: str) -> None:
    """A restored backup: the token proves that the job was ours. It is taken in here, and asked about by a client."""
    async with Front() as front:
        async with client_of(sim, store=pg_store(schema=schema), receiver=WebhookReceiver(front.url)) as client:
            job = await client.submit(model_v())
            store = pg_store(schema=schema)
            await store.open()
            await forget(store, schema)
            await store.close()
        out, stop = io.StringIO(), asyncio.Event()
        receiver = WebhookReceiver(front.url, port=0)
        serving = asyncio.create_task(serve(receiver, pg_store(schema=schema), Console(file=out, width=200), stop))
        await said(out, "Listening on port ")
        front.port = receiver.port or 0
        assert await sim.finish(job.task_ids[0]) == 200
        stop.set()
        await serving
        async with submitter(sim, schema, front) as later:
            found = await later.find(job.task_ids[0])
            assert found is not None
            (video,) = await found
    assert (video.task_id, found.id, found.request) == (job.task_ids[0], job.id, None)
    assert (len(sim.ledger.posts), len(sim.ledger.gets)) == (1, 1)


async def forget(store: Any, schema: str) -> None:
    await store._driver.run(lambda connection: connection.execute(f'DELETE FROM "{schema}".xiling_jobs'))
