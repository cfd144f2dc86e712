"""The ground under downloads: parts on the disk, names, digests, types by bytes, and what headers say."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from xiling_async.media import headers as announced
from xiling_async.media import partial_file
from xiling_async.media.file_types import HEAD_BYTES, kind_of
from xiling_async.media.headers import Announced, Contradiction
from xiling_async.media.partial_file import FLUSH_BYTES, Busy, PartialFile
from xiling_async.media.paths import part_beside, stem_of
from xiling_async.simulator import Simulator

DATA = b"0123456789" * 1_000
MD5 = base64.b64encode(hashlib.md5(DATA).digest()).decode()
CRC = base64.b64encode(google_crc32c.value(DATA).to_bytes(4, "big")).decode()
MEDIA = Path(sys.modules[Simulator.__module__].__file__ or "").parent / "media/samples"


# --- types ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "found"),
    [
        (b"\0\0\0\x18ftypisom\0\0\0\0", "mp4"), (b"\0\0\0\x18ftypmp42", "mp4"), (b"\0\0\0\x14ftypqt  ", "mov"),
        (b"\0\0\0\x1cftypavif", "avif"), (b"\0\0\0\x1cftypheic", "heic"), (b"RIFF\x10\0\0\0WEBPVP8 ", "webp"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "jpg"), (b"\x89PNG\r\n\x1a\n\0", "png"), (b"GIF89a\1\0", "gif"),
        (b"BM\x36\0\0\0\0\0\0\0\x36\0\0\0", "bmp"), (b"\x1a\x45\xdf\xa3\x93\x42\x82\x88webm", "webm"),
        (b"\x1a\x45\xdf\xa3\x93\x42\x82\x88matroska", "mkv"), (b"[Script Info]\n", "ass"),
        (b"\xef\xbb\xbf[Script Info]", "ass"),
        (b"", None), (b"\0", None), (b"ftypisom", None), (b"\0\0\0\x18ftyp", None), (b"RIFF\x10\0\0\0WAVE", None),
        (b"BMW is a car maker", None), (b"<html>", None), (b"\xff\xd8", None), (b"\x89PNG", None), (b"png", None),
    ],
)  # fmt: skip
def test_a_type_is_seen_in_the_bytes(head: bytes, found: str | None) -> None:
    """Never in a name."""
    assert kind_of(head) == found


@pytest.mark.parametrize("path", sorted(MEDIA.iterdir()), ids=lambda path: path.name)
def test_real_files_are_what_they_are(path: Path) -> None:
    """Those that the simulator gives away."""
    assert kind_of(path.read_bytes()[:HEAD_BYTES]) == path.suffix[1:]


# --- digests -------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=70), max_size=8))
def test_a_digest_of_pieces_is_that_of_the_whole(pieces: list[bytes]) -> None:
    """Wherever the network cuts the file."""
    for name in announced.DIGESTS:
        by_piece, whole = announced.new_digest(name), announced.new_digest(name)
        for piece in pieces:
            by_piece.update(piece)
        whole.update(b"".join(pieces))
        assert announced.digest_text(by_piece) == announced.digest_text(whole)


@pytest.mark.parametrize("installed", ["c", "python", None])
def test_crc32c_is_checked_where_google_crc32c_is_fast(monkeypatch: pytest.MonkeyPatch, installed: str | None) -> None:
    """Without it, or without its C code, a crc32c is as good as not announced: md5 and the length still count."""
    module = types.ModuleType("google_crc32c")
    module.__dict__.update(Checksum=google_crc32c.Checksum, implementation=installed)
    monkeypatch.setitem(sys.modules, "google_crc32c", module if installed else None)
    announced.crc32c.cache_clear()
    try:
        assert announced.digest_in_use({"crc32c": CRC}) == ("crc32c" if installed == "c" else None)
        assert Announced(digests={"crc32c": CRC}).is_resumable is (installed == "c")
        assert announced.digest_in_use({"crc32c": CRC, "md5": MD5}) == "md5"
    finally:
        announced.crc32c.cache_clear()


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ([f"crc32c={CRC},md5={MD5}"], {"crc32c": CRC, "md5": MD5}),
        ([f"crc32c={CRC}", f" md5={MD5} "], {"crc32c": CRC, "md5": MD5}),
        ([], {}), ([""], {}), (["md5"], {}), (["md5="], {}), (["md5=AAAA"], {}), (["sha1=AAAA"], {}), (["md5=ä"], {}),
        ([f"md5={MD5}!"], {}), ([f"crc32c={MD5}"], {}),
    ],
)  # fmt: skip
def test_only_real_digests_count(headers: list[str], found: dict[str, str]) -> None:
    """What has not the size of its kind, or is no base64, is as if it were not there."""
    fields = CIMultiDict([("Content-Length", "1"), *(("x-goog-hash", header) for header in headers)])
    assert announced.of_whole(fields).digests == found
    assert announced.digest_in_use(found) == ("md5" if found else None)


# --- headers -------------------------------------------------------------------------------------------------------


def of_whole(**headers: str) -> Announced:
    return announced.of_whole(CIMultiDict({name.replace("_", "-"): value for name, value in headers.items()}))


@pytest.mark.parametrize(
    ("etag", "validator"),
    [
        ('"a"', '"a"'),
        (' "a" ', '"a"'),
        ('W/"a"', None),
        ("a", None),
        ('"ä"', None),
        ('"' + "a" * 1_000, None),
        ("", None),
    ],
)
def test_only_a_strong_etag_is_a_validator(etag: str, validator: str | None) -> None:
    """A weak one says that the files look alike, not that their bytes are the same."""
    assert of_whole(Content_Length="1", ETag=etag).validator == validator


@pytest.mark.parametrize("date", ["", "yesterday", "Mon, 01 Jan 2029 00:00:00", "Mon, 01 Jan 2029 00:00:00 GMT"])
def test_a_date_that_could_be_shared_is_none(date: str) -> None:
    """Nor one that cannot be compared."""
    said = of_whole(Content_Length="1", Last_Modified="Mon, 01 Jan 2029 00:00:00 GMT", Date=date)
    assert said.validator is None
    assert not said.is_resumable


@pytest.mark.parametrize("length", ["", "-1", "1.5", "٣", "9" * 19, "1 1"])
def test_a_length_that_is_none_is_not_there(length: str) -> None:
    """And without a length, chunks or a digest nothing can prove the body whole."""
    assert of_whole(Content_Length=length, Transfer_Encoding="chunked").total is None
    with pytest.raises(Contradiction, match="neither"):
        of_whole(Content_Length=length)


@pytest.mark.parametrize("said", ["bytes ٣-٣/4", "bytes 3-٣/4", "bytes 3-3/٣"])
def test_a_range_is_in_ascii_digits(said: str) -> None:
    """As a length is: what is a digit elsewhere is none in HTTP."""
    with pytest.raises(Contradiction, match="no Content-Range"):
        announced.of_rest(CIMultiDict({"Content-Range": said}), 3)
    assert announced.unsatisfied_total(CIMultiDict({"Content-Range": "bytes */٣"})) is None
    assert announced.unsatisfied_total(CIMultiDict({"Content-Range": "bytes */3"})) == 3


def test_later_answers_add_to_what_is_known() -> None:
    """As long as they do not contradict."""
    first = Announced(validator='"1"', total=None, digests={"md5": MD5})
    later = Announced(validator=None, total=9, digests={"crc32c": CRC})
    assert first.fits(later)
    assert first.with_more(later) == Announced(validator='"1"', total=9, digests={"md5": MD5, "crc32c": CRC})
    assert not first.fits(Announced(validator='"2"'))
    assert not first.fits(Announced(digests={"md5": base64.b64encode(bytes(16)).decode()}))
    assert Announced.from_json(json.loads(json.dumps(first.as_json()))) == first


# --- names ---------------------------------------------------------------------------------------------------------


@given(st.text(max_size=300))
def test_a_stem_is_a_name_everywhere(task_id: str) -> None:
    """One part of a path, plain ASCII, not hidden, not too long, no device."""
    stem = stem_of(task_id)
    assert stem.isascii()
    assert stem.isprintable()
    assert not set(stem) & set('/\\:*?"<>| ')
    assert 0 < len(stem) <= 100
    assert stem[0] != "." != stem[-1]
    assert stem == stem_of(task_id)


@given(st.text(max_size=12), st.text(max_size=12))
def test_different_ids_have_different_stems(one: str, two: str) -> None:
    """What was changed has a hash of all of it behind a sign that stands in no plain id."""
    assert (stem_of(one) == stem_of(two)) == (one == two)


@pytest.mark.parametrize("task_id", ["i2v-0123456789abcdef", "vt-7", "a", "A.b_c-d", "a" * 100])
def test_a_plain_id_is_its_own_name(task_id: str) -> None:
    """The service's own ids are."""
    assert stem_of(task_id) == task_id


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=255))
def test_a_part_has_a_name_beside_every_file(name: str) -> None:
    """Not longer than names may be, the sidecar with it."""
    if name in (".", "..") or len(os.fsencode(name)) > 255:
        return
    part = part_beside(Path("/folder") / name)
    assert part.parent == Path("/folder")
    assert len(os.fsencode(f"{part.name}.json")) <= 255
    assert part.name.endswith(".part")


# --- parts ---------------------------------------------------------------------------------------------------------


def known(**said: object) -> Announced:
    return Announced(**{"validator": '"1"', "total": len(DATA), "digests": {"md5": MD5}, **said})  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.mp4.part"


def half(path: Path, size: int = 4_000, **said: object) -> None:
    """What a download that was cut leaves."""
    part = PartialFile.open(path, "me")
    part.begin(known(**said))
    part.write(DATA[:size])
    part.leave()


def caught_up(part: PartialFile) -> PartialFile:
    while part.catch_up():
        pass
    return part


def test_a_part_remembers_what_it_is_of(path: Path) -> None:
    """The bytes, their digest, and what was announced: in a later process too."""
    half(path)
    part = PartialFile.open(path, "me")
    assert (part.size, part.announced) == (4_000, known())
    part.resume(known())
    part.write(DATA[4_000:])
    assert caught_up(part).fault() is None
    assert part.head() == DATA[:HEAD_BYTES]
    part.place(path.with_name("x.mp4"), overwrite=False)
    assert path.with_name("x.mp4").read_bytes() == DATA
    assert list(path.parent.iterdir()) == [path.with_name("x.mp4")]
    part.leave()
    part.discard()
    assert path.with_name("x.mp4").exists()


def test_a_part_of_something_else_starts_over(path: Path) -> None:
    """Another result, or more bytes than there can be."""
    half(path)
    part = PartialFile.open(path, "somebody else")
    assert (part.size, path.stat().st_size) == (0, 0)
    part.leave()
    assert list(path.parent.iterdir()) == []
    half(path, total=3_000)
    assert PartialFile.open(path, "me").size == 0


@pytest.mark.parametrize("said", [{"digests": {}, "validator": None}, {"size": 0}])
def test_what_cannot_be_resumed_does_not_stay(path: Path, said: dict[str, object]) -> None:
    """No validator and no digest, or no bytes."""
    size = said.pop("size", 4_000)
    assert isinstance(size, int)
    half(path, size, **said)
    assert list(path.parent.iterdir()) == []


def test_a_fault_is_named(path: Path) -> None:
    """The length first, then the digest; with nothing announced there is none."""
    part = PartialFile.open(path, "me")
    part.begin(known())
    part.write(DATA[:-1])
    assert part.fault() == f"{len(DATA)} bytes were announced, {len(DATA) - 1} came"
    part.write(b"!")
    assert "its md5 is" in (part.fault() or "")
    part.begin(known(digests={"crc32c": CRC}))
    part.write(DATA)
    assert part.fault() is None
    part.begin(Announced())
    assert part.fault() is None
    part.discard()


def test_a_digest_that_is_told_late_is_over_all_bytes(path: Path) -> None:
    """The first answer had none; the bytes that are there are read again."""
    half(path, digests={})
    part = PartialFile.open(path, "me")
    part.resume(known(digests={"crc32c": CRC}))
    part.write(DATA[4_000:])
    assert caught_up(part).fault() is None
    part.discard()


def test_large_parts_are_handed_to_the_disk_early(path: Path) -> None:
    """Nothing is lost by it."""
    part = PartialFile.open(path, "me")
    part.begin(Announced())
    block = bytes(range(256)) * 4_096
    for _ in range(2 * FLUSH_BYTES // len(block) + 1):
        part.write(block)
    assert (part.size, path.stat().st_size) == (2 * FLUSH_BYTES + len(block),) * 2
    part.discard()


def test_one_part_is_held_by_one(path: Path) -> None:
    """Also within a process; as soon as it is closed it is free."""
    part = PartialFile.open(path, "me")
    part.begin(known())
    part.write(DATA[:10])
    with pytest.raises(Busy):
        PartialFile.open(path, "me")
    part.leave()
    assert PartialFile.open(path, "me").size == 10


def test_whoever_comes_while_a_part_gets_its_name_does_not_touch_it(path: Path) -> None:
    """A second process that opened the part just before it became the file finds that out, and begins a new one."""
    part = PartialFile.open(path, "me")
    part.begin(known())
    part.write(DATA)
    script = (
        "import fcntl, sys; from pathlib import Path; import xiling_async.media.partial_file as parts\n"
        "first, lock = [], parts._lock\n"
        "def late(descriptor):\n"  # between its open and its lock
        "    if not first: first.append(print('open', flush=True) or sys.stdin.readline())\n"
        "    lock(descriptor)\n"
        "parts._lock = late\n"
        "part = parts.PartialFile.open(Path(sys.argv[1]), 'me'); print(part.size); part.discard()\n"
    )
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        part.place(path.with_name("x.mp4"), overwrite=False)
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.stdout.readline() == "0\n"
    assert path.with_name("x.mp4").read_bytes() == DATA
    assert list(path.parent.iterdir()) == [path.with_name("x.mp4")]


def test_what_the_system_does_not_tell_is_not_guessed(path: Path) -> None:
    """No name of this start of the machine where there is none; and no part where the path has gone."""
    assert partial_file._boot(path) is None
    path.write_text("\n")
    assert partial_file._boot(path) is None
    with path.open("rb") as file:
        assert partial_file._is_still(path, file.fileno())
        path.unlink()
        assert not partial_file._is_still(path, file.fileno())


# --- a folder in which others write --------------------------------------------------------------------------------

FOREIGN = 12_345  # the id of another user


def planted(path: Path, form: str, precious: Path) -> None:
    """Something of another program's where the library would write."""
    if form == "symlink":
        path.symlink_to(precious)
    elif form == "dangling symlink":
        path.symlink_to(precious.with_name("nowhere"))
    elif form == "hard link":
        os.link(precious, path)
    else:
        path.write_bytes(b"theirs")
        os.chown(path, FOREIGN, FOREIGN)


FORMS = ["symlink", "dangling symlink", "hard link", "foreign file"]


@pytest.mark.parametrize("place", ["part", "sidecar"])
@pytest.mark.parametrize("form", FORMS)
def test_what_others_have_put_there_is_never_followed_or_truncated(path: Path, form: str, place: str) -> None:
    """A symbolic link, a hard link, somebody else's file: replaced by a new file, or an error; what it names stays."""
    if form == "foreign file" and os.geteuid():
        pytest.skip("only root gives files away")
    precious = path.with_name("precious")
    precious.write_bytes(b"precious")
    where = path if place == "part" else path.with_name(f"{path.name}.json")
    planted(where, form, precious)
    with where.open("rb") if form == "foreign file" else precious.open("rb") as theirs:
        before = theirs.read()
        try:
            part = PartialFile.open(path, "me")
        except OSError:
            assert (place, form) in (("part", "symlink"), ("part", "dangling symlink"))
        else:
            part.begin(known())
            part.write(DATA)
            assert part.fault() is None
            part.place(path.with_name("x.mp4"), overwrite=False)
            assert path.with_name("x.mp4").read_bytes() == DATA
        theirs.seek(0)
        assert theirs.read() == before
    assert precious.read_bytes() == b"precious"
    assert not path.with_name("nowhere").exists()


def test_what_another_user_has_prepared_is_not_trusted(path: Path) -> None:
    """A partial file with a sidecar that says all of it is there: in a shared folder that may be another's trick."""
    if os.geteuid():
        pytest.skip("only root gives files away")
    for name in (path, path.with_name(f"{path.name}.json")):
        half(path, len(DATA), digests={})
        os.chown(name, FOREIGN, FOREIGN)
        part = PartialFile.open(path, "me")
        assert part.size == 0
        part.discard()


@pytest.mark.parametrize("change", ["swapped", "symlink", "hard link", "longer", "shorter", "gone"])
def test_a_partial_file_that_was_changed_meanwhile_is_not_the_file(path: Path, change: str) -> None:
    """What others put in its place, or did to it, never gets the name of the whole file."""
    part = PartialFile.open(path, "me")
    part.begin(known())
    part.write(DATA)
    if change in ("swapped", "symlink", "gone"):
        path.unlink()
    if change == "swapped":
        path.write_bytes(b"!" * len(DATA))
    elif change == "symlink":
        path.symlink_to("/etc/hostname")
    elif change == "hard link":
        os.link(path, path.with_name("other name"))
    elif change in ("longer", "shorter"):
        os.truncate(path, len(DATA) + (1 if change == "longer" else -1))
    for overwrite in (False, True):
        with pytest.raises(OSError, match="changed or replaced by another program"):
            part.place(path.with_name("x.mp4"), overwrite=overwrite)
        assert not os.path.lexists(path.with_name("x.mp4"))
    part.leave()


def test_a_floor_of_free_disk_is_kept(path: Path) -> None:
    """What would leave less free than that is not written."""
    part = PartialFile.open(path, "me")
    part.begin(known())
    part.write(DATA[:100])
    part.free_bytes = 1 << 60
    with pytest.raises(OSError, match="would be left") as full:
        part.write(DATA[100:])
    assert (full.value.errno, part.size, path.stat().st_size) == (errno.ENOSPC, 100, 100)
    part.discard()


def test_stale_partial_files_go(tmp_path: Path) -> None:
    """Those beside a finished file, and those that are too old; not those of others, nor one that is in use."""
    old, new = 1_000_000_000.0, 2_000_000_000.0
    for name in ("done.video", "old.video", "young.video", "busy.video"):
        half(tmp_path / f"{name}.part")
        os.utime(tmp_path / f"{name}.part", (new, new))
    os.utime(tmp_path / "old.video.part", (old, old))
    for name in (
        "done.webm",
        "busy.mp4",
        "film.mp4",
        "film.mp4.part",
        "mine.mp4",
        "mine.mp4.part",
        "mine.mp4.part.json",
    ):
        (tmp_path / name).write_text("{}")
    busy = PartialFile.open(tmp_path / "busy.video.part", "me")
    before = {path.name for path in tmp_path.iterdir()}
    partial_file.remove_stale(tmp_path, (old + new) / 2)
    left = {path.name for path in tmp_path.iterdir()}
    assert before - left == {f"{name}.video.part{end}" for name in ("done", "old") for end in ("", ".json")}
    busy.leave()
