"""`xiling simulate`: the service in miniature, in the foreground, for people who write code against it."""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
from contextlib import AsyncExitStack, suppress
from typing import Annotated, Final

import typer
from rich.console import Console

from xiling_async.cli import output, runtime
from xiling_async.cli.runtime import terminated
from xiling_async.errors import ConfigurationError
from xiling_async.simulator import CallbackRecord, Ledger, PostRecord, Simulator
from xiling_async.simulator.directives import DIRECTIVES, WITHOUT_VALUE

COUNTED: Final = (
    ("posts", "POST"), ("paid_submits", "paid submit"), ("tasks", "task"), ("callbacks", "callback"),
    ("gets", "status GET"),
)  # fmt: skip
WILDCARDS: Final = ("0.0.0.0", "::")  # noqa: S104 - recognised here, not listened on


def simulate(
    *,
    host: Annotated[
        str, typer.Option(help="Where to listen. Who reaches it can make it POST callbacks to any address.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8800,
    api_key: Annotated[str, typer.Option(help="The one key it accepts; it is shown, so do not use a real one.")] = (
        "sim-key"
    ),
    latency: Annotated[float, typer.Option(min=0, help="Seconds a generation takes.")] = 2.0,
) -> None:
    """Run the service in miniature for your own development.

    No account, no money. Directives in the prompt ask for faults, as in "waves at dawn [sim:latency=9]
    [sim:duplicate_callback]". Ctrl-C ends it with a summary.

    \b
    Example, then `export` what it prints in another shell:
      xiling simulate --port 8800 --latency 0.5
    """
    if not host.strip():  # asyncio would take it for every address of this machine
        raise typer.BadParameter("a name or an address is needed", param_hint="--host")
    # SIGINT: runtime.run cancels `serve`, which writes its summary, and raises this.
    with suppress(KeyboardInterrupt):
        runtime.run(_until_terminated(Simulator(api_key, host=host, port=port, latency=latency)))


async def _until_terminated(sim: Simulator) -> None:
    await serve(sim, output.console(), terminated())


async def serve(sim: Simulator, out: Console, stop: asyncio.Event) -> None:
    """Run the simulator and tell of what happens, until `stop` is set. Raises `ConfigurationError`: no such port."""
    async with AsyncExitStack() as opened:
        try:
            await opened.enter_async_context(sim)
        except (OSError, UnicodeError) as error:  # the latter: a name that cannot be one
            raise ConfigurationError(
                f"cannot listen on {sim.host}:{sim.port}: {_reason(error)}. Choose another --port; 0 takes a free one."
            ) from error
        opened.callback(_sum_up, sim.ledger, out)
        _greet(sim, out)
        async with asyncio.TaskGroup() as group:
            reporter = group.create_task(_report(sim.ledger, out))
            await stop.wait()
            reporter.cancel()


def _reason(error: OSError | UnicodeError) -> str:
    """asyncio wraps the system's words in its own; a name that is not known has no number of the system."""
    if isinstance(error, UnicodeError):
        return "no such host"
    if isinstance(error, socket.gaierror) or error.errno is None:
        return error.strerror or str(error)
    return os.strerror(error.errno)


def _greet(sim: Simulator, out: Console) -> None:
    base_url = sim.base_url
    for wildcard in WILDCARDS:
        if sim.host == wildcard:  # an address to listen on, not one to call
            base_url = f"http://127.0.0.1:{sim.port}/v1"
    output.say(out, f"Simulator at {base_url}, key {sim.api_key}; Ctrl-C ends it.")
    output.say(out, "")
    output.say_to_copy(out, f"  export XILING_BASE_URL={base_url} XILING_API_KEY={shlex.quote(sim.api_key)}")
    output.say(out, "")
    output.say(out, "A directive in a prompt asks for a fault:")
    output.listing(out, [_form(name) for name in DIRECTIVES])
    output.say(out, "")


def _form(name: str) -> str:
    """How a directive is written: with a value where it needs one."""
    return f"[sim:{name}]" if name in WITHOUT_VALUE else f"[sim:{name}=…]"


async def _report(ledger: Ledger, out: Console) -> None:
    """A line for each create and each callback, when it happens."""
    posts = callbacks = 0

    def has_news() -> bool:
        return len(ledger.posts) > posts or len(ledger.callbacks) > callbacks

    while True:
        await ledger.until(has_news)
        for post in ledger.posts[posts:]:
            output.say(out, _post(post))
        for callback in ledger.callbacks[callbacks:]:
            output.say(out, _callback(callback))
        posts, callbacks = len(ledger.posts), len(ledger.callbacks)


def _post(post: PostRecord) -> str:
    """A create. Its prompt, headers and callback URL are the caller's own: not for a screen."""
    answer = "no answer" if post.status is None else f"HTTP {post.status}"
    faults = f"  ({', '.join(post.faults)})" if post.faults else ""
    return f"create #{post.number}: {'paid' if post.paid else 'not paid'}, {answer}  {' '.join(post.task_ids)}{faults}"


def _callback(callback: CallbackRecord) -> str:
    answer = "no answer" if callback.status is None else f"HTTP {callback.status}"
    return f"callback of {callback.task_id}: {callback.state}, {answer}"


def _sum_up(ledger: Ledger, out: Console) -> None:
    counts = ledger.summary()
    output.say(out, "")
    output.say(
        out,
        ", ".join(output.count(counts[name], noun) for name, noun in COUNTED),
    )
