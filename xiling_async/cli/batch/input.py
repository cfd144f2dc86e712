"""Reads a file of jobs, one a row, and says of every row what is wrong with it: before anything is sent."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from attrs import NOTHING, fields, frozen

from xiling_async.errors import InvalidRequest, Problem
from xiling_async.kinds.image_to_video import ImageToVideo
from xiling_async.media.images import ACCEPTED, Unfit, inspected

KEY: Final = "key"
_FIELDS: Final = {field.name: field.default for field in fields(ImageToVideo) if field.init}
_NEEDED: Final = tuple(name for name, default in _FIELDS.items() if default is NOTHING)
_PICTURES: Final = ("image_url", "end_image_url")
_KEY_CHARACTERS: Final = 200
_LOOKING: Final = 4  # threads that look at pictures

# How a cell of a CSV file becomes a value. What does not fit stays text: the rules of the request say what is accepted.
_WHOLE: Final = ("duration", "generate_count")
_TRUTH: Final = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_DELIMITERS: Final = (",", ";", "\t")  # the first one that the header has; spreadsheets differ by country


@frozen(kw_only=True)
class Row:
    """One job to buy. `line`: where it begins in the file, from 1. `key`: the row's own, or made of its content."""

    line: int
    key: str
    is_derived: bool = False
    request: ImageToVideo


@frozen
class RowProblem:
    """Something that is wrong with a row."""

    line: int
    text: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


@frozen
class FileContent:
    """What a file of jobs holds: the rows that can be bought, and everything that is wrong with the others."""

    rows: tuple[Row, ...]
    flaws: tuple[RowProblem, ...] = ()

    @property
    def flawed(self) -> int:
        """How many rows are not valid."""
        return len({flaw.line for flaw in self.flaws})

    def without(self, flaws: Iterable[RowProblem]) -> FileContent:
        """The same with more flaws; their rows are no longer to be bought."""
        more = tuple(flaws)
        bad = {flaw.line for flaw in more}
        rows = tuple(row for row in self.rows if row.line not in bad)
        return FileContent(rows, tuple(sorted((*self.flaws, *more), key=lambda flaw: flaw.line)))


class _Wrong(Exception):
    """This is not a valid row; the text says why."""


def read(path: Path) -> FileContent:
    """Read, and check completely, also the local pictures. It blocks.

    Raises `InvalidRequest` for a file that cannot be understood as a whole (its type, encoding, header), and `OSError`.
    """
    read_of = {".jsonl": _lines, ".ndjson": _lines, ".csv": _cells, ".tsv": _cells}.get(path.suffix.lower())
    if read_of is None:
        raise _of_file(path, "its name ends neither in .jsonl nor in .csv")
    rows: list[Row] = []
    flaws: list[RowProblem] = []
    keys: dict[str, int] = {}
    repeated: Counter[str] = Counter()
    for line, record in read_of(path, _text(path)):
        try:
            if isinstance(record, _Wrong):
                raise record
            row = _row(line, record, path.parent, repeated)
            if row.key in keys:
                raise _Wrong(f"{KEY}={row.key!r}: is the key of line {keys[row.key]} too; accepted: a key of its own")
        except _Wrong as wrong:
            flaws += [RowProblem(line, text) for text in str(wrong).split("\n")]
            continue
        keys[row.key] = line
        rows.append(row)
    if not rows and not flaws:
        raise _of_file(path, "it has no row")
    content = FileContent(tuple(rows), tuple(flaws))
    return content.without(_of_pictures(content.rows))


def _of_file(path: Path, why: str) -> InvalidRequest:
    return InvalidRequest(f"{path} is not a file of jobs: {why}. Nothing was sent.")


def _text(path: Path) -> str:
    raw = path.read_bytes()
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _of_file(path, "it is UTF-16; save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as wrong:
        line = raw.count(b"\n", 0, wrong.start) + 1
        raise _of_file(path, f"line {line} is not UTF-8; save it as UTF-8") from None


# --- JSON Lines ----------------------------------------------------------------------------------------------------


def _lines(_: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any] | _Wrong]]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand in a string
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=_object, parse_constant=_no_constant)
            yield number, value if isinstance(value, dict) else _Wrong("is not a JSON object")
        except _Wrong as wrong:
            yield number, wrong
        except json.JSONDecodeError as wrong:
            yield number, _Wrong(f"is not JSON: {wrong.msg}, at character {wrong.pos + 1}")
        except (ValueError, RecursionError):  # a number of thousands of digits, a nest of thousands of lists
            yield number, _Wrong("is not the JSON of a job")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = Counter(name for name, _ in pairs)
    twice = next((name for name, number in names.items() if number > 1), None)
    if twice is not None:
        raise _Wrong(f"{twice!r} is there twice")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise _Wrong(f"{name} is not JSON")


# --- CSV -----------------------------------------------------------------------------------------------------------


def _cells(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any] | _Wrong]]:
    first = text.partition("\n")[0]
    delimiter = next((mark for mark in _DELIMITERS if mark in first), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            line, began = reader.line_num + 1, line
            if not any(map(str.strip, cells)):
                continue
            if names is None:
                names = _header(path, [cell.strip() for cell in cells])
            else:
                yield began, _record(names, cells)
    except csv.Error as wrong:  # what follows cannot be told apart any more
        raise _of_file(path, f"line {line} is not CSV ({wrong})") from None


def _header(path: Path, names: list[str]) -> list[str]:
    named = [name for name in names if name]
    unknown = [name for name in named if name not in _FIELDS and name != KEY]
    if unknown:
        accepted = ", ".join((KEY, *_FIELDS))
        raise _of_file(path, f"the header has {', '.join(map(repr, unknown))}; accepted: {accepted}")
    if len(set(named)) < len(named):
        raise _of_file(path, "a column is there twice")
    return names


def _record(names: list[str], cells: list[str]) -> Mapping[str, Any] | _Wrong:
    cells = [*cells, *[""] * (len(names) - len(cells))]
    strays = [cell for place, cell in enumerate(cells) if cell.strip() and (place >= len(names) or not names[place])]
    if strays:
        return _Wrong(f"{strays[0]!r} is in no column: there are more cells than the header names")
    return {name: _value(name, cell) for name, cell in zip(names, cells, strict=False) if name and cell.strip()}


def _value(name: str, cell: str) -> Any:
    text = cell.strip()
    if name == "prompt":
        return cell
    if name in _WHOLE and re.fullmatch(r"[0-9]{1,9}", text):
        return int(text)
    if name == "generate_audio":
        return _TRUTH.get(text.lower(), text)
    if name == "reference_images":
        try:
            return json.loads(text) if text.startswith("[") else [part.strip() for part in text.split("|")]
        except (ValueError, RecursionError):
            return text
    return text


# --- one row -------------------------------------------------------------------------------------------------------


def _row(line: int, record: Mapping[str, Any], folder: Path, repeated: Counter[str]) -> Row:
    """Raises `_Wrong` with everything that is wrong, a line each."""
    values = {name: value for name, value in record.items() if value is not None}
    key = values.pop(KEY, None)
    wrong = [*_strangers(values), *_bad_key(key)]
    meant = {name: value for name, value in values.items() if name in _FIELDS}
    try:
        request = ImageToVideo(**{**dict.fromkeys(_NEEDED), **_with_paths(meant, folder)})
    except InvalidRequest as refused:
        wrong += [_described(problem, meant) for problem in refused.problems]
    if wrong:
        raise _Wrong("\n".join(wrong))
    if key is None:
        return Row(line=line, key=_derived(meant, repeated), is_derived=True, request=request)
    return Row(line=line, key=str(key), request=request)


def _strangers(values: Mapping[str, Any]) -> Iterator[str]:
    for name in values:
        if name not in _FIELDS:
            yield f"{name!r} is not a field; accepted: {', '.join((KEY, *_FIELDS))}"


def _bad_key(key: object) -> Iterator[str]:
    if key is None or type(key) is int:  # ids of other people's tables often are
        return
    if not isinstance(key, str) or not key.strip() or not key.isprintable() or len(key) > _KEY_CHARACTERS:
        accepted = f"plain text of at most {_KEY_CHARACTERS} characters, or none"
        yield str(Problem(field=KEY, value=key, rule="is not a key", accepted=accepted))


def _with_paths(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What is not a URL is a local file, relative to the file of jobs."""

    def picture(value: Any) -> Any:
        if not isinstance(value, str) or not value.strip() or "://" in value:
            return value
        return Path(os.path.abspath(folder / value))  # noqa: PTH100 - resolve() would follow links

    record = dict(values)
    for name in _PICTURES:
        if name in record:
            record[name] = picture(record[name])
    if isinstance(references := record.get("reference_images"), list):
        record["reference_images"] = [picture(value) for value in references]
    return record


def _described(problem: Problem, record: Mapping[str, Any]) -> str:
    if problem.field in _NEEDED and problem.field not in record:
        return f"{problem.field} is missing; accepted: {problem.accepted}"
    return " ".join(str(problem).split())


def _derived(values: Mapping[str, Any], repeated: Counter[str]) -> str:
    """A key made of what the row asks for, so that it is the same in every run, wherever the row stands.

    What a field is anyway is left out. Equal rows are jobs of their own: the second one is number 2.
    """
    meant = {name: value for name, value in values.items() if value != _FIELDS[name]}
    content = json.dumps(meant, sort_keys=True, ensure_ascii=True).encode()
    name = f"row-{hashlib.sha256(content).hexdigest()[:24]}"
    repeated[name] += 1
    return name if repeated[name] == 1 else f"{name}-{repeated[name]}"


# --- pictures ------------------------------------------------------------------------------------------------------


def _of_pictures(rows: Iterable[Row]) -> list[RowProblem]:
    """What is wrong with local pictures; each file is looked at once."""
    wanted = [(row.line, name, path) for row in rows for name, path in row.request.local_files().items()]
    paths = list(dict.fromkeys(path for _, _, path in wanted))
    with ThreadPoolExecutor(_LOOKING, thread_name_prefix="xiling look") as threads:
        unfit = dict(zip(paths, threads.map(_unfit, paths), strict=True))
    return [
        RowProblem(line, str(Problem(field=name, value=str(path), rule=why, accepted=ACCEPTED)))
        for line, name, path in wanted
        if (why := unfit[path]) is not None
    ]


def _unfit(path: Path) -> str | None:
    try:
        inspected(path)
    except Unfit as why:
        return str(why)
    return None
