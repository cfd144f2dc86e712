"""What type checkers must refuse: every line marked `# refused`, and no other. Never run (see tests/test_typing.py)."""

from __future__ import annotations

from pathlib import Path

from xiling_async import (
    Client,
    Failed,
    Finished,
    ImageToVideo,
    Job,
    Limits,
    MemoryStore,
    Polling,
    Succeeded,
    TaskFailed,
    Timeouts,
    Video,
    WebhookReceiver,
    XilingError,
)


def clients(store: MemoryStore) -> None:
    """Wrong types of arguments, and values that a word does not have."""
    Client(store="jobs.db")  # refused
    Client(store=MemoryStore)  # refused
    Client(receiver="https://media.example.com/xiling")  # refused
    Client(limits={})  # refused
    Client(timeouts=30)  # refused
    Client(polling=5)  # refused
    Client(api_key=123)  # refused
    Client(session=1)  # refused
    Client(headers={1: "x"})  # refused
    Client(on_uncertain="maybe")  # refused
    Client(on_event=5)  # refused
    Client("key", "https://api.keevx.com/v1")  # refused
    Client(stroe=store)  # refused
    Limits(submits="64")  # refused
    Timeouts(wait=None)  # refused
    Polling(every="30")  # refused
    WebhookReceiver(8080)  # refused


IMAGE = "https://example.com/sea.jpg"


def requests(folder: Path) -> None:
    """Values that no model takes, wrong types, missing fields."""
    ImageToVideo(
        model="veo3",  # refused
        prompt="waves",
        image_url=3.5,  # refused
        aspect_ratio="16x9",  # refused
        aspect_resolution="8k",  # refused
        duration=99,  # refused
        generate_count="2",  # refused
        reference_images=5,  # refused
    )
    ImageToVideo(model="V", prompt="waves", image_url=IMAGE, aspect_ratio="16:9", duration=8)  # refused
    ImageToVideo("V", "positional")  # refused
    ImageToVideo(
        model="V", prompt="waves", image_url=folder / "a.jpg", aspect_ratio="16:9", aspect_resolution="4k", duration="8",  # refused
    )  # fmt: skip


async def calls(client: Client, request: ImageToVideo, job: Job[Video], video: Video) -> None:
    """Results and requests in each other's places."""
    await client.download(3, "x")  # refused
    await client.download("https://example.com/v.mp4", "x")  # refused
    await client.download(job, "x")  # refused
    await client.download(video, 3)  # refused
    await client.download(video, "x", what="audio")  # refused
    await client.run(video)  # refused
    await client.run(request, timeout="60")  # refused
    await client.submit("waves")  # refused
    await client.submit(request, key=42)  # refused
    client.job(42)  # refused
    client.job("i2v-1", kind=Video)  # refused
    await job.result("60")  # refused
    request.duration = 4  # refused
    video.task_id = "x"  # refused


def outcomes(outcome: Succeeded[Video] | Failed, failed: TaskFailed, done: Finished[Video]) -> None:
    """What only one of two has."""
    outcome.result  # refused
    outcome.message  # refused
    failed.outcomes[0].result  # refused
    done.error.charged  # refused
    _error: ValueError | None = done.error  # refused
    _charged: bool = XilingError("x").charged  # refused
