"""What a stranger sends reaches the screen as plain text, and harms one row at most."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import unicodedata
from pathlib import Path

import pytest
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from test_batch import OUT, WAVES, jsonl, results, scenes
from test_submit import IMAGE, QUICK, STORED, Ran, xiling

from xiling_async import InvalidRequest, StoreError
from xiling_async.cli import output
from xiling_async.cli.batch import gallery
from xiling_async.cli.batch.results import Results
from xiling_async.cli.report import message_of
from xiling_async.simulator import Simulator, faults

PORT = ("--port", "0")
LINES = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # whatever str.splitlines takes for the end of a line
HOSTILE_TEXTS = (
    "\x1b[2J\x1b[1;1H all gone",
    "\x1b]0;title\x07",
    "\x9b31m red",
    "ok\r\nxiling: paid twice",
    "\u202egpj.exe",
    "\x08\x08\x08\x7f",
    f"one{LINES}two",
    "[bold red]markup[/] {braces} %s",
    "\U000e0041\u200b\u2066",
)
ODD_URLS = (
    "https://./x",
    "https://a..b/x.mp4",
    f"https://{'a' * 64}.example/x.mp4",
    "https://[::1",
    "https://\u2100.example/x",
    "https://xn--\xad/x",
)
NOT_URLS = (
    "javascript:alert(1)",
    "file:///etc/passwd",
    "https://media.example/\x1b[2J",
    "https://media.example/a\nhttps://evil.example/b",
    "//media.example/x",
    "gopher://media.example/x",
    " ",
)
TOO_LONG = f"https://media.example/{'a' * 100_000}"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def is_plain(text: str) -> bool:
    """Whether this is lines of text: nothing in it moves a cursor, colours, hides or turns round what follows."""
    return not any(unicodedata.category(one) in ("Cc", "Cf", "Cs", "Zl", "Zp") for one in re.sub(r"[\n\t]", "", text))


def shown(ran: Ran) -> str:
    """All that a command wrote; it is plain."""
    assert is_plain(ran.out) and is_plain(ran.err), (ran.out, ran.err)
    return ran.out + ran.err


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=ascii)
async def test_what_the_service_says_is_plain_text_in_every_command(sim: Simulator, text: str) -> None:
    """A message of the service, in what submit, wait, download, jobs and batch print: no control character is left."""
    given = ("submit", "waves", *IMAGE, *PORT, *STORED)
    sim.script(faults.failed(text))
    failed = await xiling(sim, *given, "--key", "failed")
    assert failed.code == 1
    shown(failed)
    (task_id,) = sim.ledger.task_ids
    sim.script(faults.business_error(100001, text))
    refused = await xiling(sim, *given, "--key", text)
    assert refused.code == 1
    shown(refused)
    names: list[tuple[str, ...]] = [("wait", task_id), ("wait", "failed", *STORED), ("wait", text, *STORED, *QUICK)]
    names += [("download", task_id, *OUT), ("download", "failed", *STORED, *OUT)]
    for words in names:
        ran = await xiling(sim, *words)
        assert ran.code != 0
        shown(ran)
    for words in ((), ("--all",)):
        listed = await xiling(sim, "jobs", *STORED, *words)
        assert (listed.code, len(listed.out.splitlines())) == (0, 2)
        shown(listed)
    sim.script(faults.failed(text))
    shown(await xiling(sim, "batch", str(jsonl({**WAVES, "prompt": text})), *OUT, *PORT))
    for machine in (failed, await xiling(sim, "wait", task_id, "--json")):
        shown(machine)


@pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=ascii)
def test_the_last_line_before_the_screen_escapes(text: str) -> None:
    """However text is drawn (a line, a cell, a live display), no character of it is an order to the terminal."""
    table = Table(box=None)
    table.add_column(Text(text))
    table.add_row(Text(text), text)
    drawn = io.StringIO()
    out = output.console()
    out.file = drawn
    output.say(out, text)
    output.say_to_copy(out, text)
    assert "xiling: paid twice" not in drawn.getvalue().splitlines()
    output.listing(out, [text])
    out.print(table)
    with Live(console=out, auto_refresh=False) as live:
        live.update(Text(text), refresh=True)
    assert is_plain(drawn.getvalue())
    before = drawn.tell()
    output.write(out, text)  # for another program: one line
    assert len(drawn.getvalue()[before:].splitlines()) == 1


def test_our_own_colours_and_cursor_moves_stay() -> None:
    """What is escaped is the text; the styles and the live display's own moves reach the terminal."""
    drawn = io.StringIO()
    out = output.console()
    out = type(out)(file=drawn, force_terminal=True, width=40, color_system="standard", _environ={"TERM": "xterm"})
    output.say(out, "a\x1b[31mb", "bold")
    assert drawn.getvalue() == "\x1b[1ma\\x1b[31mb\x1b[0m\n"


def test_message_of_errors() -> None:
    """One line, but for the rules of a request; what would move a cursor is written as an escape."""
    assert message_of(StoreError("a\n b\x1b[2J")) == "a b\\x1b[2J"
    assert message_of(InvalidRequest("a:\n  - b\r\n  - c\x07")) == "a:\n  - b\\r\n  - c\\x07"
    assert output.printable("é 海\u3000 \u202e") == "é 海\u3000 \\u202e"


# --- URLs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", [*ODD_URLS, *NOT_URLS], ids=lambda url: ascii(url[:30]))
async def test_a_hostile_video_url_is_that_rows_failure(sim: Simulator, url: str) -> None:
    """In a batch the neighbours are bought, saved and listed; the row is bought and not saved, in words."""
    sim.script(faults.callback_fields(video_url=url), faults.no_status_endpoint())
    file = jsonl(*scenes(3))
    ran = await xiling(sim, "batch", str(file), *OUT, *PORT, "--in-flight", "1", "--timeout", "2")
    told = shown(ran)
    assert ran.code in (1, 3), told
    assert sorted(line["line"] for line in results() if line["file"]) == [2, 3]
    assert "line 1: bought: " in told and "Traceback" not in told
    assert sim.ledger.paid_submits == 3


@pytest.mark.parametrize("url", [*ODD_URLS, *NOT_URLS], ids=lambda url: ascii(url[:30]))
async def test_a_hostile_video_url_is_that_jobs_failure(sim: Simulator, url: str) -> None:
    """`submit --out`, `wait --out` and `download`: one line that says what it means for the money, no traceback."""
    sim.script(faults.callback_fields(video_url=url), faults.no_status_endpoint())
    more = (*STORED, "--out", "clips", "--timeout", "2")
    ran = await xiling(sim, "submit", "waves", *IMAGE, *PORT, *more, "--key", "k")
    assert ran.code in (1, 3)
    assert ran.out == "" and is_plain(ran.error)
    for words in (("wait", "k", *more), ("download", "k", *more[:-2])):
        ran = await xiling(sim, *words)
        assert ran.code in (1, 3)
        assert ran.out == "" and is_plain(ran.error)


@pytest.mark.parametrize("url", [*NOT_URLS, TOO_LONG], ids=lambda url: ascii(url[:30]))
async def test_only_urls_are_results(sim: Simulator, url: str) -> None:
    """What stands in `video_url` and is no http(s) URL of a sane length is not printed as a result."""
    sim.script(faults.callback_fields(video_url=url), faults.no_status_endpoint())
    ran = await xiling(sim, "submit", "waves", *IMAGE, *PORT, "--timeout", "2")
    assert (ran.out, ran.code in (1, 3)) == ("", True)
    assert is_plain(ran.err)


# --- files ------------------------------------------------------------------------------------------------------------


def plant(kind: str, at: Path) -> Path:
    """Something at this path that is not a file of ours; what it stands for, which must stay as it is."""
    kept = Path("kept")
    kept.write_text("not yours\n")
    match kind:
        case "symlink":
            at.symlink_to(kept.absolute())
        case "hard link":
            os.link(kept, at)
        case "dangling":
            kept = Path("elsewhere")
            at.symlink_to(kept.absolute())
        case "fifo":
            os.mkfifo(at)
    return kept


@pytest.mark.parametrize("kind", ["symlink", "hard link", "dangling", "fifo"])
@pytest.mark.parametrize("name", [f".{gallery.NAME}.part", gallery.NAME, "results.jsonl", ".callback-port"])
async def test_a_link_in_the_folder_is_not_followed(sim: Simulator, name: str, kind: str) -> None:
    """A link where the batch writes is neither followed nor truncated; the command ends in words."""
    Path("out").mkdir()
    kept = plant(kind, Path("out", name))
    before = kept.read_bytes() if kept.exists() else None
    async with asyncio.timeout(20):
        ran = await xiling(sim, "batch", str(jsonl(WAVES)), *OUT, *PORT)
    assert (kept.read_bytes() if kept.exists() else None) == before
    assert "Traceback" not in shown(ran)
    if name == "results.jsonl":
        assert ran.code == 1 and "results.jsonl cannot be written" in ran.error
        assert sim.ledger.paid_submits == 0
    else:
        assert sim.ledger.paid_submits <= 1


def test_results_swapped_for_a_link_are_not_followed() -> None:
    """Also while the batch runs."""
    results = Results(Path())
    results.open()
    results.path.unlink()
    kept = plant("symlink", results.path)
    with pytest.raises(StoreError, match=r"results\.jsonl cannot be written"):
        results.add([{"task_id": "t"}])
    assert kept.read_text() == "not yours\n"


@pytest.mark.parametrize("type_", ["webm", "mov", "bin"])
async def test_a_file_of_another_type_is_not_fetched_again(sim: Simulator, type_: str) -> None:
    """A video whose bytes were of another type than the documented one: every later run finds it, exit code 0."""
    words = ("batch", str(jsonl(WAVES)), *OUT, *PORT)
    assert (await xiling(sim, *words)).code == 0
    (task_id,) = sim.ledger.task_ids
    Path("out", f"{task_id}.mp4").replace(Path("out", f"{task_id}.{type_}"))
    asked = len(sim.ledger.media)
    for _ in range(2):
        again = await xiling(sim, *words)
        assert (again.code, len(sim.ledger.media)) == (0, asked)
    saved = await xiling(sim, "wait", task_id, "--out", "out")
    assert (saved.code, saved.out, len(sim.ledger.media)) == (0, f"out/{task_id}.{type_}\n", asked)


def test_a_console_prints_json_untouched() -> None:
    """A line for another program is JSON in ASCII: escaping it changes nothing."""
    drawn = io.StringIO()
    out = Console(file=drawn)
    line = json.dumps({"message": "".join(HOSTILE_TEXTS)})
    output.write(out, line)
    assert drawn.getvalue() == f"{line}\n"
    assert re.fullmatch(r"[ -~]+\n", drawn.getvalue())
