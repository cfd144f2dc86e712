"""The README is what its reader will type: its Python blocks run here, against the simulator."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import socket
import sqlite3
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from support import client_of, gone, plain_session, turns_until
from yarl import URL

from xiling_async import Polling, State, Timeouts, XilingError, errors, simulator
from xiling_async.simulator import Simulator, faults
from xiling_async.testing.clock import ManualClock

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


async def _run(number: int, sim: Simulator, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """As written; only the addresses of the service and of the receiver are this machine's. Returns its names."""
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
    names: dict[str, Any] = {"Polling": Polling}
    running = eval(code, names)
    if inspect.iscoroutine(running):
        await running
    return names


def _number(mark: str) -> int:
    (number,) = [place for place, block in enumerate(BLOCKS) if mark in block]
    return number


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
    number = _number(mark)
    first = asyncio.create_task(_run(number, sim, tmp_path, monkeypatch))
    await sim.wait_for_posts(2 if jobs > 2 else 1)
    first.cancel()
    await asyncio.wait([first])
    for _ in range(2):
        await _run(number, sim, tmp_path, monkeypatch)
    assert (len(sim.ledger.posts), sim.ledger.paid_submits) == (jobs, jobs)


async def test_the_table_of_the_queue_worker_answers_every_error(
    sim: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each class of the error tree stands in one row, and `action` of the block says what that row says."""
    names = await _run(_number("def action("), sim, tmp_path, monkeypatch)
    rows = re.findall(r"^\| (`[^|]+) \| ([^|]+) \| [^|]+ \|$", README.read_text("utf-8"), re.MULTILINE)
    answers = [(name, answer) for classes, answer in rows for name in re.findall(r"`(\w+)`", classes)]
    tree = {name: cls for name, cls in vars(errors).items() if isinstance(cls, type) and issubclass(cls, XilingError)}
    public = [name for name in tree if not name.startswith("_") and name != "XilingError"]
    table = [(name, answer) for name, answer in answers if name in public]
    assert sorted(name for name, _ in table) == sorted(public)
    assert [(name, names["action"](tree[name]("why"))) for name, _ in table] == table


async def test_the_queue_worker_acknowledges_only_what_is_at_its_end(
    sim: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An order that breaks the rules and one that the service refuses are parked; one whose job still runs is
    delivered again, and not bought again."""
    names = await _run(_number("def action("), sim, tmp_path, monkeypatch)
    pauses: list[float] = []

    async def sleep(delay_s: float) -> None:
        pauses.append(delay_s)

    names["asyncio"] = SimpleNamespace(sleep=sleep)
    orders: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    parked: list[str] = []
    clock = ManualClock()
    async with Simulator(manual=True) as shop, client_of(shop, clock=clock, timeouts=Timeouts(wait=60)) as client:
        worker = asyncio.create_task(names["work"](orders, parked, client))
        orders.put_nowait({"id": "wrong", "prompt": ""})
        await orders.join()
        shop.script(faults.status(400))
        orders.put_nowait({"id": "refused", "prompt": "boats"})
        await orders.join()
        orders.put_nowait({"id": "late", "prompt": "boats"})
        await shop.wait_for_posts(2)
        await turns_until(lambda: client.stats().jobs.get(State.ACCEPTED) == 1)
        clock.advance(61)
        await turns_until(lambda: pauses == [1])
        assert await shop.finish(shop.ledger.task_ids[0]) == 200
        await orders.join()
        assert (parked, len(shop.ledger.posts), shop.ledger.paid_submits) == (["wrong", "refused"], 2, 1)
        await gone(worker)


async def test_the_state_endpoint(sim: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The FastAPI recipe under uvicorn: a POST twice is one job, GET tells its state, then its video."""
    names = await _run(_number("@app.post("), sim, tmp_path, monkeypatch)
    public_url = URL(names["receiver"].public_url)
    server = uvicorn.Server(uvicorn.Config(names["app"], port=public_url.port or 0, log_config=None, ws="none"))
    serving = asyncio.create_task(server.serve())
    await turns_until(lambda: server.started)
    async with plain_session() as session:
        orders = public_url.origin() / "orders"
        for _ in range(2):
            async with session.post(orders / "42", json={"prompt": "the boat sets sail"}) as answer:
                assert (answer.status, (await answer.json())["key"]) == (202, "42")
        async with session.post(orders / "43", json={"prompt": ""}) as answer:
            assert answer.status == 422
        async with session.get(orders / "43") as answer:
            assert answer.status == 404
        await sim.settled()
        async with session.get(orders / "42") as answer:
            state = await answer.json()
    assert (state["state"], len(state["videos"]), state["error"]) == ("done", 1, None)
    assert (len(sim.ledger.posts), sim.ledger.paid_submits) == (1, 1)
    server.should_exit = True
    await serving


async def test_a_job_that_is_handed_over_twice_is_one_task(
    sim: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The procrastinate recipe, dying between the task and the acknowledgement: one task waits."""
    names = await _run(_number("queueing_lock"), sim, tmp_path, monkeypatch)
    tasks = names["tasks"].connector.jobs
    for _ in range(2):
        await names["hand_over"](names["job"])
    assert sorted(task["status"] for task in tasks.values()) == ["succeeded", "todo"]


async def test_a_job_that_is_handed_over_twice_is_one_row(
    sim: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table recipe, dying between the transaction and the acknowledgement: nothing is counted twice."""
    names = await _run(_number("INSERT INTO ends"), sim, tmp_path, monkeypatch)
    with closing(sqlite3.connect("shop.db")) as database:
        for _ in range(2):
            names["record"](database, names["job"])
        assert database.execute("SELECT user, videos FROM accounts").fetchall() == [("42", 1)]
        assert len(database.execute("SELECT * FROM ends").fetchall()) == 1
