"""For your own tests: clocks, and the fixtures of the pytest plugin (pytest_plugin.py)."""

from xiling_async.testing.clock import ManualClock, SkippingClock

__all__ = ["ManualClock", "SkippingClock"]
