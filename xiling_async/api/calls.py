"""The calls of the API: create, status, upload. Each gives one value and never raises what the network did.

Nothing above knows the transport, the wire format, the API key, when a request may leave, or when it may be repeated.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from random import Random
from typing import Any, Final, Protocol

from attrs import evolve

from xiling_async._internal.clock import Clock
from xiling_async.api import backoff, wire
from xiling_async.api.results import Call, Create, CreateResult, StatusResult, UploadResult
from xiling_async.api.retry_rules import ExchangeResult, RetryAction
from xiling_async.api.throttle import Throttle
from xiling_async.api.transport import Body, Transport
from xiling_async.errors import ClientClosed, XilingError
from xiling_async.models.request import Kind
from xiling_async.models.settings import Limits

RESENDS: Final = 5  # of a create that never arrived: with full jitter about 8 s on the average
RATE_LIMIT_WAITS: Final = 8  # of a create or an upload that got a 429: at the vendor's 30 s about 4 minutes
PATIENCE_S: Final = 600.0  # of a batch, with a service that has answered before and is away now
UPLOADS_AT_ONCE: Final = 4  # more share the same line
UPLOAD_TRIES: Final = 4
UPLOAD_PATH: Final = "figure-resource/upload/file"  # docs.keevx.com, "Upload"

_CLEAR: Final = (
    ExchangeResult.ANSWERED,
    ExchangeResult.REFUSED,
    ExchangeResult.LIMITED,
)  # the service itself has answered
_NO_SIGN: Final = (
    ExchangeResult.NOT_BEGUN,
    ExchangeResult.REDIRECTED,
    ExchangeResult.NOT_API,
)  # says nothing of whether it is there


class UploadBody(Protocol):
    """The body of one try, as it is pulled. `spoiled`: why it ended early; the network has nothing to do with it."""

    content_type: str
    size_bytes: int

    @property
    def spoiled(self) -> Exception | None: ...

    def __aiter__(self) -> AsyncIterator[bytes]: ...


class UploadSource(Protocol):
    """What is uploaded; its text names it in errors."""

    def body(self) -> UploadBody: ...


class Calls:
    """The API of one client. After a 429 to any request, no request leaves until the pause is over."""

    def __init__(self, transport: Transport, api_key: str, *, clock: Clock, limits: Limits, rng: Random) -> None:
        self._transport = transport
        self._api_key = api_key
        self._clock = clock
        self._rng = rng
        self.creates = Throttle(clock, rng, per_second=limits.submits_per_second)
        self.gets = Throttle(clock, rng, per_second=limits.gets_per_second)
        self.uploads = Throttle(clock, rng)
        self._upload_slots = asyncio.Semaphore(UPLOADS_AT_ONCE)

    def check(self) -> None:
        """Raises `ConfigurationError` or `ClientClosed` if nothing can be sent."""
        self._transport.check()

    @property
    def paused_until(self) -> float | None:
        """The end of the pause after a 429, Unix seconds; None if there is none."""
        return self.creates.paused_until

    # --- creates: paid -----------------------------------------------------------------------------------------------

    async def create(self, create: Create) -> CreateResult:
        """Send one paid POST, once. `creates.take_slot()` comes before it."""
        body: Body | None = None
        try:
            body = Body(wire.create_body(create.request, create.callback_url))
            answer = await self._transport.post(create.kind.path, body)
        except Exception as error:
            has_left = body is not None and body.has_left
            result = CreateResult.from_exception(error, create, self._call(), has_left=has_left)
        else:
            result = CreateResult.from_response(answer, create, self._call())
        self._learn_of_create(create.job_id, result)
        return result

    def _learn_of_create(self, job_id: str, result: CreateResult) -> None:
        if result.action is RetryAction.AGAIN:
            self.creates.failed(job_id, is_unreachable=True)
        elif result.action is RetryAction.UNCERTAIN:
            self.creates.failed(job_id, is_unreachable=False)
        elif result.is_sent:
            self.creates.answered()
        self._pause_all(result.pause_s)

    async def may_create_again(self, result: CreateResult, tries: int, *, is_patient: bool) -> bool:
        """Whether a create that bought nothing may be sent again after so many `tries`; waits as long as it has to.

        `is_patient`: it can wait for a service that is away. Raises `ClientClosed`.
        """
        if result.action is RetryAction.WAIT:
            return tries <= RATE_LIMIT_WAITS  # the throttle is the pause
        if result.action is not RetryAction.AGAIN:
            return False
        if is_patient and self.creates.is_away_for_less_than(PATIENCE_S):
            return True
        if tries <= RESENDS and self.creates.take_repeat():
            await self.creates.pause(backoff.full_jitter(tries - 1, self._rng.random))
            return True
        return False

    # --- status ------------------------------------------------------------------------------------------------------

    async def status(self, kind: Kind[Any], task_id: str, *, can_wait: bool = False) -> StatusResult:
        """Ask about one task. `can_wait`: in an outage it is put off, unless it is the next probe."""
        try:
            await self.gets.take_slot()
        except ClientClosed as closed:
            return StatusResult(error=closed, is_asked=False)
        if can_wait and not self.gets.may_probe():
            self.gets.release_slot()
            return StatusResult.put_off(task_id)
        began_at = self._clock.time()
        try:
            answer = await self._transport.get(kind.status_path(task_id))
        except XilingError as error:
            return StatusResult(error=error, is_asked=False)
        except Exception as error:
            result = StatusResult.from_exception(error, task_id, self._call())
        else:
            result = StatusResult.from_response(answer, kind, task_id, self._call())
        self._learn(self.gets, task_id, result.happened)
        self._pause_all(result.pause_s if result.happened is ExchangeResult.LIMITED else 0.0)
        return evolve(result, began_at=began_at)

    # --- uploads: free, so they are repeated -------------------------------------------------------------------------

    async def upload(self, source: UploadSource) -> UploadResult:
        """Upload a picture, with all repeats."""
        tries = waits = 0
        while True:
            result = await self._one_upload(source)
            tries += 1
            if result.action is RetryAction.WAIT:
                waits += 1
                is_over = waits > RATE_LIMIT_WAITS
            else:
                is_over = result.action is not RetryAction.AGAIN or tries - waits == UPLOAD_TRIES
            if is_over:
                return evolve(result, tries=tries)
            if result.action is RetryAction.AGAIN:
                await self.uploads.pause(result.next_try_in(tries - waits, self._rng))

    async def _one_upload(self, source: UploadSource) -> UploadResult:
        async with self._upload_slots:
            await self.uploads.take_slot()
            body = source.body()
            try:
                answer = await self._transport.upload(
                    UPLOAD_PATH, body, size_bytes=body.size_bytes, content_type=body.content_type
                )
            except XilingError as error:
                return UploadResult(error=error)
            except Exception as error:
                if body.spoiled is not None:
                    return UploadResult()
                result = UploadResult.from_exception(error, str(source), self._call())
            else:
                result = UploadResult.from_response(answer, str(source), self._call())
        self._pause_all(result.pause_s if result.action is RetryAction.WAIT else 0.0)
        return result

    # --- what each tells about the service ---------------------------------------------------------------------------

    def _call(self) -> Call:
        return Call(now=self._clock.time(), api_key=self._api_key)

    def _learn(self, throttle: Throttle, about: str, happened: ExchangeResult) -> None:
        if happened in _CLEAR:
            throttle.answered()
        elif happened not in _NO_SIGN:
            throttle.failed(about, is_unreachable=happened is ExchangeResult.UNREACHABLE)

    def _pause_all(self, seconds: float) -> None:
        if seconds:
            for throttle in (self.creates, self.gets, self.uploads):
                throttle.pause_for(seconds)
