"""`xiling batch`: buy every row of a file, keep the results in a folder, and show them on a page."""

from __future__ import annotations

import asyncio
import shlex
from pathlib import Path
from typing import Annotated, Final

import typer
from attrs import evolve, field, frozen

from xiling_async._internal.clock import SystemClock
from xiling_async.cli import output, runtime, session
from xiling_async.cli.batch import callback_port, display, gallery, run
from xiling_async.cli.batch import input as rows
from xiling_async.cli.batch.gallery import Page, Phase, Status
from xiling_async.cli.batch.input import FileContent, Row, RowProblem
from xiling_async.cli.batch.run import BatchRun, BatchSaver
from xiling_async.cli.batch.state import BatchState
from xiling_async.cli.output import count
from xiling_async.cli.report import Stopped
from xiling_async.cli.session import Session
from xiling_async.client import Client
from xiling_async.errors import Charged, ConfigurationError, InvalidRequest
from xiling_async.kinds.image_to_video import ImageToVideo
from xiling_async.models import settings
from xiling_async.models.record import NOT_BOUGHT, JobRecord
from xiling_async.models.settings import Limits, Polling, Timeouts
from xiling_async.stores import SQLiteStore
from xiling_async.webhooks.receiver import WebhookReceiver

STORE: Final = "jobs.db"
IN_FLIGHT: Final = 100


def batch(
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, metavar="JOBS", help="A .jsonl or .csv file, one row a job.")
    ],
    *,
    out: Annotated[
        Path, typer.Option(file_okay=False, metavar="FOLDER", help="For everything: videos, page, results, jobs.db.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check the file; send nothing.")] = False,
    skip_invalid: Annotated[
        bool, typer.Option("--skip-invalid", help="Go on without the rows that are not valid.")
    ] = False,
    in_flight: Annotated[int, typer.Option(min=1, metavar="JOBS", help="How many jobs at once.")] = IN_FLIGHT,
    retries: Annotated[
        int, typer.Option(min=0, metavar="N", help="Buy failed tasks again, up to N times; each time is paid.")
    ] = 0,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Buy what failed in earlier runs once more; it is paid.")
    ] = False,
    max_videos: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Buy at most N videos in this run; a later run goes on.")
    ] = None,
    public_url: session.PublicUrlOption = None,
    port: session.PortOption = None,
    timeout: session.TimeoutOption = session.WAIT_S,
    poll_every: session.PollOption = None,
    base_url: session.BaseUrlOption = None,
) -> None:
    """Buy every row of a file, and keep the results in a folder.

    A row has the fields of the API: model, prompt, image_url, end_image_url, reference_images, aspect_ratio,
    aspect_resolution, duration, generate_audio, generate_count. A picture is a URL or a local file, seen from the jobs
    file; in CSV, several are separated by "|". `key` names a job; else its name is made of the row's content. The same
    key is the same job: it is bought once, however often the command runs.

    Every row and every picture is checked before anything is sent; what is wrong is listed with its line. The folder
    gets the videos, index.html (a page to look at, it grows meanwhile), results.jsonl (a line a task) and jobs.db.
    After Ctrl-C, a crash or a failure the same command goes on, and buys nothing twice.

    What the service could not make was paid for all the same. --retries N buys the failed tasks of a row again, up to N
    times in all runs together. --retry-failed buys, once in each run, what had failed for good before it. Only failed
    tasks are bought again; the others keep their videos.

    Exit codes: 0 every row succeeded (with --skip-invalid: every valid one) and is saved; 1 some did not; 2 the options
    or rows are wrong, nothing was sent; 3 some are still running after --timeout, all others succeeded; 130 Ctrl-C.

    \b
    Examples:
      xiling batch jobs.csv --out clips --dry-run
      xiling batch jobs.csv --out clips
    """
    of = Batch(
        file=file, place=out, in_flight=in_flight, skip_invalid=skip_invalid, store=out / STORE, base_url=base_url,
        public_url=public_url, port=port, timeout=timeout, poll_every=poll_every, retries=retries,
        max_videos=max_videos,
    )  # fmt: skip
    of.check()
    of.execute(dry_run=dry_run, retry_failed=retry_failed)


# --- what is to be bought ------------------------------------------------------------------------------------------


async def looked_up(
    content: FileContent, path: Path, *, read_only: bool
) -> tuple[FileContent, dict[str, list[JobRecord]]]:
    """The same rows held against what the store in this file remembers, and the jobs that it has of them.

    Raises `StoreError`.
    """
    if not await asyncio.to_thread(path.exists):
        return content, {}
    store = SQLiteStore(path, read_only=read_only)  # held by another batch, it is refused before the page is touched
    await store.open()
    try:
        known_jobs = {row.key: jobs for row in content.rows if (jobs := await run.jobs_of(store, row.key))}
    finally:
        await store.close()
    rows_now = tuple(_as_bought(row, known_jobs[row.key][0]) if row.key in known_jobs else row for row in content.rows)
    taken = [
        RowProblem(
            row.line, f"key={row.key!r}: already names a job with another request in {path}; accepted: a new key"
        )
        for row in rows_now
        if row.key in known_jobs and known_jobs[row.key][0].request != row.request
    ]
    return FileContent(rows_now, content.flaws).without(taken), known_jobs


def _as_bought(row: Row, record: JobRecord) -> Row:
    """The row with its pictures where they were when it was bought: the folder of the batch may have moved since.

    A key made of the content says that the names are the same.
    """
    if not row.is_derived or record.state in NOT_BOUGHT:
        return row
    return evolve(row, request=record.request) if isinstance(record.request, ImageToVideo) else row


@frozen(kw_only=True)
class Batch(Session):
    """One run of the command. `place`: the folder of everything."""

    file: Path
    place: Path
    in_flight: int
    skip_invalid: bool
    retries: int
    max_videos: int | None
    state: BatchState = field(factory=lambda: BatchState(began_at=SystemClock().time()))

    def execute(self, *, dry_run: bool, retry_failed: bool) -> None:
        """The whole command. Raises `typer.Exit` with its code for rows that did not succeed."""
        out = output.console()
        content, known = runtime.run(looked_up(rows.read(self.file), self.place / STORE, read_only=dry_run))
        for row in self.valid(content):
            self.state.add(row, known.get(row.key, ()), retries=self.retries, retry_failed=retry_failed)
        if dry_run:
            display.dry_run_summary(out, self.state, skipped=content.flawed, max_videos=self.max_videos)
            return
        self.buy_all()
        display.summary(out, self.state, self.place, skipped=content.flawed)
        statuses = {entry.status() for entry in self.state.bad}
        if statuses:
            raise typer.Exit(3 if statuses == {Status.RUNNING} else 1)

    def valid(self, content: FileContent) -> tuple[Row, ...]:
        """The rows to buy. Raises `InvalidRequest` with every flaw, unless rows may be left out."""
        message = (
            f"{content.flawed} of {count(len(content.rows) + content.flawed, 'row')} in {self.file} cannot be bought"
        )
        if content.flaws and not (self.skip_invalid and content.rows):
            raise InvalidRequest("\n".join([f"{message}. Nothing was sent.", *map(str, content.flaws)]))
        for line in [message, *map(str, content.flaws)] if content.flaws else []:
            output.say(self.out, line)
        return content.rows

    def buy_all(self) -> None:
        """Buy what is not bought yet, and save all of it. Raises `Stopped`, and what ends the whole batch."""
        if gallery.is_foreign(self.place):
            raise ConfigurationError(
                f"{self.place / gallery.NAME} is not a page of this command. Nothing was sent: choose another --out."
            )
        phase = Phase.STOPPED
        try:
            runtime.run(self.interruptible(self._buy_all()))
            phase = Phase.FINISHED
        except (asyncio.CancelledError, KeyboardInterrupt):
            raise self.stopped() from None
        finally:
            if self.place.is_dir() and (message := run.write_page(self.page, phase)):
                output.say(self.out, message)

    async def _buy_all(self) -> None:
        # The simulator's files are on this machine too; those of the real service never are.
        allow_private = settings.is_loopback(settings.base_url(self.base_url).host)
        receiver = await asyncio.to_thread(self._receiver_again)
        client = Client(
            base_url=self.base_url,
            receiver=receiver,
            store=self.jobs,
            limits=Limits(outputs=self.max_videos),
            timeouts=Timeouts(wait=self.timeout),
            polling=Polling(every=self.poll_every),
            on_event=self.watch.on_event,
        )
        for entry in self.state.entries.values():
            for record in entry.jobs.values():
                self.watch.follow(record)
        saver = BatchSaver(self.place, client, allow_private=allow_private)
        await saver.make()
        with output.logged_errors(self.out):
            async with display.BatchDisplay(self.out, self.state, self.watch) as shown, client:
                if receiver is not None and receiver.port and self.port == 0:
                    await asyncio.to_thread(callback_port.keep, self.place, receiver.port)
                await BatchRun(client, self.jobs, self.state, saver, self.page, shown).run(self.in_flight)

    def _receiver_again(self) -> WebhookReceiver | None:
        """The receiver; for `--port 0` where the one of an earlier run was, so that it hears what that one awaited."""
        port = callback_port.saved(self.place) if self.port == 0 else None
        if port is None:
            return self._receiver()
        if callback_port.is_free(port):
            return evolve(self, port=port)._receiver()
        output.say(self.out, f"Port {port} of the earlier run is taken: callbacks of its uncertain rows cannot arrive.")
        return self._receiver()

    def page(self, phase: Phase) -> tuple[Path, Page]:
        """Where the page is, and what is on it now."""
        note = "" if phase is Phase.RUNNING or not self.state.unfinished else f"Go on with: {self.again}"
        clips = self.state.clips()
        return self.place, Page(
            title=self.file.name, clips=clips, phase=phase, written_at=SystemClock().time(), note=note
        )

    @property
    def again(self) -> str:
        """The same command."""
        values = {
            "--in-flight": None if self.in_flight == IN_FLIGHT else self.in_flight,
            "--retries": self.retries or None,
            "--max-videos": self.max_videos,
            "--base-url": self.base_url,
            "--public-url": self.public_url,
            "--port": self.port,
            "--timeout": None if self.timeout == session.WAIT_S else f"{self.timeout:g}",
            "--poll-every": None if self.poll_every is None else f"{self.poll_every:g}",
        }
        options = [str(word) for name, value in values.items() if value is not None for word in (name, value)]
        flags = ["--skip-invalid"] if self.skip_invalid else []
        return shlex.join(["xiling", "batch", str(self.file), "--out", str(self.place), *flags, *options])

    def stopped(self) -> Stopped:
        """What Ctrl-C leaves behind."""
        steps = self.state.steps
        message = ", ".join(f"{steps[step]} {step}" for step in display.STEPS if steps[step])
        charged: Charged = "yes" if any(entry.bought for entry in self.state.entries.values()) else "no"
        return Stopped(
            f"Stopped. {count(len(self.state.entries), 'row')}: {message}. Nothing is lost: run the same command to go "
            f"on; it buys nothing twice: {self.again}",
            charged=charged,
        )
