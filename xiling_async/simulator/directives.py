"""Faults asked for over HTTP: `[sim:name]` and `[sim:name=value]` in a prompt, read into the vocabulary."""

import re
from collections.abc import Callable

from xiling_async.simulator import faults
from xiling_async.simulator.faults import Fault
from xiling_async.simulator.media.faults import HASHED_BY_DIRECTIVE_BYTES

_DIRECTIVE = re.compile(r"\[sim:([^\]=]*)(?:=([^\]]*))?\]")


def _plain(make: Callable[[], Fault]) -> Callable[[str | None], Fault]:
    """A directive that takes no value."""

    def read(value: str | None) -> Fault:
        if value is not None:
            raise ValueError(value)
        return make()

    return read


def _needed(make: Callable[[str], Fault]) -> Callable[[str | None], Fault]:
    """A directive that needs a value."""

    def read(value: str | None) -> Fault:
        if not value:
            raise ValueError(value)
        return make(value)

    return read


def _optional(make: Callable[[str], Fault], plain: Callable[[], Fault]) -> Callable[[str | None], Fault]:
    """A directive with a value or without."""
    return lambda value: make(value) if value else plain()


def _big_media(value: str) -> Fault:
    size = int(value)
    return faults.big_media(size, hashed=size <= HASHED_BY_DIRECTIVE_BYTES)


def _media_redirect(value: str) -> Fault:
    return faults.media_redirect(times=int(value)) if value.isdecimal() else faults.media_redirect(value)


def _slow_media(value: str) -> Fault:
    chunk, _, seconds = value.partition(",")
    return faults.slow_media(int(chunk), float(seconds))


DIRECTIVES: dict[str, Callable[[str | None], Fault]] = {
    "business_error": _needed(lambda value: faults.business_error(int(value), "Business error")),
    "callback_retry": _needed(lambda value: faults.callback_retry(int(value))),
    "drop_after_accept": _plain(faults.drop_after_accept),
    "drop_before_read": _plain(faults.drop_before_read),
    "drop_mid_answer": _plain(faults.drop_mid_answer),
    "duplicate_callback": _optional(lambda value: faults.duplicate_callback(int(value)), faults.duplicate_callback),
    "early_callback": _plain(faults.early_callback),
    "failed": _optional(faults.failed, faults.failed),
    "garbage": _plain(faults.garbage),
    "hang": _optional(lambda value: faults.hang(float(value)), faults.hang),
    "hang_before_accept": _plain(faults.hang_before_accept),
    "ids": _needed(lambda value: faults.ids(int(value))),
    "latency": _needed(lambda value: faults.latency(float(value))),
    "lost_callback": _plain(faults.lost_callback),
    "no_status_endpoint": _plain(faults.no_status_endpoint),
    "out_of_order": _plain(faults.out_of_order),
    "progress_callback": _plain(faults.progress_callback),
    "rate_limited": _optional(lambda value: faults.rate_limited(float(value)), faults.rate_limited),
    "status": _needed(lambda value: faults.status(int(value))),
    "status_fault": _needed(lambda value: faults.status_fault(*map(int, value.split(",")))),
    # of the result files
    "big_media": _needed(_big_media),
    "changing_media": _plain(faults.changing_media),
    "cut_media": _needed(lambda value: faults.cut_media(int(value))),
    "gzip_media": _plain(faults.gzip_media),
    "media_gone": _optional(lambda value: faults.media_gone(int(value), fresh_url=True), faults.media_gone),
    "media_redirect": _optional(_media_redirect, faults.media_redirect),
    "media_status": _needed(lambda value: faults.media_status(*map(int, value.split(",")))),
    "no_etag": _plain(faults.no_etag),
    "no_hash": _plain(faults.no_hash),
    "no_length": _plain(faults.no_length),
    "no_ranges": _plain(faults.no_ranges),
    "slow_media": _needed(_slow_media),
    "stalled_media": _needed(lambda value: faults.stalled_media(int(value))),
    "wrong_hash": _plain(faults.wrong_hash),
    "wrong_length": _needed(lambda value: faults.wrong_length(int(value))),
}


def read_directives(prompt: str) -> tuple[Fault, ...]:
    """The faults this prompt asks for, in its order.

    Raises:
        ValueError: an unknown directive, or a value it cannot use; the message names the known ones.
    """
    given: list[Fault] = []
    for name, value in ((match[1], match[2]) for match in _DIRECTIVE.finditer(prompt)):
        if name not in DIRECTIVES:
            raise ValueError(f"unknown directive {name!r}; known are {', '.join(DIRECTIVES)}")
        try:
            given.append(DIRECTIVES[name](value))
        except ValueError:
            raise ValueError(f"directive {name!r} cannot use {value!r}; known are {', '.join(DIRECTIVES)}") from None
    return tuple(given)
