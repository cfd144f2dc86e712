"""What the tests of the promises share: requests, stores that wait or fail on purpose, and ways to force an order."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
from yarl import URL

from xiling_async import Client, ImageToVideo, MemoryStore, StoreError, WebhookReceiver
from xiling_async.models.lifecycle import Change, Event, OutcomeReported
from xiling_async.models.record import JobRecord
from xiling_async.simulator import Simulator
from xiling_async.testing.clock import ManualClock

T = TypeVar("T")

IMAGE = "https://example.com/sea.jpg"
ANSWER_TIMEOUT_S = 10 + 60  # Timeouts(): a connection, then an answer
TURNS_LIMIT_S = 10.0  # far beyond what anything on loopback needs


# --- requests ------------------------------------------------------------------------------------------------------


def model_v(prompt: str = "waves at dawn", *, count: int = 1, image_url: str = IMAGE) -> ImageToVideo:
    return ImageToVideo(
        model="V",
        prompt=prompt,
        image_url=image_url,
        aspect_ratio="16:9",
        aspect_resolution="1080p",
        duration=8,
        generate_count=count,
    )


def model_kl(prompt: str = "waves at dawn") -> ImageToVideo:
    return ImageToVideo(
        model="KL",
        prompt=prompt,
        reference_images=[IMAGE, "https://example.com/sky.jpg"],
        aspect_ratio="9:16",
        aspect_resolution="720p",
        duration=5,
    )


def model_s(prompt: str = "waves at dawn") -> ImageToVideo:
    return ImageToVideo(
        model="S", prompt=prompt, image_url=IMAGE, aspect_ratio="16:9", aspect_resolution="720p", duration=12
    )


# --- a client of a simulator ---------------------------------------------------------------------------------------


def client_of(sim: Simulator, *, receiver: WebhookReceiver | None = None, **options: Any) -> Client:
    """A client of this simulator; it always has a receiver."""
    given = {"base_url": sim.base_url, **options}
    return Client(given.pop("api_key", sim.api_key), receiver=receiver or WebhookReceiver(port=0), **given)


def token_of(url: str | None) -> str:
    assert url is not None
    return url.rpartition("/")[2]


def port_of(url: str) -> int:
    port = URL(url).port
    assert port is not None
    return port


def callback_body(task_id: object, status: object = "SUCCEEDED", **data: object) -> bytes:
    """A callback as documented; `data` changes or adds fields of its `data`."""
    fields = {
        "task_id": task_id,
        "status": status,
        "video_url": "https://media.example/v.mp4",
        "thumbnail_url": "https://media.example/v.webp",
        "error_message": "",
        **data,
    }
    return json.dumps({"code": 0, "msg": "ok", "task_type": "image_to_video", "data": fields}).encode()


# --- forcing an order ----------------------------------------------------------------------------------------------


async def settle(turns: int = 50) -> None:
    """Let everything that is ready run; no time passes."""
    for _ in range(turns):
        await asyncio.sleep(0)


async def turns_until(holds: Callable[[], bool]) -> None:
    """Let the loop turn until this holds; it must, with no time of a test's clock passing. Work that is in a thread
    may take a number of turns that depends on the machine, so the limit is in seconds."""
    until = asyncio.get_running_loop().time() + TURNS_LIMIT_S
    while not holds():
        assert asyncio.get_running_loop().time() < until, "it never came to hold"
        await asyncio.sleep(0)


async def started(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Start this, and let it come as far as it can."""
    task = asyncio.create_task(work)
    await settle()
    return task


async def pumped(clock: ManualClock, work: Coroutine[Any, Any, T], *, step_s: float = 1.0) -> T:
    """Run this to its end while the hand-driven clock goes on, second by second."""
    task = asyncio.create_task(work)
    for _ in range(1_000):
        await settle(100)
        if task.done():
            return task.result()
        clock.advance(step_s)
    task.cancel()
    raise AssertionError("it did not end within 1,000 steps of the clock")


async def gone(task: asyncio.Task[Any]) -> None:
    """Cancel this caller and see it go."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()


# --- stores that note, wait or fail --------------------------------------------------------------------------------


class NotingStore(MemoryStore):
    """Notes every job and event that it was asked to write."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[JobRecord | Event] = []

    async def add(self, record: JobRecord) -> JobRecord:
        self.asked.append(record)
        return await super().add(record)

    async def change(self, job_id: str, event: Event) -> Change:
        self.asked.append(event)
        return await super().change(job_id, event)

    async def everything(self) -> dict[str, JobRecord]:
        """What is remembered of each job that was ever added."""
        ids = [item.id for item in self.asked if isinstance(item, JobRecord)]
        return {job_id: record for job_id in ids if (record := await self.get(job_id)) is not None}


class GatedStore(NotingStore):
    """Commits of callbacks wait at a gate while it is shut."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def change(self, job_id: str, event: Event) -> Change:
        if isinstance(event, OutcomeReported):
            self.reached.set()
            await self.gate.wait()
        return await super().change(job_id, event)


class FailingStore(NotingStore):
    """Refuses to write what `fails` names, as a full disk would."""

    def __init__(self, *fails: type[object], error: Exception | None = None) -> None:
        super().__init__()
        self.fails = fails
        self.error = error or StoreError("The disk is full.")

    async def add(self, record: JobRecord) -> JobRecord:
        if isinstance(record, self.fails):
            raise self.error
        return await super().add(record)

    async def change(self, job_id: str, event: Event) -> Change:
        if isinstance(event, self.fails):
            raise self.error
        return await super().change(job_id, event)


# --- the network at its worst --------------------------------------------------------------------------------------


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    """A port where nobody listens, and nobody else can begin to."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield int(taken.getsockname()[1])


class Proxy:
    """A middlebox before the simulator: it cuts a request in the middle of its body, or garbles the answer.

    `cut`: half of the body is passed on, then both connections are reset. `answer`: what comes back instead.
    """

    def __init__(self, sim: Simulator, *, cut: bool = False, answer: bytes | None = None) -> None:
        self._sim = sim
        self._cut = cut
        self._answer = answer
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        head = await reader.readuntil(b"\r\n\r\n")
        size = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", self._sim.port)
        upstream.write(head + await reader.readexactly(size // 2 if self._cut else size))
        await upstream.drain()
        if self._answer is not None:
            await upstream_reader.readuntil(b"\r\n\r\n")
            writer.write(self._answer)
            await writer.drain()
        else:
            await settle()  # what was sent arrives before the end does
        for end in (upstream, writer):
            end.close()
            with contextlib.suppress(OSError):
                await end.wait_closed()


class Road:
    """A way to the service that can be closed: then connections are refused, as of a host that is down."""

    def __init__(self, sim: Simulator) -> None:
        self._target = port_of(sim.base_url)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._pipes: set[asyncio.Task[None]] = set()
        self.port = 0

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, reuse_address=True)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in tuple(self._writers):
            writer.close()
        await turns_until(lambda: not self._writers)
        await settle()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward, back = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers |= {writer, back}
        pipes = [asyncio.create_task(_pipe(reader, back)), asyncio.create_task(_pipe(onward, writer))]
        await asyncio.wait(pipes)
        for one in (writer, back):
            one.close()
            with contextlib.suppress(OSError):
                await one.wait_closed()
        self._writers -= {writer, back}


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def raw_exchange(port: int, *sent: bytes) -> bytes:
    """What a server answers to these bytes, until it hangs up. It need not read them all."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        with contextlib.suppress(OSError):
            for piece in sent:
                writer.write(piece)
                await writer.drain()
        with contextlib.suppress(OSError):
            return await reader.read()
        return b""
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def http(path: str, body: bytes = b"", *headers: str, method: str = "POST", length: int | None = None) -> bytes:
    """A request as bytes; the connection ends with the answer."""
    size = len(body) if length is None else length
    lines = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close", *headers]
    if not any(header.lower().startswith("transfer-encoding") for header in headers):
        lines.append(f"Content-Length: {size}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@contextlib.asynccontextmanager
async def plain_session() -> AsyncIterator[aiohttp.ClientSession]:
    """Somebody else's HTTP client: it plays the service towards a receiver."""
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
        yield session


async def post(session: aiohttp.ClientSession, url: str, body: bytes, **headers: str) -> int:
    async with session.post(URL(url, encoded=True), data=body, headers=headers, allow_redirects=False) as response:
        await response.read()
        return response.status
