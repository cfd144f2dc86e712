"""What a callback means: it ends its task, adopts its job, or only makes the poller ask.

Also a receiver by itself, `CallbackWorker`: submitters may come and go, as long as one runs behind their public URL.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import AsyncExitStack
from random import Random
from types import TracebackType
from typing import Final, Self

from attrs import field, frozen

from xiling_async._internal.clock import Clock, SystemClock
from xiling_async.api.wire import Report
from xiling_async.errors import ConfigurationError
from xiling_async.jobs.poller import PollSchedule
from xiling_async.jobs.registry import Registry
from xiling_async.kinds import BY_NUMBER
from xiling_async.models.lifecycle import OutcomeReported, PollScheduled, Verdict
from xiling_async.models.record import JobRecord
from xiling_async.models.request import Kind
from xiling_async.models.settings import Polling
from xiling_async.stores.base import Store
from xiling_async.telemetry.events import REFUSAL_REASONS, CallbackRefused, CallbackTaken, Hook, hooks_of
from xiling_async.telemetry.stats import UNWATCHED, Monitor
from xiling_async.webhooks.receiver import WebhookReceiver
from xiling_async.webhooks.tokens import SECRET_BYTES, CallbackToken

log = logging.getLogger("xiling_async.jobs.callbacks")

WAKE_WINDOW_S: Final = 10.0
WAKES: Final = 2  # in a window, of one job


class WakeLimit:
    """When a callback makes the client ask for a job's status: twice in ten seconds at once, so that one callback URL
    does not spend the rate of all jobs."""

    def __init__(self) -> None:
        self._windows: dict[str, tuple[float, int]] = {}  # by job id: since when, how many; the oldest first

    def due_at(self, job_id: str, now: float) -> float:
        """When to ask after a callback that came `now`: it may have to wait, but it is never dropped."""
        while self._windows:
            oldest = next(iter(self._windows))
            if self._windows[oldest][0] > now - WAKE_WINDOW_S:
                break
            del self._windows[oldest]
        began_at, count = self._windows.get(job_id, (now, 0))
        if count == WAKES:
            return began_at + WAKE_WINDOW_S
        self._windows[job_id] = began_at, count + 1
        return now


@frozen(kw_only=True)
class CallbackApplier:
    """Commits what callbacks say. Runs in tasks that are never cancelled.

    `only_wakes`: callbacks are not believed; each makes the poller ask at once (`trust="status"`).
    """

    registry: Registry
    schedule: PollSchedule
    only_wakes: bool
    monitor: Monitor = UNWATCHED
    _wakes: WakeLimit = field(factory=WakeLimit)

    async def apply(self, token: CallbackToken, report: Report) -> Verdict:
        """Commit what the callback says. Raises `StoreError`."""
        began_at = self.schedule.clock.time()
        verdict = await self._applied(token, report, began_at)
        if verdict in (Verdict.APPLIED, Verdict.REPEAT, Verdict.CONFLICT):
            outcome = report.outcome
            self.monitor.emit(CallbackTaken(
                job_id=token.job_id, attempt=token.attempt, task_id=report.task_id, result=verdict.value,
                outcome=None if outcome is None else "succeeded" if outcome.ok else "failed",
                began_at=began_at, at=self.schedule.clock.time(),
            ))  # fmt: skip
        return verdict

    def refused(self, status: int, job_id: str | None) -> None:
        reason = REFUSAL_REASONS.get(status, "other")
        self.monitor.emit(CallbackRefused(reason=reason, status=status, job_id=job_id, at=self.schedule.clock.time()))

    async def _applied(self, token: CallbackToken, report: Report, now: float) -> Verdict:
        kind = BY_NUMBER[token.kind_number]
        event = OutcomeReported(
            attempt=token.attempt,
            at=now,
            task_id=report.task_id,
            outcome=None if self.only_wakes else report.outcome,
            due_at=self.schedule.first_due(kind),
        )
        change = await self.registry.commit(token.job_id, event)
        if change.verdict is Verdict.NO_JOB:
            return await self._adopt(token, kind, report.task_id)
        if change.verdict in (Verdict.APPLIED, Verdict.REPEAT):
            self.schedule.callback_arrived()
            is_believed = not self.only_wakes and not (change.record and change.record.is_adopted)
            if report.outcome is not None and not is_believed:
                due_at = self._wakes.due_at(token.job_id, now)
                await self.registry.commit(token.job_id, PollScheduled(at=now, due_at=due_at))
        return change.verdict

    async def _adopt(self, token: CallbackToken, kind: Kind[object], task_id: str) -> Verdict:
        """The token is ours, the job is not in the store: a restored backup, a lost store, or a job that was purged. It
        was paid for; but anyone who has seen the URL may call it, so only a status GET is believed of it."""
        now = self.schedule.clock.time()
        lost = JobRecord(
            id=token.job_id, kind=kind.name, key=None, request=None, asked=max(1, token.tasks), created_at=now,
            changed_at=now, attempt=token.attempt, is_adopted=True,
        )  # fmt: skip
        event = OutcomeReported(attempt=token.attempt, at=now, task_id=task_id, outcome=None, due_at=now)
        verdict = (await self.registry.adopt(lost, event)).verdict
        log.warning("job %s (task %s) was not in the store: adopted, asking for its status", token.job_id, task_id)
        return verdict


class CallbackWorker:
    """Takes callbacks into a store that clients share; it buys nothing, sends no status GET, and needs no API key.

    The store wakes the process that submitted. `on_event`: as of a `Client`, with `CallbackTaken`, `CallbackRefused`
    and `JobChanged`.

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
        schedule = PollSchedule(self._clock, Polling(), Random(), has_receiver=True)  # noqa: S311 - of the clients
        self._callbacks = CallbackApplier(
            registry=self._registry, schedule=schedule, only_wakes=False, monitor=self._monitor
        )
        self._undo = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as undo:
            await self._store.open()
            undo.push_async_callback(self._store.close)
            undo.push_async_callback(self._registry.close)
            secret = await self._store.secret(os.urandom(SECRET_BYTES))
            await self._receiver.start(self._callbacks, self._clock, secret)
            undo.push_async_callback(self._receiver.stop)
            self._undo = undo.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._undo.aclose()
