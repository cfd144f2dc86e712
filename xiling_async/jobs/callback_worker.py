"""A receiver by itself: it takes callbacks into a store that others share; it buys nothing and asks for nothing.

The store wakes the process that submitted. So submitters may come and go, as long as one of these stands behind their
public URL. It needs no API key; what no callback tells of is asked about by the clients that have one.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

from xiling_async._internal.clock import Clock, SystemClock
from xiling_async.api import retry
from xiling_async.errors import ConfigurationError
from xiling_async.jobs.callbacks import CallbackApplier
from xiling_async.jobs.registry import Registry
from xiling_async.models.request import Kind
from xiling_async.stores.base import Store
from xiling_async.telemetry.events import Hook, hooks_of
from xiling_async.telemetry.stats import Monitor
from xiling_async.webhooks.receiver import WebhookReceiver
from xiling_async.webhooks.tokens import SECRET_BYTES


class CallbackWorker:
    """`async with`: listens, and settles what it hears. `on_event`: as of a `Client`; here come `CallbackTaken`,
    `CallbackRefused` and `JobChanged`.

    Raises `ConfigurationError` for a store that others do not share: no process would ever learn of what it took.
    """

    def __init__(
        self,
        receiver: WebhookReceiver,
        store: Store,
        *,
        on_event: Hook | Sequence[Hook] | None = None,
        clock: Clock | None = None,
    ) -> None:
        if not store.is_shared:
            raise ConfigurationError(
                "A receiver by itself needs a store that the submitters share: a PostgresStore. A SQLite file serves "
                "one process, and memory none but this one."
            )
        if receiver.trust != "callback":
            raise ConfigurationError('A receiver by itself asks for no status: trust must be "callback".')
        self._receiver = receiver
        self._store = store
        self._monitor = Monitor(hooks_of(on_event))
        self._clock = SystemClock() if clock is None else clock
        self._registry = Registry(store, monitor=self._monitor, clock=self._clock)
        self._intake = CallbackApplier(
            registry=self._registry,
            clock=self._clock,
            first_due=self._first_due,
            on_callback=lambda: None,
            only_wakes=False,
            monitor=self._monitor,
        )
        self._undo = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as undo:
            await self._store.open()
            undo.push_async_callback(self._store.close)
            undo.push_async_callback(self._registry.close)
            secret = await self._store.secret(os.urandom(SECRET_BYTES))
            await self._receiver.start(self._intake, self._clock, secret)
            undo.push_async_callback(self._receiver.stop)
            self._undo = undo.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._undo.aclose()

    def _first_due(self, kind: Kind[Any]) -> float:
        """When a client should look at a job that is adopted here."""
        return self._clock.time() + retry.first_ask_s(kind.poll_every_s, None, random.random, has_receiver=True)
