"""A run of an older version goes on as it began.

`fixtures/old_run` was stopped after 5 of 12 steps at commit 90e2bcf.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from primechat.checkpoint import registry
from primechat.checkpoint.run_dir import read_frozen, read_metrics
from primechat.config import PretrainConfig, encode_config
from primechat.stages.pretrain import pretrain

OLD = Path(__file__).parents[1] / "fixtures" / "old_run"
WORDS = "the cat sat on a mat and ate my hat while you ran to see what we did".split()
# Of the same run, unbroken, at 90e2bcf.
LOSSES_NATS = [
    *(5.636211, 5.511189, 4.755514, 4.075595, 3.608174, 3.278296),
    *(2.979542, 2.66592, 2.540963, 2.464253, 2.479935, 2.290819),
]


def write_corpus(path: Path) -> Path:
    """Write the text that the run read."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=60)) for _ in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_settings_under_their_old_names_are_read(base_dir: Path) -> None:
    assert (
        json.loads((OLD / "base_checkpoints/old/config.json").read_text())["look"]["eval_every"]
        == 3
    )
    config = read_frozen(OLD / "base_checkpoints/old", PretrainConfig)
    assert (config.eval.every, config.eval.tokens, config.eval.last_tokens) == (3, 64, 64)
    assert "look" not in encode_config(config)


def test_a_run_of_an_older_version_goes_on(base_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(OLD, base_dir, dirs_exist_ok=True)
    folder = registry.run_dir("base", "old")
    config = read_frozen(folder, PretrainConfig)
    corpus = write_corpus(tmp_path / "text.jsonl")

    result = pretrain(replace(config, corpus=str(corpus), resume=True))

    steps = [event for event in read_metrics(folder / "metrics.jsonl") if event["kind"] == "step"]
    assert result.step == 12 and [event["step"] for event in steps] == list(range(1, 13))
    np.testing.assert_allclose([event["loss_nats"] for event in steps], LOSSES_NATS, atol=1e-5)
