"""Jobs and tasks as the service remembers them, and their data in status answers and callbacks."""

import json

import attrs

from xiling_async.simulator import faults
from xiling_async.simulator.kinds.base import Body, Kind
from xiling_async.simulator.media import files
from xiling_async.simulator.scripts import F, Script, find


@attrs.frozen(eq=False)
class Job:
    """One charged create and its faults."""

    kind: Kind
    body: Body
    script: Script
    tasks: list["Task"] = attrs.field(factory=list, repr=False)

    @property
    def callback_url(self) -> str | None:
        url = self.body.get("callback_url")
        return url if isinstance(url, str) else None

    def fault(self, kind: type[F]) -> F | None:
        return find(self.script, kind)


@attrs.define(eq=False)
class Task:
    """One output of a job."""

    id: str
    index: int
    job: Job
    status: str = "PENDING"
    error_message: str = ""
    gets: int = 0
    callbacks: int = 0
    url_version: int = 0  # how often its URLs were replaced
    url_refused: bool = False  # a request for its current URL was refused

    def renew_urls(self) -> None:
        """Replace the URLs if the current ones were refused."""
        self.url_version += self.url_refused
        self.url_refused = False

    def scripted_end(self) -> tuple[str, str]:
        """The status it ends with unless a test decides otherwise, and its error message."""
        fault = self.job.fault(faults.failed)
        if fault is not None and (fault.which is None or self.index in fault.which):
            return "FAILED", fault.message
        return "SUCCEEDED", ""

    def status_data(self, origin: str) -> dict[str, object]:
        """`data` of the status endpoint."""
        fields = self.job.kind.status_fields(self.job.body)
        return self._data(origin, self.status) | (fields if self.status == "SUCCEEDED" else dict.fromkeys(fields))

    def callback_body(self, origin: str, status: str) -> bytes:
        """The body of a callback that reports this status."""
        raw = self.job.fault(faults.raw_callback)
        if raw is not None:
            return raw.body
        data = self._data(origin, status)
        fields = self.job.fault(faults.callback_fields)
        if fields is not None:
            data |= fields.changes
        return json.dumps({"code": 0, "msg": "ok", "task_type": self.job.kind.task_type, "data": data}).encode()

    def _data(self, origin: str, status: str) -> dict[str, object]:
        """The fields that status answers and callbacks share."""
        urls = {
            field: files.signed_url(origin, f"{self.id}.{suffix}", self.url_version) if status == "SUCCEEDED" else ""
            for field, suffix in self.job.kind.result_files.items()
        }
        message = self.error_message if status == self.status else ""
        return {"task_id": self.id, "status": status, **urls, "error_message": message}
