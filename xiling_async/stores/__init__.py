"""What a store promises (base.py), and who keeps it."""

from xiling_async.stores.base import Store
from xiling_async.stores.memory import MemoryStore
from xiling_async.stores.postgres.options import PostgresOptions
from xiling_async.stores.postgres.store import PostgresStore
from xiling_async.stores.sqlite import SQLiteStore

__all__ = ["MemoryStore", "PostgresOptions", "PostgresStore", "SQLiteStore", "Store"]
