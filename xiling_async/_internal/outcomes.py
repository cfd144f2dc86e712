"""How a task ended. It stands this low because errors carry outcomes too."""

from __future__ import annotations

from typing import Any, ClassVar, Generic, Literal, TypeVar

from attrs import frozen

R_co = TypeVar("R_co", covariant=True)


@frozen
class Succeeded(Generic[R_co]):
    """A task that ended well. `file`: where `Client(save_to=...)` has kept its result."""

    task_id: str
    result: R_co
    file: str | None = None

    ok: ClassVar[Literal[True]] = True


@frozen
class Failed:
    """A task that the service could not do; `message` is the service's own."""

    task_id: str
    message: str

    ok: ClassVar[Literal[False]] = False


Outcome = Succeeded[Any] | Failed
