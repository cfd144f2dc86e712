"""Where a database is, and what of that may be shown."""

from __future__ import annotations

import re
from typing import Final, TypeVar
from urllib.parse import parse_qs, unquote

from xiling_async.errors import ConfigurationError

E = TypeVar("E", bound=BaseException)

_DSN: Final = re.compile(
    r"postgres(?:ql)?://(?:(?P<user>[^@/?#\s]*)@)?"
    r"(?P<place>(?:[\w.%-]*|\[[\da-fA-F:.]+\])(?::\d+)?(?:,(?:[\w.%-]*|\[[\da-fA-F:.]+\])(?::\d+)?)*"
    r"(?:/[^@?#\s]*)?)(?:\?(?P<options>[^@#\s]*))?"
)


class Address:
    """A DSN, the part of it that may be shown (`name`), and the secrets in it. Raises `ConfigurationError`, which shows
    nothing of the DSN."""

    def __init__(self, dsn: str) -> None:
        parts = _DSN.fullmatch(dsn) if isinstance(dsn, str) else None
        if parts is None:
            del dsn  # a traceback may be shown with the variables of its frames
            raise ConfigurationError(
                "dsn must be postgresql://user:password@host:port/database?sslmode=..., with special characters of "
                "user, password and options percent-encoded (@ is %40). It is not shown here: it may hold a password."
            )
        self.dsn = dsn
        self.name = f"PostgreSQL at {unquote(parts['place']) or 'its default place'}"
        words = [(parts["user"] or "").partition(":")[2]]
        options = parse_qs(parts["options"] or "")
        words += [word for name in ("password", "sslpassword") for word in options.get(name, [])]
        self.secrets = tuple({word for raw in words for word in (raw, unquote(raw)) if word})


def without_frames(error: E) -> E:
    """The same exception, whose chain no longer refers to the frames it came through: those of the driver hold the DSN
    and the password in their variables, which some programs print with a traceback."""
    chain: list[BaseException | None] = [error]
    seen: set[int] = set()
    while chain:
        link = chain.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            link.__traceback__ = None
            chain += [link.__cause__, link.__context__]
    return error
