"""Where each row of a batch stands: its job, its files, its trouble; as numbers, clips and words."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from attrs import Factory, define, evolve, field

from xiling_async.cli.batch.gallery import Clip, Status
from xiling_async.cli.batch.input import Row
from xiling_async.cli.output import count, printable
from xiling_async.errors import Charged, LimitReached, ResultExpired, TaskFailed, WaitTimeout, XilingError
from xiling_async.models.record import NOT_BOUGHT, Failed, JobRecord, Outcome, State, Succeeded

MONEY: Final[Mapping[Charged, str]] = {
    "no": "not bought", "maybe": "may have been bought", "yes": "bought",
}  # fmt: skip
_RECENT: Final = 200  # endings that the rate is made of
_IN_DOUBT: Final = frozenset({State.UNCERTAIN, State.UNKNOWN, State.EXPIRED})


@define(eq=False)
class RowState:
    """One row as it goes. `record`: all of its jobs `joined`. `files`, `thumbnails`: names of files, by task."""

    row: Row
    record: JobRecord | None = None
    retries: int = 0  # how often its failed tasks are bought again at most, earlier runs included
    bought_before: int = 0  # its jobs of earlier runs
    was_final: bool = False  # before this run: it tells nothing of how fast things go now
    is_over: bool = False
    error: Exception | None = None  # why the job did not succeed
    unsaved: tuple[XilingError, ...] = ()  # why there is no file of a task that succeeded
    files: dict[str, str] = Factory(dict)
    thumbnails: dict[str, str] = Factory(dict)
    counted: tuple[str, bool, int] | None = None  # what the numbers of the batch have of it: step, is over, files
    shown: list[Clip] | None = None  # its clips, until something changes
    jobs: dict[str, JobRecord] = Factory(  # its job and those that bought failed tasks again, in order, by id
        lambda self: {} if self.record is None else {self.record.id: self.record}, takes_self=True
    )

    def take(self, record: JobRecord) -> bool:
        """A record of one of its jobs; whether it is news."""
        if record.id in self.jobs and self.jobs[record.id].version > record.version:
            return False
        self.jobs[record.id] = record
        self.record = joined(self.jobs.values())
        return True

    @property
    def bought(self) -> list[JobRecord]:
        """Its jobs that were paid for, or may have been."""
        return [record for record in self.jobs.values() if record.state not in NOT_BOUGHT]

    @property
    def bought_now(self) -> int:
        """How many jobs were bought for it in this run."""
        return len(self.bought) - self.bought_before

    @property
    def turn(self) -> int:
        bought = self.bought
        if not bought:
            return 1
        return 0 if bought[-1].task_ids else 2

    @property
    def is_good(self) -> bool:
        return self.is_over and self.problem is None

    @property
    def problem(self) -> Exception | None:
        """What kept this row from succeeding."""
        return self.error or next(iter(self.unsaved), None)

    @property
    def can_go_on(self) -> bool:
        """Whether the same command would do something about it."""
        return not self.is_over or bool(self.unsaved) or self.status() in (Status.REFUSED, Status.RUNNING)

    @property
    def charged(self) -> Charged:
        """What its problem means for the money."""
        bought = self.bought
        if bought and bought[-1].task_ids:
            return "yes"
        if isinstance(self.problem, XilingError):
            return self.problem.charged
        return "maybe" if bought else "no"

    @property
    def step(self) -> str:
        """What is being done with it now, in a word for the terminal."""
        if self.is_over:
            if self.problem is None:
                return "done"
            return "in doubt" if self.charged == "maybe" else "failed"
        if self.record is None or self.record.state in NOT_BOUGHT:
            return "waiting"
        if self.record.state.is_final:
            return "saving"
        return {State.SENDING: "sending", State.UNCERTAIN: "uncertain"}.get(self.record.state, "at the service")

    def status(self, outcome: Outcome | None = None) -> Status:
        """What the page says of it, or of one of its tasks."""
        if isinstance(outcome, Failed):
            return Status.FAILED
        if isinstance(outcome, Succeeded):
            if outcome.task_id in self.files:
                return Status.DONE
            return Status.UNSAVED if self.is_over else Status.RUNNING
        if not self.is_over:
            return Status.WAITING if self.step == "waiting" else Status.RUNNING
        if isinstance(self.error, WaitTimeout) and self.charged == "yes":
            return Status.RUNNING
        if self.charged == "no":
            return Status.REFUSED
        return Status.FAILED if self.charged == "yes" and not _is_in_doubt(self.record) else Status.UNCERTAIN

    def clips(self) -> list[Clip]:
        """What the page shows of it: a clip for each task, or one where there is none yet."""
        if self.shown is None:
            self.shown = self._clips()
        return self.shown

    def _clips(self) -> list[Clip]:
        request, record = self.row.request, self.record
        sound = ("sound",) if request.generate_audio is True else ()
        known: dict[str, Any] = {
            "line": self.row.line, "key": self.row.key, "prompt": request.prompt, "model": request.model,
            "parameters": (request.aspect_ratio, request.aspect_resolution, f"{request.duration} s", *sound),
            "job_id": "" if record is None else record.id,
        }  # fmt: skip
        outcomes = dict(zip(record.task_ids, record.outcomes, strict=False)) if record is not None else {}
        if record is None or not outcomes:
            return [Clip(**known, status=self.status(), message=self.message(None))]
        return [
            Clip(
                **known,
                task_id=task_id,
                status=self.status(outcome),
                file=self.files.get(task_id, ""),
                thumbnail=self.thumbnails.get(task_id, ""),
                duration_s=_duration_of(outcome) or (request.duration if isinstance(outcome, Succeeded) else None),
                ended_at=record.changed_at if outcome is not None else None,
                message=self.message(outcome),
            )
            for task_id, outcome in outcomes.items()
        ]

    def message(self, outcome: Outcome | None) -> str:
        """Why there is no clip."""
        if isinstance(outcome, Failed):
            reason = (outcome.message or "The service gave no reason").rstrip()  # in the service's own words
            return f"{reason}{'' if reason.endswith(('.', '!', '?')) else '.'} It was bought."
        if isinstance(outcome, Succeeded):
            return next((str(error) for error in self.unsaved if outcome.task_id in error.task_ids), "")
        return "" if self.error is None else self.why

    @property
    def why(self) -> str:
        """What kept it from succeeding, in words."""
        record, names = self.record, ""
        if record is not None:
            names = f" (task{'s' if len(record.task_ids) > 1 else ''} {', '.join(record.task_ids)})"
        match self.error:
            case TaskFailed(outcomes=outcomes):
                bad = [outcome for outcome in outcomes if isinstance(outcome, Failed)]
                text = "; ".join(f"{outcome.task_id}: {outcome.message or 'no reason given'}" for outcome in bad)
                return f"{len(bad)} of {count(len(outcomes), 'task')} failed at the service ({text})."
            case WaitTimeout() if record is not None and record.task_ids:
                return f"It is not finished within --timeout{names}: only the wait is over."
            case WaitTimeout():
                return "It was sent and its answer was lost; no callback came within --timeout."
            case ResultExpired() if record is not None:
                return f"The service has not told what became of it for longer than it can take{names}."
            case LimitReached():
                return "--max-videos was reached before it: nothing more was sent for it in this run."
            case None:
                text = " ".join(map(str, self.unsaved[:1]))
                more = f" (and {len(self.unsaved) - 1} more)" if len(self.unsaved) > 1 else ""
                return f"Not every file could be saved: {text}{more}"
            case error:
                return str(error)

    def lines(self) -> list[dict[str, Any]]:
        """What results.jsonl has of it: a line for each task that is over and whose file is here, unless it is gone."""
        gone = {task_id for error in self.unsaved if isinstance(error, ResultExpired) for task_id in error.task_ids}
        return [
            _line(self, record, outcome)
            for record in self.jobs.values()
            for outcome in record.outcomes
            if isinstance(outcome, Failed)
            or (isinstance(outcome, Succeeded) and (outcome.task_id in self.files or outcome.task_id in gone))
        ]


def joined(jobs: Iterable[JobRecord]) -> JobRecord:
    """The last of a row's jobs, with the outcomes of all of them: the newer one of a task that was bought again."""
    record, *retries = jobs
    for retry in retries:
        if retry.state in NOT_BOUGHT:
            continue
        task_ids, outcomes = list(record.task_ids), list(record.outcomes)
        failed = [place for place, outcome in enumerate(outcomes) if isinstance(outcome, Failed)]
        for place, task_id, outcome in zip(failed, retry.task_ids, retry.outcomes, strict=False):
            task_ids[place], outcomes[place] = task_id, outcome
        record = evolve(retry, asked=record.asked, task_ids=tuple(task_ids), outcomes=tuple(outcomes))
    return record


def _is_in_doubt(record: JobRecord | None) -> bool:
    return record is None or record.state in _IN_DOUBT


def _duration_of(outcome: Outcome | None) -> float | None:
    return getattr(outcome.result, "duration", None) if isinstance(outcome, Succeeded) else None


def _line(entry: RowState, record: JobRecord, outcome: Outcome) -> dict[str, Any]:
    """All names are always there. No URL: it is signed, and ends; the file stays."""
    is_good = isinstance(outcome, Succeeded)
    result = outcome.result if isinstance(outcome, Succeeded) else None
    request = entry.row.request
    return {
        "task_id": outcome.task_id,
        "ok": is_good,
        "file": entry.files.get(outcome.task_id),
        "thumbnail": entry.thumbnails.get(outcome.task_id),
        "line": entry.row.line,
        "key": entry.row.key,
        "job_id": record.id,
        "model": request.model,
        "prompt": request.prompt,
        **{name: getattr(result, name, None) for name in ("duration", "width", "height")},
        "ended_at": record.changed_at,
        "message": entry.message(outcome) or None,
    }


@define(eq=False)
class BatchState:
    """All rows of a batch, in the order of the file."""

    began_at: float  # Unix seconds
    entries: dict[str, RowState] = Factory(dict)  # by key
    steps: Counter[str] = Factory(Counter)  # how many rows are at which step
    over: int = 0  # how many rows are over
    videos: int = 0  # how many files are there
    revision: int = 0  # grows with each change
    _doubts: list[RowState] = Factory(list)
    _endings: deque[float] = field(factory=lambda: deque(maxlen=_RECENT))

    def add(self, row: Row, jobs: Sequence[JobRecord] = (), *, retries: int = 0, retry_failed: bool = False) -> None:
        """A row to buy. `jobs`: what is remembered of it from earlier runs. `retries`: how often its failed tasks are
        bought again in all; `retry_failed`: once more than was done already."""
        entry = RowState(row)
        for record in jobs:
            entry.take(record)
        entry.bought_before = len(entry.bought)
        is_failed = entry.record is not None and entry.record.state is State.FAILED
        entry.retries = max(retries, entry.bought_before - 1 + (retry_failed and is_failed))
        entry.was_final = entry.bought_before > 0 and entry.record is not None and entry.record.state.is_final
        self.put(entry)

    def put(self, entry: RowState) -> None:
        """One more row."""
        self.entries[entry.row.key] = entry
        self._changed(entry)

    def saw(self, records: Iterable[JobRecord]) -> None:
        """These were written."""
        for record in records:
            key = record.key or ""
            entry = self.entries.get(key) or self.entries.get(key.rpartition("~")[0])  # a retry has a derived key
            if entry is not None and entry.take(record):
                self._changed(entry)

    def ended(self, entry: RowState, now: float) -> None:
        """This row is over. `now`: Unix seconds."""
        entry.is_over = True
        self._changed(entry)
        if not entry.was_final or entry.bought_now:
            self._endings.append(now)

    def doubts(self) -> list[RowState]:
        """The rows that have become uncertain since this was asked last, and are still awaited."""
        doubts, self._doubts = self._doubts, []
        return [entry for entry in doubts if entry.step == "uncertain"]

    def _changed(self, entry: RowState) -> None:
        """Count this row as it is now: what is asked four times a second must not walk through all rows."""
        step, is_over, files = entry.counted or ("", False, 0)
        entry.counted = (entry.step, entry.is_over, len(entry.files))
        if entry.step != step:
            self.steps[step] -= 1
            self.steps[entry.step] += 1
            if entry.step == "uncertain":
                self._doubts.append(entry)
        del self.steps[""]
        self.over += entry.is_over - is_over
        self.videos += len(entry.files) - files
        entry.shown = None
        self.revision += 1

    def in_turn(self) -> list[RowState]:
        """In the order in which to go on: what is bought, what is new, and last what was sent with an unknown fate.

        Such rows may have to be waited for in vain: they would take the places of all others.
        """
        return sorted(self.entries.values(), key=lambda entry: entry.turn)

    @property
    def bad(self) -> list[RowState]:
        """The rows that are over and did not succeed."""
        return [entry for entry in self.entries.values() if entry.is_over and not entry.is_good]

    @property
    def unfinished(self) -> int:
        """How many rows the same command would go on with."""
        return sum(entry.can_go_on for entry in self.entries.values())

    def clips(self) -> list[Clip]:
        return [clip for entry in self.entries.values() for clip in entry.clips()]

    def rate(self, now: float) -> float | None:
        """Rows that end in a second, lately; None while there is nothing to measure."""
        since = self._endings[0] if len(self._endings) == _RECENT else self.began_at
        return len(self._endings) / (now - since) if self._endings and now > since else None

    def left_s(self, now: float) -> float | None:
        """About how long the rest takes, in seconds, but for rows whose callback may never come; None: not known."""
        rate, rest = self.rate(now), len(self.entries) - self.over - self.steps["uncertain"]
        return None if rate is None or not rest else rest / rate


def words_of_problem(entry: RowState) -> tuple[str, str]:
    """What went wrong with a row, and what it means for the money."""
    return printable(" ".join(entry.why.split())), MONEY[entry.charged]
