"""What all parts of one client share."""

from __future__ import annotations

from random import Random

from attrs import field, frozen

from xiling_async._internal.clock import Clock
from xiling_async.models.settings import Limits, Polling, Timeouts
from xiling_async.telemetry.stats import UNWATCHED, Monitor


@frozen(kw_only=True)
class Context:
    """The client's clock, settings, dice and statistics."""

    clock: Clock
    limits: Limits = field(factory=Limits)
    timeouts: Timeouts = field(factory=Timeouts)
    polling: Polling = field(factory=Polling)
    dice: Random = field(factory=Random)
    monitor: Monitor = UNWATCHED
