"""`xiling receive`: a process that only takes callbacks, so that submitters may come and go."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack, ExitStack, suppress
from typing import Annotated, Final

import typer
from rich.console import Console

from xiling_async.cli import output, runtime
from xiling_async.cli.output import count
from xiling_async.cli.runtime import terminated
from xiling_async.jobs.callbacks import CallbackWorker
from xiling_async.stores import PostgresStore
from xiling_async.telemetry.events import CallbackRefused, CallbackTaken, Event
from xiling_async.webhooks.options import ReceiverOptions
from xiling_async.webhooks.receiver import WebhookReceiver

NOT_FOUND: Final = "not_found"


def receive(
    *,
    store: Annotated[str, typer.Option(metavar="URL", help="postgresql://…, the store that the submitters share.")],
    public_url: Annotated[
        str, typer.Option(metavar="URL", help="Where the service reaches this process; the submitters' own setting.")
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where to listen; 0 takes a free one.")] = 8080,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 for all of this machine.")] = "127.0.0.1",
    trusted_proxies: Annotated[
        int, typer.Option(min=0, help="How many proxies of yours a callback passes (X-Forwarded-For).")
    ] = 0,
) -> None:
    """Take callbacks for clients elsewhere, and nothing else.

    Every client with the same --store and public URL is woken by what arrives here, on whichever machine it waits. No
    API key is needed; callbacks that never come are asked about by the clients. Keep the database's password out of
    the command line: PGPASSWORD and ~/.pgpass are read. A secret of your own is read from XILING_WEBHOOK_SECRET; else
    the one of the store is used. GET /healthz answers 200 while it listens, also while the database is away: a
    callback is then answered 503, and comes again. SIGTERM or Ctrl-C ends it cleanly, with a summary.

    \b
    Example, for workers whose receivers have the same public URL:
      xiling receive --port 8080 --store postgresql://me@db/videos \\
          --public-url https://media.example.com/xiling
    """
    if not store.startswith(("postgresql://", "postgres://")):
        raise typer.BadParameter(
            "must be postgresql://…, the store that the submitters share: a SQLite file serves one process, and memory "
            "none but its own. Nothing was started.",
            param_hint="--store",
        )
    for option, value in (("--public-url", public_url), ("--host", host)):
        if not value.strip():  # a blank host would be every address of this machine
            raise typer.BadParameter("must not be blank. Nothing was started.", param_hint=option)
    receiver = WebhookReceiver(
        public_url, host=host, port=port, options=ReceiverOptions(trusted_proxies=trusted_proxies)
    )
    # SIGINT: runtime.run cancels `serve`, which writes its summary, and raises this.
    with output.logged_errors(output.console(stderr=True)), suppress(KeyboardInterrupt):
        runtime.run(_until_terminated(receiver, PostgresStore(store)))


async def _until_terminated(receiver: WebhookReceiver, store: PostgresStore) -> None:
    await serve(receiver, store, output.console(), terminated())


async def serve(receiver: WebhookReceiver, store: PostgresStore, out: Console, stop: asyncio.Event) -> None:
    """Take callbacks and tell of each, until `stop` is set. Raises `ConfigurationError`, `StoreError`: it cannot."""
    taken: Counter[str] = Counter()
    refused: Counter[str] = Counter()

    def on_event(event: Event) -> None:
        match event:
            case CallbackTaken():
                taken[event.result] += 1
                output.say(out, f"callback of {event.task_id} (job {event.job_id}): {event.result}")
            case CallbackRefused(reason=reason):
                refused[reason] += 1
                not_found = refused[NOT_FOUND]
                if reason == NOT_FOUND and not_found & (not_found - 1) == 0:  # a flood must not flood the screen
                    output.say(
                        out,
                        f"{count(not_found, 'request')} answered 404, with no callback URL of this public URL and "
                        "secret: unknown senders, or submitters with other settings.",
                    )

    def sum_up() -> None:
        news = f"{count(taken.total(), 'callback')}, {taken['applied']} of them news"
        output.say(out, f"{news}; {count(refused.total(), 'request')} refused.")

    async with AsyncExitStack() as opened:
        ending = opened.enter_context(ExitStack())  # after the callbacks that are still being answered
        await opened.enter_async_context(CallbackWorker(receiver, store, on_event=on_event))
        ending.callback(sum_up)
        output.say(out, f"Callbacks for {receiver.public_url} go into {store}; Ctrl-C ends it.")
        output.say(out, f"Listening on port {receiver.port}.")
        await stop.wait()
