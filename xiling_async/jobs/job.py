"""The handle people await."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Generator, Iterable, Mapping, Set
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar, cast

from attrs import frozen

from xiling_async._internal.clock import Clock
from xiling_async._internal.redact import shown
from xiling_async.api.failures import error_of
from xiling_async.api.wire import TASK_ID_CHARACTERS
from xiling_async.errors import ConfigurationError, InvalidRequest, StoreError, WaitTimeout, XilingError
from xiling_async.jobs.auto_save import AutoSave
from xiling_async.jobs.consumer import Consumers
from xiling_async.jobs.entry import JobEntry, Predicate
from xiling_async.jobs.poller import Poller
from xiling_async.jobs.registry import Registry
from xiling_async.models import resolution
from xiling_async.models.lifecycle import Verdict
from xiling_async.models.record import NOT_BOUGHT, Failed, JobRecord, State, Succeeded, bare_job
from xiling_async.models.request import Request, check_name
from xiling_async.models.settings import Timeouts, as_number

R = TypeVar("R")


@frozen(kw_only=True)
class JobContext:
    """What every handle of a client needs to wait and to ask."""

    registry: Registry
    clock: Clock
    timeouts: Timeouts
    poller: Poller
    consumers: Consumers
    auto_save: AutoSave | None = None


def checked_timeout(timeout: object) -> float:
    """Seconds, as given: also 0 or less, which looks and does not wait. Raises `InvalidRequest` for anything else."""
    number = as_number(timeout)
    if number is None:
        raise InvalidRequest(f"timeout must be a number of seconds, or None, not {shown(timeout)}. Nothing was sent.")
    return number


def not_sent_in_time(key: str | None, limit_s: float) -> WaitTimeout:
    """`Client.run` waited for its turn to send until its time was over."""
    if key is None:
        message = "the request was not sent yet. It is not sent any more: nothing was bought."
        return WaitTimeout(f"Waited {limit_s:g} s, and {message}", charged="no")
    message = f"unless another submit of it is under way, nothing was bought: client.find({key!r}) tells."
    return WaitTimeout(f"Waited {limit_s:g} s, and this call did not send the request; {message}", charged="maybe")


def _is_final(record: JobRecord) -> bool:
    return record.state.is_final


def _has_more(record: JobRecord, yielded: Set[str]) -> bool:
    """Whether it is at its end, or has an outcome that is not among these."""
    known = (outcome.task_id for outcome in record.outcomes if outcome is not None)
    return record.state.is_final or any(task_id not in yielded for task_id in known)


class Job(Generic[R]):
    """One paid submit: `await job` gives its results in task order.

    It may be awaited again, and by many at once, in the event loop of its client. A timeout or a cancellation ends
    that wait only, never the job.
    """

    def __init__(self, entry: JobEntry, job_context: JobContext) -> None:
        self._entry = entry
        self._context = job_context
        self._loop = asyncio.get_running_loop()

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.state.value} task_ids={list(self.task_ids)}>"

    @property
    def id(self) -> str:
        """The client's own name of the job: 32 hex digits, known before anything was sent."""
        return self._entry.record.id

    @property
    def key(self) -> str | None:
        return self._entry.record.key

    @property
    def task_ids(self) -> tuple[str, ...]:
        """The service's names of the tasks; empty while the submit is uncertain."""
        return self._entry.record.task_ids

    @property
    def request(self) -> Request[R] | None:
        """The request, where it is known (not for a job made from a bare task id)."""
        return self._entry.record.request

    @property
    def state(self) -> State:
        """Where the job stands, as far as this process knows; compares with its name: `job.state == "done"`."""
        return self._entry.record.state

    @property
    def metadata(self) -> Mapping[str, str]:
        """The caller's own words, as they were given to `submit`."""
        return MappingProxyType(dict(self._entry.record.metadata))

    @property
    def retry_of(self) -> str | None:
        """The id of the job whose failed tasks this one buys again (`Client.retry`)."""
        return self._entry.record.retry_of

    @property
    def created_at(self) -> float:
        """When the job was made: Unix seconds."""
        return self._entry.record.created_at

    @property
    def ended_at(self) -> float | None:
        """When the job came to its end, as far as this process knows: Unix seconds; None while it is under way."""
        return self._entry.record.ended_at

    @property
    def error(self) -> XilingError | None:
        """What `result` would raise for the job as it stands; None while it is under way and when all is well.

        No I/O.
        """
        return error_of(self._entry.record, job=self)

    @property
    def outcomes_so_far(self) -> tuple[Succeeded[R] | Failed | None, ...]:
        """The outcome of each task that is known, in task order, None for the others; empty while the tasks are not
        known, and of a job that was refused. No I/O."""
        return self._entry.record.outcomes

    def __await__(self) -> Generator[Any, None, tuple[R, ...]]:
        return self.result().__await__()

    async def result(self, timeout: float | None = None) -> tuple[R, ...]:
        """The results of all tasks, in task order. `timeout`: seconds (None: `Timeouts.wait`; `math.inf`: no limit).

        Raises `TaskFailed` (the good outcomes are in it), `WaitTimeout`, `SubmitUncertain`, `ResultExpired`,
        `ClientClosed`; for a job found by its key also why it was refused; `InvalidRequest` for a timeout that is not
        a number, `ConfigurationError` in another event loop.
        """
        record = await self._finished(timeout)
        error = error_of(record, job=self)
        if error is not None:
            raise error
        return tuple(cast("Succeeded[R]", outcome).result for outcome in record.outcomes)

    async def outcomes(self, timeout: float | None = None) -> tuple[Succeeded[R] | Failed, ...]:
        """What became of each task, in task order; empty for a job that was refused (`error` says why).

        Raises as `result` does, but not for tasks that failed, nor for a job that bought nothing.
        """
        record = await self._finished(timeout)
        if record.state in NOT_BOUGHT:
            return ()
        if record.state not in (State.DONE, State.FAILED):
            raise cast("Exception", error_of(record, job=self))
        return cast("tuple[Succeeded[R] | Failed, ...]", record.outcomes)

    async def as_completed(self) -> AsyncIterator[Succeeded[R] | Failed]:
        """Each task's outcome as it becomes known, those that are known already first: with `generate_count=4` the
        first can be used before the fourth is there. It waits `Timeouts.wait` seconds for each next one.

        Raises as `outcomes` does, after the outcomes that are known.
        """
        yielded: set[str] = set()
        while True:
            record = await self._changed(None, lambda record: _has_more(record, yielded))
            for outcome in record.outcomes:
                if outcome is not None and outcome.task_id not in yielded:
                    yielded.add(outcome.task_id)
                    yield outcome
            if record.state.is_final:
                break
        await self.outcomes()

    async def ack(self) -> None:
        """Write down that the application has dealt with the end of this job, so that `Client.completed` does not give
        it again. Once more changes nothing; a consumer that had it longer than its lease may still say so.

        Raises `InvalidRequest` for a job that has not ended, or that bought nothing, `StoreError`, `ClientClosed`.
        """
        self._check_loop()
        self._entry = await self._context.registry.up_to_date(self._entry)
        verdict = await self._context.consumers.acknowledge(self._entry.record.id)
        if verdict not in (Verdict.APPLIED, Verdict.REPEAT):
            why = "is not in the store any more" if verdict is Verdict.NO_JOB else f"is {self.state.value}"
            raise InvalidRequest(
                f"Job {self.id} {why}: only a job that has ended after it was bought can be acknowledged. Nothing was "
                "changed."
            )

    async def saved(self, timeout: float | None = None) -> tuple[Path, ...]:
        """The files in the folder of `Client(save_to=...)`, one for each task that succeeded, in task order, once they
        are saved. A download that fails is repeated until the result's link has expired. `timeout`: as in `result`.

        Raises `ConfigurationError` without `save_to`, `ResultExpired` or another `DownloadError` when a file cannot be
        saved any more, `WaitTimeout` (its cause is what went wrong last), `ClientClosed`; else as `outcomes`.
        """
        auto_save = self._context.auto_save
        if auto_save is None:
            raise ConfigurationError("Nothing is saved: pass `save_to=` to the client, or use `client.download`.")
        limit_s = self._context.timeouts.wait if timeout is None else timeout
        try:
            async with self._context.clock.timeout(limit_s):
                await self.outcomes(math.inf)
                return await auto_save.saved(self._entry.record)
        except TimeoutError:
            raise self.timed_out(limit_s) from auto_save.why_unsaved(self._entry.record)

    async def refresh(self) -> Job[R]:
        """Ask the service now about each task that has no outcome yet; gives the job itself, with its newest state.

        Raises `NotSent`, `ServiceError`, `ProtocolError` when the service did not tell; the job goes on all the same.
        Raises `ConfigurationError` in another event loop.
        """
        self._check_loop()
        self._entry = await self._context.registry.up_to_date(self._entry)
        await self._context.poller.ask(self._entry)
        return self

    async def _finished(self, timeout: float | None) -> JobRecord:
        return await self._changed(timeout, _is_final)

    async def _changed(self, timeout: float | None, predicate: Predicate) -> JobRecord:
        self._check_loop()
        limit_s = self._context.timeouts.wait if timeout is None else checked_timeout(timeout)
        try:
            async with self._context.clock.timeout(limit_s):
                self._entry = await self._context.registry.up_to_date(self._entry)
                return await self._context.registry.wait(self._entry, predicate)
        except TimeoutError:
            with contextlib.suppress(StoreError):  # another process may have written what was missed here
                await self._context.registry.reread(self._entry)
            if predicate(self._entry.record):
                return self._entry.record
            raise self.timed_out(limit_s) from None

    def _check_loop(self) -> None:
        if asyncio.get_running_loop() is not self._loop:
            raise ConfigurationError(
                "This job belongs to another event loop, that of its client. The job goes on; nothing was sent. Await "
                "it there, for example by asyncio.run_coroutine_threadsafe(job.result(), loop)."
            )

    def timed_out(self, limit_s: float) -> WaitTimeout:
        """The error of a wait of so many seconds."""
        record = self._entry.record
        if record.state.is_final:
            return WaitTimeout(
                f"Waited {limit_s:g} s for the files of job {record.id}: not all of them are saved yet. Saving "
                "goes on: `await error.job.saved()` waits again.",
                charged="yes", job=self, job_id=record.id, task_ids=record.task_ids,
            )  # fmt: skip
        polling = self._entry.polling_error
        why = "" if polling is None else f" The last status GET failed: {polling}"
        where = f"job {record.id} (tasks {', '.join(record.task_ids) or 'not known yet'})"
        return WaitTimeout(
            f"Waited {limit_s:g} s for {where}: it is still {record.state.value}. Only the wait is over: "
            f"`await error.job` goes on waiting, `client.find(job_id)` finds it again. Do not submit it again.{why}",
            charged="yes" if record.task_ids else "maybe",
            job=self,
            job_id=record.id,
            task_ids=record.task_ids,
        )


def job_of_task(task_id: str, kind: type[Request[R]], job_context: JobContext) -> Job[R]:
    """The handle on a task of which nothing but its id is known; no I/O. Raises `InvalidRequest`."""
    check_name("task_id", task_id, most=TASK_ID_CHARACTERS)
    if not isinstance(kind, type) or not issubclass(kind, Request) or kind is Request:
        raise InvalidRequest(f"kind must be a class of requests such as ImageToVideo, not {shown(kind)}.")
    record = bare_job(task_id, kind.kind.name, job_context.clock.time())
    return Job(job_context.registry.entry_of(record), job_context)


async def resolve(job: Job[Any] | None, task_ids: Iterable[str] | None, *, not_bought: bool) -> Job[Any]:
    """Tell a job what it bought, as `Client.resolve` says. Raises `InvalidRequest`, `StoreError`."""
    if job is None:
        raise InvalidRequest("The store knows no job with this key or id. Nothing was changed.")
    ids = None if task_ids is None else resolution.checked_ids(task_ids)
    if (ids is None) is not bool(not_bought):
        raise InvalidRequest("resolve takes either task_ids=[...] or not_bought=True. Nothing was changed.")
    for task_id in ids or ():
        check_name("task_id", task_id, most=TASK_ID_CHARACTERS)
    registry, now = job._context.registry, job._context.clock.time()
    job._entry = entry = await registry.up_to_date(job._entry)
    event = resolution.resolved(entry.record, ids, now)
    if event is not None:
        resolution.check_applied(await registry.apply(entry.record.id, event), event)
    return job
