"""What `submit`, `wait` and `download` share: options, a watched client, Ctrl-C, a job awaited to its ending."""

from __future__ import annotations

import asyncio
import shlex
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import typer
from attrs import Factory, evolve, field, frozen
from rich.console import Console

from xiling_async._internal.clock import SystemClock
from xiling_async.api.failures import error_of
from xiling_async.cli import output, progress, runtime
from xiling_async.cli.report import Ending, Stopped, as_json, message_of, paths, raise_errors, urls, without_link
from xiling_async.cli.saving import Saver, unsaved
from xiling_async.cli.watch import Watch
from xiling_async.client import Client
from xiling_async.errors import Rejected, Unauthorized, WaitTimeout, XilingError
from xiling_async.jobs.job import Job
from xiling_async.models import settings
from xiling_async.models.record import NOT_BOUGHT, JobRecord, State, Succeeded
from xiling_async.models.settings import Polling, Timeouts
from xiling_async.stores import MemoryStore, SQLiteStore, Store
from xiling_async.webhooks.receiver import WebhookReceiver

T = TypeVar("T")

StoreOption = Annotated[
    Path | None, typer.Option(dir_okay=False, metavar="FILE", help="Remember jobs in this SQLite file.")
]
BaseUrlOption = Annotated[
    str | None, typer.Option(metavar="URL", help="Of the API; else XILING_BASE_URL, else the real service.")
]
PublicUrlOption = Annotated[
    str | None, typer.Option(metavar="URL", help="Where the service can call back; needs --port.")
]
PortOption = Annotated[
    int | None,
    typer.Option(
        min=0, max=65535, help="Take callbacks on this port of 127.0.0.1; alone only with a service on this machine."
    ),
]
TimeoutOption = Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="How long to wait for the videos.")]
PollOption = Annotated[
    float | None,
    typer.Option(min=0.1, metavar="SECONDS", help="Between two questions to the service; else 30, less often later."),
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        file_okay=False, writable=True, metavar="FOLDER",
        help="Download each video into this folder, made when missing; stdout gets its path instead of the URL.",
    ),
]  # fmt: skip
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object a job on stdout, also when it fails.")]

WAIT_S: Final = Timeouts().wait
WAITING: Final = (
    f"waiting for the answer to a paid request, up to {Timeouts().connect + Timeouts().answer:g} s; "
    "Ctrl-C again ends at once"
)
VENDORS_LIST: Final = "look at the vendor's own list of creations before you submit it again."
RESOLVE: Final = "look at the vendor's own list of creations, and say what it bought with `xiling resolve`."


@frozen(kw_only=True)
class Session:
    """The options that these commands have. `folder`: results are saved there; `what`, `overwrite`: as of `Saver`."""

    store: Path | None  # the file of `jobs`; None: they are kept in memory
    base_url: str | None
    public_url: str | None
    port: int | None
    timeout: float
    poll_every: float | None
    folder: Path | None = None
    what: str | None = None
    overwrite: bool = False
    jobs: Store = field(init=False, repr=False)
    watch: Watch = field(default=Factory(lambda self: Watch(self.jobs), takes_self=True), init=False)
    out: Console = field(factory=lambda: output.console(stderr=True))
    saver: Saver | None = field(init=False, repr=False)

    @property
    def takes_callbacks(self) -> bool:
        return self.port is not None

    @jobs.default
    def _store_of_file(self) -> Store:
        return MemoryStore() if self.store is None else SQLiteStore(self.store)

    @saver.default
    def _saver_of_folder(self) -> Saver | None:
        if self.folder is None:
            return None
        return Saver(self.folder, self.out, what=self.what, overwrite=self.overwrite)

    @property
    def files(self) -> Mapping[str, Sequence[Path]] | None:
        """What was saved, by task; None where nothing shall be."""
        return None if self.saver is None else self.saver.files

    def check(self) -> None:
        """Raises a usage error for options that need another."""
        if self.public_url is not None and self.port is None:
            raise typer.BadParameter(
                "needs --port: where this command listens for callbacks", param_hint="--public-url"
            )

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Client]:
        """A client whose jobs are shown until it is closed. Raises what `Client` raises."""
        client = Client(
            base_url=self.base_url,
            receiver=self._receiver(),
            store=self.jobs,
            timeouts=Timeouts(wait=self.timeout),
            polling=Polling(every=self.poll_every),
            on_event=self.watch.on_event,
        )
        if self.saver is not None:
            await self.saver.make()
        below = None if self.saver is None else self.saver.bars
        with output.logged_errors(self.out):
            async with progress.JobsDisplay(self.out, self.watch, below), client:
                yield client

    def _receiver(self) -> WebhookReceiver | None:
        if self.port is None:
            return None
        if self.public_url is None and self.port:
            return WebhookReceiver(f"http://127.0.0.1:{self.port}", port=self.port)
        return WebhookReceiver(self.public_url, port=self.port)

    # --- running -------------------------------------------------------------------------------------------------

    def run(self, work: Coroutine[Any, Any, list[Ending]]) -> list[Ending]:
        """Run this to its end. Ctrl-C ends the waiting in good order; what went wrong is in the endings."""
        try:
            return runtime.run(self.interruptible(work))
        except XilingError as error:
            return [Ending(self.watch.last, error)]
        except (asyncio.CancelledError, KeyboardInterrupt):
            return [Ending(self.watch.last if len(self.watch.jobs) == 1 else None, self.stopped())]

    async def interruptible(self, work: Coroutine[Any, Any, T]) -> T:
        """The first Ctrl-C (or SIGTERM) cancels the work: the client closes, and waits for the answer of a POST. The
        second one does not wait for that answer. The third one is Python's own."""
        loop = asyncio.get_running_loop()
        task = loop.create_task(work, name="xiling command")
        presses = 0

        def pressed() -> None:
            nonlocal presses
            presses += 1
            if presses == 1 and any(record.state is State.SENDING for record in self.watch.jobs.values()):
                output.say(self.out, WAITING)
            elif presses == 2:
                _on_signals(loop, None)
            task.cancel()

        _on_signals(loop, pressed)
        try:
            return await task
        finally:
            _on_signals(loop, None)

    # --- waiting -------------------------------------------------------------------------------------------------

    async def ending_of(self, job: Job[Any], *, ask_now: bool = False) -> Ending:
        """Await this job. `ask_now`: a key or a task that the service does not know is heard of at once."""
        clock = SystemClock()
        until = clock.time() + self.timeout
        error: XilingError | None = None
        try:
            if ask_now:
                with suppress(TimeoutError):
                    async with clock.timeout(self.timeout):
                        await self._ask(job)
            record = await self.jobs.get(job.id)
            if record is not None:
                self.watch.follow(record)
                if record.state is State.UNCERTAIN and not self.takes_callbacks:
                    raise in_doubt(record, job)
            await job.result(max(until - clock.time(), 0))
        except WaitTimeout as over:
            error = self._timed_out(over)
        except XilingError as caught:
            error = caught
        await self.watch.refresh()
        return Ending(self.watch.jobs.get(job.id), error)

    async def _ask(self, job: Job[Any]) -> None:
        try:
            await job.refresh()
        except Unauthorized:
            raise
        except XilingError as error:
            if isinstance(error, Rejected) and self.store is None:  # one that a store remembers may become known yet
                message = error.service_message or f"HTTP {error.status}"
                raise Rejected(f"The service does not know the task {job.task_ids[0]} ({message}).") from None
            output.say(self.out, message_of(error))

    def _timed_out(self, over: WaitTimeout) -> WaitTimeout:
        record = self.watch.jobs.get(over.job_id or "")
        if record is None:
            return over
        return WaitTimeout(
            f"Not finished within {self.timeout:g} s: {self._left(record)}. {self._way_back(record)}",
            charged=over.charged if self.watch.is_confirmed(record) else "maybe",
            job=over.job,
            job_id=over.job_id,
            task_ids=over.task_ids,
        )

    # --- saving --------------------------------------------------------------------------------------------------

    async def saved(self, client: Client, ending: Ending) -> Ending:
        """The same ending, with every good result of a job that is over in the folder; without one, checked."""
        record = ending.record
        if record is None or not (record.state.is_final or self.what):
            return ending
        if self.saver is None:
            return evolve(ending, unsaved=without_link(record))
        results = [outcome.result for outcome in record.outcomes if isinstance(outcome, Succeeded)]
        # The simulator's files are on this machine too; those of the real service never are.
        allow_private = settings.is_loopback(settings.base_url(self.base_url).host)
        errors = await self.saver.save(client, results, allow_private=allow_private)
        if not errors:
            return ending
        return evolve(ending, unsaved=unsaved(errors, len(results), partial(self.command, "download")))

    # --- what to do next -----------------------------------------------------------------------------------------

    def stopped(self) -> Stopped:
        """What Ctrl-C leaves behind."""
        records = [record for record in self.watch.jobs.values() if record.state not in NOT_BOUGHT]
        if not records:
            return Stopped("Stopped. Nothing was bought.")
        is_sure = all(record.task_ids and self.watch.is_confirmed(record) for record in records)
        return Stopped(
            f"Stopped: {'; '.join(map(self._left, records))}. {self._way_back(*records)}",
            charged="yes" if is_sure else "maybe",
            job_id=records[0].id if len(records) == 1 else None,
            task_ids=[task_id for record in records for task_id in record.task_ids],
        )

    def _left(self, record: JobRecord) -> str:
        if record.state is State.ACCEPTED and not self.watch.is_confirmed(record):
            return f"the service has not confirmed task {', '.join(record.task_ids)}: it may not exist"
        return _left(record)

    def _way_back(self, *records: JobRecord) -> str:
        """How these jobs are awaited again."""
        names = [record.key or record.id for record in records]
        if self.store is None:
            names = [task_id for record in records for task_id in record.task_ids]
        if not names or not (self.takes_callbacks or all(record.task_ids for record in records)):
            return f"Nothing will tell of it: {VENDORS_LIST if self.store is None else RESOLVE}"
        same = (
            "The same command goes on waiting, and buys nothing; so does" if _has_key(records) else "Go on waiting with"
        )
        return f"{same}: {self.command('wait', names)}"

    def command(self, name: str, arguments: Sequence[str]) -> str:
        """A command line with the same options."""
        options = [] if self.store is None else ["--store", str(self.store)]
        options += [] if self.base_url is None else ["--base-url", self.base_url]
        options += [] if self.folder is None else ["--out", str(self.folder)]
        options += ["--what", self.what] if self.what not in (None, "video") and name == "download" else []
        return shlex.join(["xiling", name, *options, *_safe(arguments)])


def deliver(
    endings: Sequence[Ending],
    *,
    machine: bool = False,
    ids_only: bool = False,
    files: Mapping[str, Sequence[Path]] | None = None,
) -> None:
    """Results on standard output; then raise what kept jobs from succeeding. `files`: their paths are the results."""
    out = output.console()
    for ending in endings:
        if machine:
            output.write(out, as_json(ending, files))
        elif ending.record is not None and ids_only and ending.error is None:
            output.write(out, " ".join([ending.record.id, *ending.record.task_ids]))
        elif ending.record is not None and files is not None:
            for path in paths(ending.record, files):
                output.write(out, path)
        elif ending.record is not None and ending.record.state.is_final:
            for url in urls(ending.record):
                output.write(out, url)
    raise_errors(endings)


def in_doubt(record: JobRecord, job: Job[Any]) -> XilingError:
    """Why waiting for this job is useless: it is uncertain, and no receiver takes its callback."""
    error = error_of(record, job=job)
    assert error is not None, "it is uncertain"
    return error


def _left(record: JobRecord) -> str:
    """A job that is no longer awaited."""
    names = f"job {record.id}" + (f" (tasks {', '.join(record.task_ids)})" if record.task_ids else "")
    match record.state:
        case State.SENDING:
            return f"{names} was being sent, no answer yet: it may have been bought, and is never sent again"
        case State.ACCEPTED:
            return f"{names} is bought, and goes on at the service"
        case State.UNCERTAIN | State.UNKNOWN:
            return f"{names} was sent, and its fate is not known"
        case state:
            return f"{names} is {state.value}"


def _has_key(records: Sequence[JobRecord]) -> bool:
    return all(record.key is not None for record in records)


def _safe(names: Sequence[str]) -> list[str]:
    """A name may look like an option."""
    return [*(["--"] if any(name.startswith("-") for name in names) else []), *names]


def _on_signals(loop: asyncio.AbstractEventLoop, what: Callable[[], None] | None) -> None:
    """Call this on Ctrl-C and on SIGTERM; None: as it was. Not everywhere can a loop do that (Windows, a thread)."""
    for number in (signal.SIGINT, signal.SIGTERM):
        with suppress(NotImplementedError, RuntimeError, ValueError):
            if what is None:
                loop.remove_signal_handler(number)
            else:
                loop.add_signal_handler(number, what)
