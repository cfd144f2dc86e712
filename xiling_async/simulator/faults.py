"""The fault vocabulary: what can go wrong with one create and its tasks, as plain frozen values.

Several faults may be given to one create. Of those that decide the answer the first one counts, and those
that refuse come before those that accept. Uploads know those of the connection and the answer; what goes wrong
with result files is in `media_faults`, and is given to a create as well.
"""

from collections.abc import Iterable

import attrs

from xiling_async.simulator.fault import Fault, find
from xiling_async.simulator.media.faults import (
    big_media,
    changing_media,
    cut_media,
    gzip_media,
    media_bytes,
    media_gone,
    media_redirect,
    media_status,
    no_etag,
    no_hash,
    no_length,
    no_ranges,
    slow_media,
    stalled_media,
    wrong_hash,
    wrong_length,
)

__all__ = [
    "Fault",
    "answer_data",
    "big_media",
    "business_error",
    "callback_fields",
    "callback_retry",
    "changing_media",
    "cut_media",
    "drop_after_accept",
    "drop_before_read",
    "drop_mid_answer",
    "duplicate_callback",
    "early_callback",
    "failed",
    "find",
    "garbage",
    "gzip_media",
    "hang",
    "hang_before_accept",
    "ids",
    "latency",
    "lost_callback",
    "media_bytes",
    "media_gone",
    "media_redirect",
    "media_status",
    "no_etag",
    "no_hash",
    "no_length",
    "no_ranges",
    "no_status_endpoint",
    "out_of_order",
    "progress_callback",
    "rate_limited",
    "raw_callback",
    "redirect",
    "slow_media",
    "stalled_media",
    "status",
    "status_fault",
    "upload_answer",
    "wrong_hash",
    "wrong_length",
]


# --- the connection and the answer, nothing charged --------------------------------------------------------


@attrs.frozen
class DropBeforeRead(Fault):
    """The connection is cut before the body is read."""


@attrs.frozen
class HangBeforeAccept(Fault):
    """The body is read, nothing is created, no answer ever comes."""


@attrs.frozen
class RateLimited(Fault):
    """HTTP 429, with `Retry-After` (seconds or an HTTP date) when given."""

    retry_after: float | str | None = None


@attrs.frozen
class Redirect(Fault):
    """The answer points elsewhere."""

    location: str
    code: int = 307


@attrs.frozen
class BusinessError(Fault):
    """The error envelope with this business code, under this HTTP status."""

    code: int
    msg: str
    http: int = 200


@attrs.frozen
class Status(Fault):
    """This HTTP status; with `accept` the job was created and charged all the same.

    `body` replaces the error envelope, whose code is `business_code`, else the HTTP status itself.
    """

    code: int
    accept: bool = False
    business_code: int | None = None
    retry_after: float | str | None = None
    body: bytes | None = None


@attrs.frozen
class Garbage(Fault):
    """HTTP 200 with a body that is not an envelope."""

    body: bytes = b"<html><body>It works!</body></html>"
    accept: bool = True
    content_type: str = "text/html"


# --- the connection and the answer, charged ----------------------------------------------------------------


@attrs.frozen
class DropAfterAccept(Fault):
    """Accepted and charged; the connection is cut with no answer."""


@attrs.frozen
class DropMidAnswer(Fault):
    """Accepted and charged; the answer breaks off after half its body."""


@attrs.frozen
class Hang(Fault):
    """Accepted and charged; no answer. The connection is cut after `seconds`, or stays open (None)."""

    seconds: float | None = None


@attrs.frozen
class Ids(Fault):
    """So many tasks are made, and so many ids answered, whatever was asked."""

    n: int


@attrs.frozen
class AnswerData(Fault):
    """Accepted and charged; `data` of the answer is this value verbatim."""

    value: object


@attrs.frozen
class UploadAnswer(Fault):
    """The upload is stored; the answer is HTTP 200 with this value as its JSON, verbatim."""

    value: object


# --- the generation ----------------------------------------------------------------------------------------


@attrs.frozen
class Latency(Fault):
    """The generation of this job takes so many seconds."""

    seconds: float


def _indexes(which: Iterable[int] | None) -> tuple[int, ...] | None:
    return None if which is None else tuple(which)


@attrs.frozen
class Failed(Fault):
    """Tasks end FAILED: those at the indexes `which`, or all of them (None)."""

    message: str = "Generation failed"
    which: tuple[int, ...] | None = attrs.field(default=None, converter=_indexes)


# --- the callback ------------------------------------------------------------------------------------------


@attrs.frozen
class EarlyCallback(Fault):
    """The callbacks are sent and answered before the answer of the create itself is written."""


@attrs.frozen
class DuplicateCallback(Fault):
    """Each callback is sent so many times in total."""

    times: int = 2


@attrs.frozen
class LostCallback(Fault):
    """No callback is sent; the status endpoint knows the end."""


@attrs.frozen
class OutOfOrder(Fault):
    """The last task is reported first, and each end is followed by a stale report of progress."""


@attrs.frozen
class ProgressCallback(Fault):
    """A report of progress precedes the end."""


@attrs.frozen
class RawCallback(Fault):
    """The body of each callback is replaced by these bytes."""

    body: bytes


@attrs.frozen
class CallbackFields(Fault):
    """These fields are merged into `data` of each callback."""

    changes: dict[str, object]


@attrs.frozen
class CallbackRetry(Fault):
    """A callback that is not answered 2xx is repeated, at most so many times after the first."""

    times: int


# --- the status endpoint -----------------------------------------------------------------------------------


@attrs.frozen
class NoStatusEndpoint(Fault):
    """The status endpoint says that it does not know the tasks."""


@attrs.frozen
class StatusFault(Fault):
    """The first GETs of each task are answered with these HTTP statuses; 0 cuts the connection."""

    codes: tuple[int, ...]


def callback_fields(**changes: object) -> CallbackFields:
    """Merge these fields into `data` of each callback."""
    return CallbackFields(changes)


def status_fault(*codes: int) -> StatusFault:
    """Answer the first GETs of each task with these HTTP statuses; 0 cuts the connection."""
    return StatusFault(codes)


# The words of the vocabulary, as scripts write them.
answer_data = AnswerData
business_error = BusinessError
callback_retry = CallbackRetry
drop_after_accept = DropAfterAccept
drop_before_read = DropBeforeRead
drop_mid_answer = DropMidAnswer
duplicate_callback = DuplicateCallback
early_callback = EarlyCallback
failed = Failed
garbage = Garbage
hang = Hang
hang_before_accept = HangBeforeAccept
ids = Ids
latency = Latency
lost_callback = LostCallback
no_status_endpoint = NoStatusEndpoint
out_of_order = OutOfOrder
progress_callback = ProgressCallback
rate_limited = RateLimited
raw_callback = RawCallback
redirect = Redirect
status = Status
upload_answer = UploadAnswer
