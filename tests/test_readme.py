"""The README is what its reader will type: its Python blocks run here, against the simulator."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import socket
from pathlib import Path

import pytest

from xiling_async import Polling, simulator
from xiling_async.simulator import Simulator

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall(README.read_text("utf-8"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_it_begins_with_two_commands() -> None:
    """There are exactly two `sh` blocks: the demo and the tests."""
    assert re.findall(r"^```sh$", README.read_text("utf-8"), re.MULTILINE) == ["```sh", "```sh"]


def test_its_links_lead_somewhere() -> None:
    """Every relative link names a file of the repository."""
    links = re.findall(r"\]\(([^)#:]+)\)", README.read_text("utf-8"))
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []


async def _run(number: int, sim: Simulator, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As written; only the addresses of the service and of the receiver are this machine's."""
    monkeypatch.setenv("XILING_BASE_URL", sim.base_url)
    monkeypatch.setenv("KEEVX_API_KEY", sim.api_key)
    monkeypatch.chdir(folder)
    port = _free_port()
    text = BLOCKS[number].replace("https://media.example.com/xiling", f"http://127.0.0.1:{port}/xiling")
    text = text.replace("port=8080", f"port={port}")
    # Without a receiver the client asks every 30 s; here every 10 ms, and media may come from this machine.
    text = text.replace("Client() as client", "Client(polling=Polling(every=0.01)) as client")
    text = text.replace("(on_event=on_event) as", "(on_event=on_event, polling=Polling(every=0.01)) as")
    picture = Path(simulator.__file__).with_name("media") / "samples" / "landscape.webp"
    text = text.replace('"boat.jpg"', repr(str(picture))).replace('"boat.mp4"', '"boat.mp4", allow_private=True')
    code = compile(text, f"README.md, Python block {number + 1}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    running = eval(code, {"Polling": Polling})
    if inspect.iscoroutine(running):
        await running


@pytest.mark.parametrize("number", range(len(BLOCKS)))
async def test_its_python_runs(
    number: int, sim: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A block runs as written, and shows what it did."""
    await _run(number, sim, tmp_path, monkeypatch)
    assert capsys.readouterr().out


@pytest.mark.parametrize(("mark", "jobs"), [("async def work(", 6), ("client.map(", 2)], ids=["worker", "fan-out"])
async def test_its_workers_survive_a_restart(
    mark: str, jobs: int, sim: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed by a cancellation once its POSTs are out, then run twice: every order was paid for once."""
    (number,) = [place for place, block in enumerate(BLOCKS) if mark in block]
    first = asyncio.create_task(_run(number, sim, tmp_path, monkeypatch))
    await sim.wait_for_posts(2 if jobs > 2 else 1)
    first.cancel()
    await asyncio.wait([first])
    for _ in range(2):
        await _run(number, sim, tmp_path, monkeypatch)
    assert (len(sim.ledger.posts), sim.ledger.paid_submits) == (jobs, jobs)
