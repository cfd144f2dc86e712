"""Buying and awaiting: engine, registry, submission, poller, callbacks, job, map, auto-save."""
