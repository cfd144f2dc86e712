"""What a fault is: the base of the vocabulary, and how the service looks for one among those it was given."""

import re
from collections.abc import Callable, Iterable
from typing import ClassVar, TypeVar

import attrs


@attrs.frozen
class Fault:
    """One thing that goes wrong; `name` is the word for it in the ledger."""

    name: ClassVar[str] = "fault"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.name = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()


F = TypeVar("F", bound=Fault)


def find(given: Iterable[Fault], kind: type[F]) -> F | None:
    """The first fault of this type, if there is one."""
    return next((fault for fault in given if isinstance(fault, kind)), None)


def names(given: Iterable[Fault]) -> tuple[str, ...]:
    return tuple(fault.name for fault in given)


def checked(given: tuple[Fault, ...], whose: str, fits: Callable[[Fault], bool]) -> tuple[Fault, ...]:
    """These faults, all of a kind that is looked for here.

    Raises:
        TypeError: `faults.hang` for `faults.hang()`, or a fault of something else: it would go unnoticed.
    """
    for fault in given:
        if not isinstance(fault, Fault):
            raise TypeError(f"not a fault: {fault!r}")
        if not fits(fault):
            raise TypeError(f"not a fault of {whose}: {fault!r}")
    return given
