"""The handle people await."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from typing import Any, Generic, TypeVar, cast

from attrs import frozen

from xiling_async._internal.clock import Clock
from xiling_async.api.failures import error_of
from xiling_async.errors import WaitTimeout
from xiling_async.jobs.registry import Registry, Slot
from xiling_async.models.record import Failed, JobRecord, State, Succeeded
from xiling_async.models.request import Request
from xiling_async.models.settings import Timeouts

R = TypeVar("R")


@frozen(kw_only=True)
class Desk:
    """What every handle of a client needs to wait and to ask."""

    registry: Registry
    clock: Clock
    timeouts: Timeouts
    ask: Callable[[Slot], Awaitable[object]]  # one status GET for each task that has no outcome yet


def _is_final(record: JobRecord) -> bool:
    return record.state.is_final


class Job(Generic[R]):
    """One paid submit: `await job` gives its results in task order.

    It may be awaited again, and by many at once. A timeout or a cancellation ends that wait only, never the job.
    """

    def __init__(self, slot: Slot, desk: Desk) -> None:
        self._slot = slot
        self._desk = desk

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.state.value} task_ids={list(self.task_ids)}>"

    @property
    def id(self) -> str:
        """The client's own name of the job: 32 hex digits, known before anything was sent."""
        return self._slot.record.id

    @property
    def key(self) -> str | None:
        return self._slot.record.key

    @property
    def task_ids(self) -> tuple[str, ...]:
        """The service's names of the tasks; empty while the submit is uncertain."""
        return self._slot.record.task_ids

    @property
    def request(self) -> Request[R] | None:
        """The request, where it is known (not for a job made from a bare task id)."""
        return self._slot.record.request

    @property
    def state(self) -> State:
        """Where the job stands, as far as this process knows; compares with its name: `job.state == "done"`."""
        return self._slot.record.state

    def __await__(self) -> Generator[Any, None, tuple[R, ...]]:
        return self.result().__await__()

    async def result(self, timeout: float | None = None) -> tuple[R, ...]:
        """The results of all tasks, in task order. `timeout`: seconds (None: `Timeouts.wait`; `math.inf`: no limit).

        Raises `TaskFailed` (the good outcomes are in it), `WaitTimeout`, `SubmitUncertain`, `ResultExpired`,
        `ClientClosed`; for a job found by its key also why it was refused.
        """
        record = await self._finished(timeout)
        error = error_of(record, job=self)
        if error is not None:
            raise error
        return tuple(cast("Succeeded[R]", outcome).result for outcome in record.outcomes)

    async def outcomes(self, timeout: float | None = None) -> tuple[Succeeded[R] | Failed, ...]:
        """What became of each task, in task order. Raises as `result` does, but not for tasks that failed."""
        record = await self._finished(timeout)
        if record.state not in (State.DONE, State.FAILED):
            raise cast("Exception", error_of(record, job=self))
        return cast("tuple[Succeeded[R] | Failed, ...]", record.outcomes)

    async def refresh(self) -> Job[R]:
        """Ask the service now about each task that has no outcome yet; gives the job itself, with its newest state.

        Raises `NotSent`, `ServiceError`, `ProtocolError` when the service did not tell; the job goes on all the same.
        """
        self._slot = await self._desk.registry.fresh(self._slot)
        await self._desk.ask(self._slot)
        return self

    async def _finished(self, timeout: float | None) -> JobRecord:
        limit_s = self._desk.timeouts.wait if timeout is None else timeout
        try:
            async with self._desk.clock.timeout(limit_s):
                self._slot = await self._desk.registry.fresh(self._slot)
                return await self._desk.registry.wait(self._slot, _is_final)
        except TimeoutError:
            raise self.timed_out(limit_s) from None

    def timed_out(self, limit_s: float) -> WaitTimeout:
        """The error of a wait of so many seconds."""
        record = self._slot.record
        polling = self._slot.polling_error
        why = "" if polling is None else f" The last status GET failed: {polling}"
        where = f"job {record.id} (tasks {', '.join(record.task_ids) or 'not known yet'})"
        return WaitTimeout(
            f"Waited {limit_s:g} s for {where}: it is still {record.state.value}. Only the wait is over: "
            f"`await error.job` goes on waiting, `client.find(job_id)` finds it again. Do not submit it anew.{why}",
            charged="yes" if record.task_ids else "maybe",
            job=self,
            job_id=record.id,
            task_ids=record.task_ids,
        )
