"""The ledger: what the service received and charged, as append-only lists of frozen records."""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType

import attrs

TERMINAL = frozenset({"SUCCEEDED", "FAILED"})


@attrs.frozen(kw_only=True)
class PostRecord:
    """One create POST, recorded before a byte of its answer is sent."""

    number: int  # in order of arrival, from 1
    task_ids: tuple[str, ...] = ()
    paid: bool = False
    read: bool = True  # the whole body arrived and was read
    status: int | None = None  # the HTTP status of the answer; None: there is none
    body: Mapping[str, object] | None = attrs.field(default=None, repr=False)
    headers: Mapping[str, str] = attrs.field(factory=dict, repr=False)  # names in lower case
    faults: tuple[str, ...] = ()
    callback_url: str | None = attrs.field(default=None, repr=False)


@attrs.frozen
class GetRecord:
    """One status GET and the HTTP status of its answer."""

    task_id: str
    status: int


@attrs.frozen
class CallbackRecord:
    """One callback that was sent: `status` is the receiver's HTTP status, None without an answer."""

    task_id: str
    url: str = attrs.field(repr=False)
    state: str
    status: int | None
    attempt: int  # of this task, from 1


@attrs.frozen(kw_only=True)
class UploadRecord:
    """One upload POST, recorded before a byte of its answer is sent."""

    number: int  # in order of arrival, from 1
    read: bool = False  # the whole body arrived and was read
    filename: str | None = None
    content_type: str | None = None  # of the part
    size: int = 0  # bytes of the part, as far as it was read
    sha256: str | None = None  # in hexadecimal; None: it was not read to its end
    declared_length: int | None = None  # Content-Length of the request; None: chunked
    status: int | None = None  # the HTTP status of the answer; None: there is none
    url: str | None = attrs.field(default=None, repr=False)  # where it is stored; None: it is not
    headers: Mapping[str, str] = attrs.field(factory=dict, repr=False)  # names in lower case
    faults: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class MediaRecord:
    """One request for a result file, recorded before the client can have seen the end of the answer.

    Concurrent requests are recorded in the order in which they end; `number` is the order of arrival.
    """

    number: int  # in order of arrival, from 1
    path: str
    query: str = attrs.field(repr=False)
    headers: Mapping[str, str] = attrs.field(repr=False)  # names in lower case
    status: int  # 0: the connection was cut without an answer
    sent: int = 0  # bytes of the body that were sent

    @property
    def range(self) -> str | None:
        """The `Range` header."""
        return self.headers.get("range")

    @property
    def carried_key(self) -> bool:
        """Whether it had an Authorization (or `token`) header, which only the API should receive."""
        return "authorization" in self.headers or "token" in self.headers

    @property
    def carried_cookie(self) -> bool:
        """Whether it had a Cookie header."""
        return "cookie" in self.headers


@attrs.define(eq=False)
class Ledger:
    """Everything the service received, in order. `stalls` counts the files that a fault stopped in the middle."""

    posts: list[PostRecord] = attrs.field(factory=list)
    gets: list[GetRecord] = attrs.field(factory=list)
    callbacks: list[CallbackRecord] = attrs.field(factory=list)
    uploads: list[UploadRecord] = attrs.field(factory=list)
    media: list[MediaRecord] = attrs.field(factory=list)
    posts_read: int = 0
    stalls: int = 0
    _tasks: dict[str, str] = attrs.field(factory=dict, repr=False)
    _changed: asyncio.Event = attrs.field(factory=asyncio.Event, repr=False)

    # --- reading ---

    @property
    def paid_submits(self) -> int:
        """How many POSTs were charged."""
        return sum(post.paid for post in self.posts)

    @property
    def paid_by_callback_token(self) -> Counter[str]:
        """How many POSTs were charged, by the last path segment of their callback URL."""
        urls = (post.callback_url for post in self.posts if post.paid and post.callback_url)
        return Counter(url.partition("?")[0].rpartition("/")[2] for url in urls)

    @property
    def task_ids(self) -> tuple[str, ...]:
        """Every task ever created, in order."""
        return tuple(self._tasks)

    @property
    def tasks(self) -> Mapping[str, str]:
        """Task id to status."""
        return MappingProxyType(self._tasks)

    @property
    def unacknowledged(self) -> tuple[str, ...]:
        """Tasks whose end was called back without a 2xx answer."""
        ends = [callback for callback in self.callbacks if callback.state in TERMINAL]
        acknowledged = {end.task_id for end in ends if end.status is not None and 200 <= end.status < 300}
        return tuple(dict.fromkeys(end.task_id for end in ends if end.task_id not in acknowledged))

    @property
    def media_with_key(self) -> tuple[MediaRecord, ...]:
        """Requests for result files that carried an Authorization header."""
        return tuple(record for record in self.media if record.carried_key)

    @property
    def media_with_cookie(self) -> tuple[MediaRecord, ...]:
        """Requests for result files that carried a cookie."""
        return tuple(record for record in self.media if record.carried_cookie)

    def summary(self) -> dict[str, int]:
        """The counts."""
        return {
            "posts": len(self.posts),
            "paid_submits": self.paid_submits,
            "tasks": len(self._tasks),
            "succeeded": sum(status == "SUCCEEDED" for status in self._tasks.values()),
            "failed": sum(status == "FAILED" for status in self._tasks.values()),
            "gets": len(self.gets),
            "callbacks": len(self.callbacks),
            "unacknowledged": len(self.unacknowledged),
            "uploads": len(self.uploads),
            "media": len(self.media),
            "media_with_key": len(self.media_with_key),
        }

    # --- writing, by the service only ---

    def post(self, record: PostRecord) -> None:
        self.posts.append(record)
        self.posts_read += record.read
        self.happened()

    def get(self, record: GetRecord) -> None:
        self.gets.append(record)
        self.happened()

    def callback(self, record: CallbackRecord) -> None:
        self.callbacks.append(record)
        self.happened()

    def upload(self, record: UploadRecord) -> None:
        self.uploads.append(record)
        self.happened()

    def media_request(self, record: MediaRecord) -> None:
        self.media.append(record)
        self.happened()

    def stalled(self) -> None:
        self.stalls += 1
        self.happened()

    def task_status(self, task_id: str, status: str) -> None:
        self._tasks[task_id] = status

    # --- waiting ---

    async def until(self, predicate: Callable[[], bool]) -> None:
        """Wait until the predicate holds; it is evaluated after each event."""
        while not predicate():
            await self._changed.wait()

    def happened(self) -> None:
        """Wake all waiters."""
        self._changed.set()
        self._changed = asyncio.Event()
