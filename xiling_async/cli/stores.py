"""The stores that a command can name: the SQLite file of `--store`, or a PostgreSQL database."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xiling_async.errors import StoreError
from xiling_async.stores import PostgresStore, SQLiteStore, Store

AnyStoreOption = Annotated[
    str, typer.Option(metavar="FILE|URL", help="The SQLite file of --store of the other commands, or postgresql://…")
]


def existing_store(name: str, *, read_only: bool) -> Store:
    """The store of this name; one that is not there is not made. Raises `StoreError`."""
    if name.startswith(("postgresql://", "postgres://")):
        return PostgresStore(name, migrate=False)
    file = Path(name)
    if not file.is_file() or not file.stat().st_size:
        raise StoreError(f"{name} is not a store: {'it is empty' if file.is_file() else 'there is no such file'}.")
    return SQLiteStore(file, read_only=read_only)
