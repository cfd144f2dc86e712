# ruff: noqa: I001, N801 - a fault is written in lower case, in scripts as in directives
"""The fault vocabulary: what can go wrong with creates, uploads, tasks and callbacks; result files: `media/faults.py`.

Several faults may be combined in one script. Among those that decide the answer the first one counts, and refusals
precede acceptances.
"""

from collections.abc import Iterable

import attrs

from xiling_async.simulator.scripts import Fault as Fault
from xiling_async.simulator.media.faults import (
    big_media as big_media,
    changing_media as changing_media,
    cut_media as cut_media,
    gzip_media as gzip_media,
    media_bytes as media_bytes,
    media_gone as media_gone,
    media_redirect as media_redirect,
    media_status as media_status,
    no_etag as no_etag,
    no_hash as no_hash,
    no_length as no_length,
    no_ranges as no_ranges,
    slow_media as slow_media,
    stalled_media as stalled_media,
    wrong_hash as wrong_hash,
    wrong_length as wrong_length,
)


class AnswerFault(Fault):
    """A fault of the connection or the answer, for creates and uploads."""

    used_by = ("creates", "uploads")


# --- the connection and the answer, not charged ------------------------------------------------------------


class drop_before_read(AnswerFault):
    """The connection is cut before the body is read."""


class hang_before_accept(AnswerFault):
    """The body is read, nothing is created, and no answer is sent."""


@attrs.frozen
class rate_limited(AnswerFault):
    """HTTP 429, with `Retry-After` (seconds or an HTTP date) if set."""

    retry_after: float | str | None = None


@attrs.frozen
class redirect(AnswerFault):
    """A redirect to `location`."""

    location: str
    code: int = 307


@attrs.frozen
class business_error(AnswerFault):
    """The error envelope with this business code, under this HTTP status."""

    code: int
    msg: str
    http: int = 200


@attrs.frozen
class status(AnswerFault):
    """This HTTP status; with `accept` the job is created and charged all the same.

    `body` replaces the error envelope, whose code is `business_code`, else the HTTP status itself.
    """

    code: int
    accept: bool = False
    business_code: int | None = None
    retry_after: float | str | None = None
    body: bytes | None = None


@attrs.frozen
class garbage(AnswerFault):
    """HTTP 200 with a body that is not an envelope; charged unless `accept` is False."""

    body: bytes = b"<html><body>It works!</body></html>"
    accept: bool = True
    content_type: str = "text/html"


# --- the connection and the answer, charged ----------------------------------------------------------------


class drop_after_accept(AnswerFault):
    """Accepted and charged; the connection is cut without an answer."""


class drop_mid_answer(AnswerFault):
    """Accepted and charged; the connection is cut after half of the answer's body."""


@attrs.frozen
class hang(AnswerFault):
    """Accepted and charged; no answer. The connection is cut after `seconds`, or stays open (None)."""

    seconds: float | None = None


@attrs.frozen
class ids(Fault):
    """Exactly `n` tasks are created and answered, whatever was ordered."""

    n: int


@attrs.frozen
class answer_data(Fault):
    """Accepted and charged; `data` of the answer is this value verbatim."""

    value: object


@attrs.frozen
class upload_answer(Fault):
    """The upload is stored; the answer is HTTP 200 with this value as its JSON, verbatim."""

    used_by = ("uploads",)

    value: object


# --- the generation ----------------------------------------------------------------------------------------


@attrs.frozen
class latency(Fault):
    """The generation takes this many seconds."""

    seconds: float


def _indexes(which: Iterable[int] | None) -> tuple[int, ...] | None:
    return None if which is None else tuple(which)


@attrs.frozen
class failed(Fault):
    """Tasks end FAILED: those at the indexes `which`, or all of them (None)."""

    message: str = "Generation failed"
    which: tuple[int, ...] | None = attrs.field(default=None, converter=_indexes)


# --- the callback ------------------------------------------------------------------------------------------


class early_callback(Fault):
    """The callbacks are sent and answered before the create is answered."""


@attrs.frozen
class duplicate_callback(Fault):
    """Each callback is sent `times` times in total."""

    times: int = 2


class lost_callback(Fault):
    """No callback is sent; the status endpoint reports the end."""


class out_of_order(Fault):
    """The last task is reported first, and a stale progress report follows each end."""


class progress_callback(Fault):
    """A progress report precedes the end."""


@attrs.frozen
class raw_callback(Fault):
    """The body of each callback is replaced by these bytes."""

    body: bytes


@attrs.frozen(init=False)
class callback_fields(Fault):
    """These fields are merged into `data` of each callback."""

    changes: dict[str, object]

    def __init__(self, **changes: object) -> None:
        self.__attrs_init__(changes)


@attrs.frozen
class callback_retry(Fault):
    """A callback that is not answered 2xx is repeated, at most `times` times after the first."""

    times: int


# --- the status endpoint -----------------------------------------------------------------------------------


class no_status_endpoint(Fault):
    """The status endpoint does not know the tasks."""


@attrs.frozen(init=False)
class status_fault(Fault):
    """The first GETs of each task are answered with these HTTP statuses; 0 cuts the connection."""

    codes: tuple[int, ...]

    def __init__(self, *codes: int) -> None:
        self.__attrs_init__(codes)
