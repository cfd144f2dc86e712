"""What may be shown: the same text with keys, callback tokens, passwords and signatures taken out."""

import re
from typing import Final

HIDDEN: Final = "<hidden>"
SAMPLE_BYTES: Final = 512  # the longest piece of somebody else's answer that an error carries (design.md, section 2)

# A callback token is exactly 80 characters of this alphabet (capability.py); nothing else of ours is.
_TOKEN: Final = re.compile(r"(?<![A-Za-z0-9_-])[A-Za-z0-9_-]{80}(?![A-Za-z0-9_-])")
_QUERY: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>?#\\]*)[?#][^\s\"'<>\\]+")
_USERINFO: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/\s\"'@]+@")
_BEARER: Final = re.compile(r"(?i)\b(bearer\s+)[^\s\"']+")


def scrub(text: str, *secrets: str) -> str:
    """`text` without the given secrets, and without anything shaped like a token, a signature or a password."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, HIDDEN)
    text = _USERINFO.sub(rf"\1{HIDDEN}@", text)
    text = _QUERY.sub(rf"\1?{HIDDEN}", text)
    text = _BEARER.sub(rf"\1{HIDDEN}", text)
    return _TOKEN.sub(HIDDEN, text)


def sample(body: bytes, *secrets: str) -> str:
    """The beginning of `body` as text, scrubbed, at most `SAMPLE_BYTES` bytes of UTF-8."""
    clean = scrub(body.decode("utf-8", "replace"), *secrets).encode("utf-8", "replace")
    return clean[:SAMPLE_BYTES].decode("utf-8", "ignore")


def shown(value: object) -> str:
    """A `repr` for fields that may hold signed URLs: for `attrs.field(repr=shown)`."""
    return scrub(repr(value))
