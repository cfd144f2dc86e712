"""The parts of a client, put together: who knows whom, what starts first, what stops last."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
from attrs import field, frozen
from yarl import URL

from xiling_async._internal.clock import Clock
from xiling_async._internal.tasks import Tasks, finish
from xiling_async.api.calls import Calls
from xiling_async.api.transport import Transport
from xiling_async.errors import ClientClosed, ConfigurationError
from xiling_async.jobs.auto_save import AutoSave, SaveOptions
from xiling_async.jobs.callbacks import CallbackApplier
from xiling_async.jobs.context import Context
from xiling_async.jobs.exchange import Exchange
from xiling_async.jobs.job import JobContext
from xiling_async.jobs.poller import Poller
from xiling_async.jobs.registry import Registry
from xiling_async.jobs.submission import Submission
from xiling_async.media.downloads import Downloads
from xiling_async.media.http import MediaTransport
from xiling_async.media.uploads import Uploads
from xiling_async.models.record import JobRecord, Outcome
from xiling_async.models.request import Kind
from xiling_async.models.settings import Limits, Polling, Timeouts
from xiling_async.stores.base import Store
from xiling_async.telemetry.events import Hook
from xiling_async.telemetry.stats import Monitor, Stats
from xiling_async.webhooks.receiver import WebhookReceiver
from xiling_async.webhooks.tokens import SECRET_BYTES

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
    clock: Clock


@frozen
class KnownResults:
    """What the service and the store know of a task whose files are downloaded."""

    poller: Poller
    store: Store

    async def outcome(self, kind: Kind[Any], task_id: str) -> Outcome | None:
        """One status GET."""
        return await self.poller.outcome(kind, task_id)

    async def ended_at(self, task_id: str) -> float | None:
        """When the result of this task was known, as far as the store knows."""
        record = await self.store.by_task(task_id)
        return record.changed_at if record is not None and record.state.is_final else None


class Engine:
    """Every part of one client, made of its settings; nothing runs before `open`."""

    def __init__(self, given: Settings) -> None:
        self._given = given
        self._transport = Transport(
            given.base_url,
            given.api_key,
            timeouts=given.timeouts,
            clock=given.clock,
            headers=given.headers,
            session=given.session,
        )
        dice = random.Random()  # noqa: S311 - spreads requests over time
        self._monitor = monitor = Monitor(given.on_event)
        self._calls = calls = Calls(self._transport, given.api_key, clock=given.clock, limits=given.limits, dice=dice)
        context = Context(
            clock=given.clock,
            limits=given.limits,
            timeouts=given.timeouts,
            polling=given.polling,
            dice=dice,
            monitor=monitor,
        )
        self.registry = registry = Registry(given.store, on_change=self._changed, monitor=monitor, clock=given.clock)
        self.poller = poller = Poller(
            context, store=given.store, registry=registry, calls=calls, has_receiver=given.receiver is not None
        )
        self.uploads = Uploads(calls, given.clock, monitor=monitor)
        exchange = Exchange(context, registry=registry, calls=calls, poller=poller, receiver=given.receiver)
        self.submission = Submission(context, registry=registry, calls=calls, uploads=self.uploads, exchange=exchange)
        self.downloads = self._downloads()
        self._auto_save = None if given.save_to is None else self._auto_save_to(given.save_to)
        self.job_context = JobContext(
            registry=self.registry, clock=given.clock, timeouts=given.timeouts, ask=self.poller.ask,
            auto_save=self._auto_save,
        )  # fmt: skip
        self.maps = Tasks()  # of `Client.map`
        self._undo = AsyncExitStack()

    async def open(self) -> None:
        """Start everything, or leave nothing running."""
        given = self._given
        async with AsyncExitStack() as undo:
            await given.store.open()  # a store that refuses, since another client has it, is not ours to close
            undo.push_async_callback(given.store.close)
            undo.push_async_callback(self._transport.close)
            self._transport.open()
            undo.push_async_callback(self.registry.close)
            given.store.listen(self.registry)
            unfinished = await given.store.recover_orphans(
                given.clock.time(), doubt_s=given.timeouts.uncertain, per_second=given.limits.gets_per_second
            )
            self._monitor.found(unfinished)
            if unfinished:
                log.info("the store has %d unfinished jobs of earlier clients", unfinished)
            undo.push_async_callback(self.downloads.close)
            if self._auto_save is not None:  # closed when nothing can bring a result any more, and before the registry
                undo.push_async_callback(self._auto_save.close)
                await self._auto_save.start()
            if given.receiver is not None:  # before the poller: a callback is cheaper than a GET
                await self._start(given.receiver)
                undo.push_async_callback(given.receiver.stop)
            undo.push_async_callback(self.poller.close)
            self.poller.start()
            undo.push_async_callback(self.submission.close)
            undo.push_async_callback(self.uploads.close)
            undo.push_async_callback(self.maps.cancel)
            self._undo = undo.pop_all()

    def _downloads(self) -> Downloads:
        given = self._given
        transport = MediaTransport(timeouts=given.timeouts, clock=given.clock, limits=given.limits)
        return Downloads(transport, KnownResults(self.poller, given.store), monitor=self._monitor)

    def _auto_save_to(self, folder: Path) -> AutoSave:
        given = self._given
        options = SaveOptions(
            folder, allow_private=given.allow_private, limits=given.limits, stall_s=given.timeouts.stall
        )
        return AutoSave(options, store=given.store, registry=self.registry, downloads=self.downloads, clock=given.clock)

    def _changed(self, record: JobRecord) -> None:
        self.poller.changed(record)
        if self._auto_save is not None:
            self._auto_save.changed(record)

    def stats(self) -> Stats:
        in_flight = {
            "submits": self.submission.in_flight,
            "uploads": self.uploads.in_flight,
            "downloads": self.downloads.in_flight,
        }
        unsaved = 0 if self._auto_save is None else self._auto_save.outstanding
        return self._monitor.stats(in_flight, self._calls.closed_until, unsaved)

    async def close(self) -> None:
        """Stop everything, the last started first: no new submits, then no receiver, then no store."""
        await self._undo.aclose()

    async def _start(self, receiver: WebhookReceiver) -> None:
        intake = CallbackApplier(
            registry=self.registry,
            clock=self._given.clock,
            first_due=self.poller.first_due,
            on_callback=self.poller.heard_callback,
            only_wakes=receiver.trust == "status",
            monitor=self._monitor,
        )
        kept_secret = await self._given.store.secret(os.urandom(SECRET_BYTES))
        await receiver.start(intake, self._given.clock, kept_secret, others_may_listen=self._given.store.is_shared)
        self.registry.keyed_ids = receiver


class Opening:
    """Opens an engine and closes it: once, in one event loop, however often and by however many tasks it is asked.

    Either is brought to its end when its caller is cancelled, and then leaves nothing open.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
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
                await finish(self._engine.open(), name="xiling open")
            except asyncio.CancelledError:
                await finish(self._engine.close(), name="xiling close")  # it may have come too late to stop anything
                raise
            self.is_open = True

    async def close(self) -> None:
        self._check_loop()
        self.is_open = False
        async with self._changes:
            await finish(self._engine.close(), name="xiling close")

    def check(self) -> None:
        """Raises `ClientClosed` when it is not open, `ConfigurationError` in another event loop."""
        self._check_loop()
        if not self.is_open:
            raise ClientClosed("The client is not open: use it inside `async with Client(...)`. Nothing was sent.")

    def _check_loop(self) -> None:
        if self._loop not in (None, asyncio.get_running_loop()):
            raise ConfigurationError("This client belongs to another event loop. Nothing was sent: make one per loop.")
