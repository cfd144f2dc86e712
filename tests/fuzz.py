"""What strangers write, thrown at the parsers that read it: five targets and their first inputs.

`fuzz_search.py` looks for inputs that break a target's claims; the tests replay those that stand here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath, PureWindowsPath

from attrs import frozen

from xiling_async.api import wire
from xiling_async.api.backoff import LONGEST_PAUSE_S, SHORTEST_PAUSE_S, pause_after_429, retry_after
from xiling_async.kinds import KINDS
from xiling_async.media.paths import stem_of
from xiling_async.models.record import Failed, Succeeded
from xiling_async.models.settings import networks_of
from xiling_async.webhooks.limits import IPAllowlist, network_of
from xiling_async.webhooks.tokens import CallbackToken, TokenSigner

NOW = 1_800_000_000.0
SIGNER = TokenSigner([b"the secret of the fuzzed receiver"], "https://media.example.com/xiling")
MINTED = {
    SIGNER.sign(
        CallbackToken(kind_number=1, tasks=4, job_id=f"{number:032x}", attempt=1, expires_at=NOW + 60)
    ).rpartition("/")[2]
    for number in range(3)
}
ALLOWLIST = IPAllowlist(networks_of(["203.0.113.0/24", "2001:db8::/32"]) or (), 1)


def token(data: bytes) -> None:
    """Nothing but what was minted is recognised."""
    text = data.decode("utf-8", "surrogateescape")
    assert (SIGNER.verify(text, NOW) is not None) == (text in MINTED)


def body(data: bytes) -> None:
    """A callback is read exactly as it stands, or is malformed."""
    for kind in KINDS:
        try:
            report = wire.callback(kind, data)
        except wire.Malformed as malformed:
            assert str(malformed).isprintable()
            continue
        told = json.loads(data)["data"]
        assert type(report.task_id) is str
        assert report.task_id == told["task_id"].encode("utf-8", "replace").decode()  # half a character is "?"
        if isinstance(report.outcome, Succeeded):
            assert report.outcome.result.task_id == report.task_id
        elif isinstance(report.outcome, Failed):
            assert type(report.outcome.message) is str
        repr(report).encode("utf-8")  # no half character got in
        if report.outcome is not None:
            json.dumps(told, allow_nan=False)


def retry_after_header(data: bytes) -> None:
    """Seconds within bounds, or nothing."""
    text = data.decode("latin-1")
    seconds = retry_after(text, NOW)
    assert seconds is None or 0 <= seconds <= LONGEST_PAUSE_S
    assert SHORTEST_PAUSE_S <= pause_after_429(text, NOW) <= LONGEST_PAUSE_S


def file_name(data: bytes) -> None:
    """A task's id becomes one plain name in its folder, on every system."""
    text = data.decode("utf-8", "surrogatepass" if b"\xed" in data else "replace") if _decodes(data) else ""
    name = stem_of(text)
    assert re.fullmatch(r"[A-Za-z0-9_.~-]{1,100}", name)
    assert name.strip(".") and PurePosixPath(name).name == name and PureWindowsPath(name).name == name
    assert name == text or "~" in name


def _decodes(data: bytes) -> bool:
    try:
        data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return b"\xed" not in data
    return True


def sender(data: bytes) -> None:
    """Whom X-Forwarded-For names, the right-most entry decides."""
    text = data.decode("latin-1")
    network_of(text)
    admitted = ALLOWLIST.allows("10.0.0.1", [text])
    assert ALLOWLIST.allows("10.0.0.1", ["203.0.113.7, " + text]) == admitted
    assert not ALLOWLIST.allows("10.0.0.1", [text, "192.0.2.1"])


@frozen
class Target:
    check: Callable[[bytes], None]
    corpus: tuple[bytes, ...]


def _callback(**data: object) -> bytes:
    told = {"task_id": "i2v-1", "status": "SUCCEEDED", "video_url": "https://m.example/v.mp4", "thumbnail_url": ""}
    return json.dumps({"code": 0, "msg": "ok", "task_type": "image_to_video", "data": told | data}).encode()


TARGETS: Mapping[str, Target] = {
    "token": Target(
        token,
        (*(minted.encode() for minted in sorted(MINTED)), b"", b"A" * 80, b"-_" * 40, b"\xff" * 80, b"=" * 80),
    ),
    "body": Target(
        body,
        (
            _callback(), _callback(status="FAILED", video_url="", error_message="no"), _callback(status="PENDING"),
            _callback(task_id=1), _callback(task_id="a\ud83db"), _callback(width=1e400), _callback(duration=2**70),
            b"", b"null", b"[]", b'{"data":{}}', b'{"a":1,"a":2}', b"NaN", b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0",
            b'{"data":' * 5_000, b"[" * 100_000, b"9" * 5_000, b'{"a":-1e999}', b'"\\ud83d"', b"{}" + b" " * 500,
            b'{"data":{"task_id":"x","status":"FAILED","error_message":"\\ud83d"}}',
        ),
    ),
    "retry-after": Target(
        retry_after_header,
        (
            b"30", b"0", b"0.5", b"-1", b"", b" 7 ", b"1e9", b"9" * 5_000, b"Fri, 31 Dec 1999 23:59:59 GMT", b"inf",
            b"Fri, 31 Dec 9999 23:59:59 -2359", b"Mon, 01 Jan 0001 00:00:00 +2359", b"31 Dec 1999", b"\xb2", b"nan",
            b"Fri, 99 Feb 2027 25:61:61 GMT", b"Sun, 06 Nov 1994 08:49:37 +999999999999",
        ),
    ),
    "file-name": Target(
        file_name,
        (
            b"i2v-1", b"", b".", b"..", b"../../etc/passwd", b"a/b", b"a\\b", b"C:\\x", b"CON", b"nul.mp4", b"a\0b",
            b"a" * 300, b"\xed\xa0\xbd", "übung".encode(), b"a.", b"a ", b".hidden", b"-rf", b"~", b"a:b",
            b"\xe2\x80\xae",
        ),
    ),
    "sender": Target(
        sender,
        (
            b"203.0.113.7", b"10.0.0.1", b"203.0.113.7, 10.0.0.1", b"[2001:db8::1]:80", b"203.0.113.7:80", b"", b",",
            b"::ffff:203.0.113.7", b"unknown", b"_hidden", b'"[2001:db8::1]"', b"203.0.113.007", b"fe80::1%eth0",
            b"1.2.3.4/8", b"0x7f.1", b"\xb2.1.1.1", b"[", b"[::1", b":", b"::",
        ),
    ),
}  # fmt: skip
