"""Asks about overdue tasks; the same code recovers after a restart.

One loop for all jobs: the store says who is due, the sweeper asks the service, and what it hears goes the way of a
callback: `Heard`, committed before anyone is told. Without a receiver it is the way to wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final, Literal

from attrs import frozen

from xiling_async._internal.clock import Clock
from xiling_async._internal.redact import scrub
from xiling_async._internal.tasks import Tasks
from xiling_async.api import classify, retry, wire
from xiling_async.api.classify import Happened, Step
from xiling_async.api.failures import error_from, refusal
from xiling_async.api.throttle import Gate, Rate
from xiling_async.api.transport import Answer, Transport
from xiling_async.errors import NotSent, ServiceUnavailable, StoreError, XilingError
from xiling_async.jobs.entry import JobEntry as Slot
from xiling_async.jobs.registry import Registry
from xiling_async.kinds import BY_NAME
from xiling_async.models.lifecycle import Asked, GaveUp, Heard, Verdict
from xiling_async.models.record import JobRecord, Outcome, State, Succeeded
from xiling_async.models.request import Kind, Progress
from xiling_async.models.settings import Limits, Polling
from xiling_async.stores.base import Store
from xiling_async.telemetry.stats import UNWATCHED, Monitor

log = logging.getLogger("xiling_async.jobs.poller")

BATCH: Final = 64
LEASE_S: Final = 120.0  # longer than one ask can take; a sweeper that dies in between delays its jobs so long
STORE_PAUSE_S: Final = 5.0
LOOK_S: Final = 10.0  # how often one looks into a store that others use too: one of them may have died with its jobs
NO_CALLBACKS_WARNING: Final = 3  # jobs in a row that only polling finished although a receiver is configured
LAST_ASK_S: Final = 3600.0  # results are asked for once more when so little of their 7 days is left


@frozen(kw_only=True)
class _Told:
    """What one status GET came to. `missing`: the service says that it does not know the task (now)."""

    report: wire.Report | None = None
    missing: bool = False
    error: XilingError | None = None


class Sweeper:
    """`has_receiver`: callbacks are to be expected, so they are trusted for a while before the first GET."""

    def __init__(
        self,
        *,
        store: Store,
        registry: Registry,
        transport: Transport,
        clock: Clock,
        gate: Gate,
        limits: Limits,
        polling: Polling,
        random: Callable[[], float],
        has_receiver: bool,
        api_key: str,
        monitor: Monitor = UNWATCHED,
    ) -> None:
        self._monitor = monitor
        self._store = store
        self._registry = registry
        self._transport = transport
        self._clock = clock
        self._gate = gate
        self._rate = Rate(limits.gets_per_second, clock)
        self._polling = polling
        self._random = random
        self._has_receiver = has_receiver
        self._api_key = api_key
        self._tasks = Tasks()
        self._awake = asyncio.Event()
        self._sleeps_until = 0.0
        self._asks = asyncio.Semaphore(BATCH)
        # No job may fall due again while it waits for its turn: a batch has to fit into its lease.
        self._batch = max(1, min(BATCH, int(limits.gets_per_second * LEASE_S / 8)))
        self._unheard = 0
        self._heard_at = float("-inf")
        self._began_at = 0.0
        self._found_old_at: dict[str, float] = {}  # jobs that were made before `_began_at`

    def start(self) -> None:
        self._began_at = self._clock.time()
        self._tasks.start(self._run(), name="xiling sweeper")

    async def close(self) -> None:
        await self._tasks.cancel()

    def first_due(self, kind: Kind[Any]) -> float:
        """When to look at a job that is accepted now."""
        every_s = self._every_s(kind)
        return self._clock.time() + retry.first_ask_s(
            every_s, self._polling.grace, self._random, has_receiver=self._has_receiver
        )

    def changed(self, record: JobRecord) -> None:
        """A record has changed: if it falls due before the sweeper would wake, wake it."""
        if record.state.is_final:
            self._found_old_at.pop(record.id, None)
        if record.due_at is not None and record.due_at < self._sleeps_until:
            self._awake.set()

    def heard_callback(self) -> None:
        """Callbacks do arrive."""
        self._unheard = 0
        self._heard_at = self._clock.time()

    async def ask(self, slot: Slot) -> None:
        """Ask now about each task of the job that has no outcome. Raises what went wrong for the last of them."""
        failed: XilingError | None = None
        for told in [await self._ask_one(slot.record, task_id) for task_id in _open_tasks(slot.record)]:
            failed = told.error or failed
        if failed is not None:
            raise failed

    async def outcome(self, kind: Kind[Any], task_id: str) -> Outcome | None:
        """What the service says of a task now: for new links to a result that is settled already, so nothing is
        written down. None: it does not know the task, or works on it. Raises what went wrong."""
        told = await self._get(kind, task_id)
        if told.error is not None and not told.missing:
            raise told.error
        return None if told.report is None else told.report.outcome

    def _every_s(self, kind: Kind[Any]) -> float:
        return kind.poll_every_s if self._polling.every is None else self._polling.every

    # --- the loop ------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            try:
                await self._gate.passed()
                due = await self._registry.claim(self._clock.time(), limit=self._batch, lease_s=LEASE_S)
                for record in due:
                    await self._asks.acquire()
                    ask = self._tasks.start(self._look_at(record), name=f"xiling ask {record.id}")
                    ask.add_done_callback(lambda _: self._asks.release())
                if not due:
                    self._awake.clear()
                    self._sleeps_until = float("inf")  # what changes while the store is asked is not missed
                    await self._sleep_until(self._look_by(await self._registry.next_due()))
            except StoreError as error:
                log.warning("the store cannot be read, trying again in %g s: %s", STORE_PAUSE_S, error)
                await self._clock.sleep(STORE_PAUSE_S)
            except Exception:
                log.exception("the store cannot be read, trying again in %g s", STORE_PAUSE_S)
                await self._clock.sleep(STORE_PAUSE_S)

    def _look_by(self, due_at: float | None) -> float | None:
        look_at = self._clock.time() + LOOK_S if self._store.is_shared else None
        return look_at if due_at is None else min(due_at, look_at or due_at)

    async def _sleep_until(self, due_at: float | None) -> None:
        self._sleeps_until = float("inf") if due_at is None else due_at
        timer = None if due_at is None else self._clock.call_later(due_at - self._clock.time(), self._awake.set)
        try:
            await self._awake.wait()
        finally:
            self._sleeps_until = 0.0
            if timer is not None:
                timer.cancel()

    async def _look_at(self, record: JobRecord) -> None:
        try:
            await self._advance(record)
        except StoreError as error:
            log.warning("job %s: the store could not write what a status GET told: %s", record.id, error)
        except Exception:
            log.exception("job %s: could not be asked about; the next try comes in %g s", record.id, LEASE_S)

    async def _advance(self, record: JobRecord) -> None:
        if record.state is State.UNCERTAIN:
            gave_up = GaveUp(at=self._clock.time(), was=record.state)
            if (await self._registry.apply(record.id, gave_up)).verdict is Verdict.APPLIED:
                log.warning("job %s: no callback adopted it in time; its fate stays unknown", record.id)
            return
        kind = BY_NAME.get(record.kind)
        if kind is None:
            log.warning("job %s is of kind %s, which this version does not know", record.id, record.kind)
            return
        told = [await self._ask_one(record, task_id) for task_id in _open_tasks(record)]
        for failed in (answer.error for answer in told if answer.error is not None):
            log.info("job %s: a status GET failed: %s", record.id, failed)
        open_still = [answer for answer in told if answer.report is None or answer.report.outcome is None]
        if told and not open_still and len(record.task_ids) >= record.asked:
            self._polled_to_its_end(record)
            return
        await self._ask_later(record, kind, open_still)

    async def _ask_later(self, record: JobRecord, kind: Kind[Any], open_still: list[_Told]) -> None:
        now = self._clock.time()
        age_s = now - record.created_at
        is_missing = all(answer.missing for answer in open_still)  # also when nothing is left that could be asked for
        is_old = age_s > kind.result_ttl_s - LAST_ASK_S
        is_given_up = is_old or (is_missing and age_s > kind.longest_s and not record.is_adopted)
        if is_given_up and self._is_old_by_this_clock(record, now, kind):
            if (await self._registry.apply(record.id, GaveUp(at=now, was=record.state))).verdict is Verdict.APPLIED:
                log.warning("job %s: given up after %.0f s; a callback still wins", record.id, age_s)
            return
        failed = any(answer.error is not None for answer in open_still)
        pause_s = retry.next_ask_s(
            self._every_s(kind), age_s, kind.longest_s / 3, record.failed_asks + 1 if failed else 0, self._random
        )
        last_ask_in_s = kind.result_ttl_s - LAST_ASK_S - age_s
        pause_s = min(pause_s, max(last_ask_in_s, self._every_s(kind)))
        await self._registry.apply(record.id, Asked(at=now, due_at=now + pause_s, failed=failed))

    def _is_old_by_this_clock(self, record: JobRecord, now: float, kind: Kind[Any]) -> bool:
        """Whether the job has been waited for since this process knows it to be old, or was made in its time. Another
        process, or this machine before a restart, may have had a wrong clock when the job was made."""
        if record.created_at >= self._began_at:
            return True
        return now - self._found_old_at.setdefault(record.id, now) >= kind.longest_s

    def _polled_to_its_end(self, record: JobRecord) -> None:
        if record.created_at <= self._heard_at:
            return  # callbacks arrived during its life: its own may have been the one that made us ask
        self._unheard += 1
        if self._has_receiver and self._unheard == NO_CALLBACKS_WARNING:
            log.warning(
                "%d jobs in a row were finished by polling, although a receiver is configured: do callbacks reach it? "
                "Is its public URL right, reachable from the internet, and does it answer without a redirect?",
                self._unheard,
            )

    # --- one GET -------------------------------------------------------------------------------------------------

    async def _turn(self) -> None:
        """Wait for the gate and the rate; the gate may have closed while we queued."""
        while True:
            await self._gate.passed()
            await self._rate.turn()
            if self._gate.is_open:
                return

    async def _ask_one(self, record: JobRecord, task_id: str) -> _Told:
        """One status GET, settled the way a callback is."""
        told = await self._get(BY_NAME[record.kind], task_id, record.id)
        if told.report is not None:
            heard = Heard(
                attempt=record.attempt,
                at=self._clock.time(),
                task_id=task_id,
                outcome=told.report.outcome,
                due_at=record.due_at,
                is_status=True,
            )
            await self._registry.apply(record.id, heard)
        return told

    async def _get(self, kind: Kind[Any], task_id: str, job_id: str | None = None) -> _Told:
        await self._turn()
        began_at = self._clock.time()
        told = await self._exchange(kind, task_id)
        error = None if told.error is None else type(told.error).__name__
        self._monitor.polled(job_id, task_id, _result(told), error, began_at=began_at, at=self._clock.time())
        return told

    async def _exchange(self, kind: Kind[Any], task_id: str) -> _Told:
        try:
            answer = await self._transport.get(kind.status_path(task_id))
        except classify.FAILURES as error:
            why = scrub(f"{type(error).__name__}: {error}", self._api_key)
            return _Told(error=NotSent(f"The service could not be asked about {task_id} ({why}). Ask again later."))
        return self._read(kind, task_id, answer)

    def _read(self, kind: Kind[Any], task_id: str, answer: Answer) -> _Told:
        frame = wire.envelope(answer.body)
        happened = classify.of_status(answer.status, has_api_body=frame is not None)
        if happened is Happened.ANSWERED and frame is not None and frame.code == 0:
            try:
                return _Told(report=wire.status(kind, task_id, frame))
            except wire.Malformed as malformed:
                what = f"The status of {task_id} makes no sense: {malformed}"
                return _Told(error=wire.protocol_error(what, malformed.path, answer.body, self._api_key))
        pause_s = None
        if happened is Happened.LIMITED:
            pause_s = retry.pause_after_429(answer.headers.get("Retry-After"), self._clock.time())
            self._gate.close_for(pause_s)
        if happened is Happened.ANSWERED and frame is None:
            what = f"The status of {task_id} is not an answer of the API"
            return _Told(error=wire.protocol_error(what, "$", answer.body, self._api_key))
        if happened is not Happened.ANSWERED and classify.after_status(happened) is Step.AGAIN:
            words = f"The service could not tell the status of {task_id} (HTTP {answer.status}). Ask again later."
            return _Told(error=ServiceUnavailable(words, status=answer.status))
        is_missing = answer.status == 404 or (frame is not None and frame.code == kind.not_found)
        refused = refusal(kind, answer.status, frame, api_key=self._api_key, retry_after=pause_s, read=True)
        return _Told(missing=is_missing, error=error_from(refused))


def _result(told: _Told) -> Literal["succeeded", "failed", "running", "missing", "error"]:
    if told.error is not None or told.report is None:
        return "missing" if told.missing else "error"
    if told.report.outcome is None:
        return "running"
    return "succeeded" if isinstance(told.report.outcome, Succeeded) else "failed"


def _open_tasks(record: JobRecord) -> list[str]:
    return [task_id for task_id, outcome in zip(record.task_ids, record.outcomes, strict=True) if outcome is None]


__all__ = ["Progress", "Sweeper"]
