"""Downloads: throughput against plain aiohttp writing to a file in the same run, and how much memory they take.

`python benchmarks/media.py [--quick]`. A server in a process of its own sends 1 GiB (quick: 256 MiB; the fsync
at the end weighs more there). Plain aiohttp is what one would write by hand: chunks as they come, written to a file; in
the second row, where the host announces a digest, hashed as well. Our side is `Client.download`: written beside the
loop, synced, put in its place. Rounds alternate, the best of each side counts. Server, loop and disk thread want three
cores: on fewer, and on a busy machine, the ratio falls. Memory is what the process holds beyond the idle client.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
from aiohttp import web
from report import resident_bytes, show

from xiling_async import Client, Video

MIB = 1024**2
TARGET_RATIO = 0.8
TARGET_MIB = 20
ROUNDS = 4
MEMORY_BLOCK = bytes(range(256)) * 4096
Download = Callable[[Path], Awaitable[object]]


# --- the other side, in a process of its own -----------------------------------------------------------------------


async def serve(path: Path, md5: str) -> None:
    """Send this file as a storage does, with its digest and without; prints the port, ends with the pipe."""

    async def media(request: web.Request) -> web.StreamResponse:
        headers = {"x-goog-hash": f"md5={md5}"} if request.match_info["name"] == "hashed.mp4" else {}
        return web.FileResponse(path, headers=headers)

    app = web.Application()
    app.router.add_get("/{name}", media)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    sys.stdout.write(f"{runner.addresses[0][1]}\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await runner.cleanup()


def write_file(path: Path, size: int) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("wb") as file:
        for _ in range(size // len(MEMORY_BLOCK)):
            file.write(MEMORY_BLOCK)
            digest.update(MEMORY_BLOCK)
    return base64.b64encode(digest.digest()).decode()


# --- the two sides that are compared -------------------------------------------------------------------------------


async def plain(session: aiohttp.ClientSession, url: str, to: Path) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    async with session.get(url) as response:
        response.raise_for_status()
        announced = response.headers.get("x-goog-hash", "").removeprefix("md5=")
        with to.open("wb") as file:
            async for chunk in response.content.iter_any():
                file.write(chunk)
                if announced:
                    digest.update(chunk)
    assert not announced or base64.b64encode(digest.digest()).decode() == announced


class Peak:
    """The most that the process held while it was looked at."""

    def __init__(self) -> None:
        self.idle = self.most = resident_bytes()

    def look(self, done: int, total: int | None) -> None:
        self.most = max(self.most, resident_bytes())

    @property
    def growth_mib(self) -> float:
        return (self.most - self.idle) / MIB


async def seconds(download: Download, to: Path, size: int) -> float:
    started = time.perf_counter()
    await download(to)
    took = time.perf_counter() - started
    assert to.stat().st_size == size  # noqa: ASYNC240 - nothing else runs
    to.unlink()  # noqa: ASYNC240
    return took


async def compare(folder: Path, origin: str, size: int, rounds: int) -> int:
    def video(name: str) -> Video:
        return Video(task_id="i2v-benchmark", video_url=f"{origin}/{name}.mp4")

    took: dict[tuple[str, str], list[float]] = {}
    async with Client("benchmark-key", base_url=origin) as client, aiohttp.ClientSession() as session:
        peak = Peak()
        sides: dict[tuple[str, str], Download] = {}
        for name in ("plain", "hashed"):
            sides["ours", name] = lambda to, name=name: client.download(  # type: ignore[misc]
                video(name), to, allow_private=True, progress=peak.look
            )
        growth = 0.0
        for name in ("plain", "hashed"):
            sides["theirs", name] = lambda to, name=name: plain(session, f"{origin}/{name}.mp4", to)  # type: ignore[misc]
        for number in range(rounds):
            for side, download in sides.items():
                took.setdefault(side, []).append(await seconds(download, folder / f"{number}.mp4", size))
                if number == 0 and side[0] == "ours":
                    growth = peak.growth_mib  # before the plain side has held anything
    best = {side: min(times) for side, times in took.items()}
    ratios = {name: best["theirs", name] / best["ours", name] for name in ("plain", "hashed")}
    words = {"plain": "written to a file", "hashed": "written, and its md5 checked"}
    targets = {"plain": f"{TARGET_RATIO:.2f}", "hashed": ""}
    speeds = {side: f"{size / time_s / 1e6:.0f}" for side, time_s in best.items()}
    show(
        f"A download of {size // MIB} MiB over loopback, best of {rounds}",
        ["", "plain aiohttp, MB/s", "xiling_async, MB/s", "ratio", "target"],
        [
            [words[name], speeds["theirs", name], speeds["ours", name], f"{ratio:.2f}", targets[name]]
            for name, ratio in ratios.items()
        ],
    )
    show(
        "Memory of that download above the idle client", ["", "MiB", "target"], [["peak", f"{growth:.1f}", TARGET_MIB]]
    )
    return 0 if ratios["plain"] >= TARGET_RATIO and growth < TARGET_MIB else 1


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="256 MiB instead of 1 GiB")
    options.add_argument("--serve", nargs=2, metavar=("FILE", "MD5"), help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.serve:
        asyncio.run(serve(Path(given.serve[0]), given.serve[1]))
        return 0
    size = (256 if given.quick else 1024) * MIB
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        md5 = write_file(folder / "source.bin", size)
        command = [sys.executable, __file__, "--serve", str(folder / "source.bin"), md5]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdin is not None
            assert server.stdout is not None
            origin = f"http://127.0.0.1:{int(server.stdout.readline())}"
            code = asyncio.run(compare(folder, origin, size, rounds=ROUNDS))
            server.stdin.close()
    return code


if __name__ == "__main__":
    sys.exit(main())
