"""Buys jobs and gives their handles: the calls of the client that spend money."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from attrs import frozen

from xiling_async.api.failures import error_of
from xiling_async.errors import InvalidRequest, SubmitUncertain
from xiling_async.jobs.exchange import Order
from xiling_async.jobs.job import Job, JobContext, not_sent_in_time
from xiling_async.jobs.submission import Submission
from xiling_async.models.metadata import checked_metadata
from xiling_async.models.record import State
from xiling_async.models.request import Request, check_name
from xiling_async.models.retry import retry_key, retry_request

R = TypeVar("R")


def order_of(request: Request[Any], key: str | None, metadata: Mapping[str, str] | None) -> Order:
    """Raises `InvalidRequest` for what cannot be bought."""
    if not isinstance(request, Request):
        raise InvalidRequest(f"submit takes a request such as ImageToVideo(...), not {type(request).__name__}.")
    if key is not None:
        check_name("key", key)
    return Order(request=request, key=key, metadata=checked_metadata(metadata))


@frozen
class Buyer:
    """`raises_uncertain`: a submit of unknown fate raises at once, although its job can still be adopted."""

    submission: Submission
    job_context: JobContext
    raises_uncertain: bool

    async def submit(self, order: Order) -> Job[Any]:
        """As `Client.submit`."""
        if order.key is not None:  # of a pair in `map`
            check_name("key", order.key)
        purchase = await self.submission.submit(order)
        entry, doubt = purchase.entry, purchase.doubt
        job: Job[Any] = Job(entry, self.job_context)
        if job.state in (State.UNCERTAIN, State.UNKNOWN) and self.raises_uncertain:
            raise cast("SubmitUncertain", error_of(entry.record, job=job)) from doubt
        if doubt is not None and doubt.task_ids:  # bought, with too many or too few ids
            doubt.job = job
            raise doubt
        return job

    async def run(self, order: Order, limit_s: float) -> Any:
        """As `Client.run`."""
        if order.request.task_count != 1:
            raise InvalidRequest(
                f"run gives exactly one result, this request asks for {order.request.task_count}. Nothing was sent: "
                "use `await (await client.submit(request))`."
            )
        clock = self.job_context.clock
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
        entry = await self.job_context.registry.find(job.id) if isinstance(job, Job) else None
        if entry is None:
            raise InvalidRequest("retry takes a job that the store of this client knows. Nothing was sent.")
        record = (await self.job_context.registry.fresh(entry)).record
        order = Order(
            request=retry_request(record),
            key=retry_key(record),
            metadata=record.metadata if metadata is None else checked_metadata(metadata),
            retry_of=record.id,
            wanted=wanted,
        )
        return await self.submit(order)
