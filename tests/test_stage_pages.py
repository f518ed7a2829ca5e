"""Start and Stop in a browser: what they show is true after the tab was closed and opened again."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser import HOSTS, run_all_cells

from primechat.desk.labs.twins import write_twin

pytestmark = pytest.mark.slow

LAB = """
import marimo

app = marimo.App()


@app.cell
def _():
    import time

    from primechat.config import FinetuneConfig
    from primechat.lab import settings, stage, summary
    from primechat.records import CheckpointEvent, DoneEvent, PhaseEvent, StepEvent, TrainResult

    return (
        CheckpointEvent, DoneEvent, FinetuneConfig, PhaseEvent, StepEvent, TrainResult, settings, stage,
        summary, time,
    )


@app.cell
def _(CheckpointEvent, DoneEvent, PhaseEvent, StepEvent, TrainResult, time):
    def tell_step(step, steps):
        return StepEvent(
            step=step, steps=steps, loss_nats=9 - step / 100, lr_ratio=1.0, grad_norm=1.0, update_norm=1.0,
            tokens=64, tokens_per_s=640.0, elapsed_s=step / 10,
        )

    def train(config, *, on_event, stop):
        on_event(PhaseEvent(name="training", total=config.steps, unit="steps"))
        step = 0
        while step < config.steps and not stop.is_set():
            step += 1
            on_event(tell_step(step, config.steps))
            time.sleep(0.1)
        on_event(CheckpointEvent(step=step, path="model"))
        on_event(DoneEvent(step=step, elapsed_s=1.0, stopped=step < config.steps))
        return TrainResult(
            identifier="sft/d4", path="x", step=step, stopped=step < config.steps, val_bpb=1.5, n_params=1000,
            tokens=64 * step, tokens_per_s=640.0, train_s=1.0, total_s=1.0,
        )
    return (train,)


@app.cell
def _(FinetuneConfig, settings):
    form = settings(FinetuneConfig(steps=400), ("steps", "seed"))
    form
    return (form,)


@app.cell
def _(form, stage, train):
    run = stage(train, form.config, title="Train")
    run
    return (run,)


@app.cell
def _(run, summary):
    summary(run.result)
    return


if __name__ == "__main__":
    app.run()
"""

SLOW = LAB.replace(
    """
@app.cell
def _(form, stage, train):
    run""",
    """
@app.cell
def _(form, time):
    time.sleep(1.5)
    late = form.config.steps
    return (late,)


@app.cell
def _(form, late, stage, train):
    assert late == form.config.steps
    run""",
)


@pytest.mark.parametrize("host", HOSTS[:2])
def test_press_while_cells_run_again_is_kept(
    host: str, tmp_path: Path, serve: Callable[..., Any], lab_page: Callable[..., Any]
) -> None:
    """The old button stands for 1.5 s after its widget was closed: whenever it is pressed, the run begins."""
    assert SLOW != LAB
    path = tmp_path / "stage_lab.py"
    path.write_text(textwrap.dedent(SLOW))
    (tmp_path / "pyproject.toml").write_text("[tool.marimo.runtime]\nauto_instantiate = true\n")
    found = lab_page(serve(host, path).url)
    page = found.page
    start = page.get_by_role("button", name="Start", exact=True)
    steps = page.locator(".pc-setting", has_text="steps").locator("input").first
    for delay_ms in (0, 300, 1000):
        start.wait_for(timeout=60_000)
        wanted = 500 + delay_ms
        steps.fill(str(wanted))
        page.wait_for_timeout(delay_ms)
        start.click()
        page.locator(".pc-stage .pc-stat", has_text=f"of {wanted:,}").wait_for(timeout=60_000)
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
    host: str, tmp_path: Path, serve: Callable[..., Any], lab_page: Callable[..., Any]
) -> None:
    path = tmp_path / "stage_lab.py"
    path.write_text(textwrap.dedent(LAB))
    (tmp_path / "pyproject.toml").write_text("[tool.marimo.runtime]\nauto_instantiate = true\n")
    if host == "jupyter":
        (tmp_path / "stage_lab.ipynb").write_text(write_twin(path))
        path = tmp_path / "stage_lab.ipynb"
    server = serve(host, path)
    found = lab_page(server.url)
    if host == "jupyter":
        run_all_cells(found.page)
    page = found.page
    page.locator(".pc-stage").wait_for(timeout=60_000)
    seed = page.locator(".pc-setting", has_text="seed").locator("input").first
    seed.fill("-3")
    page.locator(".pc-fault", has_text="seed=-3 must be").wait_for()
    seed.fill("0")
    page.locator(".pc-fault", has_text="seed=-3").wait_for(state="hidden")
    steps = page.locator(".pc-setting", has_text="steps").locator("input").first
    steps.fill("600")
    page.get_by_role("button", name="Start", exact=True).click()  # before Python has heard of the steps
    page.locator(".pc-stage .pc-stat", has_text="of 600").wait_for(timeout=90_000)
    if host == "jupyter":
        page.keyboard.press("Control+s")
        page.wait_for_timeout(1500)
    page.close()
    again = lab_page(server.url)
    page = again.page
    page.locator(".pc-stage .pc-badge", has_text="Running").wait_for(timeout=60_000)
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
