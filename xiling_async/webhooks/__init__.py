"""Callbacks in: receiver, tokens, handler, limits, own server, aiohttp, ASGI, access logs."""

from xiling_async.webhooks.access_log import RedactCallbackTokens

__all__ = ["RedactCallbackTokens"]
