"""The service itself: the aiohttp application that sells tasks, and the handle that tests and people hold."""

import asyncio
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Self

import attrs
from aiohttp import web
from yarl import URL

from xiling_async.simulator import faults
from xiling_async.simulator.answers import Answer, cut, headers_of, not_found, parameter_error, unauthorised, write
from xiling_async.simulator.callbacks import CallbackSender, Generations
from xiling_async.simulator.creates import Creates, Decision, Job
from xiling_async.simulator.fault import Fault, checked, names
from xiling_async.simulator.ledger import GetRecord, Ledger, MediaRecord, PostRecord
from xiling_async.simulator.media.delivery import Note, deliver
from xiling_async.simulator.media.faults import MediaFault
from xiling_async.simulator.media.storage import Storage
from xiling_async.simulator.media.uploads import Uploads
from xiling_async.simulator.parameters import KINDS, Kind

# How long a client that stalls in the middle of its request can delay the end.
SHUTDOWN_TIMEOUT_S = 0.05
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
        self._creates = Creates(self.ledger, seed, self._is_dangling)
        self._uploads = Uploads(self.ledger, seed)
        self._storage = Storage(self._creates.tasks)
        self._arrived = 0
        self._media_asked = 0
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
        self._generations = Generations(self._creates, self._sender, self.ledger)
        # Last in, first out: callers that wait are let go, the server ends, and with it what it still began.
        self._opened.push_async_callback(self._sender.close)
        self._opened.push_async_callback(self._generations.stop)
        self._opened.push_async_callback(runner.cleanup)
        self._opened.push_async_callback(self._generations.stop)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._released.set()
        await self._opened.aclose()

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
        self._creates.script(checked(given, "creates", _is_of_creates))

    def default(self, *given: Fault) -> None:
        """The faults of every create that has no script of its own."""
        self._creates.default = checked(given, "creates", _is_of_creates)

    def media_default(self, *given: Fault) -> None:
        """The faults of the result files of every create that was given no media fault of its own."""
        self._storage.default = checked(given, "media", lambda fault: isinstance(fault, MediaFault))

    def script_upload(self, *given: Fault) -> None:
        """The faults of the next upload without a script; none makes it a plain one."""
        self._uploads.script(given)

    def default_upload(self, *given: Fault) -> None:
        """The faults of every upload that has no script of its own."""
        self._uploads.by_default(given)

    async def finish(self, task_id: str, status: str = "SUCCEEDED", *, message: str | None = None) -> int | None:
        """End a task and call back; the receiver's answer, None when it gave none or nothing was sent."""
        self.set_result(task_id, status=status, message=message)
        return await self._sender.tell_end(self._creates.tasks[task_id])

    async def progress(self, task_id: str) -> int | None:
        """Move a task to its running status and call that back; the receiver's answer as in `finish`."""
        task = self._creates.tasks[task_id]
        self._creates.move(task, task.job.kind.running)
        return await self._sender.tell(task, task.status)

    async def callback(self, task_id: str) -> int | None:
        """Send the callback for the current status of a task once more, also one that faults lose."""
        task = self._creates.tasks[task_id]
        return await self._sender.send(task, task.status)

    def set_result(self, task_id: str, status: str = "SUCCEEDED", *, message: str | None = None) -> None:
        """Move a task to this status without a callback: for clients that poll."""
        task = self._creates.tasks[task_id]
        fallback = task.intended_end()[1] or "Generation failed" if status == "FAILED" else ""
        self._creates.move(task, status, fallback if message is None else message)

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
        """Wait until n callbacks were answered, or found no receiver."""
        await self.ledger.until(lambda: len(self.ledger.callbacks) >= n)

    async def wait_for_uploads(self, n: int) -> None:
        """Wait until the fate of n uploads was decided."""
        await self.ledger.until(lambda: len(self.ledger.uploads) >= n)

    async def wait_for_media(self, n: int) -> None:
        """Wait until n requests for result files were answered to their end, however that was."""
        await self.ledger.until(lambda: len(self.ledger.media) >= n)

    async def wait_for_stalls(self, n: int) -> None:
        """Wait until n result files stood still in the middle, as asked."""
        await self.ledger.until(lambda: self.ledger.stalls >= n)

    async def settled(self) -> None:
        """Wait until every accepted create was answered or let hang, and called back."""
        await self.ledger.until(lambda: not self._generations.running)

    # --- the endpoints ---

    def _add_routes(self, app: web.Application) -> None:
        for kind in KINDS:
            app.router.add_post(f"/v1/{kind.path}", partial(self._create, kind))
            app.router.add_get(f"/v1/{kind.path}/{{task_id}}", partial(self._status, kind))
        app.router.add_post("/v1/figure-resource/upload/file", self._upload)
        app.router.add_get("/uploads/{name}", self._uploads.serve)
        app.router.add_get("/media/{name}", self._media)
        app.router.add_route("*", "/{rest:.*}", not_found)

    async def _create(self, kind: Kind, request: web.Request) -> web.StreamResponse:
        self._arrived += 1
        record = PostRecord(number=self._arrived, headers=headers_of(request), read=False)
        known = self._is_authorised(request)
        scripted = self._creates.next_script() if known else ()
        record = attrs.evolve(record, faults=names(scripted))
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
        decision = (
            self._creates.decide(kind, raw, scripted, lenient=self.lenient) if known else Decision(unauthorised())
        )
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
                faults=names(decision.given),
                callback_url=url if isinstance(url, str) else None,
                paid=decision.job is not None,
                task_ids=tuple(task.id for task in decision.job.tasks) if decision.job else (),
            )
        )

    async def _sell(self, request: web.Request, answer: Answer, job: Job) -> web.StreamResponse:
        """Answer an accepted create and let its tasks run, whether or not the client is still there."""
        answered = asyncio.Event()
        early = faults.find(job.given, faults.EarlyCallback) is not None
        generation = None if self.manual else self._generations.begin(job, answered, self.latency)
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
        known = self._is_authorised(request)
        answer = self._creates.status_answer(kind, task_id, self.origin) if known else unauthorised()
        self.ledger.get(GetRecord(task_id, answer.status or 0))
        return await write(request, answer, self._stopped)

    async def _upload(self, request: web.Request) -> web.StreamResponse:
        return await self._uploads.take(request, self.origin, self._stopped, known=self._is_authorised(request))

    async def _media(self, request: web.Request) -> web.StreamResponse:
        self._media_asked += 1
        found = self._storage.decide(request)
        record = MediaRecord(
            number=self._media_asked,
            path=request.path,
            query=request.query_string,
            headers=headers_of(request),
            status=found.status or 0,
        )
        note = Note(self.ledger, record)
        if not isinstance(found, Answer):
            return await deliver(request, found, note, self._stopped)
        note.sent(len(found.body))
        return await write(request, found, self._stopped)

    def _is_dangling(self, url: str) -> bool:
        """Whether this is an address of ours, and there is nothing."""
        at = URL(url)
        if at.origin() != URL(self.origin):
            return False
        match at.path.split("/"):
            case ["", "uploads", name]:
                return not self._uploads.has(name)
            case ["", "media", name]:
                return not self._storage.has(name)
        return True

    def _is_authorised(self, request: web.Request) -> bool:
        return request.headers.get("Authorization") == f"Bearer {self.api_key}"


def _is_of_creates(fault: Fault) -> bool:
    return not isinstance(fault, faults.UploadAnswer)
