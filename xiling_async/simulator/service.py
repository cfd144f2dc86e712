"""The service itself: the aiohttp application that sells tasks, and the handle that tests and people hold."""

import asyncio
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Self

import attrs
from aiohttp import web
from yarl import URL

from xiling_async.simulator import faults, media
from xiling_async.simulator.answers import INVALID_TOKEN, TASK_NOT_FOUND, Answer, envelope
from xiling_async.simulator.callbacks import CallbackSender
from xiling_async.simulator.connection import cut, headers_of, not_found, write
from xiling_async.simulator.desk import Decision, Desk, parameter_error
from xiling_async.simulator.faults import Fault
from xiling_async.simulator.jobs import Job, status_data
from xiling_async.simulator.kinds import KINDS, Kind, is_portrait
from xiling_async.simulator.ledger import GetRecord, Ledger, MediaRecord, PostRecord

# How long a client that stalls in the middle of its request can delay the end.
SHUTDOWN_TIMEOUT_S = 0.05
_INVALID_TOKEN = envelope(INVALID_TOKEN, "Invalid token", status=401)
_TOO_LARGE = parameter_error("the body is too large", status=413)


class Simulator:
    """The service on a real socket, for the time of an `async with`.

    Args:
        api_key: the one bearer token it accepts.
        host: the address to listen on.
        port: the port to listen on; 0 takes a free one.
        latency: seconds a generation takes; 0 ends it as soon as the create was answered.
        seed: of the task ids; the same seed makes the same ids.
        manual: tasks wait for `finish`, `progress` and `set_result` instead of ending by themselves.
        callback_timeout: seconds the receiver of a callback has to answer.
    """

    def __init__(
        self,
        api_key: str = "sim-key",
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        latency: float = 0.0,
        seed: int = 0,
        manual: bool = False,
        callback_timeout: float = 10.0,
    ) -> None:
        self.api_key = api_key
        self.host = host
        self.port = port
        self.latency = latency
        self.manual = manual
        self.lenient = False
        self.ledger = Ledger()
        self._callback_timeout = callback_timeout
        self._desk = Desk(self.ledger, seed)
        self._arrived = 0
        self._generations: set[asyncio.Task[None]] = set()
        self._released = asyncio.Event()
        self._released.set()
        self._stopped = asyncio.Event()
        self._opened = AsyncExitStack()

    # --- life ---

    async def __aenter__(self) -> Self:
        app = web.Application()
        self._add_routes(app)
        # handler_cancellation: a create that hangs ends when its client goes away.
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=SHUTDOWN_TIMEOUT_S)
        await runner.setup()
        try:
            await web.TCPSite(runner, self.host, self.port).start()
        except BaseException:
            await runner.cleanup()
            raise
        self.port = int(runner.addresses[0][1])
        self._sender = CallbackSender(self.origin, self.ledger, self._callback_timeout)
        # Last in, first out: whoever waits is let go, the server ends, and with it what it still began.
        self._opened.push_async_callback(self._sender.close)
        self._opened.push_async_callback(self._stop_generations)
        self._opened.push_async_callback(runner.cleanup)
        self._opened.push_async_callback(self._stop_generations)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._released.set()
        await self._opened.aclose()

    async def _stop_generations(self) -> None:
        for generation in self._generations:
            generation.cancel()
        await asyncio.gather(*self._generations, return_exceptions=True)

    def __repr__(self) -> str:
        posts, tasks = len(self.ledger.posts), len(self.ledger.tasks)
        return f"<Simulator {self.base_url} posts={posts} tasks={tasks}>"

    @property
    def origin(self) -> str:
        """Scheme, host and port."""
        return str(URL.build(scheme="http", host=self.host, port=self.port))

    @property
    def base_url(self) -> str:
        """Where the API is, as clients are configured with it."""
        return f"{self.origin}/v1"

    # --- what tests and people ask of it ---

    def script(self, *given: Fault) -> None:
        """The faults of the next create without a script; none makes it a plain one."""
        self._desk.script(_checked(given))

    def default(self, *given: Fault) -> None:
        """The faults of every create that has no script of its own."""
        self._desk.default = _checked(given)

    async def finish(self, task_id: str, status: str = "SUCCEEDED", *, message: str | None = None) -> int | None:
        """End a task and call back; the receiver's answer, None when it gave none or nothing was sent."""
        self.set_result(task_id, status=status, message=message)
        return await self._sender.tell_end(self._desk.tasks[task_id])

    async def progress(self, task_id: str) -> int | None:
        """Move a task to its running status and call that back; the receiver's answer as in `finish`."""
        task = self._desk.tasks[task_id]
        self._desk.move(task, task.job.kind.running)
        return await self._sender.tell(task, task.status)

    async def callback(self, task_id: str) -> int | None:
        """Send the callback for the current status of a task once more, also one that faults lose."""
        task = self._desk.tasks[task_id]
        return await self._sender.send(task, task.status)

    def set_result(self, task_id: str, status: str = "SUCCEEDED", *, message: str | None = None) -> None:
        """Move a task to this status and call nobody: for those who poll."""
        task = self._desk.tasks[task_id]
        fallback = task.intended_end()[1] or "Generation failed" if status == "FAILED" else ""
        self._desk.move(task, status, fallback if message is None else message)

    def hold_answers(self) -> None:
        """Accepted creates wait before they are answered, until `release_answers`."""
        self._released.clear()

    def release_answers(self) -> None:
        """Answer what was held."""
        self._released.set()

    async def wait_for_posts(self, n: int) -> None:
        """Wait until n creates were read to their end."""
        await self.ledger.until(lambda: self.ledger.posts_read >= n)

    async def wait_for_callbacks(self, n: int) -> None:
        """Wait until n callbacks were answered, or found nobody."""
        await self.ledger.until(lambda: len(self.ledger.callbacks) >= n)

    async def settled(self) -> None:
        """Wait until every accepted create was answered or let hang, and called back."""
        await self.ledger.until(lambda: not self._generations)

    # --- the endpoints ---

    def _add_routes(self, app: web.Application) -> None:
        for kind in KINDS:
            app.router.add_post(f"/v1/{kind.path}", partial(self._create, kind))
            app.router.add_get(f"/v1/{kind.path}/{{task_id}}", partial(self._status, kind))
        # The upload endpoint (/v1/figure-resource/upload/file) has its place here.
        app.router.add_get("/media/{name}", self._media)
        app.router.add_route("*", "/{rest:.*}", not_found)

    async def _create(self, kind: Kind, request: web.Request) -> web.StreamResponse:
        self._arrived += 1
        record = PostRecord(number=self._arrived, headers=headers_of(request), read=False)
        known = self._is_authorised(request)
        scripted = self._desk.next_script() if known else ()
        record = attrs.evolve(record, faults=_names(scripted))
        if faults.find(scripted, faults.DropBeforeRead):
            self.ledger.post(record)
            return cut(request)
        try:
            raw = await request.read()
        except web.HTTPRequestEntityTooLarge:
            self.ledger.post(attrs.evolve(record, status=413))
            return await write(request, _TOO_LARGE, self._stopped)
        except BaseException:  # the client went away in the middle of it
            self.ledger.post(record)
            raise
        decision = self._desk.decide(kind, raw, scripted, lenient=self.lenient) if known else Decision(_INVALID_TOKEN)
        self._write_down(record, decision)
        if decision.job is None:
            return await write(request, decision.answer, self._stopped)
        return await self._sell(request, decision.answer, decision.job)

    def _write_down(self, record: PostRecord, decision: Decision) -> None:
        """From here on it is charged, whatever becomes of the connection."""
        body = decision.body or {}
        url = body.get("callback_url")
        self.ledger.post(
            attrs.evolve(
                record,
                read=True,
                status=decision.answer.status,
                body=decision.body,
                faults=_names(decision.given),
                callback_url=url if isinstance(url, str) else None,
                paid=decision.job is not None,
                task_ids=tuple(task.id for task in decision.job.tasks) if decision.job else (),
            )
        )

    async def _sell(self, request: web.Request, answer: Answer, job: Job) -> web.StreamResponse:
        """Answer an accepted create and let its tasks run, whether or not the client is still there."""
        answered = asyncio.Event()
        early = faults.find(job.given, faults.EarlyCallback) is not None
        generation = None if self.manual else self._begin(job, answered)
        try:
            if early or answer.ending == "hang":
                answered.set()
            if early and generation is not None:
                await asyncio.wait({generation})
            await self._released.wait()
            return await write(request, answer, self._stopped)
        finally:
            answered.set()

    async def _status(self, kind: Kind, request: web.Request) -> web.StreamResponse:
        task_id = request.match_info["task_id"]
        answer = self._status_answer(kind, task_id) if self._is_authorised(request) else _INVALID_TOKEN
        self.ledger.gets.append(GetRecord(task_id, answer.status or 0))
        return await write(request, answer, self._stopped)

    def _status_answer(self, kind: Kind, task_id: str) -> Answer:
        task = self._desk.tasks.get(task_id)
        if task is None or task.job.kind is not kind or faults.find(task.job.given, faults.NoStatusEndpoint):
            return envelope(TASK_NOT_FOUND, "Task not found", status=404)
        fault = faults.find(task.job.given, faults.StatusFault)
        task.gets += 1
        if fault is not None and task.gets <= len(fault.codes):
            code = fault.codes[task.gets - 1]
            return envelope(code, "Simulated status", status=code)
        return envelope(0, "ok", data=status_data(task, self.origin))

    async def _media(self, request: web.Request) -> web.StreamResponse:
        task_id, _, suffix = request.match_info["name"].rpartition(".")
        task = self._desk.tasks.get(task_id)
        found = None
        if task is not None and task.status == "SUCCEEDED":
            found = media.sample(suffix, portrait=is_portrait(task.job.body))
        response = await not_found(request) if found is None else media.serve(request, found)
        self.ledger.media.append(MediaRecord(request.path, headers_of(request), response.status))
        return response

    # --- the generation ---

    def _begin(self, job: Job, answered: asyncio.Event) -> asyncio.Task[None]:
        generation = asyncio.create_task(self._generate(job, answered))
        self._generations.add(generation)
        generation.add_done_callback(self._ended)
        return generation

    def _ended(self, generation: asyncio.Task[None]) -> None:
        self._generations.discard(generation)
        self.ledger.happened()

    async def _generate(self, job: Job, answered: asyncio.Event) -> None:
        """The automatic life of a job: work, progress where asked for, the end of all tasks, callbacks."""
        await answered.wait()
        latency = faults.find(job.given, faults.Latency)
        seconds = self.latency if latency is None else latency.seconds
        if seconds > 0:
            self._desk.run(job)
            await asyncio.sleep(seconds)
        if faults.find(job.given, faults.ProgressCallback):
            self._desk.run(job)
            for task in job.tasks:
                await self._sender.tell(task, task.status)
        self._desk.end(job)
        await self._sender.tell_ends(job)

    def _is_authorised(self, request: web.Request) -> bool:
        return request.headers.get("Authorization") == f"Bearer {self.api_key}"


def _checked(given: tuple[Fault, ...]) -> tuple[Fault, ...]:
    """`faults.hang` for `faults.hang()` would go unnoticed otherwise."""
    for fault in given:
        if not isinstance(fault, Fault):
            raise TypeError(f"not a fault: {fault!r}")
    return given


def _names(given: tuple[Fault, ...]) -> tuple[str, ...]:
    return tuple(fault.name for fault in given)
