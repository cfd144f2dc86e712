"""What may be shown: the same text with keys, callback tokens, passwords and signatures taken out."""

import re
from typing import Final

HIDDEN: Final = "<hidden>"
SAMPLE_BYTES: Final = 512  # the longest piece of an answer of the service that an error carries
LONG_CHARACTERS: Final = 8  # a shorter secret (a key of the simulator) is hidden only where it is a word of its own

# A callback token is 80 characters of this alphabet. In a repr the "n" of "\\n" may stand before it.
_TOKEN: Final = re.compile(r"(?<![A-Za-z0-9_-])[A-Za-z0-9_-]{80,}")
# A URL to its end. JSON may hold it as "https:\/\/" and "\u0026", a repr doubles the backslashes; a quote ends it
# unless it goes on behind. A match takes the whole URL, and schemes are short: a megabyte of anything is cheap.
_URL: Final = re.compile(
    r"([A-Za-z][A-Za-z0-9+.-]{0,20}:\\{0,4}/\\{0,4}/)"  # scheme
    r"((?:<hidden>|[^\s\"'<>]|'(?=[\w&=%]))*)"
)
_BEARER: Final = re.compile(r"(?i)\b(bearer\s+)[^\s\"']+")


def scrub(text: str, *secrets: str) -> str:
    """`text` without the given secrets, and without anything shaped like a token, a signature or a password."""
    for secret in secrets:
        if len(secret) >= LONG_CHARACTERS:
            text = text.replace(secret, HIDDEN)
        elif secret:
            text = re.sub(rf"(?<![\w./-]){re.escape(secret)}(?![\w/-]|\.\w)", HIDDEN, text)
    text = _BEARER.sub(rf"\1{HIDDEN}", _URL.sub(_bare, text))
    return _TOKEN.sub(HIDDEN, text)


def without_tokens(text: str) -> str:
    """`text` without anything shaped like a callback token; all else stays."""
    return _TOKEN.sub(HIDDEN, text)


def _bare(url: re.Match[str]) -> str:
    """The URL without user, password, query and fragment."""
    scheme, rest = url.groups()
    address, *signed = re.split("[?#]", rest, maxsplit=1)
    host, slash, path = address.partition("/")
    _, at, host = host.rpartition("@")
    return f"{scheme}{HIDDEN if at else ''}{at}{host}{slash}{path}" + (f"?{HIDDEN}" if any(signed) else "")


def sample(body: bytes, *secrets: str) -> str:
    """The beginning of `body` as text, scrubbed, at most `SAMPLE_BYTES` bytes of UTF-8."""
    clean = scrub(body.decode("utf-8", "replace"), *secrets).encode("utf-8", "replace")
    return clean[:SAMPLE_BYTES].decode("utf-8", "ignore")


def shown(value: object) -> str:
    """A `repr` for fields that may hold signed URLs: for `attrs.field(repr=shown)`. Never raises."""
    try:
        return scrub(repr(value))
    except Exception as why:  # a number of thousands of digits, a nest of thousands of lists, a repr of the user's
        return f"<{type(value).__name__} that cannot be shown: {type(why).__name__}>"
