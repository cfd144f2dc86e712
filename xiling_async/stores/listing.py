"""The SQL of a page of jobs, for SQLite and PostgreSQL alike.

It is built for each query, so that some index always has the wanted jobs in their order, and the first of many costs
what the first of few does. For several states the pages of each are merged. With metadata there is a choice; the index
with the fewest entries for the query is taken.
"""
# ruff: noqa: S608 - the text is made of names of tables and numbers of values only

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from xiling_async.models.query import JobQuery
from xiling_async.models.record import JobRecord, State

Place = tuple[float, str]  # of a job in a listing: the time by which it is ordered, and its id
Page = tuple[list[JobRecord], Place | None]  # with the place of its last job; None behind the end
Statement = tuple[str, list[Any]]  # with its values

FIRST: Final[Place] = (-math.inf, "")  # before the first page, the oldest first
PAGE: Final = 200  # jobs; to read them takes some milliseconds, in which no other job of a SQLite store is written
ENOUGH: Final = 1_000  # entries of an index that are counted when indexes are compared


def pair_hash(name: str, value: str) -> bytes:
    """A pair of metadata as the table `metadata` has it: an index of PostgreSQL takes no long text."""
    return hashlib.sha256(json.dumps([name, value]).encode()).digest()


def pair_hashes(metadata: Mapping[str, str]) -> list[bytes]:
    return [pair_hash(name, value) for name, value in metadata.items()]


class _Values:
    """The values of a statement; each is put into the text as its mark and its number."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self.all: list[Any] = []

    def add(self, value: object) -> str:
        self.all.append(value)
        return f"{self._mark}{len(self.all)}"


class Listings:
    """`jobs`, `metadata`: the names of the tables. `mark`: how a value is marked, before its number."""

    def __init__(self, columns: str, *, jobs: str, metadata: str, mark: str) -> None:
        self._columns = columns
        self._jobs = jobs
        self._metadata = metadata
        self._mark = mark

    def sizes(self, query: JobQuery) -> Statement | None:
        """The statement that counts, up to `ENOUGH`, the entries of each index that has the jobs in order: one for each
        pair of metadata, then that of states and kinds. None if there is no choice."""
        pairs = pair_hashes(query.metadata)
        values = _Values(self._mark)
        order = f"ORDER BY created_at, job_id LIMIT {ENOUGH}"
        indexes = [f"SELECT 1 FROM {self._metadata} WHERE pair = {values.add(pair)} {order}" for pair in pairs]
        if query.states is not None or query.kind is not None:
            indexes.append(_union(self._walks("1", query, start(query), values, limit=ENOUGH)))
        if not pairs or len(indexes) == 1:
            return None
        return f"SELECT {', '.join(f'(SELECT COUNT(*) FROM ({each}) AS counted)' for each in indexes)}", values.all

    def page(self, query: JobQuery, place: Place, sizes: Sequence[int]) -> Statement:
        """The statement of the jobs behind this place. `sizes`: what the statement `sizes` gave, if there was one."""
        pairs = pair_hashes(query.metadata)
        index = min(range(len(sizes)), key=sizes.__getitem__, default=0)
        if index < len(pairs):
            return self._by_metadata(query, place, pairs.pop(index), pairs)
        values = _Values(self._mark)
        walks = self._walks(self._columns, query, place, values, limit=PAGE, others=self._have(pairs, values))
        if len(walks) == 1:
            return walks[0], values.all
        return f"{_union(walks)} {_ordered(query, 'created_at', 'id', limit=PAGE)}", values.all

    def _by_metadata(self, query: JobQuery, place: Place, pair: bytes, others: Sequence[bytes]) -> Statement:
        values = _Values(self._mark)
        names = ("pairs.created_at", "pairs.job_id")
        kinds_and_states = (
            " AND ".join([f"{name} = {values.add(value)}" for name, value in prefix.items()])
            for prefix in _prefixes(query)
        )
        # CROSS JOIN: SQLite keeps this order of the tables.
        return (
            f"SELECT {self._columns} FROM {self._metadata} AS pairs CROSS JOIN {self._jobs} AS jobs"
            f" WHERE pairs.pair = {values.add(pair)} AND jobs.id = pairs.job_id"
            f" AND {_behind(query, place, names, {}, values)}"
            f" AND ({' OR '.join(each or 'TRUE' for each in kinds_and_states)}){self._have(others, values)}"
            f" {_ordered(query, *names, limit=PAGE)}"
        ), values.all

    def _walks(
        self, columns: str, query: JobQuery, place: Place, values: _Values, *, limit: int, others: str = ""
    ) -> list[str]:
        """A statement for each part of an index that has jobs of the query in order.

        Only that index has the order which each asks for (an `=` would make the order of all jobs do as well): the
        planner of PostgreSQL, which guesses how common a kind is, has no choice.
        """
        return [
            f"SELECT {columns} FROM {self._jobs} AS jobs"
            f" WHERE {_behind(query, place, ('created_at', 'id'), prefix, values)}{others}"
            f" {_ordered(query, *prefix, 'created_at', 'id', limit=limit)}"
            for prefix in _prefixes(query)
        ]

    def _have(self, pairs: Sequence[bytes], values: _Values) -> str:
        """Looked up for each job: with an OFFSET, PostgreSQL does not make it the beginning of the walk."""
        return "".join(
            f" AND EXISTS (SELECT 1 FROM {self._metadata} AS other WHERE other.pair = {values.add(pair)}"
            " AND other.created_at = jobs.created_at AND other.job_id = jobs.id LIMIT 1 OFFSET 0)"
            for pair in pairs
        )


def start(query: JobQuery) -> Place:
    """The place before the first page."""
    return (math.inf, "") if query.newest_first else FIRST


def _prefixes(query: JobQuery) -> list[dict[str, str]]:
    """What the first columns of an index are, for each part of it where jobs of the query stand in order."""
    if query.kind is not None:
        return [{"kind": query.kind, "state": state.value} for state in sorted(query.states or State)]
    return [{}] if query.states is None else [{"state": state.value} for state in sorted(query.states)]


def _behind(query: JobQuery, place: Place, names: tuple[str, str], prefix: Mapping[str, str], values: _Values) -> str:
    known = {name: values.add(value) for name, value in prefix.items()}
    if query.since is not None and not query.newest_first:
        place = max(place, (query.since, ""))
    columns = ", ".join([*known, *names])
    marks = ", ".join([*known.values(), *map(values.add, place)])
    if not query.newest_first:
        end = f" AND ({', '.join(known)}) <= ({', '.join(known.values())})" if known else ""
        return f"({columns}) > ({marks}){end}"
    since = values.add(-math.inf if query.since is None else query.since)
    return f"({columns}) < ({marks}) AND ({', '.join([*known, names[0]])}) >= ({', '.join([*known.values(), since])})"


def _ordered(query: JobQuery, *names: str, limit: int) -> str:
    direction = " DESC" if query.newest_first else ""
    return f"ORDER BY {', '.join(name + direction for name in names)} LIMIT {limit}"


def _union(selects: Sequence[str]) -> str:
    return " UNION ALL ".join(f"SELECT * FROM ({each}) AS page" for each in selects)
