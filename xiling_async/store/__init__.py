"""What a store promises (base.py), and who keeps it."""

from xiling_async.store.base import Store
from xiling_async.store.memory import MemoryStore

__all__ = ["MemoryStore", "Store"]
