"""Downloads against real sockets: whatever goes wrong, a file is whole or it is not there."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import hashlib
import json
import logging
import os
import pickle
import resource
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from hosts import PUBLIC, Brisk, Host, Seen, answer, brisk_timeouts, tls_front, trusting
from support import model_v, settle, started

from xiling_async import (
    Client,
    ClientClosed,
    DownloadError,
    IntegrityError,
    InvalidRequest,
    Limits,
    Polling,
    ResultExpired,
    Timeouts,
    Video,
    XilingError,
)
from xiling_async._internal.clock import SystemClock
from xiling_async.media import ssrf
from xiling_async.media.downloads import Downloads
from xiling_async.media.http import MediaTransport
from xiling_async.media.partial_file import PartialFile
from xiling_async.media.transfer import DownloadOptions
from xiling_async.simulator import Simulator, faults
from xiling_async.simulator.faults import Fault

KEY = "sim-key"
SIGNATURE = "0123456789abcdef"
MIB = 1024**2
PATIENT = brisk_timeouts()
MEDIA = Path(sys.modules[Simulator.__module__].__file__ or "").parent / "media/samples"
MP4 = (MEDIA / "landscape.mp4").read_bytes()
WEBP = (MEDIA / "landscape.webp").read_bytes()


def client_for(sim: Simulator, **options: Any) -> Client:
    given: dict[str, Any] = {
        "base_url": sim.base_url,
        "clock": Brisk(),
        "polling": Polling(every=10.0),
        "timeouts": PATIENT,
    }
    given |= options
    return Client(KEY, **given)


async def video_of(client: Client, sim: Simulator, *given: Fault) -> Video:
    """A result whose files have these faults."""
    sim.script(*given)
    return await client.run(model_v())


def ranges(sim: Simulator) -> list[tuple[int, str | None]]:
    return [(record.status, record.range) for record in sim.ledger.media]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def video_at(url: str, task_id: str = "i2v-1") -> Video:
    return Video(task_id=task_id, video_url=url)


@contextlib.asynccontextmanager
async def lonely_client(**options: Any) -> AsyncIterator[Client]:
    """A client of a service that it never has to ask."""
    given = {"base_url": "http://127.0.0.1:9/v1", "clock": Brisk(), "timeouts": PATIENT, **options}
    async with Client(KEY, **given) as client:
        yield client


# --- a whole file --------------------------------------------------------------------------------------------------


async def test_a_file_is_what_the_service_has(sim: Simulator, tmp_path: Path) -> None:
    """One request, every byte, and nothing beside it when it is done."""
    async with client_for(sim) as client:
        video = await video_of(client, sim)
        path = await client.download(video, tmp_path / "dawn.mp4", allow_private=True)
    assert (path, path.read_bytes()) == (tmp_path / "dawn.mp4", MP4)
    assert names(tmp_path) == {"dawn.mp4"}
    assert ranges(sim) == [(200, None)]
    (request,) = sim.ledger.media
    assert request.headers["accept-encoding"] == "identity"
    assert not request.carried_key
    assert not request.carried_cookie
    assert KEY not in str(request.headers)


@pytest.mark.parametrize("spelled", ["folder", "text", "separator"])
async def test_a_folder_gives_names_of_task_and_bytes(sim: Simulator, tmp_path: Path, spelled: str) -> None:
    """`<task_id>.<type>`, for the video and for the thumbnail."""
    spellings: dict[str, str | Path] = {"folder": tmp_path, "text": str(tmp_path), "separator": f"{tmp_path}{os.sep}"}
    to = spellings[spelled]
    async with client_for(sim) as client:
        video = await video_of(client, sim)
        paths = await client.download(video, to, what="both", allow_private=True)
    assert paths == (tmp_path / f"{video.task_id}.mp4", tmp_path / f"{video.task_id}.webp")
    assert [path.read_bytes() for path in paths] == [MP4, WEBP]
    assert names(tmp_path) == {path.name for path in paths}


async def test_the_thumbnail_alone(sim: Simulator, tmp_path: Path) -> None:
    """Only what was asked for is fetched."""
    async with client_for(sim) as client:
        video = await video_of(client, sim)
        path = await client.download(video, tmp_path, what="thumbnail", allow_private=True)
    assert (path.name, path.read_bytes()) == (f"{video.task_id}.webp", WEBP)
    assert [record.path.rpartition(".")[2] for record in sim.ledger.media] == ["webp"]


async def test_beside_a_named_video_the_thumbnail_is_called_alike(sim: Simulator, tmp_path: Path) -> None:
    """`what="both"` with a file: its stem, and the type by the bytes."""
    async with client_for(sim) as client:
        video = await video_of(client, sim)
        paths = await client.download(video, tmp_path / "dawn.mp4", what="both", allow_private=True)
    assert paths == (tmp_path / "dawn.mp4", tmp_path / "dawn.webp")


async def test_a_thumbnail_never_replaces_its_own_video(sim: Simulator, tmp_path: Path) -> None:
    """A video that is named like a picture: even `overwrite` does not mean that."""
    async with client_for(sim) as client:
        video = await video_of(client, sim)
        with pytest.raises(DownloadError, match="exists already"):
            await client.download(video, tmp_path / "x.webp", what="both", allow_private=True, overwrite=True)
    assert (tmp_path / "x.webp").read_bytes() == MP4


async def test_a_relative_path_stays_relative(sim: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes back is spelled as what was given."""
    monkeypatch.chdir(tmp_path)
    async with client_for(sim) as client:
        video = await video_of(client, sim)
        assert await client.download(video, "dawn.mp4", allow_private=True) == Path("dawn.mp4")
    assert (tmp_path / "dawn.mp4").read_bytes() == MP4


async def test_the_type_of_unknown_bytes_is_bin(sim: Simulator, tmp_path: Path) -> None:
    """Neither the URL nor a header is asked what it is."""
    async with client_for(sim) as client:
        video = await video_of(client, sim, faults.media_bytes(b"something else"))
        path = await client.download(video, tmp_path, allow_private=True)
    assert (path.name, path.read_bytes()) == (f"{video.task_id}.bin", b"something else")


async def test_an_empty_file_is_whole_as_well(sim: Simulator, tmp_path: Path) -> None:
    """Nothing was announced, nothing came: that is what there is."""
    async with client_for(sim) as client:
        video = await video_of(client, sim, faults.media_bytes(b""))
        path = await client.download(video, tmp_path / "x", allow_private=True)
    assert path.read_bytes() == b""


async def test_progress_tells_what_is_on_the_disk(sim: Simulator, tmp_path: Path) -> None:
    """It never goes back, and ends with all of it."""
    told: list[tuple[int, int | None]] = []
    async with client_for(sim) as client:
        video = await video_of(client, sim, faults.big_media(8 * MIB))
        path = tmp_path / "x.mp4"
        await client.download(video, path, allow_private=True, progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert (told[0], told[-1]) == ((0, 8 * MIB), (8 * MIB, 8 * MIB))
    assert len(told) > 2


# --- what exists ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["video", "thumbnail"])
async def test_what_exists_is_not_overwritten(sim: Simulator, tmp_path: Path, what: Any) -> None:
    """The error comes before a byte is asked for; `overwrite=True` replaces the file."""
    mine = tmp_path / "mine"
    mine.write_text("mine")
    async with client_for(sim) as client:
        video = await video_of(client, sim)
        with pytest.raises(DownloadError, match=r"mine.* exists already") as refused:
            await client.download(video, mine, what=what, allow_private=True)
        assert (sim.ledger.media, mine.read_text()) == ([], "mine")
        assert refused.value.task_ids == (video.task_id,)
        assert refused.value.charged == "yes"
        await client.download(video, mine, what=what, allow_private=True, overwrite=True)
    assert mine.read_bytes() == (MP4 if what == "video" else WEBP)
    assert names(tmp_path) == {"mine"}


async def test_in_a_folder_what_exists_is_not_overwritten_either(sim: Simulator, tmp_path: Path) -> None:
    """Nor is the video fetched when only the thumbnail is in the way."""
    async with client_for(sim) as client:
        video = await video_of(client, sim)
        (tmp_path / f"{video.task_id}.webp").symlink_to(tmp_path / "nowhere")
        with pytest.raises(DownloadError, match="exists already"):
            await client.download(video, tmp_path, what="both", allow_private=True)
    assert sim.ledger.media == []
    assert names(tmp_path) == {f"{video.task_id}.webp"}


async def test_what_appears_meanwhile_is_not_overwritten(sim: Simulator, tmp_path: Path) -> None:
    """A file of that name that somebody makes during the download stays; the part stays too, and is used later."""
    path = tmp_path / "x.mp4"
    async with client_for(sim, timeouts=brisk_timeouts(200)) as client:
        video = await video_of(client, sim, faults.stalled_media(9_000))
        download = asyncio.create_task(client.download(video, path, allow_private=True))
        await sim.wait_for_stalls(1)
        path.write_text("mine")
        with pytest.raises(DownloadError, match="exists already"):
            await download
        assert (path.read_text(), names(tmp_path)) == ("mine", {"x.mp4", "x.mp4.part", "x.mp4.part.json"})
        await client.download(video, path, allow_private=True, overwrite=True)
    assert (path.read_bytes(), names(tmp_path)) == (MP4, {"x.mp4"})
    assert len(sim.ledger.media) == 2  # all of it was there, and its digest proved it


async def test_what_is_there_already_can_be_asked_for(sim: Simulator, tmp_path: Path) -> None:
    """In a folder, the file of that task."""
    async with client_for(sim) as client:
        video = await video_of(client, sim)
        downloads = downloads_of(None)
        options = DownloadOptions()
        assert await downloads.there_already(video, tmp_path, options) is None
        path = await client.download(video, tmp_path, allow_private=True)
        assert await downloads.there_already(video, tmp_path, options) == path
        with pytest.raises(DownloadError, match="there is no folder"):
            await downloads.there_already(video, tmp_path / "missing" / "x", options)
        await downloads.close()


# --- cut, and gone on with -----------------------------------------------------------------------------------------


async def test_a_cut_download_goes_on_where_it_was_cut(sim: Simulator, tmp_path: Path) -> None:
    """As often as it is cut, as long as it gets on: by Range, and If-Range with the validator."""
    async with client_for(sim) as client:
        video = await video_of(client, sim, faults.cut_media(1_000, times=None))
        path = await client.download(video, tmp_path / "x.mp4", allow_private=True)
    assert path.read_bytes() == MP4
    assert ranges(sim) == [(200, None), *((206, f"bytes={at}-") for at in range(1_000, len(MP4), 1_000))]
    assert len({record.headers["if-range"] for record in sim.ledger.media[1:]}) == 1


@pytest.mark.parametrize("given", [(), (faults.no_etag(),), (faults.no_hash(),), (faults.no_length(),)], ids=str)
async def test_a_later_call_goes_on_as_well(sim: Simulator, tmp_path: Path, given: tuple[Fault, ...]) -> None:
    """The part and what was announced outlive the client, with a validator, or without one if a digest can prove it."""
    path = tmp_path / "x.mp4"
    async with client_for(sim) as client:
        video = await video_of(client, sim, faults.stalled_media(20_000), *given)
        download = asyncio.create_task(client.download(video, path, allow_private=True))
        await sim.wait_for_stalls(1)
        while not (tmp_path / "x.mp4.part").exists() or (tmp_path / "x.mp4.part").stat().st_size < 20_000:
            await settle(1)
        download.cancel()
        with pytest.raises(asyncio.CancelledError):
            await download
    assert names(tmp_path) == {"x.mp4.part", "x.mp4.part.json"}
    assert (tmp_path / "x.mp4.part").read_bytes() == MP4[:20_000]
    said = (tmp_path / "x.mp4.part.json").read_text()
    assert not [word for word in ("http", "127.0.0.1", "Signature", KEY) if word in said]
    told: list[int] = []
    async with client_for(sim) as client:
        await client.download(video, path, allow_private=True, progress=lambda done, _: told.append(done))
    assert (path.read_bytes(), names(tmp_path)) == (MP4, {"x.mp4"})
    assert ranges(sim) == [(200, None), (206, "bytes=20000-")]
    assert told[0] == 20_000


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((faults.no_ranges(),), [(200, None), (200, "bytes=10000-")]),
        ((faults.changing_media(times=1),), [(200, None), (200, "bytes=10000-")]),
        ((faults.no_etag(), faults.no_hash()), [(200, None), (200, None)]),
        # Nothing but the digest says that the rest is of another file: at once if both answers have one.
        ((faults.changing_media(times=1), faults.no_etag()), [(200, None), (206, "bytes=10000-"), (200, None)]),
    ],
    ids=str,
)
async def test_what_cannot_be_gone_on_with_starts_over(
    sim: Simulator, tmp_path: Path, given: tuple[Fault, ...], expected: list[tuple[int, str | None]]
) -> None:
    """No ranges, another file by now, nothing that proves it the same: from the first byte, and never a mixture."""
    async with client_for(sim) as client:
        video = await video_of(client, sim, faults.cut_media(10_000), *given)
        path = await client.download(video, tmp_path / "x.mp4", allow_private=True)
    changed = any(isinstance(fault, faults.changing_media) for fault in given)
    assert (path.read_bytes() == MP4) is not changed
    assert (path.read_bytes()[:-100], path.stat().st_size) == (MP4[:-100], len(MP4))
    assert ranges(sim) == expected


async def test_a_stalled_download_is_gone_on_with(sim: Simulator, tmp_path: Path) -> None:
    """After `Timeouts.stall` without a byte the connection is given up."""
    async with client_for(sim, timeouts=brisk_timeouts(200)) as client:
        video = await video_of(client, sim, faults.stalled_media(30_000))
        path = await client.download(video, tmp_path / "x.mp4", allow_private=True)
    assert path.read_bytes() == MP4
    assert ranges(sim) == [(200, None), (206, "bytes=30000-")]


async def test_a_slow_download_is_not_stalled(sim: Simulator, tmp_path: Path) -> None:
    """All of it may take longer than the stall, as long as 1 KiB a second comes."""
    async with client_for(sim, timeouts=brisk_timeouts(300)) as client:
        video = await video_of(client, sim, faults.big_media(1 * MIB), faults.slow_media(200_000, 0.1))
        path = await client.download(video, tmp_path / "x.mp4", allow_private=True)
    assert path.stat().st_size == MIB
    assert ranges(sim) == [(200, None)]


@pytest.mark.parametrize(
    "given",
    [faults.media_status(500, 0, 503, 408), faults.media_status(429, retry_after=0), faults.media_status(429, 429)],
    ids=str,
)
async def test_what_passes_is_waited_for(sim: Simulator, tmp_path: Path, given: Fault) -> None:
    """5xx, a cut before the answer, and 429 are tried again."""
    async with client_for(sim) as client:
        video = await video_of(client, sim, given)
        path = await client.download(video, tmp_path / "x.mp4", allow_private=True)
    assert path.read_bytes() == MP4


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (faults.cut_media(0, times=None), "ServerDisconnectedError|ClientPayloadError|ClientOSError"),
        (faults.media_status(*[500] * 20), "HTTP 500"),
        (faults.media_status(*[0] * 20), "ServerDisconnectedError|ClientOSError"),
        (faults.stalled_media(0, times=None), "nothing came for too long"),
    ],
    ids=str,
)
async def test_tries_that_bring_nothing_come_to_an_end(
    sim: Simulator, tmp_path: Path, given: Fault, words: str
) -> None:
    """After six in a row; what is left is nothing."""
    async with client_for(sim, timeouts=brisk_timeouts(100)) as client:
        video = await video_of(client, sim, given)
        with pytest.raises(DownloadError, match=words):
            await client.download(video, tmp_path / "x.mp4", allow_private=True)
    assert {record.range for record in sim.ledger.media} == {None}
    assert len(sim.ledger.media) in (6, 12)  # aiohttp repeats a GET by itself when a connection was just lost
    assert names(tmp_path) == set()


async def test_a_limit_that_stays_comes_to_an_end(sim: Simulator, tmp_path: Path) -> None:
    """429 for ever: waited for eight times, then told, with the host's own wish."""
    async with client_for(sim) as client:
        video = await video_of(client, sim, faults.media_status(*[429] * 20, retry_after=7))
        with pytest.raises(DownloadError, match="HTTP 429") as limited:
            await client.download(video, tmp_path / "x.mp4", allow_private=True)
    assert limited.value.retry_after == 7
    assert len(sim.ledger.media) == 9


async def test_what_came_is_kept_when_the_tries_come_to_an_end(tmp_path: Path) -> None:
    """A host that is cut for good after a while: the error says that a later download goes on from there."""

    def cut_off(seen: Seen, number: int) -> bytes:
        return answer(200, MP4[:30_000], 'ETag: "1"', length=len(MP4)) if number == 1 else answer(503)

    def back_again(seen: Seen, number: int) -> bytes:
        assert (seen.header("Range"), seen.header("If-Range")) == ("bytes=30000-", '"1"')
        return answer(206, MP4[30_000:], f"Content-Range: bytes 30000-{len(MP4) - 1}/{len(MP4)}")

    async with lonely_client() as client:
        async with Host(cut_off) as host:
            with pytest.raises(DownloadError, match=r"HTTP 503; .* kept: a later download resumes"):
                await client.download(video_at(host.url), tmp_path / "x.mp4", allow_private=True)
        assert (tmp_path / "x.mp4.part").read_bytes() == MP4[:30_000]
        async with Host(back_again) as host:
            path = await client.download(video_at(host.url), tmp_path / "x.mp4", allow_private=True)
    assert (path.read_bytes(), names(tmp_path)) == (MP4, {"x.mp4"})


# --- what was announced --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        (faults.wrong_hash(),),
        (faults.wrong_hash(), faults.no_hash("md5")),
        (faults.wrong_hash(), faults.no_length()),
        (faults.wrong_hash(), faults.cut_media(9_000)),
        (faults.wrong_length(10),),
        (faults.wrong_length(-10),),
        (faults.wrong_length(10), faults.no_hash()),
        (faults.big_media(3 * MIB), faults.wrong_length(-10)),
    ],
    ids=str,
)
async def test_what_is_not_as_announced_is_not_kept(sim: Simulator, tmp_path: Path, given: tuple[Fault, ...]) -> None:
    """Wrong length, wrong md5, wrong crc32c: fetched once more from the start, then nothing is left."""
    async with client_for(sim) as client:
        video = await video_of(client, sim, *given)
        with pytest.raises(IntegrityError, match="twice") as wrong:
            await client.download(video, tmp_path / "x.mp4", allow_private=True)
    assert names(tmp_path) == set()
    assert wrong.value.charged == "yes"
    assert [asked for _, asked in ranges(sim)].count(None) == 2


@pytest.mark.parametrize("given", [(), (faults.no_hash("md5"),)], ids=str)
async def test_one_bad_transfer_is_made_good(sim: Simulator, tmp_path: Path, given: tuple[Fault, ...]) -> None:
    """A digest that is wrong once: the second, clean try counts."""
    async with client_for(sim) as client:
        video = await video_of(client, sim, faults.wrong_hash(times=1), *given)
        path = await client.download(video, tmp_path / "x.mp4", allow_private=True)
    assert (path.read_bytes(), names(tmp_path)) == (MP4, {"x.mp4"})
    assert ranges(sim) == [(200, None), (200, None)]


async def test_a_part_that_was_spoiled_meanwhile_is_found_out(sim: Simulator, tmp_path: Path) -> None:
    """Bytes of an earlier call are read again: a digest is over all of the file."""
    path = tmp_path / "x.mp4"
    async with client_for(sim) as client:
        video = await video_of(client, sim, faults.cut_media(9_000, times=None))
        with pytest.raises(RuntimeError, match="enough"):
            await client.download(video, path, allow_private=True, progress=_stop_at(9_000))
        part = tmp_path / "x.mp4.part"
        part.write_bytes(b"!" + part.read_bytes()[1:])
        await client.download(video, path, allow_private=True)
        path.rename(part)  # all of it, but for one byte, and not what its sidecar says
        part.write_bytes(b"!" + part.read_bytes()[1:])
        digest = base64.b64encode(hashlib.md5(MP4).digest()).decode()
        said = {"validator": '"old"', "total": len(MP4), "digests": {"md5": digest}}
        owner = f"image_to_video {video.task_id} video"
        (tmp_path / "x.mp4.part.json").write_text(json.dumps({"form": 1, "result": owner, "announced": said}))
        await client.download(video, path, allow_private=True)
    assert (path.read_bytes(), names(tmp_path)) == (MP4, {"x.mp4"})


def _stop_at(size: int) -> Callable[[int, int | None], None]:
    def progress(done: int, total: int | None) -> None:
        if done >= size:
            raise RuntimeError("enough")

    return progress


async def test_what_is_packed_is_refused(sim: Simulator, tmp_path: Path) -> None:
    """Nobody asked for it, and its length and digest would be those of something else."""
    async with client_for(sim) as client:
        video = await video_of(client, sim, faults.gzip_media())
        with pytest.raises(DownloadError, match="Content-Encoding"):
            await client.download(video, tmp_path / "x.mp4", allow_private=True)
    assert (names(tmp_path), len(sim.ledger.media)) == (set(), 1)


@pytest.mark.parametrize("given", [(), (faults.no_length(),)], ids=str)
async def test_there_is_a_cap(sim: Simulator, tmp_path: Path, given: tuple[Fault, ...]) -> None:
    """More than `max_bytes`, announced or not: an error, and nothing on the disk."""
    async with client_for(sim) as client:
        video = await video_of(client, sim, *given)
        with pytest.raises(DownloadError, match=r"cap of 48177 bytes"):
            await client.download(video, tmp_path / "x.mp4", allow_private=True, max_bytes=len(MP4) - 1)
        assert names(tmp_path) == set()
        await client.download(video, tmp_path / "x.mp4", allow_private=True, max_bytes=len(MP4))


async def test_the_cap_is_also_for_what_came_before(sim: Simulator, tmp_path: Path) -> None:
    """A part that is larger than today's cap is not gone on with."""
    async with client_for(sim) as client:
        video = await video_of(client, sim)
        with pytest.raises(RuntimeError, match="enough"):
            await client.download(video, tmp_path / "x.mp4", allow_private=True, progress=_stop_at(len(MP4)))
        with pytest.raises(DownloadError, match="cap"):
            await client.download(video, tmp_path / "x.mp4", allow_private=True, max_bytes=9)
    assert len(sim.ledger.media) == 1


ODD: list[tuple[str, list[bytes], str | None]] = [
    # the name, the answers in their order (the last for ever), the error (None: the file comes)
    ("a range that begins elsewhere", [b"cut", b"206 0-9999", b"200"], None),
    ("a range that ends elsewhere", [b"cut", b"206 short", b"200"], None),
    ("no Content-Range", [b"cut", b"206", b"200"], None),
    ("a range nobody asked for", [b"206 unasked", b"200"], None),
    ("a range of another ETag", [b"cut", b"206 other", b"200"], None),
    ("a range of another length", [b"cut", b"206 longer", b"200"], None),
    ("a range of another length twice", [b"cut", b"206 longer", b"cut", b"206 longer"], "IntegrityError"),
    ("416 that agrees", [b"cut", b"416 same", b"200"], None),
    ("416 that disagrees", [b"cut", b"416 other", b"200"], None),
    ("416 that says nothing", [b"cut", b"416", b"200"], None),
    ("416 nobody asked for", [b"416"], "HTTP 416"),
    ("a body that ends with the connection", [b"endless"], "neither a length nor a digest"),
    ("such a body with a digest", [b"endless hashed"], None),
    ("garbage", [b"garbage"], "not HTTP"),
    ("garbage when going on", [b"cut", b"garbage", b"206 rest"], None),
    ("no content", [b"204"], "HTTP 204"),
    ("not modified", [b"304"], "HTTP 304"),
    ("payment required", [b"402"], "HTTP 402"),
    ("a redirect to nowhere", [b"302"], "HTTP 302"),
    ("a redirect to no URL", [b"302 bad"], "it is not a URL"),
    ("a redirect to a file", [b"302 file"], "it is not https"),
    ("a redirect to a name and password", [b"302 user"], "a user or a password"),
    ("a redirect to plain http elsewhere", [b"302 http"], "plain http"),
    ("a relative redirect", [b"302 relative", b"200"], None),
    ("a digest that is none", [b"200 odd digest"], None),
    ("a length that is none", [b"200 odd length"], "not HTTP"),
]


def odd_answer(word: bytes, seen: Seen) -> bytes:
    """What these words of the table stand for."""
    size, etag = len(MP4), 'ETag: "1"'
    digest = f"x-goog-hash: md5={base64.b64encode(hashlib.md5(MP4).digest()).decode()}"
    start = int((seen.header("Range") or "bytes=0-")[6:-1])
    rest = f"bytes {start}-{size - 1}/{size}"
    return {
        b"cut": answer(200, MP4[:10_000], etag, length=size),
        b"200": answer(200, MP4, etag),
        b"200 odd digest": answer(200, MP4, "x-goog-hash: md5=AAAA, sha9=x", "x-goog-hash: crc32c=!"),
        b"200 odd length": answer(200, MP4, "Content-Length: many", length=-1),
        b"206": answer(206, MP4[start:], etag),
        b"206 rest": answer(206, MP4[start:], etag, f"Content-Range: {rest}"),
        b"206 0-9999": answer(206, MP4[:10_000], etag, f"Content-Range: bytes 0-9999/{size}"),
        b"206 short": answer(206, MP4[start:-5], etag, f"Content-Range: bytes {start}-{size - 6}/{size}"),
        b"206 unasked": answer(206, MP4, etag, f"Content-Range: bytes 0-{size - 1}/{size}"),
        b"206 other": answer(206, MP4[start:], 'ETag: "2"', f"Content-Range: {rest}"),
        b"206 longer": answer(206, MP4[start:] + b"!", etag, f"Content-Range: bytes {start}-{size}/{size + 1}"),
        b"416": answer(416),
        b"416 same": answer(416, b"", f"Content-Range: bytes */{size}"),
        b"416 other": answer(416, b"", "Content-Range: bytes */10000"),
        b"endless": answer(200, MP4, etag, length=-1),
        b"endless hashed": answer(200, MP4, digest, length=-1),
        b"garbage": b"220 mail.example ESMTP\r\n\r\n",
        b"204": answer(204, length=-1),
        b"304": answer(304, length=-1),
        b"402": answer(402),
        b"302": answer(302),
        b"302 bad": answer(302, b"", "Location: https://ho st/"),
        b"302 file": answer(302, b"", "Location: file:///etc/passwd"),
        b"302 user": answer(302, b"", "Location: https://me:secret@127.0.0.1/"),
        b"302 http": answer(302, b"", "Location: http://media.example.com/"),
        b"302 relative": answer(302, b"", "Location: ../b.mp4?x=1"),
    }[word]


@pytest.mark.parametrize(("words", "error"), [row[1:] for row in ODD], ids=[row[0] for row in ODD])
async def test_odd_answers(tmp_path: Path, words: list[bytes], error: str | None) -> None:
    """Whatever a host says, the file is right or it is not there; the error names task and host, and no more."""

    def told(seen: Seen, number: int) -> bytes:
        return odd_answer(words[min(number, len(words)) - 1], seen)

    async with Host(told) as host, lonely_client() as client:
        url, path = f"{host.url}&Expires=1", tmp_path / "x.mp4"
        if error is None:
            await client.download(video_at(url), path, allow_private=True)
            assert (path.read_bytes(), names(tmp_path)) == (MP4, {"x.mp4"})
        else:
            with pytest.raises(DownloadError) as failed:
                await client.download(video_at(url), path, allow_private=True)
            assert error in repr(failed.value)
            assert "i2v-1" in str(failed.value)
            assert not path.exists()
            assert SIGNATURE not in "".join(traceback.format_exception(failed.value))
        assert all(seen.header("Authorization") is None for seen in host.seen)
        assert not [seen for seen in host.seen if KEY.encode() in seen.head]


# --- a dead link ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
async def test_a_dead_link_is_asked_for_anew_once(sim: Simulator, tmp_path: Path, status: int) -> None:
    """One status GET for a fresh link."""
    async with client_for(sim) as client:
        video = await video_of(client, sim, faults.media_gone(status, new_url=True))
        asked = len(sim.ledger.gets)
        path = await client.download(video, tmp_path / "x.mp4", allow_private=True)
        assert len(sim.ledger.gets) == asked + 1
    assert path.read_bytes() == MP4
    assert [record.status for record in sim.ledger.media] == [status, 200]


async def test_a_dead_link_without_a_fresh_one_has_expired(sim: Simulator, tmp_path: Path) -> None:
    """`ResultExpired` says until when the result lived; nothing is left of what had come."""
    (tmp_path / "x.mp4.part").write_bytes(b"some bytes")
    async with client_for(sim) as client:
        video = await video_of(client, sim, faults.media_gone(410))
        with pytest.raises(ResultExpired, match=r"HTTP 410.* 7 days, this one until 20\d\d-\d\d-\d\d \d\d:\d\d UTC"):
            await client.download(video, tmp_path / "x.mp4", allow_private=True)
    assert names(tmp_path) == set()
    assert len(sim.ledger.media) == 1


async def test_a_link_that_dies_twice_has_expired(tmp_path: Path, sim: Simulator) -> None:
    """The fresh link is dead too: it is not asked for a third."""
    async with client_for(sim) as client, Host(lambda seen, number: answer(404)) as host:
        video = await video_of(client, sim, faults.media_gone(404))
        with pytest.raises(ResultExpired):
            await client.download(video_at(host.url, video.task_id), tmp_path / "x.mp4", allow_private=True)
    assert (len(host.seen), len(sim.ledger.media)) == (1, 1)


async def test_a_result_of_a_task_that_nobody_knows_has_expired(tmp_path: Path, sim: Simulator) -> None:
    """The service does not know the task, nor does the store: the date is left out."""
    async with client_for(sim) as client, Host(lambda seen, number: answer(404)) as host:
        with pytest.raises(ResultExpired, match=r"Results live 7 days\."):
            await client.download(video_at(host.url, "i2v-strange"), tmp_path / "x.mp4", allow_private=True)


async def test_a_missing_link_is_asked_for(sim: Simulator, tmp_path: Path) -> None:
    """Callbacks say less than the status: a thumbnail that is not in the result may be there all the same."""
    async with client_for(sim) as client:
        video = await video_of(client, sim)
        bare = Video(task_id=video.task_id, video_url=video.video_url)
        path = await client.download(bare, tmp_path, what="thumbnail", allow_private=True)
    assert path.read_bytes() == WEBP


async def test_when_the_service_cannot_be_asked_the_part_stays(sim: Simulator, tmp_path: Path) -> None:
    """A dead link proves nothing while nobody can be asked for another one."""

    def told(seen: Seen, number: int) -> bytes:
        return answer(200, MP4[:10_000], 'ETag: "1"', length=len(MP4)) if number == 1 else answer(404)

    async with lonely_client() as client, Host(told) as host:
        with pytest.raises(DownloadError, match="could not be asked for a new one") as failed:
            await client.download(video_at(host.url), tmp_path / "x.mp4", allow_private=True)
    assert not isinstance(failed.value, ResultExpired)
    assert names(tmp_path) == {"x.mp4.part", "x.mp4.part.json"}


# --- the disk ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process may grow beyond this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("given", [(), (faults.no_etag(), faults.no_hash())], ids=["resumable", "not resumable"])
async def test_a_full_disk_is_told_and_left_no_fuller(sim: Simulator, tmp_path: Path, given: tuple[Fault, ...]) -> None:
    """Nothing of the partial file stays, though it could be resumed; once there is room, all of it is fetched."""
    path = tmp_path / "x.mp4"
    async with client_for(sim) as client:
        video = await video_of(client, sim, faults.big_media(4 * MIB), *given)
        with full_disk(3 * MIB), pytest.raises(DownloadError, match="the disk is full") as full:
            await client.download(video, path, allow_private=True)
        assert isinstance(full.value.__cause__, OSError)
        assert names(tmp_path) == set()
        await client.download(video, path, allow_private=True)
    assert names(tmp_path) == {"x.mp4"}
    assert (path.stat().st_size, ranges(sim)[1]) == (4 * MIB, (200, None))


@contextlib.contextmanager
def as_nobody(folder: Path) -> Iterator[None]:
    """Somebody who may look at this folder and not write in it."""
    folder.chmod(0o500 if os.geteuid() else 0o700)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o700)


@pytest.mark.parametrize(
    ("to", "words"),
    [
        ("missing/x.mp4", "there is no folder"),
        ("missing/", "there is no folder"),
        ("file/x.mp4", "there is no folder"),
        ("nul\0.mp4", "it is not a path"),
        ("half\ud800.mp4", "it is not a path"),
        ("n" * 300, "name too long"),
        ("part-is-folder", "is a directory"),
        ("part-is-fifo", "something that is not a file is in the way"),
        ("part-is-link", "too many levels of symbolic links"),
        ("sidecar-is-folder", "is a directory"),
    ],
)
async def test_where_nothing_can_be_written(sim: Simulator, tmp_path: Path, to: str, words: str) -> None:
    """A clear sentence; no request where it is known before, nothing changed on the disk."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "part-is-folder.part").mkdir()
    os.mkfifo(tmp_path / "part-is-fifo.part")
    (tmp_path / "part-is-link.part").symlink_to(tmp_path / "file")
    (tmp_path / "sidecar-is-folder.part.json").mkdir()
    before = names(tmp_path)
    async with client_for(sim) as client:
        video = await video_of(client, sim)
        with pytest.raises(DownloadError, match=words):
            await client.download(video, f"{tmp_path}/{to}", allow_private=True)
    assert (names(tmp_path), (tmp_path / "file").read_text()) == (before, "mine")
    assert len(sim.ledger.media) <= (to == "sidecar-is-folder")


async def test_where_writing_is_not_permitted(sim: Simulator, tmp_path: Path) -> None:
    """Said as it is."""
    async with client_for(sim) as client:
        video = await video_of(client, sim)
        with as_nobody(tmp_path), pytest.raises(DownloadError, match=r"not permitted|there is no folder"):
            await client.download(video, tmp_path / "x.mp4", allow_private=True)
    assert sim.ledger.media == []


async def test_a_long_name_has_a_part_too(sim: Simulator, tmp_path: Path) -> None:
    """The part of a name that is as long as names may be is cut, and told apart from others."""
    one, two = tmp_path / ("ä" * 127), tmp_path / ("ä" * 126 + "bb")
    async with client_for(sim) as client:
        video = await video_of(client, sim)
        await asyncio.gather(*(client.download(video, path, allow_private=True) for path in (one, two)))
    assert (one.read_bytes(), two.read_bytes(), len(names(tmp_path))) == (MP4, MP4, 2)


async def test_a_hard_link_that_a_kill_has_left_does_not_touch_the_whole_file(sim: Simulator, tmp_path: Path) -> None:
    """Between the link and the end of the part a kill leaves two names of one file: the next download spares it."""
    path, other = tmp_path / "x.mp4", tmp_path / "kept.mp4"
    other.write_bytes(b"a whole file")
    os.link(other, tmp_path / "x.mp4.part")
    async with client_for(sim) as client:
        video = await video_of(client, sim)
        await client.download(video, path, allow_private=True)
    assert (other.read_bytes(), path.read_bytes(), names(tmp_path)) == (b"a whole file", MP4, {"x.mp4", "kept.mp4"})


@pytest.mark.parametrize(
    "said",
    [
        None, "", "no json", "[]", "7", '{"form": 1}', "[" * 9_999,
        {"form": 2}, {"result": "image_to_video i2v-2 video"}, {"announced": None}, {"announced": {}},
        {"announced": {"validator": 7, "total": None, "digests": {}}},
        {"announced": {"validator": "a\r\nb", "total": None, "digests": {}}},
        {"announced": {"validator": '"1"', "total": -1, "digests": {}}},
        {"announced": {"validator": '"1"', "total": True, "digests": {}}},
        {"announced": {"validator": '"1"', "total": 5, "digests": {}}},
        {"announced": {"validator": '"1"', "total": None, "digests": {"md5": "AAAA"}}},
        {"announced": {"validator": '"1"', "total": None, "digests": 7}},
        {"announced": {"validator": None, "total": 9, "digests": {}}},
        {"boot": "another start of this machine"},
        {"boot": None},
    ],
    ids=str,
)  # fmt: skip
async def test_a_part_that_cannot_be_trusted_starts_over(tmp_path: Path, said: Any) -> None:
    """Another result, another form, broken, or written before a loss of power with no digest to prove it."""
    if said is not None:
        if isinstance(said, dict):
            announced = {"validator": '"1"', "total": len(MP4), "digests": {}}
            said = json.dumps({"form": 1, "result": "image_to_video i2v-1 video", "announced": announced, **said})
        (tmp_path / "x.mp4.part.json").write_text(said)
    (tmp_path / "x.mp4.part").write_bytes(MP4[:100])
    async with Host(lambda seen, number: answer(200, MP4, 'ETag: "1"')) as host, lonely_client() as client:
        path = await client.download(video_at(host.url), tmp_path / "x.mp4", allow_private=True)
    assert (path.read_bytes(), names(tmp_path)) == (MP4, {"x.mp4"})
    assert [seen.header("Range") for seen in host.seen] == [None]


@pytest.mark.parametrize("cut", [len(MP4), len(MP4) - 1], ids=["whole", "but one byte"])
async def test_a_whole_part_without_a_digest_is_asked_about(tmp_path: Path, cut: int) -> None:
    """One byte is asked for: the answer says whether it is still the same file."""

    def first(seen: Seen, number: int) -> bytes:
        return answer(200, MP4[:cut], 'ETag: "1"', length=len(MP4))

    def later(seen: Seen, number: int) -> bytes:
        last = len(MP4) - 1
        assert seen.header("Range") == f"bytes={last}-"
        return answer(206, MP4[-1:], f"Content-Range: bytes {last}-{last}/{len(MP4)}")

    path = tmp_path / "x.mp4"
    async with lonely_client() as client:
        async with Host(first) as host:
            with pytest.raises(RuntimeError):
                await client.download(video_at(host.url), path, allow_private=True, progress=_stop_at(cut))
        async with Host(later) as host:
            await client.download(video_at(host.url), path, allow_private=True)
    assert (path.read_bytes(), len(host.seen)) == (MP4, 1)


async def test_last_modified_is_a_validator_too(tmp_path: Path) -> None:
    """Where there is no strong ETag; but not when it changed in the very second of the answer."""
    dates = {"strong": "Mon, 01 Jan 2029 00:00:00 GMT", "weak": "Tue, 02 Jan 2029 00:00:00 GMT"}
    for name, modified in dates.items():
        headers = ('ETag: W/"1"', "Date: Tue, 02 Jan 2029 00:00:00 GMT", f"Last-Modified: {modified}")

        def told(seen: Seen, number: int, headers: tuple[str, ...] = headers) -> bytes:
            size = 10_000 if number == 1 else len(MP4)
            return answer(200, MP4[:size], *headers, length=len(MP4))

        async with Host(told) as host, lonely_client() as client:
            await client.download(video_at(host.url), tmp_path / name, allow_private=True)
        assert host.seen[1].header("If-Range") == (modified if name == "strong" else None)
        assert host.seen[1].header("Range") == ("bytes=10000-" if name == "strong" else None)


# --- several at once -----------------------------------------------------------------------------------------------


async def test_two_downloads_to_one_file_take_turns(sim: Simulator, tmp_path: Path) -> None:
    """In one client the second waits, and then finds what the first has made."""
    async with client_for(sim) as client:
        one, two = [await video_of(client, sim, faults.big_media(size)) for size in (2 * MIB, 3 * MIB)]
        path = tmp_path / "x.mp4"
        ends = await asyncio.gather(
            *(client.download(video, path, allow_private=True) for video in (one, two)), return_exceptions=True
        )
        assert [type(end) for end in ends if isinstance(end, BaseException)] == [DownloadError]
        assert path.stat().st_size == (3 if isinstance(ends[0], Exception) else 2) * MIB
        await asyncio.gather(
            *(client.download(video, path, allow_private=True, overwrite=True) for video in (one, two))
        )
    assert path.read_bytes()[: len(MP4)] == MP4
    assert (path.stat().st_size % MIB, names(tmp_path)) == (0, {"x.mp4"})


async def test_two_clients_do_not_write_one_part(sim: Simulator, tmp_path: Path) -> None:
    """The part is locked: the second is told so, and harms nothing."""
    path = tmp_path / "x.mp4"
    async with client_for(sim) as first, client_for(sim) as second:
        video = await video_of(first, sim, faults.stalled_media(20_000))
        download = asyncio.create_task(first.download(video, path, allow_private=True))
        await sim.wait_for_stalls(1)
        with pytest.raises(DownloadError, match="by another client right now"):
            await second.download(video, path, allow_private=True)
        download.cancel()
        with pytest.raises(asyncio.CancelledError):
            await download
        await second.download(video, path, allow_private=True)
    assert path.read_bytes() == MP4


async def test_only_so_many_at_once(sim: Simulator, tmp_path: Path) -> None:
    """`Limits.downloads`: the third waits until one of two is done."""
    async with client_for(sim, limits=Limits(downloads=2)) as client:
        videos = [await video_of(client, sim, faults.stalled_media(9_000)) for _ in range(3)]
        downloads = [asyncio.create_task(client.download(video, tmp_path, allow_private=True)) for video in videos]
        await sim.wait_for_stalls(2)
        await settle(200)
        assert len(sim.ledger.media) == 2
        under_way = next(place for place, video in enumerate(videos) if video.task_id in sim.ledger.media[0].path)
        downloads[under_way].cancel()
        await sim.wait_for_stalls(3)
        for download in downloads:
            download.cancel()
        await asyncio.gather(*downloads, return_exceptions=True)


async def test_many_at_once_are_all_whole(sim: Simulator, tmp_path: Path) -> None:
    """Twenty downloads through eight places, each of them cut twice."""
    async with client_for(sim) as client:
        videos = [await video_of(client, sim, faults.cut_media(20_000, times=2)) for _ in range(20)]
        paths = await asyncio.gather(*(client.download(video, tmp_path, allow_private=True) for video in videos))
    assert {path.read_bytes() for path in paths} == {MP4}
    assert names(tmp_path) == {f"{video.task_id}.mp4" for video in videos}


async def test_a_thousand_at_once_open_few_files(sim: Simulator, tmp_path: Path) -> None:
    """All of them are asked for at once, of a host that answers none: the files that are open do not grow with them."""
    async with client_for(sim, limits=Limits(downloads=2)) as client:
        video = await video_of(client, sim, faults.stalled_media(0, times=None))
        before = open_files()
        works = [
            asyncio.create_task(client.download(video, tmp_path / str(number), allow_private=True))
            for number in range(1_000)
        ]
        await sim.wait_for_stalls(2)
        await settle(3_000)
        assert open_files() - before < 50
        for work in works:
            work.cancel()
        await asyncio.gather(*works, return_exceptions=True)
    assert names(tmp_path) == set()


# --- the end -------------------------------------------------------------------------------------------------------


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir())) if sys.platform == "linux" else 0


async def test_a_cancelled_download_leaves_a_part_and_nothing_else(sim: Simulator, tmp_path: Path) -> None:
    """No open file or socket, no thread once the client is closed; at whatever moment it was cancelled."""
    threads = threading.active_count()
    async with client_for(sim) as client:
        video = await video_of(client, sim, faults.big_media(4 * MIB))
        await client.download(video, tmp_path / "warm.mp4", allow_private=True)
        whole = (tmp_path / "warm.mp4").read_bytes()
        await settle()
        before = open_files()
        for turns in range(0, 400, 7):
            download = asyncio.create_task(client.download(video, tmp_path / "x.mp4", allow_private=True))
            await settle(turns)
            download.cancel()
            download.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await download
            left = names(tmp_path) - {"warm.mp4"}
            assert left in ({"x.mp4.part", "x.mp4.part.json"}, {"x.mp4"}, set())
            if "x.mp4" in left:  # it was in its place before it could be stopped
                assert (tmp_path / "x.mp4").read_bytes() == whole
                (tmp_path / "x.mp4").unlink()
        await settle(200)
        assert open_files() <= before
        path = await client.download(video, tmp_path / "x.mp4", allow_private=True)
        assert path.read_bytes() == whole
    assert threading.active_count() == threads


async def test_closing_the_client_ends_its_downloads(sim: Simulator, tmp_path: Path) -> None:
    """Who still waits is told `ClientClosed`; the part stays."""
    async with client_for(sim) as client:
        video = await video_of(client, sim, faults.stalled_media(20_000))
        download = await started(client.download(video, tmp_path / "x.mp4", allow_private=True))
        await sim.wait_for_stalls(1)
        while not (tmp_path / "x.mp4.part").exists() or (tmp_path / "x.mp4.part").stat().st_size < 20_000:
            await settle(1)
    with pytest.raises(ClientClosed) as closed:
        await download
    assert closed.value.charged == "yes"
    assert names(tmp_path) == {"x.mp4.part", "x.mp4.part.json"}
    with pytest.raises(ClientClosed):
        await client.download(video, tmp_path / "x.mp4", allow_private=True)


async def test_what_progress_raises_comes_through(sim: Simulator, tmp_path: Path) -> None:
    """The user's own error, as it is; what has come can be resumed."""
    mine = OSError("my own")

    def progress(done: int, total: int | None) -> None:
        if done:
            raise mine

    async with client_for(sim) as client:
        video = await video_of(client, sim)
        with pytest.raises(OSError, match="my own") as raised:
            await client.download(video, tmp_path / "x.mp4", allow_private=True, progress=progress)
        assert raised.value is mine
        assert names(tmp_path) == {"x.mp4.part", "x.mp4.part.json"}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"result": "i2v-1"}, "a result such as Video, not str"),
        ({"result": None}, "a result such as Video, not NoneType"),
        ({"what": "audio"}, "'video', 'thumbnail', 'both', not 'audio'"),
        ({"to": b"x.mp4"}, "a path or text, not bytes"),
        ({"to": None}, "a path or text, not NoneType"),
        ({"max_bytes": 0}, "above 0, not 0"),
        ({"max_bytes": True}, "above 0, not True"),
        ({"max_bytes": 1.5}, "above 0, not 1.5"),
    ],
)
async def test_what_makes_no_sense_is_refused(tmp_path: Path, wrong: dict[str, Any], words: str) -> None:
    """Before anything is sent."""
    given = {"result": video_at("https://127.0.0.1/"), "to": tmp_path, **wrong}
    async with lonely_client() as client:
        with pytest.raises(InvalidRequest, match=words):
            await client.download(**given)


# --- safe ----------------------------------------------------------------------------------------------------------


def hostile_urls(port: int) -> list[str]:
    """URLs that mean this machine, or a file, or nothing that a video can be at."""
    hosts = [
        "127.0.0.1", "localhost", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.0.0.1", "0177.0.0.1",
        "017700000001", "0.0.0.0", "0", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[64:ff9b::7f00:1]",
        "[::127.0.0.1]", "[2002:7f00:1::]", "127.0.0.1.", "LOCALHOST", "localhost.", "127.0.0.2", "169.254.169.254",
        "10.0.0.1", "[fd00::1]", "[fe80::1%25lo]", "%31%32%37.0.0.1", "\uff11\uff12\uff17.0.0.1",
        "127\u30020\u30020\u30021", "\u24dbocalhost", "192.168.0.1", "255.255.255.255",
    ]  # fmt: skip
    tails = ["/x.mp4", "/x.mp4?X-Goog-Signature=0123456789abcdef", "/..%2f..%2fetc/passwd"]
    urls = [f"https://{host}:{port}{tail}" for host in hosts for tail in tails]
    urls += [f"http://{host}:{port}/x.mp4" for host in hosts]
    urls += [
        f"https://example.com@127.0.0.1:{port}/", f"https://127.0.0.1:{port}@127.0.0.1:{port}/", f"//127.0.0.1:{port}/",
        f"https:127.0.0.1:{port}/", f"https:/127.0.0.1:{port}/", f"https://127.0.0.1:{port}\\@example.com/",
        f"https://127.0.0.1:{port}/\r\nHost: x", f"https://127.0.0.1 :{port}/", f" https://127.0.0.1:{port}/",
        f"ftp://127.0.0.1:{port}/", f"gopher://127.0.0.1:{port}/", f"ws://127.0.0.1:{port}/", "file:///etc/passwd",
        "file://localhost/etc/passwd", "data:video/mp4;base64,AAAA", "javascript:alert(1)", "blob:https://127.0.0.1/x",
        "/etc/passwd", "etc/passwd", "x", "https://", "https:///x", "https://[::1", "https://[::1]:x/", "https://127.0.0.1:0/",
        "https://127.0.0.1:99999/", "http+unix://%2Frun%2Fapi/x", "https://\ud800/", "https://127.0.0.1:\u0661/",
    ]  # fmt: skip
    return urls


def hostile_ids() -> list[str]:
    """Task ids that would be other names, or no names, on one system or another."""
    reserved = ["CON", "prn", "AUX", "nul", "COM1", "lpt9", "con.txt", "NUL.mp4.x", "CLOCK$"]
    paths = [
        "../x",
        "..",
        ".",
        "../../etc/passwd",
        "/etc/passwd",
        "C:\\x",
        "..\\x",
        "a/b",
        "a\\b",
        "\\\\host\\s",
        "~",
        "~/x",
    ]
    control = ["", " ", "a\0b", "\0", "a\nb", "\r\n", "a\tb", "\x1b[2J", "\x7f"]
    shell = ["a:b", "a*b?", '"a"', "<a>", "a|b", "$(id)", "`id`", "-rf", "%s", "%2e%2e%2fx"]
    dots = ["...", ".a", "a.", "a..", "a.part", "a.part.json", "a.mp4", ". .", "a .", "a ", " a", ".part", "..mp4"]
    text = ["\xe9", "e\u0301", "\u6d77", "\u202egpj", "\u200b", "\ud800", "\ufb00", "\u0130"]
    long = ["a" * 99, "a" * 100, "a" * 101, "a" * 300, "\xe4" * 300]
    many = [f"i2v/{number}" for number in range(70)] + [f"i2v_{number}" for number in range(70)]
    return [*reserved, *paths, *control, *shell, *dots, *text, *long, *many]


async def test_200_hostile_ids_stay_in_their_folder(tmp_path: Path) -> None:
    """Each gives a file of its own in the folder, nothing outside of it, and nothing is overwritten."""
    folder = tmp_path / "outer" / "clips"
    folder.mkdir(parents=True)
    ids = list(dict.fromkeys(hostile_ids()))
    assert len(ids) >= 200
    bodies = {task_id: b"\0\0\0\x18ftypisom%d" % number for number, task_id in enumerate(ids)}

    def told(seen: Seen, number: int) -> bytes:
        place = int(seen.head.split(b" ")[1][1:])
        return answer(200, bodies[ids[place]], 'Content-Disposition: attachment; filename="../../evil.mp4"')

    async with Host(told) as host, lonely_client(limits=Limits(downloads=4)) as client:
        origin = f"http://127.0.0.1:{host.port}"
        paths = await asyncio.gather(
            *(
                client.download(video_at(f"{origin}/{place}", task_id), folder, allow_private=True)
                for place, task_id in enumerate(ids)
            )
        )
    assert {path.parent for path in paths} == {folder}
    assert {path.read_bytes() for path in paths} == set(bodies.values())
    assert names(folder) == {path.name for path in paths}
    assert all(name.endswith(".mp4") and len(name) <= 120 and name.isascii() for name in names(folder))
    assert (names(tmp_path), names(tmp_path / "outer")) == ({"outer"}, {"clips"})
    by_id = dict(zip(ids, paths, strict=True))
    assert by_id["i2v_7"].name == "i2v_7.mp4"
    assert by_id["i2v/7"].name.startswith("i2v_7~")


async def test_hostile_urls_reach_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every spelling of this machine, other schemes, and what is no URL: an error, and the canary is not touched."""
    caplog.set_level(logging.DEBUG)
    async with Host() as canary, lonely_client() as client:
        urls = hostile_urls(canary.port)
        assert len(urls) > 150
        for url in urls:
            with pytest.raises(DownloadError) as refused:
                await client.download(video_at(url), tmp_path, progress=None)
            assert type(refused.value) is DownloadError, url
            told = "".join(traceback.format_exception(refused.value)) + repr(pickle.loads(pickle.dumps(refused.value)))
            assert not [word for word in (SIGNATURE, "/x.mp4", "passwd", "alert") if word in told], url
            assert "i2v-1" in str(refused.value)
        assert canary.connections == 0
    assert names(tmp_path) == set()
    assert not [line for line in caplog.messages if SIGNATURE in line or "/x.mp4" in line]


@pytest.mark.parametrize("host", ["localhost", "2130706433", "127.1", "0x7f000001"])
async def test_a_name_that_leads_to_this_machine_is_refused_at_the_socket(tmp_path: Path, host: str) -> None:
    """A resolver is asked, and what it says is looked at, at the first try; some spellings aiohttp knows to refuse."""
    async with Host() as canary, lonely_client() as client:
        with pytest.raises(DownloadError, match=r"an address that is not public|could not be requested") as refused:
            await client.download(video_at(f"https://{host}:{canary.port}/"), tmp_path / "x.mp4")
        assert canary.connections == 0
    assert host in str(refused.value)


def downloads_of(tls: Any) -> Downloads:
    """The downloads of a client that trusts other certificates."""
    transport = MediaTransport(timeouts=Timeouts(), clock=SystemClock(), limits=Limits(), tls=tls)
    return Downloads(transport, NothingKnown())


class NothingKnown:
    """A service and a store that know nothing."""

    async def outcome(self, kind: object, task_id: str) -> None:
        return None

    async def ended_at(self, task_id: str) -> None:
        return None


async def test_https_to_a_public_address_and_redirects_to_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way over TLS: a file comes; a redirect to this machine, by address or by name, ends in an error."""
    monkeypatch.setattr(ssrf, "is_public", lambda address: address == PUBLIC)
    authority = trustme.CA()
    where: list[str] = []

    def told(seen: Seen, number: int) -> bytes:
        path = seen.head.split(b" ")[1].decode()
        if path.startswith("/to/"):
            return answer(302, b"", f"Location: {where[int(path[4:])]}", "Set-Cookie: a=b; Path=/")
        return answer(200, MP4, 'ETag: "1"', "Set-Cookie: a=b; Path=/")

    async with Host(told) as host, Host() as canary, tls_front(authority, host.port) as port:
        downloads = downloads_of(trusting(authority))
        origin = f"https://{PUBLIC}:{port}"
        try:
            where += [f"{origin}/x", "/to/0"]
            for number in range(2):
                (path,) = await downloads.download(
                    video_at(f"{origin}/to/{number}"), tmp_path / f"{number}.mp4", DownloadOptions()
                )
                assert path.read_bytes() == MP4
            hops = len(host.seen)
            assert all(seen.header("Cookie") is None for seen in host.seen)
            bad = [f"https://{name}:{canary.port}/x" for name in ("127.0.0.1", "localhost", "2130706433", "[::1]")]
            bad += [f"http://127.0.0.1:{canary.port}/x", f"//127.0.0.1:{canary.port}/x", "file:///etc/passwd"]
            where[:] = bad
            for number in range(len(bad)):
                with pytest.raises(DownloadError, match=r"not public|plain http|not https|could not be requested"):
                    await downloads.download(video_at(f"{origin}/to/{number}"), tmp_path / "bad.mp4", DownloadOptions())
            assert len(host.seen) == hops + len(bad)
            assert canary.connections == 0
        finally:
            await downloads.close()
    assert names(tmp_path) == {"0.mp4", "1.mp4"}


async def test_a_certificate_of_nobody_is_not_trusted(tmp_path: Path) -> None:
    """`allow_private` allows addresses, not strangers."""
    authority = trustme.CA()
    async with Host(lambda seen, number: answer(200, MP4)) as host, tls_front(authority, host.port) as port:
        async with lonely_client() as client:
            with pytest.raises(DownloadError, match="ClientConnectorCertificateError"):
                await client.download(video_at(f"https://{PUBLIC}:{port}/"), tmp_path / "x.mp4", allow_private=True)
        assert host.seen == []


async def test_redirects_are_followed_three_times(sim: Simulator, tmp_path: Path) -> None:
    """Not four times."""
    async with client_for(sim) as client:
        video = await video_of(client, sim, faults.media_redirect(times=3))
        await client.download(video, tmp_path / "x.mp4", allow_private=True)
        assert [record.status for record in sim.ledger.media] == [302, 302, 302, 200]
        video = await video_of(client, sim, faults.media_redirect(times=4))
        with pytest.raises(DownloadError, match="redirects more than 3 times"):
            await client.download(video, tmp_path / "y.mp4", allow_private=True)
    assert names(tmp_path) == {"x.mp4"}


async def test_a_redirect_off_the_service_carries_no_key(sim: Simulator, tmp_path: Path) -> None:
    """Nor does any request for media: neither the key, nor a cookie, nor what is in the environment of the machine."""
    async with (
        Host(lambda seen, number: answer(200, MP4, "Set-Cookie: a=b; Path=/")) as host,
        client_for(sim) as client,
    ):
        video = await video_of(client, sim, faults.media_redirect(host.url))
        for name in ("x.mp4", "y.mp4"):
            await client.download(video, tmp_path / name, allow_private=True)
    assert len(host.seen) == 2
    assert not [seen for seen in host.seen if KEY.encode() in seen.head or seen.header("Cookie")]
    assert (sim.ledger.media_with_key, sim.ledger.media_with_cookie) == ((), ())


async def test_no_url_is_shown_anywhere(sim: Simulator, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever fails: no error, no log line and no file of the library has a path or a signature of a link."""
    caplog.set_level(logging.DEBUG)
    given: list[tuple[Fault, ...]] = [
        (faults.cut_media(0, times=None),), (faults.wrong_hash(),), (faults.media_gone(),), (faults.gzip_media(),),
        (faults.media_status(*[500] * 20),), (faults.media_redirect(times=9),), (faults.media_status(402),),
        (faults.media_redirect(f"http://me@127.0.0.1/?X-Goog-Signature={SIGNATURE}"),),
    ]  # fmt: skip
    shown: list[str] = []
    async with client_for(sim) as client:
        asyncio.get_running_loop().set_debug(True)
        for faulty in given:
            video = await video_of(client, sim, *faulty)
            with pytest.raises(DownloadError) as failed:
                await client.download(video, tmp_path / "x.mp4", allow_private=True)
            error: XilingError = failed.value
            shown += ["".join(traceback.format_exception(error)), repr(error.__dict__), str(pickle.dumps(error))]
        asyncio.get_running_loop().set_debug(False)
    shown += [record.getMessage() for record in caplog.records if not record.name.startswith("aiohttp.access")]
    assert not [text for text in shown if "Signature" in text or "/media/i2v-" in text or KEY in text]


def test_a_part_says_when_it_has_become_shorter(tmp_path: Path) -> None:
    """Somebody has cut it behind our back: an error of the disk, not a loop without end."""
    path = tmp_path / "x.part"
    part = PartialFile.open(path, "x")
    part.write(b"0123456789")
    path.write_bytes(b"")
    with pytest.raises(OSError, match="shorter") as short:
        part.head()
    assert short.value.errno == errno.EIO
    part.discard()
    assert names(tmp_path) == set()
