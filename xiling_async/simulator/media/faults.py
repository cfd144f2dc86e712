"""The fault vocabulary of result files: what can go wrong with a download.

They belong to the tasks of the create they are given to, and to each file of such a task (the video, the thumbnail)
by itself: "the first requests" are counted for each file. Of those that answer instead of the file the order is:
`media_redirect`, `media_gone`, `media_status`.
"""

import attrs
from attrs.validators import ge, gt, optional

from xiling_async.simulator.fault import Fault
from xiling_async.simulator.media import files

# Above this the digest of a generated body takes longer than a request should wait for it.
HASHED_BY_DIRECTIVE_BYTES = 64 * 1024 * 1024


@attrs.frozen
class MediaFault(Fault):
    """Something that goes wrong with result files."""


def _times(default: int | None) -> int | None:
    """How many requests it befalls; None: all of them."""
    value: int | None = attrs.field(default=default, validator=optional(ge(0)))
    return value


# --- an answer that is not a file ----------------------------------------------------------------------------


@attrs.frozen
class MediaRedirect(MediaFault):
    """A redirect to `location`; without one, `times` redirects on the file itself, then the file.

    The latter have `hop` in their query: each request for the URL that was given out begins again.
    """

    location: str | None = None
    times: int = attrs.field(default=1, validator=ge(0), kw_only=True)
    code: int = attrs.field(default=302, kw_only=True)


@attrs.frozen
class MediaGone(MediaFault):
    """This HTTP status at that URL for ever; with `fresh_url` a status GET after a refusal gives a URL that works."""

    code: int = 404
    fresh_url: bool = attrs.field(default=False, kw_only=True)


@attrs.frozen
class MediaStatus(MediaFault):
    """The first requests are answered with these HTTP statuses; 0 cuts the connection."""

    codes: tuple[int, ...]
    retry_after: float | str | None = None


# --- the connection ----------------------------------------------------------------------------------------


@attrs.frozen
class CutMedia(MediaFault):
    """The connection is cut after so many bytes of the body, for the first `times` requests (None: for all)."""

    after_bytes: int = attrs.field(validator=ge(0))
    times: int | None = _times(1)


@attrs.frozen
class StalledMedia(MediaFault):
    """After so many bytes of the body nothing more comes, for the first `times` requests (None: for all)."""

    after_bytes: int = attrs.field(validator=ge(0))
    times: int | None = _times(1)


@attrs.frozen
class SlowMedia(MediaFault):
    """The body comes in pieces of `chunk` bytes, with so many seconds between them."""

    chunk: int = attrs.field(validator=gt(0))
    seconds: float = attrs.field(validator=ge(0))


# --- what is said about the file ---------------------------------------------------------------------------


@attrs.frozen
class NoRanges(MediaFault):
    """`Range` is ignored: 200 and the whole file."""


@attrs.frozen
class WrongHash(MediaFault):
    """The digests are those of other bytes, for the first `times` requests (None: for all)."""

    times: int | None = _times(None)


@attrs.frozen
class NoHash(MediaFault):
    """No digests; with `which` ("md5", "crc32c") those are left out and the others stay."""

    which: tuple[str, ...] = ()


@attrs.frozen
class NoEtag(MediaFault):
    """No ETag; an `If-Range` never fits."""


@attrs.frozen
class WrongLength(MediaFault):
    """`Content-Length` is off by `delta`: more is declared than is sent (then the connection is cut), or less.

    Of a file that is longer than declared the rest is sent as well, and a client may take it for a broken answer
    to its next request; with `excess=False` it is not: the file ends early, and its length looks right.
    """

    delta: int
    excess: bool = attrs.field(default=True, kw_only=True)


@attrs.frozen
class NoLength(MediaFault):
    """No `Content-Length`: the body is chunked."""


# --- the file itself ---------------------------------------------------------------------------------------


@attrs.frozen
class ChangingMedia(MediaFault):
    """The end of the file and its ETag change with each request, `times` times in all (None: always). Same length."""

    times: int | None = _times(None)


@attrs.frozen
class GzipMedia(MediaFault):
    """`Content-Encoding: gzip` unasked; ranges are of the packed bytes, digests of the plain ones."""


@attrs.frozen
class BigMedia(MediaFault):
    """The video is a generated body of this size: always the same bytes, with an md5 if `hashed`."""

    size: int = attrs.field(validator=ge(0))
    hashed: bool = attrs.field(default=True, kw_only=True)

    @property
    def content(self) -> files.Content:
        return files.big(self.size, hashed=self.hashed)


@attrs.frozen
class MediaBytes(MediaFault):
    """The video is these bytes."""

    data: bytes = attrs.field(repr=False)

    @property
    def content(self) -> files.Content:
        return files.of_bytes(self.data)


def media_status(*codes: int, retry_after: float | str | None = None) -> MediaStatus:
    """Answer the first requests for each file with these HTTP statuses; 0 cuts the connection."""
    return MediaStatus(codes, retry_after)


def no_hash(*which: str) -> NoHash:
    """Leave out the digests, or those that are named: "md5", "crc32c"."""
    return NoHash(which)


def big_media(size: int, *, hashed: bool = True) -> BigMedia:
    """Make the video a generated body of this size. The md5 is worked out here, once (1 GiB takes a second or two)."""
    files.big(size, hashed=hashed)
    return BigMedia(size, hashed=hashed)


# The words of the vocabulary, as scripts write them.
changing_media = ChangingMedia
cut_media = CutMedia
gzip_media = GzipMedia
media_bytes = MediaBytes
media_gone = MediaGone
media_redirect = MediaRedirect
no_etag = NoEtag
no_length = NoLength
no_ranges = NoRanges
slow_media = SlowMedia
stalled_media = StalledMedia
wrong_hash = WrongHash
wrong_length = WrongLength
