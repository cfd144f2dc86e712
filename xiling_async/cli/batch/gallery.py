"""The page to look at: every clip of a batch in one HTML file beside the media, which needs nothing from elsewhere.

Everything in it is untrusted text: Jinja escapes it, and the page's own policy lets nothing run but the script
that is part of it. Signed URLs are not in it: they are secrets, and they end.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Final
from urllib.parse import quote

from attrs import field, frozen
from jinja2 import Environment, PackageLoader, StrictUndefined

from xiling_async._internal.redact import scrub
from xiling_async.cli.batch.files import is_own, open_own

NAME: Final = "index.html"
MARK: Final = b'<meta name="generator" content="xiling-async">'
_MARK_WITHIN_BYTES: Final = 4096


class Status(StrEnum):
    """What became of a clip, in the word that the page has for it; the order is that of a clip's life."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    UNSAVED = "not saved"  # made and paid for, but its file is not here
    FAILED = "failed"
    UNCERTAIN = "uncertain"
    REFUSED = "not bought"


_OPEN: Final = frozenset({Status.WAITING, Status.RUNNING})


class Phase(StrEnum):
    """Where the batch stands; only the page of a running one looks for a newer page."""

    RUNNING = "running"
    STOPPED = "stopped"
    FINISHED = "finished"


@frozen(kw_only=True)
class Clip:
    """One clip: a task, or a row that has none yet. `file` and `thumbnail` are names of files beside the page.

    `line`: of the jobs file. `ended_at`: Unix seconds. `message`: why there is no clip.
    """

    line: int
    key: str
    prompt: str
    model: str
    parameters: tuple[str, ...] = ()
    status: Status = Status.WAITING
    job_id: str = ""
    task_id: str = ""
    file: str = ""
    thumbnail: str = ""
    duration_s: float | None = None
    ended_at: float | None = None
    message: str = field(default="", converter=scrub)


@frozen(kw_only=True)
class Page:
    """All that is on the page. `written_at`: Unix seconds; `note`: a sentence for people, such as how to go on."""

    title: str
    clips: Sequence[Clip]
    phase: Phase
    written_at: float
    note: str = ""


def html_of(page: Page) -> str:
    """The whole page."""
    written = datetime.fromtimestamp(page.written_at, UTC)
    return _PAGE.render(
        page=page,
        clips=page.clips,
        over=sum(clip.status not in _OPEN for clip in page.clips),
        statuses=_counted((clip.status for clip in page.clips), list(Status)),
        models=_counted((clip.model for clip in page.clips), sorted({clip.model for clip in page.clips})),
        written=f"{written:%Y-%m-%d %H:%M:%S} UTC",
        policy=_POLICY,
        style=_STYLE,
        script=_SCRIPT,
    )


def write(page: Page, folder: Path) -> None:
    """Put the page into this folder; who opens it sees the old page or the new one, whole. It blocks."""
    part = folder / f".{NAME}.part"  # always this name: what a killed process has left is written over
    with open(open_own(part, os.O_WRONLY | os.O_CREAT), "wb") as file:  # noqa: PTH123 - a descriptor
        file.truncate()
        file.write(html_of(page).encode(errors="replace"))
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / NAME)


def is_foreign(folder: Path) -> bool:
    """Whether there is a page that another program made; blocks."""
    try:
        if not is_own(folder / NAME):
            return True
        with (folder / NAME).open("rb") as file:
            return MARK not in file.read(_MARK_WITHIN_BYTES)
    except FileNotFoundError:
        return False


def _counted(items: Iterable[str], order: Sequence[str]) -> list[tuple[str, int]]:
    """How often each of these occurs, without those that are not."""
    numbers = Counter(items)
    return [(name, numbers[name]) for name in order if numbers[name]]


def _beside(name: str) -> str:
    """The relative URL of a file beside the page: whatever its name is, it is a name and nothing else."""
    return "./" + quote(os.fsencode(name), safe="")


def _seconds(duration_s: float) -> str:
    return f"{duration_s:.3g} s"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


_LOADER: Final = PackageLoader("xiling_async.cli.batch")
_TEMPLATES: Final = Environment(
    loader=_LOADER, autoescape=True, undefined=StrictUndefined, trim_blocks=True,
    lstrip_blocks=True,
)  # fmt: skip
_TEMPLATES.filters |= {"beside": _beside, "seconds": _seconds}
_PAGE: Final = _TEMPLATES.get_template("gallery.html")


def _own(name: str) -> str:
    """A file of ours, as it is. Newlines are those that a browser hashes."""
    source, _, _ = _LOADER.get_source(_TEMPLATES, name)
    return source.replace("\r\n", "\n")


_STYLE: Final = _own("gallery.css")
_SCRIPT: Final = _own("gallery.js")
_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "img-src 'self' file:",  # file: the page is opened from the disk
        "media-src 'self' file:",
        f"style-src {_hash(_STYLE)}",
        f"script-src {_hash(_SCRIPT)}",
        "base-uri 'none'",
        "form-action 'none'",
    )
)
