"""What a store promises.

A store remembers jobs. It decides nothing: `lifecycle.decide` says what an event does to a record, and a store applies
that inside one transaction. What it owes:

1. When `add` or `change` returns, the new record is durable (in the store's own sense: a `MemoryStore` is not).
   When it raises `StoreError`, nothing was changed.
2. A key belongs to one job for ever, a task id to one job for ever.
3. A verdict other than `APPLIED` changed nothing.
4. Changes of one record are applied one after another; each returned record has the `version` of its change.

When what is written: the intent before its POST; the answer before `submit` returns; a callback before its 200.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol, runtime_checkable

from xiling_async.lifecycle import Change, Event
from xiling_async.models import JobRecord


@runtime_checkable
class Store(Protocol):
    """Every method raises `StoreError` when the store cannot do its work."""

    async def open(self) -> None:
        """Make it ready; the client calls it when it is entered."""
        ...

    async def close(self) -> None:
        """Write what is left and let go of everything; a closed store can be opened again."""
        ...

    async def secret(self, fresh: bytes) -> bytes:
        """The secret of callback URLs that this store keeps: `fresh` if it had none."""
        ...

    async def add(self, record: JobRecord) -> JobRecord:
        """Write a new job; or, if its id or its key is known, change nothing. Returns the job that the store holds."""
        ...

    async def change(self, job_id: str, event: Event) -> Change:
        """Apply an event to a job and make it durable."""
        ...

    async def get(self, job_id: str) -> JobRecord | None: ...

    async def by_key(self, key: str) -> JobRecord | None: ...

    async def by_task(self, task_id: str) -> JobRecord | None: ...

    def unfinished(self) -> AsyncIterator[JobRecord]:
        """The jobs that are not at an end, oldest first; the store may change while one reads."""
        ...
