"""The simulator, tested with plain HTTP: tests of the client rely on it, so it is tested without the client."""

import asyncio
import base64
import hashlib
import io
import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Self

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from xiling_async.simulator import Simulator, faults
from xiling_async.simulator.kinds.image_to_video import ImageToVideo
from xiling_async.simulator.media.files import crc32c

START_FRAME = "https://example.com/start_frame.jpg"
V: dict[str, object] = {
    "model": "V",
    "prompt": "A running golden retriever, sunny meadow",
    "image_url": START_FRAME,
    "aspect_ratio": "16:9",
    "aspect_resolution": "1080p",
    "duration": 6,
}
KL = {
    **{name: V[name] for name in V if name != "image_url"},
    "model": "KL",
    "reference_images": [START_FRAME],
    "duration": 5,
}
S = {**V, "model": "S", "aspect_resolution": "720p"}


class Receiver:
    """The receiver of the callbacks: records them, and answers as configured."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.paths: list[str] = []
        self.types: list[str | None] = []
        self.answers: deque[int] = deque()
        self.gate = asyncio.Event()
        self.gate.set()
        self.on_callback: Callable[[], Awaitable[None]] | None = None

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_post("/{path:.*}", self.take)
        self.runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.05)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}/hook"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.gate.set()
        await self.runner.cleanup()

    async def take(self, request: web.Request) -> web.Response:
        self.bodies.append(await request.read())
        self.paths.append(request.raw_path)
        self.types.append(request.headers.get("Content-Type"))
        if self.on_callback is not None:
            await self.on_callback()
        await self.gate.wait()
        status = self.answers.popleft() if self.answers else 200
        return web.Response(status=status, headers={"Location": "/elsewhere"})

    @property
    def reports(self) -> list[tuple[str, str]]:
        """(task id, status) of each callback, in order."""
        data = [json.loads(body)["data"] for body in self.bodies]
        return [(item["task_id"], item["status"]) for item in data]


class Api:
    """One client session, and the create every test starts from."""

    def __init__(self, sim: Simulator, session: aiohttp.ClientSession, callback_url: str) -> None:
        self.sim = sim
        self.session = session
        self.callback_url = callback_url
        self.headers = {"Authorization": f"Bearer {sim.api_key}"}

    @property
    def create_url(self) -> str:
        return f"{self.sim.base_url}/image_to_video"

    async def post(self, **changes: object) -> tuple[int, str]:
        body = {**V, "callback_url": f"{self.callback_url}/token", **changes}
        async with self.session.post(
            self.create_url, json=body, headers=self.headers, allow_redirects=False
        ) as response:
            return response.status, await response.text()

    async def create(self, **changes: object) -> list[str]:
        status, text = await self.post(**changes)
        assert status == 200, text
        ids: list[str] = json.loads(text)["data"]["task_ids"]
        return ids

    async def get(self, task_id: str) -> tuple[int, dict[str, object]]:
        url = f"{self.create_url}/{task_id}"
        async with self.session.get(url, headers=self.headers) as response:
            body: dict[str, object] = await response.json()
            return response.status, body

    async def data(self, task_id: str) -> dict[str, object]:
        status, body = await self.get(task_id)
        assert (status, body["code"]) == (200, 0)
        data = body["data"]
        assert isinstance(data, dict)
        return data


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver() as receiver:
        yield receiver


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
        yield session


@pytest.fixture
async def api(receiver: Receiver, session: aiohttp.ClientSession) -> AsyncIterator[Api]:
    """A simulator that runs by itself."""
    async with Simulator() as sim:
        yield Api(sim, session, receiver.url)


@pytest.fixture
async def manual(receiver: Receiver, session: aiohttp.ClientSession) -> AsyncIterator[Api]:
    """A simulator whose tasks wait for the test."""
    async with Simulator(manual=True) as sim:
        yield Api(sim, session, receiver.url)


# --- a plain job -------------------------------------------------------------------------------------------


async def test_create_answers_ids_and_calls_back_each(api: Api, receiver: Receiver) -> None:
    """A create answers one id for each output, and each output has its own callback."""
    ids = await api.create(generate_count=3)
    await api.sim.settled()
    assert len(set(ids)) == 3
    assert all(task_id.startswith("i2v-") and len(task_id) == 36 for task_id in ids)
    assert receiver.reports == [(task_id, "SUCCEEDED") for task_id in ids]
    assert receiver.paths == ["/hook/token"] * 3
    assert receiver.types == ["application/json"] * 3


async def test_callback_is_the_documented_one(api: Api, receiver: Receiver) -> None:
    """The callback carries what the documentation shows, and not what only GET returns."""
    (task_id,) = await api.create()
    await api.sim.settled()
    body = json.loads(receiver.bodies[0])
    assert {name: body[name] for name in ("code", "msg", "task_type")} == {
        "code": 0,
        "msg": "ok",
        "task_type": "image_to_video",
    }
    assert set(body["data"]) == {"task_id", "status", "video_url", "thumbnail_url", "error_message"}
    assert body["data"]["video_url"].startswith(f"{api.sim.origin}/media/{task_id}.mp4?X-Goog-Signature=")


@pytest.mark.parametrize(
    ("resolution", "ratio", "size"),
    [("720p", "16:9", (1280, 720)), ("1080p", "9:16", (1080, 1920)), ("4k", "16:9", (3840, 2160))],
)
async def test_status_tells_duration_and_size(api: Api, resolution: str, ratio: str, size: tuple[int, int]) -> None:
    """GET returns duration and size of a finished task as they were ordered."""
    (task_id,) = await api.create(aspect_resolution=resolution, aspect_ratio=ratio)
    await api.sim.settled()
    data = await api.data(task_id)
    assert (data["status"], data["duration"]) == ("SUCCEEDED", 6)
    assert (data["width"], data["height"]) == size


async def test_the_callback_follows_the_answer(api: Api, receiver: Receiver) -> None:
    """No callback is sent before its answer was written."""
    api.sim.hold_answers()
    post = asyncio.create_task(api.create())
    await api.sim.wait_for_posts(1)
    assert api.sim.ledger.paid_submits == 1
    assert not receiver.bodies
    assert not post.done()
    api.sim.release_answers()
    (task_id,) = await post
    await api.sim.settled()
    assert receiver.reports == [(task_id, "SUCCEEDED")]


async def test_without_callback_url_no_callback_is_sent(
    manual: Api, session: aiohttp.ClientSession, receiver: Receiver
) -> None:
    """A job without a callback URL ends in silence."""
    async with session.post(manual.create_url, json=V, headers=manual.headers) as response:
        (task_id,) = (await response.json())["data"]["task_ids"]
    assert await manual.sim.finish(task_id) is None
    assert not receiver.bodies
    assert not manual.sim.ledger.callbacks
    assert manual.sim.ledger.paid_by_callback_token == {}


async def test_same_seed_same_ids(session: aiohttp.ClientSession, receiver: Receiver) -> None:
    """The seed alone decides the task ids."""
    made = []
    for seed in (1, 1, 2):
        async with Simulator(seed=seed) as sim:
            made.append(await Api(sim, session, receiver.url).create())
            await sim.settled()
    assert made[0] == made[1] != made[2]


async def test_latency_is_the_time_of_the_generation(session: aiohttp.ClientSession, receiver: Receiver) -> None:
    """With a latency tasks are PROCESSING until it is over."""
    async with Simulator(latency=3600) as sim:
        api = Api(sim, session, receiver.url)
        (slow,) = await api.create()
        sim.script(faults.latency(0.001))
        (quick,) = await api.create()
        await sim.wait_for_callbacks(1)
        assert receiver.reports == [(quick, "SUCCEEDED")]
        data = await api.data(slow)
    assert data == {
        "task_id": slow,
        "status": "PROCESSING",
        "video_url": "",
        "thumbnail_url": "",
        "error_message": "",
        "duration": None,
        "width": None,
        "height": None,
    }


# --- authorisation and parameters --------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer other"}, {"Authorization": "sim-key"}])
async def test_wrong_token_is_401(api: Api, headers: dict[str, str]) -> None:
    """Without the key nothing is created, returned, or taken from the script."""
    api.sim.script(faults.business_error(7, "still here"))
    api.headers = headers
    assert await api.post() == (401, '{"code": 100002, "msg": "Invalid token"}')
    assert (await api.get("i2v-0"))[0] == 401
    api.headers = {"Authorization": f"Bearer {api.sim.api_key}"}
    assert json.loads((await api.post())[1])["code"] == 7
    assert api.sim.ledger.paid_submits == 0


async def test_unknown_task_and_path_are_404_json(api: Api, session: aiohttp.ClientSession) -> None:
    """What is not there is a 404 in JSON."""
    assert await api.get("i2v-0") == (404, {"code": 100003, "msg": "Task not found"})
    async with session.put(api.create_url) as response:
        assert (response.status, (await response.json())["code"]) == (404, 404)


@pytest.mark.parametrize("raw", [b"", b"[1]", b"{", b"\xff", b"[" * 100_000])
async def test_a_body_that_is_no_object_is_400(api: Api, session: aiohttp.ClientSession, raw: bytes) -> None:
    """A body that is no JSON object is a parameter error, and on the ledger."""
    async with session.post(api.create_url, data=raw, headers=api.headers) as response:
        assert (response.status, (await response.json())["code"]) == (400, 100001)
    (post,) = api.sim.ledger.posts
    assert (post.read, post.paid, post.body, post.status) == (True, False, None, 400)


async def test_a_body_too_large_is_413(api: Api, session: aiohttp.ClientSession) -> None:
    """More than a megabyte is refused unread."""
    async with session.post(api.create_url, data=io.BytesIO(b" " * 2_000_000), headers=api.headers) as response:
        assert (response.status, (await response.json())["code"]) == (413, 100001)
    (post,) = api.sim.ledger.posts
    assert (post.read, post.paid, post.status) == (False, False, 413)


async def test_parameters_are_checked_over_http(api: Api) -> None:
    """A broken rule is HTTP 400 with the business code, and costs nothing."""
    status, text = await api.post(duration=5)
    assert (status, json.loads(text)["code"]) == (400, 100001)
    assert "Parameter error: duration" in text
    assert json.loads((await api.post(prompt="x" * 1001))[1])["code"] == 100005
    assert api.sim.ledger.paid_submits == 0


@pytest.mark.parametrize(
    "body",
    [
        V,
        KL,
        S,
        {**V, "prompt": "x" * 1000},
        {**V, "generate_audio": True, "generate_count": 4, "end_image_url": START_FRAME},
        {**V, "aspect_resolution": "4k", "aspect_ratio": "9:16", "duration": 4},
        {**V, "reference_images": [START_FRAME] * 3},
        {**KL, "model": "V", "duration": 8},
        {**KL, "reference_images": [START_FRAME] * 7, "duration": 10, "generate_audio": False},
        {**S, "duration": 12, "reference_images": []},
        {**V, "field_of_tomorrow": 1},
    ],
)
def test_lawful_parameters(body: dict[str, object]) -> None:
    """What the tables allow, and what they are silent about, is let through."""
    assert ImageToVideo().check(body) is None


@pytest.mark.parametrize(
    ("body", "names"),
    [
        *(({k: v for k, v in V.items() if k != name}, name) for name in V if name != "image_url"),
        ({**V, "model": "X"}, "model"),
        ({**V, "prompt": None}, "prompt"),
        ({**V, "aspect_ratio": "1:1"}, "aspect_ratio"),
        ({**V, "aspect_resolution": "8k"}, "aspect_resolution"),
        ({**KL, "aspect_resolution": "4k"}, "aspect_resolution"),
        ({**S, "aspect_resolution": "1080p"}, "aspect_resolution"),
        ({**V, "duration": 8.0}, "duration"),
        ({**V, "duration": True}, "duration"),
        ({**V, "duration": 12}, "duration"),
        ({**KL, "duration": 6}, "duration"),
        ({**S, "duration": 4}, "duration"),
        ({**KL, "model": "V", "duration": 6}, "duration"),
        ({**V, "generate_audio": 1}, "generate_audio"),
        ({**S, "generate_audio": True}, "generate_audio"),
        ({**V, "generate_count": 0}, "generate_count"),
        ({**V, "generate_count": 5}, "generate_count"),
        ({**V, "generate_count": True}, "generate_count"),
        ({**V, "generate_count": "2"}, "generate_count"),
        ({**V, "callback_url": "ftp://example.com/x"}, "callback_url"),
        ({**V, "callback_url": "http://[nonsense"}, "callback_url"),
        ({**V, "callback_url": "http://"}, "callback_url"),
        ({**V, "image_url": None}, "image_url"),
        ({**V, "image_url": "start_frame.jpg"}, "image_url"),
        ({**V, "reference_images": START_FRAME}, "reference_images"),
        ({**V, "reference_images": [1]}, "reference_images"),
        ({**V, "reference_images": [START_FRAME] * 4}, "reference_images"),
        ({**KL, "reference_images": [START_FRAME] * 8}, "reference_images"),
        ({**KL, "reference_images": []}, "reference_images"),
        ({**KL, "image_url": START_FRAME}, "image_url"),
        ({**S, "reference_images": [START_FRAME]}, "reference_images"),
        ({k: v for k, v in S.items() if k != "image_url"}, "image_url"),
        ({**S, "end_image_url": START_FRAME}, "end_image_url"),
        ({**KL, "model": "V", "duration": 8, "end_image_url": START_FRAME}, "end_image_url"),
    ],
)
def test_unlawful_parameters(body: dict[str, object], names: str) -> None:
    """What the tables forbid is refused with a message that names the field."""
    problem = ImageToVideo().check(body)
    assert problem is not None
    assert problem.code == 100001
    assert problem.msg.startswith("Parameter error: ")
    assert names in problem.msg


@pytest.mark.parametrize(("count", "tasks"), [(2, 2), ("many", 1), (True, 1), (-1, 1), (10**9, 100)])
async def test_lenient_checks_nothing(api: Api, count: object, tasks: int) -> None:
    """With `lenient` any JSON object is a job."""
    api.sim.lenient = True
    ids = await api.create(model="W", duration="long", callback_url=5, prompt=None, generate_count=count)
    await api.sim.settled()
    assert len(ids) == tasks
    assert (await api.data(ids[0]))["status"] == "SUCCEEDED"


# --- faults of the answer ----------------------------------------------------------------------------------


async def test_scripts_are_a_queue_before_the_default(api: Api) -> None:
    """One script is one create, an empty one is plain, and the default is for the rest."""
    api.sim.default(faults.status(503))
    api.sim.script()
    api.sim.script(faults.rate_limited(2))
    assert [(await api.post())[0] for _ in range(4)] == [200, 429, 503, 503]
    assert [post.faults for post in api.sim.ledger.posts] == [
        (),
        ("rate_limited",),
        ("status",),
        ("status",),
    ]


async def test_a_script_takes_faults_only(api: Api) -> None:
    """A fault that was not called is a TypeError, not a silent nothing."""
    with pytest.raises(TypeError, match="not a fault"):
        api.sim.script(faults.lost_callback)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fault", "tasks"),
    [
        (faults.drop_before_read(), None),
        (faults.hang_before_accept(), None),
        (faults.rate_limited(), None),
        (faults.redirect("http://127.0.0.1:1/elsewhere", code=308), None),
        (faults.business_error(100006, "Image URL not reachable"), None),
        (faults.status(500), None),
        (faults.garbage(accept=False), None),
        (faults.status(502, accept=True), 1),
        (faults.garbage(), 1),
        (faults.drop_after_accept(), 1),
        (faults.drop_mid_answer(), 1),
        (faults.hang(0.001), 1),
        (faults.answer_data(None), 1),
        (faults.ids(0), 0),
        (faults.ids(3), 3),
    ],
    ids=lambda value: value.name if isinstance(value, faults.Fault) else str(value),
)
async def test_the_ledger_knows_who_paid(api: Api, fault: faults.Fault, tasks: int | None) -> None:
    """A refused create (None) costs and makes nothing; an accepted one is charged, whatever is answered."""
    api.sim.script(fault)
    post = asyncio.create_task(api.post())
    await api.sim.ledger.until(lambda: bool(api.sim.ledger.posts))
    if isinstance(fault, faults.hang_before_accept):
        post.cancel()
    await asyncio.gather(post, return_exceptions=True)
    await api.sim.settled()
    (record,) = api.sim.ledger.posts
    assert record.paid is (tasks is not None)
    assert record.faults == (fault.name,)
    assert len(api.sim.ledger.task_ids) == len(api.sim.ledger.callbacks) == (tasks or 0)


async def test_rate_limited_says_when(api: Api, session: aiohttp.ClientSession) -> None:
    """429 carries Retry-After as it was asked for: seconds or a date."""
    seen = []
    for retry_after in (2, 0.5, "Fri, 31 Dec 1999 23:59:59 GMT", None):
        api.sim.script(faults.rate_limited(retry_after))
        async with session.post(api.create_url, json=V, headers=api.headers) as response:
            seen.append((response.status, response.headers.get("Retry-After")))
    assert seen == [(429, "2"), (429, "0.5"), (429, "Fri, 31 Dec 1999 23:59:59 GMT"), (429, None)]


@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        (faults.status(500), "application/json", '{"code": 500, "msg": "Simulated status"}'),
        (
            faults.status(400, business_code=100001),
            "application/json",
            '{"code": 100001, "msg": "Simulated status"}',
        ),
        (faults.status(502, body=b"<html>"), "text/html", "<html>"),
        (faults.status(502, accept=True, body=b' {"a":1}'), "application/json", ' {"a":1}'),
        (faults.garbage(b"\x89PNG", content_type="image/png"), "image/png", None),
        (faults.garbage(accept=False), "text/html", "<html><body>It works!</body></html>"),
        (faults.answer_data({}), "application/json", '{"code": 0, "msg": "ok", "data": {}}'),
        (faults.answer_data(None), "application/json", '{"code": 0, "msg": "ok", "data": null}'),
        (
            faults.business_error(100004, "Too big", http=413),
            "application/json",
            '{"code": 100004, "msg": "Too big"}',
        ),
    ],
)
async def test_strange_answers(
    api: Api, session: aiohttp.ClientSession, fault: faults.Fault, kind: str, text: str | None
) -> None:
    """The answer is what the fault says, to the letter."""
    api.sim.script(fault)
    async with session.post(api.create_url, json=V, headers=api.headers) as response:
        assert response.status == getattr(fault, "http", getattr(fault, "code", 200))
        assert response.content_type == kind
        if text is not None:
            assert await response.text() == text


async def test_redirect_points_elsewhere(api: Api, session: aiohttp.ClientSession) -> None:
    """A redirect is answered with its Location."""
    api.sim.script(faults.redirect("https://elsewhere.example/"))
    async with session.post(api.create_url, json=V, headers=api.headers, allow_redirects=False) as response:
        assert (response.status, response.headers["Location"]) == (307, "https://elsewhere.example/")


async def test_ids_may_be_more_or_fewer(api: Api) -> None:
    """The service answers, and makes, the number of tasks the fault says."""
    api.sim.script(faults.ids(3))
    assert len(await api.create(generate_count=1)) == 3
    api.sim.script(faults.ids(1))
    assert len(await api.create(generate_count=4)) == 1
    assert len(api.sim.ledger.task_ids) == 4


async def test_dropped_before_read_is_not_read(api: Api) -> None:
    """The connection is cut before the body is read."""
    api.sim.script(faults.drop_before_read())
    with pytest.raises(aiohttp.ClientConnectionError):
        await api.post()
    (post,) = api.sim.ledger.posts
    assert (post.read, post.paid, post.status, post.faults) == (False, False, None, ("drop_before_read",))
    assert api.sim.ledger.posts_read == 0


async def test_dropped_after_accept_still_calls_back(api: Api, receiver: Receiver) -> None:
    """The answer is lost, the job is paid for, the callback comes."""
    api.sim.script(faults.drop_after_accept())
    with pytest.raises(aiohttp.ClientConnectionError):
        await api.post()
    await api.sim.settled()
    (post,) = api.sim.ledger.posts
    assert (post.read, post.paid, post.status) == (True, True, None)
    assert receiver.reports == [(post.task_ids[0], "SUCCEEDED")]


async def test_dropped_mid_answer_sends_half(api: Api, session: aiohttp.ClientSession) -> None:
    """Status line, headers and half the body arrive; then nothing."""
    api.sim.script(faults.drop_mid_answer())
    async with session.post(api.create_url, json=V, headers=api.headers) as response:
        length = response.content_length
        assert (response.status, response.content_type) == (200, "application/json")
        assert length is not None
        half = await response.content.readexactly(length // 2)
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
    assert half.startswith(b'{"code": 0')
    assert api.sim.ledger.posts[0].status == 200


async def test_hang_ends_with_the_client(api: Api) -> None:
    """A create that hangs is charged and called back, and its handler ends when the client leaves."""
    await api.create()  # the connection that stays
    await api.sim.settled()
    before = asyncio.all_tasks()
    api.sim.script(faults.hang())
    post = asyncio.create_task(api.post())
    await api.sim.wait_for_callbacks(2)
    await api.sim.settled()
    assert not post.done()
    assert api.sim.ledger.posts[1].status is None
    post.cancel()
    await asyncio.gather(post, return_exceptions=True)
    while asyncio.all_tasks() - before:
        await asyncio.sleep(0)


async def test_hang_ends_with_its_time(api: Api) -> None:
    """A hang with a time ends in a cut connection."""
    api.sim.script(faults.hang(0.001))
    with pytest.raises(aiohttp.ClientConnectionError):
        await api.post()
    assert api.sim.ledger.paid_submits == 1


async def test_hang_ends_with_the_simulator(session: aiohttp.ClientSession, receiver: Receiver) -> None:
    """Leaving the simulator cuts connections that hang."""
    async with Simulator() as sim:
        sim.script(faults.hang_before_accept())
        post = asyncio.create_task(Api(sim, session, receiver.url).post())
        await sim.wait_for_posts(1)
        assert sim.ledger.posts[0].read
        assert sim.ledger.paid_submits == 0
    with pytest.raises(aiohttp.ClientConnectionError):
        await post


async def test_a_client_that_leaves_while_its_answer_is_held_is_called_back(api: Api, receiver: Receiver) -> None:
    """A cancelled client has bought what was accepted."""
    api.sim.hold_answers()
    post = asyncio.create_task(api.post())
    await api.sim.wait_for_posts(1)
    post.cancel()
    await asyncio.gather(post, return_exceptions=True)
    await api.sim.settled()
    assert receiver.reports == [(api.sim.ledger.task_ids[0], "SUCCEEDED")]


async def test_a_body_that_breaks_off_is_not_read(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    """A client that leaves in the middle of its body has bought nothing, and the ledger says so."""
    url = URL(api.create_url)
    _, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(
        b"POST /v1/image_to_video HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sim-key\r\nContent-Length: 100\r\n\r\n{"
    )
    await writer.drain()
    assert (await api.get("i2v-0"))[0] == 404  # the other connection was served: the first one has begun
    writer.close()
    await writer.wait_closed()
    await api.sim.ledger.until(lambda: bool(api.sim.ledger.posts))
    (post,) = api.sim.ledger.posts
    assert (post.read, post.paid, post.status) == (False, False, None)
    assert not caplog.records


# --- faults of the callback --------------------------------------------------------------------------------


async def test_early_callback_precedes_the_answer(api: Api, receiver: Receiver) -> None:
    """An early callback is sent and answered while the client still waits for its ids."""
    post: asyncio.Task[list[str]]
    waiting: list[bool] = []

    async def look() -> None:
        waiting.append(not post.done())

    receiver.on_callback = look
    api.sim.script(faults.early_callback())
    post = asyncio.create_task(api.create(generate_count=2))
    await api.sim.wait_for_callbacks(2)
    assert waiting == [True, True]
    assert [task_id for task_id, _ in receiver.reports] == await post


async def test_duplicate_and_lost_callbacks(api: Api, receiver: Receiver) -> None:
    """Each callback comes so many times, or never while GET knows the end."""
    api.sim.script(faults.duplicate_callback(3))
    (twice,) = await api.create()
    await api.sim.settled()
    assert receiver.reports == [(twice, "SUCCEEDED")] * 3
    assert [record.attempt for record in api.sim.ledger.callbacks] == [1, 2, 3]
    api.sim.script(faults.lost_callback())
    (lost,) = await api.create()
    await api.sim.settled()
    assert len(receiver.bodies) == 3
    assert (await api.data(lost))["status"] == "SUCCEEDED"


async def test_out_of_order(api: Api, receiver: Receiver) -> None:
    """The last task is reported first, and stale progress follows each end."""
    api.sim.script(faults.out_of_order())
    first, second = await api.create(generate_count=2)
    await api.sim.settled()
    assert receiver.reports == [
        (second, "SUCCEEDED"),
        (second, "PROCESSING"),
        (first, "SUCCEEDED"),
        (first, "PROCESSING"),
    ]
    stale = json.loads(receiver.bodies[1])["data"]
    assert stale["video_url"] == stale["thumbnail_url"] == ""


async def test_progress_callback(api: Api, receiver: Receiver) -> None:
    """A report of progress comes first, and GET agrees with it at that moment."""
    seen: list[object] = []

    async def look() -> None:
        seen.append((await api.data(api.sim.ledger.task_ids[0]))["status"])

    receiver.on_callback = look
    api.sim.script(faults.progress_callback())
    (task_id,) = await api.create()
    await api.sim.settled()
    assert receiver.reports == [(task_id, "PROCESSING"), (task_id, "SUCCEEDED")]
    assert seen == ["PROCESSING", "SUCCEEDED"]


async def test_failed_tasks(api: Api, receiver: Receiver) -> None:
    """All tasks fail, or those that were named; a failure has a message and no result."""
    api.sim.script(faults.failed("no such dog", which=[1]))
    good, bad = await api.create(generate_count=2)
    await api.sim.settled()
    assert receiver.reports == [(good, "SUCCEEDED"), (bad, "FAILED")]
    data = await api.data(bad)
    assert (data["error_message"], data["video_url"], data["duration"]) == ("no such dog", "", None)
    api.sim.script(faults.failed())
    ids = await api.create(generate_count=2)
    await api.sim.settled()
    assert [api.sim.ledger.tasks[task_id] for task_id in ids] == ["FAILED", "FAILED"]


async def test_callback_bodies_can_be_anything(api: Api, receiver: Receiver) -> None:
    """The body is replaced, or fields of its data are."""
    api.sim.script(faults.raw_callback(b"\xff not json"))
    await api.create()
    api.sim.script(faults.callback_fields(task_id=None, extra=[1]))
    await api.create()
    await api.sim.settled()
    assert b"\xff not json" in receiver.bodies
    (changed,) = [json.loads(body)["data"] for body in receiver.bodies if body[:1] == b"{"]
    assert (changed["task_id"], changed["extra"], changed["status"]) == (None, [1], "SUCCEEDED")


async def test_callback_retry_ends_with_2xx_or_its_number(api: Api, receiver: Receiver) -> None:
    """A callback is repeated until it is answered 2xx, at most so many times; without the fault, never."""
    receiver.answers.extend([503, 307, 204, 500, 500])
    for script in ([faults.callback_retry(5)], [faults.callback_retry(1)]):
        api.sim.script(*script)
        await api.create()
        await api.sim.settled()
    assert [record.status for record in api.sim.ledger.callbacks] == [503, 307, 204, 500, 500]
    assert api.sim.ledger.unacknowledged == (api.sim.ledger.task_ids[1],)
    receiver.answers.append(500)
    await api.create()
    await api.sim.settled()
    assert len(receiver.bodies) == 6


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/closed", "nonsense", "http://127.0.0.1:99999/x"])
async def test_a_receiver_out_of_reach(api: Api, url: str) -> None:
    """A callback without a receiver is on the ledger without an answer."""
    api.sim.lenient = True
    (task_id,) = await api.create(callback_url=url)
    await api.sim.settled()
    (record,) = api.sim.ledger.callbacks
    assert (record.task_id, record.url, record.state, record.status) == (task_id, url, "SUCCEEDED", None)
    assert api.sim.ledger.unacknowledged == (task_id,)


async def test_a_receiver_that_does_not_answer(session: aiohttp.ClientSession, receiver: Receiver) -> None:
    """The sender gives up after its timeout."""
    receiver.gate.clear()
    sim = Simulator()
    sim.callback_timeout = 0.05
    async with sim:
        await Api(sim, session, receiver.url).create()
        await sim.settled()
        assert [record.status for record in sim.ledger.callbacks] == [None]


async def test_callback_url_is_used_as_given(api: Api, receiver: Receiver) -> None:
    """The path and query of the callback URL arrive byte for byte."""
    await api.create(callback_url=f"{receiver.url}/a%2Fb%20c?x=%41")
    await api.sim.settled()
    assert receiver.paths == ["/hook/a%2Fb%20c?x=%41"]


# --- faults of the status endpoint -------------------------------------------------------------------------


async def test_status_faults(api: Api) -> None:
    """The first GETs of each task fail as scripted, then the state is returned; or the tasks stay unknown."""
    api.sim.script(faults.status_fault(500, 429))
    ids = await api.create(generate_count=2)
    await api.sim.settled()
    for task_id in ids:
        assert [(await api.get(task_id))[0] for _ in range(3)] == [500, 429, 200]
    api.sim.script(faults.no_status_endpoint())
    (hidden,) = await api.create()
    assert await api.get(hidden) == (404, {"code": 100003, "msg": "Task not found"})
    assert [record.status for record in api.sim.ledger.gets if record.task_id == hidden] == [404]


# --- directives --------------------------------------------------------------------------------------------


async def test_directives_ask_for_faults(api: Api, receiver: Receiver) -> None:
    """A prompt asks for faults of its tasks, several at once."""
    (task_id,) = await api.create(prompt="a dog [sim:failed=no dog] [sim:duplicate_callback] [sim:latency=0.001]")
    await api.sim.settled()
    assert receiver.reports == [(task_id, "FAILED")] * 2
    assert api.sim.ledger.posts[0].faults == ("failed", "duplicate_callback", "latency")
    (lost,) = await api.create(prompt="[sim:lost_callback] and [sim:status_fault=500,502]")
    await api.sim.settled()
    assert [(await api.get(lost))[0] for _ in range(3)] == [500, 502, 200]
    assert len(receiver.bodies) == 2


@pytest.mark.parametrize(("directive", "status"), [("rate_limited=2", 429), ("rate_limited", 429), ("status=500", 500)])
async def test_directives_that_refuse_work_once(api: Api, directive: str, status: int) -> None:
    """The first POST of a prompt is refused, the same prompt is accepted after that."""
    prompt = f"a dog [sim:{directive}] [sim:failed]"
    assert [(await api.post(prompt=prompt))[0] for _ in range(3)] == [status, 200, 200]
    assert (await api.post(prompt=f"another {prompt}"))[0] == status
    assert set(api.sim.ledger.tasks.values()) <= {"FAILED", "PENDING"}


async def test_directives_can_cut_the_connection(api: Api) -> None:
    """The same words work for connections."""
    for prompt, paid in (
        ("[sim:drop_before_read]", 0),
        ("[sim:drop_after_accept]", 1),
        ("[sim:hang=0.001]", 2),
    ):
        with pytest.raises(aiohttp.ClientConnectionError):
            await api.post(prompt=prompt)
        assert api.sim.ledger.paid_submits == paid


@pytest.mark.parametrize(
    ("directive", "code"),
    [("business_error=100006", 100006), ("ids=2", 0), ("callback_retry=1", 0), ("duplicate_callback=1", 0)],
)
async def test_directives_with_numbers(api: Api, directive: str, code: int) -> None:
    """Values are read as what they stand for."""
    status, text = await api.post(prompt=f"[sim:{directive}]")
    assert (status, json.loads(text)["code"]) == (200, code)


@pytest.mark.parametrize(
    "directive", ["lose_callback", "", "status", "status=many", "lost_callback=1", "ids=", "latency=soon"]
)
async def test_unknown_directives_are_refused(api: Api, directive: str) -> None:
    """An unknown word, or a value that makes no sense, is refused with the list of known words."""
    status, text = await api.post(prompt=f"a dog [sim:{directive}]")
    body = json.loads(text)
    assert (status, body["code"]) == (400, 100001)
    assert "latency, lost_callback, media_gone" in body["msg"]
    assert api.sim.ledger.paid_submits == 0


# --- manual tasks ------------------------------------------------------------------------------------------


async def test_manual_tasks_wait(manual: Api, receiver: Receiver) -> None:
    """Nothing moves until the test moves it; each step returns the receiver's answer."""
    (task_id,) = await manual.create()
    await manual.sim.settled()
    assert (await manual.data(task_id))["status"] == "PENDING"
    receiver.answers.extend([200, 503, 200])
    assert await manual.sim.progress(task_id) == 200
    assert await manual.sim.finish(task_id) == 503
    assert list(manual.sim.ledger.unacknowledged) == [task_id]
    assert await manual.sim.callback(task_id) == 200
    assert list(manual.sim.ledger.unacknowledged) == []
    assert receiver.reports == [(task_id, "PROCESSING"), (task_id, "SUCCEEDED"), (task_id, "SUCCEEDED")]


async def test_manual_faults_of_the_callback_apply(manual: Api, receiver: Receiver) -> None:
    """A lost callback is lost, an out-of-order one is followed by stale progress, and one can be forced."""
    manual.sim.script(faults.lost_callback())
    (lost,) = await manual.create()
    assert await manual.sim.finish(lost) is None
    assert not receiver.bodies
    assert await manual.sim.callback(lost) == 200
    manual.sim.script(faults.out_of_order(), faults.failed("scripted"))
    (mixed,) = await manual.create()
    assert await manual.sim.finish(mixed, "FAILED") == 200
    assert receiver.reports == [(lost, "SUCCEEDED"), (mixed, "FAILED"), (mixed, "PROCESSING")]
    assert (await manual.data(mixed))["error_message"] == "scripted"


async def test_set_result_does_not_call_back(manual: Api, receiver: Receiver) -> None:
    """A state can change without a callback, also to an undocumented one."""
    (task_id,) = await manual.create()
    for status, message in (("PROCESSING", None), ("QUEUED", None), ("FAILED", "sorry"), ("FAILED", None)):
        manual.sim.set_result(task_id, status=status, message=message)
        data = await manual.data(task_id)
        assert data["status"] == status
        assert data["error_message"] == (message or ("Generation failed" if status == "FAILED" else ""))
    assert not receiver.bodies


async def test_manual_callback_before_a_held_answer(manual: Api, receiver: Receiver) -> None:
    """With held answers a test can finish a task whose ids are not known yet, early_callback or not."""
    manual.sim.hold_answers()
    manual.sim.script(faults.early_callback())
    post = asyncio.create_task(manual.create())
    await manual.sim.wait_for_posts(1)
    (task_id,) = manual.sim.ledger.task_ids
    assert await manual.sim.finish(task_id) == 200
    assert not post.done()
    manual.sim.release_answers()
    assert await post == [task_id]


# --- result files ------------------------------------------------------------------------------------------


async def fetch(session: aiohttp.ClientSession, url: object, **headers: str) -> tuple[int, bytes, Mapping[str, str]]:
    async with session.get(URL(str(url), encoded=True), headers=headers) as response:
        return response.status, await response.read(), response.headers


@pytest.mark.parametrize("ratio", ["16:9", "9:16"])
async def test_media_is_real(api: Api, session: aiohttp.ClientSession, ratio: str) -> None:
    """The results are an MP4 and a WebP of the ordered shape, small, with their digests."""
    (task_id,) = await api.create(aspect_ratio=ratio)
    await api.sim.settled()
    data = await api.data(task_id)
    status, video, headers = await fetch(session, data["video_url"])
    assert (status, video[4:8], headers["Content-Type"]) == (200, b"ftyp", "video/mp4")
    assert len(video) <= 60_000
    assert int(headers["Content-Length"]) == len(video)
    digests = dict(item.split("=", 1) for item in headers["x-goog-hash"].split(","))
    assert base64.b64decode(digests["md5"]) == hashlib.md5(video).digest()
    assert base64.b64decode(digests["crc32c"]) == crc32c(video).to_bytes(4, "big")
    # the track header of the first track ends with width and height, 16.16 fixed point
    at = video.index(b"tkhd") + 80
    size = (int.from_bytes(video[at : at + 2], "big"), int.from_bytes(video[at + 4 : at + 6], "big"))
    assert size == ((320, 180) if ratio == "16:9" else (180, 320))
    status, picture, headers = await fetch(session, data["thumbnail_url"])
    assert (status, picture[:4], picture[8:12]) == (200, b"RIFF", b"WEBP")
    assert headers["Content-Type"] == "image/webp"
    assert len(picture) <= 15_000


def test_crc32c_is_the_published_one() -> None:
    """The check value of CRC-32C."""
    assert crc32c(b"123456789") == 0xE3069283


@pytest.mark.parametrize(
    ("value", "start", "stop"),
    [("bytes=0-9", 0, 10), ("bytes=100-", 100, None), ("bytes=-5", -5, None), ("bytes=10-10", 10, 11)],
)
async def test_media_ranges(api: Api, session: aiohttp.ClientSession, value: str, start: int, stop: int | None) -> None:
    """A single range is honoured, with and without the right If-Range."""
    (task_id,) = await api.create()
    await api.sim.settled()
    url = (await api.data(task_id))["video_url"]
    _, whole, headers = await fetch(session, url)
    first = start % len(whole)
    last = (stop or len(whole)) - 1
    for extra in ({}, {"If-Range": headers["ETag"]}):
        status, part, answered = await fetch(session, url, Range=value, **extra)
        assert (status, part) == (206, whole[start:stop])
        assert answered["Content-Range"] == f"bytes {first}-{last}/{len(whole)}"
        assert answered["x-goog-hash"] == headers["x-goog-hash"]


async def test_media_ranges_that_are_not_honoured(api: Api, session: aiohttp.ClientSession) -> None:
    """Another file's range, several ranges and nonsense get the whole; one beyond the end gets 416."""
    (task_id,) = await api.create()
    await api.sim.settled()
    url = (await api.data(task_id))["video_url"]
    _, whole, _ = await fetch(session, url)
    assert (await fetch(session, url, **{"Range": "bytes=0-9", "If-Range": '"old"'}))[:2] == (200, whole)
    assert (await fetch(session, url, Range="bytes=0-1,3-4"))[:2] == (200, whole)
    assert (await fetch(session, url, Range="rubbish"))[:2] == (200, whole)
    status, body, headers = await fetch(session, url, Range=f"bytes={len(whole)}-")
    assert (status, body, headers["Content-Range"]) == (416, b"", f"bytes */{len(whole)}")


async def test_media_of_no_result_is_404(manual: Api, session: aiohttp.ClientSession) -> None:
    """Before the end, for unknown tasks and for other types there is no file."""
    (task_id,) = await manual.create()
    media = f"{manual.sim.origin}/media"
    assert (await fetch(session, f"{media}/{task_id}.mp4"))[0] == 404
    manual.sim.set_result(task_id)
    assert (await fetch(session, f"{media}/{task_id}.mp4"))[0] == 200
    assert (await fetch(session, f"{media}/{task_id}.avi"))[0] == 404
    assert (await fetch(session, f"{media}/i2v-0.mp4"))[0] == 404
    assert [record.status for record in manual.sim.ledger.media] == [404, 200, 404, 404]


async def test_media_requests_with_the_key_are_listed(manual: Api, session: aiohttp.ClientSession) -> None:
    """A request for a file that carries the key is listed separately."""
    url = f"{manual.sim.origin}/media/x.mp4"
    await fetch(session, url)
    await fetch(session, url, Authorization="Bearer sim-key")
    (leak,) = manual.sim.ledger.media_with_key
    assert (leak.path, leak.headers["authorization"]) == ("/media/x.mp4", "Bearer sim-key")


# --- the ledger --------------------------------------------------------------------------------------------


async def test_the_ledger_tells_all(api: Api, receiver: Receiver) -> None:
    """Every POST, GET, callback and file is on the ledger, and the counts are theirs."""
    ids = await api.create(generate_count=2)
    api.sim.script(faults.failed())
    ids += await api.create(callback_url=f"{receiver.url}/other?x=/y")
    api.sim.script(faults.status(500))
    await api.post()
    await api.sim.settled()
    await api.get(ids[0])
    ledger = api.sim.ledger
    first = ledger.posts[0]
    assert (first.number, first.task_ids, first.paid, first.read, first.status) == (
        1,
        tuple(ids[:2]),
        True,
        True,
        200,
    )
    assert first.body is not None
    assert first.body["model"] == "V"
    assert first.headers["authorization"] == "Bearer sim-key"
    assert first.callback_url == f"{receiver.url}/token"
    assert ledger.task_ids == tuple(ids)
    assert ledger.paid_by_callback_token == {"token": 1, "other": 1}
    assert [(record.task_id, record.status) for record in ledger.gets] == [(ids[0], 200)]
    assert ledger.summary() == {
        "posts": 3,
        "paid_submits": 2,
        "tasks": 3,
        "succeeded": 2,
        "failed": 1,
        "gets": 1,
        "callbacks": 3,
        "unacknowledged": 0,
        "uploads": 0,
        "media": 0,
        "media_with_key": 0,
    }
    assert repr(api.sim) == f"<Simulator {api.sim.base_url} posts=3 tasks=3>"


async def test_records_do_not_show_the_key(api: Api) -> None:
    """The repr of the ledger shows neither the key nor a callback URL."""
    await api.create()
    await api.sim.settled()
    shown = repr(api.sim.ledger)
    assert "sim-key" not in shown
    assert "/hook/" not in shown
    assert "paid=True" in shown


async def test_waiting_wakes_at_the_number(api: Api) -> None:
    """Waiters wake when their number is reached, not before, and at once when it already is."""
    waiter = asyncio.create_task(api.sim.wait_for_posts(2))
    given_up = asyncio.create_task(api.sim.wait_for_callbacks(99))
    await api.create()
    assert not waiter.done()
    given_up.cancel()
    await api.create()
    await waiter
    await api.sim.wait_for_callbacks(2)
    await asyncio.gather(given_up, return_exceptions=True)
    assert given_up.cancelled()


# --- the end -----------------------------------------------------------------------------------------------


async def test_leaving_leaves_nothing(session: aiohttp.ClientSession, receiver: Receiver) -> None:
    """Leaving ends sleeping jobs, hanging and waiting creates, half-sent requests and unanswered callbacks."""
    before = asyncio.all_tasks()
    receiver.gate.clear()
    async with Simulator() as sim:
        api = Api(sim, session, receiver.url)
        sim.script(faults.latency(3600))
        await api.create()
        sim.script(faults.hang())
        sim.script(faults.early_callback())
        posts = [asyncio.create_task(api.post()) for _ in range(2)]
        await sim.wait_for_posts(3)
        sim.hold_answers()
        posts.append(asyncio.create_task(api.post()))
        await sim.wait_for_posts(4)
        _, writer = await asyncio.open_connection(sim.host, sim.port)
        writer.write(b"POST /v1/image_to_video HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
        await writer.drain()
        started = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - started < 2
    receiver.gate.set()
    await asyncio.gather(*posts, return_exceptions=True)
    writer.close()
    await receiver.runner.cleanup()
    assert asyncio.all_tasks() == before
    with pytest.raises(aiohttp.ClientConnectorError):
        await api.post()


async def test_a_port_in_use_is_an_error_that_leaves_nothing(api: Api) -> None:
    """A simulator that cannot listen says so, and has nothing open."""
    with pytest.raises(OSError, match="address already in use"):
        async with Simulator(port=api.sim.port):
            raise AssertionError("not reached")


async def test_many_jobs_at_once(api: Api, receiver: Receiver) -> None:
    """Hundreds of jobs at once each get their own ids and callback."""
    made = await asyncio.gather(*(api.create() for _ in range(300)))
    await api.sim.settled()
    ids = {task_id for (task_id,) in made}
    assert len(ids) == 300
    assert sorted(task_id for task_id, _ in receiver.reports) == sorted(ids)
    assert api.sim.ledger.unacknowledged == ()
