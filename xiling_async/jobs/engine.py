"""The parts of a client, put together: who knows whom, what starts first, what stops last."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar, cast

import aiohttp
from attrs import field, frozen
from yarl import URL

from xiling_async._internal.clock import Clock
from xiling_async._internal.tasks import Tasks, finish
from xiling_async.api.calls import Calls
from xiling_async.api.transport import Transport
from xiling_async.errors import ClientClosed, ConfigurationError, InvalidRequest
from xiling_async.jobs.auto_save import AutoSave, SaveOptions
from xiling_async.jobs.callbacks import CallbackApplier
from xiling_async.jobs.consumer import Consumers
from xiling_async.jobs.exchange import Exchange, Order
from xiling_async.jobs.job import Job, JobContext, not_sent_in_time
from xiling_async.jobs.poller import Poller, PollSchedule
from xiling_async.jobs.registry import Registry
from xiling_async.jobs.submission import Submission
from xiling_async.media.downloads import Downloads
from xiling_async.media.http import MediaTransport
from xiling_async.media.uploads import Uploads
from xiling_async.models.metadata import checked_metadata
from xiling_async.models.record import JobRecord, State
from xiling_async.models.request import Request, check_name
from xiling_async.models.retry import retry_key, retry_request
from xiling_async.models.settings import Limits, Polling, Timeouts
from xiling_async.stores.base import Store
from xiling_async.telemetry.events import Hook
from xiling_async.telemetry.stats import Monitor, Stats
from xiling_async.webhooks.receiver import WebhookReceiver
from xiling_async.webhooks.tokens import SECRET_BYTES

R = TypeVar("R")

log = logging.getLogger("xiling_async.jobs.engine")


@frozen(kw_only=True)
class Settings:
    """What the user said, checked."""

    api_key: str = field(repr=False)
    base_url: URL
    receiver: WebhookReceiver | None
    store: Store
    session: aiohttp.ClientSession | None
    limits: Limits
    timeouts: Timeouts
    polling: Polling
    headers: Mapping[str, str] = field(repr=False)
    save_to: Path | None
    allow_private: bool
    on_event: tuple[Hook, ...]
    raises_uncertain: bool
    clock: Clock


class Engine:
    """Every part of one client, made of its settings; nothing runs before `open`.

    It is opened and closed once, in one event loop, however often and by however many tasks it is asked. Either runs to
    its end when its caller is cancelled, and then leaves nothing open.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        clock, limits, timeouts, store = settings.clock, settings.limits, settings.timeouts, settings.store
        self._transport = Transport(
            settings.base_url,
            settings.api_key,
            timeouts=timeouts,
            clock=clock,
            headers=settings.headers,
            session=settings.session,
        )
        rng = random.Random()  # noqa: S311 - spreads requests over time
        has_receiver = settings.receiver is not None
        self._monitor = monitor = Monitor(settings.on_event)
        self._calls = calls = Calls(self._transport, settings.api_key, clock=clock, limits=limits, rng=rng)
        self._schedule = schedule = PollSchedule(clock, settings.polling, rng, has_receiver=has_receiver)
        self.registry = registry = Registry(store, monitor=monitor, clock=clock)
        self.poller = Poller(schedule, store=store, registry=registry, calls=calls, limits=limits, monitor=monitor)
        self.uploads = Uploads(calls, clock, monitor=monitor)
        exchange = Exchange(
            schedule,
            registry=registry,
            calls=calls,
            receiver=settings.receiver,
            timeouts=timeouts,
            monitor=monitor,
        )
        self.submission = Submission(exchange, registry=registry, calls=calls, uploads=self.uploads, limits=limits)
        media = MediaTransport(timeouts=timeouts, clock=clock, limits=limits)
        self.downloads = Downloads(media, self.poller, monitor=monitor)
        self._auto_save = None if settings.save_to is None else self._auto_save_to(settings.save_to)
        self.consumers = Consumers(registry, store=store, clock=clock, monitor=monitor)
        registry.observers = [self.poller, self.consumers, *([] if self._auto_save is None else [self._auto_save])]
        self.job_context = JobContext(
            registry=registry,
            clock=clock,
            timeouts=timeouts,
            poller=self.poller,
            consumers=self.consumers,
            auto_save=self._auto_save,
        )
        self.maps = Tasks()  # of `Client.map`
        self._undo = AsyncExitStack()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_entered = False
        self._changes = asyncio.Lock()  # the second caller waits for the first
        self.is_open = False

    def enter(self) -> None:
        """Raises `ConfigurationError` for a second `async with`: the inner one would close what the outer one uses."""
        if self._is_entered:
            raise ConfigurationError("A client is entered once: make a new one for each `async with`.")
        self._is_entered = True

    async def open(self) -> None:
        self._check_loop()
        async with self._changes:
            if self.is_open:
                return
            if self._loop is not None:
                raise ConfigurationError("A client is opened once: make a new one after it was closed.")
            self._loop = asyncio.get_running_loop()
            try:
                await finish(self._start(), name="xiling open")
            except asyncio.CancelledError:  # it may have come too late to stop anything
                await finish(self._undo.aclose(), name="xiling close")
                raise
            self.is_open = True

    async def close(self) -> None:
        """Stop everything, the last started first: no new submits, then no receiver, then no store."""
        self._check_loop()
        self.is_open = False
        async with self._changes:
            await finish(self._undo.aclose(), name="xiling close")

    def check_open(self) -> None:
        """Raises `ClientClosed` when it is not open, `ConfigurationError` in another event loop."""
        self._check_loop()
        if not self.is_open:
            raise ClientClosed("The client is not open: use it inside `async with Client(...)`. Nothing was sent.")

    def _check_loop(self) -> None:
        if self._loop not in (None, asyncio.get_running_loop()):
            raise ConfigurationError("This client belongs to another event loop. Nothing was sent: make one per loop.")

    def job_of(self, record: JobRecord) -> Job[Any]:
        """The handle on a job that the store has."""
        return Job(self.registry.entry_of(record), self.job_context)

    async def submit(self, order: Order) -> Job[Any]:
        """Buy the job of this order, or find the one of its key. Raises what `Client.submit` raises."""
        self.check_open()
        request: object = order.request
        if not isinstance(request, Request):
            raise InvalidRequest(f"submit takes a request such as ImageToVideo(...), not {type(request).__name__}.")
        if order.key is not None:
            check_name("key", order.key)
        purchase = await self.submission.submit(order)
        job: Job[Any] = Job(purchase.entry, self.job_context)
        answer_error = purchase.answer_error
        if job.state in (State.UNCERTAIN, State.UNKNOWN) and self._settings.raises_uncertain:
            raise cast("Exception", job.error) from answer_error
        if answer_error is not None and answer_error.task_ids:  # bought, with too many or too few ids
            answer_error.job = job
            raise answer_error
        return job

    async def run(self, order: Order, limit_s: float) -> Any:
        """As `Client.run`: the one result, after at most so many seconds."""
        self.check_open()
        if isinstance(order.request, Request) and order.request.task_count != 1:
            raise InvalidRequest(
                f"run gives exactly one result, this request asks for {order.request.task_count}. Nothing was sent: "
                "use `await (await client.submit(request))`."
            )
        clock = self._settings.clock
        began_at = clock.time()
        try:
            async with clock.timeout(limit_s):
                job = await self.submit(order)
        except TimeoutError:
            if order.entry is None:
                raise not_sent_in_time(order.key, limit_s) from None
            raise Job[Any](order.entry, self.job_context).timed_out(limit_s) from None
        (result,) = await job.result(limit_s - (clock.time() - began_at))
        return result

    async def retry(
        self, job: Job[R], *, metadata: Mapping[str, str] | None = None, wanted: asyncio.Event | None = None
    ) -> Job[R]:
        """As `Client.retry`. `wanted`: as of an `Order`."""
        self.check_open()
        entry = await self.registry.find(job.id) if isinstance(job, Job) else None
        if entry is None:
            raise InvalidRequest("retry takes a job that the store of this client knows. Nothing was sent.")
        record = (await self.registry.up_to_date(entry)).record
        order = Order(
            request=retry_request(record),
            key=retry_key(record),
            metadata=record.metadata if metadata is None else checked_metadata(metadata),
            retry_of=record.id,
            wanted=wanted,
        )
        return await self.submit(order)

    async def _start(self) -> None:
        """Start everything, or leave nothing running."""
        settings = self._settings
        async with AsyncExitStack() as undo:
            await settings.store.open()  # a store that refuses, since another client has it, is not ours to close
            undo.push_async_callback(settings.store.close)
            undo.push_async_callback(self._transport.close)
            self._transport.open()
            undo.push_async_callback(self.registry.close)
            settings.store.listen(self.registry)
            unfinished = await settings.store.recover_orphans(
                settings.clock.time(), doubt_s=settings.timeouts.uncertain, per_second=settings.limits.gets_per_second
            )
            self._monitor.found(unfinished)
            if unfinished:
                log.info("the store has %d unfinished jobs of earlier clients", unfinished)
            undo.push_async_callback(self.downloads.close)
            if self._auto_save is not None:  # closed when nothing can bring a result any more, and before the registry
                undo.push_async_callback(self._auto_save.close)
                await self._auto_save.start()
            if settings.receiver is not None:  # before the poller: a callback is cheaper than a GET
                await self._start_receiver(settings.receiver)
                undo.push_async_callback(settings.receiver.stop)
            undo.push_async_callback(self.poller.close)
            self.poller.start()
            undo.push_async_callback(self.submission.close)
            undo.push_async_callback(self.uploads.close)
            undo.push_async_callback(self.maps.cancel)
            undo.callback(self.consumers.close)
            self._undo = undo.pop_all()

    def _auto_save_to(self, folder: Path) -> AutoSave:
        settings = self._settings
        options = SaveOptions(
            folder, allow_private=settings.allow_private, limits=settings.limits, stall_s=settings.timeouts.stall
        )
        return AutoSave(
            options, store=settings.store, registry=self.registry, downloads=self.downloads, clock=settings.clock
        )

    def stats(self) -> Stats:
        in_flight = {
            "submits": self.submission.in_flight,
            "uploads": self.uploads.in_flight,
            "downloads": self.downloads.in_flight,
        }
        unsaved = 0 if self._auto_save is None else self._auto_save.outstanding
        return self._monitor.stats(in_flight, self._calls.paused_until, unsaved)

    async def _start_receiver(self, receiver: WebhookReceiver) -> None:
        callbacks = CallbackApplier(
            registry=self.registry,
            schedule=self._schedule,
            only_wakes=receiver.trust == "status",
            monitor=self._monitor,
        )
        store = self._settings.store
        secret = await store.secret(os.urandom(SECRET_BYTES))
        await receiver.start(callbacks, self._settings.clock, secret, others_may_listen=store.is_shared)
        self.registry.keyed_ids = receiver
