"""Media in, media out: the simulator's uploads and result files, and what goes wrong with them, by plain HTTP."""

import asyncio
import base64
import gzip
import hashlib
import io
import json
import re
from collections.abc import AsyncIterator, Mapping

import aiohttp
import attrs
import pytest
from yarl import URL

from xiling_async.simulator import MediaRecord, Simulator, UploadRecord, faults
from xiling_async.simulator.media.files import BLOCK_BYTES, MD5_LIMIT_BYTES, crc32c, of_bytes
from xiling_async.simulator.media.uploads import LIMIT_BYTES
from xiling_async.simulator.scripts import Fault

JPG = b"\xff\xd8\xff\xe0" + bytes(range(256)) * 40
PNG = b"\x89PNG\r\n\x1a\n" + b"\r\n--boundary\r\n" * 9000
WEBP = b"RIFF\x10\x00\x00\x00WEBPVP8 "
AUTH = {"Authorization": "Bearer sim-key"}
V: dict[str, object] = {
    "model": "V",
    "prompt": "A running golden retriever, sunny meadow",
    "image_url": "https://example.com/start_frame.jpg",
    "aspect_ratio": "16:9",
    "aspect_resolution": "1080p",
    "duration": 8,
}


@attrs.frozen
class Got:
    """What came over the connection; `whole` is False when it broke off."""

    status: int
    body: bytes = attrs.field(repr=False)
    headers: Mapping[str, str]
    whole: bool = True

    @property
    def json(self) -> dict[str, object]:
        value: dict[str, object] = json.loads(self.body)
        return value

    @property
    def digests(self) -> dict[str, str]:
        value = self.headers.get("x-goog-hash")
        return dict(item.split("=", 1) for item in value.split(",")) if value else {}


class Api:
    """One session at one simulator."""

    def __init__(self, sim: Simulator, session: aiohttp.ClientSession) -> None:
        self.sim = sim
        self.session = session
        self.upload_url = f"{sim.base_url}/figure-resource/upload/file"

    async def send(self, body: object, headers: Mapping[str, str] = AUTH) -> Got:
        """POST this to the upload endpoint."""
        async with self.session.post(self.upload_url, data=body, headers=headers, allow_redirects=False) as response:
            return await got(response)

    async def upload(self, content: bytes = JPG, filename: str = "a.jpg") -> Got:
        return await self.send(form(content, filename))

    async def post(self, **changes: object) -> Got:
        async with self.session.post(f"{self.sim.base_url}/image_to_video", json=V | changes, headers=AUTH) as response:
            return await got(response)

    async def task(self, *script: Fault, **changes: object) -> str:
        """A finished task whose files have these faults."""
        self.sim.script(*script)
        answer = await self.post(**changes)
        assert answer.status == 200, answer.body
        await self.sim.settled()
        return self.sim.ledger.task_ids[-1]

    async def data(self, task_id: str) -> dict[str, str]:
        url = f"{self.sim.base_url}/image_to_video/{task_id}"
        async with self.session.get(url, headers=AUTH) as response:
            data: dict[str, str] = (await response.json())["data"]
            return data

    async def video(self, *script: Fault, **changes: object) -> str:
        """The URL of a video with these faults."""
        return (await self.data(await self.task(*script, **changes)))["video_url"]

    async def fetch(self, url: str, **headers: str) -> Got:
        async with self.session.get(URL(url, encoded=True), headers=headers, allow_redirects=False) as response:
            return await got(response)


def form(content: bytes, filename: str = "a.jpg", name: str = "file") -> aiohttp.FormData:
    fields = aiohttp.FormData(default_to_multipart=True)
    fields.add_field(name, io.BytesIO(content), filename=filename, content_type="image/x-declared")
    return fields


async def got(response: aiohttp.ClientResponse) -> Got:
    body = bytearray()
    try:
        async for piece in response.content.iter_any():
            body += piece
    except aiohttp.ClientPayloadError:
        return Got(response.status, bytes(body), response.headers, whole=False)
    return Got(response.status, bytes(body), response.headers)


def md5_of(body: bytes) -> str:
    return base64.b64encode(hashlib.md5(body).digest()).decode()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    # What a download must do: take the bytes as they are.
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20), auto_decompress=False) as session:
        yield session


@pytest.fixture
def api(sim: Simulator, session: aiohttp.ClientSession) -> Api:
    return Api(sim, session)


@pytest.fixture
async def sample(api: Api) -> bytes:
    """The video of a task without faults."""
    return (await api.fetch(await api.video())).body


# --- uploads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "suffix", "kind"),
    [(JPG, "jpg", "image/jpeg"), (PNG, "png", "image/png"), (WEBP, "webp", "image/webp")],
)
async def test_an_upload_is_stored_and_served(api: Api, content: bytes, suffix: str, kind: str) -> None:
    """A picture is answered in envelope B; its URL, named by its bytes alone, gives the same bytes back."""
    answer = await api.upload(content, "a-b.TXT")
    assert answer.status == 200
    result = answer.json["result"]
    assert isinstance(result, dict)
    assert answer.json == {
        "code": 0,
        "success": True,
        "message": {"global": "success"},
        "result": {
            "url": f"{api.sim.origin}/uploads/{result['fileId']}.{suffix}",
            "fileId": result["fileId"],
            "fileName": "a-b.TXT",
        },
    }
    assert re.fullmatch(r"[0-9a-f]{32}", result["fileId"])
    served = await api.fetch(result["url"])
    assert (served.status, served.body, served.headers["Content-Type"]) == (200, content, kind)
    (record,) = api.sim.ledger.uploads
    assert record.url == result["url"]
    assert (record.number, record.status, record.read, record.faults) == (1, 200, True, ())
    assert (record.filename, record.content_type) == ("a-b.TXT", "image/x-declared")
    assert (record.size, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert record.declared_length == int(record.headers["content-length"]) > len(content)


async def test_a_chunked_upload_declares_no_length(api: Api) -> None:
    """A streamed body is taken like any other, and the ledger shows that its length was not declared."""

    async def pieces() -> AsyncIterator[bytes]:
        yield b'--B\r\nContent-Disposition: form-data; name="other"\r\n\r\nx\r\n'
        yield b'--B\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + JPG[:100]
        yield JPG[100:] + b"\r\n--B--\r\n"

    answer = await api.send(pieces(), AUTH | {"Content-Type": "multipart/form-data; boundary=B"})
    (record,) = api.sim.ledger.uploads
    assert (answer.status, record.declared_length, record.size) == (200, None, len(JPG))
    assert (record.filename, record.content_type) == (None, None)
    result = answer.json["result"]
    assert isinstance(result, dict)
    assert result["fileName"] == f"{result['fileId']}.jpg"


def raw(body: bytes, kind: str = "multipart/form-data; boundary=B") -> tuple[bytes, str]:
    return body, kind


DISPOSITION = b'Content-Disposition: form-data; name="file"; filename="a.jpg"\r\n'


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (raw(b"--B\r\n" + DISPOSITION + b"\r\n\r\n--B--\r\n"), 100001),
        (raw(b"--B--\r\n"), 100001),
        (raw(b'--B\r\nContent-Disposition: form-data; name="image"\r\n\r\n' + JPG + b"\r\n--B--\r\n"), 100001),
        (raw((b"--B\r\n" + DISPOSITION + b"\r\n" + JPG + b"\r\n") * 2 + b"--B--\r\n"), 100001),
        (raw(b"--B\r\n" + DISPOSITION + b"\r\n" + JPG), 100001),
        (raw(b"--B\r\n" + DISPOSITION + b"Content-Type: multipart/mixed; boundary=C\r\n\r\n--C--\r\n"), 100001),
        (raw(b""), 100001),
        (raw(JPG), 100001),
        (raw(JPG, "multipart/form-data"), 100001),
        (raw(JPG, "image/jpeg"), 100001),
        (raw(b"--B\r\n" + DISPOSITION + b"\r\nGIF89a\r\n--B--\r\n"), 100007),
        (raw(b"--B\r\n" + DISPOSITION + b"\r\nRIFF____WAVE\r\n--B--\r\n"), 100007),
    ],
    ids=[
        "empty",
        "no part",
        "other name",
        "two files",
        "no end",
        "nested",
        "no body",
        "no multipart",
        "no boundary",
        "other type",
        "gif",
        "wave",
    ],
)
async def test_what_is_no_picture_in_a_form_is_refused(api: Api, body: tuple[bytes, str], code: int) -> None:
    """HTTP 400 with the API's error body: 100001 for the form, 100007 for the format."""
    answer = await api.send(body[0], AUTH | {"Content-Type": body[1]})
    assert (answer.status, answer.json["code"], set(answer.json)) == (400, code, {"code", "msg"})
    (record,) = api.sim.ledger.uploads
    assert (record.status, record.url) == (400, None)


@pytest.mark.parametrize(("size", "status"), [(LIMIT_BYTES, 200), (LIMIT_BYTES + 1, 413)])
async def test_an_upload_has_at_most_20_mb(api: Api, size: int, status: int) -> None:
    """The last byte that is too much is HTTP 413 with the API's error body, and nothing is stored."""
    answer = await api.upload(JPG + bytes(size - len(JPG)))
    assert answer.status == status
    (record,) = api.sim.ledger.uploads
    assert (record.status, record.size, record.read) == (status, size, status == 200)
    assert (record.url is None, record.sha256 is None) == (status == 413, status == 413)
    if status == 413:
        assert answer.json["code"] == 100004


async def test_an_upload_needs_the_key(api: Api) -> None:
    """Without the key nothing is read, stored, or taken from the script."""
    api.sim.script_upload(faults.rate_limited(2))
    answer = await api.send(form(JPG), {})
    assert (answer.status, answer.json["code"]) == (401, 100002)
    answer = await api.upload()
    assert (answer.status, answer.headers["Retry-After"]) == (429, "2")
    first, second = api.sim.ledger.uploads
    assert (first.number, first.status, first.read, first.size, first.faults) == (1, 401, False, 0, ())
    assert (second.number, second.status, second.read, second.faults) == (2, 429, True, ("rate_limited",))


async def test_an_upload_that_is_not_there_is_404(api: Api) -> None:
    """An unknown name is HTTP 404."""
    assert (await api.fetch(f"{api.sim.origin}/uploads/x.jpg")).status == 404


async def test_file_ids_are_the_seeds(session: aiohttp.ClientSession) -> None:
    """The seed decides the file ids, and uploads do not change the task ids."""
    made: list[tuple[str | None, str]] = []
    for seed, uploads in ((1, 1), (1, 2), (2, 1)):
        async with Simulator(seed=seed) as sim:
            api = Api(sim, session)
            for _ in range(uploads):
                await api.upload()
            first = URL(sim.ledger.uploads[0].url or "").name
            made.append((first, await api.task()))
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize(
    ("fault", "status", "stored"),
    [
        (faults.status(500), 500, False),
        (faults.status(503, accept=True), 503, True),
        (faults.business_error(100001, "no"), 200, False),
        (faults.redirect("https://elsewhere.example/"), 307, False),
        (faults.rate_limited(), 429, False),
        (faults.garbage(), 200, True),
        (faults.upload_answer({"code": 0, "result": None}), 200, True),
        (faults.drop_before_read(), None, False),
        (faults.drop_after_accept(), None, True),
        (faults.hang(0.001), None, True),
    ],
    ids=lambda value: value.name if isinstance(value, Fault) else str(value),
)
async def test_upload_faults(api: Api, fault: Fault, status: int | None, stored: bool) -> None:
    """The answer is what the fault says, or there is none; the ledger shows what was stored all the same."""
    api.sim.script_upload(fault)
    if status is None:
        with pytest.raises(aiohttp.ClientConnectionError):
            await api.upload()
    else:
        answer = await api.upload()
        assert answer.status == status
        if isinstance(fault, faults.upload_answer):
            assert answer.json == fault.value
        if isinstance(fault, faults.garbage):
            assert answer.body == fault.body
    (record,) = api.sim.ledger.uploads
    assert (record.status, record.faults) == (status, (fault.name,))
    assert record.read is (fault != faults.drop_before_read())
    assert (record.url is not None) is stored
    if record.url is not None:
        assert (await api.fetch(record.url)).body == JPG


async def test_an_upload_answer_breaks_off(api: Api) -> None:
    """The file is stored, half of the answer arrives."""
    api.sim.script_upload(faults.drop_mid_answer())
    answer = await api.upload()
    assert not answer.whole
    assert answer.body.startswith(b'{"code": 0')
    assert api.sim.ledger.uploads[0].url is not None


async def test_an_upload_that_hangs_ends_with_the_simulator(session: aiohttp.ClientSession) -> None:
    """Nothing is answered; leaving the simulator cuts the connection."""
    async with Simulator() as sim:
        sim.default_upload(faults.hang_before_accept())
        upload = asyncio.create_task(Api(sim, session).upload())
        await sim.wait_for_uploads(1)
        assert (sim.ledger.uploads[0].status, sim.ledger.uploads[0].url) == (None, None)
    with pytest.raises(aiohttp.ClientConnectionError):
        await upload


async def test_upload_scripts_are_a_queue_before_the_default(api: Api) -> None:
    """One script is one upload, an empty one is plain, and the default is for the rest."""
    api.sim.default_upload(faults.status(503))
    api.sim.script_upload()
    api.sim.script_upload(faults.status(500))
    assert [(await api.upload()).status for _ in range(4)] == [200, 500, 503, 503]
    assert (await api.post()).status == 200  # creates have scripts of their own


async def test_faults_stay_where_they_are_looked_for(api: Api) -> None:
    """A fault that would have no effect is a TypeError."""
    with pytest.raises(TypeError, match="not a fault of uploads"):
        api.sim.script_upload(faults.lost_callback())
    with pytest.raises(TypeError, match="not a fault of uploads"):
        api.sim.default_upload(faults.cut_media(1))
    with pytest.raises(TypeError, match="not a fault of media"):
        api.sim.media_default(faults.status(500))
    with pytest.raises(TypeError, match="not a fault of creates"):
        api.sim.script(faults.upload_answer({}))
    with pytest.raises(TypeError, match="not a fault:"):
        api.sim.default(faults.no_ranges)  # type: ignore[arg-type]


async def test_an_upload_that_breaks_off_is_not_read(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    """A client that leaves in the middle of its file has stored nothing, and the ledger says how far it came."""
    begun = b"--B\r\n" + DISPOSITION + b"\r\n" + JPG
    _, writer = await asyncio.open_connection(api.sim.host, api.sim.port)
    writer.write(
        b"POST /v1/figure-resource/upload/file HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sim-key\r\n"
        b"Content-Type: multipart/form-data; boundary=B\r\nContent-Length: 1000000\r\n\r\n" + begun
    )
    await writer.drain()
    assert (await api.post()).status == 200  # the other connection was served: the first one has begun
    writer.close()
    await writer.wait_closed()
    await api.sim.wait_for_uploads(1)
    (record,) = api.sim.ledger.uploads
    assert (record.read, record.status, record.url, record.sha256) == (False, None, None, None)
    assert (record.filename, record.declared_length) == ("a.jpg", 1_000_000)
    assert not caplog.records


async def test_upload_records_do_not_show_the_key(api: Api) -> None:
    """The repr of the ledger shows neither the key nor a URL."""
    await api.upload()
    await api.fetch(await api.video())
    shown = repr(api.sim.ledger)
    assert "sim-key" not in shown
    assert "/uploads/" not in shown
    assert "Signature" not in shown


# --- uploads in creates ------------------------------------------------------------------------------------


async def test_a_create_takes_what_was_uploaded(api: Api) -> None:
    """The service knows its own uploads and results; other addresses are not checked."""
    await api.upload()
    uploaded = api.sim.ledger.uploads[0].url
    assert (await api.post(image_url=uploaded)).status == 200
    await api.sim.settled()
    thumbnail = (await api.data(api.sim.ledger.task_ids[0]))["thumbnail_url"]
    assert (await api.post(image_url=uploaded, end_image_url=thumbnail)).status == 200
    assert (await api.post(image_url="http://127.0.0.1:1/uploads/x.jpg")).status == 200


@pytest.mark.parametrize("path", ["", "/", "/uploads/x.jpg", "/uploads", "/media/i2v-0.webp", "/v1/x"])
async def test_a_create_with_a_dangling_image_is_refused(api: Api, path: str) -> None:
    """The simulator's own origin and nothing there: the image URL is not reachable, nothing is charged."""
    url = f"{api.sim.origin}{path}"
    for changes in (
        {"image_url": url},
        {"end_image_url": url},
        {"reference_images": ["https://example.com/a.jpg", url]},
    ):
        answer = await api.post(**changes)
        assert (answer.status, answer.json["code"]) == (400, 100006)
    assert api.sim.ledger.paid_submits == 0
    api.sim.lenient = True
    assert (await api.post(image_url=url)).status == 200


# --- result files: the record ------------------------------------------------------------------------------


async def test_media_requests_are_on_the_ledger(api: Api) -> None:
    """Each request is written down with what it asked for, what it carried, and what it was sent."""
    url = await api.video()
    whole = await api.fetch(url)
    await api.fetch(url, Range="bytes=5-14", Cookie="a=b")
    await api.fetch(url, Range="bytes=99999999-", token="sim-key")
    async with api.session.head(URL(url, encoded=True)) as response:
        assert int(response.headers["Content-Length"]) == len(whole.body)
    await api.fetch(f"{api.sim.origin}/media/x.mp4")
    records = api.sim.ledger.media
    assert [record.number for record in records] == [1, 2, 3, 4, 5]
    assert [record.status for record in records] == [200, 206, 416, 200, 404]
    assert [record.range for record in records] == [None, "bytes=5-14", "bytes=99999999-", None, None]
    assert [record.sent for record in records[:4]] == [len(whole.body), 10, 0, 0]
    assert records[0].path == URL(url).path
    assert records[0].query == URL(url).raw_query_string
    assert api.sim.ledger.media_with_key == (records[2],)
    assert api.sim.ledger.media_with_cookie == (records[1],)
    assert isinstance(records[0], MediaRecord)


async def test_upload_records_are_public(api: Api) -> None:
    """Counted in the summary, under a name that can be imported."""
    await api.upload()
    assert isinstance(api.sim.ledger.uploads[0], UploadRecord)
    assert api.sim.ledger.summary()["uploads"] == 1


async def test_a_client_that_leaves_is_written_down(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    """What a client did not wait for is on the ledger with the bytes that it was sent."""
    size = 64 * BLOCK_BYTES
    url = await api.video(faults.big_media(size, hashed=False))
    async with api.session.get(URL(url, encoded=True)) as response:
        await response.content.readexactly(10)
    await api.sim.wait_for_media(1)
    (record,) = api.sim.ledger.media
    assert record.status == 200
    assert 0 < record.sent < size
    assert not caplog.records


# --- result files: answers that are no file ----------------------------------------------------------------


async def test_media_status_comes_first(api: Api, sample: bytes) -> None:
    """The first requests for each file get these statuses, 0 is a cut connection; then it is normal."""
    data = await api.data(await api.task(faults.media_status(404, 0, 429, retry_after=7)))
    for field in ("video_url", "thumbnail_url"):
        answers = [await api.fetch(data[field]) for _ in range(3)]  # aiohttp repeats the GET that was cut
        assert [answer.status for answer in answers] == [404, 429, 200]
        assert answers[0].headers["Content-Type"] == "application/xml; charset=UTF-8"
        assert answers[1].headers["Retry-After"] == "7"
    assert [record.status for record in api.sim.ledger.media[1:]] == [404, 0, 429, 200] * 2


async def test_media_that_is_gone_stays_gone(api: Api) -> None:
    """At that URL it is gone for ever, whatever the status endpoint says."""
    task_id = await api.task(faults.media_gone(403))
    for _ in range(2):
        data = await api.data(task_id)
        answer = await api.fetch(data["video_url"])
        assert (answer.status, b"<Error>" in answer.body) == (403, True)
    assert (await api.data(task_id)) == data


async def test_a_new_url_works(api: Api, sample: bytes) -> None:
    """After a refusal the next status GET gives another URL; that one works, the old one never does."""
    task_id = await api.task(faults.media_gone(new_url=True))
    old = (await api.data(task_id))["video_url"]
    assert (await api.data(task_id))["video_url"] == old  # it was not requested yet
    assert [(await api.fetch(old)).status for _ in range(2)] == [404, 404]
    data = await api.data(task_id)
    assert data["video_url"] != old
    assert (await api.fetch(data["video_url"])).body == sample
    assert (await api.fetch(data["thumbnail_url"])).status == 200
    assert await api.data(task_id) == data
    assert (await api.fetch(old)).status == 404


async def test_media_redirects_elsewhere(api: Api) -> None:
    """Always to that place, under that status."""
    url = await api.video(faults.media_redirect("https://elsewhere.example/x", code=307))
    for _ in range(2):
        answer = await api.fetch(url)
        assert (answer.status, answer.headers["Location"]) == (307, "https://elsewhere.example/x")


@pytest.mark.parametrize("times", [0, 1, 3])
async def test_media_redirects_on_itself(api: Api, sample: bytes, times: int) -> None:
    """So many hops and then the file, for each request for the published URL."""
    url = await api.video(faults.media_redirect(times=times))
    for _ in range(2):
        async with api.session.get(URL(url, encoded=True)) as response:
            assert [step.status for step in response.history] == [302] * times
            assert await response.read() == sample
    assert (await api.fetch(f"{url}&hop=x")).status == (302 if times else 200)


# --- result files: the connection --------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2])
async def test_media_is_cut_and_resumed(api: Api, sample: bytes, times: int) -> None:
    """The connection ends after so many bytes, so many times; ranges put the rest together."""
    url = await api.video(faults.cut_media(100, times))
    body = b""
    for _ in range(times):
        answer = await api.fetch(url, Range=f"bytes={len(body)}-")
        assert (answer.status, answer.whole, len(answer.body)) == (206, False, 100)
        assert int(answer.headers["Content-Length"]) == len(sample) - len(body)
        body += answer.body
    answer = await api.fetch(url, Range=f"bytes={len(body)}-")
    assert (answer.whole, body + answer.body) == (True, sample)
    assert [record.sent for record in api.sim.ledger.media[1:]] == [100] * times + [len(sample) - 100 * times]


async def test_media_is_cut_always_or_not_at_all(api: Api, sample: bytes) -> None:
    """With None it never ends; a cut beyond the end cuts nothing; one at the start leaves the headers."""
    url = await api.video(faults.cut_media(0, None))
    for _ in range(3):
        answer = await api.fetch(url)
        assert (answer.status, answer.whole, answer.body) == (200, False, b"")
    assert (await api.fetch(await api.video(faults.cut_media(len(sample))))).whole


async def test_media_is_cut_where_it_is_chunked(api: Api) -> None:
    """A body without a length breaks off as well."""
    answer = await api.fetch(await api.video(faults.cut_media(100), faults.no_length()))
    assert (answer.whole, len(answer.body)) == (False, 100)


async def test_media_stalls_until_the_client_leaves(api: Api, sample: bytes) -> None:
    """So many bytes and then nothing; the next request is served."""
    url = await api.video(faults.stalled_media(1000))
    before = asyncio.all_tasks()
    async with api.session.get(URL(url, encoded=True)) as response:
        assert await response.content.readexactly(1000) == sample[:1000]
        await api.sim.wait_for_stalls(1)
        assert (api.sim.ledger.media[-1].sent, api.sim.ledger.media[-1].status) == (1000, 200)
        assert not response.content.at_eof()
    while asyncio.all_tasks() - before:
        await asyncio.sleep(0)
    assert (await api.fetch(url)).body == sample
    assert [record.number for record in api.sim.ledger.media] == [1, 2, 3]


@pytest.mark.parametrize(("fault", "size"), [(faults.stalled_media(10, None), 10), (faults.slow_media(7, 3600), 7)])
async def test_media_that_does_not_end_ends_with_the_simulator(
    session: aiohttp.ClientSession, fault: Fault, size: int
) -> None:
    """Leaving the simulator cuts the connection at once."""
    async with Simulator() as sim:
        api = Api(sim, session)
        response = await session.get(URL(await api.video(fault), encoded=True))
        await response.content.readexactly(size)
    with pytest.raises(aiohttp.ClientPayloadError):
        await response.read()
    assert [(record.status, record.sent) for record in sim.ledger.media] == [(200, size)]


async def test_slow_media_is_whole(api: Api, sample: bytes) -> None:
    """It comes in pieces, and all of it comes."""
    url = await api.video(faults.slow_media(20_000, 0.001))
    async with api.session.get(URL(url, encoded=True)) as response:
        pieces = [piece async for piece in response.content.iter_any()]
    assert b"".join(pieces) == sample
    assert max(map(len, pieces)) <= 20_000
    assert (await api.fetch(await api.video(faults.slow_media(60_000, 0)))).body == sample


# --- result files: headers ---------------------------------------------------------------------------------


async def test_media_without_ranges(api: Api, sample: bytes) -> None:
    """A request for a range is answered 200 with the whole file."""
    answer = await api.fetch(await api.video(faults.no_ranges()), Range="bytes=5-9")
    assert (answer.status, answer.body, answer.headers["Accept-Ranges"]) == (200, sample, "none")
    assert "Content-Range" not in answer.headers


async def test_wrong_hash(api: Api, sample: bytes) -> None:
    """The digests are well-formed and not those of the file: always, or the first times."""
    url = await api.video(faults.wrong_hash(1))
    first, second = await api.fetch(url), await api.fetch(url)
    assert first.body == second.body == sample
    assert first.digests["md5"] != md5_of(sample) == second.digests["md5"]
    assert first.digests["crc32c"] != second.digests["crc32c"]
    assert len(base64.b64decode(first.digests["md5"])) == 16
    url = await api.video(faults.wrong_hash())
    assert [(await api.fetch(url)).digests["md5"] == md5_of(sample) for _ in range(3)] == [False] * 3


@pytest.mark.parametrize(
    ("which", "left"), [([], set()), (["md5"], {"crc32c"}), (["crc32c"], {"md5"}), (["md5", "crc32c"], set())]
)
async def test_no_hash(api: Api, which: list[str], left: set[str]) -> None:
    """No digest at all, or those that are named are left out."""
    answer = await api.fetch(await api.video(faults.no_hash(*which)))
    assert set(answer.digests) == left
    assert ("x-goog-hash" in answer.headers) is bool(left)


async def test_no_etag(api: Api, sample: bytes) -> None:
    """Without an ETag a range is still served, and no If-Range fits."""
    url = await api.video(faults.no_etag())
    answer = await api.fetch(url, Range="bytes=0-4")
    assert (answer.status, "ETag" in answer.headers) == (206, False)
    answer = await api.fetch(url, **{"Range": "bytes=0-4", "If-Range": of_bytes(sample).etag})
    assert (answer.status, answer.body) == (200, sample)


async def test_more_is_declared_than_is_sent(api: Api, sample: bytes) -> None:
    """The body is whole, what was promised is missing, and the connection ends."""
    answer = await api.fetch(await api.video(faults.wrong_length(10)))
    assert int(answer.headers["Content-Length"]) == len(sample) + 10
    assert (answer.body, answer.whole) == (sample, False)
    assert api.sim.ledger.media[-1].sent == len(sample)


@pytest.mark.parametrize("delta", [-10, -10_000_000])
async def test_less_is_declared_than_is_sent(api: Api, sample: bytes, delta: int) -> None:
    """What is beyond the declared length follows it over the connection, then that ends."""
    url = URL(await api.video(faults.wrong_length(delta)))
    declared = max(0, len(sample) + delta)
    reader, writer = await asyncio.open_connection(api.sim.host, api.sim.port)
    writer.write(f"GET {url.raw_path_qs} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
    writer.close()
    assert f"Content-Length: {declared}\r\n".encode() in head
    assert body == sample
    assert api.sim.ledger.media[-1].sent == len(sample)


@pytest.mark.parametrize("delta", [-10, -10_000_000])
async def test_a_file_that_ends_early(api: Api, sample: bytes, delta: int) -> None:
    """Without the excess only the digests, and the range's own words, tell that something is missing."""
    url = await api.video(faults.wrong_length(delta, excess=False))
    end = max(0, len(sample) + delta)
    whole = await api.fetch(url)
    assert (whole.body, whole.whole, whole.digests["md5"]) == (sample[:end], True, md5_of(sample))
    assert int(whole.headers["Content-Length"]) == api.sim.ledger.media[-1].sent == end
    part = await api.fetch(url, Range="bytes=5-")
    assert (part.status, part.body, part.whole) == (206, sample[5:end], True)
    assert part.headers["Content-Range"] == f"bytes 5-{len(sample) - 1}/{len(sample)}"
    longer = await api.fetch(await api.video(faults.wrong_length(1, excess=False)))
    assert (longer.body, longer.whole) == (sample, False)


async def test_no_length(api: Api, sample: bytes) -> None:
    """The body is chunked, also of a range."""
    url = await api.video(faults.no_length())
    whole, part = await api.fetch(url), await api.fetch(url, Range="bytes=5-")
    for answer, body in ((whole, sample), (part, sample[5:])):
        assert (answer.body, answer.headers["Transfer-Encoding"]) == (body, "chunked")
        assert "Content-Length" not in answer.headers
    assert part.headers["Content-Range"] == f"bytes 5-{len(sample) - 1}/{len(sample)}"
    empty = await api.fetch(await api.video(faults.no_length(), faults.media_bytes(b"")))
    assert (empty.whole, empty.body) == (True, b"")


# --- result files: the file itself -------------------------------------------------------------------------


async def test_changing_media(api: Api, sample: bytes) -> None:
    """Content, ETag and digests change with each request; size and beginning stay; If-Range notices."""
    url = await api.video(faults.changing_media())
    answers = [await api.fetch(url) for _ in range(3)]
    assert answers[0].body == sample
    assert len({answer.body for answer in answers}) == len({answer.headers["ETag"] for answer in answers}) == 3
    for answer in answers:
        assert (len(answer.body), answer.body[:-8]) == (len(sample), sample[:-8])
        assert answer.digests["md5"] == md5_of(answer.body)
    resumed = await api.fetch(url, **{"Range": "bytes=9-", "If-Range": answers[-1].headers["ETag"]})
    assert (resumed.status, len(resumed.body)) == (200, len(sample))
    assert (await api.fetch(url, Range="bytes=9-")).status == 206


async def test_media_that_changes_once(api: Api) -> None:
    """With a number it comes to rest."""
    url = await api.video(faults.changing_media(1))
    bodies = [(await api.fetch(url)).body for _ in range(3)]
    assert bodies[0] != bodies[1] == bodies[2]


@pytest.mark.parametrize("data", [b"", b"abc", b"12345678", b"x" * 100])
async def test_media_bytes(api: Api, data: bytes) -> None:
    """The video is these bytes, with their digests; the thumbnail is what it was. They can change."""
    task_id = await api.task(faults.media_bytes(data))
    answer = await api.fetch((await api.data(task_id))["video_url"])
    assert (answer.body, answer.headers["Content-Type"]) == (data, "video/mp4")
    assert answer.digests == {
        "crc32c": base64.b64encode(crc32c(data).to_bytes(4, "big")).decode(),
        "md5": md5_of(data),
    }
    assert (await api.fetch((await api.data(task_id))["thumbnail_url"])).body[:4] == b"RIFF"
    url = await api.video(faults.media_bytes(data), faults.changing_media())
    bodies = {(await api.fetch(url)).body for _ in range(3)}
    assert {len(body) for body in bodies} == {len(data)}
    assert len(bodies) == (3 if data else 1)
    assert repr(faults.media_bytes(data)) == "media_bytes()"


async def test_gzip_media(api: Api, sample: bytes) -> None:
    """The bytes on the wire are packed without being asked, ranges are theirs, digests are those of the file."""
    url = await api.video(faults.gzip_media())
    answer = await api.fetch(url, **{"Accept-Encoding": "identity"})
    assert answer.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(answer.body) == sample
    assert int(answer.headers["Content-Length"]) == len(answer.body)
    assert answer.digests["md5"] == md5_of(sample)
    assert answer.headers["ETag"] != of_bytes(sample).etag
    part = await api.fetch(url, **{"Range": "bytes=5-99", "If-Range": answer.headers["ETag"]})
    assert (part.status, part.body) == (206, answer.body[5:100])


async def test_big_media(api: Api, sample: bytes) -> None:
    """A generated body of any size is always the same, begins as a video, honours ranges, and has its md5."""
    size = 3 * BLOCK_BYTES + 17
    url = await api.video(faults.big_media(size))
    whole = await api.fetch(url)
    assert (whole.status, len(whole.body), whole.body[4:8]) == (200, size, b"ftyp")
    assert whole.body.startswith(sample)
    assert whole.digests == {"md5": md5_of(whole.body)}
    start, stop = BLOCK_BYTES - 5, 2 * BLOCK_BYTES + 5
    part = await api.fetch(url, **{"Range": f"bytes={start}-{stop - 1}", "If-Range": whole.headers["ETag"]})
    assert (part.status, part.body) == (206, whole.body[start:stop])
    again = await api.fetch(await api.video(faults.big_media(size)))
    assert again.body == whole.body
    tiny = await api.fetch(await api.video(faults.big_media(10)))
    assert tiny.body == whole.body[:10]


async def test_big_media_without_md5(api: Api) -> None:
    """Digests that cost too much are left out, unless they were worked out before."""
    size = MD5_LIMIT_BYTES + 1
    for hashed in (False, True):
        url = await api.video(faults.big_media(size, hashed=hashed))
        async with api.session.head(URL(url, encoded=True)) as response:
            assert (int(response.headers["Content-Length"]), response.status) == (size, 200)
            assert ("x-goog-hash" in response.headers) is hashed
    url = await api.video(faults.big_media(size, hashed=False), faults.cut_media(1000))
    assert len((await api.fetch(url)).body) == 1000


# --- how they are asked for --------------------------------------------------------------------------------


async def test_media_faults_belong_to_their_create(api: Api, sample: bytes) -> None:
    """All tasks of that create have them, each counted by itself, and no other task has."""
    await api.task(faults.media_status(500), generate_count=2)
    plain = await api.task()
    first, second, _ = api.sim.ledger.task_ids[1:]
    for task_id, statuses in ((first, [500, 200]), (second, [500, 200]), (plain, [200, 200])):
        url = (await api.data(task_id))["video_url"]
        assert [(await api.fetch(url)).status for _ in range(2)] == statuses


async def test_media_default_is_for_those_without(api: Api) -> None:
    """A create with media faults of its own has those alone; the others have the default, from now on."""
    plain = await api.video(faults.lost_callback())
    own = await api.video(faults.no_ranges())
    api.sim.media_default(faults.media_status(503))
    assert [(await api.fetch(url)).status for url in (plain, own)] == [503, 200]
    api.sim.media_default()
    assert (await api.fetch(plain)).status == 200


async def test_faults_of_a_file_combine(api: Api, sample: bytes) -> None:
    """Several at once come one after the other: an answer that is no file is not counted as one that was cut."""
    url = await api.video(faults.stalled_media(20), faults.cut_media(10), faults.media_status(500, 429))
    assert [(await api.fetch(url)).status for _ in range(2)] == [500, 429]
    assert len((await api.fetch(url)).body) == 10
    async with api.session.get(URL(url, encoded=True)) as response:
        assert await response.content.readexactly(20) == sample[:20]
    assert (await api.fetch(url)).body == sample


@pytest.mark.parametrize("make", [faults.cut_media, faults.stalled_media])
def test_numbers_that_make_no_sense(make: type[Fault]) -> None:
    """A negative number of bytes is an error where it is written."""
    with pytest.raises(ValueError, match="after_bytes"):
        make(-1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("directive", "status", "name"),
    [
        ("big_media=2000000", 200, "big_media"),
        ("changing_media", 200, "changing_media"),
        ("cut_media=100", 200, "cut_media"),
        ("gzip_media", 200, "gzip_media"),
        ("media_gone", 404, "media_gone"),
        ("media_gone=403", 403, "media_gone"),
        ("media_redirect", 302, "media_redirect"),
        ("media_redirect=2", 302, "media_redirect"),
        ("media_redirect=https://elsewhere.example/?a=b", 302, "media_redirect"),
        ("media_status=500,429", 500, "media_status"),
        ("no_etag", 200, "no_etag"),
        ("no_hash", 200, "no_hash"),
        ("no_length", 200, "no_length"),
        ("no_ranges", 200, "no_ranges"),
        ("slow_media=30000,0.001", 200, "slow_media"),
        ("wrong_hash", 200, "wrong_hash"),
        ("wrong_length=5", 200, "wrong_length"),
    ],
)
async def test_directives_for_media(api: Api, directive: str, status: int, name: str) -> None:
    """The same words work in a prompt."""
    url = await api.video(prompt=f"a dog [sim:{directive}]")
    assert (await api.fetch(url)).status == status
    assert api.sim.ledger.posts[0].faults == (name,)


async def test_a_directive_makes_a_file_stall(api: Api) -> None:
    """So does this one, with a client that does not wait."""
    url = await api.video(prompt="[sim:stalled_media=0]")
    async with api.session.get(URL(url, encoded=True)):
        await api.sim.wait_for_stalls(1)


@pytest.mark.parametrize("directive", ["slow_media=0,1", "slow_media=5", "cut_media=-1", "big_media", "no_hash=md5"])
async def test_directives_for_media_that_make_no_sense(api: Api, directive: str) -> None:
    """A value that makes no sense is refused."""
    assert (await api.post(prompt=f"[sim:{directive}]")).json["code"] == 100001
