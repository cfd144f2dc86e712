"""What the service holds of a paid create, and what it says of it: status data and callback bodies."""

import json
from collections.abc import Mapping

import attrs

from xiling_async.simulator import faults
from xiling_async.simulator.faults import Fault
from xiling_async.simulator.kinds import Kind
from xiling_async.simulator.media import files


@attrs.frozen(eq=False)
class Job:
    """One charged create and the faults it was given."""

    kind: Kind
    body: Mapping[str, object]
    callback_url: str | None
    given: tuple[Fault, ...]
    tasks: list["Task"] = attrs.field(factory=list, repr=False)


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
    url_number: int = 0  # how often its URLs were replaced
    url_refused: bool = False  # its URLs are gone, and somebody found out

    def renew_urls(self) -> None:
        """New URLs, if the old ones were tried in vain."""
        self.url_number += self.url_refused
        self.url_refused = False

    def intended_end(self) -> tuple[str, str]:
        """The status it ends with when nobody interferes, and its error message."""
        fault = faults.find(self.job.given, faults.Failed)
        if fault is not None and (fault.which is None or self.index in fault.which):
            return "FAILED", fault.message
        return "SUCCEEDED", ""


def result_data(task: Task, origin: str, state: str) -> dict[str, object]:
    """What status and callback have in common, for a task in this state."""
    done = state == "SUCCEEDED"
    return {
        "task_id": task.id,
        "status": state,
        **{
            field: files.signed_url(origin, f"{task.id}.{suffix}", task.url_number) if done else ""
            for field, suffix in task.job.kind.results.items()
        },
        "error_message": task.error_message if state == task.status else "",
    }


def status_data(task: Task, origin: str) -> dict[str, object]:
    """`data` of the status endpoint. What is not known before the end is null."""
    told = task.job.kind.facts(task.job.body)
    done = task.status == "SUCCEEDED"
    return result_data(task, origin, task.status) | (told if done else dict.fromkeys(told))


def callback_body(task: Task, origin: str, state: str) -> bytes:
    """The bytes of a callback that reports this state."""
    raw = faults.find(task.job.given, faults.RawCallback)
    if raw is not None:
        return raw.body
    data = result_data(task, origin, state)
    fields = faults.find(task.job.given, faults.CallbackFields)
    if fields is not None:
        data |= fields.changes
    envelope = {"code": 0, "msg": "ok", "task_type": task.job.kind.task_type, "data": data}
    return json.dumps(envelope).encode()
