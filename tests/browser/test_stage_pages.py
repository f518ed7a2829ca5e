"""Start and Stop in a browser: what they show is true after the tab was closed and opened again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser import HOSTS, SMALL_LABS, run_all_cells

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("host", HOSTS[:2])
def test_press_while_cells_run_again_is_kept(
    host: str, shared: Callable[..., str], lab_page: Callable[..., Any]
) -> None:
    """The old button stands for 1.5 s after its widget was closed: whenever it is pressed, the run begins."""
    found = lab_page(shared(host, SMALL_LABS / "stage.py"))
    page = found.page
    start = page.get_by_role("button", name="Start", exact=True)
    steps = page.locator(".pc-setting", has_text="steps").locator("input").first
    for delay_ms in (0, 300, 1000):
        start.wait_for(timeout=120_000)
        wanted = 500 + delay_ms
        steps.fill(str(wanted))
        page.wait_for_timeout(delay_ms)
        start.click()
        page.locator(".pc-stage .pc-stat", has_text=f"of {wanted:,}").wait_for(timeout=120_000)
        page.wait_for_timeout(3000)  # every cell has run again: nothing has stopped the run
        page.locator(".pc-stage .pc-badge", has_text="Running").wait_for(timeout=5000)
        page.get_by_role("button", name="Stop and save").click()
        page.locator(".pc-stage .pc-badge", has_text="Stopped").wait_for()
        steps.fill(str(wanted + 1))  # settings that are new make it ready again
    start.wait_for()
    page.wait_for_timeout(2500)
    assert start.is_visible(), "nobody pressed it"
    found.check()


@pytest.mark.parametrize("host", HOSTS)
def test_state_is_true_after_the_tab_was_closed(
    host: str,
    tmp_path: Path,
    serve: Callable[..., Any],
    shared: Callable[..., str],
    lab_page: Callable[..., Any],
) -> None:
    path = SMALL_LABS / "stage.py"
    if host == "edit":  # the shared editor's kernels end with their page
        (tmp_path / "pyproject.toml").write_text("[tool.marimo.runtime]\nauto_instantiate = true\n")
        url = serve(host, Path(shutil.copy(path, tmp_path))).url
    else:
        url = shared(host, path)
    found = lab_page(url)
    if host == "jupyter":
        run_all_cells(found.page)
    page = found.page
    page.locator(".pc-stage").wait_for(timeout=120_000)
    seed = page.locator(".pc-setting", has_text="seed").locator("input").first
    seed.fill("-3")
    page.locator(".pc-fault", has_text="seed=-3 must be").wait_for()
    seed.fill("0")
    page.locator(".pc-fault", has_text="seed=-3").wait_for(state="hidden")
    steps = page.locator(".pc-setting", has_text="steps").locator("input").first
    steps.fill("600")
    page.get_by_role(
        "button", name="Start", exact=True
    ).click()  # before Python has heard of the steps
    page.locator(".pc-stage .pc-stat", has_text="of 600").wait_for(timeout=120_000)
    if host == "jupyter":
        page.keyboard.press("Control+s")
        page.wait_for_timeout(1500)
    page.close()
    again = lab_page(url)
    page = again.page
    page.locator(".pc-stage .pc-badge", has_text="Running").wait_for(timeout=120_000)
    page.locator(".pc-stage .pc-stat", has_text="of 600").wait_for()
    stop = page.get_by_role("button", name="Stop and save")
    stop.click()
    page.locator(".pc-stage .pc-badge", has_text="Stopped").wait_for()
    assert "Stopped and saved after" in page.locator(".pc-stage").inner_text()
    page.get_by_role("button", name="Go on").wait_for()
    if host != "jupyter":  # there a later cell is run by hand
        page.locator(".pc-summary .pc-stat", has_text="bits per byte on new text").wait_for()
    again.check()
    found.check()
