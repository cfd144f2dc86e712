"""The house plan: imports point strictly down, each tool has one owner, and every room is small and has a name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import attrs
import pytest

import xiling_async
from xiling_async.capability import Claim
from xiling_async.lifecycle import Accepted, Change, Heard, Lost, Refused
from xiling_async.models import JobRecord
from xiling_async.transport import Answer
from xiling_async.wire import Envelope, Report

# The floors, from the ground up. A module imports from lower floors only; neighbours do not know each other.
# "": xiling_async/__init__.py, the face.
FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "redact", "strict_json", "clock", "tasks", "backoff", "fate", "capability", "checksums", "guard", "sniff",
        "store.hold", "store.schema", "store.pg_schema", "sockets",
    ),
    ("errors", "pace", "pictures", "threads", "announced"),
    ("models", "settings", "parts", "store.writer", "store.pg_driver"),
    (
        "kinds.image_to_video", "kinds.image_generate", "kinds.video_translate", "lifecycle", "transport", "spool",
        "targets", "door", "events",
    ),
    ("kinds", "store.base", "exchange", "hearing", "connection", "asgi", "monitor"),
    ("wire", "server", "store.rows", "store.memory", "store.pg_listen", "registry", "fetch"),
    ("failure", "intake", "receiver", "store.sqlite", "store.pg_rows", "downloads"),
    ("finding", "job", "sweeper", "store.postgres", "uploads", "media"),
    ("submission", "fanout", "store"),
    ("keeper",),
    ("engine", "reception"),
    ("client",),
    (
        "", "otel", "pytest_plugin", "pytest11.xiling_async_fixtures",
        "cli.plan", "cli.report", "cli.watch", "cli.signals", "cli.loops", "cli.gallery", "cli.rows", "cli.results",
    ),
    ("cli.audit",),
    ("cli.screen", "cli.tally"),
    ("cli.progress", "cli.saving"),
    ("cli.session", "cli.board", "cli.flow"),
    ("cli.demo", "cli.simulate", "cli.submit", "cli.batch", "cli.download", "cli.jobs", "cli.receive", "cli.wait"),
    ("cli.app",),
    ("cli",),
    ("cli.__main__",),
)  # fmt: skip

# An independent witness: it stands beside the house, and imports nothing of it.
WITNESS = "simulator"

# Who may use what: a call or an import whose name begins with the word on the left.
OWNERS: dict[str, tuple[str, ...]] = {
    "aiohttp.ClientSession()": ("transport", "media", "simulator*"),
    "aiohttp.web": ("server", "connection", "hearing", "simulator*"),
    "cattrs": ("wire", "store.rows"),
    "time": ("clock", "simulator*"),
    "asyncio.sleep": ("clock", "simulator*"),
    "asyncio.timeout": ("clock", "simulator*"),
    "asyncio.timeout_at": (),
    "asyncio.wait_for": (),
    "loop.call_later": ("clock",),
    "loop.call_at": ("clock",),
    "os.environ": ("settings",),
    "os.getenv": (),
    "sqlite3": ("store.sqlite", "store.schema", "store.writer"),
    "asyncpg": ("store.pg_driver",),
    "jinja2": ("cli.gallery",),
    "orjson": ("strict_json",),
    "uvloop": ("cli.loops",),
    "asyncio.run": ("cli.loops",),
    "typer": ("cli*",),
    "rich": ("cli*",),
    "pytest": ("pytest_plugin", "pytest11.xiling_async_fixtures"),
    "opentelemetry": ("otel",),
    "requests": (),
    "pickle": (),
    "subprocess": (),
}

# These say what to install when the extra is missing.
DOORS_OF_EXTRAS = ("cli",)

MODULE_LINES = 350
FUNCTION_LINES = 60

HOUSE = Path(xiling_async.__file__).parent


def name_of(path: Path) -> str:
    parts = path.relative_to(HOUSE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path.read_text(encoding="utf-8") for path in sorted(HOUSE.rglob("*.py"))}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
IN_HOUSE = [name for name in SOURCES if name.partition(".")[0] != WITNESS]
every_module = pytest.mark.parametrize("name", SOURCES, ids=lambda name: name or "__init__")
every_room = pytest.mark.parametrize("name", IN_HOUSE, ids=lambda name: name or "__init__")


def floor_of(name: str) -> int | None:
    return next((floor for floor, rooms in enumerate(FLOORS) if name in rooms), None)


def imported(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Each import below `tree` with the full name of what it imports (`from a import b`: a.b)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node, f"{'.' * node.level}{node.module or ''}.{alias.name}") for alias in node.names)


def room_of(full_name: str) -> str | None:
    """The module of the house that this import reaches."""
    top, _, rest = full_name.partition(".")
    if top != "xiling_async":
        return None
    while rest and rest not in SOURCES:
        rest = rest.rpartition(".")[0]
    return rest


def used(tree: ast.AST) -> Iterator[str]:
    """Every import, and every dotted name as it is written; a call ends in `()`."""
    aliases: dict[str, str] = {}
    for part in ast.walk(tree):
        if isinstance(part, ast.Import):
            aliases |= {alias.asname: alias.name for alias in part.names if alias.asname}
        elif isinstance(part, ast.ImportFrom):
            aliases |= {alias.asname or alias.name: f"{part.module}.{alias.name}" for alias in part.names}
    yield from (name for _, name in imported(tree))
    for part in ast.walk(tree):
        if isinstance(part, (ast.Attribute, ast.Name)):
            head, dot, rest = ast.unparse(part).partition(".")
            yield aliases.get(head, head) + dot + rest
            if isinstance(part, ast.Attribute) and part.attr in ("call_later", "call_at"):
                owner = ast.unparse(part.value)
                yield "clock" if owner.endswith("clock") else f"loop.{part.attr}"
        elif isinstance(part, ast.Call):
            head, dot, rest = ast.unparse(part.func).partition(".")
            yield f"{aliases.get(head, head)}{dot}{rest}()"


USED = {name: frozenset(used(tree)) for name, tree in TREES.items()}


def test_every_module_has_a_floor() -> None:
    """A module that is not in the table is not in the plan: add it where its imports allow."""
    assert [name for name in IN_HOUSE if floor_of(name) is None] == []
    rooms = [room for floor in FLOORS for room in floor]
    assert len(set(rooms)) == len(rooms)


@every_room
def test_imports_point_strictly_down(name: str) -> None:
    """Nobody imports a neighbour or a floor above, and everybody says which module is meant."""
    floor = floor_of(name)
    assert floor is not None
    for _, full_name in imported(TREES[name]):
        assert not full_name.startswith("."), f"{name}: write the import of {full_name} in full"
        room = room_of(full_name)
        if room is None or room.partition(".")[0] == WITNESS:
            continue
        below = floor_of(room)
        assert below is not None
        assert below < floor, f"{name} (floor {floor}) imports {room} (floor {below})"


@every_room
def test_the_simulator_is_for_people_and_tests_only(name: str) -> None:
    """The client does not know the simulator; the command line and the fixtures show it."""
    reached = {room_of(full_name) for _, full_name in imported(TREES[name])}
    if any((room or "").partition(".")[0] == WITNESS for room in reached):
        assert name.partition(".")[0] in ("cli", "pytest_plugin")


@every_module
def test_no_import_hides(name: str) -> None:
    """House imports stand at the top: not in a function, not under TYPE_CHECKING; only an extra's door may try."""
    tree = TREES[name]
    top = list(tree.body)
    if name in DOORS_OF_EXTRAS:
        top += [node for attempt in tree.body if isinstance(attempt, ast.Try) for node in attempt.body]
    hidden = [full_name for node, full_name in imported(tree) if node not in top and room_of(full_name) is not None]
    assert hidden == []


@pytest.mark.parametrize("name", [name for name in SOURCES if name.partition(".")[0] == WITNESS])
def test_the_simulator_imports_nothing_of_the_house(name: str) -> None:
    """It was written from the facts about the service, so that it can be a witness."""
    for _, full_name in imported(TREES[name]):
        room = room_of(full_name)
        assert room is None or room.partition(".")[0] == WITNESS, f"{name} imports {room}"


@pytest.mark.parametrize("tool", OWNERS)
def test_each_tool_has_its_owner(tool: str) -> None:
    """Sessions, servers, converters, drivers, time, sleep and environment are used by those who own them."""
    users = {name for name, words in USED.items() if any(word == tool or word.startswith(f"{tool}.") for word in words)}
    strangers = {name for name in users if not any(fnmatchcase(name, owner) for owner in OWNERS[tool])}
    assert strangers == set()


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("import time", "time"),
        ("from time import monotonic", "time.monotonic"),
        ("import aiohttp\ns = aiohttp.ClientSession()", "aiohttp.ClientSession()"),
        ("from aiohttp import ClientSession as S\ns = S()", "aiohttp.ClientSession()"),
        ("import aiohttp as a\ns = a.ClientSession()", "aiohttp.ClientSession()"),
        ("from aiohttp import web", "aiohttp.web"),
        ("import aiohttp.web", "aiohttp.web"),
        ("from asyncio import sleep", "asyncio.sleep"),
        ("import asyncio\nasync def f(): await asyncio.sleep(1)", "asyncio.sleep"),
        ("def f(loop): loop.call_later(1, f)", "loop.call_later"),
        ("import asyncio\nasyncio.get_running_loop().call_later(1, print)", "loop.call_later"),
        ("from os import environ", "os.environ"),
        ("import os\nos.environ['X']", "os.environ"),
        ("def f():\n    from cattrs import Converter", "cattrs.Converter"),
    ],
)
def test_the_owners_test_sees_every_spelling(source: str, word: str) -> None:
    """However it is imported or named, its use is noticed."""
    assert word in set(used(ast.parse(source)))


def test_a_clocks_own_timer_is_no_loops() -> None:
    """`self._clock.call_later` is what everybody is to use."""
    assert "loop.call_later" not in set(used(ast.parse("def f(self): self._clock.call_later(1, f)")))


@every_module
def test_every_module_says_what_it_is(name: str) -> None:
    """The first line of its docstring is a sentence that fits a line."""
    told = ast.get_docstring(TREES[name])
    assert told
    assert told.splitlines()[0].strip()


@every_module
def test_modules_and_functions_are_small(name: str) -> None:
    """At most 350 lines a module, 60 a function."""
    assert len(SOURCES[name].splitlines()) <= MODULE_LINES
    for node in ast.walk(TREES[name]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= FUNCTION_LINES, f"{name}.{node.name} has {lines} lines"


def test_nobody_changes_a_record() -> None:
    """`JobRecord` and what lives for one exchange are not frozen, for speed: no field of theirs is assigned to."""
    names = {
        name
        for kind in (JobRecord, Claim, Report, Envelope, Answer, Change, Accepted, Heard, Lost, Refused)
        for name in attrs.fields_dict(kind)
    }
    found = []
    for path in Path(xiling_async.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)) and node.attr in names:
                found.append(ast.unparse(node))
    others = {  # of classes that have a field of the same name
        "error.job_id", "ImageToVideo.kind", "task.status", "error.task_ids", "row.outcomes", "entry.record",
        "ending.error.task_ids",
    }  # fmt: skip
    assert {name for name in found if not name.startswith("self.")} <= others
