"""Lab 05 against the command line at equal time.

Run it with `python tests/support/race_lab.py --seconds 300 --seeds 0 1 2`.

The lab is opened in a browser, its form filled in and Start pressed; then the command that the form shows
("The same on the command line") runs by itself, in turn first and second. Both measure the whole validation
split at their ends. Printed are steps and bits per byte of each, seconds from Start to the second point of
the falling curve, and the difference of the means against the spread over seeds.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from browser import FLAGS, ROOT, Server, start_host
from playwright.sync_api import Browser, Page, sync_playwright

from primechat.checkpoint.run_dir import read_metrics

LAB = ROOT / "labs" / "05_pretraining.py"


def fill_form(page: Page, values: dict[str, str]) -> str:
    """Fill in the lab's first form and return the command line that it then shows."""
    form = page.locator(".pc-settings").first
    form.get_by_text("More settings").click()
    for name, value in values.items():
        form.locator(f'input[data-field="{name}"]').fill(value)
    code = form.locator("code.pc-code")
    form.locator("code.pc-code", has_text=f"--tag {values['tag']}").wait_for(state="attached")
    page.wait_for_timeout(2500)  # the cells below have run again with these settings
    return str(code.text_content())


def run_lab(
    browser: Browser, server: Server, values: dict[str, str], timeout_s: float
) -> tuple[str, float]:
    """Train in the lab; return the command line of the same run, and seconds from Start to a falling loss."""
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    page.goto(server.url)
    page.locator(".pc-settings").first.wait_for(timeout=120_000)
    command = fill_form(page, values)
    stage, t_start = page.locator(".pc-stage").first, time.monotonic()
    stage.get_by_role("button", name="Start", exact=True).click()
    curve = page.locator('.pc-stage .pc-train[d*="L"]').first
    curve.wait_for(state="attached", timeout=600_000)  # a run that compiles says so and counts down
    fell_s = time.monotonic() - t_start
    stage.locator(".pc-badge", has_text="Done").wait_for(timeout=1000 * timeout_s)
    page.close()
    return command, fell_s


def read_end(base_dir: Path, tag: str) -> dict[str, Any]:
    """Return the last validation of a run."""
    log = read_metrics(base_dir / "base_checkpoints" / tag / "metrics.jsonl")
    last = [event for event in log if event["kind"] == "loss"][-1]
    assert last["whole"], f"{tag} did not measure the whole split"
    return last


def race(browser: Browser, seconds: float, seed: int) -> dict[str, float]:
    """Return what both reach with one seed."""
    with tempfile.TemporaryDirectory() as scratch, start_host("run", LAB, Path(scratch)) as server:
        env = {**os.environ, "NANOCHAT_BASE_DIR": str(server.base_dir), "PYTHONPATH": str(ROOT)}
        values = {"seconds": f"{seconds:g}", "seed": str(seed), "tag": "race"}

        def run_command(command: str) -> None:
            words = [*shlex.split(command)[1:], "--tag", "command"]
            subprocess.run(
                [sys.executable, "-m", "primechat", *words],
                env=env,
                check=True,
                capture_output=True,
            )

        if seed % 2:  # the command first: it is read from a page of its own
            page = browser.new_context().new_page()
            page.goto(server.url)
            page.locator(".pc-settings").first.wait_for(timeout=120_000)
            command = fill_form(page, values)
            page.close()
            run_command(command)
        command, fell_s = run_lab(browser, server, values, 6 * seconds + 600)
        if not seed % 2:
            run_command(command)
        lab, line = read_end(server.base_dir, "race"), read_end(server.base_dir, "command")
        print(f"seed {seed}: {command}")
        return {
            "lab_bpb": lab["val_bpb"],
            "lab_steps": lab["step"],
            "line_bpb": line["val_bpb"],
            "line_steps": line["step"],
            "fell_s": fell_s,
        }


def main() -> None:
    """Race and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    given = parser.parse_args()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        rows = []
        for seed in given.seeds:
            rows.append(race(browser, given.seconds, seed))
            print("  ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()), flush=True)
        browser.close()
    gaps = [row["lab_bpb"] - row["line_bpb"] for row in rows]
    reached = [[row[key] for row in rows] for key in ("lab_bpb", "line_bpb")]
    spread = max(max(values) - min(values) for values in reached)
    print(
        f"lab - command line: {statistics.mean(gaps):+.4f} bits per byte; over seeds {spread:.4f}"
    )


if __name__ == "__main__":
    main()
