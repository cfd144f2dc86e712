"""Callback URLs: sign and verify.

The service signs nothing, so the URL is the proof: its last segment is a token that only the holder of the secret can
have made. 60 bytes, 80 characters of base64url without padding (a multiple of three bytes, so that no bit is spare):

    version 1 | kind 1 | tasks 1 | key id 2 | job id 16 | attempt 2 | expiry 5 (Unix seconds) | HMAC-SHA256 32

The HMAC is over the 28 bytes before it and the public URL. `verify` takes the same time for every wrong token.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import struct
from collections.abc import Sequence
from typing import Final

from attrs import define

VERSION: Final = 1
SECRET_BYTES: Final = 32

_FIELDS: Final = struct.Struct(">BBB2s16sH5s")
_JOB_BYTES: Final = 16
_MAC_BYTES: Final = 32
_SHAPE: Final = re.compile(r"[A-Za-z0-9_-]{80}", re.ASCII)
_EXPIRY_MAX: Final = 2**40 - 1


@define(kw_only=True)
class CallbackToken:
    """What a token says: the POST it was made for. `job_id`: 32 hex digits; `expires_at`: Unix seconds."""

    kind_number: int
    tasks: int
    job_id: str
    attempt: int
    expires_at: float


def _key_id(secret: bytes) -> bytes:
    return hashlib.sha256(b"xiling_async callback key id\0" + secret).digest()[:2]


class TokenSigner:
    """Signs tokens with the first secret and accepts those of every secret, for one public URL."""

    def __init__(self, secrets: Sequence[bytes], public_url: str) -> None:
        self._secrets = tuple(dict.fromkeys(secrets))
        self._signing_id = _key_id(secrets[0])
        self._keyed: dict[bytes, list[hmac.HMAC]] = {}  # by key id; two secrets may have the same
        for secret in self._secrets:
            self._keyed.setdefault(_key_id(secret), []).append(hmac.new(secret, digestmod="sha256"))
        self._unknown = [hmac.new(bytes(SECRET_BYTES), digestmod="sha256")]
        self._public_url = public_url.rstrip("/")
        self._bound = b"\0" + self._public_url.encode()

    def __repr__(self) -> str:
        return f"<TokenSigner with {len(self._keyed)} key ids>"

    def sign(self, token: CallbackToken) -> str:
        """The callback URL of one POST."""
        job = bytes.fromhex(token.job_id)
        if len(job) != _JOB_BYTES:  # struct would pad or cut it to the id of another job
            raise ValueError(f"a job id has {2 * _JOB_BYTES} hex digits")
        expiry = min(_EXPIRY_MAX, max(0, int(token.expires_at))).to_bytes(5, "big")
        head = _FIELDS.pack(VERSION, token.kind_number, token.tasks, self._signing_id, job, token.attempt, expiry)
        text = base64.urlsafe_b64encode(head + self._mac(self._keyed[self._signing_id][0], head)).decode()
        return f"{self._public_url}/{text}"

    def job_ids(self, key: str) -> tuple[str, ...]:
        """The id that a job with this key has, by each secret; the first is that of the secret that signs.

        A token holds the id of its job, so a job that comes back by its token alone is still the job of its key.
        """
        message = b"xiling_async job id\0" + key.encode("utf-8", "surrogatepass")
        digests = (hmac.digest(secret, message, "sha256") for secret in self._secrets)
        return tuple(digest[:_JOB_BYTES].hex() for digest in digests)

    def verify(self, text: str, now: float) -> CallbackToken | None:
        """The token that this text is, None if it is not valid. `now`: Unix seconds."""
        if _SHAPE.fullmatch(text) is None:
            return None
        raw = base64.urlsafe_b64decode(text)
        head, mac = raw[:-_MAC_BYTES], raw[-_MAC_BYTES:]
        version, kind_number, tasks, key_id, job_id, attempt, expiry = _FIELDS.unpack(head)
        # An unknown key id costs the same HMAC, so that the time does not tell which ids exist.
        candidates = self._keyed.get(key_id, self._unknown)
        is_signed = False
        for keyed in candidates:
            is_signed |= hmac.compare_digest(self._mac(keyed, head), mac)
        expires_at = int.from_bytes(expiry, "big")
        if candidates is self._unknown or not is_signed or version != VERSION or now > expires_at:
            return None
        return CallbackToken(
            kind_number=kind_number, tasks=tasks, job_id=job_id.hex(), attempt=attempt, expires_at=expires_at
        )

    def _mac(self, keyed: hmac.HMAC, head: bytes) -> bytes:
        mac = keyed.copy()  # cheaper than one that begins with its key
        mac.update(head + self._bound)
        return mac.digest()
