# ruff: noqa: N801 - a fault is written in lower case, in scripts as in directives
"""The fault vocabulary of result files: what can go wrong with a download.

They apply to the tasks of the create whose script has them, and requests are counted for each file (the video, the
thumbnail) separately. Among those that replace a file the order is `media_redirect`, `media_gone`, `media_status`.
"""

import attrs
from attrs.validators import ge, gt, optional

from xiling_async.simulator.media import files
from xiling_async.simulator.scripts import Fault


class MediaFault(Fault):
    """A fault of result files."""

    used_by = ("creates", "media")


# --- an answer that is not a file --------------------------------------------------------------------------


def _times(default: int | None) -> int | None:
    """How many requests are affected; None: all of them."""
    value: int | None = attrs.field(default=default, validator=optional(ge(0)))
    return value


@attrs.frozen
class media_redirect(MediaFault):
    """A redirect to `location`; without one, `times` redirects to the file itself, then the file.

    The latter count `hop` in their query: each request for the published URL starts at the first hop.
    """

    location: str | None = None
    times: int = attrs.field(default=1, validator=ge(0), kw_only=True)
    code: int = attrs.field(default=302, kw_only=True)


@attrs.frozen
class media_gone(MediaFault):
    """The URL always answers this HTTP status; with `new_url` the next status GET returns a URL that works."""

    code: int = 404
    new_url: bool = attrs.field(default=False, kw_only=True)


@attrs.frozen(init=False)
class media_status(MediaFault):
    """The first requests are answered with these HTTP statuses; 0 cuts the connection."""

    codes: tuple[int, ...]
    retry_after: float | str | None

    def __init__(self, *codes: int, retry_after: float | str | None = None) -> None:
        self.__attrs_init__(codes, retry_after)


# --- the connection ----------------------------------------------------------------------------------------


@attrs.frozen
class cut_media(MediaFault):
    """The connection is cut after `after_bytes` of the body, for the first `times` requests (None: for all)."""

    after_bytes: int = attrs.field(validator=ge(0))
    times: int | None = _times(1)


@attrs.frozen
class stalled_media(MediaFault):
    """The body stops after `after_bytes` without an end, for the first `times` requests (None: for all)."""

    after_bytes: int = attrs.field(validator=ge(0))
    times: int | None = _times(1)


@attrs.frozen
class slow_media(MediaFault):
    """The body is sent in pieces of `chunk` bytes, with `seconds` between them."""

    chunk: int = attrs.field(validator=gt(0))
    seconds: float = attrs.field(validator=ge(0))


# --- headers -----------------------------------------------------------------------------------------------


class no_ranges(MediaFault):
    """`Range` is ignored: 200 and the whole file."""


@attrs.frozen
class wrong_hash(MediaFault):
    """The digests are those of other bytes, for the first `times` requests (None: for all)."""

    times: int | None = _times(None)


@attrs.frozen(init=False)
class no_hash(MediaFault):
    """No digests; arguments ("md5", "crc32c") limit this to the named ones."""

    which: tuple[str, ...]

    def __init__(self, *which: str) -> None:
        self.__attrs_init__(which)


class no_etag(MediaFault):
    """No ETag; an `If-Range` never matches."""


@attrs.frozen
class wrong_length(MediaFault):
    """`Content-Length` is off by `delta`: more is declared than is sent (then the connection is cut), or less.

    The bytes beyond a length that is too small are sent as well, and a client may take them for a broken answer to
    its next request; with `excess=False` they are not: the file ends early, and its length looks right.
    """

    delta: int
    excess: bool = attrs.field(default=True, kw_only=True)


class no_length(MediaFault):
    """No `Content-Length`: the body is chunked."""


# --- the contents ------------------------------------------------------------------------------------------


@attrs.frozen
class changing_media(MediaFault):
    """The end of the file and its ETag change with each request, `times` times (None: always). Same length."""

    times: int | None = _times(None)


class gzip_media(MediaFault):
    """`Content-Encoding: gzip` without being asked; ranges are of the packed bytes, digests of the plain ones."""


@attrs.frozen
class big_media(MediaFault):
    """The video is a generated body of `size` bytes, always the same, with an md5 if `hashed`.

    The md5 is computed when the fault is made: 1 GiB takes a second or two.
    """

    size: int = attrs.field(validator=ge(0))
    hashed: bool = attrs.field(default=True, kw_only=True)
    content: files.Content = attrs.field(init=False, eq=False, repr=False)

    @content.default
    def _content(self) -> files.Content:
        return files.big(self.size, hashed=self.hashed)


@attrs.frozen
class media_bytes(MediaFault):
    """The video is these bytes."""

    data: bytes = attrs.field(repr=False)

    @property
    def content(self) -> files.Content:
        return files.of_bytes(self.data)
