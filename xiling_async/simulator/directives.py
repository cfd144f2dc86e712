"""Faults requested over HTTP: `[sim:name]` and `[sim:name=value]` in a prompt, read into the vocabulary."""

import re
from collections.abc import Callable

from xiling_async.simulator import faults
from xiling_async.simulator.scripts import Fault, Script

_DIRECTIVE = re.compile(r"\[sim:([^\]=]*)(?:=([^\]]*))?\]")
# Above this size the md5 of a generated body takes longer than a request should wait.
HASHED_BYTES = 64 * 1024 * 1024

WITHOUT_VALUE: dict[str, Fault] = {
    fault.name: fault
    for fault in (
        faults.changing_media(),
        faults.drop_after_accept(),
        faults.drop_before_read(),
        faults.drop_mid_answer(),
        faults.duplicate_callback(),
        faults.early_callback(),
        faults.failed(),
        faults.garbage(),
        faults.gzip_media(),
        faults.hang(),
        faults.hang_before_accept(),
        faults.lost_callback(),
        faults.media_gone(),
        faults.media_redirect(),
        faults.no_etag(),
        faults.no_hash(),
        faults.no_length(),
        faults.no_ranges(),
        faults.no_status_endpoint(),
        faults.out_of_order(),
        faults.progress_callback(),
        faults.rate_limited(),
        faults.wrong_hash(),
    )
}


def _big_media(value: str) -> Fault:
    size = int(value)
    return faults.big_media(size, hashed=size <= HASHED_BYTES)


def _media_redirect(value: str) -> Fault:
    return faults.media_redirect(times=int(value)) if value.isdecimal() else faults.media_redirect(value)


def _slow_media(value: str) -> Fault:
    chunk, _, seconds = value.partition(",")
    return faults.slow_media(int(chunk), float(seconds))


WITH_VALUE: dict[str, Callable[[str], Fault]] = {
    "big_media": _big_media,
    "business_error": lambda value: faults.business_error(int(value), "Business error"),
    "callback_retry": lambda value: faults.callback_retry(int(value)),
    "cut_media": lambda value: faults.cut_media(int(value)),
    "duplicate_callback": lambda value: faults.duplicate_callback(int(value)),
    "failed": faults.failed,
    "hang": lambda value: faults.hang(float(value)),
    "ids": lambda value: faults.ids(int(value)),
    "latency": lambda value: faults.latency(float(value)),
    "media_gone": lambda value: faults.media_gone(int(value), new_url=True),
    "media_redirect": _media_redirect,
    "media_status": lambda value: faults.media_status(*map(int, value.split(","))),
    "rate_limited": lambda value: faults.rate_limited(float(value)),
    "slow_media": _slow_media,
    "stalled_media": lambda value: faults.stalled_media(int(value)),
    "status": lambda value: faults.status(int(value)),
    "status_fault": lambda value: faults.status_fault(*map(int, value.split(","))),
    "wrong_length": lambda value: faults.wrong_length(int(value)),
}
DIRECTIVES = tuple(sorted(WITHOUT_VALUE.keys() | WITH_VALUE.keys()))


def read_directives(prompt: str) -> Script:
    """The faults that this prompt requests, in its order.

    Raises:
        ValueError: an unknown directive, or a value it cannot use; the message lists the known ones.
    """
    return tuple(_fault(match[1], match[2] or "") for match in _DIRECTIVE.finditer(prompt))


def _fault(name: str, value: str) -> Fault:
    known = f"known are {', '.join(DIRECTIVES)}"
    if name not in DIRECTIVES:
        raise ValueError(f"unknown directive {name!r}; {known}")
    try:
        return WITH_VALUE[name](value) if value else WITHOUT_VALUE[name]
    except (KeyError, ValueError):
        raise ValueError(f"directive {name!r} cannot use {value!r}; {known}") from None
