"""Traces and metrics through the OpenTelemetry API, as a listener to events: `Client(on_event=OpenTelemetry())`.

One trace for each job, in all processes: a job id is 32 hex digits, and so is a trace id, so the job's id *is* its
trace's id. A callback that another process takes, hours later, knows the job from its own URL; it is in the trace of
its submit without anything kept or sent. Search your tracing tool for the id that the logs and errors show.

| span              | kind     | in                                                              |
| ----------------- | -------- | --------------------------------------------------------------- |
| `xiling.submit`   | producer | the job's trace; linked to the span that was current            |
| `xiling.callback` | consumer | the job's trace; linked to the span that was current, if any is |
| `xiling.poll`     | client   | the job's trace                                                 |
| `xiling.upload`   | client   | the current trace: an upload comes before its job, and serves several |
| `xiling.download` | client   | the current trace                                               |

The span that was current gets a link to the job's trace in turn. The root of a job's trace is its id alone: no span is
exported for it.

| metric                   | what                                                            |
| ------------------------ | --------------------------------------------------------------- |
| `xiling.jobs`            | jobs that came into a state, by `xiling.job.state`, `xiling.kind` |
| `xiling.job.duration`    | seconds from the intent to the end, by the state of the end     |
| `xiling.tasks`           | tasks whose outcome is known, by `xiling.outcome`, `xiling.kind` |
| `xiling.submits`         | paid POSTs, by `xiling.result`                                  |
| `xiling.callbacks`       | callbacks that were taken, by `xiling.result`                   |
| `xiling.callbacks.refused` | by `xiling.reason`                                            |
| `xiling.gets`            | status GETs, by `xiling.result`                                 |
| `xiling.handovers`       | ended jobs, by `xiling.result`: `handed_over`, `again`, `acknowledged` |
| `xiling.retries`         | of `submit`, `upload`, `download`, by `xiling.operation`        |
| `xiling.operation.duration` | seconds of each span, by `xiling.operation`, `error.type`    |

The metadata of a job is on its `xiling.submit`, as `xiling.metadata.<name>`. How many are uncertain is `xiling.jobs`
with the state `uncertain`. A callback that is refused is counted and makes no span: anyone can send one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

try:
    from opentelemetry import metrics, trace
    from opentelemetry.context import Context
    from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags
    from opentelemetry.util.types import Attributes
except ImportError as missing:
    raise ImportError(
        "xiling_async.telemetry.otel needs the OpenTelemetry API: pip install 'xiling-async[otel]'"
    ) from missing

from xiling_async.telemetry.events import (
    CallbackRefused,
    CallbackTaken,
    Downloaded,
    Event,
    JobAcknowledged,
    JobChanged,
    JobHandedOver,
    Polled,
    Submitted,
    TaskEnded,
    Uploaded,
)

SCOPE: Final = "xiling_async"
# Seconds: a video takes minutes; results are looked for up to 7 days.
JOB_BUCKETS_S: Final = (5, 15, 30, 60, 90, 120, 180, 240, 300, 450, 600, 900, 1800, 3600, 14400, 86400, 604800)
_RATIO_BITS: Final = 64


class OpenTelemetry:
    """A hook for `Client(on_event=...)`; several clients may share one.

    `tracer_provider`, `meter_provider`: else the global ones. `ratio`: which part of the jobs is marked as sampled, the
    same jobs in every process; your sampler has the last word. Without an SDK nothing is done, as everywhere.
    """

    def __init__(
        self,
        *,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
        ratio: float = 1.0,
    ) -> None:
        self._bound = round(ratio * 2**_RATIO_BITS)
        self._tracer = trace.get_tracer(SCOPE, tracer_provider=tracer_provider)
        meter = metrics.get_meter(SCOPE, meter_provider=meter_provider)
        self._jobs = meter.create_counter("xiling.jobs", "{job}", "Jobs that came into a state.")
        self._tasks = meter.create_counter("xiling.tasks", "{task}", "Tasks whose outcome is known.")
        self._submits = meter.create_counter("xiling.submits", "{request}", "Paid POSTs that came to their end.")
        self._callbacks = meter.create_counter("xiling.callbacks", "{callback}", "Callbacks that were answered 200.")
        self._refused = meter.create_counter("xiling.callbacks.refused", "{callback}", "Callbacks that were refused.")
        self._gets = meter.create_counter("xiling.gets", "{request}", "Status GETs.")
        self._handovers = meter.create_counter("xiling.handovers", "{job}", "Ended jobs, given and acknowledged.")
        self._retries = meter.create_counter("xiling.retries", "{request}", "What was sent again.")
        self._job_duration = meter.create_histogram(
            "xiling.job.duration", "s", "From the intent to the end of a job.",
            explicit_bucket_boundaries_advisory=JOB_BUCKETS_S,
        )  # fmt: skip
        self._duration = meter.create_histogram("xiling.operation.duration", "s", "How long an exchange took.")

    def __call__(self, event: Event) -> None:
        match event:
            case JobChanged():
                self._job_changed(event)
            case TaskEnded():
                self._tasks.add(1, {"xiling.outcome": event.outcome, "xiling.kind": event.kind})
            case Submitted():
                self._submitted(event)
            case CallbackTaken():
                self._callback_accepted(event)
            case CallbackRefused():
                self._refused.add(1, {"xiling.reason": event.reason})
            case Polled():
                self._polled(event)
            case JobHandedOver():
                result = "again" if event.is_again else "handed_over"
                self._handovers.add(1, {"xiling.result": result, "xiling.kind": event.kind})
            case JobAcknowledged():
                self._handovers.add(1, {"xiling.result": "acknowledged", "xiling.kind": event.kind})
            case Uploaded():
                self._count_retries("upload", event.tries - 1)
                self._span("upload", event, {"xiling.size": event.size_bytes, "xiling.tries": event.tries})
            case Downloaded():
                self._count_retries("download", event.tries - 1)
                attributes: Attributes = {
                    "xiling.task.id": event.task_id,
                    "xiling.what": event.what,
                    "xiling.tries": event.tries,
                }
                self._span("download", event, attributes)

    def _job_changed(self, event: JobChanged) -> None:
        attributes = {"xiling.job.state": event.state.value, "xiling.kind": event.kind}
        self._jobs.add(1, attributes)
        if event.state.is_final:
            self._job_duration.record(event.at - event.created_at, attributes)

    def _submitted(self, event: Submitted) -> None:
        self._submits.add(1, {"xiling.result": event.result, "xiling.kind": event.kind})
        self._count_retries("submit", event.attempt > 1)
        attributes: Attributes = {
            "xiling.job.id": event.job_id,
            "xiling.kind": event.kind,
            "xiling.attempt": event.attempt,
            "xiling.result": event.result,
            "xiling.task.ids": event.task_ids,
            **{f"xiling.metadata.{name}": value for name, value in event.metadata.items()},
        }
        self._span("submit", event, attributes, SpanKind.PRODUCER, job_id=event.job_id, is_linked=True)

    def _callback_accepted(self, event: CallbackTaken) -> None:
        self._callbacks.add(1, {"xiling.result": event.result})
        attributes: Attributes = {
            "xiling.job.id": event.job_id,
            "xiling.task.id": event.task_id,
            "xiling.attempt": event.attempt,
            "xiling.result": event.result,
            "xiling.outcome": event.outcome or "progress",
        }
        self._span("callback", event, attributes, SpanKind.CONSUMER, job_id=event.job_id, is_linked=True)

    def _polled(self, event: Polled) -> None:
        self._gets.add(1, {"xiling.result": event.result})
        attributes = {"xiling.task.id": event.task_id, "xiling.result": event.result}
        if event.job_id is not None:
            attributes["xiling.job.id"] = event.job_id
        self._span("poll", event, attributes, job_id=event.job_id)

    def _count_retries(self, operation: str, times: int) -> None:
        if times > 0:
            self._retries.add(times, {"xiling.operation": operation})

    def _span(
        self,
        operation: str,
        event: Submitted | CallbackTaken | Polled | Uploaded | Downloaded,
        attributes: Attributes,
        kind: SpanKind = SpanKind.CLIENT,
        *,
        job_id: str | None = None,
        is_linked: bool = False,
    ) -> None:
        """A span of what is over: with the times of the event."""
        error = None if isinstance(event, CallbackTaken) else event.error
        measured = {"xiling.operation": operation} | ({} if error is None else {"error.type": error})
        self._duration.record(event.at - event.began_at, measured)
        parent, links = self._context(job_id, is_linked=is_linked)
        span = self._tracer.start_span(
            f"xiling.{operation}", parent, kind, attributes, links, start_time=_nanoseconds(event.began_at)
        )
        if error is not None:
            span.set_attribute("error.type", error)
            span.set_status(Status(StatusCode.ERROR, error))
        span.end(_nanoseconds(event.at))

    def _context(self, job_id: str | None, *, is_linked: bool) -> tuple[Context | None, Sequence[Link]]:
        """The context of the job's trace, and the link to where we are; the other way round the link is set here."""
        job = None if job_id is None else self._trace_root(job_id)
        if job is None:
            return None, ()
        parent = trace.set_span_in_context(NonRecordingSpan(job), Context())
        here = trace.get_current_span()
        if not is_linked or not here.get_span_context().is_valid:
            return parent, ()
        if here.is_recording():
            here.add_link(job)
        return parent, (Link(here.get_span_context()),)

    def _trace_root(self, job_id: str) -> SpanContext | None:
        """The root of a job's trace: the same one wherever it is computed."""
        try:
            number = int(job_id, 16)
        except ValueError:
            return None
        is_sampled = number & (2**_RATIO_BITS - 1) < self._bound
        flags = TraceFlags(TraceFlags.SAMPLED if is_sampled else TraceFlags.DEFAULT)
        root = SpanContext(number, number >> _RATIO_BITS, is_remote=True, trace_flags=flags)
        return root if root.is_valid else None


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1_000_000_000)
