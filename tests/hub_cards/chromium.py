"""A page in an installed Chromium, which may read its own file and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; the test is skipped where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright drives the browser")
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on the path")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Any, file: Path, hash: str = "", **context: Any) -> Iterator[Any]:
    """The file in a page of its own. When it is left, anything that it logged, threw or asked for fails the test."""
    context = {"viewport": {"width": 1280, "height": 800}, **context}
    made = browser.new_context(**context)
    problems: list[str] = []
    address = file.resolve().as_uri()

    def check(route: Any) -> None:
        if route.request.url.partition("#")[0] == address or route.request.url.startswith("data:"):
            route.continue_()
        else:
            problems.append(f"asked for {route.request.url}")
            route.abort()

    made.route("**/*", check)
    page = made.new_page()
    page.on("console", lambda message: problems.append(f"console: {message.type}: {message.text}"))
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.goto(address + hash)
    page.locator(".row, .none").first.wait_for(state="attached")
    try:
        yield page
    finally:
        made.close()
    assert not problems, problems


CONTRAST = """
() => {
  const parse = (text) => {
    const numbers = text.match(/-?[\\d.]+(e-?\\d+)?/g).map(Number);
    const unit = text.startsWith("color(") ? 255 : 1;
    return [...numbers.slice(0, 3).map((n) => n * unit), numbers.length > 3 ? numbers[3] : 1];
  };
  const over = (top, under) => top.slice(0, 3).map((c, n) => c * top[3] + under[n] * (1 - top[3]));
  const light = (rgb) => {
    const [r, g, b] = rgb.map((c) => { c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((under, layer) => over(layer, under), [255, 255, 255]);
  };
  const ratio = (ink, ground) => {
    const [a, b] = [light(ink), light(ground)];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    const box = element.getBoundingClientRect();
    const style = getComputedStyle(element);
    if (!node.textContent.trim() || !box.width || style.clipPath !== "none") continue;
    if (element.closest(":disabled, noscript, script, style")) continue;
    const ground = behind(element);
    const track = element.closest(".logits li")?.querySelector(".track i");
    if (track) { // a bar lies behind part of the line
      const bar = over(parse(getComputedStyle(track).backgroundColor), ground);
      const ratios = [ground, bar].map((behindIt) => ratio(over(parse(style.color), behindIt), behindIt));
      found.push([Math.min(...ratios), node.textContent.trim().slice(0, 40)]);
      continue;
    }
    const svg = element.namespaceURI.endsWith("svg");
    const ink = over(parse(svg ? style.fill : style.color), ground);
    found.push([ratio(ink, ground), node.textContent.trim().slice(0, 40)]);
  }
  return found.sort((x, y) => x[0] - y[0]);
}
"""


def contrasts(page: Any) -> list[tuple[float, str]]:
    """Contrast (WCAG 2.2, 1.4.3) of every text that can be seen, with its beginning; the lowest first."""
    return [(ratio, text) for ratio, text in page.evaluate(CONTRAST)]
