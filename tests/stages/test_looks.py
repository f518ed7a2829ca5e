"""How much text a run is validated on: chosen from its speed, kept, said with every figure, ended by Stop."""

from __future__ import annotations

import itertools
import json
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
    EvalConfig,
    EvaluateConfig,
    GPTConfig,
    PretrainConfig,
    RuntimeConfig,
    encode_config,
)
from primechat.errors import ConfigError
from primechat.events import Event, LossEvent, NoteEvent, OnEvent, ProgressEvent, StepEvent
from primechat.labkit.instruments import pretraining
from primechat.labkit.instruments.pretraining import AblationConfig, ablate
from primechat.stages import trainer
from primechat.stages.eval_budget import LADDER, Cost, plan_evals
from primechat.stages.evaluate import evaluate
from primechat.stages.pretrain import pretrain

FIXED = RuntimeConfig(device="cpu", dtype="float32", threads=1, compile="off", micro_batch_rows=4)
SHAPE = replace(
    GPTConfig.modern(1, vocab_size=280, sequence_len=32, head_dim=8),
    n_embd=24,
    n_head=3,
    n_kv_head=3,
)
QUIET = EvalConfig(sample_every=-1, snapshots=False)


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """Text of which some 7,000 tokens are held out."""
    rng = np.random.default_rng(0)
    words = "the cat sat on a mat and ate my hat while you ran to see what we did".split()
    path = tmp_path / "words.jsonl"
    lines = [" ".join(rng.choice(words, size=400)) for _ in range(200)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return str(path)


def make_config(corpus: str, **changes: Any) -> PretrainConfig:
    config = PretrainConfig(
        tag="d1", model=SHAPE, corpus=corpus, batch_tokens=128, steps=12, runtime=FIXED, eval=QUIET
    )
    return replace(config, **changes)


def fake_cost(monkeypatch: pytest.MonkeyPatch, step_s: float, token_s: float) -> None:
    """Let every run find the same speed."""
    real = trainer.tune_runtime
    monkeypatch.setattr(
        trainer, "tune_runtime", lambda *a, **k: replace(real(*a, **k), step_s=step_s)
    )
    monkeypatch.setattr(trainer.TrainingRun, "time_validation", lambda *_: Cost(token_s=token_s))


def stop_after(step: int, stop: threading.Event) -> OnEvent:
    """Return what presses Stop after a step."""

    def hear(event: Event) -> None:
        if isinstance(event, StepEvent) and event.step == step:
            stop.set()

    return hear


def read_losses(tag: str) -> list[dict[str, Any]]:
    events = read_metrics(registry.run_dir("base", tag) / "metrics.jsonl")
    return [event for event in events if event["kind"] == "loss"]


def test_validations_keep_to_their_share() -> None:
    """A tenth of the training for all along the run, a quarter for the last, but for the least of each."""
    for steps, train_s, token_s, fixed_s, whole in itertools.product(
        (1, 2, 5, 12, 40, 1000),
        (0.1, 3.0, 60.0, 4000.0),
        (1e-6, 1e-4, 1e-2),
        (0.0, 0.5),
        (900, 230_000, 7_000_000),
    ):
        cost = Cost(token_s=token_s, fixed_s=fixed_s)
        evaluation, n_evals = plan_evals(
            EvalConfig(), steps=steps, train_s=train_s, cost=cost, whole=whole
        )
        assert 1 <= n_evals <= min(10, steps)
        for n, count, share in (
            (evaluation.tokens, n_evals, 0.1),
            (evaluation.last_tokens, 1, 0.25),
        ):
            assert n in (*LADDER, 0)
            spent_s = count * (fixed_s + token_s * min(n or whole, whole))
            least = count == 1 and n == LADDER[0]
            assert spent_s <= share * train_s * (1 + 1e-9) or least, (evaluation, n_evals)
        by_hand = EvalConfig(tokens=123, last_tokens=0, every=7)
        assert plan_evals(by_hand, steps=steps, train_s=1, cost=cost, whole=9)[0] == by_hand


def test_chosen_once_and_frozen(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice stands in config.json, also for a run that goes on; a number by hand must be the same."""
    fake_cost(monkeypatch, step_s=1.0, token_s=1e-4)  # 0.12 s a look: 1,200 tokens; 3 s at the end
    stop, config = threading.Event(), make_config(corpus)
    pretrain(config, on_event=stop_after(6, stop), stop=stop)
    evaluation = read_frozen(registry.run_dir("base", "d1"), PretrainConfig).eval
    assert (evaluation.tokens, evaluation.last_tokens, evaluation.every) == (4000, 20_000, 4)

    fake_cost(monkeypatch, step_s=1.0, token_s=1e-9)
    with pytest.raises(ConfigError, match="eval.tokens: 4000 != 64"):
        pretrain(replace(config, resume=True, eval=replace(QUIET, tokens=64)))
    with pytest.raises(ConfigError, match="eval.tokens: 4000 != 0"):
        pretrain(replace(config, resume=True, eval=replace(QUIET, tokens=0)))
    pretrain(replace(config, resume=True))
    assert read_frozen(registry.run_dir("base", "d1"), PretrainConfig).eval == evaluation
    losses = read_losses("d1")
    assert [loss["step"] for loss in losses] == [0, 4, 8, 12]
    assert len({loss["tokens"] for loss in losses[:3]}) == 1 and losses[0]["tokens"] <= 4000
    assert losses[3]["whole"] and losses[3]["tokens"] > losses[0]["tokens"]


def test_settings_of_an_earlier_version(corpus: str) -> None:
    """A run that was frozen with 20,480 and 0 tokens goes on with these: 0 is the whole split."""
    evaluation = replace(QUIET, tokens=20_480, last_tokens=0)
    stop = threading.Event()
    pretrain(make_config(corpus, eval=evaluation), on_event=stop_after(3, stop), stop=stop)
    run_folder = registry.run_dir("base", "d1")
    old = json.loads((run_folder / "config.json").read_text())
    assert (old["eval"]["tokens"], old["eval"]["last_tokens"]) == (20_480, 0)
    result = pretrain(make_config(corpus, resume=True))
    assert read_losses("d1")[-1]["whole"]
    assert (
        result.val_tokens == evaluate(EvaluateConfig(model="base/d1", corpus=corpus)).scored_tokens
    )


def test_every_figure_says_its_tokens(
    corpus: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    evaluation = replace(QUIET, tokens=320, last_tokens=640, every=6)
    file = tmp_path / "run.json"
    file.write_text(json.dumps(encode_config(make_config(corpus, eval=evaluation))))
    assert cli.main(["pretrain", "--config", str(file)]) == 0
    out = capsys.readouterr().out
    assert "bits per byte on 320 tokens\n" in out and "bits per byte on 640 tokens, " in out
    folder = registry.run_dir("base", "d1")
    meta = read_meta(folder, find_steps(folder)[-1])
    losses = read_losses("d1")
    assert meta["val_tokens"] == losses[-1]["tokens"] == registry.load_run(folder).val_tokens == 640
    entry = next(entry for entry in registry.list_models() if entry.identifier == "base/d1")
    assert entry.val_tokens == 640
    assert cli.main(["report", "base/d1", "--output", str(tmp_path / "page")]) == 0
    assert "bits per byte on 640 tokens" in (tmp_path / "page" / "index.html").read_text()


def test_the_last_point_is_paired_with_those_before(corpus: str) -> None:
    """The last validation tells what it found on the tokens of the earlier ones too."""
    few = replace(QUIET, tokens=320, last_tokens=320, every=6)
    pretrain(make_config(corpus, tag="few", eval=few))
    pretrain(make_config(corpus, tag="all", eval=replace(few, last_tokens=0)))
    one, two = (read_losses(tag) for tag in ("few", "all"))
    assert [loss["paired_bpb"] for loss in one] == [loss["val_bpb"] for loss in one]
    assert [loss["paired_bpb"] for loss in two] == pytest.approx(
        [loss["val_bpb"] for loss in one], rel=1e-6
    )
    assert two[-1]["val_bpb"] != two[-1]["paired_bpb"] and two[-1]["whole"]


@pytest.mark.parametrize("batches", [1, 3])
def test_stop_ends_the_last_validation(corpus: str, batches: int) -> None:
    """Within a batch of windows, with the figure of what was scored, said so; the run is whole."""
    stop, told, steps = threading.Event(), list[Event](), []

    def hear(event: Event) -> None:
        told.append(event)
        if isinstance(event, StepEvent):
            steps.append(event.step)
        if isinstance(event, ProgressEvent) and steps and steps[-1] == 12:
            done = sum(1 for e in told[told.index(last_step()) :] if isinstance(e, ProgressEvent))
            if done == batches:
                stop.set()

    def last_step() -> Event:
        return next(e for e in told if isinstance(e, StepEvent) and e.step == 12)

    evaluation = replace(QUIET, tokens=64, last_tokens=0, sample_every=0)
    result = pretrain(make_config(corpus, eval=evaluation), on_event=hear, stop=stop)
    after = told[told.index(last_step()) :]
    assert sum(1 for e in after if isinstance(e, ProgressEvent)) == batches, "no batch more"
    event = next(e for e in after if isinstance(e, LossEvent))
    assert event.cut_short and not event.whole
    assert batches * 16 * 32 * 0.9 < event.tokens <= batches * 16 * 32
    assert not result.stopped and result.step == 12 and result.val_tokens == event.tokens
    assert result.val_bpb == event.val_bpb and np.isfinite(event.val_bpb)
    folder = registry.run_dir("base", "d1")
    assert read_meta(folder, 12)["val_tokens"] == event.tokens
    assert any(isinstance(e, NoteEvent) and "last check was stopped" in e.text for e in after)
    assert not [e for e in after if e.kind == "sample"], "nothing more is written"


def test_a_validation_on_the_way_ends_at_stop_too(corpus: str) -> None:
    """Its figure would be of fewer tokens than the others: there is none."""
    stop, told = threading.Event(), list[Event]()

    def hear(event: Event) -> None:
        told.append(event)
        if isinstance(event, ProgressEvent) and any(isinstance(e, StepEvent) for e in told):
            stop.set()

    evaluation = replace(QUIET, tokens=0, last_tokens=64, every=3)
    result = pretrain(make_config(corpus, eval=evaluation), on_event=hear, stop=stop)
    assert result.stopped and result.step == 4
    assert [e.step for e in told if isinstance(e, LossEvent)] == [0]


def test_time_left_counts_the_validations(corpus: str) -> None:
    told: list[StepEvent] = []

    def hear(event: Event) -> None:
        if isinstance(event, StepEvent):
            told.append(event)

    evaluation = replace(QUIET, tokens=0, last_tokens=0, every=3)
    pretrain(make_config(corpus, eval=evaluation), on_event=hear)
    for event in told:
        assert event.left_s is not None
        assert event.left_s > event.elapsed_s / event.step * (event.steps - event.step)
    assert told[-1].left_s and told[-1].left_s > 0, "the last validation is still to come"


def test_the_seeds_of_a_comparison_share_the_choice(
    corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run of a series chooses; opened again, the series finds its runs."""
    fake_cost(monkeypatch, step_s=1.0, token_s=1e-4)
    config = AblationConfig(base=make_config(corpus), steps=4, switches="smear", seeds=3)
    told: list[Event] = []

    def hear(event: Event) -> None:
        told.append(event)
        if event.kind == "done":
            fake_cost(monkeypatch, step_s=1.0, token_s=1e-9)  # the next run would be faster

    first = ablate(config, on_event=hear)
    folders = sorted(registry.run_dir("base", "x").parent.glob("ablation-*"))
    n_evals = {read_frozen(folder, PretrainConfig).eval for folder in folders}
    assert len(folders) == 6 and len(n_evals) == 1 and n_evals.pop().tokens == 4000
    told.clear()
    assert ablate(config, on_event=told.append) == first
    assert not [e for e in told if e.kind == "step"], "they are known"


def test_estimate_before_the_start_counts_validation(corpus: str) -> None:
    said = pretraining.describe_plan(make_config(corpus, steps=0, seconds=100.0))["time here"]
    assert said == "100 s, and validation up to 35 s"
