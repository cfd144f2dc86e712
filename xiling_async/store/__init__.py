"""What a store promises (base.py), and who keeps it."""

from xiling_async.store.base import Store
from xiling_async.store.memory import MemoryStore
from xiling_async.store.postgres import PostgresStore
from xiling_async.store.sqlite import SQLiteStore

__all__ = ["MemoryStore", "PostgresStore", "SQLiteStore", "Store"]
