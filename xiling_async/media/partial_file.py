"""The half file on the disk: `<name>.part`, and beside it what is known of it; no network, no loop.

The sidecar `<name>.part.json` says which result the bytes are of and what its host announced: never a URL, never a
secret. A part is held by a lock while it is written, so that no two downloads write the same one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import sys
from pathlib import Path
from typing import Final

from xiling_async.media import checksums
from xiling_async.media.file_types import HEAD_BYTES
from xiling_async.media.headers import Announced

if sys.platform != "win32":
    import fcntl

SUFFIX: Final = ".part"
SIDECAR: Final = ".json"
NAME_BYTES: Final = 255  # the longest name of a file on the usual file systems
# The system is told so often to begin writing: else it waits for the fsync at the end, and all the world with it.
FLUSH_BYTES: Final = 8 * 1024 * 1024
CATCH_UP_BYTES: Final = 8 * 1024 * 1024  # of an earlier process's bytes that are read again at a time
BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
_SIDECAR_BYTES: Final = 16 * 1024
_FORM: Final = 1
# Never through a link that somebody else has put there; absent on Windows.
_FLAGS: Final = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_FLAGS_HERE: Final = _FLAGS | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)


class Busy(Exception):
    """Another process writes this part now."""


def part_beside(target: Path) -> Path:
    """Where the half of this file is kept: the same place in every process. A name that is too long is cut, and told
    apart by its hash."""
    name = target.name
    room = NAME_BYTES - len(SUFFIX + SIDECAR)
    if len(os.fsencode(name)) > room:
        mark = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
        name = f"{os.fsencode(name)[: room - 17].decode('utf-8', 'ignore')}~{mark}"
    return target.with_name(name + SUFFIX)


class Part:
    """An open part. `size`: the bytes in it that count; `announced`: what is known of the file that they are of.

    Every method blocks and may raise `OSError`. `owner` says which result it is, in words of the sidecar.
    """

    def __init__(self, path: Path, descriptor: int, owner: str) -> None:
        self.path = path
        self.size = 0
        self.announced = Announced()
        self._descriptor = descriptor
        self._owner = owner
        self._digest: checksums.Digest | None = None
        self._digested = 0
        self._flushed = 0
        self._at = 0  # where the next byte would be written or read

    @classmethod
    def open(cls, path: Path, owner: str) -> Part:
        """The part at this path, held; with the bytes that an earlier download of the same result has left.

        Raises `Busy`, or `OSError`.
        """
        while True:
            descriptor = os.open(path, _FLAGS_HERE, 0o666)
            part = cls(path, descriptor, owner)
            try:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise OSError(errno.EEXIST, "something that is no file is in the way", str(path))
                _lock(descriptor)
                found = os.fstat(descriptor)
                if found.st_nlink == 1 and _is_still(path, descriptor):
                    part._take_over(found.st_size)
                    return part
                if found.st_nlink > 1:  # it is a whole file already: its placing was cut short by a kill
                    path.unlink(missing_ok=True)
            except BaseException:
                part._close()
                raise
            part._close()

    @property
    def sidecar(self) -> Path:
        return self.path.with_name(self.path.name + SIDECAR)

    # --- bytes ---------------------------------------------------------------------------------------------------

    def begin(self, announced: Announced) -> None:
        """Start over, with the file of which this is announced."""
        self.clear()  # first: no sidecar may ever stand beside bytes of another file
        self._expect(announced)
        self._write_sidecar()

    def go_on(self, announced: Announced) -> None:
        """Append to what is there; an answer to the request for the rest may have told more of the file."""
        if announced != self.announced:
            self._expect(announced)
            self._write_sidecar()

    def write(self, data: bytes | memoryview) -> None:
        """Append; on an error the part is as it was before."""
        rest = memoryview(data)
        try:
            if self._at != self.size:  # not each time: after each call into the system the interpreter is fought for
                self._at = os.lseek(self._descriptor, self.size, os.SEEK_SET)
            while rest:
                written = os.write(self._descriptor, rest)
                self._at += written
                rest = rest[written:]
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self.size)
            raise
        if self._digest is not None and self._digested == self.size:
            self._digest.update(data)
            self._digested += len(data)
        self.size += len(data)
        if self.size - self._flushed >= FLUSH_BYTES:
            _begin_writing(self._descriptor, self._flushed, self.size - self._flushed)
            self._flushed = self.size

    def catch_up(self) -> bool:
        """Work a little at the digest of bytes that were there before; whether there is more to do."""
        if self._digest is None or self._digested >= self.size:
            return False
        data = self._read(self._digested, min(CATCH_UP_BYTES, self.size - self._digested))
        self._digest.update(data)
        self._digested += len(data)
        return self._digested < self.size

    def head(self) -> bytes:
        return self._read(0, min(HEAD_BYTES, self.size))

    def fault(self) -> str | None:
        """Why this is not the announced file, whole; None: it is. `catch_up` comes first."""
        total = self.announced.total
        if total is not None and total != self.size:
            return f"{total} bytes were announced, {self.size} came"
        name = checksums.chosen(self.announced.digests)
        if name is not None and self._digest is not None:
            found = checksums.text_of(self._digest)
            if found != self.announced.digests[name]:
                return f"its {name} is {found}, announced was {self.announced.digests[name]}"
        return None

    def clear(self) -> None:
        """Forget everything: nothing of this file could be trusted."""
        os.ftruncate(self._descriptor, 0)
        self.size = self._flushed = 0
        self._expect(Announced())

    # --- the end -------------------------------------------------------------------------------------------------

    def place(self, target: Path, *, overwrite: bool) -> None:
        """Make it the file `target`, in one step, durably. Raises `FileExistsError` if that exists and must stay."""
        os.fsync(self._descriptor)
        if sys.platform == "win32":  # pragma: no cover
            self._close()  # an open file is not renamed there
        if overwrite:
            self.path.replace(target)
        else:
            self._link(target)
        self.sidecar.unlink(missing_ok=True)
        self._close()
        _sync_folder(target.parent)

    def leave(self) -> None:
        """Close it; it stays if a later download can go on with it."""
        if self._descriptor < 0:
            return
        if self.size and self.announced.is_resumable:
            self._close()
        else:
            self.discard()

    def discard(self) -> None:
        """Close it, and take it away."""
        if self._descriptor >= 0:
            for path in (self.path, self.sidecar):
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            self._close()

    # --- inside --------------------------------------------------------------------------------------------------

    def _expect(self, announced: Announced) -> None:
        before, name = checksums.chosen(self.announced.digests), checksums.chosen(announced.digests)
        self.announced = announced
        if name != before or self.size == 0 or self._digest is None:
            self._digest = None if name is None else checksums.new(name)
            self._digested = 0

    def _take_over(self, size: int) -> None:
        announced = self._read_sidecar() if size else None
        if announced is None or (announced.total is not None and size > announced.total):
            os.ftruncate(self._descriptor, 0)
            return
        self.size = self._flushed = size
        self._expect(announced)

    def _read_sidecar(self) -> Announced | None:
        """What is known of the bytes that are here; None: nothing that would let them be trusted."""
        try:
            descriptor = os.open(self.sidecar, _FLAGS_HERE & ~os.O_CREAT)
            with os.fdopen(descriptor, "rb") as file:
                found = json.loads(file.read(_SIDECAR_BYTES))
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(found, dict) or (found.get("form"), found.get("result")) != (_FORM, self._owner):
            return None
        announced = Announced.from_json(found.get("announced"))
        if announced is None or not announced.is_resumable:
            return None
        # Since this machine started, what was written is in the file. A loss of power may have left holes in it.
        is_same_boot = found.get("boot") == _boot() is not None
        return announced if is_same_boot or announced.is_provable else None

    def _write_sidecar(self) -> None:
        said = {"form": _FORM, "result": self._owner, "boot": _boot(), "announced": self.announced.as_json()}
        self.sidecar.unlink(missing_ok=True)
        descriptor = os.open(self.sidecar, _FLAGS_HERE | os.O_EXCL, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            file.write(json.dumps(said).encode())

    def _read(self, start: int, size: int) -> bytes:
        self._at = os.lseek(self._descriptor, start, os.SEEK_SET)
        data = os.read(self._descriptor, size)
        self._at += len(data)
        if not data and size:
            raise OSError(errno.EIO, "the part has become shorter than it was", str(self.path))
        return data

    def _link(self, target: Path) -> None:
        try:
            os.link(self.path, target)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links: there the look and the step are two
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, "exists", str(target)) from None
            self.path.replace(target)
        else:
            self.path.unlink()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":  # pragma: no cover
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Busy from None
    except OSError:  # a file system without locks
        return


def _begin_writing(descriptor: int, start: int, size: int) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a hint; Linux takes it as "begin now, and do not wait"
            os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_DONTNEED)


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _boot(told: Path = BOOT) -> str | None:
    """Which start of the machine this is; None: that cannot be told here."""
    try:
        return told.read_text(encoding="ascii").strip() or None
    except (OSError, ValueError):
        return None


def _sync_folder(folder: Path) -> None:
    # The file is whole, and in its place: what cannot be opened or synced (Windows, FUSE) takes nothing away from that.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
