"""Creates: what is refused, what is sold, under which ids, and what is said of it later; no I/O."""

import json
import random
from collections import deque
from collections.abc import Callable, Mapping

import attrs

from xiling_async.simulator import faults
from xiling_async.simulator.answers import Answer, acceptance, envelope, parameter_error, refusal, task_not_found
from xiling_async.simulator.directives import read_directives
from xiling_async.simulator.faults import Fault
from xiling_async.simulator.ledger import Ledger
from xiling_async.simulator.media import files
from xiling_async.simulator.parameters import IMAGE_UNREACHABLE, Kind, Problem, images


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
    url_refused: bool = False  # its URLs are gone, and a request found out

    def renew_urls(self) -> None:
        """New URLs, if the old ones were tried in vain."""
        self.url_number += self.url_refused
        self.url_refused = False

    def intended_end(self) -> tuple[str, str]:
        """The status it ends with when no test interferes, and its error message."""
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


# Tasks one create can make when the parameter checks are off.
LENIENT_COUNT_LIMIT = 100


@attrs.frozen
class Decision:
    """What becomes of one create: its answer, and the job when it was charged."""

    answer: Answer
    given: tuple[Fault, ...] = ()
    body: Mapping[str, object] | None = None
    job: Job | None = None


class Creates:
    """Scripts, ids and tasks: everything the service remembers of what it sold."""

    def __init__(self, ledger: Ledger, seed: int, is_dangling: Callable[[str], bool]) -> None:
        self.tasks: dict[str, Task] = {}
        self.default: tuple[Fault, ...] = ()
        self._ledger = ledger
        self._is_dangling = is_dangling  # whether a URL is one of the service's own where there is nothing
        self._ids = random.Random(seed)  # noqa: S311 - ids that can be repeated, no secrets
        self._scripts: deque[tuple[Fault, ...]] = deque()
        self._refused_prompts: set[str] = set()

    def script(self, given: tuple[Fault, ...]) -> None:
        self._scripts.append(given)

    def next_script(self) -> tuple[Fault, ...]:
        return self._scripts.popleft() if self._scripts else self.default

    def decide(self, kind: Kind, raw: bytes, scripted: tuple[Fault, ...], *, lenient: bool) -> Decision:
        """What becomes of a create whose body was read; makes the job when it is accepted."""
        body = _json_object(raw)
        try:
            given = scripted + self._directed(body)
        except ValueError as error:
            return Decision(parameter_error(str(error)), scripted, body)
        refused = refusal(given)
        if refused is not None:
            return Decision(refused, given, body)
        if body is None:
            return Decision(parameter_error("the body is not a JSON object"), given)
        problem = None if lenient else kind.check(body) or self._unreachable(body)
        if problem is not None:
            return Decision(envelope(problem.code, problem.msg, status=400), given, body)
        job = self._new_job(kind, body, given)
        return Decision(
            acceptance(given, envelope(0, "ok", data={"task_ids": [task.id for task in job.tasks]})), given, body, job
        )

    def status_answer(self, kind: Kind, task_id: str, origin: str) -> Answer:
        """What the status endpoint says of this task."""
        task = self.tasks.get(task_id)
        if task is None or task.job.kind is not kind or faults.find(task.job.given, faults.NoStatusEndpoint):
            return task_not_found()
        fault = faults.find(task.job.given, faults.StatusFault)
        task.gets += 1
        if fault is not None and task.gets <= len(fault.codes):
            code = fault.codes[task.gets - 1]
            return Answer(None, ending="cut") if code == 0 else envelope(code, "Simulated status", status=code)
        task.renew_urls()
        return envelope(0, "ok", data=status_data(task, origin))

    def move(self, task: Task, status: str, message: str = "") -> None:
        """Change the status of a task, here and in the ledger."""
        task.status, task.error_message = status, message
        self._ledger.moved(task.id, status)

    def run(self, job: Job) -> None:
        """The tasks of this job are being worked on."""
        for task in job.tasks:
            self.move(task, job.kind.running)

    def end(self, job: Job) -> None:
        """The tasks of this job end as their faults want it."""
        for task in job.tasks:
            self.move(task, *task.intended_end())

    def _directed(self, body: Mapping[str, object] | None) -> tuple[Fault, ...]:
        """What the prompt asks for; a refusal once for the same prompt, so that a second try succeeds."""
        prompt = None if body is None else body.get("prompt")
        if not isinstance(prompt, str):
            return ()
        given = read_directives(prompt)
        accepting = tuple(fault for fault in given if refusal((fault,)) is None)
        if len(accepting) == len(given):
            return given
        if prompt in self._refused_prompts:
            return accepting
        self._refused_prompts.add(prompt)
        return given

    def _unreachable(self, body: Mapping[str, object]) -> Problem | None:
        """Pictures of others are taken on trust; of its own the service knows which there are."""
        if any(self._is_dangling(image) for image in images(body)):
            return Problem(IMAGE_UNREACHABLE, "Image URL not reachable")
        return None

    def _new_job(self, kind: Kind, body: Mapping[str, object], given: tuple[Fault, ...]) -> Job:
        url = body.get("callback_url")
        job = Job(kind, body, url if isinstance(url, str) else None, given)
        wanted = faults.find(given, faults.Ids)
        for index in range(_count(body) if wanted is None else wanted.n):
            task = Task(f"{kind.prefix}-{self._ids.getrandbits(128):032x}", index, job)
            job.tasks.append(task)
            self.tasks[task.id] = task
            self.move(task, task.status)
        return job


def _json_object(raw: bytes) -> dict[str, object] | None:
    try:
        parsed: object = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def _count(body: Mapping[str, object]) -> int:
    """How many outputs were ordered; with the checks off anything may stand there."""
    count = body.get("generate_count", 1)
    if isinstance(count, bool) or not isinstance(count, int):
        return 1
    return min(max(count, 1), LENIENT_COUNT_LIMIT)
