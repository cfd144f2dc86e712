"""Options of a PostgreSQL store that most programs leave as they are."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any, NoReturn

from attrs import field, frozen

from xiling_async.errors import ConfigurationError
from xiling_async.models.settings import as_number, type_name
from xiling_async.stores.postgres.schema import is_prefix


@frozen(kw_only=True)
class PostgresOptions:
    """Raises `ConfigurationError`.

    `table_prefix`: letters, digits, `_`. `pool_size`: connections; one more listens. `heartbeat_s`: how often an open
    store shows that it lives; after six without a sign, what it was sending becomes uncertain, and is never sent again.
    `owner`: the role that made the tables, if that is neither this role, nor the owner of the database, nor a
    superuser; tables of any other role are refused. `connect`: more arguments for `asyncpg.connect` (`ssl`, `timeout`,
    `command_timeout`, ...).

    Behind a pooler in session mode there is nothing to do. In transaction mode a pooler loses notifications and may
    lose prepared statements: give `listen_dsn`, a way to the same database that does not go through it, and
    `connect={"statement_cache_size": 0}`.
    """

    table_prefix: str = "xiling_"
    pool_size: int = 8
    heartbeat_s: float = 5.0
    owner: str | None = None
    listen_dsn: str | None = field(default=None, repr=False)  # may hold a password, as `connect` may
    connect: Mapping[str, Any] = field(factory=dict, repr=False)

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.table_prefix, str) or not is_prefix(self.table_prefix):
            raise ConfigurationError(
                f"table_prefix must be at most 40 letters, digits and _, not {self.table_prefix!r}."
            )
        if type(self.pool_size) is not int or self.pool_size < 1 or not (as_number(self.heartbeat_s) or 0) > 0:
            raise ConfigurationError("pool_size must be a number from 1, heartbeat_s one above 0.")
        if not isinstance(self.connect, Mapping):
            raise ConfigurationError(f"connect must be a mapping of options, not {type_name(self.connect)}.")
        if not isinstance(self.owner, (str, NoneType)):
            raise ConfigurationError("owner must be the name of a role.")

    def __reduce__(self) -> NoReturn:
        raise TypeError("PostgresOptions cannot be pickled: they may hold a password.")
