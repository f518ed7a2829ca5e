"""How soon `primechat lab NN --app` can be used: `python tests/support/paint.py 01 02 03 --rounds 3`.

The server is up before the clock starts; its process is new, so torch, the model and the lab are opened on
the clock, as for somebody who opens a lab for the first time, and what the app reads ahead, it reads then too
(primechat/labkit/app.py). The clock starts with the navigation and stops
when the page has drawn what the lab is about and it answers. CPU seconds are those of server and browser.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import psutil
from browser import FLAGS, ROOT, start_host
from playwright.sync_api import Browser, sync_playwright

# What is drawn first and answers: a selector of the lab's own first picture.
FIRST = {
    "00": ".pc-chat .pc-chat-empty",
    "01": '.pc-playground[data-ready="true"] .pc-token',
    "02": ".pc-heads canvas",
    "03": ".pc-atlas .pc-scatter[data-painter]",
}
STAGES = {"words_s": "h1", "widget_s": ".pc", "first_s": ""}


def measure_cpu(parent: psutil.Process) -> float:
    """Return the CPU seconds so far of a process and its children."""
    total = 0.0
    for process in [parent, *parent.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def measure_paint(
    browser: Browser, chromium: psutil.Process, number: str, visits: int
) -> list[dict[str, float]]:
    """Return the figures of each visit to one new server; only the first is cold."""
    (path,) = (ROOT / "labs").glob(f"{number}_*.py")
    rows = []
    with tempfile.TemporaryDirectory() as scratch, start_host("app", path, Path(scratch)) as server:
        process = psutil.Process(server.process.pid)
        for _ in range(visits):
            page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
            before = measure_cpu(process), measure_cpu(chromium)
            t_start = time.perf_counter()
            page.goto(server.url, wait_until="commit")
            row = {}
            for name, selector in STAGES.items():
                page.wait_for_selector(selector or FIRST.get(number, ".pc-card"), timeout=120_000)
                row[name] = time.perf_counter() - t_start
            after = measure_cpu(process), measure_cpu(chromium)
            row["server_cpu_s"], row["browser_cpu_s"] = after[0] - before[0], after[1] - before[1]
            wanted = path.read_text(encoding="utf-8").count("\n    show(")
            while page.locator(".pc").count() < wanted and time.perf_counter() - t_start < 120:
                page.wait_for_timeout(50)
            row["all_s"] = time.perf_counter() - t_start
            row["all_server_cpu_s"] = measure_cpu(process) - before[0]
            rows.append(row)
            page.context.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("labs", nargs="*", default=["01", "02", "03"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--visits", type=int, default=1)
    words = parser.parse_args()
    path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        chromium = max(
            (p for p in psutil.Process().children(recursive=True) if "chrom" in p.name()),
            key=lambda p: len(p.children(recursive=True)),
        )
        for number in words.labs:
            found = [
                measure_paint(browser, chromium, number, words.visits) for _ in range(words.rounds)
            ]
            for visit in range(words.visits):
                rows = [rows[visit] for rows in found]
                figures = [
                    f"{key} {statistics.median(r[key] for r in rows):.2f}" for key in rows[0]
                ]
                head = f"{number} visit {visit + 1}, load {psutil.getloadavg()[0]:.1f}:"
                print(head, "  ".join(figures), flush=True)
        browser.close()


if __name__ == "__main__":
    main()
