"""How large a dashboard is and how soon it shows something: made-up features, or pages that are there already.

    python benchmarks/dashboard.py --features 1000 10000 100000
    python benchmarks/dashboard.py --pages outputs/dashboard.html

Needs `playwright` and an installed Chromium. Of several openings in fresh contexts the least and the median count.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from sae_transformers.hub_cards.dashboard import write_dashboard

PICTURES = Path(__file__).parents[1] / "docs" / "dashboard_screenshots.py"
TIMES = """async () => {
  const first = performance.getEntriesByName("first-content")[0].startTime;
  const paint = performance.getEntriesByName("first-contentful-paint")[0]?.startTime ?? NaN;
  const load = performance.getEntriesByType("navigation")[0].loadEventEnd;
  const timed = async (act) => { const start = performance.now(); await act(); return performance.now() - start; };
  const search = await timed(() => { ui.search.value = "ri"; choose(); });
  const again = await timed(() => { ui.search.value = "riv"; choose(); });
  const open = await timed(() => openFeature(index.feature.at(-1), false));
  return [first, paint, load, search, again, open];
}"""


def measure(browser: Any, page_file: Path, times: int) -> list[list[float]]:
    rows = []
    for _ in range(times):
        context = browser.new_context(viewport={"width": 1280, "height": 800})
        page = context.new_page()
        page.goto(page_file.resolve().as_uri(), wait_until="load")
        page.wait_for_timeout(300)
        rows.append(page.evaluate(TIMES))
        context.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--features", type=int, nargs="*", default=[1000, 10_000])
    parser.add_argument("--pages", type=Path, nargs="*", default=[])
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        parser.error("Chromium is needed, and not found.")
    spec = importlib.util.spec_from_file_location("dashboard_screenshots", PICTURES)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        print(
            "page | MB | written, s | ms, least (median): first content | first paint | loaded | search | next | open"
        )
        for name in [*options.pages, *options.features]:
            page_file, wrote = name, "-"
            if not isinstance(name, Path):
                data, start = example.made_up(name), time.perf_counter()
                page_file = write_dashboard(data, Path(folder) / f"{name}.html")
                wrote = f"{time.perf_counter() - start:.1f}"
            columns = zip(*measure(browser, page_file, options.times), strict=True)
            told = [f"{min(column):.0f} ({statistics.median(column):.0f})" for column in columns]
            print(" | ".join([str(name), f"{page_file.stat().st_size / 1e6:.1f}", wrote, *told]), flush=True)
        browser.close()


if __name__ == "__main__":
    main()
