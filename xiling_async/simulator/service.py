"""The simulated service: the aiohttp application, and the object that tests and `xiling simulate` use."""

import asyncio
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Self

import attrs
from aiohttp import web
from yarl import URL

from xiling_async.simulator import answers, faults
from xiling_async.simulator.answers import Answer
from xiling_async.simulator.callbacks import Generations
from xiling_async.simulator.creates import Creates, Decision
from xiling_async.simulator.kinds import KINDS
from xiling_async.simulator.kinds.base import Kind
from xiling_async.simulator.ledger import GetRecord, Ledger, MediaRecord, PostRecord
from xiling_async.simulator.media.delivery import MediaEntry, deliver
from xiling_async.simulator.media.storage import Storage
from xiling_async.simulator.media.uploads import Uploads
from xiling_async.simulator.scripts import Fault, Scripts, find, names
from xiling_async.simulator.tasks import Job, Task

# How long a client that stalls in the middle of its request can delay the shutdown.
SHUTDOWN_TIMEOUT_S = 0.05


class Simulator:
    """The service on a real socket, inside an `async with`.

    Args:
        api_key: the only bearer token it accepts.
        host: the address to listen on.
        port: the port to listen on; 0 takes a free one.
        latency: seconds a generation takes; 0 ends it as soon as the create is answered.
        seed: of the task ids; the same seed makes the same ids.
        manual: tasks wait for `finish`, `progress` and `set_result` instead of ending by themselves.

    """

    lenient = False  # True: creates are accepted without parameter checks
    callback_timeout = 10.0  # seconds a receiver has to answer a callback; set it before the simulator starts

    def __init__(
        self,
        api_key: str = "sim-key",
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        latency: float = 0.0,
        seed: int = 0,
        manual: bool = False,
    ) -> None:
        self.api_key = api_key
        self.host = host
        self.port = port
        self.latency = latency
        self.manual = manual
        self.ledger = Ledger()
        self._scripts = Scripts("creates")
        self._storage = Storage()
        self._creates = Creates(self.ledger, self._storage, seed)
        self._uploads = Uploads(self.ledger, self._storage, seed)
        self._create_count = 0
        self._media_count = 0
        self._released = asyncio.Event()
        self._released.set()
        self._stopped = asyncio.Event()
        self._exit_stack = AsyncExitStack()

    # --- start and stop ---

    async def __aenter__(self) -> Self:
        app = web.Application()
        app[answers.STOPPED] = self._stopped
        self._add_routes(app)
        # handler_cancellation: a create that hangs ends when its client disconnects.
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=SHUTDOWN_TIMEOUT_S)
        await runner.setup()
        try:
            await web.TCPSite(runner, self.host, self.port).start()
        except BaseException:
            await runner.cleanup()
            raise
        self.port = int(runner.addresses[0][1])
        self._storage.origin = self.origin
        self._generations = Generations(self._creates, self.ledger, self.origin, self.callback_timeout)
        # In reverse order: jobs in progress end, the server stops, the jobs that it still began end.
        self._exit_stack.push_async_callback(self._generations.close)
        self._exit_stack.push_async_callback(self._generations.stop)
        self._exit_stack.push_async_callback(runner.cleanup)
        self._exit_stack.push_async_callback(self._generations.stop)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._released.set()
        await self._exit_stack.aclose()

    def __repr__(self) -> str:
        posts, tasks = len(self.ledger.posts), len(self.ledger.tasks)
        return f"<Simulator {self.base_url} posts={posts} tasks={tasks}>"

    @property
    def origin(self) -> str:
        """Scheme, host and port."""
        return str(URL.build(scheme="http", host=self.host, port=self.port))

    @property
    def base_url(self) -> str:
        """The base URL for clients."""
        return f"{self.origin}/v1"

    # --- scripts and tasks ---

    def script(self, *script: Fault) -> None:
        """Set the faults of the next create without a script; without arguments it has none."""
        self._scripts.add(script)

    def default(self, *script: Fault) -> None:
        """Set the faults of all creates without a script."""
        self._scripts.set_default(script)

    def media_default(self, *script: Fault) -> None:
        """Set the faults of the result files of all creates without a media fault."""
        self._storage.scripts.set_default(script)

    def script_upload(self, *script: Fault) -> None:
        """Set the faults of the next upload without a script; without arguments it has none."""
        self._uploads.scripts.add(script)

    def default_upload(self, *script: Fault) -> None:
        """Set the faults of all uploads without a script."""
        self._uploads.scripts.set_default(script)

    async def finish(self, task_id: str, status: str = "SUCCEEDED", *, message: str | None = None) -> int | None:
        """End a task and call back; the receiver's HTTP status, None if it did not answer or nothing was sent."""
        self.set_result(task_id, status=status, message=message)
        return await self._generations.report_end(self._task(task_id))

    async def progress(self, task_id: str) -> int | None:
        """Move a task to its running status and call back; returns as `finish`."""
        task = self._task(task_id)
        self._creates.set_status(task, task.job.kind.running_status)
        return await self._generations.report(task, task.status)

    async def callback(self, task_id: str) -> int | None:
        """Send one callback for the current status of a task, even if a fault loses its callbacks."""
        task = self._task(task_id)
        return await self._generations.send(task, task.status)

    def set_result(self, task_id: str, status: str = "SUCCEEDED", *, message: str | None = None) -> None:
        """Move a task to this status without a callback: for clients that poll."""
        task = self._task(task_id)
        default = task.scripted_end()[1] or "Generation failed" if status == "FAILED" else ""
        self._creates.set_status(task, status, default if message is None else message)

    def _task(self, task_id: str) -> Task:
        return self._storage.tasks[task_id]

    def hold_answers(self) -> None:
        """Accepted creates are not answered until `release_answers`."""
        self._released.clear()

    def release_answers(self) -> None:
        """Send the answers that `hold_answers` holds back."""
        self._released.set()

    # --- waiting ---

    async def wait_for_posts(self, n: int) -> None:
        """Wait until n creates were read to their end."""
        await self.ledger.until(lambda: self.ledger.posts_read >= n)

    async def wait_for_callbacks(self, n: int) -> None:
        """Wait until n callbacks were answered or failed."""
        await self.ledger.until(lambda: len(self.ledger.callbacks) >= n)

    async def wait_for_uploads(self, n: int) -> None:
        """Wait until n uploads are in the ledger."""
        await self.ledger.until(lambda: len(self.ledger.uploads) >= n)

    async def wait_for_media(self, n: int) -> None:
        """Wait until n requests for result files have ended, with any result."""
        await self.ledger.until(lambda: len(self.ledger.media) >= n)

    async def wait_for_stalls(self, n: int) -> None:
        """Wait until n result files have stalled because of a fault."""
        await self.ledger.until(lambda: self.ledger.stalls >= n)

    async def settled(self) -> None:
        """Wait until every accepted create was answered, or hangs, and was called back."""
        await self.ledger.until(lambda: not self._generations.running)

    # --- the endpoints ---

    def _add_routes(self, app: web.Application) -> None:
        for kind in KINDS:
            app.router.add_post(f"/v1/{kind.path}", partial(self._create, kind))
            app.router.add_get(f"/v1/{kind.path}/{{task_id}}", partial(self._status, kind))
        app.router.add_post("/v1/figure-resource/upload/file", self._upload)
        app.router.add_get("/uploads/{name}", self._uploads.download)
        app.router.add_get("/media/{name}", self._media)
        app.router.add_route("*", "/{rest:.*}", answers.not_found)

    async def _create(self, kind: Kind, request: web.Request) -> web.StreamResponse:
        self._create_count += 1
        authorised = self._is_authorised(request)
        script = self._scripts.next() if authorised else ()
        headers = answers.headers_of(request)
        record = PostRecord(number=self._create_count, headers=headers, read=False, faults=names(script))
        if find(script, faults.drop_before_read):
            self.ledger.post(record)
            return answers.cut(request)
        try:
            raw = await request.read()
        except web.HTTPRequestEntityTooLarge:
            self.ledger.post(attrs.evolve(record, status=413))
            return await answers.send(request, answers.invalid_parameters("the body is too large", status=413))
        except BaseException:  # the client disconnected in the middle of the body
            self.ledger.post(record)
            raise
        if authorised:
            decision = self._creates.decide(kind, raw, script, lenient=self.lenient)
        else:
            decision = Decision(answers.unauthorised())
        self._record(record, decision)
        if decision.job is None:
            return await answers.send(request, decision.answer)
        return await self._accept(request, decision.answer, decision.job)

    def _record(self, record: PostRecord, decision: Decision) -> None:
        """From here on the create is charged, even if the connection is lost."""
        url = (decision.body or {}).get("callback_url")
        self.ledger.post(
            attrs.evolve(
                record,
                read=True,
                status=decision.answer.status,
                body=decision.body,
                faults=names(decision.script),
                callback_url=url if isinstance(url, str) else None,
                paid=decision.job is not None,
                task_ids=tuple(task.id for task in decision.job.tasks) if decision.job else (),
            )
        )

    async def _accept(self, request: web.Request, answer: Answer, job: Job) -> web.StreamResponse:
        """Answer an accepted create and start its tasks, even if the client has disconnected."""
        answered = asyncio.Event()
        early = job.fault(faults.early_callback) is not None
        generation = None if self.manual else self._generations.begin(job, answered, self.latency)
        try:
            if early or answer.ending == "hang":
                answered.set()
            if early and generation is not None:
                await asyncio.wait({generation})
            await self._released.wait()
            return await answers.send(request, answer)
        finally:
            answered.set()

    async def _status(self, kind: Kind, request: web.Request) -> web.StreamResponse:
        task_id = request.match_info["task_id"]
        authorised = self._is_authorised(request)
        answer = self._creates.status_answer(kind, task_id) if authorised else answers.unauthorised()
        self.ledger.get(GetRecord(task_id, answer.status or 0))
        return await answers.send(request, answer)

    async def _upload(self, request: web.Request) -> web.StreamResponse:
        return await self._uploads.upload(request, authorised=self._is_authorised(request))

    async def _media(self, request: web.Request) -> web.StreamResponse:
        self._media_count += 1
        answer = self._storage.answer(request)
        record = MediaRecord(
            number=self._media_count,
            path=request.path,
            query=request.query_string,
            headers=answers.headers_of(request),
            status=answer.status or 0,
        )
        entry = MediaEntry(self.ledger, record)
        if not isinstance(answer, Answer):
            return await deliver(request, answer, entry)
        entry.write(len(answer.body))
        return await answers.send(request, answer)

    def _is_authorised(self, request: web.Request) -> bool:
        return request.headers.get("Authorization") == f"Bearer {self.api_key}"
