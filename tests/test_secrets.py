"""Canaries: a key, a secret, tokens, signed URLs and a DSN go everywhere, and are found nowhere they do not belong."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import pickle
import re
import traceback
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from support import FailingStore, client_of, closed_port, model_v, plain_session, port_of, post, raw_exchange, token_of
from test_submit import xiling

from xiling_async import (
    Client,
    ImageToVideo,
    Limits,
    PostgresStore,
    SQLiteStore,
    TaskFailed,
    WebhookReceiver,
    XilingError,
    errors,
    simulator,
)
from xiling_async.models.lifecycle import Accepted
from xiling_async.simulator import Simulator, faults
from xiling_async.telemetry.otel import OpenTelemetry
from xiling_async.testing.clock import SkippingClock

KEY = "canary-key-51f0c8e2"
SECRET = "canary-secret-7b1d93aa-and-more"
PASSWORD = "canary-password-0c44"
SIGNATURE = "canarysignature8f3e"
SIGNED = f"https://images.example/sea.jpg?X-Goog-Signature={SIGNATURE}&X-Goog-Expires=604800"
ECHO = f"Bearer {KEY}, {SIGNED}"  # of a service that quotes what it was sent
PICTURE = Path(simulator.__file__).with_name("media") / "samples" / "landscape.webp"
SIMULATORS_SIGNATURE = re.compile(r"X-Goog-Signature=([0-9a-zA-Z]{16,})")
ABSTRACT = {"XilingError", "ServiceError", "DownloadError"}  # raised as themselves too, but not wanted here


class Everything(logging.Handler):
    """Every record of every logger, with its arguments."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name}: {self.format(record)} {record.args!r}")


class Evidence:
    """What was said, shown and could be sent elsewhere while the canaries were about."""

    def __init__(self, heard: Everything) -> None:
        self.heard = heard
        self.errors: list[XilingError] = []
        self.things: list[object] = []

    async def of(self, work: Awaitable[Any]) -> Any:
        try:
            found = await work
        except XilingError as error:
            self.errors.append(error)
            return None
        self.things.append(found)
        return found

    def made(self, make: Callable[[], object]) -> None:
        try:
            self.things.append(make())
        except XilingError as error:
            self.errors.append(error)

    def texts(self) -> Iterator[str]:
        yield from self.heard.lines
        for thing in (*self.things, *self.errors):
            yield f"{thing!r} {thing!s} {thing}"
        for error in self.errors:
            yield "".join(traceback.format_exception(error))
            yield repr((error.args, vars(error)))
            again = pickle.loads(pickle.dumps(error))
            yield "".join(traceback.format_exception(again)) + repr(vars(again))

    def pickles(self) -> Iterator[bytes]:
        yield from (pickle.dumps(error) for error in self.errors)


@contextlib.asynccontextmanager
async def at_debug() -> AsyncIterator[Everything]:
    """DEBUG for everybody, asyncio's debug mode with every callback a slow one, and every warning kept as a line."""
    heard, root, loop = Everything(), logging.getLogger(), asyncio.get_running_loop()
    level, slow_s = root.level, loop.slow_callback_duration
    with warnings.catch_warnings(record=True, action="always") as warned:
        root.addHandler(heard)
        root.setLevel(logging.DEBUG)
        loop.set_debug(True)
        loop.slow_callback_duration = 0.0
        try:
            yield heard
        finally:
            loop.set_debug(False)
            loop.slow_callback_duration = slow_s
            root.setLevel(level)
            root.removeHandler(heard)
            gc.collect()
            heard.lines += [warnings.formatwarning(w.message, w.category, w.filename, w.lineno) for w in warned]


# --- the scenarios -------------------------------------------------------------------------------------------------


def asked(prompt: str = "waves") -> ImageToVideo:
    return model_v(prompt, image_url=SIGNED)


async def what_goes_well(client: Client, sim: Simulator, seen: Evidence, folder: Path) -> None:
    """Upload, submit, callback, poll, download."""
    await seen.of(client.upload(PICTURE))
    job = await seen.of(client.submit(asked(), key="order-1"))
    (video,) = await seen.of(job)
    await seen.of(client.download(video, folder / "a.mp4", allow_private=True))
    sim.script(faults.lost_callback(), faults.status_fault(500))
    await seen.of(client.run(asked("sand")))
    sim.script(faults.cut_media(100))
    (video,) = await seen.of(await seen.of(client.submit(asked("cut"))))
    await seen.of(client.download(video, folder / "cut.mp4", allow_private=True))
    async for other in client.recover():
        seen.things.append(other)
    seen.things += [client.stats(), job.request, job.state]


async def what_goes_wrong(client: Client, sim: Simulator, seen: Evidence, folder: Path) -> None:
    """The service refuses, breaks off and quotes; the results are late, gone or not what was announced."""
    for fault in (
        faults.business_error(100002, f"Invalid token {KEY}", http=401),
        faults.business_error(100006, f"not reachable: {ECHO}", http=400),
        faults.garbage(ECHO.encode()),
        faults.answer_data({"headers": {"authorization": f"Bearer {KEY}"}, "urls": [SIGNED]}),
        faults.answer_data({"task_ids": ["i2v-1", "i2v-2"], "echo": ECHO}),
        faults.redirect(f"https://elsewhere.example/?key={KEY}&X-Goog-Signature={SIGNATURE}"),
        faults.drop_before_read(),
    ):
        sim.script(fault)
        await seen.of(client.submit(asked()))
    for _ in range(9):
        sim.script(faults.rate_limited(retry_after=1))
    await seen.of(client.submit(asked()))
    for _ in range(4):
        sim.script_upload(faults.status(500, body=ECHO.encode()))
    await seen.of(client.upload(PICTURE.with_name("portrait.webp")))
    sim.script(faults.failed(f"could not read {SIGNED}", [1]))
    await seen.of(await client.submit(model_v(count=2, image_url=SIGNED)))
    for number, bad in enumerate((faults.media_gone(), faults.wrong_hash(), faults.media_status(*(500,) * 9))):
        sim.script(bad)
        (video,) = await (await client.submit(asked(f"bad media {number}")))
        await seen.of(client.download(video, folder / f"{number}.mp4", allow_private=True))
    await seen.of(client.download(video, folder / "a.mp4", allow_private=True))
    sim.script(faults.lost_callback(), faults.status_fault(*(500,) * 200))
    late = await client.submit(asked("late"))
    await seen.of(late.refresh())
    await seen.of(late.result(timeout=1))


async def what_strangers_send(sim: Simulator, seen: Evidence) -> None:
    """Callbacks that are none, to a token that is one, and requests that are no HTTP."""
    url = str(sim.ledger.posts[0].callback_url)
    async with plain_session() as session:
        for body in (b"{", ECHO.encode(), b'{"code": 0, "data": {"task_id": "i2v-x", "video_url": "' + SIGNED.encode()):
            await post(session, url, body)
            await post(session, url[:-2], body)
    for raw in (b"POST /%s HTTP/9.9\r\n\r\n", b"/%s\r\n\r\n", b"POST /%s HTTP/1.1\r\nno colon\r\n\r\n"):
        await raw_exchange(port_of(url), raw % token_of(url).encode())


async def what_is_set_up_wrongly(sim: Simulator, seen: Evidence, folder: Path) -> None:
    """No service, no database, no room on the disk; arguments that hold secrets."""
    with closed_port() as port:
        address = f"http://127.0.0.1:{port}/v1"
        async with client_of(sim, api_key=KEY, base_url=address, clock=SkippingClock()) as lost:
            await seen.of(lost.submit(asked()))
        postgres = PostgresStore(f"postgresql://me:{PASSWORD}@127.0.0.1:{port}/jobs?password={PASSWORD}")
        seen.things.append(postgres)
        await seen.of(client_of(sim, api_key=KEY, store=postgres).__aenter__())
    store = FailingStore(Accepted)
    async with client_of(sim, api_key=KEY, store=store) as forgetful:
        await seen.of(forgetful.submit(asked()))
    await seen.of(forgetful.submit(asked()))
    async with client_of(sim, api_key=KEY, limits=Limits(outputs=1)) as limited:
        await limited.submit(asked())
        await seen.of(limited.submit(asked(), metadata={"signed": SIGNED}))
        await seen.of(limited.submit(asked(), metadata={"signed": 5}))  # type: ignore[dict-item]
    for make in (
        lambda: client_of(sim, api_key=f"{KEY}\n"),
        lambda: client_of(sim, api_key=KEY, headers={"Authorization": f"Bearer {KEY}"}),
        lambda: client_of(sim, api_key=KEY, base_url=f"http://user:{PASSWORD}@elsewhere.example/v1"),
        lambda: PostgresStore(f"postgresql://me:{PASSWORD}@[::1:x/jobs"),
        lambda: WebhookReceiver(f"http://hooks.example/{'a' * 90}", port=0, secret=SECRET[:9]),
        lambda: model_v("p" * 1001, image_url=f"ftp{SIGNED}"),
        lambda: ImageToVideo.unchecked(model="V", image_url=SIGNED),
    ):
        seen.made(make)


# --- what they left behind -----------------------------------------------------------------------------------------


def leaks(texts: Iterator[str] | Iterator[bytes], canaries: set[str]) -> list[str]:
    """Where one was found, with what is around it."""
    found = []
    for text in texts:
        plain = text.decode("latin-1") if isinstance(text, bytes) else text
        for canary in canaries:
            if canary in plain:
                place = plain.index(canary)
                found.append(f"{plain[:80]} ... {plain[max(0, place - 120) : place + 20]}")
    return found


async def test_no_canary_is_found(tmp_path: Path) -> None:
    """Not in a log line, a warning, a repr, an error, its traceback or its pickle, an event or a span."""
    exporter, tracers, events = InMemorySpanExporter(), TracerProvider(), list[object]()
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    hooks = (OpenTelemetry(tracer_provider=tracers), events.append)
    path = tmp_path / "jobs.db"
    async with at_debug() as heard, Simulator(KEY) as sim:
        seen, receiver = Evidence(heard), WebhookReceiver(port=0, secret=SECRET)
        store, clock = SQLiteStore(path), SkippingClock(quiet_s=0.05)
        client = client_of(
            sim, api_key=KEY, receiver=receiver, store=store, clock=clock, on_event=hooks, on_uncertain="raise"
        )
        async with client:
            await what_goes_well(client, sim, seen, tmp_path)
            await what_goes_wrong(client, sim, seen, tmp_path)
            await what_strangers_send(sim, seen)
            seen.things += [client, receiver, store, client.stats()]
        await what_is_set_up_wrongly(sim, seen, tmp_path)
        seen.things += [*events, *(span.to_json() for span in exporter.get_finished_spans())]
        tokens = {token_of(post.callback_url) for post in sim.ledger.posts if post.callback_url}
        links = set(SIMULATORS_SIGNATURE.findall(" ".join(record.query for record in sim.ledger.media)))
    tracers.shutdown()
    assert len(tokens) > 10
    assert len(links) > 3
    kinds = {name for name, cls in vars(errors).items() if isinstance(cls, type) and issubclass(cls, XilingError)}
    assert {name for name in kinds if not name.startswith("_")} - {type(e).__name__ for e in seen.errors} <= ABSTRACT
    assert {line.split(":")[0] for line in heard.lines} >= {
        "asyncio",
        "xiling_async.telemetry.events",
        "xiling_async.webhooks.receiver",
    }
    canaries = {KEY, SECRET, PASSWORD, SIGNATURE, *tokens, *links}
    assert len(leaks(iter([ECHO, *tokens]), canaries)) == 1 + 1 + len(tokens)  # the search does find them
    assert leaks(seen.texts(), canaries) == []
    assert leaks(seen.pickles(), canaries) == []
    rows = b"".join(file.read_bytes() for file in tmp_path.glob("jobs.db*"))
    assert SIGNATURE.encode() in rows  # a request and a result are kept to be of use
    assert leaks(iter([rows]), {KEY, SECRET, PASSWORD, *tokens}) == []


async def test_what_holds_a_secret_is_not_pickled_with_it(tmp_path: Path) -> None:
    """A client, a receiver, a store: they cannot be pickled, or without what is secret."""
    dsn = f"postgresql://me:{PASSWORD}@127.0.0.1:1/jobs"
    receiver = WebhookReceiver(port=0, secret=SECRET)
    client = Client(KEY, base_url="http://127.0.0.1:1")
    for thing in (client, receiver, PostgresStore(dsn), SQLiteStore(tmp_path / "x")):
        with contextlib.suppress(TypeError, AttributeError, pickle.PicklingError):
            assert leaks(iter([pickle.dumps(thing)]), {KEY, SECRET, PASSWORD}) == []


async def test_the_good_outcomes_of_a_pickled_error_can_be_downloaded(tmp_path: Path) -> None:
    """The signature stays behind; the client asks for a new link, and the video comes."""
    async with Simulator() as sim, client_of(sim) as client:
        sim.script(faults.failed("no", [1]), faults.media_gone(403, new_url=True))
        with pytest.raises(TaskFailed) as caught:
            await (await client.submit(model_v(count=2)))
        held = pickle.dumps(caught.value)
        assert b"X-Goog-Signature" not in held
        good, bad = pickle.loads(held).outcomes
        assert (good, bad) == caught.value.outcomes
        path = await client.download(good.result, tmp_path / "good.mp4", allow_private=True)
        assert path.stat().st_size > 0
        assert len(sim.ledger.gets) == 1


async def test_no_canary_is_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor in anything else that `xiling batch` leaves beside it, or prints: good rows, refused ones, failed ones."""
    monkeypatch.chdir(tmp_path)
    row = {
        "model": "V", "prompt": "waves", "image_url": SIGNED, "aspect_ratio": "16:9", "aspect_resolution": "720p",
        "duration": 4,
    }  # fmt: skip
    Path("jobs.jsonl").write_text("".join(json.dumps({**row, "prompt": f"scene {n}"}) + "\n" for n in range(4)))
    async with Simulator(KEY) as sim:
        sim.script()
        sim.script(faults.business_error(100006, f"not reachable: {ECHO}", http=400))
        sim.script(faults.failed(f"could not read {SIGNED}"))
        sim.script(faults.media_gone())
        done = await xiling(sim, "batch", "jobs.jsonl", "--out", "out", "--port", "0", XILING_WEBHOOK_SECRET=SECRET)
        tokens = {token_of(post.callback_url) for post in sim.ledger.posts if post.callback_url}
    written = {path.name: path.read_bytes() for path in Path("out").rglob("*") if path.suffix in (".html", ".jsonl")}
    assert any(name.endswith(".html") for name in written)
    assert len(tokens) == 4
    told = [done.out.encode(), done.err.encode(), *written.values()]
    assert b"scene 3" in b"".join(told)
    assert leaks(iter(told), {KEY, SECRET, SIGNATURE, "X-Goog-Signature=", *tokens}) == []
