"""The house plan: imports point strictly down, each tool has one owner, and every room is small and has a name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import attrs
import pytest

import xiling_async
from xiling_async.api.transport import Answer
from xiling_async.api.wire import Envelope, Report
from xiling_async.models.lifecycle import Accepted, AnswerLost, Change, OutcomeReported, Refused
from xiling_async.models.record import JobRecord
from xiling_async.webhooks.tokens import CallbackToken

# From the ground up; a package imports from lower floors only. "": xiling_async/__init__.py, the face.
PLAN = "_internal < errors < models < kinds < api stores telemetry < media webhooks < jobs < client < testing cli face"
FLOORS = tuple(tuple(floor.split()) for floor in PLAN.split(" < "))

# An independent witness: it stands beside the house, and imports nothing of it.
WITNESS = "simulator"

# Who may use what: a call or an import whose name begins with the word on the left.
OWNERS: dict[str, tuple[str, ...]] = {
    "aiohttp.ClientSession()": ("api.transport", "media.http", "simulator*"),
    "aiohttp.web": ("webhooks*", "simulator*"),
    "cattrs": ("api.wire", "stores.rows"),
    "time": ("_internal.clock", "simulator*"),
    "asyncio.sleep": ("_internal.clock", "testing.clock", "simulator*"),
    "asyncio.timeout": ("_internal.clock", "testing.clock", "simulator*"),
    "asyncio.timeout_at": (),
    "asyncio.wait_for": (),
    "loop.call_later": ("_internal.clock", "testing.clock"),
    "loop.call_at": ("_internal.clock",),
    "os.environ": ("models.settings",),
    "os.getenv": (),
    "sqlite3": ("stores.sqlite*",),
    "asyncpg": ("stores.postgres.driver",),
    "jinja2": ("cli.batch.gallery",),
    "google_crc32c": ("media.headers",),
    "uvloop": ("cli.runtime",),
    "asyncio.run": ("cli.runtime",),
    "typer": ("cli*",),
    "rich": ("cli*",),
    "pytest": ("testing*",),
    "opentelemetry": ("telemetry.otel",),
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


def package_of(name: str) -> str:
    return name.partition(".")[0] or "face"


def floor_of(name: str) -> int | None:
    return next((floor for floor, packages in enumerate(FLOORS) if package_of(name) in packages), None)


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


def test_every_package_has_a_floor() -> None:
    """A package that is not in the line above is not in the plan."""
    assert [name for name in IN_HOUSE if floor_of(name) is None] == []
    packages = [package for floor in FLOORS for package in floor]
    assert len(set(packages)) == len(packages)


def house_imports(name: str) -> set[str]:
    """The modules of the house that this one imports, the simulator left out."""
    found = {room_of(full_name) for _, full_name in imported(TREES[name])}
    return {room for room in found if room is not None and package_of(room) != WITNESS}


@every_room
def test_imports_point_strictly_down(name: str) -> None:
    """A package imports lower packages only, and each import is written in full."""
    floor = floor_of(name)
    assert floor is not None
    assert [full_name for _, full_name in imported(TREES[name]) if full_name.startswith(".")] == []
    for room in house_imports(name):
        if package_of(room) != package_of(name):
            below = floor_of(room)
            assert below is not None
            assert below < floor, f"{name} imports {room}, which is not below it"


def test_no_two_modules_import_each_other() -> None:
    """Within a package, too, imports have one direction: there is an order in which the modules can be read."""
    left = {name: house_imports(name) - {name} for name in IN_HOUSE}
    while ready := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in ready:
            del left[name]
    assert left == {}


@every_room
def test_the_simulator_is_for_people_and_tests_only(name: str) -> None:
    """The client does not know the simulator; the command line and the fixtures show it."""
    reached = {room_of(full_name) for _, full_name in imported(TREES[name])}
    if any((room or "").partition(".")[0] == WITNESS for room in reached):
        assert name.partition(".")[0] in ("cli", "testing")


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
        for kind in (
            JobRecord,
            CallbackToken,
            Report,
            Envelope,
            Answer,
            Change,
            Accepted,
            OutcomeReported,
            AnswerLost,
            Refused,
        )
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
