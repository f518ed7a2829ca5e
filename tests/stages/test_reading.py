"""A run that is resumed knows the text that it has read: edited, shortened, moved, exchanged."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from primechat.checkpoint import registry
from primechat.checkpoint.checkpoint import find_steps, read_meta
from primechat.checkpoint.run_dir import read_frozen, read_metrics
from primechat.cli import main as cli
from primechat.config import (
    DistillConfig,
    EvalConfig,
    GPTConfig,
    PretrainConfig,
    RuntimeConfig,
    encode_config,
)
from primechat.errors import ConfigError, DataError
from primechat.events import Event, NoteEvent, StepEvent, TrainResult
from primechat.stages.distill import distill
from primechat.stages.pretrain import pretrain

FIXED = RuntimeConfig(device="cpu", dtype="float32", threads=1, compile="off", micro_batch_rows=4)
SHAPE = replace(
    GPTConfig.modern(1, vocab_size=280, sequence_len=32, head_dim=8),
    n_embd=24,
    n_head=3,
    n_kv_head=3,
)
EVAL = EvalConfig(every=100, tokens=64, last_tokens=64, sample_every=-1, snapshots=False)
WORDS = "the cat sat on a mat and ate my hat while you ran to see what we did".split()


def write_text(path: Path, lines: int = 60, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    path.parent.mkdir(exist_ok=True)
    texts = [" ".join(rng.choice(WORDS, size=60)) for _ in range(lines)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def make_config(corpus: Path, **changes: Any) -> PretrainConfig:
    config = PretrainConfig(
        tag="d1", model=SHAPE, corpus=str(corpus), batch_tokens=128, steps=12, runtime=FIXED
    )
    return replace(config, eval=EVAL, **changes)


def train(config: PretrainConfig, until: int = 0) -> tuple[TrainResult, list[str]]:
    """Train, perhaps until Stop is pressed after a step; return the result and the notes."""
    stop, notes = threading.Event(), list[str]()

    def hear(event: Event) -> None:
        if isinstance(event, StepEvent) and event.step == until:
            stop.set()
        if isinstance(event, NoteEvent):
            notes.append(event.text)

    return pretrain(config, on_event=hear, stop=stop), notes


def read_run(tag: str) -> list[float]:
    events = read_metrics(registry.run_dir("base", tag) / "metrics.jsonl")
    return [event["loss_nats"] for event in events if event["kind"] == "step"]


@pytest.fixture
def stopped(tmp_path: Path) -> PretrainConfig:
    """A run that was stopped after 5 of 12 steps."""
    config = make_config(write_text(tmp_path / "text" / "words.jsonl"))
    assert train(config, until=5)[0].stopped
    return config


@pytest.mark.parametrize("lines", [60, 61, 20])
def test_another_text_in_its_place(stopped: PretrainConfig, lines: int) -> None:
    """Edited, longer, or so short that the run's place in it is gone: it has to be allowed."""
    write_text(Path(stopped.corpus), lines, seed=1)
    again = replace(stopped, resume=True)
    for _ in range(2):
        with pytest.raises(ConfigError, match="has changed since step 5 .* --allow_changed_corpus"):
            pretrain(again)
    result, notes = train(replace(again, allow_changed_corpus=True), until=9)
    assert result.step == 9 and any("it is read from its beginning" in note for note in notes)
    assert train(again)[0].step == 12, "from step 9 on this is the run's text"


def test_a_time_is_no_content(stopped: PretrainConfig) -> None:
    """A file that was written anew with the same text is the same, and an edit that keeps its size is not."""
    path = Path(stopped.corpus)
    text = path.read_text()
    path.write_text(text)
    os.utime(path, ns=(1, 1))
    whole, notes = train(replace(stopped, resume=True), until=8)
    assert whole.step == 8 and not any("text" in note for note in notes)
    path.write_text(text.replace("cat", "dog"))
    with pytest.raises(ConfigError, match="has changed since step 8"):
        pretrain(replace(stopped, resume=True))


def test_moved(stopped: PretrainConfig, tmp_path: Path) -> None:
    """The old place is refused with advice that works; from the new one the run goes on to the bit."""
    train(replace(stopped, tag="whole"))
    place = Path(stopped.corpus)
    moved = tmp_path / "elsewhere" / "same.jsonl"
    moved.parent.mkdir()
    place.rename(moved)
    with pytest.raises(DataError, match="is not there; .* name its new place: --corpus PATH"):
        pretrain(replace(stopped, resume=True))
    result, notes = train(replace(stopped, resume=True, corpus=str(moved)))
    assert result.step == 12 and any("it is the same" in note for note in notes)
    assert read_run("d1") == read_run("whole")
    assert read_frozen(registry.run_dir("base", "d1"), PretrainConfig).corpus == str(moved)


def test_another_text_by_name(stopped: PretrainConfig, tmp_path: Path) -> None:
    other = write_text(tmp_path / "other" / "words.jsonl", 30, seed=2)
    again = replace(stopped, resume=True, corpus=str(other))
    with pytest.raises(ConfigError, match="other.* is not the text that base/d1 has read so far"):
        pretrain(again)
    assert train(replace(again, allow_changed_corpus=True))[0].step == 12


def forget_content(tag: str) -> None:
    """Make a run's checkpoints like those of an earlier version, which kept paths, sizes and times."""
    folder = registry.run_dir("base", tag)
    for step in find_steps(folder):
        path = folder / f"meta_{step:06d}.json"
        meta = json.loads(path.read_text())
        meta.pop("corpus_content", None)
        path.write_text(json.dumps(meta))


def test_runs_of_an_earlier_version(stopped: PretrainConfig, tmp_path: Path) -> None:
    """They go on where the files are untouched, or their tokens are those in the cache."""
    forget_content("d1")
    assert "corpus_content" not in read_meta(registry.run_dir("base", "d1"), 5)
    assert train(replace(stopped, resume=True), until=7)[0].step == 7
    forget_content("d1")
    moved = tmp_path / "words.jsonl"
    Path(stopped.corpus).rename(moved)
    again = replace(stopped, resume=True, corpus=str(moved))
    assert train(again, until=9)[0].step == 9
    forget_content("d1")
    write_text(moved, seed=3)
    with pytest.raises(ConfigError, match="has changed since step 9"):
        pretrain(again)


def test_a_student_knows_its_text_too(stopped: PretrainConfig) -> None:
    pretrain(replace(stopped, tag="teacher"))
    config = DistillConfig(
        tag="pupil",
        teacher="base/teacher",
        n_layer=1,
        n_embd=24,
        n_head=3,
        corpus=stopped.corpus,
        batch_tokens=128,
        steps=4,
        runtime=FIXED,
        eval=EVAL,
    )
    stop = threading.Event()
    stop.set()
    assert distill(config, stop=stop).stopped
    write_text(Path(stopped.corpus), seed=4)
    with pytest.raises(ConfigError, match="has changed since step 1 of base/pupil"):
        distill(replace(config, resume=True))
    assert distill(replace(config, resume=True, allow_changed_corpus=True)).step == 4


def test_the_message_on_the_command_line(
    stopped: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(encode_config(stopped)))
    write_text(Path(stopped.corpus), seed=5)
    assert cli.main(["pretrain", "--config", str(file), "--resume"]) == 2
    told = capsys.readouterr().err
    assert "has changed since step 5 of base/d1" in told and "Traceback" not in told
    again = ["pretrain", "--config", str(file), "--resume", "--allow_changed_corpus"]
    assert cli.main(again) == 0
