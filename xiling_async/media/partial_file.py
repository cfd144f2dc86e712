"""The partial file on the disk, `<name>.part`, and beside it what is known of it; no network, no loop.

The sidecar `<name>.part.json` says which result the bytes are of and what its host announced: never a URL, never a
secret. A partial file is locked while it is written, so that no two downloads write the same one.

Others may write to the folder, too. Neither file is opened through a symbolic link; one that has a second name (a hard
link) or another owner is never read, written or truncated, but replaced by a new file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import sys
from pathlib import Path
from typing import Any, Final

from xiling_async.media.file_types import HEAD_BYTES, TYPES
from xiling_async.media.headers import Announced, Digest, digest_in_use, digest_text, new_digest

if sys.platform != "win32":
    import fcntl

SUFFIX: Final = ".part"
SIDECAR: Final = ".json"
# The system is asked to begin writing after so many bytes: otherwise everything waits for the fsync at the end.
FLUSH_BYTES: Final = 8 * 1024 * 1024
CATCH_UP_BYTES: Final = 8 * 1024 * 1024  # of an earlier process's bytes that are read again at a time
_SIDECAR_BYTES: Final = 16 * 1024
_FORM: Final = 1
_FLAGS: Final = os.O_RDWR | sum(
    getattr(os, name, 0)
    for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY", "O_NONBLOCK")  # where the system has them
)
_NEW: Final = _FLAGS | os.O_CREAT | os.O_EXCL


class Busy(Exception):
    """Another download writes this partial file now."""


class PartialFile:
    """An open partial file. `size`: the bytes in it that count; `announced`: what is known of the whole file.

    Every method blocks and may raise `OSError`. `owner` says which result it is of, for the sidecar. `free_bytes`: as
    much of the disk stays free.
    """

    def __init__(self, path: Path, descriptor: int, owner: str) -> None:
        self.path = path
        self.size = 0
        self.free_bytes = 0
        self.announced = Announced()
        self._descriptor = descriptor
        self._owner = owner
        self._digest: Digest | None = None
        self._digested = 0
        self._flushed = 0

    @classmethod
    def open(cls, path: Path, owner: str) -> PartialFile:
        """The partial file at this path, locked; with the bytes that an earlier download of the same result left.

        Raises `Busy`, or `OSError`.
        """
        while True:
            descriptor, is_new = _opened(path)
            part = cls(path, descriptor, owner)
            try:
                _lock(descriptor)
                if _is_still(path, descriptor):  # else its download has ended meanwhile
                    if is_new or _is_ours(os.fstat(descriptor)):
                        part._take_over(os.fstat(descriptor).st_size)
                        return part
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

    def resume(self, announced: Announced) -> None:
        """Append to what is there; an answer to the request for the rest may announce more of the file."""
        if announced != self.announced:
            self._expect(announced)
            self._write_sidecar()

    def write(self, data: bytes) -> None:
        """Append; on an error the partial file is as it was before."""
        rest = memoryview(data)
        self._check_free(len(data))
        try:
            os.lseek(self._descriptor, self.size, os.SEEK_SET)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
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
        name = digest_in_use(self.announced.digests)
        if name is not None and self._digest is not None:
            digest = digest_text(self._digest)
            if digest != self.announced.digests[name]:
                return f"its {name} is {digest}, announced was {self.announced.digests[name]}"
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
        if not self._is_untouched(self.path):
            raise OSError(errno.EBUSY, "the partial file was changed or replaced by another program", str(self.path))
        if sys.platform == "win32":  # pragma: no cover
            self._close()  # an open file is not renamed there
        if overwrite:
            self.path.replace(target)
        else:
            self._link(target)
        if self._descriptor >= 0 and not self._is_untouched(target):
            raise OSError(errno.EBUSY, "the file was replaced by another program", str(target))
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
        before, name = digest_in_use(self.announced.digests), digest_in_use(announced.digests)
        self.announced = announced
        if name != before or self.size == 0 or self._digest is None:
            self._digest = None if name is None else new_digest(name)
            self._digested = 0

    def _take_over(self, size: int) -> None:
        announced = self._read_sidecar() if size else None
        if announced is None or (announced.total is not None and size > announced.total):
            os.ftruncate(self._descriptor, 0)
            return
        self.size = self._flushed = size
        self._expect(announced)

    def _check_free(self, more: int) -> None:
        if self.free_bytes and shutil.disk_usage(self.path.parent).free - more < self.free_bytes:
            raise OSError(errno.ENOSPC, f"fewer than {self.free_bytes} bytes would be left", str(self.path))

    def _is_untouched(self, path: Path) -> bool:
        """Whether what stands at this path is our file, as we wrote it."""
        status = os.fstat(self._descriptor)
        return _is_still(path, self._descriptor) and status.st_nlink == 1 and status.st_size == self.size

    def _read_sidecar(self) -> Announced | None:
        """What is known of the bytes that are here; None: nothing that would let them be trusted."""
        sidecar = _sidecar_of(self.sidecar)
        if sidecar.get("result") != self._owner:
            return None
        announced = Announced.from_json(sidecar.get("announced"))
        if announced is None or not announced.is_resumable:
            return None
        # Since this machine started, what was written is in the file. A loss of power may have left holes in it.
        is_same_boot = sidecar.get("boot") == _boot() is not None
        return announced if is_same_boot or announced.is_provable else None

    def _write_sidecar(self) -> None:
        sidecar = {"form": _FORM, "result": self._owner, "boot": _boot(), "announced": self.announced.as_json()}
        self.sidecar.unlink(missing_ok=True)
        descriptor = os.open(self.sidecar, _NEW, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            file.write(json.dumps(sidecar).encode())

    def _read(self, start: int, size: int) -> bytes:
        os.lseek(self._descriptor, start, os.SEEK_SET)
        data = os.read(self._descriptor, size)
        if not data and size:
            raise OSError(errno.EIO, "the partial file has become shorter", str(self.path))
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


def remove_stale(folder: Path, older_than: float) -> None:
    """Remove partial files that nothing resumes any more: beside a finished file, or last written before `older_than`
    (Unix seconds). Only ours (they have a sidecar), and only those that no download holds."""
    names = {path.name for path in folder.iterdir()}
    for name in names:
        path = folder / name
        if not name.endswith(SUFFIX) or name + SIDECAR not in names or not _sidecar_of(folder / (name + SIDECAR)):
            continue
        stem = name.removesuffix(SUFFIX).rpartition(".")[0]
        with contextlib.suppress(OSError):
            if path.lstat().st_mtime < older_than or any(f"{stem}.{file_type}" in names for file_type in TYPES):
                remove_unless_busy(path)


def remove_unless_busy(path: Path) -> None:
    """Remove this partial file and its sidecar, unless a download holds it; raises `OSError`."""
    descriptor = os.open(path, _FLAGS)
    with contextlib.closing(os.fdopen(descriptor, "rb")), contextlib.suppress(Busy):
        _lock(descriptor)
        if _is_still(path, descriptor):
            path.unlink()
            path.with_name(path.name + SIDECAR).unlink(missing_ok=True)


def _opened(path: Path) -> tuple[int, bool]:
    """A descriptor, and whether the file is new."""
    try:
        return os.open(path, _NEW, 0o666), True
    except FileExistsError:
        descriptor = os.open(path, _FLAGS | os.O_CREAT, 0o666)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor, False
        os.close(descriptor)
        raise OSError(errno.EEXIST, "something that is not a file is in the way", str(path)) from None


def _is_ours(status: os.stat_result) -> bool:
    return status.st_nlink == 1 and (sys.platform == "win32" or status.st_uid == os.geteuid())


def _sidecar_of(path: Path) -> dict[str, Any]:
    """What is in a sidecar; empty: it is not one of ours."""
    try:
        with os.fdopen(os.open(path, _FLAGS), "rb") as file:
            status = os.fstat(file.fileno())
            sidecar = json.loads(file.read(_SIDECAR_BYTES)) if stat.S_ISREG(status.st_mode) else None
    except (OSError, ValueError, RecursionError):
        return {}
    return sidecar if isinstance(sidecar, dict) and _is_ours(status) and sidecar.get("form") == _FORM else {}


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


def _boot(path: Path = Path("/proc/sys/kernel/random/boot_id")) -> str | None:
    """Which start of the machine this is; None: unknown on this system."""
    try:
        return path.read_text(encoding="ascii").strip() or None
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
