"""Creates: which are refused, which are accepted, and what the status endpoint answers later. No I/O."""

import json
import random

import attrs

from xiling_async.simulator import answers, faults
from xiling_async.simulator.answers import Answer
from xiling_async.simulator.directives import read_directives
from xiling_async.simulator.kinds.base import IMAGE_UNREACHABLE, Body, Kind, Problem
from xiling_async.simulator.ledger import Ledger
from xiling_async.simulator.media.storage import Storage
from xiling_async.simulator.scripts import Script
from xiling_async.simulator.tasks import Job, Task


@attrs.frozen
class Decision:
    """The result of one create: its answer, and the job if it was charged."""

    answer: Answer
    script: Script = ()
    body: Body | None = None
    job: Job | None = None


class Creates:
    """Makes jobs and tasks, and changes their status."""

    def __init__(self, ledger: Ledger, storage: Storage, seed: int) -> None:
        self._ledger = ledger
        self._storage = storage
        self._ids = random.Random(seed)  # noqa: S311 - reproducible ids, not secrets
        self._refused_prompts: set[str] = set()

    def decide(self, kind: Kind, raw: bytes, script: Script, *, lenient: bool) -> Decision:
        """Decide on a create whose body was read; makes the job if it is accepted."""
        body = _json_object(raw)
        try:
            script += self._directives(body)
        except ValueError as error:
            return Decision(answers.invalid_parameters(str(error)), script, body)
        refused = answers.refusal(script)
        if refused is not None:
            return Decision(refused, script, body)
        if body is None:
            return Decision(answers.invalid_parameters("the body is not a JSON object"), script)
        problem = None if lenient else kind.check(body) or self._missing_input(kind, body)
        if problem is not None:
            return Decision(answers.envelope(problem.code, problem.msg, status=400), script, body)
        job = self._new_job(kind, body, script)
        answer = answers.envelope(0, "ok", data={"task_ids": [task.id for task in job.tasks]})
        return Decision(answers.acceptance(script, answer), script, body, job)

    def status_answer(self, kind: Kind, task_id: str) -> Answer:
        """The answer of the status endpoint."""
        task = self._storage.tasks.get(task_id)
        if task is None or task.job.kind is not kind or task.job.fault(faults.no_status_endpoint):
            return answers.task_not_found()
        fault = task.job.fault(faults.status_fault)
        task.gets += 1
        if fault is not None and task.gets <= len(fault.codes):
            code = fault.codes[task.gets - 1]
            return answers.envelope(code, "Simulated status", status=code) if code else answers.CUT
        task.renew_urls()
        return answers.envelope(0, "ok", data=task.status_data(self._storage.origin))

    def set_status(self, task: Task, status: str, message: str = "") -> None:
        """Change the status of a task, here and in the ledger."""
        task.status, task.error_message = status, message
        self._ledger.task_status(task.id, status)

    def start(self, job: Job) -> None:
        """All tasks of this job are in progress."""
        for task in job.tasks:
            self.set_status(task, job.kind.running_status)

    def end(self, job: Job) -> None:
        """All tasks of this job end, as its script says."""
        for task in job.tasks:
            self.set_status(task, *task.scripted_end())

    def _directives(self, body: Body | None) -> Script:
        """The faults that the prompt requests; refusals only once for each prompt, so that a second try succeeds."""
        prompt = None if body is None else body.get("prompt")
        if not isinstance(prompt, str):
            return ()
        script = read_directives(prompt)
        accepting = tuple(fault for fault in script if answers.refusal((fault,)) is None)
        if accepting == script or prompt in self._refused_prompts:
            return accepting
        self._refused_prompts.add(prompt)
        return script

    def _missing_input(self, kind: Kind, body: Body) -> Problem | None:
        """Inputs on the service's own origin must exist; other hosts are not asked."""
        if any(self._storage.is_missing(url) for url in kind.input_urls(body)):
            return Problem(IMAGE_UNREACHABLE, "Image URL not reachable")
        return None

    def _new_job(self, kind: Kind, body: Body, script: Script) -> Job:
        job = Job(kind, body, script)
        fixed = job.fault(faults.ids)
        for index in range(kind.output_count(body) if fixed is None else fixed.n):
            task = Task(f"{kind.id_prefix}-{self._ids.getrandbits(128):032x}", index, job)
            job.tasks.append(task)
            self._storage.tasks[task.id] = task
            self.set_status(task, task.status)
        return job


def _json_object(raw: bytes) -> dict[str, object] | None:
    try:
        body: object = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None
