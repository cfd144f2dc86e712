"""What a type checker sees of the public names: checked by mypy --strict, never run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Literal, assert_type

from yarl import URL

from xiling_async import (
    Client,
    Failed,
    Finished,
    ImageToVideo,
    Job,
    MemoryStore,
    PostgresStore,
    Request,
    SQLiteStore,
    Store,
    Succeeded,
    TaskFailed,
    Video,
    WebhookReceiver,
    XilingError,
)


async def a_request_leads_to_its_result(client: Client, request: ImageToVideo) -> None:
    """Nothing has to be cast: the request's type says what comes of it."""
    assert_type(await client.run(request), Video)
    assert_type(await client.run(request, key="k", timeout=60), Video)
    job = await client.submit(request, key="k")
    assert_type(job, Job[Video])
    assert_type(await job, tuple[Video, ...])
    assert_type(await job.result(), tuple[Video, ...])
    assert_type(await job.result(timeout=1.5), tuple[Video, ...])
    assert_type(await job.outcomes(), tuple[Succeeded[Video] | Failed, ...])
    assert_type(job.id, str)
    assert_type(job.key, str | None)
    assert_type(job.task_ids, tuple[str, ...])
    assert_type(job.request, Request[Video] | None)


def local_files_stand_where_urls_do(folder: Path) -> None:
    """A path, a URL, or both in one list."""
    request = ImageToVideo(
        model="V", prompt="waves", image_url=folder / "a.jpg", end_image_url="https://example.com/b.jpg",
        aspect_ratio="16:9", aspect_resolution="720p", duration=8,
    )  # fmt: skip
    assert_type(request.image_url, str | Path | None)
    assert_type(request.reference_images, Sequence[str | Path] | None)
    assert_type(request.local_files(), dict[str, Path])
    assert_type(request.with_urls({folder / "a.jpg": "https://example.com/a.jpg"}), ImageToVideo)


async def pictures_are_uploaded(client: Client, path: Path, stream: AsyncIterator[bytes]) -> None:
    """A file, bytes, or pieces of bytes; a text is not a picture."""
    assert_type(await client.upload(path), URL)
    await client.upload(b"...")
    await client.upload(stream)
    await client.upload("sea.jpg")  # type: ignore[arg-type]


async def outcomes_narrow(job: Job[Video]) -> None:
    """`isinstance` and `match` tell the good from the bad."""
    for outcome in await job.outcomes():
        if isinstance(outcome, Failed):
            assert_type(outcome.message, str)
        else:
            assert_type(outcome.result, Video)
        match outcome:
            case Succeeded(task_id, video):
                assert_type(task_id, str)
                assert_type(video, Video)
            case Failed(message=message):
                assert_type(message, str)


async def what_was_found_may_be_nothing(client: Client) -> None:
    """A job found by name: its kind is not known to the type checker."""
    assert_type(await client.find("order-42"), Job[Any] | None)
    assert_type(client.recover(), AsyncIterator[Job[Any]])
    async for job in client.recover():
        assert_type(job, Job[Any])


def a_kind_is_generic(request: ImageToVideo) -> Request[Video]:
    """A request of videos is a `Request[Video]`."""
    assert_type(ImageToVideo.unchecked(model="V2", anything=[1]), ImageToVideo)
    return request


def results_say_what_they_lack(video: Video) -> None:
    """What the service did not say is None."""
    assert_type(video.video_url, str)
    assert_type(video.thumbnail_url, str | None)
    assert_type(video.duration, float | None)
    assert_type(video.width, int | None)


def stores_are_stores() -> Store:
    """Any object with the protocol's methods is one."""
    return MemoryStore()


async def a_client_is_entered(receiver: WebhookReceiver, store: Store) -> None:
    """`async with` gives the client itself."""
    async with Client("key", receiver=receiver, store=store) as client:
        assert_type(client, Client)


def errors_tell(error: XilingError, failed: TaskFailed) -> None:
    """What every error has."""
    assert_type(error.job_id, str | None)
    assert_type(error.task_ids, tuple[str, ...])
    assert_type(error.retry_after, float | None)
    assert_type(failed.outcomes, tuple[Succeeded[Any] | Failed, ...])


async def a_job_shows_where_it_stands(job: Job[Video]) -> None:
    """Without waiting: why it will fail, and what is known of each task."""
    assert_type(job.error, XilingError | None)
    assert_type(job.outcomes_so_far, tuple[Succeeded[Video] | Failed | None, ...])


async def many_at_once(client: Client, requests: list[ImageToVideo]) -> None:
    """What failed has an error with `charged`; what is good has results."""
    async for done in client.map(requests):
        assert_type(done, Finished[Video])
        assert_type(done.error, XilingError | None)
        assert_type(done.results, tuple[Video, ...])
        if done.error is not None:
            assert_type(done.error.charged, Literal["no", "maybe", "yes"])


def good_and_bad_outcomes(good: Succeeded[Video], bad: Failed) -> None:
    """`ok` is known for each."""
    assert_type(good.ok, Literal[True])
    assert_type(bad.ok, Literal[False])


async def files_of_results(client: Client, video: Video) -> None:
    """One file, or two."""
    assert_type(await client.download(video, "a.mp4"), Path)
    assert_type(await client.download(video, "a.mp4", what="both"), tuple[Path, Path])


async def a_client_without_a_block() -> None:
    """`open` gives the client itself."""
    client = await Client("key", store=SQLiteStore("jobs.db")).open()
    assert_type(client, Client)
    await client.aclose()
    Client("key", store=PostgresStore("postgresql://db.example.com/videos"))
    Client("key", store=MemoryStore(), receiver=WebhookReceiver(port=0))


def wrong_arguments_are_errors(request: ImageToVideo) -> None:
    """A type checker refuses what would be refused at run time."""
    Client(on_uncertain="maybe")  # type: ignore[arg-type]
    ImageToVideo("V", "positional")  # type: ignore[call-arg]
    request.duration = 4  # type: ignore[misc]
