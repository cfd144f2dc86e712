"""The SQL of a page of jobs, for SQLite and PostgreSQL alike.

It is built for each query, so that some index always has the wanted jobs in their order, and the first of many costs
what the first of few does. For several states the pages of each are merged. With metadata there is a choice; the index
with the fewest entries for the query is taken.
"""
# ruff: noqa: S608 - the text is made of names of tables and numbers of values only

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from xiling_async.models.query import JobQuery
from xiling_async.models.record import JobRecord, State

Place = tuple[float, str]  # of a job in a listing: the time by which it is ordered, and its id
Page = tuple[list[JobRecord], Place | None]  # with the place of its last job; None behind the end
Statement = tuple[str, list[Any]]  # with its values

PAGE: Final = 100  # jobs; to read them takes some milliseconds, in which no other job of a SQLite store is written
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
        indexes = [f"SELECT 1 FROM {self._metadata} WHERE pair = {values.add(pair)}" for pair in pairs]
        if query.states is not None or query.kind is not None:
            conditions = _states_and_kinds(query, values)
            indexes.append(" UNION ALL ".join(f"SELECT 1 FROM {self._jobs} WHERE {each}" for each in conditions))
        if not pairs or len(indexes) == 1:
            return None
        counts = (f"(SELECT COUNT(*) FROM ({each} LIMIT {ENOUGH}) AS counted)" for each in indexes)
        return f"SELECT {', '.join(counts)}", values.all

    def page(self, query: JobQuery, place: Place, sizes: Sequence[int]) -> Statement:
        """The statement of the jobs behind this place. `sizes`: what the statement `sizes` gave, if there was one."""
        pairs = pair_hashes(query.metadata)
        index = min(range(len(sizes)), key=sizes.__getitem__, default=0)
        if index < len(pairs):
            return self._by_metadata(query, place, pairs.pop(index), pairs)
        return self._by_state(query, place, pairs)

    def _by_state(self, query: JobQuery, place: Place, pairs: Sequence[bytes]) -> Statement:
        values = _Values(self._mark)
        behind = _behind(query, place, "created_at", "id", values)
        has_pairs = self._have(pairs, values)
        ordered = _ordered(query, "created_at", "id")
        pages = [
            f"SELECT {self._columns} FROM {self._jobs} AS jobs WHERE {behind} AND {condition}{has_pairs} {ordered}"
            for condition in _states_and_kinds(query, values)
        ]
        if len(pages) == 1:
            return pages[0], values.all
        # Each limited by itself: PostgreSQL would read all of a large one and sort it.
        return f"{' UNION ALL '.join(f'SELECT * FROM ({page}) AS page' for page in pages)} {ordered}", values.all

    def _by_metadata(self, query: JobQuery, place: Place, pair: bytes, others: Sequence[bytes]) -> Statement:
        values = _Values(self._mark)
        # CROSS JOIN: SQLite keeps this order of the tables.
        return (
            f"SELECT {self._columns} FROM {self._metadata} AS pairs CROSS JOIN {self._jobs} AS jobs"
            f" WHERE pairs.pair = {values.add(pair)} AND jobs.id = pairs.job_id"
            f" AND {_behind(query, place, 'pairs.created_at', 'pairs.job_id', values)}"
            f" AND ({' OR '.join(_states_and_kinds(query, values))}){self._have(others, values)}"
            f" {_ordered(query, 'pairs.created_at', 'pairs.job_id')}"
        ), values.all

    def _have(self, pairs: Sequence[bytes], values: _Values) -> str:
        return "".join(
            f" AND EXISTS (SELECT 1 FROM {self._metadata} AS other WHERE other.pair = {values.add(pair)}"
            " AND other.created_at = jobs.created_at AND other.job_id = jobs.id)"
            for pair in pairs
        )


def _states_and_kinds(query: JobQuery, values: _Values) -> list[str]:
    """Conditions, each of which an index has in order; a job of the query fulfils one of them."""
    states = query.states
    if states is None:
        if query.kind is None:
            return ["TRUE"]
        states = frozenset(State)
    kind = "" if query.kind is None else f" AND kind = {values.add(query.kind)}"
    return [f"state = {values.add(state.value)}{kind}" for state in sorted(states)]


def _behind(query: JobQuery, place: Place, created_at: str, job_id: str, values: _Values) -> str:
    if query.newest_first:
        since = "" if query.since is None else f" AND {created_at} >= {values.add(query.since)}"
        return f"({created_at}, {job_id}) < ({values.add(place[0])}, {values.add(place[1])}){since}"
    if query.since is not None:
        place = max(place, (query.since, ""))
    return f"({created_at}, {job_id}) > ({values.add(place[0])}, {values.add(place[1])})"


def _ordered(query: JobQuery, created_at: str, job_id: str) -> str:
    direction = " DESC" if query.newest_first else ""
    return f"ORDER BY {created_at}{direction}, {job_id}{direction} LIMIT {PAGE}"
