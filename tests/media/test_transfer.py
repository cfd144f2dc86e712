"""Downloads from hosts that misbehave: none of them harms another download, and none is asked for ever."""

from __future__ import annotations

import asyncio
import itertools
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from hosts import Brisk, Host, Seen, answer, brisk_timeouts
from hypothesis import given, settings
from hypothesis import strategies as st
from support import model_v, settle, started, turns_until

from xiling_async import Client, ConfigurationError, DownloadError, Limits, Polling, Video
from xiling_async.media import ssrf
from xiling_async.simulator import Simulator, faults
from xiling_async.testing.clock import ManualClock

MIB = 1024**2
MEDIA = Path(sys.modules[Simulator.__module__].__file__ or "").parent / "media/samples"
MP4 = (MEDIA / "landscape.mp4").read_bytes()


def client_for(**options: Any) -> Client:
    """A client of a service that it never has to ask."""
    given = {"base_url": "http://127.0.0.1:9/v1", "clock": Brisk(), "timeouts": brisk_timeouts(), **options}
    return Client("sim-key", **given)


def video_at(url: str, task_id: str = "i2v-1") -> Video:
    return Video(task_id=task_id, video_url=url)


def start_of(seen: Seen) -> int:
    return int((seen.header("Range") or "bytes=0-")[6:-1])


def piece(seen: Seen, body: bytes, size: int) -> bytes:
    """The next bytes of this body that are asked for, no more than `size`; then the connection is cut."""
    start = start_of(seen)
    if not start:
        return answer(200, body[:size], 'ETag: "1"', length=len(body))
    headers = ('ETag: "1"', f"Content-Range: bytes {start}-{len(body) - 1}/{len(body)}")
    return answer(206, body[start : start + size], *headers, length=len(body) - start)


# --- URLs ----------------------------------------------------------------------------------------------------------

HOSTS = [
    ".", "..", "a..b", ".a", "a.." , "a." + "b" * 64, "b" * 64, "b" * 64 + ".com", "a." * 127 + "com", "\xe4" * 63,
    "xn--", "xn--a", "xn--\xe4", "a_b..", "%00", "a%00b", "%20", "a%2fb", "*", "\u2024", "a\u3002\u3002b", "\u200b",
    "\xad", "1.2.3.4.5..", "[", "]", "[]", "[::1", "[::1]x", "[v1.a]", "::1", "-", "a-..-", "\u0378", "\uffff",
]  # fmt: skip
HOSTILE = [
    *(f"https://{host}{rest}" for host, rest in itertools.product(HOSTS, ("", "/x.mp4", ":0/x", ":99999/", ":x/"))),
    "https://", "https:", "https:///", "https://?", "https://#", "https://@/", "https://:/", "https://:443/", "\0", "",
    "https://a" + "/b" * 50_000, "https://" + "a" * 100_000, "https://example.com:" + "9" * 5_000 + "/",
]  # fmt: skip


@pytest.mark.parametrize("by", ["link", "redirect"])
async def test_a_hostile_media_url_is_an_error_of_its_own_download(tmp_path: Path, by: str) -> None:
    """Each, given by the service or by a redirect, is a `DownloadError`; the download beside it is not harmed."""
    where = [*HOSTILE]

    def told(seen: Seen, number: int) -> bytes:
        place = seen.head.split(b" ")[1].decode()[1:]
        if place == "good":
            return answer(200, MP4)
        if not place.isdigit():  # a relative redirect
            return answer(402)
        location = where[int(place)].encode("utf-8", "replace").decode("latin-1")
        return answer(302, b"", "Location: " + location.replace("\0", "%00")[:4_000])

    async with Host(told) as host, client_for(allow_private=True) as client:
        origin = f"http://127.0.0.1:{host.port}"
        links = where if by == "link" else [f"{origin}/{number}" for number in range(len(where))]
        is_private = by == "redirect"
        works = [
            client.download(video_at(link), tmp_path / f"{number}", allow_private=is_private)
            for number, link in enumerate(links)
        ]
        good = client.download(video_at(f"{origin}/good"), tmp_path / "good", allow_private=True)
        *ends, path = await asyncio.gather(*works, good, return_exceptions=True)
    for link, end in zip(where, ends, strict=True):
        assert isinstance(end, DownloadError), (link[:80], end)
        assert end.task_ids == ("i2v-1",)
        assert "/x.mp4" not in "".join(traceback.format_exception(end))
    assert path == tmp_path / "good"
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


LABEL = st.text(st.characters(exclude_categories=["Cs"]), max_size=70)


@given(st.lists(LABEL, max_size=6), st.text(max_size=20))
@settings(max_examples=200)
def test_no_text_is_more_than_an_error_of_its_own_download(labels: list[str], rest: str) -> None:
    """Whatever text stands where the host should be, it is refused or could be asked for: nothing else is raised."""

    text = f"https://{'.'.join(labels)}/{rest}"
    for base in (None, ssrf.media_url("https://media.example.com/a/b")):
        try:
            url = ssrf.media_url(text, base)
            ssrf.reason_refused(url, allow_private=False)
        except ValueError:
            continue
        if url.scheme == "https":
            str(url.raw_host).encode("idna")  # what asyncio does before it asks a resolver


@pytest.mark.parametrize("host", [".", "a..b", "b" * 64 + ".com", "a." * 127 + "com"])
def test_a_base_url_that_no_resolver_can_be_asked_for_is_refused(host: str) -> None:
    """At construction: no submit and no `refresh` can meet it."""
    with pytest.raises(ConfigurationError):
        Client("sim-key", base_url=f"https://{host}/v1")


# --- one host and the others ---------------------------------------------------------------------------------------


async def test_a_429_pauses_its_own_host_alone(tmp_path: Path) -> None:
    """Two downloads wait for a host that wants 300 seconds: two slots serve others meanwhile, and it is asked again
    after 60 seconds."""
    clock = ManualClock()
    async with (
        Host(lambda seen, number: answer(429, b"", "Retry-After: 300")) as limited,
        Host(lambda seen, number: answer(200, MP4)) as good,
        client_for(clock=clock, limits=Limits(downloads=2)) as client,
    ):
        waiting = [
            await started(client.download(video_at(limited.url, f"i2v-{number}"), tmp_path, allow_private=True))
            for number in range(2)
        ]
        await turns_until(lambda: len(limited.seen) >= 1)
        await settle(300)
        asked = len(limited.seen)
        async with asyncio.timeout(30):
            for number in range(3):
                await client.download(video_at(good.url), tmp_path / str(number), allow_private=True)
        await settle(300)
        assert len(limited.seen) == asked <= 2
        clock.advance(60.0)
        await turns_until(lambda: len(limited.seen) > asked)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_host_that_drips_holds_no_slot_for_ever(sim: Simulator, tmp_path: Path) -> None:
    """Half a byte a second through the only slot: each try ends after the stall, another download comes in between,
    and after six tries it is over."""
    options = {"timeouts": brisk_timeouts(100), "limits": Limits(downloads=1), "polling": Polling(every=10.0)}
    async with client_for(base_url=sim.base_url, **options) as client:
        sim.script(faults.slow_media(1, 0.002))
        drips = await client.run(model_v())
        good = await client.run(model_v("sand"))
        dripping = await started(client.download(drips, tmp_path / "drips", allow_private=True))
        async with asyncio.timeout(30):
            await client.download(good, tmp_path / "good", allow_private=True)
            assert not dripping.done()
            with pytest.raises(DownloadError, match="fewer than 1024 bytes a second"):
                await dripping
    assert len([each for each in sim.ledger.media if drips.task_id in each.path]) == 6


async def test_a_slow_download_makes_way_for_others(sim: Simulator, tmp_path: Path) -> None:
    """2 KiB a second is progress, but not while another one waits for the slot: both are whole in the end."""
    options = {"timeouts": brisk_timeouts(50), "limits": Limits(downloads=1), "polling": Polling(every=10.0)}
    async with client_for(base_url=sim.base_url, **options) as client:
        sim.script(faults.big_media(MIB), faults.slow_media(8192, 0.004))
        slow = await client.run(model_v())
        good = await client.run(model_v("sand"))
        first = await started(client.download(slow, tmp_path / "slow", allow_private=True))
        async with asyncio.timeout(30):
            await client.download(good, tmp_path / "good", allow_private=True)
            assert not first.done()
            assert (await first).stat().st_size == MIB


@pytest.mark.parametrize(("size", "most"), [(1, 6), (100, 20), (600, 101)])
async def test_a_host_that_cuts_again_and_again_is_not_asked_for_ever(tmp_path: Path, size: int, most: int) -> None:
    """Some bytes a request, of a file of 1 MiB: no trickle of them resets the number of tries for ever."""
    body = bytes(MIB)

    def told(seen: Seen, number: int) -> bytes:
        return piece(seen, body, size if number < 1_000 else MIB)

    async with Host(told) as host, client_for() as client:
        with pytest.raises(DownloadError, match=r"made no progress|brought too little") as over:
            await client.download(video_at(host.url), tmp_path / "x", allow_private=True)
        assert len(host.seen) <= most
        assert "a later download resumes" in str(over.value)


async def test_a_large_file_that_is_cut_often_arrives(tmp_path: Path) -> None:
    """150 cuts of a file of 150 x 70 KiB: what gets on is gone on with."""
    body = bytes(range(256)) * 280 * 150

    async with Host(lambda seen, number: piece(seen, body, 71_680)) as host, client_for() as client:
        path = await client.download(video_at(host.url), tmp_path / "x", allow_private=True)
    assert path.read_bytes() == body
    assert len(host.seen) == 150
