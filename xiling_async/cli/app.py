"""The commands put together; every error becomes one line and an exit code here, and nowhere else.

| exit code | means |
| --: | --- |
| 0 | done |
| 1 | it failed, or it is uncertain whether it succeeded: one line on stderr says why |
| 2 | the options, the environment (no API key) or the request are wrong: nothing was sent; or an extra is missing |
| 3 | it is still running: only the wait is over |
| 130 | stopped by Ctrl-C |
"""

from __future__ import annotations

import atexit
import functools
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Final, ParamSpec

import typer
from typer.core import TyperGroup
from typer.main import get_command

from xiling_async.cli.output import printable
from xiling_async.cli.report import Failures, code_of, message_of
from xiling_async.errors import XilingError

P = ParamSpec("P")

# A new command is one more line here: its name is that of a function in the module; its line of `xiling --help` is the
# first one of that function's docstring. A module is imported when its command is used.
COMMANDS: Final = {
    "demo": ("demo.command", "Watch jobs being delivered while all kinds of things go wrong."),
    "simulate": ("commands.simulate", "Run the service in miniature for your own development."),
    "submit": ("commands.submit", "Buy one job; print the URLs of its videos or download them."),
    "batch": ("batch.command", "Buy every row of a file, and keep the results in a folder."),
    "wait": ("commands.wait", "Wait for jobs that were bought before."),
    "download": ("commands.download", "Download the results of tasks that have ended."),
    "jobs": ("commands.jobs", "List the jobs that a store remembers, the newest last."),
    "purge": ("commands.purge", "Forget jobs that ended long ago, and give their space back."),
    "resolve": ("commands.resolve", "Say by hand what an uncertain job has bought."),
    "receive": ("commands.receive", "Take callbacks for clients elsewhere, and nothing else."),
}
# No rich markup: help and usage errors are the same plain text everywhere, also piped and in 80 columns.
_PLAIN: Final[dict[str, Any]] = {"pretty_exceptions_enable": False, "rich_markup_mode": None}
_HELP: Final[dict[str, Any]] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _Commands(TyperGroup):
    """The commands by their lines of help; the one that is used is imported."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if name in COMMANDS:
            module, _ = COMMANDS[name]
            only = typer.Typer(add_completion=False, context_settings=_HELP, **_PLAIN)
            only.command(name)(_one_line(getattr(import_module(f"xiling_async.cli.{module}"), name)))
            self.add_command(get_command(only), name)
        return super().resolve_command(ctx, args)


def _one_line(command: Callable[P, None]) -> Callable[P, None]:
    """The same command, whose errors are one line on stderr and an exit code."""

    @functools.wraps(command)
    def run(*args: P.args, **options: P.kwargs) -> None:
        try:
            command(*args, **options)
        except XilingError as error:
            _stop(message_of(error), code_of(error))
        except Failures as several:
            _stop("\nxiling: ".join(map(message_of, several.errors)), min(map(code_of, several.errors)))
        except OSError as error:
            _stop(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
        except KeyboardInterrupt as interrupt:
            _stop(str(interrupt) or "stopped", 130)

    return run


def _stop(message: str, code: int) -> None:
    typer.echo("\n".join(map(printable, f"xiling: {message}".split("\n"))), err=True)
    raise typer.Exit(code)


def _show_version(wanted: bool) -> None:  # noqa: FBT001 - typer's own way to call it
    if not wanted:
        return
    try:
        number = version("xiling-async")
    except PackageNotFoundError:  # run from a source tree
        number = "(version unknown: not installed)"
    typer.echo(f"xiling-async {number}")
    raise typer.Exit


def _root(
    context: typer.Context,
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Generated videos from the Xiling (Keevx) API, awaited; no paid job lost, none paid for twice.

    \b
    Example, without an account:
      xiling demo
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app = typer.Typer(name="xiling", cls=_Commands, context_settings=_HELP, **_PLAIN)
app.callback(invoke_without_command=True)(_root)
for _name, (_, _line) in COMMANDS.items():
    app.command(_name, help=_line)(lambda: None)


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point `xiling`. `arguments`: else those of the process's command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what an old terminal cannot write becomes "?", not a traceback
            stream.reconfigure(errors="replace")
    try:
        app(arguments, prog_name="xiling")
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        if arguments is None:
            _end_at_once_on_signal()


def _end_at_once_on_signal() -> None:
    """From here on the process only ends: another Ctrl-C must not become a traceback, nor another exit code."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # the interpreter's end takes handlers away
