"""The page to look at, in a real Chromium: what is shown, what runs, what hands, eyes and ears can do with it."""

from __future__ import annotations

import asyncio
import re
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from chromium import DEADLINE_S, PROGRAM, Tab, chromium, opened
from markupsafe import Markup

import xiling_async
from xiling_async.cli.batch import gallery
from xiling_async.cli.batch.gallery import Clip, Page, Phase, Status

SAMPLES = Path(xiling_async.__file__).parent / "simulator/media/samples"
NOW = 1_800_000_000.0
HOSTILE = (
    "<script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 1'>",
    '"><svg onload=window.pwned=1>',
    "</style></script><script>window.pwned = 1</script><!--",
    "' onmouseover='window.pwned = 1",
    "javascript:window.pwned=1",
    "{{ 7 * 7 }} {% raw %} &lt;b&gt; &amp;",
    "\u202egnp.exe \x00 \ud800 ]]> \u2028",
)

needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with chromium(tmp_path_factory.mktemp("profile")) as address:
        yield address


@pytest.fixture
async def tab(browser: str) -> AsyncIterator[Tab]:
    async with opened(browser) as one:
        yield one


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "o u#t%"
    folder.mkdir()
    return folder


def clip(number: int, prompt: str = "waves at dawn", **known: Any) -> Clip:
    given: dict[str, Any] = {"line": number + 2, "key": f"row-{number}", "model": "V", "parameters": ("16:9", "8 s")}
    return Clip(prompt=prompt, **{**given, **known})


def done(folder: Path, number: int, prompt: str = "waves at dawn", **known: Any) -> Clip:
    """A clip with its files in the folder."""
    name = f"i2v-{number}"
    shutil.copy(SAMPLES / "landscape.mp4", folder / f"{name}.mp4")
    shutil.copy(SAMPLES / "landscape.webp", folder / f"{name}.webp")
    given = {"status": Status.DONE, "task_id": name, "file": f"{name}.mp4", "thumbnail": f"{name}.webp"}
    return clip(number, prompt, **{**given, "duration_s": 8, "ended_at": NOW + number, **known})


def put(folder: Path, *clips: Clip, phase: Phase = Phase.FINISHED, **known: Any) -> Path:
    """The page of these clips."""
    given: dict[str, Any] = {"title": "jobs.csv", "written_at": NOW, **known}
    gallery.write(Page(clips=clips, phase=phase, **given), folder)
    return folder / gallery.NAME


async def written(folder: Path, *clips: Clip, **known: Any) -> Path:
    """The same, beside the loop."""
    return await asyncio.to_thread(put, folder, *clips, **known)


async def visible(tab: Tab) -> list[str]:
    """The prompts that are shown, in their order."""
    prompts = "[...document.querySelectorAll('.clip:not([hidden]) .prompt')].map((prompt) => prompt.textContent)"
    found: list[str] = await tab.js(prompts)
    return found


async def choose(tab: Tab, control: str, value: str) -> None:
    await tab.js(
        f"(() => {{ const one = document.getElementById({control!r}); one.value = {value!r};"
        " one.dispatchEvent(new Event('input', { bubbles: true })); })()"
    )


# --- nothing that is shown can do anything ------------------------------------------------------------------------


@needs_chromium
async def test_hostile_text_is_text(tab: Tab, out: Path) -> None:
    """HTML in any field is shown as it is, runs nothing, loads nothing; only files beside the page are asked for."""
    clips = [
        evolve(done(out, number, text), key=text, model=text, parameters=(text,), message=text, job_id=text)
        for number, text in enumerate(HOSTILE)
    ]
    odd = "a\"b'<c>#d?e%f:g&h.mp4"
    shutil.copy(SAMPLES / "landscape.mp4", out / odd)
    clips.append(evolve(clips[0], file=odd, thumbnail=""))
    await tab.open(await written(out, *clips, title=HOSTILE[0], note=HOSTILE[1]))
    # HTML leaves out the character 0, UTF-8 has no half pairs; both are somebody's mistake, not a danger.
    shown = [text.replace("\x00", "").replace("\ud800", "?") for text in (*HOSTILE, HOSTILE[0])]
    assert await visible(tab) == shown
    for part in (".facts b", ".message", "dd:first-of-type"):
        assert await tab.js(f"[...document.querySelectorAll('{part}')].map((one) => one.textContent)") == shown
    assert await tab.js("document.querySelectorAll('script, svg, style, iframe, [onerror], [onload]').length") == 2
    assert await tab.js("window.pwned === undefined")
    await tab.js("[...document.querySelectorAll('.play')].at(-1).focus()")  # the one with the odd name
    await tab.press("Enter")
    await tab.until("document.querySelector('video').currentTime > 0")
    here = out.absolute().as_uri() + "/"
    own = (here, "about:blank", "data:")  # data: the pictures of the browser's own controls
    assert [url for url in tab.requests if not url.startswith(own)] == []
    assert tab.complaints == []


@needs_chromium
async def test_what_is_not_escaped_does_not_run_either(tab: Tab, out: Path) -> None:
    """The control of the test above: a template that forgot to escape is seen, and the page's policy still holds."""
    await tab.open(await written(out, *(clip(number, Markup(text)) for number, text in enumerate(HOSTILE))))
    assert await visible(tab) != list(HOSTILE)
    assert await tab.js("document.querySelectorAll('.prompt script, .prompt img, .prompt svg').length") >= 2
    assert await tab.js("window.pwned === undefined")
    assert any("Content Security Policy" in complaint for complaint in tab.complaints)


# --- finding a clip -------------------------------------------------------------------------------------------------


@needs_chromium
async def test_filter_search_and_sort(tab: Tab, out: Path) -> None:
    """By status, model and words in any order; sorted five ways; how many are shown is said to a screen reader."""
    prompts = ("Waves at DAWN", "a fox", "dawn on the waves", "rain")
    models, states = ("V", "KL", "V", "S"), (Status.DONE, Status.FAILED, Status.DONE, Status.WAITING)
    clips = [
        clip(number, prompt, model=model, status=state, duration_s=number or None, ended_at=NOW + number)
        for number, (prompt, model, state) in enumerate(zip(prompts, models, states, strict=True))
    ]
    await tab.open(await written(out, *clips))
    one, fox, two, rain = prompts
    assert await visible(tab) == [one, fox, two, rain]
    assert await tab.js("document.getElementById('shown').textContent") == "4 clips"
    await choose(tab, "search", "dawn wav")
    assert await visible(tab) == [one, two]
    assert await tab.js("document.getElementById('shown').textContent") == "2 of 4 clips"
    await choose(tab, "sort", "newest")
    assert await visible(tab) == [two, one]
    await choose(tab, "search", "")
    for order, expected in {
        "newest": [rain, two, fox, one],
        "duration": [rain, two, fox, one],
        "prompt": [fox, two, rain, one],
        "status": [one, two, fox, rain],
        "": [one, fox, two, rain],
    }.items():
        await choose(tab, "sort", order)
        assert await visible(tab) == expected
    await choose(tab, "status", "done")
    assert await visible(tab) == [one, two]
    await choose(tab, "status", "")
    await choose(tab, "model", "S")
    assert await visible(tab) == [rain]
    await choose(tab, "status", "failed")
    assert await visible(tab) == []
    assert await tab.js("[...document.getElementById('status').options].map((one) => one.textContent)") == [
        "all (4)", "waiting (1)", "done (2)", "failed (1)",
    ]  # fmt: skip
    assert await tab.js("[...document.querySelectorAll('progress')].map((bar) => [bar.value, bar.max])") == [[3, 4]]


@needs_chromium
async def test_two_thousand_clips(tab: Tab, out: Path) -> None:
    """Only what is seen is loaded, no video is; every clip can be found, and the order changed."""
    first = done(out, 0)
    files = {"file": first.file, "status": Status.DONE}
    thumbnails = []
    for number in range(2000):
        name = f"t-{number}.webp"
        (out / name).hardlink_to(out / first.thumbnail)
        thumbnails.append(name)
    clips = [
        clip(number, f"scene {number:04} of the sea", thumbnail=thumbnails[number], ended_at=NOW + number, **files)
        for number in range(2000)
    ]
    await tab.open(await written(out, *clips))
    pictures = [url for url in tab.requests if url.endswith(".webp")]
    assert 0 < len(pictures) < 500
    assert not any(url.endswith(".mp4") for url in tab.requests)
    await choose(tab, "search", "199 scene")
    assert await visible(tab) == [f"scene {number:04} of the sea" for number in (199, 1199, *range(1990, 2000))]
    await choose(tab, "search", "")
    await choose(tab, "sort", "newest")
    shown = await visible(tab)
    assert (len(shown), shown[0]) == (2000, "scene 1999 of the sea")


# --- hands, eyes and ears -------------------------------------------------------------------------------------------


@needs_chromium
async def test_the_keyboard_alone(tab: Tab, out: Path) -> None:
    """Tab reaches everything in order, Enter plays a clip with its controls, Escape leaves it where it was."""
    await tab.open(await written(out, done(out, 1), done(out, 2, "a fox")))
    reached = []
    for _ in range(9):
        await tab.press("Tab")
        reached.append(await tab.js("document.activeElement.id || document.activeElement.tagName"))
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        assert await tab.js(f"document.activeElement.className === 'skip' || {outline} !== 'none'"), reached[-1]
    assert reached == ["A", "search", "status", "model", "sort", "play-0", "SUMMARY", "play-1", "SUMMARY"]
    await tab.press("Tab", shift=True)
    await tab.press("Enter")
    playing = "document.querySelector('video')"
    await tab.until(f"{playing}.currentTime > 0 && document.activeElement === {playing}")
    assert await tab.js(f"{playing}.controls && !{playing}.muted && {playing}.closest('.clip').dataset.ended") == str(
        NOW + 2
    )
    await tab.press("Escape")
    assert await tab.js(f"{playing}.paused && {playing}.hidden && document.activeElement.id") == "play-1"
    await tab.js("document.getElementById('search').focus()")
    await tab.write("fox")
    assert await visible(tab) == ["a fox"]
    assert (await tab.js("location.hash")) == "#search=fox"


@needs_chromium
async def test_what_a_screen_reader_is_told(tab: Tab, out: Path) -> None:
    """Every control, link and list has a name and a role; what only decorates is not told."""
    await tab.open(await written(out, done(out, 1), clip(2, "a fox", status=Status.FAILED, message="no face")))
    told: set[tuple[str, str]] = set()
    of_a_card = ("StaticText", "no face")  # cards have `content-visibility: auto`: told of once a frame has them
    async with asyncio.timeout(DEADLINE_S):
        while of_a_card not in told:
            await tab.js("new Promise(requestAnimationFrame)")
            tree = (await tab.call("Accessibility.getFullAXTree"))["nodes"]
            told = {
                (node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]
            }
    assert told >= {
        ("heading", "jobs.csv"), ("searchbox", "Search in prompts"), ("combobox", "Status"), ("combobox", "Model"),
        ("combobox", "Sort"), ("main", "Clips"), ("link", "Play clip 1: waves at dawn"),
        ("progressbar", "Clips that have ended"), ("link", "Skip to the clips"), ("StaticText", "no face"),
    }  # fmt: skip
    assert sum(node["role"]["value"] == "listitem" for node in tree if not node["ignored"]) == 2
    named = ("link", "button", "combobox", "searchbox", "progressbar", "image", "Video")
    assert [role for role, name in told if role in named and not name] == []


@needs_chromium
async def test_the_mouse_previews(tab: Tab, out: Path) -> None:
    """A clip plays without sound while the mouse is on it, and not for who wants no motion."""
    await tab.open(await written(out, done(out, 1)))
    video = "document.querySelector('video')"
    await tab.point(".frame")
    await tab.until(f"{video}.currentTime > 0")
    assert await tab.js(f"{video}.muted && !{video}.controls")
    await tab.point("")
    await tab.until(f"{video}.paused && {video}.hidden")
    await tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}])
    await tab.point(".frame")
    assert await tab.js(f"{video}.hidden")
    await tab.js("document.querySelector('.play').focus()")
    await tab.press("Enter")
    await tab.until(f"!{video}.paused && {video}.controls")


CONTRASTS = """
(() => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map((one) => {
      const part = one / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (one) => {
    const colour = getComputedStyle(one).backgroundColor;
    return /, 0\\)$/.test(colour) ? ground(one.parentElement) : colour;
  };
  return [...document.querySelectorAll("h1, .note:not(:empty), .counts, .phase span, .tools label, input, select, "
    + ".facts b, .facts span, .prompt, .message, summary, dd")].map((one) => {
    const [a, b] = [light(getComputedStyle(one).color), light(ground(one))].sort();
    return [one.className || one.tagName, one.textContent, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
  });
})()
"""


@needs_chromium
async def test_light_dark_narrow_and_wide(tab: Tab, out: Path) -> None:
    """Two grounds, text of contrast 4.5 on both, nothing beyond the edge of a telephone."""
    clips = [clip(number, "long" * 100, status=state, message="why" * 99) for number, state in enumerate(Status)]
    page = await written(out, *clips, done(out, 99), note="Go on with: xiling batch jobs.csv")
    grounds = []
    for scheme in ("light", "dark"):
        await tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        await tab.open(page)
        grounds.append(await tab.js("getComputedStyle(document.body).backgroundColor"))
        contrasts = await tab.js(CONTRASTS)
        assert len(contrasts) > 50
        assert [found for found in contrasts if found[2] < 4.5] == []
    assert len(set(grounds)) == 2
    for width in (320, 700, 1600):
        await tab.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        assert await tab.js("document.documentElement.scrollWidth - innerWidth") <= 0
        tops = "[...document.querySelectorAll('.clip')].map((one) => one.getBoundingClientRect().top)"
        in_a_row = await tab.js(f"(({tops}).filter((top, _, all) => top === all[0])).length")
        assert in_a_row == {320: 1, 700: 2, 1600: 5}[width]


@needs_chromium
async def test_without_scripts(tab: Tab, out: Path) -> None:
    """The clips, their links and everything of them are there; controls that would do nothing are not."""
    await tab.call("Emulation.setScriptExecutionDisabled", value=True)
    await tab.open(await written(out, done(out, 1), clip(2)))
    document = (await tab.call("DOM.getDocument", depth=-1))["root"]
    outside = await tab.call(
        "DOM.querySelectorAll", nodeId=document["nodeId"], selector=".clip, a.play[href='./i2v-1.mp4']"
    )
    assert len(outside["nodeIds"]) == 3
    found = await tab.call("DOM.querySelectorAll", nodeId=document["nodeId"], selector="#tools[hidden]")
    assert len(found["nodeIds"]) == 1


# --- while the batch runs -------------------------------------------------------------------------------------------


async def pass_time(tab: Tab, seconds: float) -> None:
    """Let the page's own clock go on by this much, as fast as it can."""
    before = tab.spent
    await tab.call("Emulation.setVirtualTimePolicy", policy="advance", budget=seconds * 1000)
    await tab.has(lambda: tab.spent > before)


async def looked_again(tab: Tab) -> None:
    """Let the page's own clock go on until the page has loaded itself once more."""
    before = tab.loads
    await tab.call("Emulation.setVirtualTimePolicy", policy="advance")  # no budget: one could end in mid-load
    await tab.has(lambda: tab.loads > before)


@needs_chromium
async def test_it_grows_and_keeps_what_was_chosen(tab: Tab, out: Path) -> None:
    """A running batch's page looks again: filter, search, sort, place and focus stay; a finished one is left alone."""
    clips = [clip(number, f"scene {number} of the sea") for number in range(60)]
    page = await written(out, *clips, clip(60, "a fox"), phase=Phase.RUNNING)
    await tab.open(page)
    await choose(tab, "search", "sea")
    await choose(tab, "sort", "prompt")
    await tab.js("document.getElementById('search').focus()")
    await tab.js("scrollTo(0, 700)")
    assert len(before := await visible(tab)) == 60
    await written(out, *clips, clip(60, "a fox"), clip(61, "zebras at sea"))
    await looked_again(tab)
    await tab.until("scrollY === 700")
    assert await visible(tab) == [*before, "zebras at sea"]
    assert await tab.js("[document.activeElement.id, location.hash]") == ["search", "#search=sea&sort=prompt"]
    assert await tab.js("document.querySelector('.phase span').textContent") == "finished"
    loads = tab.loads
    await pass_time(tab, 600)
    assert tab.loads == loads


@needs_chromium
async def test_it_does_not_pull_the_page_away(tab: Tab, out: Path) -> None:
    """Somebody who has opened a clip's details keeps them, however long; closed, the page looks again."""
    await tab.open(await written(out, clip(1), phase=Phase.RUNNING))
    await tab.js("document.querySelector('summary').click()")
    loads = tab.loads
    await pass_time(tab, 200)
    assert tab.loads == loads
    await tab.js("document.querySelector('summary').click()")
    await looked_again(tab)


# --- the file -------------------------------------------------------------------------------------------------------


def test_one_file_that_needs_nothing(out: Path) -> None:
    """No address of anything elsewhere is in it, and no signature of a message."""
    page = put(out, clip(1, message="see https://media.example/v.mp4?X-Goog-Signature=abc"), done(out, 2))
    text = page.read_text()
    assert "X-Goog-Signature" not in text
    assert re.findall(r"(?:src|href)=\"(?!\./|#)[^\"]*\"", text) == []
    assert "<link" not in text and "@import" not in text and "url(" not in text


def test_a_reader_sees_a_whole_page(out: Path) -> None:
    """While it is written again and again, every look finds one that is complete."""
    page = put(out, clip(0))
    over = threading.Event()

    def write_on() -> None:
        for number in range(40):
            put(out, *(clip(one) for one in range(number * 5)))
        over.set()

    writer = threading.Thread(target=write_on)
    writer.start()
    looks = 0
    while not over.is_set():
        assert page.read_text().endswith("</html>")
        looks += 1
    writer.join()
    assert looks
    assert sorted(path.name for path in out.iterdir()) == ["index.html"]


def test_somebody_elses_page(out: Path) -> None:
    """A page that is not ours is known as such; ours, and none, may be written over."""
    assert not gallery.is_foreign(out)
    assert not gallery.is_foreign(put(out).parent)
    (out / "index.html").write_text("<!doctype html><title>My site</title>")
    assert gallery.is_foreign(out)
