"""torchrun on whole stages: two ranks write what one writes, a budget ends a run, a dead rank the job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from primechat.checkpoint import registry
from primechat.checkpoint.checkpoint import find_steps, load_checkpoint
from primechat.checkpoint.run_dir import read_metrics
from primechat.cloud.export import shrink_config
from primechat.cloud.plan import full_config
from primechat.config import PretrainConfig, RuntimeConfig, encode_config
from primechat.events import NoteEvent
from primechat.stages.pretrain import pretrain

ROOT = Path(__file__).resolve().parents[2]


def make_config(tag: str, steps: int = 30, **changes: Any) -> PretrainConfig:
    config = replace(shrink_config(full_config(2)), tag=tag, steps=steps)
    return replace(config, eval=replace(config.eval, save_every=5), **changes)


def launch(
    tmp_path: Path, config: PretrainConfig, ranks: int, *words: str
) -> subprocess.Popen[str]:
    file = tmp_path / f"{config.tag}.json"
    file.write_text(json.dumps(encode_config(config)))
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
            "-m",
            "primechat",
            "pretrain",
            "--config",
            str(file),
            *words,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def read_losses(tag: str) -> list[float]:
    log = read_metrics(registry.run_dir("base", tag) / "metrics.jsonl")
    return [event["loss_nats"] for event in log if event["kind"] == "step"]


def test_budget_stops(base_dir: Path) -> None:
    """A run that has spent its money saves, stops, says so; a higher budget lets it go on."""
    told: list[Any] = []
    runtime = RuntimeConfig(
        device="cpu",
        dtype="float32",
        threads=1,
        compile="off",
        micro_batch_rows=4,
        max_dollars=0.001,
        dollars_per_hour=3600.0,
    )
    config = make_config("poor", runtime=runtime)
    run = pretrain(config, on_event=told.append)
    assert (
        run.stopped
        and 0 < run.step < 30
        and find_steps(registry.run_dir("base", "poor"))[-1] == run.step
    )
    assert any(isinstance(e, NoteEvent) and "The budget is spent" in e.text for e in told)
    again = pretrain(replace(config, resume=True))
    assert again.step == run.step + 1 and again.stopped, "what was spent before counts"
    rich = replace(config, resume=True, runtime=replace(runtime, max_dollars=1e6))
    assert pretrain(rich).step == 30 and len(read_losses("poor")) == 30


@pytest.mark.slow
def test_two_ranks_write_one_run(base_dir: Path, tmp_path: Path) -> None:
    """SIGTERM saves and ends all ranks; another number of them goes on; the losses are one process's."""
    pretrain(make_config("alone"))
    job = launch(tmp_path, make_config("both"), 2)
    limit = time.monotonic() + 120
    log = registry.run_dir("base", "both") / "metrics.jsonl"
    while not (log.exists() and log.read_text().count('"step"') > 6) and time.monotonic() < limit:
        time.sleep(0.05)
    os.kill(job.pid, signal.SIGTERM)
    out, err = job.communicate(timeout=120)
    steps = find_steps(registry.run_dir("base", "both"))
    assert steps and 'Traceback (most recent call last):\n  File "' + str(ROOT) not in err
    done = launch(tmp_path, make_config("both"), 3, "--resume")
    out, err = done.communicate(timeout=180)
    assert done.returncode == 0, err
    np.testing.assert_allclose(read_losses("both"), read_losses("alone"), rtol=0, atol=1e-5)
    assert out.count("; in base_checkpoints") == 1 and out.count("Going on from step") == 1, (
        "one log"
    )
    whole, parts = (
        load_checkpoint(registry.run_dir("base", t), 30, want_optim=True) for t in ("alone", "both")
    )
    assert [m.shape for m in whole.optim_state["optimizer"]["momenta"]] == [
        m.shape for m in parts.optim_state["optimizer"]["momenta"]
    ]


@pytest.mark.slow
def test_killed_rank_ends_the_job(base_dir: Path, tmp_path: Path) -> None:
    job = launch(tmp_path, make_config("broken", steps=100_000), 2)
    folder, limit = registry.run_dir("base", "broken"), time.monotonic() + 120
    while not find_steps(folder) and time.monotonic() < limit:
        time.sleep(0.05)
    ranks = subprocess.run(
        ["pgrep", "-P", str(job.pid)], capture_output=True, text=True
    ).stdout.split()
    assert len(ranks) == 2
    t_start = time.monotonic()
    os.kill(int(ranks[1]), signal.SIGKILL)
    job.communicate(timeout=60)
    assert time.monotonic() - t_start < 30 and job.returncode != 0
    step = find_steps(folder)[-1]
    loaded = load_checkpoint(folder, step, want_optim=True, verify=True)
    assert loaded.step == step and loaded.optim_state is not None


@pytest.mark.slow
def test_one_traceback(base_dir: Path, tmp_path: Path) -> None:
    """A wrong setting, found by every rank, and a fault of one rank: each is told once."""
    done = launch(tmp_path, make_config("wrong", tokenizer=str(tmp_path / "nowhere")), 2)
    _, err = done.communicate(timeout=120)
    assert done.returncode != 0 and err.count("nowhere") == 1, err


@pytest.mark.slow
def test_machines_share_a_disk(base_dir: Path, tmp_path: Path) -> None:
    """Machines that do not see the same steps would wait for each other for ever; they are told instead."""
    pretrain(make_config("far", steps=5))
    file, script = tmp_path / "far.json", tmp_path / "machine.py"
    file.write_text(json.dumps(encode_config(make_config("far", steps=5))))
    script.write_text(
        "import os, sys\n"
        "from primechat.cli.main import main\n"
        "here = os.environ['RANK'] == '0'  # the other's disk has no run\n"
        "if not here: os.environ['NANOCHAT_BASE_DIR'] += '-of-another'\n"
        f"sys.exit(main(['pretrain', '--config', {str(file)!r}, *(['--resume'] if here else [])]))\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            str(script),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode != 0 and done.stderr.count("a disk that all of them share") == 1, (
        done.stderr
    )
