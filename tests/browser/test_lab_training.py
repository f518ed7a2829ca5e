"""Lab 05 as a learner uses it: Start, a falling loss, Stop, Go on; and as the scripts that it becomes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from primechat.checkpoint.run_dir import read_metrics
from primechat.events import LossEvent, PhaseEvent, SampleEvent, StepEvent
from primechat.views.widgets.runs import MAX_SAMPLES, RunHistory

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / "labs" / "05_pretraining.py"
TINY = {"seconds": "0", "model.n_layer": "1", "batch_tokens": "512"}


def tell_step(step: int, loss: float = 5.0) -> StepEvent:
    return StepEvent(
        step=step,
        steps=40,
        loss_nats=loss,
        lr_ratio=1 - step / 40,
        grad_norm=2.0,
        update_norm=0.5,
        tokens=64,
        tokens_per_s=640.0,
        elapsed_s=step / 10,
    )


def tell_bits(step: int, bpb: float) -> LossEvent:
    return LossEvent(step=step, val_bpb=bpb, val_loss_nats=bpb, whole=False, elapsed_s=0.0)


def test_curves_of_a_resumed_run_are_one() -> None:
    """Steps that a dead run had told of, but not saved, are taken again; another training begins anew."""
    log = RunHistory()
    log.add(PhaseEvent(name="training base/a", total=40, unit="steps"))
    for step in range(1, 9):
        log.add(tell_step(step, 9.0))
    log.add(tell_bits(5, 3.0))
    log.add(tell_bits(8, 2.0))
    log.add(PhaseEvent(name="training base/a", total=40, unit="steps"))
    for step in range(6, 11):
        log.add(tell_step(step, 4.0))
    log.add(tell_bits(8, 1.0))
    view = log.describe()
    assert view["train"] == [[n, 9.0 if n < 6 else 4.0] for n in range(1, 11)]
    assert [bits[::2] for bits in view["val"]] == [[5, 3.0], [8, 1.0]]
    assert [(name, points[-1]) for name, points in view["gauges"]] == [
        ("learning rate, share of its peak", [10, 0.75]),
        ("length of the gradient", [10, 2.0]),
        ("how far the matrices moved", [10, 0.5]),
    ]
    assert view["left_s"] == pytest.approx(3.0)
    log.add(
        replace(tell_bits(9, 1.0), retention=0.5)
    )  # a student's mixed loss is no curve beside new text's
    taught = log.describe()
    assert (
        taught["train"] == []
        and "mixed loss" in taught["gauges"][0][0]
        and taught["gauges"][0][1] == view["train"]
    )
    assert "mixed loss" in str(taught["figures"]) and "loss, nats per token" not in str(
        taught["figures"]
    )
    log.add(PhaseEvent(name="training sft/a", total=40, unit="steps"))
    assert log.describe()["train"] == [] and log.describe()["val"] == []


def test_the_first_sample_stays_to_be_compared() -> None:
    log = RunHistory()
    for step in range(100):
        for prompt in ("A", "B"):
            log.add(SampleEvent(step=step, prompt=prompt, text=f"{step}"))
    steps = [step for step, prompt, _ in log.samples if prompt == "A"]
    assert steps[0] == 0 and steps[-1] == 99 and steps == sorted(steps)
    assert len(log.samples) <= MAX_SAMPLES + 1
    assert {(step, prompt) for step, prompt, _ in log.samples} == {
        (s, p) for s in steps for p in "AB"
    }
    log.add(SampleEvent(step=99, prompt="A", text="told again"))
    assert [text for step, prompt, text in log.samples if (step, prompt) == (99, "A")] == [
        "told again"
    ]


def read_loss(stage: Any) -> float:
    return float(
        stage.locator(".pc-stat", has_text="loss, nats").locator("span").first.inner_text()
    )


def count_steps(stage: Any) -> int:
    return int(
        stage.locator(".pc-stat", has_text="steps").locator("span").first.inner_text().split()[0]
    )


@pytest.mark.slow
def test_start_stop_go_on(serve: Callable[..., Any], lab_page: Callable[..., Any]) -> None:
    """The loss falls, Stop saves, Go on continues the curve without a gap, in the log and on the page."""
    server = serve("run", LAB)
    found = lab_page(server.url)
    page, stage = found.page, found.page.locator(".pc-stage").first
    stage.wait_for(timeout=120_000)
    form = page.locator(".pc-settings", has=page.get_by_text("The run", exact=True)).first
    form.get_by_text("More settings").click()
    for name, value in {**TINY, "steps": "400"}.items():
        form.locator(f'input[data-field="{name}"]').fill(value)
    form.locator("code", has_text="--steps 400").wait_for(state="attached")
    page.wait_for_timeout(1500)  # the cell below has run again with these settings
    t_start = time.monotonic()
    stage.get_by_role("button", name="Start", exact=True).click()
    stage.locator(".pc-train").wait_for(state="attached", timeout=120_000)
    while read_loss(stage) > 7:  # it begins at ln 2048, 7.6: see below
        assert time.monotonic() - t_start < 120
        page.wait_for_timeout(100)
    assert stage.locator(".pc-gauges svg").count() == 3 and stage.get_by_text("left").count() == 1
    stage.locator(".pc-frame", has_text="before the first step").first.wait_for()
    stage.get_by_role("button", name="Stop and save").click()
    stage.locator(".pc-badge", has_text="Stopped").wait_for(timeout=60_000)
    at, log = count_steps(stage), server.base_dir / "base_checkpoints" / "lab05" / "metrics.jsonl"
    assert 0 < at < 400 and f"after {at} steps" in stage.inner_text()
    before = [event for event in read_metrics(log) if event["kind"] == "step"]
    assert len(before) == at and 7 < before[0]["loss_nats"] < 8, "ln 2048 is 7.6"
    stage.get_by_role("button", name="Go on").click()
    while count_steps(stage) <= at:
        assert time.monotonic() - t_start < 240
        page.wait_for_timeout(100)
    label = stage.locator(".pc-curves path.pc-train").get_attribute("d") or ""
    assert label.count("L") >= min(at, 100), "the curve goes on from the part that was there"
    stage.get_by_role("button", name="Stop and save").click()
    stage.locator(".pc-badge", has_text="Stopped").wait_for(timeout=60_000)
    after = [event for event in read_metrics(log) if event["kind"] == "step"]
    assert after[:at] == before and [event["step"] for event in after] == list(
        range(1, len(after) + 1)
    )
    found.check()


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["marimo", "nbconvert"])
def test_scripts_of_other_tools_run(tool: str, tmp_path: Path) -> None:
    """What `marimo export script` and `jupyter nbconvert --to script` write of the lab trains."""
    script = tmp_path / "lab05.py"
    words = {
        "marimo": ["marimo", "-y", "-q", "export", "script", str(LAB), "-o", str(script)],
        "nbconvert": [
            "nbconvert",
            "--to",
            "script",
            "--output-dir",
            str(tmp_path),
            "--output",
            "lab05",
            str(LAB.parent / "notebooks" / "05_pretraining.ipynb"),
        ],
    }[tool]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "NANOCHAT_BASE_DIR": str(tmp_path / "base")}
    env["JUPYTER_CONFIG_DIR"] = env["IPYTHONDIR"] = str(tmp_path / "jupyter")
    made = subprocess.run([sys.executable, "-m", *words], env=env, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    flags = ["--steps", "2", "--seconds", "0", "--tag", "two", "--model.n_layer", "1"]
    run = subprocess.run(
        [sys.executable, str(script), *flags, "--batch_tokens", "512"],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    log = read_metrics(tmp_path / "base" / "base_checkpoints" / "two" / "metrics.jsonl")
    assert [event["step"] for event in log if event["kind"] == "step"] == [1, 2]
