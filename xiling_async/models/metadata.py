"""Metadata of a job: the caller's own words for it, text by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from xiling_async._internal.redact import shown
from xiling_async.errors import InvalidRequest, Problem

METADATA_BYTES: Final = 16 * 1024  # of all names and values together, as UTF-8
NO_METADATA: Final[Mapping[str, str]] = MappingProxyType({})


def checked_metadata(metadata: Mapping[str, str] | None) -> Mapping[str, str]:
    """A copy of it. Raises `InvalidRequest`, which names every problem, for what is not text by name,
    or holds more than 16 KiB."""
    if metadata is None:
        return NO_METADATA
    if not isinstance(metadata, Mapping):
        raise InvalidRequest(
            f'metadata must map text to text, such as {{"user": "42"}}, not {type(metadata).__name__}. '
            "Nothing was sent."
        )
    problems = [problem for name, value in metadata.items() for problem in _problems(name, value)]
    if not problems:
        size = sum(len(name.encode()) + len(value.encode()) for name, value in metadata.items())
        if size > METADATA_BYTES:
            problems.append(Problem(
                field="metadata", value=None, rule=f"has {size:,} bytes", accepted=f"at most {METADATA_BYTES:,} in all",
            ))  # fmt: skip
    if problems:
        raise InvalidRequest.of("metadata", problems)
    return dict(metadata)


def _problems(name: object, value: object) -> list[Problem]:
    if not isinstance(name, str) or not name:
        return [Problem(field="metadata", value=None, rule=f"the name {shown(name)} is not text", accepted="text")]
    field = f"metadata[{name[:100]!r}]"
    if not isinstance(value, str):
        rule = f"must be text, not {type(value).__name__}"
        return [Problem(field=field, value=value, rule=rule, accepted="text")]
    if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in name + value):
        rule = "holds a NUL or half a surrogate pair"
        return [Problem(field=field, value=None, rule=rule, accepted="other Unicode text")]
    return []
