"""The files that the service stores, and which file a request gets, with its faults; no I/O."""

import gzip
from collections import Counter
from typing import Literal

from aiohttp import web
from yarl import URL

from xiling_async.simulator.answers import CUT, Answer, no_such_path, storage_error
from xiling_async.simulator.media import faults, files
from xiling_async.simulator.media.delivery import File
from xiling_async.simulator.media.files import PIECE_BYTES, Content
from xiling_async.simulator.scripts import Fault, Script, Scripts, find
from xiling_async.simulator.tasks import Task

_OTHER = files.of_bytes(b"another file")


class Storage:
    """Uploads, tasks with their result files, and how often each file was requested."""

    def __init__(self) -> None:
        self.origin = ""  # of the service; known once it listens
        self.tasks: dict[str, Task] = {}
        self.uploads: dict[str, bytes] = {}
        self.scripts = Scripts("media")  # its default is for tasks without a media fault
        self._requests: Counter[tuple[str, str]] = Counter()  # by file and fault

    def is_missing(self, url: str) -> bool:
        """Whether this URL is on the service's own origin, and there is no file."""
        parsed = URL(url)
        if parsed.origin() != URL(self.origin):
            return False
        match parsed.path.split("/"):
            case ["", "uploads", name]:
                return name not in self.uploads
            case ["", "media", name]:
                return self._result(name) is None
        return True

    def answer(self, request: web.Request) -> Answer | File:
        """The answer to a request for a result file."""
        name = request.match_info["name"]
        result = self._result(name)
        if result is None:
            return no_such_path(request.path)
        task, content = result
        scripted: Script = tuple(fault for fault in task.job.script if isinstance(fault, faults.MediaFault))
        script = scripted or self.scripts.default
        return self._replacement(request.url, name, task, script) or self._file(request, name, content, script)

    def _result(self, name: str) -> tuple[Task, Content] | None:
        task_id, _, suffix = name.rpartition(".")
        task = self.tasks.get(task_id)
        if task is None or task.status != "SUCCEEDED":
            return None
        content = files.sample(suffix, portrait=task.job.kind.is_portrait(task.job.body))
        return None if content is None else (task, content)

    def _count(self, name: str, fault: Fault) -> int:
        """Count a request for this file that the fault may affect; its number, from 1."""
        self._requests[name, fault.name] += 1
        return self._requests[name, fault.name]

    def _is_affected(self, name: str, fault: faults.cut_media | faults.stalled_media | faults.wrong_hash) -> bool:
        return fault.times is None or self._count(name, fault) <= fault.times

    def _replacement(self, url: URL, name: str, task: Task, script: Script) -> Answer | None:
        """The answer that is sent instead of the file, if any."""
        redirect = find(script, faults.media_redirect)
        location = None if redirect is None else _location(redirect, url)
        if redirect is not None and location is not None:
            return Answer(redirect.code, headers={"Location": location})
        gone = find(script, faults.media_gone)
        if gone is not None:
            current = files.signature(name, task.url_version)
            if not task.url_version or url.query.get("X-Goog-Signature") != current:
                task.url_refused = gone.new_url
                return storage_error(gone.code)
        status = find(script, faults.media_status)
        if status is not None:
            number = self._count(name, status)
            if number <= len(status.codes):
                code = status.codes[number - 1]
                return storage_error(code, status.retry_after) if code else CUT
        return None

    def _file(self, request: web.Request, name: str, sample: Content, script: Script) -> Answer | File:
        content = self._content(name, sample, script)
        headers = self._headers(name, content, script)
        if find(script, faults.gzip_media):
            packed = gzip.compress(b"".join(content.pieces(0, content.size)), mtime=0)
            content = Content(packed, len(packed), content.content_type)
        no_ranges = find(script, faults.no_ranges)
        byte_range = None if no_ranges else _byte_range(request, headers.get("ETag"), content.size)
        start, stop = byte_range or (0, content.size)
        if byte_range:
            if start >= stop:
                return Answer(416, headers={"Content-Range": f"bytes */{content.size}"})
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{content.size}"
        wrong_length = find(script, faults.wrong_length)
        declared = max(0, stop - start + (wrong_length.delta if wrong_length else 0))
        if wrong_length and not wrong_length.excess:
            stop = min(stop, start + declared)
        slow = find(script, faults.slow_media)
        ending, after_bytes = self._ending(name, script)
        return File(
            status=206 if byte_range else 200,
            headers=headers,
            content=content,
            start=start,
            stop=stop,
            declared=None if find(script, faults.no_length) else declared,
            ending=ending,
            after_bytes=after_bytes,
            piece_bytes=slow.chunk if slow else PIECE_BYTES,
            pause_seconds=slow.seconds if slow else 0.0,
        )

    def _content(self, name: str, sample: Content, script: Script) -> Content:
        """The file itself, as it is for this request."""
        content = sample
        if name.endswith(".mp4"):
            replaced = find(script, faults.media_bytes) or find(script, faults.big_media)
            content = replaced.content if replaced else sample
        changing = find(script, faults.changing_media)
        if changing is None:
            return content
        changes = self._count(name, changing) - 1
        return content.changed(changes if changing.times is None else min(changes, changing.times))

    def _headers(self, name: str, content: Content, script: Script) -> dict[str, str]:
        packed = find(script, faults.gzip_media) is not None
        headers = {"Content-Type": content.content_type}
        headers["Accept-Ranges"] = "none" if find(script, faults.no_ranges) else "bytes"
        if packed:
            headers["Content-Encoding"] = "gzip"
        if not find(script, faults.no_etag):
            headers["ETag"] = f'{content.etag[:-1]}-gzip"' if packed else content.etag
        digests = content.digests
        wrong_hash = find(script, faults.wrong_hash)
        if wrong_hash is not None and self._is_affected(name, wrong_hash):
            digests = {digest: _OTHER.digests[digest] for digest in digests}
        no_hash = find(script, faults.no_hash)
        if no_hash is not None:
            digests = {digest: digests[digest] for digest in digests if no_hash.which and digest not in no_hash.which}
        if digests:
            headers["x-goog-hash"] = files.goog_hash(digests)
        return headers

    def _ending(self, name: str, script: Script) -> tuple[Literal["whole", "cut", "stall"], int]:
        cut = find(script, faults.cut_media)
        if cut is not None and self._is_affected(name, cut):
            return "cut", cut.after_bytes
        stalled = find(script, faults.stalled_media)
        if stalled is not None and self._is_affected(name, stalled):
            return "stall", stalled.after_bytes
        return "whole", 0


def _location(redirect: faults.media_redirect, url: URL) -> str | None:
    """The redirect's target; None after the last redirect of a file to itself."""
    if redirect.location is not None:
        return redirect.location
    hop = url.query.get("hop", "0")
    count = int(hop) if hop.isdecimal() else 0
    return str(url.update_query(hop=count + 1)) if count < redirect.times else None


def _byte_range(request: web.Request, etag: str | None, size: int) -> tuple[int, int] | None:
    """The one range that is requested and, by `If-Range`, still applies; None: the whole file.

    A malformed range or several ranges: the whole file is a valid answer.
    """
    if "Range" not in request.headers or request.headers.get("If-Range", etag) != etag:
        return None
    try:
        start, stop, _ = request.http_range.indices(size)
    except ValueError:
        return None
    return start, stop
