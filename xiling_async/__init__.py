"""Await a generated video as you would await a socket: an asyncio client for the Xiling (Keevx) API.

Never lose a job that was paid for, never pay for one twice. Begin with `Client` and `ImageToVideo`.
"""

import logging

from xiling_async.client import Client
from xiling_async.door import ReceiverLimits, Reply
from xiling_async.errors import (
    ClientClosed,
    ConfigurationError,
    DownloadError,
    IntegrityError,
    InvalidRequest,
    NotSent,
    Problem,
    ProtocolError,
    RateLimited,
    Rejected,
    ResultExpired,
    ServiceError,
    ServiceUnavailable,
    StoreError,
    SubmitUncertain,
    TaskFailed,
    Unauthorized,
    WaitTimeout,
    XilingError,
)
from xiling_async.fanout import Finished
from xiling_async.job import Job
from xiling_async.kinds import ImageToVideo, Video
from xiling_async.models import Failed, Limits, Polling, Request, State, Succeeded, Timeouts
from xiling_async.monitor import Stats
from xiling_async.receiver import WebhookReceiver
from xiling_async.store import MemoryStore, PostgresStore, SQLiteStore, Store

__all__ = [
    "Client",
    "ClientClosed",
    "ConfigurationError",
    "DownloadError",
    "Failed",
    "Finished",
    "ImageToVideo",
    "IntegrityError",
    "InvalidRequest",
    "Job",
    "Limits",
    "MemoryStore",
    "NotSent",
    "Polling",
    "PostgresStore",
    "Problem",
    "ProtocolError",
    "RateLimited",
    "ReceiverLimits",
    "Rejected",
    "Reply",
    "Request",
    "ResultExpired",
    "SQLiteStore",
    "ServiceError",
    "ServiceUnavailable",
    "State",
    "Stats",
    "Store",
    "StoreError",
    "SubmitUncertain",
    "Succeeded",
    "TaskFailed",
    "Timeouts",
    "Unauthorized",
    "Video",
    "WaitTimeout",
    "WebhookReceiver",
    "XilingError",
]

logging.getLogger("xiling_async").addHandler(logging.NullHandler())
