"""The clients that this one is compared with, each pointed at the benchmark's service; those not installed are left
out.

`pip install '.[peers]'` installs them all. Each is used as its own pages say, with its defaults: its own retries, its
own pool, its own polling.
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from attrs import frozen

PROMPT = "A running golden retriever, sunny meadow, high quality, cinematic feel"
IMAGE_URL = "https://example.com/start_frame.jpg"
INPUT = {"prompt": PROMPT, "image_url": IMAGE_URL, "aspect_ratio": "16:9", "resolution": "1080p", "duration": 6}
KEY = "sim-key"


@frozen
class Peer:
    """`create` submits one job; `run`, where a client waits by itself, also waits and gives the result's URL."""

    create: Callable[[], Awaitable[object]]
    run: Callable[[], Awaitable[str]] | None = None


@asynccontextmanager
async def fal(base_url: str) -> AsyncIterator[Peer]:
    module: Any = importlib.import_module("fal_client.client")
    module.QUEUE_URL_FORMAT = f"{base_url}/queue/"  # its environment variable is for https hosts only
    client = module.AsyncClient(key=KEY)

    async def run() -> str:
        found = await client.subscribe("bench/video", arguments=INPUT)
        return str(found["video"]["url"])

    yield Peer(lambda: client.submit("bench/video", arguments=INPUT), run)
    await (await client._client).aclose()


@asynccontextmanager
async def replicate(base_url: str) -> AsyncIterator[Peer]:
    client = importlib.import_module("replicate").Client(api_token=KEY, base_url=base_url)

    def create() -> Awaitable[Any]:
        created: Awaitable[Any] = client.predictions.async_create(version="0" * 64, input=INPUT)
        return created

    async def run() -> str:
        prediction = await create()
        await prediction.async_wait()
        return str(prediction.output)

    yield Peer(create, run)
    await client._async_client.aclose()


@asynccontextmanager
async def runwayml(base_url: str) -> AsyncIterator[Peer]:
    module = importlib.import_module("runwayml")
    async with module.AsyncRunwayML(api_key=KEY, base_url=f"{base_url}/runway") as client:
        yield Peer(
            lambda: client.image_to_video.create(
                model="gen4.5", prompt_text=PROMPT, prompt_image=IMAGE_URL, ratio="1280:720", duration=6
            )
        )


@asynccontextmanager
async def lumaai(base_url: str) -> AsyncIterator[Peer]:
    module = importlib.import_module("lumaai")
    frames = {"frame0": {"type": "image", "url": IMAGE_URL}}
    async with module.AsyncLumaAI(auth_token=KEY, base_url=f"{base_url}/luma") as client:
        yield Peer(
            lambda: client.generations.video.create(
                model="ray-2", prompt=PROMPT, keyframes=frames, aspect_ratio="16:9", resolution="1080p", duration="5s"
            )
        )


@asynccontextmanager
async def openai(base_url: str) -> AsyncIterator[Peer]:
    module = importlib.import_module("openai")
    async with module.AsyncOpenAI(api_key=KEY, base_url=f"{base_url}/openai") as client:
        yield Peer(
            lambda: client.videos.create(model="sora-2", prompt=PROMPT, seconds="8", size="1280x720")  # text to video
        )


PEERS: dict[str, Callable[[str], AbstractAsyncContextManager[Peer]]] = {
    "fal-client": fal,
    "replicate": replicate,
    "runwayml": runwayml,
    "lumaai": lumaai,
    "openai": openai,
}


def installed(name: str) -> str | None:
    """The version of this distribution; None if it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
