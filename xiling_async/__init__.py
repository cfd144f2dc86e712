"""Await a generated video as you would await a socket: an asyncio client for the Xiling (Keevx) API.

Never lose a job that was paid for, never pay for one twice. Begin with `Client` and `ImageToVideo`.
"""

import logging

from xiling_async.client import Client
from xiling_async.errors import (
    ClientClosed,
    ConfigurationError,
    DownloadError,
    IntegrityError,
    InvalidRequest,
    LimitReached,
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
from xiling_async.jobs.job import Job
from xiling_async.jobs.map import Finished
from xiling_async.kinds import ImageToVideo, Video
from xiling_async.models.record import Failed, State, Succeeded
from xiling_async.models.request import Request
from xiling_async.models.settings import Limits, Polling, Timeouts
from xiling_async.stores import MemoryStore, PostgresOptions, PostgresStore, SQLiteStore, Store
from xiling_async.telemetry.stats import Stats
from xiling_async.webhooks.access_log import RedactCallbackTokens
from xiling_async.webhooks.handler import Reply
from xiling_async.webhooks.options import ReceiverOptions
from xiling_async.webhooks.receiver import WebhookReceiver

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
    "LimitReached",
    "Limits",
    "MemoryStore",
    "NotSent",
    "Polling",
    "PostgresOptions",
    "PostgresStore",
    "Problem",
    "ProtocolError",
    "RateLimited",
    "ReceiverOptions",
    "RedactCallbackTokens",
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
