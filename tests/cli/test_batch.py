"""`xiling batch`: the real command against a simulator, killed and resumed, held against the simulator's own ledger."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import random
import re
import shutil
import signal
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve, frozen
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from support import closed_port, settle
from test_submit import ESCAPE, ended, said, started, terminal, xiling

import xiling_async
from xiling_async import (
    Failed,
    ImageToVideo,
    InvalidRequest,
    Rejected,
    ResultExpired,
    SQLiteStore,
    State,
    StoreError,
    TaskFailed,
    WaitTimeout,
)
from xiling_async._internal.clock import SystemClock
from xiling_async.cli.batch import display, gallery
from xiling_async.cli.batch import input as rows
from xiling_async.cli.batch.results import Results
from xiling_async.cli.batch.state import BatchState, RowState
from xiling_async.cli.watch import Watch
from xiling_async.models.record import JobRecord
from xiling_async.simulator import Simulator, faults

SAMPLES = Path(xiling_async.__file__).parent / "simulator/media/samples"
VIDEOS = {path.read_bytes() for path in SAMPLES.glob("*.mp4")}
IMAGE = "https://example.com/sea.jpg"
QUICK = ("--poll-every", "0.1")
OUT = ("--out", "out")
PORT = ("--port", "0")
WAVES: Mapping[str, Any] = {
    "model": "V", "prompt": "waves", "image_url": IMAGE, "aspect_ratio": "16:9", "aspect_resolution": "720p",
    "duration": 4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def jsonl(*given: Any, name: str = "jobs.jsonl") -> Path:
    """A file of these rows; text is a line as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in given]
    Path(name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return Path(name)


def scenes(number: int, **more: Any) -> list[dict[str, Any]]:
    return [{**WAVES, "prompt": f"scene {place}", **more} for place in range(number)]


def results(out: str = "out") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(out, "results.jsonl").read_text(encoding="utf-8").splitlines()]


def paid(sim: Simulator) -> tuple[int, int]:
    """POSTs seen, submits paid for."""
    return len(sim.ledger.posts), sim.ledger.paid_submits


# --- reading the file ----------------------------------------------------------------------------------------------


def test_a_row_in_either_form() -> None:
    """The same jobs as JSON Lines and as CSV are the same requests with the same keys; both by the types of the API."""
    given: list[dict[str, Any]] = [
        {**WAVES, "generate_audio": True, "generate_count": 3, "key": "own"},
        {**WAVES, "prompt": 'a "fox",\nin two; lines', "end_image_url": IMAGE},
        {"model": "KL", "prompt": "雨", "reference_images": [IMAGE, f"{IMAGE}?a,b"], "aspect_ratio": "9:16",
         "aspect_resolution": "1080p", "duration": 5},
    ]  # fmt: skip
    names = [*dict.fromkeys(name for row in given for name in row)]
    for delimiter, truth, lists in ((",", "true", json.dumps), (";", "YES", "|".join), ("\t", "1", " | ".join)):
        sheet = io.StringIO(newline="")
        writer = csv.DictWriter(sheet, names, delimiter=delimiter, lineterminator="\r\n")
        writer.writeheader()
        for row in given:
            cells = dict(row)
            if "generate_audio" in row:
                cells["generate_audio"] = truth
            if "reference_images" in row:
                cells["reference_images"] = lists(row["reference_images"])
            writer.writerow(cells)
        Path("jobs.csv").write_bytes(b"\xef\xbb\xbf" + sheet.getvalue().encode())
        found = rows.read(Path("jobs.csv"))
        plain = rows.read(jsonl(*given))
        assert found.flaws == plain.flaws == ()
        assert [row.request for row in found.rows] == [row.request for row in plain.rows]
        assert [row.key for row in found.rows] == [row.key for row in plain.rows]
        assert [row.line for row in found.rows] == [2, 3, 5]
        assert found.rows[0].request == ImageToVideo(**{**WAVES, "generate_audio": True, "generate_count": 3})


def test_keys_of_rows_without_one() -> None:
    """Made of the content: the same in every run and version, wherever the row stands; equal rows are numbered."""
    waves, fox = dict(WAVES), {**WAVES, "prompt": "a fox"}
    found = rows.read(jsonl(waves, fox, waves, "", {**waves, "generate_count": 1, "end_image_url": None}))
    keys = [row.key for row in found.rows]
    first = "row-dc1902c5fc2a2d849591d5bf"
    assert keys == [first, keys[1], f"{first}-2", f"{first}-3"]
    assert [row.line for row in found.rows] == [1, 2, 3, 5]
    moved = rows.read(jsonl(fox, dict(reversed(waves.items())), name="elsewhere.jsonl"))
    assert [row.key for row in moved.rows] == [keys[1], first]


def test_local_pictures_are_seen_from_the_file() -> None:
    """A path is one beside the jobs file; it is looked at, and its key does not depend on where the folder is."""
    for where in ("a", "b"):
        Path(where).mkdir()
        shutil.copy(SAMPLES / "landscape.webp", f"{where}/sea.webp")
    (one,) = rows.read(jsonl({**WAVES, "image_url": "sea.webp"}, name="a/jobs.jsonl")).rows
    (two,) = rows.read(jsonl({**WAVES, "image_url": "sea.webp"}, name="b/jobs.jsonl")).rows
    assert one.request.image_url == Path("a/sea.webp").absolute()
    assert (one.key, one.request == two.request) == (two.key, False)
    bad = {"text.png": b"hello", "empty.jpg": b""}
    for name, content in bad.items():
        Path(name).write_bytes(content)
    references = {**WAVES, "model": "KL", "image_url": None, "duration": 5, "reference_images": [IMAGE, "empty.jpg"]}
    found = rows.read(jsonl(*({**WAVES, "image_url": name} for name in ("text.png", "no.png", "a")), references))
    assert found.rows == ()
    assert [(flaw.line, flaw.text.partition(":")[0].partition("=")[0]) for flaw in found.flaws] == [
        (1, "image_url"), (2, "image_url"), (3, "image_url"), (4, "reference_images[1]"),
    ]  # fmt: skip
    told = [str(flaw) for flaw in found.flaws]
    for text, why in zip(told, ("is not a picture", "does not exist", "is a folder", "is empty"), strict=True):
        assert why in text


def test_everything_that_is_wrong_is_told_at_once() -> None:
    """Each broken rule of each row, with its line: of JSON, of names, of types, of keys, of the request itself."""
    found = rows.read(
        jsonl(
            WAVES,
            "{",
            "[1]",
            {**WAVES, "colour": "red", "callback_url": "https://example.com", "duration": "4"},
            {"prompt": "x"},
            {**WAVES, "key": "same"},
            {**WAVES, "key": "same", "prompt": "another"},
            {**WAVES, "key": ""},
            '{"prompt": "a", "prompt": "b"}',
            '{"duration": NaN}',
            '{"duration": ' + "9" * 5000 + "}",
            "[" * 100_000,
        )
    )
    assert [row.line for row in found.rows] == [1, 6]
    told = [(flaw.line, flaw.text) for flaw in found.flaws]
    begins = [
        (2, "is not JSON: "), (3, "is not a JSON object"), (4, "'colour' is not a field; accepted: key, model, prompt"),
        (4, "'callback_url' is not a field"), (4, "duration: must be a number, not text ('4')"),
        (5, "model is missing; accepted: V, KL or S"), (5, "aspect_ratio is missing"),
        (5, "aspect_resolution is missing"), (5, "duration is missing"),
        (7, "key='same': is the key of line 6 too"), (8, "key='': is not a key"), (9, "'prompt' is there twice"),
        (10, "NaN is not JSON"), (11, "is not the JSON"), (12, "is not the JSON"),
    ]  # fmt: skip
    assert len(told) == len(begins)
    for (line, text), (expected, begin) in zip(told, begins, strict=True):
        assert (line, text[: len(begin)]) == (expected, begin)
    assert found.flawed == 10


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("jobs.xlsx", b"", "ends neither in .jsonl nor in .csv"),
        ("jobs.jsonl", b"\n \n", "it has no row"),
        ("jobs.csv", b"prompt,model\n", "it has no row"),
        ("jobs.jsonl", b"{}\n{\xff}", "line 2 is not UTF-8"),
        ("jobs.csv", "prompt".encode("utf-16"), "it is UTF-16"),
        ("jobs.csv", b"prompt,color\nx,red\n", "the header has 'color'; accepted: key, model"),
        ("jobs.csv", b"prompt,prompt\nx,y\n", "a column is there twice"),
        ("jobs.csv", b'prompt,model\n"x,V\n', "line 2 is not CSV"),
    ],
)
def test_what_is_no_file_of_jobs(name: str, content: bytes, why: str) -> None:
    """A file that cannot be told apart into rows is refused as a whole, also with --skip-invalid."""
    Path(name).write_bytes(content)
    with pytest.raises(InvalidRequest, match=re.escape(why)) as told:
        rows.read(Path(name))
    assert str(told.value).endswith("Nothing was sent.")


def test_cells_that_stand_in_no_column() -> None:
    """Too many cells are a flaw of their row; empty ones that spreadsheets add are not."""
    Path("jobs.csv").write_text(
        f"model,prompt,image_url,aspect_ratio,aspect_resolution,duration,\nV,a,{IMAGE},16:9,720p,4,,\n,,,\n"
        f"V,b,{IMAGE},16:9,720p,4,x\nV,c,{IMAGE},16:9,720p\nV,d,{IMAGE},16:9,720p,4.0\n"
    )
    found = rows.read(Path("jobs.csv"))
    assert [row.request.prompt for row in found.rows] == ["a"]
    assert [flaw.line for flaw in found.flaws] == [4, 5, 6]
    assert "'x' is in no column" in found.flaws[0].text
    assert found.flaws[1].text.startswith("duration is missing")
    assert found.flaws[2].text.startswith("duration: must be a number, not text ('4.0')")


@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode), kind=st.sampled_from(["jsonl", "csv"]))
def test_any_file_is_understood_or_refused(content: bytes, kind: str) -> None:
    """Whatever the bytes, there are rows, flaws, or one error that says why."""
    path = Path(f"any.{kind}")
    path.write_bytes(b"prompt,model,duration\n" * (kind == "csv") + content)
    try:
        found = rows.read(path)
    except InvalidRequest as refused:
        assert "is not a file of jobs" in str(refused)
    else:
        assert found.rows or found.flaws


# --- results.jsonl -------------------------------------------------------------------------------------------------


def test_a_torn_last_line_is_repaired() -> None:
    """Wherever a dying process left off, the next one goes on with whole lines, each task once."""
    lines = [{"task_id": f"t{number}", "prompt": "é"} for number in range(3)]
    first = Results(Path())
    first.open()
    first.add(lines)
    whole = first.path.read_bytes()
    for cut in range(len(whole) + 1):
        first.path.write_bytes(whole[:cut])
        again = Results(Path())
        again.open()
        again.add(lines[:2])
        again.add(lines)
        again.add([])
        assert first.path.read_bytes() == whole


def test_lines_of_somebody_else_are_left_alone() -> None:
    """What is no line of ours stays where it is; what cannot be written is told, and says what to do."""
    results = Results(Path())
    results.path.write_text('# mine\n[1]\n{"task_id": 5}\n')
    results.open()
    results.add([{"task_id": "t"}])
    assert results.path.read_text() == '# mine\n[1]\n{"task_id": 5}\n{"task_id": "t"}\n'
    assert "t" in results and "5" not in results
    results.path.unlink()
    results.path.mkdir()
    for call in (results.open, lambda: results.add([{"task_id": "u"}])):
        with pytest.raises(StoreError, match="the same command goes on, and buys nothing twice"):
            call()


# --- nothing is sent -----------------------------------------------------------------------------------------------


async def test_one_bad_row_and_nothing_is_sent(sim: Simulator) -> None:
    """Exit code 2, every flaw with its line, no POST, no upload, no folder."""
    Path("text.png").write_text("hello")
    good = scenes(3)
    file = jsonl(*good, {**WAVES, "image_url": "text.png"}, {**WAVES, "duration": 99}, good[0])
    done = await xiling(sim, "batch", str(file), *OUT)
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[0] == "xiling: 2 of 6 rows in jobs.jsonl cannot be bought. Nothing was sent."
    assert [line.partition(":")[0] for line in done.err.splitlines()[1:]] == ["line 4", "line 5"]
    assert (paid(sim), len(sim.ledger.uploads), Path("out").exists()) == ((0, 0), 0, False)


async def test_a_dry_run(sim: Simulator) -> None:
    """It needs no key, sends nothing, and says what would be bought: new jobs only."""
    jsonl(*scenes(2, generate_count=2))
    words = ("batch", "jobs.jsonl", *OUT)
    first = await xiling(sim, *words, "--dry-run", XILING_API_KEY="")
    assert first.out == "2 rows can be bought. Nothing was sent.\nto buy: 2 jobs, 4 videos (V: 2)\n"
    assert (first.code, paid(sim), Path("out").exists()) == (0, (0, 0), False)
    assert (await xiling(sim, *words, *PORT)).code == 0
    jsonl(*scenes(3))
    second = await xiling(sim, *words, "--dry-run")
    assert second.out.splitlines() == ["3 rows can be bought. Nothing was sent.", "to buy: 3 jobs, 3 videos (V: 3)"]
    jsonl(*scenes(3, generate_count=2))
    third = await xiling(sim, *words, "--dry-run")
    assert third.out.splitlines()[1:] == ["2 jobs bought before: not bought again", "to buy: 1 job, 2 videos (V: 1)"]
    bad = await xiling(sim, "batch", str(jsonl("{")), *OUT, "--dry-run")
    assert (bad.code, paid(sim)) == (2, (2, 2))


async def test_what_was_bought_is_found_by_its_key(sim: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier rows are looked up one by one: however many jobs the store has, it is not read as a whole."""
    words = ("batch", str(jsonl(*scenes(2))), *OUT)
    assert (await xiling(sim, *words, *PORT)).code == 0

    def jobs(*_: object) -> None:
        raise AssertionError("all jobs were read")

    monkeypatch.setattr(SQLiteStore, "jobs", jobs)
    jsonl(*scenes(3))
    assert "2 jobs bought before" in (await xiling(sim, *words, "--dry-run")).out
    assert (await xiling(sim, *words, *PORT)).code == 0
    assert paid(sim) == (3, 3)


async def test_a_key_that_names_another_job(sim: Simulator) -> None:
    """A row that was changed under its key is told before anything is sent; all others are still there."""
    one, two = ({**row, "key": row["prompt"]} for row in scenes(2))
    assert (await xiling(sim, "batch", str(jsonl(one, two)), *OUT, *PORT)).code == 0
    file = jsonl({**one, "duration": 8}, two, *scenes(1))
    done = await xiling(sim, "batch", str(file), *OUT, *PORT)
    assert (done.code, paid(sim)) == (2, (2, 2))
    assert "line 1: key='scene 0': already names a job with another request in out/jobs.db" in done.err
    done = await xiling(sim, "batch", str(file), *OUT, *PORT, "--skip-invalid")
    assert (done.code, paid(sim)) == (0, (3, 3))


async def test_somebody_elses_page(sim: Simulator) -> None:
    """A folder with another index.html is not taken."""
    Path("out").mkdir()
    Path("out/index.html").write_text("mine")
    done = await xiling(sim, "batch", str(jsonl(WAVES)), *OUT)
    assert (done.code, paid(sim), Path("out/index.html").read_text()) == (2, (0, 0), "mine")
    assert "choose another --out" in done.error


async def test_a_key_that_is_not_accepted(sim: Simulator) -> None:
    """The first 401 ends the batch: one line, no key in it, nothing bought; the right key goes on."""
    jsonl(*scenes(50))
    done = await xiling(sim, "batch", "jobs.jsonl", *OUT, "--in-flight", "2", XILING_API_KEY="not-the-key")
    assert done.code == 1
    assert "Nothing was bought" in done.error and "not-the-key" not in done.err
    assert sim.ledger.paid_submits == 0 and len(sim.ledger.posts) < 10
    assert 'data-phase="stopped"' in Path("out/index.html").read_text()
    jsonl(*scenes(2))
    assert (await xiling(sim, "batch", "jobs.jsonl", *OUT, *PORT)).code == 0


# --- a batch that goes well ------------------------------------------------------------------------------------------


async def test_a_whole_batch(sim: Simulator) -> None:
    """Every video whole in the folder, a line a task, a clip each on the page, exit code 0; again nothing is bought."""
    Path("in").mkdir()
    shutil.copy(SAMPLES / "landscape.webp", "in/sea.webp")
    Path("in/jobs.csv").write_text(
        "key,model,prompt,image_url,aspect_ratio,aspect_resolution,duration,generate_count\r\n"
        f"a,V,waves,sea.webp,16:9,720p,4,2\r\n,V,<b>bold</b>,{IMAGE},9:16,720p,4,\r\n"
    )
    async with started(sim, "batch", "in/jobs.csv", *OUT, *PORT) as process:
        done = await ended(process)
    tasks = sim.ledger.task_ids
    assert (done.code, paid(sim), len(sim.ledger.uploads)) == (0, (2, 2), 1)
    assert done.out.splitlines() == [
        "2 rows: 2 done", "2 jobs bought now", "3 videos in out", "page: out/index.html", "results: out/results.jsonl",
    ]  # fmt: skip
    assert ESCAPE not in done.out + done.err
    assert sorted(line.partition("] ")[2] for line in done.err.splitlines()) == [
        "line 2: done, 2 videos", "line 3: done, 1 video",
    ]  # fmt: skip
    told = {line["task_id"]: line for line in results()}
    assert set(told) == set(tasks) and len(results()) == 3
    for task_id, line in told.items():
        assert (line["ok"], line["file"], line["thumbnail"]) == (True, f"{task_id}.mp4", f"{task_id}.webp")
        assert Path("out", line["file"]).read_bytes() in VIDEOS
    assert Counter((line["line"], line["key"] == "a") for line in told.values()) == {(2, True): 2, (3, False): 1}
    page = Path("out/index.html").read_text()
    assert page.count('class="play"') == 3 and 'data-phase="finished"' in page and "&lt;b&gt;bold" in page
    assert sorted(path.suffix for path in Path("out").iterdir() if not path.name.startswith(("jobs", "."))) == [
        ".html", ".jsonl", *[".mp4"] * 3, *[".webp"] * 3,
    ]  # fmt: skip
    everything = page + Path("out/results.jsonl").read_text() + done.out + done.err
    assert "Signature" not in everything and sim.api_key not in everything and not re.search(r"[\w-]{80}", done.err)
    before = (len(sim.ledger.media), Path("out/results.jsonl").read_bytes())
    again = await xiling(sim, "batch", "in/jobs.csv", *OUT, *PORT)
    assert (again.code, again.out.splitlines()[1], paid(sim)) == (0, "0 jobs bought now, 2 before", (2, 2))
    assert (len(sim.ledger.media), Path("out/results.jsonl").read_bytes()) == before


async def test_the_folder_has_moved(sim: Simulator) -> None:
    """Moved with everything in it, also its pictures, a batch without keys goes on and buys nothing twice."""
    Path("here").mkdir()
    shutil.copy(SAMPLES / "landscape.webp", "here/sea.webp")
    jsonl({**WAVES, "image_url": "sea.webp"}, name="here/jobs.jsonl")
    assert (await xiling(sim, "batch", "here/jobs.jsonl", "--out", "here/out", *PORT)).code == 0
    Path("here").rename("there")
    done = await xiling(sim, "batch", "there/jobs.jsonl", "--out", "there/out", *PORT)
    assert (done.code, paid(sim)) == (0, (1, 1))


async def test_equal_rows_are_jobs_of_their_own(sim: Simulator) -> None:
    """Three equal rows are three jobs; and with one taken out, two of the same."""
    for number, bought in ((3, 3), (2, 3), (4, 4)):
        done = await xiling(sim, "batch", str(jsonl(*[WAVES] * number)), *OUT, *PORT)
        assert (done.code, paid(sim)) == (0, (bought, bought))


# --- rows that fail --------------------------------------------------------------------------------------------------


async def test_one_failure_harms_no_neighbour(sim: Simulator) -> None:
    """Exit code 1, a line for each row that failed with what it means for the money; the next run tries what it may."""
    prompts = ["good", "bad [sim:failed=no face]", "no [sim:business_error=100001]", "lost [sim:drop_after_accept]"]
    file = jsonl(*({**WAVES, "prompt": prompt} for prompt in prompts), "{")
    words = ("batch", str(file), *OUT, *QUICK, "--skip-invalid")
    done = await xiling(sim, *words)
    assert done.code == 1
    told = done.out.splitlines()
    assert told[:2] == ["4 rows: 1 done, 3 not, 1 row left out as not valid", "3 jobs bought now"]
    failed, refused, lost = told[3:6]
    assert failed.startswith("line 2: bought: 1 of 1 task failed at the service (") and "no face" in failed
    assert refused.startswith("line 3: not bought: The service refused") and "Business error" in refused
    assert lost.startswith("line 4: may have been bought: ") and "never sent again" in lost
    assert "Rows that were not bought are tried again by the same command." in told
    assert [(line["line"], line["ok"]) for line in results()] in ([(1, True), (2, False)], [(2, False), (1, True)])
    page = Path("out/index.html").read_text()
    assert [page.count(f'<li class="clip" data-status="{status}"') for status in gallery.Status] == [
        0,
        0,
        1,
        0,
        1,
        1,
        1,
    ]
    assert (posts := paid(sim)) == (4, 3)
    again = await xiling(sim, *words)
    assert (again.code, paid(sim)) == (1, (posts[0] + 1, 4))  # the service has no fault in store any more
    assert sorted(line["line"] for line in results()) == [1, 2, 3]


async def test_a_file_that_cannot_be_had_now(sim: Simulator) -> None:
    """Made and paid for, but not saved: told, no line yet; the same command fetches it. A dead result has its line."""
    sim.script(faults.media_status(418))
    words = ("batch", str(jsonl(WAVES)), *OUT, *PORT)
    done = await xiling(sim, *words)
    assert (done.code, results()) == (1, [])
    assert "line 1: bought: Not every file could be saved: " in done.out
    assert "The same command goes on with" in done.out
    assert 'data-status="not saved"' in Path("out/index.html").read_text()
    assert not re.search("Signature|http://", done.out + done.err + Path("out/index.html").read_text())
    done = await xiling(sim, *words)
    assert (done.code, len(results()), paid(sim)) == (0, 1, (1, 1))
    sim.script(faults.media_gone())
    jsonl(*scenes(1))
    gone = await xiling(sim, *words)
    assert gone.code == 1
    last = results()[-1]
    assert (last["ok"], last["file"]) == (True, None) and "is no longer available" in last["message"]


async def test_the_wait_is_over() -> None:
    """Rows that are still running after --timeout: exit code 3, and the next run has them."""
    async with Simulator(manual=True) as sim:
        words = ("batch", str(jsonl(*scenes(2))), *OUT, *QUICK, "--timeout", "0.5")
        done = await xiling(sim, *words)
        assert (done.code, results()) == (3, [])
        assert "It is not finished within --timeout (task i2v-" in done.out
        for task_id in sim.ledger.task_ids:
            sim.set_result(task_id)
        done = await xiling(sim, *words[:-2])
        assert (done.code, len(results()), paid(sim)) == (0, 2, (2, 2))


async def test_results_that_cannot_be_written() -> None:
    """A folder that takes no results ends the batch at once, in words; nothing is lost."""
    async with Simulator(manual=True) as sim:
        words = ("batch", str(jsonl(*scenes(3))), *OUT, *PORT)
        async with started(sim, *words) as process:
            await sim.ledger.until(lambda: len(sim.ledger.posts) == 3)
            Path("out/results.jsonl").unlink()
            Path("out/results.jsonl").mkdir()
            await sim.finish(sim.ledger.task_ids[0])  # the others go on for ever
            done = await ended(process)
        assert done.code == 1
        assert done.err.splitlines()[-1].startswith("xiling: out/results.jsonl cannot be written (Is a directory)")
        assert 'data-phase="stopped"' in Path("out/index.html").read_text()
        Path("out/results.jsonl").rmdir()
        for task_id in sim.ledger.task_ids:
            sim.set_result(task_id)
        done = await xiling(sim, *words[:-2], *QUICK)
        assert (done.code, len(results()), paid(sim)) == (0, 3, (3, 3))


async def test_a_page_that_cannot_be_written(sim: Simulator) -> None:
    """The batch goes on without it, and says so."""
    Path("out/.index.html.part").mkdir(parents=True)
    done = await xiling(sim, "batch", str(jsonl(WAVES)), *OUT, *PORT)
    assert (done.code, len(results())) == (0, 1)
    assert done.err.splitlines()[-1] == "The page out/index.html cannot be written: Is a directory."


# --- stopped, killed, resumed ----------------------------------------------------------------------------------------


async def test_ctrl_c_and_the_same_command() -> None:
    """130, what stands, and the command that goes on; that one buys only what was not bought."""
    async with Simulator(manual=True) as sim:
        jsonl(*scenes(6))
        async with started(sim, "batch", "jobs.jsonl", *OUT, *PORT, "--in-flight", "4") as process:
            await sim.ledger.until(lambda: len(sim.ledger.posts) == 4)
            await sim.finish(sim.ledger.task_ids[0])
            await sim.ledger.until(lambda: len(sim.ledger.posts) == 5)
            process.send_signal(signal.SIGINT)
            stopped = await ended(process)
        assert (stopped.code, stopped.out) == (130, "")
        assert re.match(r"xiling: Stopped. 6 rows: .*1 waiting, ", stopped.error)
        assert stopped.offered() == ["batch", "jobs.jsonl", *OUT, "--in-flight", "4", *PORT]
        page = Path("out/index.html").read_text()
        assert 'data-phase="stopped"' in page and "Go on with: xiling batch jobs.jsonl --out out" in page
        sim.manual = False
        for task_id in sim.ledger.task_ids[1:]:
            sim.set_result(task_id)
        done = await xiling(sim, *stopped.offered(), *QUICK)
        assert (done.code, paid(sim)) == (0, (6, 6))
        assert done.out.splitlines()[1] == "1 job bought now, 5 before"
        assert Counter(line["task_id"] for line in results()) == dict.fromkeys(sim.ledger.task_ids, 1)


async def test_one_batch_a_folder() -> None:
    """A second one in the same folder sends nothing, and leaves what is there alone."""
    async with Simulator(manual=True) as sim:
        words = ("batch", str(jsonl(*scenes(2))), *OUT, *PORT)
        async with started(sim, *words) as process:
            await sim.ledger.until(lambda: len(sim.ledger.posts) == 2)
            second = await xiling(sim, *words)
            assert (second.code, paid(sim)) == (1, (2, 2))
            only_looking = await xiling(sim, *words, "--dry-run")
            assert (only_looking.code, only_looking.out.splitlines()[1]) == (
                0,
                "2 jobs bought before: not bought again",
            )
            assert "jobs.db" in second.error and 'data-phase="running"' in Path("out/index.html").read_text()
            for task_id in sim.ledger.task_ids:
                await sim.finish(task_id)
            assert (await ended(process)).code == 0


async def test_doubt_takes_no_place(sim: Simulator) -> None:
    """Rows whose fate is unknown from an earlier run come last: the others do not wait behind them."""
    words = ("batch", "jobs.jsonl", *OUT, *PORT, "--in-flight", "2")
    jsonl(*scenes(2, image_url=f"{IMAGE}?lost"), *scenes(3))
    for _ in range(2):
        sim.script(faults.hang_before_accept())
    async with started(sim, *words) as process:
        await sim.ledger.until(lambda: len(sim.ledger.posts) == 2)
        process.kill()
        await ended(process)
    async with started(sim, *words) as process:
        await sim.ledger.until(lambda: sim.ledger.paid_submits == 3)
        process.send_signal(signal.SIGINT)
        stopped = await ended(process)
    assert (stopped.code, paid(sim)) == (130, (5, 3))


async def test_an_uncertain_row_is_said_at_once_and_heard_after_a_restart() -> None:
    """A row whose answer was lost is named while the batch runs; a restart listens where its callback will arrive."""
    async with Simulator(manual=True) as sim:
        words = ("batch", str(jsonl(*scenes(2))), *OUT, *PORT, "--in-flight", "1", "--timeout", "60")
        sim.script(faults.drop_after_accept())
        async with started(sim, *words) as process:
            err = await said(process, "line 1: may have been bought: ")
            err += await said(process, "\n")
            process.send_signal(signal.SIGINT)
            stopped = await ended(process, err)
        assert (stopped.code, paid(sim)) == (130, (1, 1))
        assert "its callback" in err.splitlines()[-1]
        async with started(sim, *words) as process:
            await sim.ledger.until(lambda: len(sim.ledger.posts) == 2)  # the other one goes first
            await sim.finish(sim.ledger.task_ids[1])
            err = await said(process, "line 1: may have been bought: ")
            assert await sim.finish(sim.ledger.task_ids[0]) == 200
            done = await ended(process, err)
        assert (done.code, len(results()), paid(sim)) == (0, 2, (2, 2))


async def test_a_stopped_batch_does_not_call_doubt_a_failure() -> None:
    """Without a receiver a row whose answer was lost is over at once; Ctrl-C then counts it as what it is."""
    async with Simulator(manual=True) as sim:
        words = ("batch", str(jsonl(*scenes(2))), *OUT, "--in-flight", "1", "--timeout", "60")
        sim.script(faults.drop_after_accept())
        async with started(sim, *words) as process:
            await sim.ledger.until(lambda: len(sim.ledger.posts) == 2)
            err = await said(process, "line 1: may have been bought: ")
            process.send_signal(signal.SIGINT)
            stopped = await ended(process, err)
        assert (stopped.code, paid(sim)) == (130, (2, 2))
        assert "xiling: Stopped. 2 rows: 1 at the service, 1 in doubt." in stopped.error


async def test_a_kept_port_that_is_taken(sim: Simulator) -> None:
    """Then the batch takes another one, and says what that means for the rows that are still uncertain."""
    words = ("batch", str(jsonl(WAVES)), *OUT, *PORT)
    with socket.create_server(("127.0.0.1", 0)) as other:
        Path("out").mkdir()
        Path("out/.callback-port").write_text(str(other.getsockname()[1]))
        done = await xiling(sim, *words)
        assert done.code == 0
        assert Path("out/.callback-port").read_text() != str(other.getsockname()[1])
    for odd in ("", "x", "0", "99999", "-1", "9" * 99):
        Path("out/.callback-port").write_text(odd)
        assert (await xiling(sim, *words)).code == 0


def test_what_is_counted_costs_nothing_to_ask() -> None:
    """With 50,000 rows the numbers, and the lines of rows that end, are no walk through all of them."""
    request = ImageToVideo(**WAVES)
    state = BatchState(began_at=0.0)
    for number in range(50_000):
        state.add(rows.Row(line=number, key=str(number), request=request))
    before = state.clips()
    counted = 0

    def count(*_: object) -> None:
        nonlocal counted
        counted += 1

    sys.setprofile(count)
    try:
        for entry in list(state.entries.values())[:100]:
            state.ended(entry, 1.0)
            display.row_line(entry, state)
        display.status_view(state, 2.0, 80)
    finally:
        sys.setprofile(None)
    assert counted < 100_000
    after = state.clips()
    assert sum(one is not other for one, other in zip(before, after, strict=True)) == 100
    assert state.steps == {"waiting": 49_900, "done": 100} and state.over == 100


async def test_a_batch_on_a_terminal(sim: Simulator) -> None:
    """A bar, the steps and the time left while it runs, a table at the end, the cursor visible."""
    jsonl(*scenes(3, prompt="slow [sim:latency=1]"), {**WAVES, "prompt": "bad [sim:failed=no face]"})
    with terminal(100, 30) as (slave, written):
        async with started(sim, "batch", "jobs.jsonl", *OUT, *PORT, stderr=slave) as process:
            done = await ended(process)
    (text,) = written
    assert done.code == 1
    plain = re.sub(rf"{ESCAPE}\[[0-9;?]*[a-zA-Z]", "", text)
    assert re.search(r"━+.* 1/4 rows  0 videos", plain)
    assert re.search(r"\d at the service", plain) and re.search(
        r"0:0\d   .* rows a (second|minute)   about 0:\d\d left", plain
    )
    assert re.search(r"line 4: bought: 1 of 1 task failed", plain)
    assert text.rindex(f"{ESCAPE}[?25h") > text.rindex(f"{ESCAPE}[?25l")


def entry_of(row: rows.Row, state: State, **known: Any) -> RowState:
    """A row whose job stands there."""
    ids = ("i2v-1",) if state not in (State.NOT_SENT, State.REJECTED, State.UNCERTAIN, State.SENDING) else ()
    record = JobRecord(
        id="0" * 32, kind="image_to_video", key=row.key, request=row.request, asked=1, created_at=0, changed_at=0,
        state=state, task_ids=ids, outcomes=(None,) * len(ids),
    )  # fmt: skip
    return RowState(row, record, **known)


async def test_what_the_terminal_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step has its number; at the end a table has each row that failed, and what to do about each kind."""
    monkeypatch.setenv("TERM", "xterm-256color")
    found = (await asyncio.to_thread(rows.read, jsonl(*scenes(9)))).rows
    state = BatchState(began_at=SystemClock().time() - 60)
    over = {"is_over": True}
    failed = TaskFailed("", outcomes=[Failed("i2v-1", "no \x1b[2J face")])
    for entry in (
        RowState(found[0]),
        entry_of(found[1], State.SENDING),
        entry_of(found[2], State.ACCEPTED),
        entry_of(found[3], State.DONE),
        entry_of(found[4], State.REJECTED, error=Rejected("It was refused. Nothing was bought."), **over),
        entry_of(found[5], State.FAILED, error=failed, **over),
        entry_of(found[6], State.UNCERTAIN, error=WaitTimeout("", charged="maybe"), **over),
        entry_of(found[7], State.ACCEPTED, error=WaitTimeout(""), **over),
        entry_of(found[8], State.EXPIRED, error=ResultExpired(""), **over),
    ):
        state.put(entry)
    with terminal(100, 40) as (slave, written), open(slave, "w", closefd=False) as stream:
        out = Console(file=stream, highlight=False)
        async with display.BatchDisplay(out, state, Watch()) as shown:
            await settle()
            for entry in state.bad:
                shown.over(entry)
            state.ended(state.entries[found[3].key], SystemClock().time())
        await asyncio.to_thread(display.summary, out, state, Path("out"), skipped=2)
    plain = re.sub(rf"{ESCAPE}\[[0-9;?]*[a-zA-Z]", "", written[0])
    for told in (
        "1 waiting   1 sending   1 at the service   1 saving   1 in doubt   4 failed",
        "9 rows: 1 done, 5 not, 2 rows left out as not valid",
        "5  not bought           It was refused.",
        "6  bought               1 of 1 task failed at the service (i2v-1: no \\x1b[2J face).",
        "7  may have been bought  It was sent and its answer was lost;",
        "8  bought               It is not finished within --timeout (task i2v-1)",
        "9  bought               The service has not told what became of it",
        "Rows that were not bought are tried again by the same command.",
        "What the service could not make is not bought again by itself: --retry-failed does, once.",
        "What may have been bought is never sent again: with --port the same command waits",
        "The same command goes on with what is bought and not here yet.",
    ):
        assert " ".join(told.split()) in " ".join(plain.split()), told
    assert state.left_s(SystemClock().time()) == pytest.approx(60 * 3, rel=0.1)


@frozen
class Evidence:
    """What is held against each other after a batch: the service's ledger, the rows, the results, the last summary."""

    prompts: Sequence[str]  # that were paid for, as often as they were
    tasks: Sequence[str]
    rows: Sequence[dict[str, Any]]
    results: Sequence[Mapping[str, Any]]
    summary: str

    def verdict(self) -> list[str]:
        """Everything that is wrong."""
        bought = Counter(self.prompts)
        listed = Counter(line["task_id"] for line in self.results)
        in_doubt = {
            int(line) for line in re.findall(r"^line (\d+): may have been bought: ", self.summary, re.MULTILINE)
        }
        wrong = [f"{prompt!r} was paid {times} times" for prompt, times in bought.items() if times > 1]
        wrong += [f"task {task_id} is listed {times} times" for task_id, times in listed.items() if times > 1]
        wrong += [f"task {task_id} was paid for and is not listed" for task_id in {*self.tasks} - {*listed}]
        wrong += [f"task {task_id} is listed and unknown" for task_id in {*listed} - {*self.tasks}]
        wrong += [
            f"line {line} was not paid for, and nobody was told"
            for line, row in enumerate(self.rows, start=1)
            if row["prompt"] not in bought and line not in in_doubt
        ]
        return wrong


TROUBLES = (
    "", "[sim:duplicate_callback]", "[sim:early_callback]", "[sim:drop_after_accept]", "[sim:out_of_order]",
    "[sim:progress_callback]", "[sim:cut_media=20000]", "[sim:drop_mid_answer]", "",
)  # fmt: skip


def evidence(sim: Simulator, given: Sequence[dict[str, Any]], summary: str) -> Evidence:
    prompts = [str((post.body or {})["prompt"]) for post in sim.ledger.posts if post.paid]
    return Evidence(prompts, sim.ledger.task_ids, given, results(), summary)


class Service:
    """The service's own work: it ends tasks in a seeded order; what nobody took is called back again later."""

    def __init__(self, sim: Simulator, dice: random.Random) -> None:
        self._sim = sim
        self._dice = dice
        self._ended: set[str] = set()
        self._unheard: set[str] = set()

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        work = asyncio.create_task(self._work())
        try:
            yield
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def _work(self) -> None:
        ledger, seen = self._sim.ledger, len(self._sim.ledger.posts)
        await ledger.until(lambda: len(ledger.posts) > seen)  # whoever sends does listen
        while True:
            for task_id in sorted(self._unheard):
                self._note(task_id, await self._sim.callback(task_id))
            await ledger.until(lambda: len(ledger.task_ids) > len(self._ended))
            while waiting := [task_id for task_id in ledger.task_ids if task_id not in self._ended]:
                task_id = self._dice.choice(waiting)
                self._ended.add(task_id)
                self._unheard.add(task_id)
                self._note(task_id, await self._sim.finish(task_id))

    def _note(self, task_id: str, answer: int | None) -> None:
        if answer == 200:
            self._unheard.discard(task_id)


async def killed(sim: Simulator, words: Sequence[str], instant: Callable[[], bool], service: Service) -> None:
    """Run the command, and kill it without mercy when this holds."""
    async with started(sim, *words) as process, service.working():
        await sim.ledger.until(instant)
        process.kill()
        assert (await ended(process)).code == -signal.SIGKILL


def batch_of_300(dice: random.Random) -> list[dict[str, Any]]:
    """Rows with faults of all kinds."""
    shutil.rmtree("out", ignore_errors=True)
    given = [f"scene {number} {TROUBLES[number % len(TROUBLES)]}".strip() for number in range(294)]
    given += [
        f"scene {number} [sim:lost_callback]" for number in range(294, 300)
    ]  # to be found by asking: that is slow
    dice.shuffle(given)
    made = [{**WAVES, "prompt": prompt} for prompt in given]
    jsonl(*made)
    return made


def command() -> list[str]:
    """The batch with a port of its own: the same one each time, so that the service finds whoever runs now."""
    with closed_port() as port:
        return ["batch", "jobs.jsonl", *OUT, "--port", str(port), "--in-flight", "40", "--poll-every", "0.2"]


def soon(sim: Simulator, dice: random.Random) -> Callable[[], bool]:
    """A seeded instant, in creates and requests for files: while it buys, while it saves, and in between."""
    enough = len(sim.ledger.posts) + len(sim.ledger.media) + dice.randrange(30, 120)
    return lambda: len(sim.ledger.posts) + len(sim.ledger.media) >= enough


async def finished(sim: Simulator, words: Sequence[str], service: Service) -> str:
    """Run the command until nothing is left that it could still hear of; what it said last."""
    for _ in range(5):
        async with started(sim, *words, "--timeout", "4") as process, service.working():
            done = await ended(process)
        if "It is not finished within --timeout" not in done.out:
            break
    return done.out


async def test_killed_three_times_and_resumed(deep: bool) -> None:
    """300 rows, faults of all kinds, `kill -9` at three seeded instants: every row once, every result once."""
    for seed in range(20 if deep else 1):
        dice = random.Random(seed)
        given, words = batch_of_300(dice), command()
        async with Simulator(manual=True) as sim:
            service = Service(sim, dice)
            for _ in range(3):
                await killed(sim, words, soon(sim, dice), service)
            assert sim.ledger.paid_submits < 300 and len(results()) < 300
            found = evidence(sim, given, await finished(sim, words, service))
        assert found.verdict() == []
        doctored = evolve(found, results=[*found.results, found.results[0]])
        assert doctored.verdict() == [f"task {found.results[0]['task_id']} is listed 2 times"]


async def test_the_check_sees_what_is_paid_twice() -> None:
    """The control: with jobs.db lost between two runs, the same check finds rows that were paid for twice."""
    dice = random.Random(0)
    given, words = batch_of_300(dice), command()
    async with Simulator(manual=True) as sim:
        service = Service(sim, dice)
        await killed(sim, words, soon(sim, dice), service)
        for path in Path("out").glob("jobs.db*"):
            path.unlink()
        await killed(sim, words, soon(sim, dice), service)
        assert any(wrong.endswith("was paid 2 times") for wrong in evidence(sim, given, "").verdict())
