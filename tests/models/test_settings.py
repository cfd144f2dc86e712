"""What the user says: the argument wins, blank is unset, keys cross no network readable, and nothing is echoed."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from yarl import URL

from xiling_async.errors import ConfigurationError
from xiling_async.models.settings import (
    DEFAULT_BASE_URL,
    Limits,
    Polling,
    Timeouts,
    api_key,
    base_url,
    callback_base,
    check_reachable,
    extra_headers,
    is_loopback,
    webhook_secrets,
)

SECRET = "SECRETSECRETSECRET"
LOOPBACK = [
    "localhost", "LOCALHOST", "127.0.0.1", "127.1.2.3", "127.255.255.254", "[::1]", "[0:0:0:0:0:0:0:1]", "[0000::0001]",
]  # fmt: skip
# 127.1, 2130706433, 0x7f000001 and 017700000001 are 127.0.0.1 to a C library: not understood, so not trusted.
ELSEWHERE = [
    "api.keevx.com", "10.0.0.1", "192.168.1.1", "0.0.0.0", "[::]", "169.254.1.1", "[fe80::1]", "126.255.255.255",
    "128.0.0.1",    "localhost.example.com", "localhost.", "xlocalhost", "127.0.0.1.example.com", "127.0.0.1.",
    "127.1", "2130706433",
    "0x7f000001", "017700000001", "[::2]", "[64:ff9b::7f00:1]", "\uff11\uff12\uff17.0.0.2.example",
]  # fmt: skip


# --- the key -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "xiling", "keevx", "key"),
    [
        ("arg", "one", "two", "arg"),
        (" arg \n", "one", "two", "arg"),
        (None, "one", "two", "one"),
        (None, " one\n", None, "one"),
        (None, None, "two", "two"),
        (None, "", "two", "two"),
        (None, " \t", "two", "two"),
        ("", "one", None, "one"),
        ("  ", "one", None, "one"),
    ],
)
def test_where_the_key_comes_from(
    monkeypatch: pytest.MonkeyPatch, given: str | None, xiling: str | None, keevx: str | None, key: str
) -> None:
    """The argument, else XILING_API_KEY, else KEEVX_API_KEY; blank is unset, white space around it is cut."""
    for name, value in (("XILING_API_KEY", xiling), ("KEEVX_API_KEY", keevx)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert api_key(given) == key


@pytest.mark.parametrize("value", [None, "", "  "])
def test_no_key_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    """It names the variables, and says that nothing was sent."""
    monkeypatch.setenv("XILING_API_KEY", "")
    with pytest.raises(ConfigurationError, match=r"XILING_API_KEY.*KEEVX_API_KEY.*Nothing was sent"):
        api_key(value)


@pytest.mark.parametrize(
    "key", [f"{SECRET}\n{SECRET}", f"{SECRET}\0", f"Bearer {SECRET}", f"{SECRET}é", f"{SECRET}\x7f"]
)
def test_a_key_that_no_header_may_hold_is_refused(key: str) -> None:
    """And is not repeated in the message."""
    with pytest.raises(ConfigurationError) as caught:
        api_key(key)
    assert SECRET not in f"{caught.value!r} {caught.value}"


# --- the base URL --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "environment", "url"),
    [
        (None, None, DEFAULT_BASE_URL),
        (None, "", DEFAULT_BASE_URL),
        (None, "  ", DEFAULT_BASE_URL),
        ("", None, DEFAULT_BASE_URL),
        (None, "https://api.keevx.cn/v1", "https://api.keevx.cn/v1"),
        ("https://a.example/v2", "https://api.keevx.cn/v1", "https://a.example/v2"),
        (URL("https://a.example/v2"), None, "https://a.example/v2"),
        (" https://a.example/v2 ", None, "https://a.example/v2"),
        ("HTTPS://A.example:8443/v2/", None, "https://a.example:8443/v2/"),
    ],
)
def test_where_the_base_url_comes_from(
    monkeypatch: pytest.MonkeyPatch, given: str | URL | None, environment: str | None, url: str
) -> None:
    """The argument, else XILING_BASE_URL, else the vendor's; blank is unset."""
    if environment is not None:
        monkeypatch.setenv("XILING_BASE_URL", environment)
    assert str(base_url(given)) == url


@pytest.mark.parametrize("host", LOOPBACK)
def test_plain_http_goes_to_this_machine(host: str) -> None:
    """Every spelling of loopback, with and without a port."""
    assert base_url(f"http://{host}:8000/v1").port == 8000
    assert base_url(f"HTTP://{host}/v1").scheme == "http"
    assert is_loopback(URL(f"http://{host}").host)


@pytest.mark.parametrize("host", ELSEWHERE)
def test_plain_http_goes_nowhere_else(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """Private networks, lookalikes and odd spellings included, from either source."""
    with pytest.raises(ConfigurationError, match="plain http"):
        base_url(f"http://{host}:8000/v1")
    monkeypatch.setenv("XILING_BASE_URL", f"http://{host}/v1")
    with pytest.raises(ConfigurationError, match="plain http"):
        base_url(None)
    with pytest.raises(ConfigurationError, match="plain http"):
        callback_base(f"http://{host}/hook", 80)
    assert not is_loopback(URL(f"http://{host}").host)


def test_no_host_is_not_loopback() -> None:
    """Nothing is not this machine."""
    assert not is_loopback(None)
    assert not is_loopback("")


@pytest.mark.parametrize(
    "url",
    [
        "api.keevx.com/v1",
        "/v1",
        "ftp://a.example",
        "file:///etc/passwd",
        "https://",
        "https:///v1",
        "https://[::1",
        "x",
    ],
)
def test_what_is_not_an_http_url_is_refused(url: str) -> None:
    """For the API and for the receiver."""
    with pytest.raises(ConfigurationError, match="is not an http"):
        base_url(url)
    with pytest.raises(ConfigurationError, match="is not an http"):
        callback_base(url, None)


@pytest.mark.parametrize(
    "url",
    [
        f"https://user:{SECRET}@a.example/v1", f"https://{SECRET}@a.example/v1", f"https://:{SECRET}@a.example/v1",
        f"https://a.example/v1?key={SECRET}", f"https://a.example/v1#{SECRET}", f"http://user:{SECRET}@10.0.0.1/",
        f"ftp://user:{SECRET}@a.example/", f"http://user:{SECRET}@localhost/",
    ],
)  # fmt: skip
def test_a_url_holds_no_secret(url: str) -> None:
    """User, password, query and fragment are refused, and the message does not repeat them."""
    for check in (base_url, lambda text: callback_base(text, 8080)):
        with pytest.raises(ConfigurationError) as caught:
            check(url)
        assert SECRET not in f"{caught.value!r} {caught.value}"


# --- the receiver's URL --------------------------------------------------------------------------------------------


def test_the_receivers_url() -> None:
    """A public URL with or without an own server; a port alone is this machine; nothing at all cannot be reached."""
    assert callback_base("https://me.example/xiling", 8080) == URL("https://me.example/xiling")
    assert callback_base(URL("https://me.example/xiling"), None) == URL("https://me.example/xiling")
    assert callback_base("http://127.0.0.1:9/hook", 9) == URL("http://127.0.0.1:9/hook")
    assert callback_base(None, 0) is None
    assert callback_base("  ", 0) is None
    assert callback_base(None, 8080) is None
    with pytest.raises(ConfigurationError, match="cannot reach this receiver"):
        callback_base(None, None)


@pytest.mark.parametrize("port", [-1, 65_536, "80", 80.0, True, False])
def test_a_port_is_a_port(port: Any) -> None:
    """0 to 65535, and a whole number."""
    with pytest.raises(ConfigurationError, match="port must be"):
        callback_base("https://me.example", port)


def test_a_receiver_on_this_machine_needs_a_service_on_this_machine() -> None:
    """Otherwise nobody would ever call it, and the user would wait for nothing."""
    here, there = URL("http://127.0.0.1:1/v1"), URL("https://api.keevx.com/v1")
    check_reachable(None, here)
    check_reachable(URL("http://localhost:8/"), here)
    check_reachable(URL("https://me.example/"), there)
    check_reachable(URL("https://me.example/"), here)
    for receiver in (None, URL("http://localhost:8/"), URL("https://[::1]/")):
        with pytest.raises(ConfigurationError, match="cannot reach this receiver"):
            check_reachable(receiver, there)


# --- secrets of callback URLs --------------------------------------------------------------------------------------


def test_where_the_secrets_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """One or several, as text or bytes, in order; else the variable, separated by commas; else none of the user's."""
    assert webhook_secrets(None) == ()
    assert webhook_secrets(SECRET) == (SECRET.encode(),)
    assert webhook_secrets([SECRET, b"x" * 16]) == (SECRET.encode(), b"x" * 16)
    assert webhook_secrets(()) == ()
    monkeypatch.setenv("XILING_WEBHOOK_SECRET", f" {SECRET} ,, {'b' * 16} ")
    assert webhook_secrets(None) == (SECRET.encode(), b"b" * 16)
    assert webhook_secrets(b"c" * 16) == (b"c" * 16,)
    monkeypatch.setenv("XILING_WEBHOOK_SECRET", "  ")
    assert webhook_secrets(None) == ()


@pytest.mark.parametrize("secret", ["", "x" * 15, b"", b"x" * 15, ["x" * 16, "short"], "é" * 7])
def test_a_short_secret_is_refused(secret: Any) -> None:
    """16 bytes at least, each of them."""
    with pytest.raises(ConfigurationError, match="at least 16 bytes") as caught:
        webhook_secrets(secret)
    assert "short" not in str(caught.value)


def test_a_short_secret_of_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not quietly replaced by another one."""
    monkeypatch.setenv("XILING_WEBHOOK_SECRET", "short")
    with pytest.raises(ConfigurationError, match="at least 16 bytes"):
        webhook_secrets(None)


@pytest.mark.parametrize("secret", [[20], bytearray(b"x" * 32), [None], range(100, 120), [["x" * 16]]])
def test_a_secret_is_text_or_bytes(secret: Any) -> None:
    """`bytes(20)` is twenty zeros, and no secret at all."""
    with pytest.raises(ConfigurationError, match="text or bytes"):
        webhook_secrets(secret)


# --- headers -------------------------------------------------------------------------------------------------------


def test_extra_headers_are_taken_as_they_are() -> None:
    """The vendor's skills send `source: skill`; None is none, and the result is a copy."""
    given = {"source": "skill"}
    taken = extra_headers(given)
    assert taken == given
    assert taken is not given
    assert extra_headers(None) == {}


@pytest.mark.parametrize("name", ["Authorization", "authorization", "CONTENT-TYPE", "Content-Length", "Host"])
def test_the_clients_own_headers_cannot_be_replaced(name: str) -> None:
    """Least of all the key."""
    with pytest.raises(ConfigurationError, match=name):
        extra_headers({name: SECRET})


@pytest.mark.parametrize(
    ("name", "value"), [("x", "a\nb"), ("x", "a\rb"), ("x", "\0"), ("x\n", "a"), ("x", 5), ("x", None)]
)
def test_a_header_is_a_line_of_text(name: str, value: Any) -> None:
    """Nothing can be smuggled into the request."""
    with pytest.raises(ConfigurationError, match="not a line of text"):
        extra_headers({name: value})


# --- numbers -------------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_contracts() -> None:
    """design.md, section 2."""
    assert Limits() == Limits(submits=64, submits_per_second=None, gets_per_second=20, downloads=8)
    assert Timeouts() == Timeouts(connect=10, answer=60, wait=1800, uncertain=3600, stall=60)
    assert Polling() == Polling(every=None, grace=None)


@pytest.mark.parametrize("kind", [Limits, Timeouts])
@pytest.mark.parametrize("value", [0, -1, float("nan"), True, "5", [], b"5"])
def test_every_number_is_above_0(kind: Any, value: Any) -> None:
    """The message names the setting."""
    for name in attrs.fields_dict(kind):
        with pytest.raises(ConfigurationError, match=f"{kind.__name__}.{name} must be a (whole )?number above 0"):
            kind(**{name: value})


def test_only_what_may_be_absent_may_be_none() -> None:
    """`submits_per_second=None` is no limit; `wait=None` would be a wait of unknown length."""
    assert Limits(submits_per_second=None) == Limits()
    needed: list[tuple[Any, str]] = [
        (Limits, "submits"), (Limits, "gets_per_second"), (Timeouts, "wait"), (Timeouts, "connect"),
    ]  # fmt: skip
    for kind, name in needed:
        with pytest.raises(ConfigurationError, match=name):
            kind(**{name: None})


def test_an_endless_wait_is_allowed() -> None:
    """`math.inf` is a number above 0."""
    assert Timeouts(wait=float("inf")).wait == float("inf")


@pytest.mark.parametrize("value", [-1, float("nan"), "5", True, []])
def test_polling_is_checked(value: Any) -> None:
    """`every` above 0, `grace` 0 or more."""
    for name in ("every", "grace"):
        with pytest.raises(ConfigurationError, match=f"Polling.{name}"):
            Polling(**{name: value})
    with pytest.raises(ConfigurationError):
        Polling(every=0)
    assert Polling(every=1, grace=0).grace == 0
