"use strict";
(() => {
  const EVERY_S = 5, REST_S = 4, SILENT_S = 120;
  const by = (id) => document.getElementById(id);
  const root = document.documentElement, grid = by("grid"), shown = by("shown");
  const controls = ["search", "status", "model", "sort"].map(by);
  const [search, status, model, sort] = controls;
  const clips = [...grid.querySelectorAll(".clip")].map((item, index) => ({
    item, index, status: item.dataset.status, model: item.dataset.model,
    ended: +item.dataset.ended, duration: +item.dataset.duration,
    prompt: item.querySelector(".prompt").textContent, words: item.querySelector(".prompt").textContent.toLowerCase(),
  }));
  const orders = {
    "": (a, b) => a.index - b.index,
    newest: (a, b) => b.ended - a.ended || a.index - b.index,
    duration: (a, b) => b.duration - a.duration || a.index - b.index,
    prompt: (a, b) => a.prompt.localeCompare(b.prompt) || a.index - b.index,
    status: (a, b) => a.status.localeCompare(b.status) || a.index - b.index,
  };
  let sorted = "";

  function apply() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let number = 0;
    for (const clip of clips) {
      const fits = (!status.value || clip.status === status.value) && (!model.value || clip.model === model.value)
        && words.every((word) => clip.words.includes(word));
      if (clip.item.hidden === fits) clip.item.hidden = !fits;
      if (!fits) stop(clip.item.querySelector("video"));
      number += fits;
    }
    if (sort.value !== sorted) {
      sorted = sort.value;
      grid.append(...[...clips].sort(orders[sorted] || orders[""]).map((clip) => clip.item));
    }
    const all = clips.length === 1 ? "1 clip" : `${clips.length} clips`;
    shown.textContent = number === clips.length ? all : `${number} of ${all}`;
  }

  // --- what is chosen is kept in the address, where one stands in the session ---------------------------------------

  function keep() {
    const chosen = new URLSearchParams(controls.filter((one) => one.value).map((one) => [one.id, one.value]));
    history.replaceState(null, "", `#${chosen}`);
  }
  function recall() {
    const chosen = new URLSearchParams(location.hash.slice(1));
    for (const one of controls) {
      const value = chosen.get(one.id) || "";
      if (one === search || [...one.options].some((option) => option.value === value)) one.value = value;
    }
  }
  const place = `xiling ${location.pathname}`;
  function leave() {
    const focus = document.activeElement && document.activeElement.id;
    const caret = document.activeElement === search ? [search.selectionStart, search.selectionEnd] : null;
    try { sessionStorage.setItem(place, JSON.stringify({ y: scrollY, focus, caret })); } catch { /* a private window */ }
  }
  function comeBack() {
    let left = null;
    try {
      left = JSON.parse(sessionStorage.getItem(place));
      sessionStorage.removeItem(place);
    } catch { /* nothing was left */ }
    if (!left) return;
    history.scrollRestoration = "manual";
    const focused = left.focus && by(left.focus);
    if (focused) focused.focus({ preventScroll: true });
    if (left.caret) search.setSelectionRange(...left.caret);
    scrollTo(0, left.y);
  }

  // --- playing ------------------------------------------------------------------------------------------------------

  // A video element for each of thousands of clips would cost seconds: one is made when a clip is to be played.
  function videoOf(frame) {
    let video = frame.querySelector("video");
    if (!video) {
      video = by("player").content.firstElementChild.cloneNode();
      video.src = frame.querySelector(".play").href;
      video.setAttribute("aria-label", frame.querySelector(".unseen").textContent.replace(/^Play /, ""));
      frame.append(video);
    }
    return video;
  }
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  function start(video, byHand) {
    video.hidden = false;
    video.controls = byHand;
    video.muted = !byHand;
    video.dataset.held = byHand ? "1" : "";
    video.play().catch(() => { if (byHand) video.controls = true; });
    if (byHand) video.focus();
  }
  function stop(video) {
    if (!video || video.hidden) return;
    video.pause();
    video.hidden = true;
    video.dataset.held = "";
  }
  const frameOf = (event) => event.target instanceof Element && event.target.closest(".frame:not(.empty)");
  grid.addEventListener("click", (event) => {
    const frame = frameOf(event);
    if (!frame || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const video = videoOf(frame);
    if (video.dataset.held) return;
    event.preventDefault();
    grid.querySelectorAll("video:not([hidden])").forEach((other) => { if (other !== video) stop(other); });
    start(video, true);
  });
  grid.addEventListener("pointerover", (event) => {
    const frame = frameOf(event);
    if (!frame || event.pointerType !== "mouse" || calm.matches) return;
    const video = videoOf(frame);
    if (video.hidden) start(video, false);
  });
  grid.addEventListener("pointerout", (event) => {
    const frame = frameOf(event), video = frame && frame.querySelector("video");
    if (video && !video.dataset.held && !frame.contains(event.relatedTarget)) stop(video);
  });
  grid.addEventListener("keydown", (event) => {
    const frame = frameOf(event), video = frame && frame.querySelector("video");
    if (event.key !== "Escape" || !video || video.hidden) return;
    stop(video);
    frame.querySelector(".play").focus();
  });

  // --- while the batch runs, the page looks again; not while its reader is at work on it --------------------------------

  let touched = -Infinity;
  for (const kind of ["keydown", "pointerdown", "pointermove", "wheel", "touchmove", "input"]) {
    addEventListener(kind, () => { touched = performance.now(); }, { passive: true, capture: true });
  }
  const isResting = () => !document.hidden && performance.now() - touched > REST_S * 1000
    && document.getSelection().isCollapsed && !grid.querySelector("video:not([hidden]), details[open]");
  function watch() {
    const age = Date.now() / 1000 - +root.dataset.written;
    const every = age > SILENT_S ? 12 * EVERY_S : EVERY_S;
    if (age > SILENT_S) {
      by("news").textContent = `No news for ${Math.round(age / 60)} min: if the batch was stopped, the same command resumes it.`;
    }
    const look = () => {
      if (!isResting()) { setTimeout(look, 1000); return; }
      leave();
      location.reload();
    };
    setTimeout(look, every * 1000);
  }

  const written = document.querySelector(".phase time");
  written.textContent = new Date(+root.dataset.written * 1000).toLocaleString();
  by("tools").hidden = false;
  by("tools").addEventListener("submit", (event) => event.preventDefault());
  by("tools").addEventListener("input", () => { apply(); keep(); });
  addEventListener("hashchange", () => { if (location.hash !== "#clips") { recall(); apply(); } });
  if (location.hash !== "#clips") recall();
  apply();
  comeBack();
  if (root.dataset.phase === "running") watch();
})();
