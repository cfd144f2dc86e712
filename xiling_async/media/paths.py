"""Where a download goes, and what it is called: names are made of the user's words and the task's id alone.

Nothing of a URL or of a header gets into a name. A task id is the service's opaque text: what is not plain in it is
replaced, and a hash of all of it tells such names apart.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from attrs import frozen

from xiling_async.media.file_types import TYPES, UNKNOWN
from xiling_async.media.partial_file import SIDECAR, SUFFIX
from xiling_async.models.request import Media

_PLAIN: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,98}[A-Za-z0-9_-])?")
_STRANGE: Final = re.compile(r"[^A-Za-z0-9_-]")
_STEM_CHARACTERS: Final = 64
NAME_BYTES: Final = 255  # the longest name of a file on the usual file systems
# Devices on Windows, with any ending.
_RESERVED: Final = re.compile(r"(?i)(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?")


class NoTarget(ValueError):
    """Nothing can be written there; the message says why."""


def stem_of(task_id: str) -> str:
    """A name for this id that stays in its folder, on every system: the id itself where it is plain.

    Different ids have different names: `~` stands in no plain one.
    """
    if _PLAIN.fullmatch(task_id) and not _RESERVED.fullmatch(task_id):
        return task_id
    mark = hashlib.sha256(task_id.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{_STRANGE.sub('_', task_id)[:_STEM_CHARACTERS]}~{mark}"


def part_beside(target: Path) -> Path:
    """Where the partial file of this one is: the same place in every process. A name that is too long is cut, and told
    apart by its hash."""
    name = target.name
    room = NAME_BYTES - len(SUFFIX + SIDECAR)
    if len(os.fsencode(name)) > room:
        mark = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
        name = f"{os.fsencode(name)[: room - 17].decode('utf-8', 'ignore')}~{mark}"
    return target.with_name(name + SUFFIX)


@frozen(kw_only=True)
class Target:
    """Where a file goes. `name` is the user's own; None: `<stem>.<type>`, the type being that of the bytes.

    `folder` is absolute, and `as_written` the same folder as the caller wrote it. `other_types` are those that are
    not named so, because a file of that name would be another file of the result: they have `what` in their name.
    """

    folder: Path
    as_written: Path
    name: str | None
    stem: str
    what: str
    other_types: frozenset[str]

    @property
    def part(self) -> Path:
        return part_beside(self.folder / (f"{self.stem}.{self.what}" if self.name is None else self.name))

    def path(self, file_type: str | None) -> Path:
        """The file itself, when its bytes are of this type."""
        if self.name is not None:
            return self.folder / self.name
        file_type = file_type or UNKNOWN
        what = f"~{self.what}" if file_type in self.other_types else ""
        return self.folder / f"{self.stem}{what}.{file_type}"

    def in_the_way(self) -> Path | None:
        """What exists already where the file is to be, whatever the type of its bytes turns out to be; blocks."""
        paths = (self.path(file_type) for file_type in TYPES)
        return next((path for path in paths if os.path.lexists(path)), None)


def targets_of(
    to: str | os.PathLike[str], task_id: str, media: Mapping[str, Media], wanted: Sequence[str]
) -> list[Target]:
    """A target for each wanted file of `media` (all files of such a result), the first with the name that `to` says.

    `to` is a folder if there is one of this name, or if it ends in a separator; then it must exist, and the names are
    ours. Blocks. Raises `NoTarget`, `OSError`.
    """
    text: Any = os.fspath(to)
    try:
        if not isinstance(text, str) or not text or b"\0" in os.fsencode(text):
            raise NoTarget("it is not a path")
    except UnicodeError:  # half a surrogate pair: no name on this system
        raise NoTarget("it is not a path") from None
    path = Path(text)
    is_folder = text.endswith(tuple(filter(None, (os.sep, os.altsep)))) or path.is_dir()
    folder = path if is_folder else path.parent
    if not folder.is_dir():
        raise NoTarget(f"there is no folder {str(folder)!r}: make it first")
    name = None if is_folder else path.name
    stem = stem_of(task_id) if is_folder else path.stem
    return [
        Target(
            folder=folder.absolute(), as_written=folder, name=None if number else name, stem=stem, what=what,
            other_types=_other_types(media, what),
        )
        for number, what in enumerate(wanted)
    ]  # fmt: skip


def _other_types(media: Mapping[str, Media], what: str) -> frozenset[str]:
    """Each type belongs to the file of which it is documented, all others to the file that matters most."""
    main = next(iter(media))
    documented = {file_type for name, each in media.items() if name != main for file_type in each.types}
    return frozenset(documented) if what == main else frozenset(TYPES) - set(media[what].types)
