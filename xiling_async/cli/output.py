"""What every command writes with: the terminal, lines of text, and untrusted text made harmless."""

from __future__ import annotations

import logging
import os
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

WIDEST: Final = 100  # columns: a wider table only moves its columns apart
REPAINT_S: Final = 0.1
STYLES: Final = {
    "sending": "dim", "uncertain": "yellow", "accepted": "cyan", "done": "green", "failed": "magenta", "problem": "red",
}  # fmt: skip
_UNSAFE: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})  # Unicode categories
_BREAKS: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})  # those that would end a line, or cannot be encoded


def printable(text: str, unsafe: frozenset[str] = _UNSAFE) -> str:
    """Untrusted text, as one line that cannot move a cursor, colour, hide or reverse anything:
    each control character is written as its escape, such as `\\x1b`."""
    if text.isprintable():
        return text
    return "".join(
        one.encode("unicode_escape").decode() if unicodedata.category(one) in unsafe else one for one in text
    )


class _Output(Console):
    """Standard output, or stderr, on which text is only text. A reader may go away (`| head`): the work goes on."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Everything that is printed comes through here: styles and cursor moves of our own stay, text is escaped."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                text = "\n".join(printable(line) for line in segment.text.split("\n"))
                yield Segment(text, segment.style)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, self.file.fileno())  # what is still buffered is written at the process's end
        os.close(devnull)


def console(*, stderr: bool = False) -> Console:
    """Standard output, or stderr; rich looks at the terminal, NO_COLOR and TERM."""
    return _Output(highlight=False, stderr=stderr)


def is_live(out: Console) -> bool:
    """Whether lines can be painted over. FORCE_COLOR asks for colour, not for that."""
    return out.is_interactive and out.file.isatty()


def say(out: Console, text: str, style: str = "") -> None:
    """One line; a terminal that is too narrow for it gets whole words."""
    out.print(Text(printable(text), style=style), soft_wrap=not is_live(out))


def say_to_copy(out: Console, text: str) -> None:
    """One line, however long it is."""
    out.print(Text(printable(text)), soft_wrap=True)


def write(out: Console, line: str) -> None:
    """One line for another program, neither wrapped nor cut; tabs stay. A terminal gets no other control character."""
    if out.quiet:
        return
    unsafe = _UNSAFE if out.file.isatty() else _BREAKS
    plain = "\t".join(printable(cell, unsafe) for cell in line.split("\t"))
    try:
        out.file.write(f"{plain}\n")
        out.file.flush()
    except BrokenPipeError:
        out.on_broken_pipe()


def count(number: int, noun: str) -> str:
    """As in "1 job", "2 jobs"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def clock_of(seconds: float) -> str:
    """As in 0:07, 12:30, 1:00:05."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _ErrorLines(logging.Handler):
    """What the library logs as an error, a line each."""

    def __init__(self, out: Console) -> None:
        super().__init__(logging.ERROR)
        self._out = out

    def emit(self, record: logging.LogRecord) -> None:
        say(self._out, record.getMessage())


@contextmanager
def logged_errors(out: Console) -> Iterator[None]:
    """Show what the library logs as an error: what could not be read or written, and is raised to no caller."""
    logger, handler = logging.getLogger("xiling_async"), _ErrorLines(out)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def listing(out: Console, items: Sequence[str]) -> None:
    """Words in lines that fit, a little to the right."""
    for line in textwrap.wrap("  ".join(items), width=min(out.width, WIDEST) - 2, break_on_hyphens=False):
        say(out, f"  {line}")
