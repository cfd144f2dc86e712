"""Local pictures up: what is refused before anything is sent, and what the service saw before anything was bought."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import os
import pickle
import random
import socket
import sys
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import pytest
from support import NotingStore, client_of, closed_port, gone, model_v, settle, started, turns_until
from yarl import URL

from xiling_async import (
    Client,
    ClientClosed,
    ConfigurationError,
    ImageToVideo,
    InvalidRequest,
    Limits,
    MemoryStore,
    NotSent,
    ProtocolError,
    RateLimited,
    Rejected,
    ServiceError,
    ServiceUnavailable,
    SQLiteStore,
    Timeouts,
    Unauthorized,
)
from xiling_async._internal.clock import SystemClock
from xiling_async.api.calls import UPLOAD_TRIES, UPLOADS_AT_ONCE, Calls
from xiling_async.api.transport import Transport
from xiling_async.api.wire import Malformed, upload_envelope, uploaded_url
from xiling_async.media.images import LIMIT_BYTES, PIECE_BYTES, Unfit, inspected
from xiling_async.media.uploads import REMEMBERED_S, Uploads
from xiling_async.simulator import Simulator, faults
from xiling_async.simulator.faults import Fault
from xiling_async.testing.clock import ManualClock

T = TypeVar("T")

JPG, PNG, WEBP = b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"RIFF\x24\0\0\0WEBPVP8 "
PATIENT = Timeouts(answer=1e6)  # for tests that drive the clock: no exchange is given up


def picture(
    folder: Path, name: str = "sea.jpg", *, head: bytes = JPG, size: int = 1_000, fill: bytes = b"\x5a"
) -> Path:
    """A file of this size that begins like a picture."""
    path = folder / name
    path.write_bytes(head + fill * (size - len(head)))
    return path


def frame(path: Path, prompt: str = "waves at dawn") -> ImageToVideo:
    return ImageToVideo(
        model="V", prompt=prompt, image_url=path, aspect_ratio="16:9", aspect_resolution="1080p", duration=8
    )


def several(*images: Path | str) -> ImageToVideo:
    return ImageToVideo(
        model="KL", prompt="waves", reference_images=images, aspect_ratio="9:16", aspect_resolution="720p", duration=5
    )


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def running(name: str) -> list[asyncio.Task[Any]]:
    return [task for task in asyncio.all_tasks() if task.get_name().startswith(name)]


def uploading() -> list[asyncio.Task[Any]]:
    return running("xiling upload")


async def driven(clock: ManualClock, work: Coroutine[Any, Any, T], *, step_s: float = 1.0) -> T:
    """Run this to its end while the hand-driven clock goes on. Other threads get their turn at each step: files are
    read by them, however busy this machine is."""
    task = asyncio.create_task(work)
    for _ in range(2_000):
        await settle(20)
        await asyncio.to_thread(int)
        if task.done():
            return task.result()
        clock.advance(step_s)
    await gone(task)
    raise AssertionError("it did not end within 2,000 steps of the clock")


async def ended(task: asyncio.Task[T]) -> T:
    return await task


class Hasty(random.Random):
    """Every jitter is none."""

    def random(self) -> float:
        return 0.0


@contextlib.asynccontextmanager
async def uploads_of(sim: Simulator, **options: Any) -> AsyncIterator[Uploads]:
    """The uploads of a client without the rest of it, and without pauses between tries."""
    clock = SystemClock()
    transport = Transport(URL(sim.base_url), sim.api_key, timeouts=Timeouts(), clock=clock, headers={}, session=None)
    transport.open()
    calls = Calls(transport, sim.api_key, clock=clock, limits=Limits(), rng=Hasty())
    uploads = Uploads(calls, clock, **options)
    try:
        yield uploads
    finally:
        await uploads.close()
        await transport.close()


# --- what the service sees -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "name", "sent", "media_type"),
    [
        (JPG, "a user's own name.png", "image.jpg", "image/jpeg"),
        (PNG, "picture", "image.png", "image/png"),
        (WEBP, "x.jpeg", "image.webp", "image/webp"),
    ],
    ids=["jpg", "png", "webp"],
)
async def test_a_path_goes_in_and_its_url_is_sent(
    sim: Simulator, tmp_path: Path, head: bytes, name: str, sent: str, media_type: str
) -> None:
    """One multipart upload with its length, its type told by its bytes, under a name that tells nothing."""
    path = picture(tmp_path, name, head=head, size=3 * PIECE_BYTES + 17)
    async with client_of(sim) as client:
        job = await client.submit(frame(path))
        assert job.request == frame(path)
        await job
    (seen,) = sim.ledger.uploads
    assert (seen.filename, seen.content_type) == (sent, media_type)
    assert (seen.size, seen.sha256) == (path.stat().st_size, sha256(path))
    assert seen.declared_length is not None
    assert 0 < seen.declared_length - seen.size < 300
    assert "transfer-encoding" not in seen.headers
    assert seen.headers["authorization"] == f"Bearer {sim.api_key}"
    assert not any(str(tmp_path) in value or name in value for value in seen.headers.values())
    (post,) = sim.ledger.posts
    assert (post.body or {})["image_url"] == seen.url


async def test_every_image_field_takes_a_path(sim: Simulator, tmp_path: Path) -> None:
    """Start frame, end frame, and a list of paths and URLs in its order."""
    a, b, c = (picture(tmp_path, name, size=size) for name, size in (("a", 500), ("b", 600), ("c", 700)))
    async with client_of(sim) as client:
        await client.submit(
            ImageToVideo(
                model="V",
                prompt="x",
                image_url=a,
                end_image_url=b,
                aspect_ratio="16:9",
                aspect_resolution="720p",
                duration=4,
            )
        )
        await client.submit(several(c, "https://example.com/sky.jpg", a))
    urls = {upload.size: upload.url for upload in sim.ledger.uploads}
    assert set(urls) == {500, 600, 700}
    first, second = (post.body or {} for post in sim.ledger.posts)
    assert (first["image_url"], first["end_image_url"]) == (urls[500], urls[600])
    assert second["reference_images"] == [urls[700], "https://example.com/sky.jpg", urls[500]]


async def test_nothing_is_written_or_bought_before_the_upload_has_ended(sim: Simulator, tmp_path: Path) -> None:
    """While the picture is on its way there is no intent in the store, and no POST."""
    store = NotingStore()
    sim.script_upload(faults.hang())
    async with client_of(sim, store=store) as client:
        submit = await started(client.submit(frame(picture(tmp_path)), key="k"))
        await sim.wait_for_uploads(1)
        await settle()
        assert (store.asked, sim.ledger.posts) == ([], [])
        await gone(submit)
        await client.submit(frame(picture(tmp_path)), key="k")
    assert [upload.read for upload in sim.ledger.uploads] == [True, True]


async def test_a_link_to_a_picture_is_a_picture(sim: Simulator, tmp_path: Path) -> None:
    """Symbolic links are followed."""
    link = tmp_path / "link"
    link.symlink_to(picture(tmp_path))
    async with client_of(sim) as client:
        await client.submit(frame(link))
    assert sim.ledger.uploads[0].sha256 == sha256(link)


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.fixture
def bad_files(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """Everything that is not a picture, by the rule that it breaks."""
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "text.png").write_text("this is not a picture at all, whatever its name says")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "fifo.jpg")
    clip = tmp_path / "clip.jpg"
    clip.write_bytes(b"\0\0\0\x18ftypmp42" + bytes(100))
    with picture(tmp_path, "big.jpg").open("r+b") as big:
        big.truncate(21_000_000)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "s"))
        yield {
            "is a folder": tmp_path / "folder.jpg",
            "does not exist": tmp_path / "missing.jpg",
            "does not exist ": tmp_path / "broken",
            "is not a picture by its content": tmp_path / "text.png",
            "is mp4 by its content": clip,
            "has 21000000 bytes": tmp_path / "big.jpg",
            "is a FIFO, not a file": tmp_path / "fifo.jpg",
            "is a socket, not a file": tmp_path / "s",
            "is a device, not a file": Path("/dev/null"),
            "is empty": tmp_path / "empty.jpg",
            "is not a path": Path("a\0b"),
            "is not a path ": Path("\ud800"),
            "cannot be read (Not a directory)": tmp_path / "text.png" / "x",
            "cannot be read (Too many levels of symbolic links)": tmp_path / "loop",
            "cannot be read (File name too long)": tmp_path / ("x " * 150),
        }


async def test_a_bad_file_is_refused_before_anything_is_sent(sim: Simulator, bad_files: dict[str, Path]) -> None:
    """Each by what it is; nothing is uploaded, written or bought, and a FIFO makes nobody wait."""
    store = NotingStore()
    async with client_of(sim, store=store) as client:
        for rule, path in bad_files.items():
            for send in (lambda given: client.submit(frame(given)), client.upload):
                with pytest.raises(InvalidRequest) as caught:
                    await send(path)
                (problem,) = caught.value.problems
                assert (problem.rule, problem.value) == (rule.strip(), str(path))
                assert pickle.loads(pickle.dumps(caught.value)).problems == caught.value.problems
                assert caught.value.charged == "no"
                assert "at most 20 MB" in str(caught.value)
    assert (sim.ledger.uploads, sim.ledger.posts, store.asked) == ([], [], [])


async def test_all_bad_files_are_named_at_once(sim: Simulator, bad_files: dict[str, Path], tmp_path: Path) -> None:
    """One problem for each bad file of a request, under every field that holds it; the good ones are not sent."""
    rules = ("is empty", "is not a picture by its content", "does not exist")
    empty, text, missing = (bad_files[rule] for rule in rules)
    async with client_of(sim) as client:
        with pytest.raises(InvalidRequest, match="ImageToVideo: 3 rules are broken, nothing was sent") as caught:
            await client.submit(several(picture(tmp_path), empty, "https://example.com/a.jpg", text, missing, empty))
    assert [(problem.field, problem.rule) for problem in caught.value.problems] == [
        ("reference_images[1], reference_images[5]", "is empty"),
        ("reference_images[3]", "is not a picture by its content"),
        ("reference_images[4]", "does not exist"),
    ]
    assert sim.ledger.uploads == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
async def test_an_unreadable_file_is_refused(sim: Simulator, tmp_path: Path) -> None:
    """No permission is a reason, not a crash."""
    path = picture(tmp_path)
    path.chmod(0)
    async with client_of(sim) as client:
        with pytest.raises(InvalidRequest, match="Permission denied"):
            await client.submit(frame(path))


async def test_exactly_20_mb_pass(sim: Simulator, tmp_path: Path) -> None:
    """20 · 1024 · 1024 bytes are taken, one more is not."""
    path = picture(tmp_path, size=LIMIT_BYTES)
    async with client_of(sim) as client:
        await client.upload(path)
        assert sim.ledger.uploads[0].size == LIMIT_BYTES
        with path.open("ab") as file:
            file.write(b"x")
        with pytest.raises(InvalidRequest, match=f"has {LIMIT_BYTES + 1} bytes"):
            await client.upload(path)


class Changing(type(Path())):  # type: ignore[misc]
    """A path whose file becomes another one between the look and the opening."""

    def stat(self, **_: Any) -> os.stat_result:
        return Path(__file__).stat()


def test_what_becomes_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    """Opening it does not wait for a writer, and leaves nothing open."""
    os.mkfifo(tmp_path / "fifo")
    before = open_files()
    with pytest.raises(Unfit, match="is a FIFO"):
        inspected(Changing(tmp_path / "fifo"))
    assert open_files() == before


def test_a_file_that_cannot_be_read_to_its_end_is_refused() -> None:
    """An error of the disk is a reason, not a crash."""
    with pytest.raises(Unfit, match="cannot be read"):
        inspected(Path("/proc/self/mem"))


# --- once per content ----------------------------------------------------------------------------------------------


async def test_the_same_picture_in_50_submits_is_uploaded_once(sim: Simulator, tmp_path: Path) -> None:
    """However many jobs and file names at once: one upload, and every job was sent its URL."""
    paths = [picture(tmp_path, f"{number}.jpg") for number in range(5)]
    async with client_of(sim) as client:
        await asyncio.gather(*(client.submit(frame(paths[number % 5])) for number in range(50)))
        await client.submit(frame(paths[0], "later"))
    (upload,) = sim.ledger.uploads
    assert len(sim.ledger.posts) == 51
    assert {(post.body or {})["image_url"] for post in sim.ledger.posts} == {upload.url}


async def test_another_client_uploads_for_itself(sim: Simulator, tmp_path: Path) -> None:
    """What was uploaded is remembered by the client that did it."""
    for _ in range(2):
        async with client_of(sim) as client:
            await client.upload(picture(tmp_path))
    assert len(sim.ledger.uploads) == 2


async def test_a_picture_is_uploaded_again_after_a_day(sim: Simulator, tmp_path: Path) -> None:
    """How long the service keeps uploads is unknown: their URLs are used for 24 hours."""
    clock = ManualClock()
    async with client_of(sim, clock=clock) as client:
        first = await client.upload(picture(tmp_path))
        clock.advance(REMEMBERED_S - 1)
        assert await client.upload(picture(tmp_path)) == first
        clock.advance(1)
        second = await client.upload(picture(tmp_path))
        assert second != first
        assert await client.upload(picture(tmp_path)) == second
    assert len(sim.ledger.uploads) == 2


async def test_a_bounded_number_of_pictures_is_remembered(sim: Simulator) -> None:
    """The oldest are forgotten first."""
    async with uploads_of(sim, remembered=2) as uploads:
        for last in b"1", b"2", b"3", b"2", b"3", b"1":
            await uploads.upload(JPG + last)
    assert [upload.sha256 for upload in sim.ledger.uploads] == [
        hashlib.sha256(JPG + last).hexdigest() for last in (b"1", b"2", b"3", b"1")
    ]


async def test_an_upload_that_failed_is_not_remembered(sim: Simulator, tmp_path: Path) -> None:
    """The next submit of the picture tries it anew."""
    sim.script_upload(faults.business_error(1, "no", http=400))
    async with client_of(sim) as client:
        with pytest.raises(Rejected):
            await client.submit(frame(picture(tmp_path)))
        await client.submit(frame(picture(tmp_path)))
    assert ([upload.status for upload in sim.ledger.uploads], len(sim.ledger.posts)) == ([400, 200], 1)


async def test_a_job_that_is_sent_again_is_not_uploaded_again(sim: Simulator, tmp_path: Path) -> None:
    """A create that got a 429, or was refused and is submitted anew, uses the URL that is there."""
    clock = ManualClock()
    async with client_of(sim, clock=clock, timeouts=PATIENT) as client:
        sim.script(faults.rate_limited(1))
        await driven(clock, client.submit(frame(picture(tmp_path))))
        sim.script(faults.business_error(100001, "no", http=400))
        with pytest.raises(Rejected):
            await client.submit(frame(picture(tmp_path)), key="k")
        await client.submit(frame(picture(tmp_path)), key="k")
    assert (len(sim.ledger.uploads), len(sim.ledger.posts), sim.ledger.paid_submits) == (1, 4, 2)


async def test_a_url_that_the_service_cannot_fetch_is_forgotten(sim: Simulator, tmp_path: Path) -> None:
    """How long uploads live is unknown: after "image URL not reachable" the next submit uploads anew, by itself."""
    one, two = picture(tmp_path, "one.jpg"), picture(tmp_path, "two.jpg", size=99)
    async with client_of(sim) as client:
        await client.upload(two)
        sim.script(faults.business_error(100006, "Image URL is not reachable", http=400))
        with pytest.raises(Rejected):
            await client.submit(several(one, "https://example.com/a.jpg"), key="k")
        job = await client.submit(several(one, "https://example.com/a.jpg"), key="k")
        await client.upload(two)
    assert [upload.size for upload in sim.ledger.uploads] == [99, 1_000, 1_000]
    first, second = ((post.body or {})["reference_images"] for post in sim.ledger.posts)
    assert (first != second, job.key) == (True, "k")


# --- keys ----------------------------------------------------------------------------------------------------------


async def test_a_key_that_is_known_uploads_nothing(tmp_path: Path) -> None:
    """Running or done, in this client or after a restart: the same paths are the same request, read or not."""
    path, store = picture(tmp_path), MemoryStore()
    async with Simulator(manual=True) as sim:
        async with client_of(sim, store=store) as client:
            job = await client.submit(frame(path), key="k")
            path.unlink()
            assert (await client.submit(frame(path), key="k")).id == job.id
        async with client_of(sim, store=store) as client:
            await sim.finish(job.task_ids[0])
            assert (await client.submit(frame(path), key="k")).id == job.id
            with pytest.raises(InvalidRequest, match="already names a job with another request"):
                await client.submit(frame(tmp_path / "other.jpg"), key="k")
        assert (len(sim.ledger.uploads), len(sim.ledger.posts)) == (1, 1)


async def test_paths_come_back_from_the_disk(tmp_path: Path) -> None:
    """The store keeps the paths as paths, of any name, alone and in lists, and URLs as URLs."""
    odd = picture(tmp_path, os.fsdecode(b"caf\xe9 \xf0\x9f\x8c\x8a 'q' \"d\".jpg"))
    requests = [frame(odd), several(odd, "https://example.com/path", picture(tmp_path))]
    like_a_path: Any = {"path": "x"}
    requests.append(ImageToVideo.unchecked(model="V", prompt="x", image_url=like_a_path))
    async with Simulator(manual=True) as sim:
        sim.lenient = True
        async with client_of(sim, store=SQLiteStore(tmp_path / "jobs.db")) as client:
            jobs = [await client.submit(request, key=str(n)) for n, request in enumerate(requests)]
        async with client_of(sim, store=SQLiteStore(tmp_path / "jobs.db")) as client:
            for number, request in enumerate(requests):
                again = await client.submit(request, key=str(number))
                assert (again.id, again.request) == (jobs[number].id, request)
        assert (len(sim.ledger.uploads), len(sim.ledger.posts)) == (1, 3)


# --- what goes wrong -----------------------------------------------------------------------------------------------

PAGE = b"<html><body><h1>Gateway</h1></body></html>"
REFUSALS: list[tuple[Fault, type[ServiceError]]] = [
    (faults.business_error(100001, "no", http=400), Rejected),
    (faults.business_error(100002, "Invalid token", http=401), Unauthorized),
    (faults.status(403, body=PAGE), Unauthorized),
    (faults.status(404), Rejected),
    (faults.status(413, body=PAGE), Rejected),
    (faults.status(418), ServiceError),
    (faults.business_error(100007, "Image format error"), ServiceError),
]
SETBACKS: list[tuple[Fault, type[Exception]]] = [
    (faults.drop_before_read(), NotSent),
    (faults.drop_after_accept(), NotSent),
    (faults.drop_mid_answer(), NotSent),
    (faults.garbage(), ProtocolError),
    (faults.garbage(b"[]"), ProtocolError),
    (faults.upload_answer({"code": 0, "success": True, "result": {"url": None}}), ProtocolError),
    (faults.status(500), ServiceUnavailable),
    (faults.status(502, body=PAGE), ServiceUnavailable),
    (faults.status(503, accept=True), ServiceUnavailable),
]


def by_name(value: object) -> str:
    return str(value) if isinstance(value, Fault) else ""


@pytest.mark.parametrize(("fault", "error"), REFUSALS, ids=by_name)
async def test_a_refused_upload_is_not_repeated_and_nothing_is_bought(
    sim: Simulator, tmp_path: Path, fault: Fault, error: type[ServiceError]
) -> None:
    """The service's no is told as such, and the create never leaves."""
    sim.default_upload(fault)
    path = picture(tmp_path)
    async with client_of(sim) as client:
        with pytest.raises(error, match=r"The upload of .* failed .*Nothing was bought") as caught:
            await client.submit(frame(path))
    assert type(caught.value) is error
    assert caught.value.charged == "no"
    assert str(path) in str(caught.value)
    assert (len(sim.ledger.uploads), sim.ledger.posts) == (1, [])


@pytest.mark.parametrize(("fault", "error"), SETBACKS, ids=by_name)
async def test_an_upload_is_tried_four_times(
    sim: Simulator, tmp_path: Path, fault: Fault, error: type[Exception]
) -> None:
    """It is free: what may have been cut, or makes no sense, is sent again; then it is told, and nothing is bought."""
    clock = ManualClock()
    path = picture(tmp_path)
    async with client_of(sim, clock=clock, timeouts=PATIENT) as client:
        for _ in range(UPLOAD_TRIES - 1):
            sim.script_upload(fault)
        await driven(clock, client.submit(frame(path)))
        assert (len(sim.ledger.uploads), len(sim.ledger.posts)) == (UPLOAD_TRIES, 1)
        sim.default_upload(fault)
        with pytest.raises(error, match="othing was bought") as caught:
            await driven(clock, client.upload(JPG + b"another"))
        assert type(caught.value) is error
        assert getattr(caught.value, "charged", None) == "no"
    assert (len(sim.ledger.uploads), len(sim.ledger.posts)) == (2 * UPLOAD_TRIES, 1)


async def test_an_unreachable_service_is_tried_again(tmp_path: Path) -> None:
    """Nobody there: `NotSent`, after all the tries."""
    clock = ManualClock()
    with closed_port() as port:
        client = Client("key", base_url=f"http://127.0.0.1:{port}/v1", clock=clock, timeouts=PATIENT)
        async with client:
            with pytest.raises(NotSent, match=r"The upload of .* failed .*Nothing was bought"):
                await driven(clock, client.submit(frame(picture(tmp_path))))


async def test_an_upload_without_an_answer_is_given_up_in_time(sim: Simulator, tmp_path: Path) -> None:
    """`Timeouts.connect + answer`, and a second for each 64 KiB: then it is tried again."""
    clock = ManualClock()
    sim.script_upload(faults.hang())
    async with client_of(sim, clock=clock) as client:
        submit = await started(client.submit(frame(picture(tmp_path, size=1024 * 1024))))
        await sim.wait_for_uploads(1)
        clock.advance(10 + 60 + 16 - 0.1)
        await settle()
        assert not submit.done()
        clock.advance(0.2)
        await driven(clock, ended(submit), step_s=0.1)
    assert len(sim.ledger.uploads) == 2


async def test_a_429_closes_the_gate_for_the_whole_client(sim: Simulator, tmp_path: Path) -> None:
    """As long as the service asked for, no upload and no create leaves; then the upload is sent again."""
    clock = ManualClock()
    sim.script_upload(faults.rate_limited(20))
    async with client_of(sim, clock=clock, timeouts=PATIENT) as client:
        submit = await started(client.submit(frame(picture(tmp_path))))
        await sim.wait_for_uploads(1)
        await turns_until(lambda: client.stats().paused_until is not None)
        other = await started(client.submit(model_v()))
        clock.advance(19)
        await settle()
        assert (len(sim.ledger.uploads), len(sim.ledger.posts)) == (1, 0)
        clock.advance(1)
        await asyncio.gather(submit, other)
    assert (len(sim.ledger.uploads), len(sim.ledger.posts)) == (2, 2)


async def test_uploads_that_queue_see_the_gate_close(sim: Simulator) -> None:
    """Whoever gets his turn after somebody's 429 gives it back and waits."""
    clock = ManualClock()
    sim.default_upload(faults.hang())
    sim.script(faults.rate_limited(20))
    async with client_of(sim, clock=clock, timeouts=PATIENT) as client:
        hanging = [await started(client.upload(JPG + bytes([number]))) for number in range(UPLOADS_AT_ONCE)]
        await sim.wait_for_uploads(UPLOADS_AT_ONCE)
        queued = await started(client.upload(JPG + b"queued"))
        await turns_until(lambda: len(uploading()) == UPLOADS_AT_ONCE + 1)
        submit = await started(client.submit(model_v()))
        await turns_until(lambda: client.stats().paused_until is not None)
        sim.default_upload()
        for upload in hanging:
            await gone(upload)
        clock.advance(19)
        await settle(200)
        assert len(sim.ledger.uploads) == UPLOADS_AT_ONCE
        clock.advance(1)
        await asyncio.gather(queued, submit)


async def test_an_endless_429_is_told(sim: Simulator, tmp_path: Path) -> None:
    """After waiting eight times: `RateLimited` with the service's own wait."""
    clock = ManualClock()
    sim.default_upload(faults.rate_limited())
    async with client_of(sim, clock=clock, timeouts=PATIENT) as client:
        with pytest.raises(RateLimited, match=r"The upload of .*Nothing was bought") as caught:
            await driven(clock, client.submit(frame(picture(tmp_path))), step_s=30)
    assert (caught.value.retry_after, caught.value.charged) == (30, "no")
    assert (len(sim.ledger.uploads), sim.ledger.posts) == (9, [])


async def test_one_picture_that_fails_ends_the_others(sim: Simulator, tmp_path: Path) -> None:
    """A request of two pictures whose second is refused buys nothing, and waits for nobody."""
    sim.script_upload(faults.hang())
    sim.script_upload(faults.status(400))
    async with client_of(sim) as client:
        with pytest.raises(Rejected):
            await client.submit(several(picture(tmp_path, "a"), picture(tmp_path, "b", size=99)))
        await turns_until(lambda: not uploading())
    assert (len(sim.ledger.uploads), sim.ledger.posts) == (2, [])


async def test_a_wrong_key_is_told_before_anything_is_bought(sim: Simulator, tmp_path: Path) -> None:
    """`Unauthorized`, and no key in the error."""
    async with client_of(sim, api_key="canary-key") as client:
        with pytest.raises(Unauthorized) as caught:
            await client.submit(frame(picture(tmp_path)))
    assert "canary" not in f"{caught.value!r} {caught.value}"
    assert sim.ledger.posts == []


async def test_a_redirect_takes_neither_the_picture_nor_the_key_elsewhere(sim: Simulator, tmp_path: Path) -> None:
    """It is not followed."""
    async with Simulator() as elsewhere, client_of(sim) as client:
        sim.default_upload(faults.redirect(f"{elsewhere.base_url}/figure-resource/upload/file"))
        with pytest.raises(ServiceError, match="HTTP 307"):
            await client.submit(frame(picture(tmp_path)))
        assert (len(sim.ledger.uploads), elsewhere.ledger.uploads, sim.ledger.posts) == (1, [], [])


async def test_an_answer_that_comes_before_the_end_counts(tmp_path: Path) -> None:
    """A gateway that refuses by the length alone, and hangs up, is understood: one try, and its own words."""
    heads = []

    async def gateway(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 4\r\nConnection: close\r\n\r\n<h1>")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(gateway, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, Client("key", base_url=f"http://127.0.0.1:{port}/v1") as client:
        with pytest.raises(Rejected, match="HTTP 413"):
            await client.upload(picture(tmp_path, size=LIMIT_BYTES))
    assert len(heads) == 1


async def test_a_borrowed_session_that_is_closed_is_told(sim: Simulator, tmp_path: Path) -> None:
    """It cannot send anything: that is said, nothing is repeated, nothing is bought."""
    async with aiohttp.ClientSession() as session, client_of(sim, session=session) as client:
        await session.close()
        with pytest.raises(ConfigurationError, match="session is closed"):
            await client.submit(frame(picture(tmp_path)))


# --- a file that changes -------------------------------------------------------------------------------------------


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def shrink(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"!")


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("change", [grow, shrink, rewrite, Path.unlink, replace_by_folder])
async def test_a_file_that_changes_is_not_uploaded_to_its_end(sim: Simulator, tmp_path: Path, change: Any) -> None:
    """Between the check and the upload: the service never sees a whole other picture, and nothing is bought."""
    clock = ManualClock()
    path = picture(tmp_path, size=3 * PIECE_BYTES)
    sim.script_upload(faults.rate_limited(20))
    async with client_of(sim, clock=clock, timeouts=PATIENT) as client:
        submit = await started(client.submit(frame(path)))
        await sim.wait_for_uploads(1)
        await turns_until(lambda: client.stats().paused_until is not None)
        change(path)
        with pytest.raises(NotSent, match=r"the file changed .*Nothing was bought") as caught:
            await driven(clock, ended(submit))
        assert caught.value.charged == "no"
        await sim.wait_for_uploads(2)
    assert [(upload.read, upload.url) for upload in sim.ledger.uploads[1:]] == [(False, None)]
    assert sim.ledger.posts == []


async def test_a_spoiled_file_takes_no_other_with_it(sim: Simulator, tmp_path: Path) -> None:
    """Two files of one content share an upload; when the one that is read changes, the other is sent for itself."""
    clock = ManualClock()
    one, two = picture(tmp_path, "one.jpg"), picture(tmp_path, "two.jpg")
    sim.script_upload(faults.rate_limited(20))
    async with client_of(sim, clock=clock, timeouts=PATIENT) as client:
        spoiled = await started(client.submit(frame(one)))
        await sim.wait_for_uploads(1)
        await turns_until(lambda: client.stats().paused_until is not None)
        fine = await started(client.submit(frame(two)))
        await turns_until(lambda: len(running("xiling wait for upload")) == 2)
        one.unlink()
        await driven(clock, ended(fine))
        with pytest.raises(NotSent, match="does not exist"):
            await spoiled
    assert [upload.url for upload in sim.ledger.uploads if upload.read and upload.status == 200] == [
        (sim.ledger.posts[0].body or {})["image_url"]
    ]


# --- cancelling and closing ----------------------------------------------------------------------------------------


async def test_who_is_cancelled_takes_no_upload_from_others(sim: Simulator, tmp_path: Path) -> None:
    """The upload goes on while one caller wants it, and ends with the last."""
    clock = ManualClock()
    path = picture(tmp_path)
    sim.script_upload(faults.hang())
    async with client_of(sim, clock=clock) as client:
        first, second = await started(client.submit(frame(path))), await started(client.submit(frame(path, "other")))
        await sim.wait_for_uploads(1)
        await gone(first)
        assert len(uploading()) == 1
        sim.script_upload(faults.hang())
        clock.advance(10 + 60 + 1)
        await driven(clock, sim.wait_for_uploads(2), step_s=0.1)
        await gone(second)
        await turns_until(lambda: not uploading())
        await client.submit(frame(path))  # nothing was broken by that
    assert (len(sim.ledger.uploads), len(sim.ledger.posts)) == (3, 1)


async def test_at_most_four_uploads_at_once(sim: Simulator) -> None:
    """The others wait without a connection."""
    sim.default_upload(faults.hang())
    async with client_of(sim) as client:
        uploads = [await started(client.upload(JPG + bytes([number]))) for number in range(3 * UPLOADS_AT_ONCE)]
        await sim.wait_for_uploads(UPLOADS_AT_ONCE)
        await settle(200)
        assert len(sim.ledger.uploads) == UPLOADS_AT_ONCE
        for upload in uploads:
            await gone(upload)


async def test_closing_ends_uploads_and_leaves_nothing(tmp_path: Path) -> None:
    """Whoever waits hears `ClientClosed` with nothing bought; no task, thread, socket or file is left."""
    one, two = picture(tmp_path), picture(tmp_path, "b", size=50_000)
    async with Simulator() as sim, client_of(sim) as warm:
        await (await warm.submit(model_v()))  # and its callback has come, by a connection of its own
        before = set(threading.enumerate()), open_files()
        sim.default_upload(faults.hang())
        async with Client(sim.api_key, base_url=sim.base_url) as client:
            submits: list[asyncio.Task[Any]] = [
                await started(client.submit(several(one, two), key=key)) for key in ("k", None)
            ]
            submits.append(await started(client.upload(one)))
            await sim.wait_for_uploads(2)
        for submit in submits:
            with pytest.raises(ClientClosed, match="nothing was bought") as caught:
                await submit
            assert caught.value.charged == "no"
        assert (uploading(), set(threading.enumerate())) == ([], before[0])
        await turns_until(lambda: open_files() <= before[1])
    assert len(sim.ledger.posts) == 1


async def test_closing_while_files_are_checked(sim: Simulator, tmp_path: Path) -> None:
    """Also before the first byte: the callers are told, the threads are waited for."""
    path = picture(tmp_path, size=LIMIT_BYTES)
    before = set(threading.enumerate())
    async with client_of(sim) as client:
        submits = [asyncio.create_task(client.submit(frame(path))) for _ in range(10)]
        await asyncio.sleep(0)
    for submit in submits:
        with pytest.raises(ClientClosed):
            await submit
    assert (set(threading.enumerate()), sim.ledger.uploads) == (before, [])


async def test_uploads_that_are_closed_take_nothing(sim: Simulator) -> None:
    """A picture that comes too late is told so."""
    async with uploads_of(sim) as uploads:
        await uploads.close()
        with pytest.raises(ClientClosed):
            await uploads.upload(JPG)


# --- client.upload -------------------------------------------------------------------------------------------------


async def pieces_of(content: bytes, size: int, seen: list[int]) -> AsyncIterator[bytes]:
    """The content in pieces; notes how far it was read, and -1 when it is closed."""
    try:
        for start in range(0, len(content), size):
            seen.append(start)
            yield content[start : start + size]
    finally:
        seen.append(-1)


async def test_bytes_paths_and_streams_are_the_same_picture(sim: Simulator, tmp_path: Path) -> None:
    """One content, however it is given: one upload, one URL, letter by letter."""
    path = picture(tmp_path, size=5_000)
    content = path.read_bytes()
    async with client_of(sim) as client:
        urls = [await client.upload(source) for source in (path, content, pieces_of(content, 700, []))]
        urls.append(await client.upload(bytearray(content)))  # type: ignore[arg-type]
    assert {str(url) for url in urls} == {sim.ledger.uploads[0].url}
    assert len(sim.ledger.uploads) == 1


async def test_a_stream_is_read_up_to_the_limit_and_closed(sim: Simulator) -> None:
    """Beyond 20 MB it is refused; whatever happens, it is closed."""
    async with client_of(sim) as client:
        seen: list[int] = []
        with pytest.raises(InvalidRequest, match="has more than 20971520 bytes"):
            await client.upload(pieces_of(JPG + bytes(3 * LIMIT_BYTES), 1024 * 1024, seen))
        assert (len(seen), seen[-1]) == (22, -1)
        seen.clear()
        with pytest.raises(InvalidRequest, match="is empty"):
            await client.upload(pieces_of(b"", 1, seen))
        assert seen == [-1]
    assert sim.ledger.uploads == []


async def test_a_streams_own_error_is_the_callers(sim: Simulator) -> None:
    """What the iterator raises comes out as it is."""

    async def broken() -> AsyncIterator[bytes]:
        yield JPG
        raise LookupError("the disk of somebody else")

    async with client_of(sim) as client:
        with pytest.raises(LookupError):
            await client.upload(broken())
    assert sim.ledger.uploads == []


class Endless:
    """An async iterator that is no generator: it has nothing to close."""

    def __aiter__(self) -> Endless:
        return self

    async def __anext__(self) -> bytes:
        return JPG * 1024 * 1024


@pytest.mark.parametrize("source", ["sea.jpg", None, 5, ["a"], b"", b"no picture", Endless()], ids=by_name)
async def test_what_is_no_picture_is_refused(sim: Simulator, source: Any) -> None:
    """A text is no path; bytes are looked at like files."""
    async with client_of(sim) as client:
        with pytest.raises(InvalidRequest) as caught:
            await client.upload(source)
    (problem,) = caught.value.problems
    assert problem.field == "source"
    assert len(str(caught.value)) < 300
    assert sim.ledger.uploads == []


async def test_pieces_are_bytes(sim: Simulator) -> None:
    """A stream of texts is not a picture."""

    async def texts() -> AsyncIterator[Any]:
        yield "text"

    async with client_of(sim) as client:
        with pytest.raises(InvalidRequest, match="is not a piece of a picture"):
            await client.upload(texts())


async def test_a_client_that_is_not_open_uploads_nothing(sim: Simulator) -> None:
    """As for every call."""
    with pytest.raises(ClientClosed):
        await client_of(sim).upload(JPG)


# --- the answer ----------------------------------------------------------------------------------------------------

ANSWER = b"""{"code": 0, "success": true, "message": {"global": "success"},
    "result": {"url": "https://u.example/a%2Fb.jpg?x=1", "fileId": "7", "fileName": "image.jpg"}}"""


def test_the_documented_answer_gives_its_url() -> None:
    """Envelope B, letter by letter; what is not needed may be missing."""
    assert uploaded_url(upload_envelope(ANSWER)) == "https://u.example/a%2Fb.jpg?x=1"
    short = upload_envelope(b'{"code": 0, "success": true, "result": {"url": "http://u.example/a"}}')
    assert uploaded_url(short) == "http://u.example/a"


@pytest.mark.parametrize(
    ("old", "new", "path"),
    [
        ('"code": 0', '"code": 7', "$.code"),
        ('"code": 0', '"code": "0"', "$"),
        ('"code": 0', '"code": false', "$"),
        ('"success": true', '"success": false', "$.success"),
        ('"success": true', '"success": "true"', "$.success"),
        ('"success": true', '"success": 1', "$.success"),
        ('"success": true, ', "", "$.success"),
        ('"result"', '"data"', "$.result"),
        ('"url"', '"URL"', "$.result.url"),
        ('"https://u.example/a%2Fb.jpg?x=1"', "null", "$.result.url"),
        ('"https://u.example/a%2Fb.jpg?x=1"', '""', "$.result.url"),
        ('"https://u.example/a%2Fb.jpg?x=1"', '["https://u.example/a"]', "$.result.url"),
        ("https://u.example/a%2Fb.jpg?x=1", "/a.jpg", "$.result.url"),
        ("https://u.example/a%2Fb.jpg?x=1", "file:///a.jpg", "$.result.url"),
        ("https://u.example/a%2Fb.jpg?x=1", "https://u.example/a b", "$.result.url"),
        ("https://u.example/a%2Fb.jpg?x=1", "https://[::1", "$.result.url"),
    ],
)
def test_any_other_answer_is_malformed(old: str, new: str, path: str) -> None:
    """Nothing is guessed: a wrong URL would be paid for."""
    text = ANSWER.decode()
    assert old in text
    with pytest.raises(Malformed) as caught:
        uploaded_url(upload_envelope(text.replace(old, new).encode()))
    assert caught.value.path == path


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"code": 7, "success": false, "message": {"global": "too blue"}}', "too blue"),
        ('{"code": 7, "msg": "too blue"}', "too blue"),
        ('{"code": 7, "message": {"global": 5}, "msg": "x"}', ""),
        ('{"code": 7, "message": "text"}', ""),
    ],
)
def test_a_no_in_either_envelope_says_why(body: str, message: str) -> None:
    """Uploads have an envelope of their own; errors may come in the common one."""
    told = upload_envelope(body.encode())
    assert told is not None
    assert (told.code, told.message) == (7, message)


# --- memory --------------------------------------------------------------------------------------------------------

MEASURE = """
import asyncio, os, re, sys
from pathlib import Path
from xiling_async import Client

def peak_kib():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

async def main(url, key, small, large):
    async with Client(key, base_url=url) as client:
        await client.upload(Path(small))
        Path("/proc/self/clear_refs").write_text("5")
        idle = peak_kib()
        await client.upload(Path(large))
        print(peak_kib() - idle)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's VmHWM")
async def test_an_upload_of_20_mb_costs_little_memory(sim: Simulator, tmp_path: Path) -> None:
    """It is streamed from the disk: less than 4 MiB at its peak, above what the client has anyway."""
    small, large = picture(tmp_path, "small.jpg", size=2 * PIECE_BYTES), picture(tmp_path, size=LIMIT_BYTES)
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", MEASURE, sim.base_url, sim.api_key, str(small), str(large),
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    told, _ = await child.communicate()
    gc.collect()
    assert int(told) < 4 * 1024
    assert len(sim.ledger.uploads) == 2
