"""One job's misbehaviour x everything that jobs share: an honest job beside it ends as fast, and is paid for once.

Each cell of the table is a test. The clock stands still unless the honest work moves it by what it takes alone: work
that has to wait for its neighbour does not end.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sqlite3
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest
from hosts import Host, answer
from open_port import connected
from support import callback_body, client_of, http, model_v, plain_session, port_of, post, pumped, settle, token_of

from xiling_async import (
    Client,
    ImageToVideo,
    Job,
    Limits,
    MemoryStore,
    Polling,
    ReceiverOptions,
    SQLiteStore,
    Timeouts,
    Video,
    WebhookReceiver,
    XilingError,
    simulator,
)
from xiling_async.simulator import Simulator, faults
from xiling_async.testing.clock import ManualClock

T = TypeVar("T")

PICTURE: Final = Path(simulator.__file__).with_name("media") / "samples" / "landscape.webp"
HANG_S: Final = 20.0  # of real time: far beyond what anything here takes
POLL_S: Final = 10.0
STALL_S: Final = 60.0
PER_SECOND: Final = 2.0  # submits, where they have a rate
GETS_PER_SECOND: Final = 20.0
HONEST: Final = "honest"
HATED: Final = "hated"  # the key of a job that makes the hook raise


class Scene:
    """A client with few slots of everything, a simulator, and what a misbehaviour has to undo at the end."""

    def __init__(self, sim: Simulator, folder: Path) -> None:
        self.sim = sim
        self.folder = folder
        self.clock = ManualClock()
        self.undo = AsyncExitStack()
        self._hated: set[str] = set()
        self._raises = itertools.cycle([RuntimeError("a hook that raises"), asyncio.CancelledError()])

    @asynccontextmanager
    async def opened(self, *, has_rate: bool, is_on_disk: bool) -> AsyncIterator[None]:
        self._has_rate, self._is_on_disk = has_rate, is_on_disk
        self.client = await self._make().open()
        try:
            async with self.undo:
                yield
        finally:
            await pumped(self.clock, self.client.aclose(), step_s=60)

    async def reopen(self, between: Callable[[], object]) -> None:
        """Close the client, call this in a thread, and open another one with the same store."""
        await pumped(self.clock, self.client.aclose())
        await asyncio.to_thread(between)
        self.client = await self._make().open()

    def _make(self) -> Client:
        rate = PER_SECOND if self._has_rate else None
        return client_of(
            self.sim,
            store=SQLiteStore(self.folder / "jobs.db") if self._is_on_disk else MemoryStore(),
            receiver=WebhookReceiver(port=0, options=ReceiverOptions(connections=64)),
            limits=Limits(submits=2, downloads=2, gets_per_second=GETS_PER_SECOND, submits_per_second=rate),
            timeouts=Timeouts(connect=600, answer=600, stall=STALL_S),
            polling=Polling(every=POLL_S, grace=POLL_S),
            save_to=self.folder / "clips",
            allow_private=True,
            on_event=self._hook,
            clock=self.clock,
        )

    def _hook(self, event: Any) -> None:
        if getattr(event, "key", None) == HATED:
            self._hated.add(event.job_id)
        if getattr(event, "job_id", None) in self._hated:
            raise next(self._raises)

    # --- the one that misbehaves

    async def buy(self, *given: faults.Fault, count: int = 1, key: str | None = None) -> Job[Video]:
        self.sim.script(*given)
        return await self.driven(self.client.submit(model_v("bad", count=count), key=key))

    async def driven(self, work: Coroutine[Any, Any, T]) -> T:
        """Where submits have a rate, its own turns come."""
        return await (pumped(self.clock, work, step_s=1 / PER_SECOND) if self._has_rate else work)

    @property
    def url(self) -> str:
        """Where the callbacks of the job go that was bought last."""
        return str(self.sim.ledger.posts[-1].callback_url)

    def begin(self, work: Coroutine[Any, Any, Any]) -> None:
        """Goes on beside the honest job, whatever becomes of it."""
        task = asyncio.create_task(work)

        async def end() -> None:
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                assert isinstance(task.exception(), XilingError | None)

        self.undo.push_async_callback(end)

    # --- the honest one

    async def honest(self, *given: faults.Fault, **options: Any) -> Job[Video]:
        if given:
            self.sim.script(*given)
        return await self.client.submit(model_v(HONEST), **options)

    async def within(self, windows_s: float, work: Coroutine[Any, Any, None]) -> None:
        """Run this to its end; it may have to wait for the end of the window of a transfer that stalls, or of one that
        began before it came into the queue."""
        task = asyncio.create_task(work)
        for _ in range(10 if windows_s else 0):
            for _ in range(2_000):
                await asyncio.sleep(0)
                if task.done():
                    break
            self.clock.advance(0.0 if task.done() else windows_s / 5)
        await task

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(HANG_S):
            while not holds():
                await asyncio.sleep(0)


Act = Callable[[Scene], Coroutine[Any, Any, None]]


# --- how one job misbehaves ------------------------------------------------------------------------------------------


async def nothing(scene: Scene) -> None:
    """For comparison."""


async def its_media_host_answers_429(scene: Scene) -> None:
    host = await scene.undo.enter_async_context(Host(lambda seen, number: answer(429, b"", "Retry-After: 300")))
    for _ in range(3):
        await scene.buy(faults.callback_fields(video_url=host.url), count=4)
    await scene.until(lambda: host.connections >= 1)


class DrippingHost(Host):
    """Sends the beginning of a file, and then keeps its client waiting."""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer(200, b"\0\0\0\x18ftyp", "Content-Type: video/mp4", length=1_000_000))
        await reader.read()
        writer.close()


async def its_media_host_drips(scene: Scene) -> None:
    host = await scene.undo.enter_async_context(DrippingHost())
    for _ in range(3):
        await scene.buy(faults.callback_fields(video_url=host.url), count=4)
    await scene.until(lambda: host.connections >= 2)


async def its_video_urls_are_hostile(scene: Scene) -> None:
    for url in ("https://./x.mp4", "http://[::1", "file:///etc/passwd", f"https://{'b' * 64}.com/x", "\x1b[2J", "/"):
        await scene.buy(faults.callback_fields(video_url=url), count=2)


async def its_callbacks_stall_in_their_bodies(scene: Scene) -> None:
    job = await scene.buy(faults.lost_callback())
    body = callback_body(job.task_ids[0])
    for _ in range(40):
        _, writer = await scene.undo.enter_async_context(connected(port_of(scene.url)))
        writer.write(http(f"/{token_of(scene.url)}", body[:5], length=len(body)))
    await settle(200)


async def its_callbacks_come_in_a_flood(scene: Scene) -> None:
    job = await scene.buy(faults.lost_callback())
    url, session = scene.url, await scene.undo.enter_async_context(plain_session())
    bodies = [callback_body(job.task_ids[0], status) for status in ("PROCESSING", "SUCCEEDED", "FAILED")]

    async def flood() -> None:
        for round_ in range(4):
            await asyncio.gather(*(post(session, url, bodies[(round_ + n) % 3]) for n in range(40)))

    scene.begin(flood())
    await settle()


async def its_callbacks_are_garbage(scene: Scene) -> None:
    await scene.buy(faults.lost_callback())
    url, session = scene.url, await scene.undo.enter_async_context(plain_session())
    bodies = (b"[" * 200_000, b"{" + b" " * 300_000, b"\xff", callback_body("i2v-strange"), callback_body(["x"]))

    async def flood() -> None:
        for _ in range(10):
            await asyncio.gather(*(post(session, url, body) for body in bodies))

    scene.begin(flood())
    await settle()


async def its_answer_has_20_000_ids(scene: Scene) -> None:
    with contextlib.suppress(XilingError):
        await scene.buy(faults.answer_data({"task_ids": [f"i2v-made-up-{number}" for number in range(20_000)]}))


async def its_answer_is_garbage(scene: Scene) -> None:
    for body in (b"<html>", b'{"code": 0, "data": {"task_ids": [null, 7]}}', b"\0" * 100_000):
        with contextlib.suppress(XilingError):
            await scene.buy(faults.garbage(body))


async def its_answer_never_comes(scene: Scene) -> None:
    posts = len(scene.sim.ledger.posts)
    scene.begin(scene.buy(faults.hang()))
    await scene.sim.wait_for_posts(posts + 1)


async def _asked_in_vain(scene: Scene, fault: faults.Fault) -> None:
    job = await scene.buy(faults.lost_callback(), fault)
    for _ in range(12):
        gets = len(scene.sim.ledger.gets)
        refresh = asyncio.create_task(_refreshed(job))
        await settle()
        scene.clock.advance(1 / GETS_PER_SECOND)
        await scene.until(refresh.done)
        assert len(scene.sim.ledger.gets) > gets


async def _refreshed(job: Job[Video]) -> None:
    with contextlib.suppress(XilingError):
        await job.refresh()


async def its_status_is_404_for_ever(scene: Scene) -> None:
    await _asked_in_vain(scene, faults.no_status_endpoint())


async def its_status_is_500_for_ever(scene: Scene) -> None:
    await _asked_in_vain(scene, faults.status_fault(*(500,) * 1_000))


async def a_hook_raises_on_it(scene: Scene) -> None:
    job = await scene.buy(key=HATED)
    await scene.until(lambda: job.state.is_final)


async def its_row_cannot_be_read(scene: Scene) -> None:
    job = await scene.buy(faults.lost_callback(), key="unreadable")

    def spoil() -> None:
        with contextlib.closing(sqlite3.connect(scene.folder / "jobs.db")) as connection, connection:
            changed = connection.execute("UPDATE jobs SET tasks = '[[', due_at = 0 WHERE id = ?", (job.id,))
            assert changed.rowcount == 1

    await scene.reopen(spoil)


async def its_callers_are_cancelled(scene: Scene) -> None:
    callers = [
        asyncio.create_task(scene.client.submit(model_v("bad"), key=f"bad-{number % 5}")) for number in range(20)
    ]
    await settle(3)
    for caller in callers:
        caller.cancel()
    await asyncio.wait(callers)


def picture(folder: Path, name: str) -> ImageToVideo:
    path = folder / f"{name}.webp"
    path.write_bytes(PICTURE.read_bytes() + name.encode())
    return ImageToVideo(
        model="V", prompt=name, image_url=path, aspect_ratio="16:9", aspect_resolution="1080p", duration=8
    )


async def its_uploads_hang(scene: Scene) -> None:
    for number in range(3):
        scene.sim.script_upload(faults.hang_before_accept())
        scene.begin(scene.client.submit(await asyncio.to_thread(picture, scene.folder, f"bad-{number}")))
    await scene.sim.wait_for_uploads(3)


MISBEHAVIOURS: Final[list[Act]] = [
    nothing,
    its_media_host_answers_429,
    its_media_host_drips,
    its_video_urls_are_hostile,
    its_callbacks_stall_in_their_bodies,
    its_callbacks_come_in_a_flood,
    its_callbacks_are_garbage,
    its_answer_has_20_000_ids,
    its_answer_is_garbage,
    its_answer_never_comes,
    its_status_is_404_for_ever,
    its_status_is_500_for_ever,
    a_hook_raises_on_it,
    its_row_cannot_be_read,
    its_callers_are_cancelled,
    its_uploads_hang,
]


# --- what an honest job shares with it -------------------------------------------------------------------------------


async def submit_slots(scene: Scene) -> None:
    """Four submits with two slots."""
    jobs = await asyncio.gather(*(scene.honest() for _ in range(4)))
    assert [len(await job) for job in jobs] == [1] * 4


async def rate_slots(scene: Scene) -> None:
    """It leaves with the next slot."""
    scene.clock.advance(1 / PER_SECOND)
    assert len(await (await scene.honest())) == 1


async def get_pace(scene: Scene) -> None:
    """Its callback is lost: it is found with the first GET that it is due."""
    job = await scene.honest(faults.lost_callback())
    result = asyncio.create_task(job.result())
    await settle()
    scene.clock.advance(1.1 * POLL_S)
    for _ in range(int(GETS_PER_SECOND)):
        for _ in range(1_000):
            await asyncio.sleep(0)
            if result.done():
                break
        scene.clock.advance(1 / GETS_PER_SECOND)
    assert len(await result) == 1


async def throttle(scene: Scene) -> None:
    """A GET and a POST leave at once: nothing is taken to be away, nothing is in a pause."""
    job = await scene.honest(faults.lost_callback())
    scene.clock.advance(1.0)  # GETs that were waiting have left
    await settle(200)
    await asyncio.gather(job.refresh(), scene.honest())
    assert len(await job) == 1
    assert scene.client.stats().paused_until is None


async def download_slots(scene: Scene) -> None:
    """Three downloads with two slots."""
    videos = [(await (await scene.honest()))[0] for _ in range(3)]
    paths = await asyncio.gather(
        *(scene.client.download(video, scene.folder / f"{video.task_id}.mp4", allow_private=True) for video in videos)
    )
    assert len({path.read_bytes() for path in paths}) == 1


async def auto_save(scene: Scene) -> None:
    """The file of `save_to` is there."""
    (path,) = await (await scene.honest()).saved()
    assert path.stat().st_size > 1_000


async def receiver_connections(scene: Scene) -> None:
    """Eight callbacks at once are all answered 200."""
    job = await scene.honest()
    await job
    assert await asyncio.gather(*(scene.sim.callback(job.task_ids[0]) for _ in range(8))) == [200] * 8


async def store(scene: Scene) -> None:
    """It is found by each of its names, and among the unfinished ones."""
    job = await scene.honest(faults.lost_callback(), key="order")
    for name in ("order", job.id, job.task_ids[0]):
        found = await scene.client.find(name)
        assert found is not None
        assert found.id == job.id
    assert job.id in [each.id async for each in scene.client.recover()]


async def a_run_of_map(scene: Scene) -> None:
    """Each of its results comes."""
    results = [done async for done in scene.client.map([model_v(HONEST)] * 4, in_flight=2)]
    assert [done.error for done in results] == [None] * 4


async def upload_slots(scene: Scene) -> None:
    """A submit with a local file."""
    request = await asyncio.to_thread(picture, scene.folder, HONEST)
    assert len(await (await scene.client.submit(request))) == 1


RESOURCES: Final[list[Act]] = [
    submit_slots,
    rate_slots,
    get_pace,
    throttle,
    download_slots,
    auto_save,
    receiver_connections,
    store,
    a_run_of_map,
    upload_slots,
]

JOBS: Final[dict[Act, int]] = {submit_slots: 4, throttle: 2, download_slots: 3, a_run_of_map: 4}  # honest ones; else 1


# --- the table -------------------------------------------------------------------------------------------------------


def _name(function: Callable[..., object]) -> str:
    return function.__name__.replace("_", " ")


@pytest.mark.parametrize("resource", RESOURCES, ids=_name)
@pytest.mark.parametrize("misbehaviour", MISBEHAVIOURS, ids=_name)
async def test_an_honest_job_does_not_notice_its_neighbour(misbehaviour: Act, resource: Act, tmp_path: Path) -> None:
    """It ends with the clock where it would be without the neighbour, and the service was paid for it once."""
    is_on_disk = misbehaviour is its_row_cannot_be_read or resource is store
    async with Simulator() as sim:
        scene = Scene(sim, tmp_path)
        async with scene.opened(has_rate=resource is rate_slots, is_on_disk=is_on_disk):
            async with asyncio.timeout(HANG_S):
                await misbehaviour(scene)
            async with asyncio.timeout(HANG_S):
                stalls = misbehaviour is its_media_host_drips and resource in (download_slots, auto_save)
                await scene.within(STALL_S if stalls else 0.0, resource(scene))
        posts = [post for post in sim.ledger.posts if post.body and post.body.get("prompt") == HONEST]
        assert posts
        assert all(post.paid for post in posts)
        assert all(sim.ledger.paid_by_callback_token[token_of(post.callback_url)] == 1 for post in posts)
        assert len(posts) == JOBS.get(resource, 1)
