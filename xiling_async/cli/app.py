"""The commands put together; every error becomes one line and an exit code here, and nowhere else.

| exit code | means |
| --: | --- |
| 0 | done |
| 1 | it failed, or it is uncertain whether it succeeded: one line on stderr says why |
| 2 | not understood, or the request breaks rules (a line each): nothing was sent; or the extra `[cli]` is missing |
| 3 | it is still running: only the wait is over |
| 130 | stopped by Ctrl-C |
"""

import functools
import io
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Final, ParamSpec

import typer

from xiling_async.cli import report
from xiling_async.cli.batch.command import batch
from xiling_async.cli.commands.download import download
from xiling_async.cli.commands.jobs import jobs
from xiling_async.cli.commands.receive import receive
from xiling_async.cli.commands.simulate import simulate
from xiling_async.cli.commands.submit import submit
from xiling_async.cli.commands.wait import wait
from xiling_async.cli.demo.command import demo
from xiling_async.cli.output import printable
from xiling_async.errors import XilingError

P = ParamSpec("P")

# A new command is one more function here: its name is the command's, its docstring the help (with an example).
COMMANDS: Final[tuple[Callable[..., None], ...]] = (demo, simulate, submit, batch, wait, download, jobs, receive)


def _one_line(command: Callable[P, None]) -> Callable[P, None]:
    """The same command, whose errors are one line on stderr and an exit code."""

    @functools.wraps(command)
    def run(*args: P.args, **options: P.kwargs) -> None:
        try:
            command(*args, **options)
        except XilingError as error:
            _stop(report.words_of(error), report.code_of(error))
        except report.Failures as several:
            _stop("\nxiling: ".join(map(report.words_of, several.errors)), min(map(report.code_of, several.errors)))
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


# No rich markup: help and usage errors are the same plain text everywhere, also piped and in 80 columns.
app = typer.Typer(
    name="xiling", add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)  # fmt: skip
app.callback(invoke_without_command=True)(_root)
for _command in COMMANDS:
    app.command()(_one_line(_command))


def main(words: Sequence[str] | None = None) -> None:
    """The entry point `xiling`. `words`: else those of the process's command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what an old terminal cannot write becomes "?", not a traceback
            stream.reconfigure(errors="replace")
    app(words, prog_name="xiling")
