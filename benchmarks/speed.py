"""Creates and callbacks a second, against raw aiohttp, other clients, and FastAPI.

`python benchmarks/speed.py [--quick] [--profile]` (the rows of the extra `peers` say so when it is not installed).
Every side is a process of its own on one core, the service and its callbacks (lean.py) are another one's; rounds
alternate, and the median of the rounds' ratios counts, by wall time and by the side's own CPU (which is steadier on a
busy machine: its ratio is that of CPU seconds). Creates: 64 callers; raw aiohttp posts the same JSON, a callback URL in
it, and reads the ids. Ours is `client.submit` with a receiver, the default store, and no callbacks yet. Callbacks: of
jobs that were bought before the clock starts, each with a waiter that is resumed before it stops, over 32 kept-alive
connections; against an aiohttp handler that parses the JSON and no more (bare: without an application), and FastAPI
with a pydantic model on uvicorn, each as `pip install` brings it. The last table is what the extra `speedups` is worth;
all others are without it. `--profile` shows where our time goes instead (cProfile: the order counts, the figures are
inflated).
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import importlib
import json
import pstats
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from statistics import median
from typing import Any, Final

import aiohttp
from aiohttp import web
from peers import PEERS, installed
from report import show
from sides import LeanService, Process, cores, pin

from xiling_async import Client, ImageToVideo, MemoryStore, SQLiteStore, WebhookReceiver
from xiling_async.jobs.job import Job
from xiling_async.stores.base import Store

CALLERS: Final = 64
CONNECTIONS: Final = 32
SENDERS: Final = 64  # to a disk: more at once share a commit
RAW: Final = "raw aiohttp"
OURS: Final = "xiling_async, creates"
TAKING: Final = "xiling_async, callbacks"
DURABLE: Final = "xiling_async, SQLiteStore"
BARE: Final = "bare aiohttp handler"
BARE_TO_MANY: Final = "bare aiohttp handler, 64 senders"
HANDLER: Final = "aiohttp application"
FASTAPI: Final = "FastAPI on uvicorn"
WITH: Final = ", with "
UVLOOP: Final = "uvloop"
RAW_RATIO, PEER_RATIO, BARE_RATIO, FASTAPI_RATIO, DURABLE_RATIO = 0.85, 12.0, 0.75, 3.0, 0.45
PROFILE_ROWS: Final = 25
REQUEST: Final = ImageToVideo(
    model="V",
    prompt="A running golden retriever, sunny meadow, high quality, cinematic feel",
    image_url="https://example.com/start_frame.jpg",
    aspect_ratio="16:9",
    aspect_resolution="1080p",
    duration=6,
)
Create = Callable[[], Awaitable[object]]
Round = dict[str, float]


# --- creates ---------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def raw(url: str) -> AsyncIterator[Create]:
    headers = {"Authorization": "Bearer sim-key"}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def create() -> object:
            body = {**REQUEST.fields(), "callback_url": f"http://127.0.0.1:8080/{'A' * 80}"}
            async with session.post(f"{url}/image_to_video", json=body, headers=headers) as answer:
                return (await answer.json())["data"]["task_ids"]

        yield create


@asynccontextmanager
async def ours(url: str) -> AsyncIterator[Create]:
    async with Client("sim-key", base_url=url, receiver=WebhookReceiver(port=0)) as client:
        yield lambda: client.submit(REQUEST)


@asynccontextmanager
async def peer(name: str, url: str) -> AsyncIterator[Create]:
    async with PEERS[name](url) as found:
        yield found.create


async def at_once(create: Create, jobs: int) -> list[Any]:
    left = iter(range(jobs))

    async def caller() -> list[Any]:
        return [await create() for _ in left]

    made = await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return [one for some in made for one in some]


async def creates(name: str, url: str, jobs: int, profile: cProfile.Profile | None) -> Round:
    async with raw(url) if name == RAW else ours(url) if name == OURS else peer(name, url) as create:
        await at_once(create, CALLERS)
        wall, cpu = time.perf_counter(), time.process_time()
        if profile is not None:
            profile.enable()
        await at_once(create, jobs)
        if profile is not None:
            profile.disable()
        return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


# --- callbacks -------------------------------------------------------------------------------------------------------


async def release(url: str, what: str, given: dict[str, object], *, connections: int = CONNECTIONS) -> float:
    """Let the service call back; seconds from its first byte to its last answer."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/control/{what}", json={**given, "connections": connections}) as answer,
    ):
        return float((await answer.json())["seconds"])


async def taking(url: str, jobs: int, profile: cProfile.Profile | None, store: Store, connections: int) -> Round:
    async with Client("sim-key", base_url=url, receiver=WebhookReceiver(port=0), store=store) as client:
        bought: list[Job[Any]] = await at_once(lambda: client.submit(REQUEST), jobs)
        waiters = [asyncio.create_task(job.result()) for job in bought]
        await asyncio.sleep(0)
        cpu = time.process_time()
        if profile is not None:
            profile.enable()
        wall = await release(url, "release", {}, connections=connections)
        await asyncio.gather(*waiters)
        if profile is not None:
            profile.disable()
        return {"wall": wall, "cpu": time.process_time() - cpu}


@asynccontextmanager
async def bare() -> AsyncIterator[str]:
    async def take(request: web.BaseRequest) -> web.StreamResponse:
        json.loads(await request.read())
        return web.Response(text="ok")

    runner = web.ServerRunner(web.Server(take, access_log=None))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}/callback"
    await runner.cleanup()


@asynccontextmanager
async def handler() -> AsyncIterator[str]:
    """As aiohttp's documentation has it: an application, its router, a JSON answer."""

    async def take(request: web.Request) -> web.StreamResponse:
        await request.json()
        return web.json_response({"ok": True})

    app = web.Application()
    app.router.add_post("/callback", take)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}/callback"
    await runner.cleanup()


@asynccontextmanager
async def fastapi() -> AsyncIterator[str]:
    create_model = importlib.import_module("pydantic").create_model
    uvicorn = importlib.import_module("uvicorn")
    texts = dict.fromkeys(("task_id", "status", "video_url", "thumbnail_url", "error_message"), (str, ...))
    data = create_model("Data", **texts)
    callback = create_model("Callback", code=(int, ...), msg=(str, ...), task_type=(str, ...), data=(data, ...))

    async def take(told: object) -> str:
        return "ok"

    take.__annotations__["told"] = callback
    app = importlib.import_module("fastapi").FastAPI()
    app.post("/callback")(take)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False))
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - it has no event
        await asyncio.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/callback"
    server.should_exit = True
    await serving


async def callbacks(name: str, url: str, jobs: int, profile: cProfile.Profile | None) -> Round:
    if name == TAKING:
        return await taking(url, jobs, profile, MemoryStore(), CONNECTIONS)
    if name == DURABLE:
        with tempfile.TemporaryDirectory() as folder:
            return await taking(url, jobs, profile, SQLiteStore(f"{folder}/jobs.db"), SENDERS)
    connections = SENDERS if name == BARE_TO_MANY else CONNECTIONS
    async with fastapi() if name == FASTAPI else handler() if name == HANDLER else bare() as there:
        cpu = time.process_time()
        wall = await release(url, "fire", {"url": there, "count": jobs}, connections=connections)
        return {"wall": wall, "cpu": time.process_time() - cpu}


# --- the sides and the tables ----------------------------------------------------------------------------------------


def serve_rounds(side: str, url: str) -> None:
    """A side: a round for each line that comes."""
    pin(cores()[1])
    name, _, faster = side.partition(WITH)
    factory = importlib.import_module(UVLOOP).new_event_loop if faster == UVLOOP else None
    run = callbacks if name in (TAKING, DURABLE, BARE, BARE_TO_MANY, HANDLER, FASTAPI) else creates
    for line in sys.stdin:
        with asyncio.Runner(loop_factory=factory) as runner:
            print(json.dumps(runner.run(run(name, url, json.loads(line)["jobs"], None))), flush=True)


def played(service: LeanService, sides: dict[str, int], rounds: int, mode: str) -> dict[str, list[Round]]:
    """Microseconds a job of each side in each round, by wall time and by CPU; one round before them warms up."""
    found: dict[str, list[Round]] = {name: [] for name in sides}
    with ExitStack() as started:
        running = {
            name: started.enter_context(Process("speed.py", "--side", name, "--url", service.url)) for name in sides
        }
        for number in range(rounds + 1):
            for name, jobs in sides.items():
                jobs = jobs if number else max(1, jobs // 4)
                service.control("set", takes=0, callbacks=mode)
                took = running[name].ask(jobs=jobs)
                counts = service.control("counts")
                refused = {what: n for what, n in counts.items() if what.startswith("callback") and "200" not in what}
                assert not refused, refused
                if number:
                    found[name].append({clock: 1e6 * seconds / jobs for clock, seconds in took.items()})
    return found


def middle(rounds: list[Round]) -> Round:
    return {clock: median(took[clock] for took in rounds) for clock in rounds[0]}


def times_as_many(mine: list[Round], theirs: list[Round]) -> Round:
    """The median of the rounds' ratios: a shared machine is faster now and slower then."""
    return middle(
        [{clock: other[clock] / took[clock] for clock in took} for took, other in zip(mine, theirs, strict=True)]
    )


def table(title: str, us: str, found: dict[str, list[Round]], rivals: dict[str, str]) -> dict[str, Round]:
    """How many times as many as each rival; `rivals`: the target in words."""
    mine = middle(found[us])
    ratios = {name: times_as_many(found[us], found[name]) for name in rivals if name in found}
    rows = [[us, f"{1e6 / mine['wall']:,.0f}", f"{mine['cpu']:,.0f}", "1.00", "1.00", ""]]
    for name, target in rivals.items():
        if name not in found:
            rows.append([name, *["-"] * 4, "not installed"])
            continue
        theirs = middle(found[name])
        wall, cpu = (f"{ratios[name][clock]:.2f}" for clock in ("wall", "cpu"))
        rows.append([name, f"{1e6 / theirs['wall']:,.0f}", f"{theirs['cpu']:,.0f}", wall, cpu, target])
    show(title, ("side", "a second", "CPU µs each", "ours to it", "by CPU", "target"), rows)
    return ratios


def compare(service: LeanService, quick: bool) -> bool:
    rounds, jobs, slow = (1, 600, 60) if quick else (9, 4000, 300)
    found = played(service, {RAW: jobs, OURS: jobs}, rounds, "never")
    met = [table(f"Creates, {CALLERS} callers", OURS, found, {RAW: f">= {RAW_RATIO}"})[RAW]["wall"] >= RAW_RATIO]

    there = {name: slow for name in PEERS if installed(name) is not None}
    found = played(service, {OURS: jobs} | there, 1 if quick else 3, "never")
    fastest = min(there, key=lambda name: middle(found[name])["wall"], default="")
    rivals = {name: f">= {PEER_RATIO:g}" if name == fastest else "" for name in PEERS}
    ratios = table(f"Creates, {CALLERS} callers, other clients", OURS, found, rivals)
    met.append(not fastest or ratios[fastest]["wall"] >= PEER_RATIO)

    sides = {BARE: jobs, TAKING: jobs, HANDLER: jobs}
    if installed("fastapi") is not None and installed("uvicorn") is not None:
        sides[FASTAPI] = jobs // 2
    found = played(service, sides, rounds, "held")
    rivals = {BARE: f">= {BARE_RATIO}", HANDLER: "", FASTAPI: f">= {FASTAPI_RATIO:g}"}
    ratios = table(f"Callbacks, {CONNECTIONS} connections, each resumes a waiter", TAKING, found, rivals)
    met.append(ratios[BARE]["wall"] >= BARE_RATIO)
    met.append(FASTAPI not in found or ratios[FASTAPI]["wall"] >= FASTAPI_RATIO)

    found = played(service, {BARE_TO_MANY: jobs, DURABLE: jobs}, rounds, "held")
    title = f"Callbacks, on the disk before they are answered, {SENDERS} connections"
    ratios = table(title, DURABLE, found, {BARE_TO_MANY: f">= {DURABLE_RATIO}"})
    met.append(ratios[BARE_TO_MANY]["wall"] >= DURABLE_RATIO)
    speedups(service, rounds, jobs)
    return all(met)


def speedups(service: LeanService, rounds: int, jobs: int) -> None:
    """What the extra is worth, where it is installed."""
    if installed(UVLOOP) is None:
        return
    rows = []
    for name, mode in ((OURS, "never"), (TAKING, "held")):
        found = played(service, {name: jobs, f"{name}{WITH}{UVLOOP}": jobs}, rounds, mode)
        for side, took in found.items():
            wall, cpu = (f"{ratio:.2f}" for ratio in times_as_many(took, found[name]).values())
            each = middle(took)
            rows.append((side, f"{1e6 / each['wall']:,.0f}", f"{each['cpu']:,.0f}", wall, cpu))
    show("The extra `speedups`", ("side", "a second", "CPU µs each", "to that without", "by CPU"), rows)


def profiled(service: LeanService, name: str, jobs: int) -> None:
    """The functions with the most time of their own in one round of ours."""
    service.control("set", takes=0, callbacks="never" if name == OURS else "held")
    profile = cProfile.Profile(time.process_time)
    asyncio.run((creates if name == OURS else callbacks)(name, service.url, jobs, profile))
    stats: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    rows = sorted(stats.items(), key=lambda row: -row[1][2])[:PROFILE_ROWS]
    show(
        f"{name}, under cProfile: microseconds a job",
        ("function", "calls", "own", "with what it calls"),
        [
            (_named(*where), f"{calls / jobs:.1f}", f"{1e6 * own / jobs:.1f}", f"{1e6 * total / jobs:.1f}")
            for where, (_, calls, own, total, _) in rows
        ],
    )


def _named(file: str, line: int, function: str) -> str:
    return function if file == "~" else f"{'/'.join(file.split('/')[-2:])}:{line} {function}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few seconds, for CI: a look, not a measurement")
    parser.add_argument("--profile", action="store_true", help="where our own time goes")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        serve_rounds(given.side, given.url)
        return 0
    with LeanService() as service:
        if given.profile:
            pin(cores()[1])
            for name in (OURS, TAKING):
                profiled(service, name, 500 if given.quick else 4000)
            return 0
        met = compare(service, given.quick)
    return 0 if given.quick or met else 1


if __name__ == "__main__":
    sys.exit(main())
