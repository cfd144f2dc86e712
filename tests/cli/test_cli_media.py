"""Files of the command line: videos that it saves, pictures that it is given; real processes against a simulator."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
from test_submit import IMAGE, QUICK, STORED, Ran, ended, said, started, terminal, xiling

import xiling_async
from xiling_async.simulator import Simulator, faults

SAMPLES = Path(xiling_async.__file__).parent / "simulator/media/samples"
VIDEOS = {path.read_bytes() for path in SAMPLES.glob("*.mp4")}
PHOTO = SAMPLES / "landscape.webp"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


async def process_of(sim: Simulator, *words: str) -> Ran:
    """The command as a process of its own, to its end."""
    async with started(sim, *words) as process:
        return await ended(process)


def names(where: str | Path) -> list[str]:
    """What is in this folder, hidden or not."""
    return sorted(path.name for path in Path(where).iterdir())


async def bought(sim: Simulator, prompt: str = "waves", *more: str) -> tuple[str, ...]:
    """The tasks of a job that has ended, bought by the command itself, into no folder."""
    before = len(sim.ledger.task_ids)
    done = await xiling(sim, "submit", prompt, *IMAGE, *QUICK, *more)
    assert done.code == 0, done.err
    return sim.ledger.task_ids[before:]


# --- submit and wait -------------------------------------------------------------------------------------------------


async def test_videos_are_saved_and_their_paths_printed(sim: Simulator) -> None:
    """--out: every video is whole in a folder that was made, stdout is the paths in task order, no key went along."""
    done = await process_of(sim, "submit", "waves", *IMAGE, *QUICK, "--count", "3", "--out", "new/clips")
    assert done.code == 0
    assert done.out.splitlines() == [f"new/clips/{task_id}.mp4" for task_id in sim.ledger.task_ids]
    assert names("new/clips") == sorted(f"{task_id}.mp4" for task_id in sim.ledger.task_ids)
    assert {Path(line).read_bytes() for line in done.out.splitlines()} <= VIDEOS
    assert len(re.findall(r"^downloading: i2v-\w+, \d+", done.err, re.MULTILINE)) == 3
    assert len(re.findall(r"^saved: i2v-\w+\.mp4, \d+", done.err, re.MULTILINE)) == 3
    assert "Signature" not in done.err and "\x1b" not in done.err
    assert sim.ledger.media_with_key == ()


async def test_the_file_is_in_the_json(sim: Simulator) -> None:
    """--json: each outcome has its file; one that failed has none, and the good one is saved all the same."""
    sim.script(faults.failed("no face", which=[0]))
    words = ["submit", "waves", *IMAGE, *QUICK, *STORED, "--key", "k", "--count", "2", "--json"]
    done = await xiling(sim, *words, "--out", "clips")
    bad, good = sim.ledger.task_ids
    assert (done.code, done.told["error"]) == (1, "TaskFailed")
    assert [outcome["file"] for outcome in done.told["outcomes"]] == [None, f"clips/{good}.mp4"]
    assert names("clips") == [f"{good}.mp4"]
    assert bad in done.error


async def test_the_same_command_fetches_nothing_twice(sim: Simulator) -> None:
    """Repeated, and awaited by key: the same path, nothing bought, nothing fetched again."""
    words = ["--out", "clips", *STORED, *QUICK]
    first = await xiling(sim, "submit", "waves", *IMAGE, "--key", "k", *words)
    fetched = len(sim.ledger.media)
    again = await xiling(sim, "submit", "waves", *IMAGE, "--key", "k", *words)
    waited = await xiling(sim, "wait", "k", sim.ledger.task_ids[0], *words)
    assert (first.code, again.code, waited.code) == (0, 0, 0)
    assert first.out == again.out == waited.out[: len(first.out)]
    assert f"there already: {first.out}" in again.err
    assert (len(sim.ledger.media), sim.ledger.paid_submits) == (fetched, 1)


async def test_a_download_that_fails_and_how_to_go_on(sim: Simulator) -> None:
    """One line, exit code 1, no URL anywhere; the command that the line offers saves what is missing."""
    sim.script(faults.media_status(418))
    words = ["submit", "two", *IMAGE, *QUICK, *STORED, "--count", "2", "--out", "my clips", "--json"]
    refused = await xiling(sim, *words)
    tasks = sim.ledger.task_ids
    assert (refused.code, refused.told["error"], refused.told["charged"]) == (1, "DownloadError", "yes")
    assert (refused.told["state"], [outcome["file"] for outcome in refused.told["outcomes"]]) == ("done", [None, None])
    assert "2 of 2 results could not be saved: The video of task " in refused.error
    assert refused.offered() == ["download", *STORED, "--out", "my clips", *tasks]
    assert not re.search("Signature|http://", refused.err)
    done = await xiling(sim, *refused.offered())
    assert (done.code, done.out.splitlines()) == (0, [f"my clips/{task_id}.mp4" for task_id in tasks])


async def test_a_result_that_is_gone(sim: Simulator) -> None:
    """What the service does not offer any more: one line, exit code 1, and no advice to try again."""
    sim.script(faults.media_gone())
    gone = await xiling(sim, "submit", "waves", *IMAGE, *QUICK, "--out", "clips")
    assert (gone.code, gone.out, names("clips")) == (1, "", [])
    assert "is no longer available" in gone.error and "Try again" not in gone.error
    assert not re.search("Signature|http://", gone.err)


async def test_a_folder_that_cannot_be_made(sim: Simulator) -> None:
    """It is known before anything is bought: one line, nothing is sent."""
    Path("file").touch()
    done = await xiling(sim, "submit", "waves", *IMAGE, "--out", "file/clips")
    assert (done.code, done.out, len(sim.ledger.posts)) == (2, "", 0)
    assert done.error == "xiling: The folder file/clips cannot be made: Not a directory. Nothing was sent."
    for words in (["--out", "file"], ["--out", "clips", "--no-wait", *STORED]):
        done = await xiling(sim, "submit", "waves", *IMAGE, *words)
        assert (done.code, len(sim.ledger.posts)) == (2, 0)
        assert "Error: Invalid value for '--out'" in done.err or "Error: Invalid value for --out" in done.err


async def test_a_bar_on_a_terminal(sim: Simulator) -> None:
    """On a terminal each file has a bar with its size; stdout is the path alone, the cursor is visible at the end."""
    sim.script(faults.slow_media(8192, 0.05))
    with terminal() as (slave, written):
        async with started(sim, "submit", "waves", *IMAGE, *QUICK, "--out", "clips", stderr=slave) as process:
            done = await ended(process)
    (text,) = written
    (task_id,) = sim.ledger.task_ids
    assert (done.code, done.out) == (0, f"clips/{task_id}.mp4\n")
    assert re.search(rf"{task_id[:16]}\w*….*━.*kB", text)
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


async def test_ctrl_c_while_a_file_is_fetched(sim: Simulator) -> None:
    """130 and the command that goes on, which ends with a whole file; nothing is bought again."""
    sim.script(faults.stalled_media(20_000))
    words = ["submit", "waves", *IMAGE, *QUICK, *STORED, "--key", "k", "--out", "clips"]
    async with started(sim, *words) as process:
        err = await said(process, "downloading: ")
        await sim.wait_for_stalls(1)
        process.send_signal(signal.SIGINT)
        stopped = await ended(process, err)
    assert (stopped.code, stopped.out) == (130, "")
    assert stopped.offered() == ["wait", *STORED, "--out", "clips", "k"]
    done = await xiling(sim, *stopped.offered())
    (task_id,) = sim.ledger.task_ids
    assert (done.code, done.out) == (0, f"clips/{task_id}.mp4\n")
    assert Path(done.out.rstrip()).read_bytes() in VIDEOS
    assert sim.ledger.paid_submits == 1


# --- download --------------------------------------------------------------------------------------------------------


async def test_download_by_task_id(sim: Simulator) -> None:
    """Here by default; both files when asked for; fetched again only with --overwrite."""
    (task_id,) = await bought(sim)
    first = await xiling(sim, "download", task_id)
    assert (first.code, first.out) == (0, f"{task_id}.mp4\n")
    both = await xiling(sim, "download", task_id, "--what", "both", "--out", "clips")
    video, thumbnail = both.out.splitlines()
    assert (both.code, video) == (0, f"clips/{task_id}.mp4")
    assert thumbnail.startswith(f"clips/{task_id}.") and Path(thumbnail).stat().st_size
    Path(video).write_bytes(b"old")
    assert (await xiling(sim, "download", task_id, "--out", "clips")).code == 0
    assert Path(video).read_bytes() == b"old"
    assert (await xiling(sim, "download", task_id, "--out", "clips", "--overwrite")).code == 0
    assert Path(video).read_bytes() in VIDEOS
    assert sim.ledger.paid_submits == 1


async def test_download_from_a_store(sim: Simulator) -> None:
    """What the store knows is not asked for: by task id one file, by key those of all tasks."""
    one, two = await bought(sim, "waves", *STORED, "--key", "k", "--count", "2")
    asked = len(sim.ledger.gets)
    by_id = await xiling(sim, "download", two, *STORED, "--out", "a")
    by_key = await xiling(sim, "download", "k", *STORED, "--out", "b")
    assert (by_id.code, by_id.out) == (0, f"a/{two}.mp4\n")
    assert (by_key.code, by_key.out) == (0, f"b/{one}.mp4\nb/{two}.mp4\n")
    assert len(sim.ledger.gets) == asked
    unknown = await xiling(sim, "download", "no-such", *STORED)
    assert (unknown.code, unknown.out) == (1, "")
    assert "jobs.db has no job" in unknown.error
    absent = await xiling(sim, "download", one, "--store", "absent.db")
    assert (absent.code, absent.error) == (1, "xiling: absent.db does not exist: no store to look into.")


async def test_download_of_what_has_no_result(sim: Simulator) -> None:
    """Still running: 3, and the command that waits. Unknown or failed: 1. The others are saved all the same."""
    (good,) = await bought(sim)
    sim.script(faults.failed("no face"))
    await xiling(sim, "submit", "bad", *IMAGE, *QUICK)
    sim.manual = True
    left = await xiling(sim, "submit", "late", *IMAGE, *STORED, "--no-wait")
    _, bad, running = sim.ledger.task_ids
    assert left.code == 0
    waiting = await xiling(sim, "download", running, "--out", "clips")
    assert (waiting.code, waiting.out, waiting.offered()) == (3, "", ["wait", "--out", "clips", running])
    stored = await xiling(sim, "download", running, *STORED, "--out", "clips")
    assert (stored.code, stored.out) == (3, "")
    several = await xiling(sim, "download", bad, good, "i2v-0", "--out", "clips")
    assert (several.code, several.out) == (1, f"clips/{good}.mp4\n")
    assert f"xiling: Task {bad} failed at the service: no face. It has no result.\n" in several.err
    assert "xiling: The service does not know the task i2v-0 (" in several.err
    sim.set_result(running)
    done = await xiling(sim, *stored.offered(), *QUICK)
    assert (done.code, done.out) == (0, f"clips/{running}.mp4\n")


async def test_the_real_service_never_names_this_machine(sim: Simulator) -> None:
    """Files of this machine are fetched for a service of this machine alone: an API elsewhere may not point here."""
    (task_id,) = await bought(sim, "waves", *STORED)
    elsewhere = await xiling(sim, "download", task_id, *STORED, "--base-url", "https://api.keevx.com/v1")
    assert (elsewhere.code, elsewhere.out) == (1, "")
    assert "was not requested" in elsewhere.error
    assert elsewhere.offered()[:5] == ["download", *STORED, "--base-url", "https://api.keevx.com/v1"]


# --- the demo --------------------------------------------------------------------------------------------------------


async def test_the_demo_with_a_photo(sim: Simulator) -> None:
    """A picture of one's own is in every job, and uploaded once: the summary says so."""
    photo = Path("me.webp")
    photo.write_bytes(PHOTO.read_bytes())
    done = await process_of(sim, "demo", "me.webp", "--jobs", "8", "--speed", "20")
    assert (done.code, done.err) == (0, "")
    assert "\n1 upload for 8 jobs\n" in done.out
    assert done.out.endswith("nothing was paid for twice\n")
    saved = re.search(r"(\d+) videos in xiling-demo", done.out)
    assert saved is not None and len(names("xiling-demo")) == int(saved[1])


@pytest.mark.parametrize("what", ["missing", "text", "folder"])
async def test_the_demo_with_a_bad_photo(sim: Simulator, what: str) -> None:
    """What is not a picture: one line, exit code 2, and nothing was begun."""
    if what == "text":
        Path(what).write_text("hello")
    elif what == "folder":
        Path(what).mkdir()
    done = await xiling(sim, "demo", what)
    told = {"missing": "does not exist", "text": "is not a picture by its content", "folder": "is a folder"}[what]
    assert (done.code, done.out) == (2, "")
    assert done.error == f"xiling: {what} {told}; accepted: a JPG, PNG or WebP file of at most 20 MB"
    assert not Path("xiling-demo").exists()
