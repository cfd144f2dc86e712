"""The lock file: one holder, who is named; nothing of another user or program is followed, truncated or removed."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from xiling_async._internal.file_lock import Locked, lock_file, this_process


def test_a_lock_is_one_processs_and_says_whose(tmp_path: Path) -> None:
    """The second one is told who has it; letting go twice is letting go; nothing is left behind."""
    path = tmp_path / "jobs.db-owner"
    release = lock_file(path)
    for _ in range(2):
        with pytest.raises(Locked, match=f"process {os.getpid()} on ") as caught:
            lock_file(path)
        assert str(caught.value) == this_process() == path.read_text()
    release()
    assert not path.exists()
    again = lock_file(path)
    release()
    with pytest.raises(Locked):
        lock_file(path)
    again()
    assert list(tmp_path.iterdir()) == []


def test_a_note_that_its_holder_took_away_meanwhile_is_made_anew(tmp_path: Path) -> None:
    """Between opening and locking it the last holder may have gone: a lock on a file without a name holds nothing."""

    class Vanishing(type(Path())):  # type: ignore[misc]
        looked = 0

        def stat(self, **options: Any) -> os.stat_result:
            type(self).looked += 1
            if type(self).looked == 1:
                self.unlink()
            return super().stat(**options)  # type: ignore[no-any-return]

    release = lock_file(Vanishing(tmp_path / "owner"))
    assert Vanishing.looked == 2
    with pytest.raises(Locked):
        lock_file(tmp_path / "owner")
    release()


def test_racing_for_a_lock_has_one_winner(tmp_path: Path) -> None:
    """Many threads take it and let go again and again: never two at once."""
    path = tmp_path / "owner"
    inside, most, wins = 0, 0, 0

    def run() -> None:
        nonlocal inside, most, wins
        for _ in range(200):
            try:
                release = lock_file(path)
            except Locked:
                continue
            inside += 1
            most, wins = max(most, inside), wins + 1
            inside -= 1
            release()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert wins >= 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["symlink", "dangling symlink", "hard link", "other content", "folder", "fifo"])
def test_what_is_not_ours_is_refused_untouched(tmp_path: Path, what: str) -> None:
    """A link is not followed, its target and any other file keep their content, nothing is made or removed."""
    path, target = tmp_path / "jobs.db-owner", tmp_path / "precious"
    if what != "dangling symlink":
        target.write_text("process 7 on earth" if what == "hard link" else "do not lose this")
    if "symlink" in what:
        path.symlink_to(target)
    elif what == "hard link":
        path.hardlink_to(target)
    elif what == "other content":
        path.write_text("somebody's notes")
    elif what == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)

    def state() -> list[tuple[str, bool, bytes]]:
        names = sorted(tmp_path.iterdir())
        return [(entry.name, entry.is_symlink(), entry.read_bytes() if entry.is_file() else b"") for entry in names]

    before = state()
    with pytest.raises(OSError):
        lock_file(path)
    assert state() == before


def test_a_lock_of_a_process_that_died_is_taken_over(tmp_path: Path) -> None:
    """Its note is overwritten."""
    path = tmp_path / "jobs.db-owner"
    path.write_text("process 99999999 on an-older-host")
    release = lock_file(path)
    assert path.read_text() == this_process()
    release()
    assert not path.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_lock_file_of_another_user_is_refused(tmp_path: Path) -> None:
    """It could be replaced under us by whoever made it."""
    path = tmp_path / "jobs.db-owner"
    path.touch(0o666)
    os.chown(path, 12345, -1)
    with pytest.raises(PermissionError, match="another user"):
        lock_file(path)
    assert path.read_bytes() == b""
