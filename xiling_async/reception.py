"""A receiver by itself: it takes callbacks into a store that others share; it buys nothing and asks for nothing.

Whoever submitted is woken by the store. So submitters may come and go, as long as one of these stands behind their
public URL. It needs no API key; what no callback tells of is asked about by the clients that have one.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

from xiling_async import backoff
from xiling_async.capability import SECRET_BYTES, Claim
from xiling_async.clock import Clock, SystemClock
from xiling_async.errors import ConfigurationError
from xiling_async.intake import Intake
from xiling_async.lifecycle import Verdict
from xiling_async.models import Kind
from xiling_async.receiver import Refused, WebhookReceiver
from xiling_async.registry import Registry
from xiling_async.store.base import Store
from xiling_async.wire import Report

log = logging.getLogger("xiling_async.receiver")

Heard = Callable[[Claim, Report, Verdict], None]


class Reception:
    """`async with`: listens, and settles what it hears. `heard`: is told of each callback once it is written down;
    `refused`: of each that is not taken, by its HTTP status and the id of its job (None: a wrong token).

    Raises `ConfigurationError` for a store that others do not share: nobody would ever hear of what it took.
    """

    def __init__(
        self,
        receiver: WebhookReceiver,
        store: Store,
        *,
        heard: Heard | None = None,
        refused: Refused | None = None,
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
        self._heard = heard
        self._refused = refused
        self._has_complained = False
        self._clock = SystemClock() if clock is None else clock
        self._registry = Registry(store)
        self._intake = Intake(
            registry=self._registry,
            clock=self._clock,
            first_due=self._first_due,
            on_callback=lambda: None,
            only_wakes=False,
        )
        self._undo = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as undo:
            await self._store.open()
            undo.push_async_callback(self._store.close)
            undo.push_async_callback(self._registry.close)
            secret = await self._store.secret(os.urandom(SECRET_BYTES))
            await self._receiver.start(self._settle, self._clock, secret, refused=self._refused)
            undo.push_async_callback(self._receiver.stop)
            self._undo = undo.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._undo.aclose()

    async def _settle(self, claim: Claim, report: Report) -> Verdict:
        verdict = await self._intake.settle(claim, report)
        if self._heard is not None:
            try:
                self._heard(claim, report, verdict)
            except Exception:  # it is written down: the service must not hear 503 since nobody could be told here
                if not self._has_complained:
                    self._has_complained = True
                    log.exception("job %s: `heard` failed; this is logged once, and it is called on", claim.job_id)
        return verdict

    def _first_due(self, kind: Kind[Any]) -> float:
        """When a client should look at a job that is adopted here."""
        return self._clock.time() + backoff.first_ask_s(kind.poll_every_s, None, random.random, has_receiver=True)
