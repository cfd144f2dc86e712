"""The client: opens and closes all parts, and passes each call to the one that does it."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeVar, cast, overload

import aiohttp
from yarl import URL

from xiling_async._internal.clock import Clock, SystemClock
from xiling_async._internal.redact import shown
from xiling_async.errors import ConfigurationError, InvalidRequest
from xiling_async.jobs.consumer import checked_lease
from xiling_async.jobs.engine import Engine, Settings
from xiling_async.jobs.exchange import Order
from xiling_async.jobs.job import Job, checked_timeout, job_of_task, resolve
from xiling_async.jobs.map import FanOut, Finished, Items, MapOptions, checked
from xiling_async.kinds import ImageToVideo, Video
from xiling_async.media.transfer import MAX_BYTES, DownloadOptions
from xiling_async.models import settings
from xiling_async.models.metadata import checked_metadata
from xiling_async.models.query import checked_age, checked_query
from xiling_async.models.record import State
from xiling_async.models.request import Request, Result, is_name
from xiling_async.models.settings import Limits, Polling, Timeouts
from xiling_async.stores.base import Store
from xiling_async.stores.memory import MemoryStore
from xiling_async.telemetry.events import Hook, hooks_of
from xiling_async.telemetry.stats import Stats
from xiling_async.webhooks.receiver import WebhookReceiver

R = TypeVar("R")

_A_STORE: Final = 'a store, such as SQLiteStore("jobs.db")'
_A_CLOCK: Final = "a clock, such as xiling_async.testing.SkippingClock()"


class Client:
    """Submits jobs, takes their callbacks, and lets you await the results.

    `api_key`: else XILING_API_KEY, else KEEVX_API_KEY. `base_url`: else XILING_BASE_URL, else
    https://api.keevx.com/v1; plain http only to this machine. `receiver`: takes the callbacks; it starts and stops
    with the client. `store`: what remembers jobs (default: memory only). `session`: a borrowed
    `aiohttp.ClientSession` for the API, left open at exit. `headers`: sent with every request to the API.
    `on_uncertain`: what `submit` does when it is not known whether the POST bought something: "wait" (the job is
    returned, its callback adopts it; without a receiver it raises) or "raise" (`SubmitUncertain` at once).
    `save_to`: a folder in which each result is saved as soon as it is known, also those found at a restart; the store
    remembers the file (`Succeeded.file`, `await job.saved()`), and nothing is downloaded twice. Leaving `async with`
    saves what is known by then, for at most `Timeouts.stall` seconds; a warning counts the rest. `allow_private`: it
    may also come from this machine and private networks (the simulator). `on_event`: called in the loop with each
    event, or several such callables; `OpenTelemetry()` of `xiling_async.telemetry.otel` is one. `clock`: for tests.

    Raises `ConfigurationError`. Use it with `async with`, in one event loop.
    """

    def __init__(
        self,
        api_key: str | None = None,
        *,
        base_url: str | URL | None = None,
        receiver: WebhookReceiver | None = None,
        store: Store | None = None,
        session: aiohttp.ClientSession | None = None,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        timeouts: Timeouts = Timeouts(),  # noqa: B008
        polling: Polling = Polling(),  # noqa: B008
        headers: Mapping[str, str] | None = None,
        on_uncertain: Literal["wait", "raise"] = "wait",
        save_to: str | os.PathLike[str] | None = None,
        allow_private: bool = False,
        on_event: Hook | Sequence[Hook] | None = None,
        clock: Clock | None = None,
    ) -> None:
        if on_uncertain not in ("wait", "raise"):
            raise ConfigurationError(f'on_uncertain must be "wait" or "raise", not {on_uncertain!r}.')
        if receiver is not None:
            settings.instance("receiver", receiver, WebhookReceiver, "a WebhookReceiver(...)")
        if session is not None:
            settings.instance("session", session, aiohttp.ClientSession, "an aiohttp.ClientSession")
        service = settings.base_url(base_url)
        self._settings = Settings(
            api_key=settings.api_key(api_key),
            base_url=service,
            receiver=receiver,
            store=MemoryStore() if store is None else settings.instance("store", store, Store, _A_STORE),
            session=session,
            limits=settings.instance("limits", limits, Limits, "Limits(...)"),
            timeouts=settings.instance("timeouts", timeouts, Timeouts, "Timeouts(...)"),
            polling=settings.instance("polling", polling, Polling, "Polling(...)"),
            headers=settings.extra_headers(headers),
            save_to=settings.folder(save_to),
            allow_private=settings.instance("allow_private", allow_private, bool, "True or False"),
            on_event=hooks_of(on_event),
            raises_uncertain=on_uncertain == "raise" or receiver is None,
            clock=SystemClock() if clock is None else settings.instance("clock", clock, Clock, _A_CLOCK),
        )
        if receiver is not None:
            receiver.check_reachable_from(service)
        self._engine = Engine(self._settings)

    def __repr__(self) -> str:
        engine: Engine | None = getattr(self, "_engine", None)
        if engine is None:  # an argument was refused
            return "<Client, not set up>"
        state = "open" if engine.is_open else "not open"
        return f"<Client of {self._settings.base_url.host}, {state}, store={self._settings.store!r}>"

    # --- life ----------------------------------------------------------------------------------------------------

    async def open(self) -> Self:
        """Open the store, start the receiver, and take up the unfinished jobs: what `async with` does. Once it is
        open, another call changes nothing. Close it by `aclose`.

        Raises `ConfigurationError` (another event loop; a client that was closed: make a new one), `StoreError`.
        """
        await self._engine.open()
        return self

    async def aclose(self) -> None:
        """Stop everything; unfinished jobs stay in the store, and their waiters get `ClientClosed`. It may be called
        again. Cancelled, it stops waiting for what is under way, and leaves nothing behind all the same. Raises
        `ConfigurationError` in another event loop."""
        await self._engine.close()

    async def __aenter__(self) -> Self:
        self._engine.enter()
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    # --- jobs ----------------------------------------------------------------------------------------------------

    async def submit(
        self, request: Request[R], *, key: str | None = None, metadata: Mapping[str, str] | None = None
    ) -> Job[R]:
        """Buy one job. The same `key` is the same job for ever: one paid POST, also after a restart. `metadata`: words
        of your own, text by name, at most 16 KiB; the store keeps them with a job that is new (`Job.metadata`).

        Local files of the request are all checked before anything is sent, and uploaded before anything is bought,
        each content once per client; an upload that fails means that nothing was bought.

        Raises `InvalidRequest` (nothing was sent), `NotSent`, `Unauthorized`, `Rejected`, `RateLimited`,
        `ServiceUnavailable` (an upload got 5xx; nothing was bought), `SubmitUncertain` (see `on_uncertain`),
        `ProtocolError` (`charged` says what it means), `StoreError`, `ClientClosed`. A cancelled `submit` either sent
        nothing or the job is in the store.
        """
        return await self._engine.submit(Order(request=request, key=key, metadata=checked_metadata(metadata)))

    async def upload(self, source: Path | bytes | AsyncIterator[bytes]) -> URL:
        """The URL of this picture at the service: JPG, PNG or WebP by its bytes, at most 20 MB. `submit` does this by
        itself for `pathlib.Path`s. The same content is uploaded once; how long the service keeps it is not documented.

        It may take `Timeouts.connect + answer`, and a second for each 64 KiB; it costs nothing, and is repeated when
        it fails. Raises `InvalidRequest`, `NotSent`, `ServiceError`, `ProtocolError`, `ClientClosed`.
        """
        self._engine.check_open()
        return await self._engine.uploads.upload(source)

    @overload
    async def download(
        self, result: Result, to: str | os.PathLike[str], *, what: Literal["video", "thumbnail"] = "video",
        allow_private: bool = False, overwrite: bool = False,
        progress: Callable[[int, int | None], object] | None = None, max_bytes: int = MAX_BYTES,
    ) -> Path: ...  # fmt: skip

    @overload
    async def download(
        self, result: Result, to: str | os.PathLike[str], *, what: Literal["both"],
        allow_private: bool = False, overwrite: bool = False,
        progress: Callable[[int, int | None], object] | None = None, max_bytes: int = MAX_BYTES,
    ) -> tuple[Path, Path]: ...  # fmt: skip

    async def download(
        self, result: Result, to: str | os.PathLike[str], *, what: Literal["video", "thumbnail", "both"] = "video",
        allow_private: bool = False, overwrite: bool = False,
        progress: Callable[[int, int | None], object] | None = None, max_bytes: int = MAX_BYTES,
    ) -> Path | tuple[Path, ...]:  # fmt: skip
        """Fetch the file of a result (`Video`): whole and checked, or not there at all.

        `to`: a file; or a folder (one that exists, or any path that ends in a separator), where the file is called
        `<task_id>.<type>` by its bytes. `what="both"`: video and thumbnail; beside a file that you name the thumbnail
        is called alike. What is cut is resumed, also by a later call, from the `.part` beside the target.
        `allow_private`: also from this machine and private networks, there also by plain http (the simulator).
        `progress`: called with the bytes that are on the disk, and their total or None. `max_bytes`: the cap.

        Raises `DownloadError` (also for a file that exists, unless `overwrite`), `ResultExpired` when the link is dead
        and the service has no other, `IntegrityError` when length or hash are not as announced, `InvalidRequest`,
        `ClientClosed`.
        """
        self._engine.check_open()
        options = DownloadOptions(
            what=what, allow_private=allow_private, overwrite=overwrite, progress=progress, max_bytes=max_bytes
        )
        paths = await self._engine.downloads.download(result, to, options)
        return paths if what == "both" else paths[0]

    async def run(
        self,
        request: Request[R],
        *,
        key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> R:
        """Submit, wait, and give the one result. `timeout`: seconds for all of it (None: `Timeouts.wait`).

        Raises what `submit` and `Job.result` raise; `InvalidRequest` for a request with several outputs, and for a
        timeout that is not above 0.
        """
        if timeout is not None and checked_timeout(timeout) <= 0:
            raise InvalidRequest(f"timeout must be above 0 seconds, or None, not {timeout}. Nothing was sent.")
        limit_s = self._settings.timeouts.wait if timeout is None else timeout
        order = Order(request=request, key=key, metadata=checked_metadata(metadata))
        return cast("R", await self._engine.run(order, limit_s))

    async def retry(self, job: Job[R], *, metadata: Mapping[str, str] | None = None) -> Job[R]:
        """Buy exactly the failed tasks of a job again, as a job of its own whose `retry_of` names the one before: the
        service was paid for them and could not do them, so this is paid again.

        Its key is derived (`order-42~1`, then `~2`), so however many callers ask, and however often, each generation is
        bought once; a retry that failed is itself bought again by `retry(retried)`. `metadata` (None: that of `job`).

        Raises `InvalidRequest` for anything but a failed job (nothing was sent), and what `submit` raises.
        """
        return await self._engine.retry(job, metadata=metadata)

    def map(
        self, items: Items[R], *, in_flight: int = 100, ordered: bool = False, retries: int = 0
    ) -> AsyncGenerator[Finished[R], None]:
        """Buy many jobs, and give each as it finishes: `async for done in client.map(requests)`.

        `items`: requests, or `(key, request)` pairs, of any iterable or asynchronous iterable. It is read lazily: at
        most `in_flight` items are started and not yet taken by the loop, and memory does not grow with its length.
        `ordered`: in the order of the source. One that fails harms no other: look at `Finished.ok` and `.error`.
        With keys a run that was cut short can be repeated: what was bought is not bought again. `retries`: how often
        the failed tasks of an item are bought again (`retry`), each time paid; `results` then joins the good ones in
        task order, and `job` is the last job.

        A service that goes away is waited for, up to 10 minutes, if it has answered before. Nothing is sent but while
        the loop waits for the next result: leaving it, however it happens, submits nothing more. `async with
        contextlib.aclosing(client.map(...)) as results` also ends at once what was started. Jobs that were bought stay
        in the store, and `recover` or the same keys find them. An asynchronous source is closed. What the source
        itself raises is raised when all that was started is done.

        Raises `InvalidRequest` (of a list, keys that name two requests: before anything is sent), `ClientClosed`.
        """
        self._engine.check_open()
        options = MapOptions(in_flight=in_flight, ordered=ordered, retries=retries)
        return FanOut(checked(items), self._engine, options).results()

    @overload
    def job(self, task_id: str) -> Job[Video]: ...

    @overload
    def job(self, task_id: str, *, kind: type[Request[R]]) -> Job[R]: ...

    def job(self, task_id: str, *, kind: type[Request[Any]] = ImageToVideo) -> Job[Any]:
        """A handle on a task whose id was kept elsewhere; no I/O. Awaiting it asks the service, and the store remembers
        it from then on. A task that the store knows already gives its whole job.

        Raises `InvalidRequest` for what cannot be a task id or is not a kind, `ClientClosed`.
        """
        self._engine.check_open()
        return job_of_task(task_id, kind, self._engine.job_context)

    async def find(self, key_or_job_id_or_task_id: str) -> Job[Any] | None:
        """The job with this key, job id or task id; None if the store does not know it.

        Raises `StoreError`, `ClientClosed`, `InvalidRequest` for what is not text.
        """
        self._engine.check_open()
        if not isinstance(key_or_job_id_or_task_id, str):
            raise InvalidRequest(f"find takes a key, a job id or a task id, not {shown(key_or_job_id_or_task_id)}.")
        if not is_name(key_or_job_id_or_task_id):
            return None
        entry = await self._engine.registry.find(key_or_job_id_or_task_id)
        return None if entry is None else Job(entry, self._engine.job_context)

    async def resolve(
        self, key_or_job_id: str, *, task_ids: Iterable[str] | None = None, not_bought: bool = False
    ) -> Job[Any]:
        """Tell a job whose POST has an unknown fate what it bought, as the vendor's list of creations shows it.

        `task_ids`: the ids of its tasks; the job is then awaited as any other. `not_bought=True`: it bought nothing;
        submitting its key again buys it. Give one of the two. The same again changes nothing.

        Raises `InvalidRequest` for a job that is unknown or whose fate is known, and for tasks of another job.
        """
        self._engine.check_open()
        return await resolve(await self.find(key_or_job_id), task_ids, not_bought=not_bought)

    async def recover(self) -> AsyncIterator[Job[Any]]:
        """The unfinished jobs of the store, oldest first. Raises `StoreError`."""
        self._engine.check_open()
        async for record in self._settings.store.unfinished():
            yield self._engine.job_of(record)

    async def jobs(
        self,
        *,
        state: State | str | Collection[State | str] | None = None,
        kind: type[Request[Any]] | str | None = None,
        metadata: Mapping[str, str] | None = None,
        since: float | None = None,
    ) -> AsyncIterator[Job[Any]]:
        """All jobs that the store remembers, the oldest first, read page by page. `state`: in this state, or in one of
        these. `metadata`: with all of these pairs. `since`: made at this time (Unix seconds) or later.

        Raises `InvalidRequest` for what is not one of these, `StoreError`, `ClientClosed`.
        """
        self._engine.check_open()
        query = checked_query(state, kind, metadata, since)
        async for record in self._settings.store.jobs(query):
            yield self._engine.job_of(record)

    async def completed(self, *, lease: float = 300.0) -> AsyncGenerator[Job[Any], None]:
        """Every job that has ended and was not acknowledged, the oldest end first, then those that end from now on,
        until the loop is left: `async for job in client.completed(): ...; await job.ack()`.

        At least once: a job that is not acknowledged within `lease` seconds is given again, to whichever process asks,
        also after a crash; until then no other consumer of the store has it. Jobs come in the states done, failed,
        expired and unknown. Nothing is claimed before the loop asks for it.

        Raises `InvalidRequest` (a lease that is not above 0), `StoreError` (nothing is lost), `ClientClosed`.
        """
        self._engine.check_open()
        async with aclosing(self._engine.consumers.jobs(checked_lease(lease))) as entries:
            async for entry in entries:
                yield Job(entry, self._engine.job_context)

    async def purge(self, *, older_than: float) -> int:
        """Forget the jobs that ended more than `older_than` seconds ago, and give their space back; returns how many.
        Where `completed` is used, jobs that were not acknowledged stay. A key that was forgotten buys again.

        Raises `InvalidRequest` (not a number of seconds, 0 or more), `StoreError`, `ClientClosed`.
        """
        self._engine.check_open()
        return await self._settings.store.purge(checked_age(older_than), now=self._settings.clock.time())

    def stats(self) -> Stats:
        """What this client has seen since it was opened, as plain numbers; no I/O."""
        return self._engine.stats()
