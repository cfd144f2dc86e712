"""OpenTelemetry, through its SDK's in-memory exporters: one trace for each job in all processes, and the metrics."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from support import client_of, model_v, plain_session, post

from xiling_async import SQLiteStore, WebhookReceiver, simulator
from xiling_async.models.record import State
from xiling_async.simulator import Simulator, faults
from xiling_async.telemetry.events import JobChanged, Polled
from xiling_async.telemetry.otel import OpenTelemetry
from xiling_async.testing.clock import SkippingClock

PICTURE = Path(simulator.__file__).with_name("media") / "samples" / "landscape.webp"


class Telemetry:
    """A hook with an SDK of its own, as each process has one."""

    def __init__(self, ratio: float = 1.0) -> None:
        self._spans = InMemorySpanExporter()
        self._metrics = InMemoryMetricReader()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self._spans))
        self._meters = MeterProvider([self._metrics])
        self.hook = OpenTelemetry(tracer_provider=self.tracers, meter_provider=self._meters, ratio=ratio)

    def spans(self, name: str = "") -> list[ReadableSpan]:
        return [span for span in self._spans.get_finished_spans() if span.name.startswith(f"xiling.{name}")]

    def metrics(self) -> dict[str, dict[tuple[Any, ...], float]]:
        """Name to attribute values to number (of a histogram: to the sum)."""
        data = self._metrics.get_metrics_data()
        found: dict[str, dict[tuple[Any, ...], float]] = {}
        for metric in data.resource_metrics[0].scope_metrics[0].metrics if data else ():
            for point in metric.data.data_points:
                key = tuple(value for _, value in sorted((point.attributes or {}).items()))
                number = point.sum if isinstance(point, HistogramDataPoint) else point.value  # type: ignore[union-attr]
                found.setdefault(metric.name, {})[key] = number
        return found

    def end(self) -> None:
        self.tracers.shutdown()
        self._meters.shutdown()


@pytest.fixture
def process() -> Iterator[Callable[..., Telemetry]]:
    """Makes the telemetry of one more process."""
    made: list[Telemetry] = []

    def make(ratio: float = 1.0) -> Telemetry:
        made.append(Telemetry(ratio))
        return made[-1]

    yield make
    for telemetry in made:
        telemetry.end()


Make = Callable[..., Telemetry]


def trace_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.trace_id:032x}"


async def test_submit_and_callback_are_one_trace(sim: Simulator, process: Make) -> None:
    """Its id is the job's id; the span that was current links there, and the submit links back."""
    telemetry = process()
    tracer = telemetry.tracers.get_tracer("the user's own")
    async with client_of(sim, on_event=telemetry.hook) as client:
        with tracer.start_as_current_span("an order") as order:
            job = await client.submit(model_v(), key="order-42")
        await job
    (submit,), (callback,) = telemetry.spans("submit"), telemetry.spans("callback")
    assert trace_of(submit) == trace_of(callback) == job.id
    assert submit.parent is not None and callback.parent is not None
    assert submit.parent.span_id == callback.parent.span_id
    assert [link.context for link in submit.links] == [order.get_span_context()]
    assert [f"{link.context.trace_id:032x}" for link in order.links] == [job.id]  # type: ignore[attr-defined]
    assert (submit.kind, callback.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER)
    assert dict(submit.attributes or {}) == {
        "xiling.job.id": job.id, "xiling.kind": "image_to_video", "xiling.attempt": 1, "xiling.result": "accepted",
        "xiling.task.ids": job.task_ids,
    }  # fmt: skip
    assert submit.start_time is not None and submit.end_time is not None and callback.start_time is not None
    assert submit.start_time <= submit.end_time <= callback.start_time


async def test_the_callback_of_another_process_is_in_the_trace_of_its_submit(
    sim: Simulator, process: Make, tmp_path: Path
) -> None:
    """The process that submitted is gone; the next one takes the callback from the same store."""
    sim.manual = True
    before, after = process(), process()
    public_url, path = "http://127.0.0.1:9/xiling", tmp_path / "jobs.db"
    receiver = WebhookReceiver(public_url)
    async with client_of(sim, receiver=receiver, store=SQLiteStore(path), on_event=before.hook) as client:
        job = await client.submit(model_v())
    receiver = WebhookReceiver(public_url)
    async with client_of(sim, receiver=receiver, store=SQLiteStore(path), on_event=after.hook):
        url = sim.ledger.posts[0].callback_url
        assert url is not None
        body = b'{"code": 0, "msg": "ok", "data": {"task_id": "%s", "status": "FAILED"}}' % job.task_ids[0].encode()
        assert (await receiver.handle(url, body)).status == 200
    (submit,), (callback,) = before.spans(), after.spans("callback")  # the second process may ask, too
    assert submit.name == "xiling.submit"
    assert trace_of(submit) == trace_of(callback) == job.id
    assert (submit.parent, callback.parent) == (callback.parent, submit.parent)


async def test_polls_uploads_and_downloads_have_spans(sim: Simulator, process: Make, tmp_path: Path) -> None:
    """A poll is in its job's trace; transfers are in the current one. What fails says so."""
    telemetry = process()
    tracer = telemetry.tracers.get_tracer("the user's own")
    sim.script(faults.lost_callback(), faults.status_fault(500))
    async with client_of(sim, on_event=telemetry.hook, clock=SkippingClock()) as client:
        with tracer.start_as_current_span("an order") as order:
            await client.upload(PICTURE)
            job = await client.submit(model_v())
            (video,) = await job
            await client.download(video, tmp_path / "a.mp4", allow_private=True)
    failed, good = telemetry.spans("poll")
    assert trace_of(failed) == trace_of(good) == job.id
    assert (failed.status.status_code, good.status.status_code) == (StatusCode.ERROR, StatusCode.UNSET)
    assert (failed.attributes or {})["error.type"] == "ServiceUnavailable"
    (upload,), (download,) = telemetry.spans("upload"), telemetry.spans("download")
    for span in (upload, download):
        assert span.context is not None
        assert span.context.trace_id == order.get_span_context().trace_id
        assert span.kind is SpanKind.CLIENT
    assert (download.attributes or {})["xiling.task.id"] == video.task_id


async def test_the_metrics_are_those_of_the_ledger(sim: Simulator, process: Make) -> None:
    """Jobs by state, time to done, refused callbacks by reason, GETs, uncertain, retries."""
    telemetry = process()
    clock = SkippingClock()
    async with client_of(sim, on_event=telemetry.hook, clock=clock) as client, plain_session() as session:
        sim.script(faults.rate_limited(retry_after=30))
        await (await client.submit(model_v()))
        sim.script(faults.lost_callback())
        await (await client.submit(model_v("sand")))
        url = sim.ledger.posts[0].callback_url or ""
        assert await post(session, f"{url.rpartition('/')[0]}/{'A' * 80}", b"{}") == 404
    told = telemetry.metrics()
    states = told["xiling.jobs"]
    assert states["done", "image_to_video"] == 2
    assert states["rejected", "image_to_video"] == 1
    assert told["xiling.retries"] == {("submit",): 1}
    assert told["xiling.gets"] == {("succeeded",): len(sim.ledger.gets)}
    assert told["xiling.callbacks.refused"] == {("not_found",): 1}
    assert told["xiling.callbacks"] == {("applied",): 1}
    assert told["xiling.submits"] == {("image_to_video", "accepted"): 2, ("image_to_video", "rejected"): 1}
    assert told["xiling.job.duration"]["done", "image_to_video"] > 30 + 270
    assert set(told["xiling.operation.duration"]) == {("submit",), ("RateLimited", "submit"), ("callback",), ("poll",)}


async def test_metadata_and_hand_overs_are_shown(sim: Simulator, process: Make) -> None:
    """The metadata on the span of the submit; what was given to consumers, given again and acknowledged."""
    telemetry, clock = process(), SkippingClock()
    async with client_of(sim, on_event=telemetry.hook, clock=clock) as client:
        await client.run(model_v(), metadata={"user": "42"})
        async with aclosing(client.completed(lease=60)) as jobs:
            await anext(jobs)
            await (await anext(jobs)).ack()
    (submit,) = telemetry.spans("submit")
    assert (submit.attributes or {})["xiling.metadata.user"] == "42"
    assert telemetry.metrics()["xiling.handovers"] == {
        ("image_to_video", "handed_over"): 1, ("image_to_video", "again"): 1, ("image_to_video", "acknowledged"): 1,
    }  # fmt: skip


async def test_an_uncertain_submit_is_counted_and_marked(sim: Simulator, process: Make) -> None:
    """The span of a POST of unknown fate is an error, and the state has a count to alert on."""
    telemetry = process()
    sim.manual = True
    sim.script(faults.drop_after_accept())
    async with client_of(sim, on_event=telemetry.hook) as client:
        await client.submit(model_v())
    (submit,) = telemetry.spans("submit")
    assert (submit.status.status_code, submit.status.description) == (StatusCode.ERROR, "SubmitUncertain")
    assert telemetry.metrics()["xiling.jobs"]["uncertain", "image_to_video"] == 1


def test_the_same_jobs_are_sampled_everywhere(process: Make) -> None:
    """`ratio` goes by the job's id alone, so that no trace is cut in half."""
    here, there, nowhere = process(0.5), process(0.5), process(0.0)
    ids = [f"{number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}" for number in range(1, 201)]
    for hook in (here.hook, there.hook, nowhere.hook):
        for job_id in ids:
            hook(Polled(job_id=job_id, task_id="t", result="running", error=None, began_at=1.0, at=2.0))
    sampled = [trace_of(span) for span in here.spans()]
    assert sampled == [trace_of(span) for span in there.spans()]
    assert 60 < len(sampled) < 140
    assert nowhere.spans() == []
    assert nowhere.metrics()["xiling.gets"] == {("running",): 200}


def test_an_id_that_is_no_trace_id_hurts_nobody(process: Make) -> None:
    """A store of somebody's own may name jobs as it likes: the span is there, in no job's trace."""
    telemetry = process()
    for job_id in ("a name", "0" * 32, "f" * 40):
        telemetry.hook(Polled(job_id=job_id, task_id="t", result="running", error=None, began_at=1.0, at=2.0))
    assert len(telemetry.spans()) == 3
    assert all(span.parent is None for span in telemetry.spans())


def test_without_an_sdk_nothing_happens() -> None:
    """The API alone does nothing, and breaks nothing."""
    OpenTelemetry()(
        JobChanged(
            job_id="ab" * 16, key=None, kind="image_to_video", state=State.DONE, was=State.ACCEPTED, task_ids=("t",),
            created_at=1.0, at=2.0,
        )
    )  # fmt: skip


def test_without_the_api_it_says_what_to_install() -> None:
    """`import xiling_async.telemetry.otel` without the extra names the extra."""
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "try: import xiling_async.telemetry.otel\n"
        "except ImportError as error: print(error)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True
    )
    assert "pip install 'xiling-async[otel]'" in ended.stdout
