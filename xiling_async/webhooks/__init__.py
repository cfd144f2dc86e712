"""Callbacks in: receiver, tokens, handler, limits, own server, ASGI."""
