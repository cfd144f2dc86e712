"""What the demo may claim: the simulator's ledger held against the jobs; nothing is taken from the plan's hopes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from attrs import frozen

from xiling_async.cli.demo.plan import FAULTS, NONE, Row
from xiling_async.cli.output import count
from xiling_async.models.record import Failed, State
from xiling_async.simulator import CallbackRecord, Ledger, PostRecord

DELIVERED: Final = "every paid job was delivered; nothing was paid for twice"


@frozen(kw_only=True)
class Facts:
    """One job: what its row says, and every record that the service has of it."""

    row: Row
    posts: tuple[PostRecord, ...]
    callbacks: tuple[CallbackRecord, ...]
    gets: int

    @property
    def paid(self) -> int:
        return sum(post.paid for post in self.posts)

    @property
    def paid_tasks(self) -> tuple[str, ...]:
        return tuple(task_id for post in self.posts if post.paid for task_id in post.task_ids)

    @property
    def failed(self) -> int:
        return sum(isinstance(outcome, Failed) for outcome in self.row.outcomes)

    @property
    def unsaved(self) -> int:
        """Results whose file is not there."""
        results = {outcome.task_id for outcome in self.row.outcomes if not isinstance(outcome, Failed)}
        return len(results.difference(self.row.saved))

    @property
    def received(self) -> int:
        """Callbacks that the receiver took."""
        return sum(is_taken(callback) for callback in self.callbacks)

    def is_delivered(self, ledger: Ledger) -> bool:
        """Every paid task has an outcome at the job, and it is the one that the service knows."""
        reported = {outcome.task_id: isinstance(outcome, Failed) for outcome in self.row.outcomes}
        known = {task_id: ledger.tasks[task_id] for task_id in self.paid_tasks}
        return reported == {task_id: status == "FAILED" for task_id, status in known.items()}


def is_taken(callback: CallbackRecord) -> bool:
    return callback.status is not None and 200 <= callback.status < 300


def facts(rows: Iterable[Row], ledger: Ledger) -> list[Facts]:
    """The records of each job, found by its prompt and by the tasks that were sold for it."""
    return [_facts_of(row, ledger) for row in rows]


def _facts_of(row: Row, ledger: Ledger) -> Facts:
    prompt = row.planned.request.prompt
    posts = tuple(post for post in ledger.posts if post.body is not None and post.body.get("prompt") == prompt)
    sold = {task_id for post in posts for task_id in post.task_ids}
    return Facts(
        row=row,
        posts=posts,
        callbacks=tuple(callback for callback in ledger.callbacks if callback.task_id in sold),
        gets=sum(get.task_id in sold for get in ledger.gets),
    )


def complaints(all_facts: Sequence[Facts], ledger: Ledger) -> list[str]:
    """Why the demo did not do what it promises, a line each; none: it did."""
    twice = sum(one.paid > 1 for one in all_facts) or sum(n > 1 for n in ledger.paid_by_callback_token.values())
    lost = sum(not one.is_delivered(ledger) for one in all_facts)
    unsaved = sum(one.unsaved for one in all_facts)
    unbought = sum(one.paid == 0 for one in all_facts)
    strays = ledger.paid_submits - sum(one.paid for one in all_facts)
    counted = (
        (twice, "paid for more than once"),
        (lost, "paid for, and not delivered as the service knows it"),
        (unbought, "never bought"),
        (strays, "paid for without an order"),
    )
    lines = [f"{count(number, 'job')} {what}" for number, what in counted if number]
    if unsaved:
        lines.append(f"{count(unsaved, 'video')} not saved")
    problems = [f"job #{one.row.planned.number}: {one.row.problem}" for one in all_facts if one.row.problem]
    if len(problems) > 1:
        problems[1:] = [f"and {count(len(problems) - 1, 'problem')} more"]
    return lines + problems


def pictured(all_facts: Sequence[Facts], ledger: Ledger) -> int:
    """How many jobs were bought with a picture that was uploaded."""
    stored = {upload.url for upload in ledger.uploads if upload.url is not None}
    return sum(any(post.paid and stored & _pictures(post) for post in one.posts) for one in all_facts)


def _pictures(post: PostRecord) -> set[object]:
    body = post.body or {}
    several = body.get("reference_images")
    return {body.get("image_url"), *(several if isinstance(several, list) else ())}


def by_fault(all_facts: Sequence[Facts], ledger: Ledger) -> list[tuple[str, int, str]]:
    """For each fault: its label, how many jobs the ledger saw it in, and what became of them."""
    lines = []
    for fault in (NONE, *FAULTS):
        jobs = [one for one in all_facts if one.row.planned.fault is fault]
        seen = [one for one in jobs if fault is NONE or any(fault.name in post.faults for post in one.posts)]
        if seen:
            ending = became(seen, ledger)
            lines.append((fault.label, len(seen), f"{fault.description} → {ending}" if fault.description else ending))
    return lines


def became(jobs: Sequence[Facts], ledger: Ledger) -> str:
    """What became of jobs that had the same fault, in words."""
    tasks = sum(len(one.paid_tasks) for one in jobs)
    failed = sum(one.failed for one in jobs)
    received = sum(one.received for one in jobs)
    delivered = [one for one in jobs if one.is_delivered(ledger)]
    # Nothing but a callback can tell of a job of unknown fate that no GET asked about.
    adopted = [one for one in delivered if one.row.at_submit is State.UNCERTAIN and one.gets == 0]
    early = [one for one in delivered if one.row.at_submit is not None and one.row.at_submit.is_final]
    phrases = [
        _of(len(adopted), len(jobs), "adopted by callback") if adopted else "",
        _of(len(early), len(jobs), "done when submit returned") if early else "",
        f"{count(received, 'callback')} for {count(tasks, 'task')}" if received != tasks else "",
        f"{failed} of {count(tasks, 'task')} say so" if failed else "",
        _posts(jobs),
        f"{len(jobs) - len(delivered)} NOT DELIVERED" if len(delivered) < len(jobs) else "",
    ]
    return ", ".join(filter(None, phrases))


def _posts(jobs: Sequence[Facts]) -> str:
    """How often they were sent, and how often they were charged where that is another number."""
    numbers = {(len(one.posts), one.paid) for one in jobs}
    if len(numbers) > 1:
        return f"{sum(len(one.posts) for one in jobs)} POSTs, {sum(one.paid for one in jobs)} paid"
    ((posts, paid),) = numbers
    return f"{count(posts, 'POST')} each" + (f", {paid} paid" if paid != posts else "")


def _of(part: int, whole: int, what: str) -> str:
    return what if part == whole else f"{part} of {whole} {what}"
