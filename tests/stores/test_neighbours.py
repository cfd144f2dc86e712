"""A PostgreSQL database that is shared with hostile neighbours: nothing of theirs runs as us, and no table of theirs is
believed."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import re
import traceback
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from importlib import resources
from typing import Any
from urllib.parse import quote

import asyncpg
import pg
import pytest
from pg import PASSWORD, Wire, fresh_schema, pg_store
from support import client_of, model_v, settle
from test_postgres import LIVELY_S, QUICK, Notes, life, opened, raw
from test_store_contract import NOW, job, lost

from xiling_async import ConfigurationError, PostgresStore, StoreError
from xiling_async.models.record import State
from xiling_async.simulator import Simulator
from xiling_async.stores.postgres.schema import Names

# Types that our statements can meet, where a neighbour's function or operator may fit better than the server's own.
TYPES = ("text", "bytea", "bigint", "integer", "double precision", "boolean", "timestamptz", "interval", "name", "oid",
         "text[]", "bytea[]", '"char"')  # fmt: skip
RELATIONS = ("pg_class", "pg_namespace", "pg_roles", "pg_database", "pg_tables", "xiling_jobs", "xiling_tasks",
             "xiling_kept", "xiling_owners", "xiling_metadata")  # fmt: skip


@pytest.fixture
def schema() -> str:
    return fresh_schema()


@pytest.fixture
async def wire() -> AsyncIterator[Wire]:
    async with Wire() as made:
        yield made


def words_of_our_sql() -> set[str]:
    """Every word and operator sign in the files that hold statements: what a neighbour would give a meaning of his."""
    folder = resources.files("xiling_async.stores.postgres")
    files = [entry for entry in folder.iterdir() if entry.name.endswith((".py", ".sql"))]
    files.append(resources.files("xiling_async.stores") / "listing.py")
    texts = [file.read_text(encoding="utf-8") for file in files]
    return {word for word in re.findall(r"[a-z_]+|[-+*/<>=|]+", " ".join(texts).lower()) if len(word) < 64}


@functools.cache
def traps_schema() -> str:
    return fresh_schema()


async def trap(connection: Any) -> str:
    """A schema with a trap for each name and operator of our statements, for all types that fit, which raises when it
    is called or read. Made once."""
    schema = traps_schema()
    if await connection.fetchval("SELECT to_regtype($1 || '.interval')", schema):  # the last of them
        return schema
    words = words_of_our_sql()
    await connection.execute(f"CREATE SCHEMA {schema}; GRANT USAGE ON SCHEMA {schema} TO PUBLIC")
    rows = await connection.fetch(
        "SELECT proname, proargtypes::regtype[]::text[], prorettype::regtype::text FROM pg_proc "
        "WHERE pronamespace = 'pg_catalog'::regnamespace AND proname = ANY($1) AND prokind IN ('f', 'a')",
        sorted(words),
    )
    traps = {(name, types, result) for name, args, result in rows for types in concrete(args)}
    made = 0
    for name, types, result in sorted(traps):
        returns = "text" if result.startswith("any") else result
        with contextlib.suppress(asyncpg.PostgresError):  # `internal` and the like: nobody can make those
            await connection.execute(
                f'CREATE FUNCTION {schema}."{name}"({", ".join(types)}) RETURNS {returns} LANGUAGE plpgsql '
                f"AS $$BEGIN RAISE EXCEPTION 'a trap was called: {name}'; END$$"
            )
            made += 1
    signs = sorted(word for word in words if re.fullmatch(r"[-+*/<>=|]{1,3}", word) and "--" not in word)
    for number, (sign, left, right) in enumerate(itertools.product(signs, TYPES, TYPES)):
        returns = "boolean" if set(sign) & set("<>=") else "text" if sign == "||" else left
        with contextlib.suppress(asyncpg.PostgresError):  # not an operator, such as =>
            await connection.execute(
                f"CREATE FUNCTION {schema}.trap_{number}({left}, {right}) RETURNS {returns} LANGUAGE plpgsql "
                f"AS $$BEGIN RAISE EXCEPTION 'a trap was called: {sign}'; END$$;"
                f"CREATE OPERATOR {schema}.{sign} (LEFTARG={left}, RIGHTARG={right}, FUNCTION={schema}.trap_{number})"
            )
            made += 1
    await connection.execute(
        f"CREATE FUNCTION {schema}.spring() RETURNS boolean LANGUAGE plpgsql VOLATILE "
        "AS $$BEGIN RAISE EXCEPTION 'a trap was called: a relation or type'; END$$"
    )
    for relation in RELATIONS:
        await connection.execute(f"CREATE VIEW {schema}.{relation} AS SELECT {schema}.spring() AS x")
    for domain in ("text", "bytea", "int8", "float8", "timestamptz", "interval"):
        await connection.execute(f'CREATE DOMAIN {schema}."{domain}" AS pg_catalog.{domain} CHECK ({schema}.spring())')
    assert made > 1_000
    return schema


def concrete(args: list[str]) -> Iterator[tuple[str, ...]]:
    """These argument types, each polymorphic one replaced by all that can stand for it."""
    choices = {"anyelement": TYPES, "anycompatible": TYPES, "anyarray": ("text[]", "bytea[]"), '"any"': ("text",),
               "anynonarray": ("text", "bigint")}  # fmt: skip
    yield from itertools.islice(itertools.product(*(choices.get(arg, (arg,)) for arg in args)), 40)


# --- what runs as us -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["{}", "{},pg_catalog", "public,{}"], ids=["alone", "before the catalog", "as usual"])
async def test_no_function_operator_type_or_table_of_a_neighbour_is_used(
    schema: str, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Every name and operator of our statements has a trap that the search path finds first; all that a store does, on
    its pool and on its listening connection, runs into none."""
    caplog.set_level(logging.WARNING)
    async with raw() as neighbour:
        path = quote(path.format(await trap(neighbour)))
        dsn = f"{pg.server().dsn}&options=-c%20search_path%3D{path}"
        async with (
            opened(pg_store(dsn, schema=schema, heartbeat_s=0.01)) as one,
            opened(pg_store(dsn, schema=schema)) as two,
        ):
            await everything(one, two)
            first = await signs_of_life(neighbour, schema)
            async with asyncio.timeout(LIVELY_S):  # a beat, with all that a beat does
                while await signs_of_life(neighbour, schema) == first:
                    await asyncio.sleep(0.01)
    assert caplog.records == []


async def signs_of_life(connection: Any, schema: str) -> Any:
    return await connection.fetch(f"SELECT id, until FROM {schema}.xiling_owners ORDER BY id")


async def everything(one: PostgresStore, two: PostgresStore) -> None:
    """Every method of a store, and every road through it."""
    notes = Notes(job(1).id)
    two.listen(notes)
    assert await one.secret(b"s" * 32) == await two.secret(b"t" * 32)
    assert await one.recover_orphans(NOW, doubt_s=60, per_second=20) == 0
    await life(one, 1)
    await notes.state(job(1).id, State.DONE)
    await one.add(job(2, key="k2", state=State.ACCEPTED, task_ids=("t2",), outcomes=(None,), due_at=NOW))
    assert (await two.add(job(9, key="k2"))).id == job(2).id
    await one.add(job(3, key="k3"))
    await one.change(job(3).id, lost())
    assert await one.next_due() == NOW
    assert [record.id for record in await two.claim(NOW, limit=5, lease_s=60)] == [job(2).id]
    assert await two.recover_orphans(NOW, doubt_s=60, per_second=20) == 2
    assert len([record async for record in one.jobs()]) == 3
    assert len([record async for record in one.unfinished()]) == 2
    assert await one.purge(-1e9) == 1


# --- whose tables --------------------------------------------------------------------------------------------------


async def a_neighbour(connection: Any) -> str:
    name = f"neighbour_{fresh_schema()}"
    await connection.execute(f"CREATE ROLE {name} LOGIN")
    return name


def as_role(name: str) -> str:
    return pg.server().dsn.replace("//postgres:", f"//{name}:")


@pytest.mark.parametrize("what", ["a table", "a view", "all tables", "the schema"])
async def test_what_a_neighbour_made_beforehand_is_refused(schema: str, what: str) -> None:
    """In a schema where both may create: the error names whose it is, nothing of it is read, and nothing was sent."""
    async with raw() as admin:
        us, them = await a_neighbour(admin), await a_neighbour(admin)
        owner = them if what == "the schema" else "postgres"
        await admin.execute(
            f"CREATE SCHEMA {schema} AUTHORIZATION {owner}; GRANT ALL ON SCHEMA {schema} TO {us}, {them}"
        )
        if what == "a table":
            await admin.execute(f"CREATE TABLE {schema}.xiling_owners (x INT)")
            await admin.execute(f"ALTER TABLE {schema}.xiling_owners OWNER TO {them}")
        elif what == "a view":
            await admin.execute(
                f"CREATE FUNCTION {schema}.spy() RETURNS bytea LANGUAGE plpgsql AS "
                "$$BEGIN RAISE EXCEPTION 'the neighbour ran as us'; END$$;"
                f"CREATE VIEW {schema}.xiling_kept AS SELECT 'schema'::text AS name, {schema}.spy() AS value;"
                f"ALTER VIEW {schema}.xiling_kept OWNER TO {them}; GRANT SELECT ON {schema}.xiling_kept TO PUBLIC"
            )
        elif what == "all tables":
            async with opened(pg_store(as_role(them), schema=schema)):
                pass
            await admin.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA {schema} TO {us}")
        with pytest.raises(StoreError, match=f"belongs to {them}.*Nothing was sent"):
            await pg_store(as_role(us), schema=schema).open()


@pytest.mark.parametrize("owner", ["this role", "a superuser", "the database's owner"])
async def test_tables_of_those_who_are_trusted_open(schema: str, owner: str) -> None:
    """One's own, those of a superuser, and those of the owner of the database."""
    async with raw() as admin:
        us, boss = await a_neighbour(admin), await a_neighbour(admin)
        database, dsn = "postgres", as_role(us)
        if owner == "the database's owner":
            database = f"shared_{schema}"
            await admin.execute(f"CREATE DATABASE {database} OWNER {boss}")
            dsn = dsn.replace("/postgres?", f"/{database}?")
        else:
            await admin.execute(f"CREATE SCHEMA {schema}; GRANT ALL ON SCHEMA {schema} TO {us}")
        maker = {"this role": us, "a superuser": "postgres", "the database's owner": boss}[owner]
        async with opened(pg_store(as_role(maker).replace("/postgres?", f"/{database}?"), schema=schema)):
            pass
        owning = await asyncpg.connect(pg.server().dsn.replace("/postgres?", f"/{database}?"))
        await owning.execute(
            f"GRANT ALL ON SCHEMA {schema} TO {us}; GRANT ALL ON ALL TABLES IN SCHEMA {schema} TO {us}"
        )
        await owning.close()
        async with opened(pg_store(dsn, schema=schema)) as store:
            await life(store, 1)
        if database != "postgres":
            await admin.execute(f"DROP DATABASE {database} WITH (FORCE)")


# --- what a neighbour can say and hold -----------------------------------------------------------------------------


async def test_what_a_neighbour_notifies_costs_nothing_and_breaks_nothing(
    schema: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Greetings that nobody awaits are not kept, payloads that do not parse are ignored; news still arrives."""
    channel = Names(schema, "xiling_").channel
    caplog.set_level(logging.WARNING)
    async with opened(pg_store(schema=schema)) as store, opened(pg_store(schema=schema)) as other, raw() as neighbour:
        notes = Notes(job(1).id)
        store.listen(notes)
        await other.add(job(1))
        bad_versions = ("x", "", "9" * 5_000, "-1", "1.5", "\u0661", "0x1")
        for payload in [f"{job(1).id} {bad}" for bad in bad_versions] + [" ", "", "a b c", "\\"]:
            await neighbour.execute("SELECT pg_notify($1, $2)", channel, payload)
        tracemalloc.start()
        flood = "SELECT pg_notify($1, n || repeat('x', 7000)) FROM generate_series(1, 2000) AS n"
        await neighbour.execute(flood, channel)
        await other.change(job(1).id, lost())
        await notes.state(job(1).id, State.UNCERTAIN)
        kept_bytes, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert kept_bytes < 5_000_000, "of 14 MB that were sent"
    assert caplog.records == []


async def test_a_neighbours_lock_delays_an_open_by_a_bounded_time(schema: str) -> None:
    """Who holds the advisory lock of those who migrate keeps nobody waiting without end, and the error says what."""
    async with raw() as neighbour:
        await neighbour.execute(f"SELECT pg_advisory_lock({Names(schema, 'xiling_').lock})")
        async with asyncio.timeout(LIVELY_S):
            with pytest.raises(StoreError, match=r"another session .*holds a lock.*Nothing was sent"):
                await pg_store(schema=schema, connect=QUICK).open()
    async with opened(pg_store(schema=schema)):
        pass


# --- what a traceback shows ----------------------------------------------------------------------------------------


def shown_with_locals(error: BaseException) -> str:
    """A traceback as `rich` shows it: with the local variables of every frame, of the whole chain. Frames of tests are
    left out: what their author wrote down there is theirs."""
    shown = []
    chain: list[BaseException | None] = [error]
    seen: set[int] = set()
    while chain:
        link = chain.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        chain += [link.__cause__, link.__context__]
        for frame, _ in traceback.walk_tb(link.__traceback__):
            if "/tests/" not in frame.f_code.co_filename:
                shown.append(f"{frame.f_code.co_qualname}: {frame.f_locals!r}")
    return "\n".join(shown)


async def test_no_frame_of_a_traceback_holds_the_password(schema: str, wire: Wire, sim: Simulator) -> None:
    """Not when the database refuses, hangs or goes away, not for a cancelled call, not for a DSN that is refused."""
    errors: list[BaseException] = []
    for dsn in (pg.server().dsn.replace("/postgres?", "/nowhere?"), wire.dsn.replace(str(wire.port), "1")):
        with pytest.raises(StoreError) as refused:
            await pg_store(dsn, connect=QUICK).open()
        errors.append(refused.value)
    wire.passes.clear()
    with pytest.raises(StoreError) as hung:
        await pg_store(wire.dsn, connect=QUICK).open()
    errors.append(hung.value)
    opening = asyncio.create_task(pg_store(wire.dsn).open())
    await settle()
    opening.cancel()
    with pytest.raises(asyncio.CancelledError) as cancelled:
        await opening
    errors.append(cancelled.value)
    wire.passes.set()
    async with client_of(sim, store=pg_store(wire.dsn, schema=schema, connect=QUICK)) as client:
        await client.submit(model_v())
        await wire.down()
        with pytest.raises(StoreError) as away:
            await client.submit(model_v())
        errors.append(away.value)
    with pytest.raises(ConfigurationError) as unfit:
        PostgresStore(f"postgresql://u:{PASSWORD}@h/d")
    errors.append(unfit.value)
    for error in errors:
        text = shown_with_locals(error)
        assert "pg-passw0rd" not in text, text[:2_000]
