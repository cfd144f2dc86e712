"""Downloads and uploads: throughput against plain aiohttp in the same run, and how much memory they take.

`python benchmarks/media.py [--quick]`. A server in a process of its own sends 1 GiB (quick: 64 MiB). Plain aiohttp is
what one would write by hand: chunks as they come, written to a file; in the row "synced" with an `fsync` at its end, as
our side always has; in the row "hashed" also hashed, because the host announces a digest, which our side then checks.
Our side is `Client.download`: written beside the loop, synced, put in its place. The target is held against the row
in memory (/dev/shm, where there is room): there the disk, which sync makes us wait for and plain aiohttp does not,
says nothing. Rounds alternate, the best of each side counts. Server, loop and disk thread want three cores: on fewer,
and on a busy machine, the ratio falls. Memory is the peak that the process held (VmHWM) beyond the idle client.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
from aiohttp import web
from report import show

from xiling_async import Client, Video

MIB = 1024**2
TARGET_RATIO = 0.8
TARGET_MIB = 20
ROUNDS = 4
MEMORY = Path("/dev/shm")
BLOCK = bytes(range(256)) * 4096
PICTURE_BYTES = 20 * 1000 * 1000
Download = Callable[[Path], Awaitable[object]]


# --- the other side, in a process of its own -----------------------------------------------------------------------


async def serve(path: Path, md5: str) -> None:
    """Send this file as a storage does, with its digest and without, and take uploads; prints the port."""

    async def media(request: web.Request) -> web.StreamResponse:
        headers = {"x-goog-hash": f"md5={md5}"} if request.match_info["name"] == "hashed.mp4" else {}
        return web.FileResponse(path, headers=headers)

    async def upload(request: web.Request) -> web.StreamResponse:
        size = 0
        async for chunk in request.content.iter_any():
            size += len(chunk)
        url = f"https://storage.example.com/{size}.jpg"
        answer = {"success": True, "code": 0, "message": {"global": "ok"}, "result": {"url": url}}
        return web.Response(body=json.dumps(answer).encode(), content_type="application/json")

    app = web.Application(client_max_size=100 * MIB)
    app.router.add_get("/{name}", media)
    app.router.add_post("/{any:.*}", upload)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    sys.stdout.write(f"{runner.addresses[0][1]}\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until the benchmark closes the pipe
    await runner.cleanup()


@contextmanager
def serving(path: Path, md5: str) -> Iterator[str]:
    command = [sys.executable, __file__, "--serve", str(path), md5]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        server.stdin.close()


def write_file(path: Path, size: int) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("wb") as file:
        for _ in range(size // len(BLOCK)):
            file.write(BLOCK)
            digest.update(BLOCK)
    return base64.b64encode(digest.digest()).decode()


# --- throughput ----------------------------------------------------------------------------------------------------


async def plain(session: aiohttp.ClientSession, url: str, to: Path, *, synced: bool) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    async with session.get(url) as response:
        response.raise_for_status()
        announced = response.headers.get("x-goog-hash", "").removeprefix("md5=")
        with to.open("wb") as file:
            async for chunk in response.content.iter_any():
                file.write(chunk)
                if announced:
                    digest.update(chunk)
            if synced:
                os.fsync(file)
    assert not announced or base64.b64encode(digest.digest()).decode() == announced


async def seconds(download: Download, to: Path, size: int) -> float:
    started = time.perf_counter()
    await download(to)
    took = time.perf_counter() - started
    assert to.stat().st_size == size  # noqa: ASYNC240 - nothing else runs
    to.unlink()  # noqa: ASYNC240
    return took


async def compare(folder: Path, size: int, names: list[str]) -> dict[str, tuple[float, float]]:
    """Megabytes a second, theirs and ours, for each of these rows; the files lie in this folder."""
    md5 = write_file(folder / "source.bin", size)
    best: dict[tuple[str, str], float] = {}
    with serving(folder / "source.bin", md5) as origin:
        async with Client("benchmark-key", base_url=origin) as client, aiohttp.ClientSession() as session:

            def ours(name: str) -> Download:
                video = Video(task_id="i2v-benchmark", video_url=f"{origin}/{name}.mp4")
                return lambda to: client.download(video, to, allow_private=True)

            def theirs(name: str) -> Download:
                return lambda to: plain(session, f"{origin}/{name}.mp4", to, synced=name == "synced")

            for number in range(ROUNDS):
                for name in names:
                    for side, download in (("theirs", theirs(name)), ("ours", ours(name))):
                        took = await seconds(download, folder / f"{number}.mp4", size)
                        best[side, name] = min(took, best.get((side, name), took))
    (folder / "source.bin").unlink()
    return {name: (size / best["theirs", name] / 1e6, size / best["ours", name] / 1e6) for name in names}


# --- memory, each in a process of its own --------------------------------------------------------------------------


def peak_kib() -> int:
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) if found else 0


async def grow(what: str, origin: str, folder: Path) -> None:
    """Prints how many KiB this process held at its peak beyond the client that has done a small one before."""
    small, large, to = folder / "small.jpg", folder / "large.jpg", folder / "grow.mp4"
    async with Client("benchmark-key", base_url=origin) as client:
        await client.upload(small)
        Path("/proc/self/clear_refs").write_text("5")  # noqa: ASYNC240 - forget the peak so far
        idle = peak_kib()
        if what == "upload":
            await client.upload(large)
        else:
            await client.download(Video(task_id="i2v-b", video_url=f"{origin}/plain.mp4"), to, allow_private=True)
            to.unlink()
        sys.stdout.write(f"{peak_kib() - idle}\n")


def growth_mib(what: str, origin: str, folder: Path) -> float:
    command = [sys.executable, __file__, "--grow", what, origin, str(folder)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024


def memory(folder: Path, size: int) -> dict[str, float]:
    for name, length in (("small.jpg", 100_000), ("large.jpg", PICTURE_BYTES)):
        (folder / name).write_bytes(b"\xff\xd8\xff\xe0" + os.urandom(length - 4))
    with serving(folder / "source.bin", write_file(folder / "source.bin", size)) as origin:
        return {
            f"a download of {size // MIB} MiB": growth_mib("download", origin, folder),
            f"an upload of {PICTURE_BYTES // 10**6} MB": growth_mib("upload", origin, folder),
        }


# --- all of it -----------------------------------------------------------------------------------------------------

ROWS = {"plain": "written to a file", "synced": "written and synced", "hashed": "written, and its md5 checked"}


def measure(size: int) -> int:
    rows, ratios = [], []
    places = {"disk": Path(tempfile.gettempdir()), "memory": MEMORY}
    for place, root in places.items():
        names = ["plain"] if place == "memory" else list(ROWS)
        if not root.is_dir() or shutil.disk_usage(root).free < 3 * size:
            rows.append([f"{place}: no room for {3 * size // MIB} MiB", "", "", "", ""])
            continue
        with tempfile.TemporaryDirectory(dir=root) as folder:
            for name, (theirs, ours) in asyncio.run(compare(Path(folder), size, names)).items():
                target = f"{TARGET_RATIO:.2f}" if place == "memory" else ""
                rows.append([f"{place}: {ROWS[name]}", f"{theirs:.0f}", f"{ours:.0f}", f"{ours / theirs:.2f}", target])
                ratios += [ours / theirs] if target else []
    title = f"A download of {size // MIB} MiB over loopback, best of {ROUNDS}"
    show(title, ["", "plain aiohttp, MB/s", "xiling_async, MB/s", "ratio", "target"], rows)
    with tempfile.TemporaryDirectory() as folder:
        grown = memory(Path(folder), size)
    show(
        "Peak memory above the idle client",
        ["", "MiB", "target"],
        [[k, f"{v:.1f}", TARGET_MIB] for k, v in grown.items()],
    )
    return 0 if min(ratios, default=1.0) >= TARGET_RATIO and max(grown.values()) < TARGET_MIB else 1


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="64 MiB instead of 1 GiB, a look and no verdict")
    options.add_argument("--serve", nargs=2, metavar=("FILE", "MD5"), help=argparse.SUPPRESS)
    options.add_argument("--grow", nargs=3, metavar=("WHAT", "ORIGIN", "FOLDER"), help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.serve:
        asyncio.run(serve(Path(given.serve[0]), given.serve[1]))
        return 0
    if given.grow:
        asyncio.run(grow(given.grow[0], given.grow[1], Path(given.grow[2])))
        return 0
    code = measure((64 if given.quick else 1024) * MIB)
    return 0 if given.quick else code


if __name__ == "__main__":
    sys.exit(main())
