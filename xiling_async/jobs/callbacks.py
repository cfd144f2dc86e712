"""What a callback means: settle its task, adopt its job, or only wake it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from attrs import field, frozen

from xiling_async._internal.clock import Clock
from xiling_async.api.wire import Report
from xiling_async.jobs.registry import Registry
from xiling_async.kinds import BY_NUMBER
from xiling_async.models.lifecycle import OutcomeReported, PollScheduled, Verdict
from xiling_async.models.record import JobRecord
from xiling_async.models.request import Kind
from xiling_async.telemetry.events import REFUSAL_REASONS, CallbackRefused, CallbackTaken
from xiling_async.telemetry.stats import UNWATCHED, Monitor
from xiling_async.webhooks.tokens import CallbackToken

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
    """Runs in tasks that are never cancelled.

    `first_due(kind)`: when the sweeper should look at a job that a callback adopts.
    `only_wakes`: callbacks are not believed; each makes the sweeper ask at once (`trust="status"`).
    """

    registry: Registry
    clock: Clock
    first_due: Callable[[Kind[object]], float]
    on_callback: Callable[[], None]
    only_wakes: bool
    monitor: Monitor = UNWATCHED
    _wakes: WakeLimit = field(factory=WakeLimit)

    async def apply(self, token: CallbackToken, report: Report) -> Verdict:
        """Commit what the callback says. Raises `StoreError`."""
        began_at = self.clock.time()
        verdict = await self._settled(token, report, began_at)
        if verdict in (Verdict.APPLIED, Verdict.REPEAT, Verdict.CONFLICT):
            outcome = report.outcome
            self.monitor.emit(CallbackTaken(
                job_id=token.job_id, attempt=token.attempt, task_id=report.task_id, result=verdict.value,
                outcome=None if outcome is None else "succeeded" if outcome.ok else "failed",
                began_at=began_at, at=self.clock.time(),
            ))  # fmt: skip
        return verdict

    def refused(self, status: int, job_id: str | None) -> None:
        reason = REFUSAL_REASONS.get(status, "other")
        self.monitor.emit(CallbackRefused(reason=reason, status=status, job_id=job_id, at=self.clock.time()))

    async def _settled(self, token: CallbackToken, report: Report, now: float) -> Verdict:
        kind = BY_NUMBER[token.kind_number]
        heard = OutcomeReported(
            attempt=token.attempt,
            at=now,
            task_id=report.task_id,
            outcome=None if self.only_wakes else report.outcome,
            due_at=self.first_due(kind),
        )
        change = await self.registry.commit(token.job_id, heard)
        if change.verdict is Verdict.NO_JOB:
            return await self._adopt(token, kind, report.task_id)
        if change.verdict in (Verdict.APPLIED, Verdict.REPEAT):
            self.on_callback()
            is_believed = not self.only_wakes and not (change.record and change.record.is_adopted)
            if report.outcome is not None and not is_believed:
                due_at = self._wakes.due_at(token.job_id, now)
                await self.registry.commit(token.job_id, PollScheduled(at=now, due_at=due_at))
        return change.verdict

    async def _adopt(self, token: CallbackToken, kind: Kind[object], task_id: str) -> Verdict:
        """The token is ours, the job is not in the store: a restored backup, a lost store, or a job that was purged. It
        was paid for; but anyone who has seen the URL may call it, so only a status GET is believed of it."""
        now = self.clock.time()
        lost = JobRecord(
            id=token.job_id, kind=kind.name, key=None, request=None, asked=max(1, token.tasks), created_at=now,
            changed_at=now, attempt=token.attempt, is_adopted=True,
        )  # fmt: skip
        heard = OutcomeReported(attempt=token.attempt, at=now, task_id=task_id, outcome=None, due_at=now)
        verdict = (await self.registry.adopt(lost, heard)).verdict
        log.warning("job %s (task %s) was not in the store: adopted, asking for its status", token.job_id, task_id)
        return verdict
