"""The storage of results: which file a request gets, and how badly; no I/O."""

import gzip
from collections import Counter
from collections.abc import Mapping
from typing import Literal

from aiohttp import web
from yarl import URL

from xiling_async.simulator.answers import Answer, no_such_path, storage_error
from xiling_async.simulator.creates import Task
from xiling_async.simulator.fault import Fault, find
from xiling_async.simulator.media import faults, files
from xiling_async.simulator.media.delivery import File
from xiling_async.simulator.media.files import PIECE_BYTES, Content
from xiling_async.simulator.parameters import is_portrait

_OTHER = files.of_bytes(b"another file")
_CUT = Answer(None, ending="cut")


class Storage:
    """The files of finished tasks, and how often each was asked for."""

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        self.default: tuple[Fault, ...] = ()  # of tasks whose create had no fault of this family
        self._tasks = tasks
        self._befell: Counter[tuple[str, str]] = Counter()  # file and fault: how many requests it was looked at for

    def has(self, name: str) -> bool:
        """Whether there is a file of this name, whatever a request for it gets."""
        return self._find(name) is not None

    def decide(self, request: web.Request) -> Answer | File:
        """What this request for a file gets."""
        name = request.match_info["name"]
        found = self._find(name)
        if found is None:
            return no_such_path(request.path)
        task, content = found
        own = tuple(fault for fault in task.job.given if isinstance(fault, faults.MediaFault))
        given = own or self.default
        answer = self._instead(request.url, name, task, given)
        return self._file(request, name, content, given) if answer is None else answer

    def _find(self, name: str) -> tuple[Task, Content] | None:
        task_id, _, suffix = name.rpartition(".")
        task = self._tasks.get(task_id)
        if task is None or task.status != "SUCCEEDED":
            return None
        content = files.sample(suffix, portrait=is_portrait(task.job.body))
        return None if content is None else (task, content)

    def _nth(self, name: str, fault: Fault) -> int:
        """Which request for this file it is that this fault is looked at for, from 1."""
        self._befell[name, fault.name] += 1
        return self._befell[name, fault.name]

    def _befalls(self, name: str, fault: faults.CutMedia | faults.StalledMedia | faults.WrongHash | None) -> bool:
        return fault is not None and (fault.times is None or self._nth(name, fault) <= fault.times)

    def _instead(self, url: URL, name: str, task: Task, given: tuple[Fault, ...]) -> Answer | None:
        """An answer that is not a file."""
        redirect = find(given, faults.MediaRedirect)
        if redirect is not None:
            location = _location(redirect, url)
            if location is not None:
                return Answer(redirect.code, headers={"Location": location})
        gone = find(given, faults.MediaGone)
        if gone is not None:
            fresh = task.url_number and url.query.get("X-Goog-Signature") == files.signature(name, task.url_number)
            if not fresh:
                task.url_refused = gone.fresh_url
                return storage_error(gone.code)
        status = find(given, faults.MediaStatus)
        if status is not None:
            nth = self._nth(name, status)
            if nth <= len(status.codes):
                code = status.codes[nth - 1]
                return storage_error(code, status.retry_after) if code else _CUT
        return None

    def _file(self, request: web.Request, name: str, sample: Content, given: tuple[Fault, ...]) -> Answer | File:
        content = self._content(name, sample, given)
        headers = self._headers(name, content, given)
        if find(given, faults.GzipMedia):
            packed = gzip.compress(b"".join(content.pieces(0, content.size)), mtime=0)
            content = Content(packed, len(packed), content.content_type)
        ranged = find(given, faults.NoRanges) is None
        wanted = _wanted(request, headers.get("ETag"), content.size) if ranged else None
        start, stop = wanted or (0, content.size)
        if wanted:
            if start >= stop:
                return Answer(416, headers={"Content-Range": f"bytes */{content.size}"})
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{content.size}"
        wrong = find(given, faults.WrongLength)
        declared = max(0, stop - start + (wrong.delta if wrong else 0))
        if wrong and not wrong.excess:
            stop = min(stop, start + declared)
        slow = find(given, faults.SlowMedia)
        ending, after_bytes = self._ending(name, given)
        return File(
            status=206 if wanted else 200,
            headers=headers,
            content=content,
            start=start,
            stop=stop,
            declared=None if find(given, faults.NoLength) else declared,
            ending=ending,
            after_bytes=after_bytes,
            most=slow.chunk if slow else PIECE_BYTES,
            seconds=slow.seconds if slow else 0.0,
        )

    def _content(self, name: str, sample: Content, given: tuple[Fault, ...]) -> Content:
        """The file itself: the sample, or what stands for the video, as it is for this request."""
        content = sample
        if name.endswith(".mp4"):
            other = find(given, faults.MediaBytes) or find(given, faults.BigMedia)
            content = other.content if other else sample
        changing = find(given, faults.ChangingMedia)
        if changing is None:
            return content
        changes = self._nth(name, changing) - 1
        return content.changed(changes if changing.times is None else min(changes, changing.times))

    def _headers(self, name: str, content: Content, given: tuple[Fault, ...]) -> dict[str, str]:
        packed = find(given, faults.GzipMedia) is not None
        headers = {"Content-Type": content.content_type}
        headers["Accept-Ranges"] = "none" if find(given, faults.NoRanges) else "bytes"
        if packed:
            headers["Content-Encoding"] = "gzip"
        if not find(given, faults.NoEtag):
            headers["ETag"] = f'{content.etag[:-1]}-gzip"' if packed else content.etag
        digests = content.digests
        if self._befalls(name, find(given, faults.WrongHash)):
            digests = {digest: _OTHER.digests[digest] for digest in digests}
        no_hash = find(given, faults.NoHash)
        if no_hash is not None:
            digests = {digest: digests[digest] for digest in digests if no_hash.which and digest not in no_hash.which}
        if digests:
            headers["x-goog-hash"] = files.goog_hash(digests)
        return headers

    def _ending(self, name: str, given: tuple[Fault, ...]) -> tuple[Literal["whole", "cut", "stall"], int]:
        cut = find(given, faults.CutMedia)
        if cut is not None and self._befalls(name, cut):
            return "cut", cut.after_bytes
        stalled = find(given, faults.StalledMedia)
        if stalled is not None and self._befalls(name, stalled):
            return "stall", stalled.after_bytes
        return "whole", 0


def _location(redirect: faults.MediaRedirect, url: URL) -> str | None:
    """Where to; None: this was the last of the redirects on itself."""
    if redirect.location is not None:
        return redirect.location
    hop = url.query.get("hop", "0")
    made = int(hop) if hop.isdecimal() else 0
    return str(url.update_query(hop=made + 1)) if made < redirect.times else None


def _wanted(request: web.Request, etag: str | None, size: int) -> tuple[int, int] | None:
    """The one range that was asked for and (`If-Range`) still means this file; None: the whole of it.

    Malformed, or several ranges: the whole file is a lawful answer.
    """
    if "Range" not in request.headers or request.headers.get("If-Range", etag) != etag:
        return None
    try:
        start, stop, _ = request.http_range.indices(size)
    except ValueError:
        return None
    return start, stop
