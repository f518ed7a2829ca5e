"""Training killed with -9 at random moments, while stepping and while saving, ends in the unbroken run's
weights.

PRIMECHAT_KILLS=50 makes it fifty kills.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from primechat.checkpoint import registry
from primechat.checkpoint.checkpoint import find_steps, load_checkpoint
from primechat.checkpoint.run_dir import read_metrics
from primechat.config import (
    EvalConfig,
    GPTConfig,
    PretrainConfig,
    RuntimeConfig,
    TokenizerConfig,
    encode_config,
)
from primechat.stages.tokenizer import train_tokenizer

STEPS = 160
MAIN = """
import sys
from dataclasses import replace
from pathlib import Path
from primechat.checkpoint import registry
from primechat.config import PretrainConfig, decode_config
from primechat.stages.pretrain import pretrain
import json
config = decode_config(json.loads(Path(sys.argv[1]).read_text()), PretrainConfig)
resume = (registry.run_dir("base", config.tag) / "config.json").exists()
pretrain(replace(config, resume=resume))
"""


def start(path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-W", "error", "-c", MAIN, str(path)])


def write_config(path: Path, tag: str, corpus: Path) -> Path:
    shape = replace(
        GPTConfig.modern(3, vocab_size=280, sequence_len=16, head_dim=8),
        n_embd=32,
        n_head=2,
        n_kv_head=2,
    )
    config = PretrainConfig(
        tag=tag,
        model=shape,
        corpus=str(corpus),
        batch_tokens=64,
        steps=STEPS,
        eval=EvalConfig(save_every=1, every=50, tokens=64, last_tokens=64),
        runtime=RuntimeConfig(
            device="cpu", dtype="float32", threads=1, compile="off", micro_batch_rows=2
        ),
    )
    path.write_text(json.dumps(encode_config(config)))
    return path


@pytest.mark.slow
def test_kill_resume(tmp_path: Path) -> None:
    corpus = tmp_path / "text.jsonl"
    chance = random.Random(0)
    texts = [
        " ".join(chance.choice(["red", "green", "blue", "ping", "pong"]) for _ in range(80))
        for _ in range(50)
    ]
    corpus.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    train_tokenizer(TokenizerConfig(corpus=str(corpus), vocab_size=280))
    assert start(write_config(tmp_path / "whole.json", "whole", corpus)).wait(timeout=300) == 0
    path, folder = (
        write_config(tmp_path / "broken.json", "broken", corpus),
        registry.run_dir("base", "broken"),
    )
    log, resumed_at = folder / "metrics.jsonl", []
    for _ in range(int(os.environ.get("PRIMECHAT_KILLS", "10"))):
        size = log.stat().st_size if log.exists() else 0
        child = start(path)
        limit = time.monotonic() + 120
        while (
            child.poll() is None
            and time.monotonic() < limit
            and not (log.exists() and log.stat().st_size > size + 400)
        ):
            time.sleep(0.002)
        time.sleep(chance.random() * 0.3)
        child.kill()
        child.wait()
        steps = find_steps(folder)  # the folder can be read, and what counts as a step loads
        if steps:
            load_checkpoint(folder, steps[-1], want_optim=True, verify=True)
            resumed_at.append(steps[-1])
            assert registry.list_models()
        if steps and steps[-1] == STEPS:
            break
    assert len(set(resumed_at)) > 2, "the kills must fall at different steps"
    assert start(path).wait(timeout=300) == 0
    a, b = (
        load_checkpoint(registry.run_dir("base", tag), STEPS, want_optim=True)
        for tag in ("whole", "broken")
    )
    for name, tensor in a.model_state.items():
        assert torch.equal(tensor, b.model_state[name]), name
    losses = [
        [
            e["loss_nats"]
            for e in read_metrics(registry.run_dir("base", tag) / "metrics.jsonl")
            if e["kind"] == "step"
        ]
        for tag in ("whole", "broken")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS
