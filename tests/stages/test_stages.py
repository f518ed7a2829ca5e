"""The stages on a small text of their own: what they write, that they resume to the bit, what they refuse."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from primechat.checkpoint import registry
from primechat.checkpoint.checkpoint import find_steps, list_snapshots, load_checkpoint
from primechat.checkpoint.run_dir import RunDirLock, read_frozen, read_metrics
from primechat.cli import main as cli
from primechat.config import (
    DistillConfig,
    EvalConfig,
    EvaluateConfig,
    FinetuneConfig,
    GPTConfig,
    PretrainConfig,
    QuickstartConfig,
    RuntimeConfig,
    SpeedrunConfig,
    TokenizerConfig,
)
from primechat.errors import ConfigError, DataError
from primechat.events import Event, StepEvent
from primechat.stages import trainer
from primechat.stages.distill import distill
from primechat.stages.evaluate import evaluate
from primechat.stages.finetune import cache_dialogues, finetune
from primechat.stages.pretrain import cache_text, choose_tokenizer, pretrain
from primechat.stages.quickstart import quickstart, speedrun
from primechat.stages.tokenizer import train_tokenizer
from primechat.stages.trainer import COMPILE_FILE, recall_compiling, remember_compiling
from primechat.text.tokenizer import Tokenizer

WORDS = (
    "the cat sat on a mat and ate my hat while you ran to see what we did with all that jam".split()
)
FIXED = RuntimeConfig(device="cpu", dtype="float32", threads=1, compile="off", micro_batch_rows=2)
SHAPE = replace(
    GPTConfig.modern(3, vocab_size=300, sequence_len=32, head_dim=16),
    n_embd=32,
    n_head=2,
    n_kv_head=2,
)


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """A folder with 120 documents of random words."""
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS, size=60)) for _ in range(120)]
    path = tmp_path / "text" / "words.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def dialogues(tmp_path: Path) -> str:
    """Sixty conversations, most of them of two exchanges."""
    rng = np.random.default_rng(1)
    path = tmp_path / "talk.jsonl"
    with path.open("w") as f:
        for _ in range(60):
            said = [" ".join(rng.choice(WORDS, size=8)) for _ in range(4)]
            roles = ("user", "assistant") * 2
            messages = [{"role": r, "content": s} for r, s in zip(roles, said, strict=True)]
            f.write(json.dumps({"messages": messages}) + "\n")
    return str(path)


def make_config(corpus: str, **changes: Any) -> PretrainConfig:
    evaluation = EvalConfig(every=4, save_every=4, tokens=256)
    base = PretrainConfig(
        tag="d3",
        model=SHAPE,
        corpus=corpus,
        batch_tokens=128,
        steps=12,
        runtime=FIXED,
        eval=evaluation,
    )
    return replace(base, **changes)


def stop_at(step: int, stop: threading.Event, events: list[Event]) -> Any:
    def hear(event: Event) -> None:
        events.append(event)
        if event.kind == "step" and event.step == step:  # type: ignore[union-attr]
            stop.set()

    return hear


def read_losses(path: Path) -> list[float]:
    return [e["loss_nats"] for e in read_metrics(path / "metrics.jsonl") if e["kind"] == "step"]


def test_tokenizer_torn_by_a_kill(corpus: str) -> None:
    """Of a tokenizer that was being saved the main file is missing: it is made again, not asked for."""
    made = load_small(corpus)
    own = registry.run_dir("base", "d3") / "tokenizer"
    own.mkdir(parents=True)
    (own / "token_bytes.pt").write_bytes(b"torn")
    assert choose_tokenizer(make_config(corpus)) == made
    made.save(own)
    assert Tokenizer.load(own).byte_lengths().tolist() == made.byte_lengths().tolist()


def test_a_shard_to_train_on_is_taken_whole(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only of the validation shard the beginning will do: distillation learns from all that it asks for."""
    monkeypatch.setattr("primechat.stages.pretrain.SHARD_EVAL_DOCUMENTS", 5)
    folder, tokenizer = registry.base_dir() / "base_data", load_small(corpus)
    folder.mkdir()
    for name in ("shard_00000", "shard_00001", "shard_01822"):
        pq.write_table(
            pa.table({"text": [f"the cat sat {i}" for i in range(9)]}), folder / f"{name}.parquet"
        )
    caches = [cache_text("fineweb-edu", split, tokenizer, 2, None) for split in ("train", "val")]
    assert [cache.documents for cache in caches] == [18, 5]


def test_pretrain_run(corpus: str) -> None:
    """A run leaves its settings, its history, its checkpoints, its snapshots and its tokenizer."""
    made = train_tokenizer(TokenizerConfig(tag="d3", corpus=corpus, vocab_size=300))
    assert (
        made.vocab_size == 300
        and made.bytes_per_token > 2
        and made.path == "base_checkpoints/d3/tokenizer"
    )
    events: list[Event] = []
    result = pretrain(make_config(corpus), on_event=events.append)
    folder = registry.base_dir() / result.path
    assert (
        result.identifier == "base/d3"
        and result.step == 12
        and not result.stopped
        and result.tokens == 12 * 128
    )
    assert find_steps(folder) == [8, 12] and list_snapshots(folder) == [0, 1, 2, 4, 8, 12]
    assert json.loads((folder / "config.json").read_text())["eval"]["sample_every"] == 4
    losses = [e for e in events if e.kind == "loss"]
    assert [e.step for e in losses] == [0, 4, 8, 12] and [e.whole for e in losses] == [
        False,
        False,
        False,
        True,
    ]  # type: ignore[union-attr]
    assert losses[-1].val_bpb < losses[0].val_bpb  # type: ignore[union-attr]
    samples = [e for e in events if e.kind == "sample"]
    assert samples and all(isinstance(e.text, str) for e in samples)  # type: ignore[union-attr]
    again = registry.load_run(folder)
    assert (again.step, again.val_bpb, again.tokens) == (12, result.val_bpb, result.tokens)
    measured = evaluate(EvaluateConfig(model="base/d3", corpus=corpus))
    assert measured.bpb == pytest.approx(result.val_bpb, rel=1e-5)
    assert measured.scored_bytes == 6 * 0 + sum(len(t.encode()) for t in held_out(corpus))
    wider = evaluate(EvaluateConfig(model="base/d3", corpus=corpus, stride=8))
    assert wider.scored_bytes == measured.scored_bytes and wider.bpb != measured.bpb
    with pytest.raises(ConfigError, match="stride <= window"):
        evaluate(EvaluateConfig(model="base/d3", corpus=corpus, window=8, stride=9))


def held_out(corpus: str) -> list[str]:
    return [json.loads(line)["text"] for line in Path(corpus).read_text().splitlines()][-6:]


def test_resume_exact(corpus: str) -> None:
    """Stopped twice, once between checkpoints, a run ends in the unbroken run's losses and weights."""
    train_tokenizer(TokenizerConfig(corpus=corpus, vocab_size=300))
    whole = pretrain(make_config(corpus, tag="whole"))
    for step, resume in ((3, False), (9, True)):
        stop = threading.Event()
        broken = pretrain(
            make_config(corpus, tag="broken", resume=resume),
            on_event=stop_at(step, stop, []),
            stop=stop,
        )
        assert broken.stopped and broken.step == step
    broken = pretrain(make_config(corpus, tag="broken", resume=True, steps=0))
    a, b = (registry.base_dir() / r.path for r in (whole, broken))
    assert not broken.stopped and read_losses(a) == read_losses(b)
    states = [load_checkpoint(folder, 12, want_optim=True) for folder in (a, b)]
    for name, tensor in states[0].model_state.items():
        assert torch.equal(tensor, states[1].model_state[name]), name
    one, two = (s.optim_state for s in states)
    assert one is not None and two is not None
    for p, q in zip(one["optimizer"]["momenta"], two["optimizer"]["momenta"], strict=True):
        assert torch.equal(p, q)
    assert [e["step"] for e in read_metrics(b / "metrics.jsonl") if e["kind"] == "step"] == list(
        range(1, 13)
    )


def test_resume_refusals(corpus: str) -> None:
    train_tokenizer(TokenizerConfig(corpus=corpus, vocab_size=300))
    config = make_config(corpus, steps=2)
    with pytest.raises(ConfigError, match="tag='d3' has no base run to resume"):
        pretrain(replace(config, resume=True))
    pretrain(config)
    with pytest.raises(ConfigError, match="has a base model of 2 steps"):
        pretrain(config)
    for changed, name in (
        (replace(config, seed=7), r"seed: 0 != 7"),
        (replace(config, model=replace(SHAPE, smear=False)), r"model.smear: True != False"),
        (
            replace(config, runtime=replace(FIXED, dtype="bfloat16")),
            r"runtime.dtype: 'float32' != 'bfloat16'",
        ),
        (replace(config, steps=5), r"steps: 2 != 5"),
    ):
        with pytest.raises(ConfigError, match=name):
            pretrain(replace(changed, resume=True))
    open_again = replace(config, runtime=RuntimeConfig(), steps=0, resume=True)
    assert pretrain(open_again).step == 2


def test_run_locked(corpus: str) -> None:
    train_tokenizer(TokenizerConfig(corpus=corpus, vocab_size=300))
    with (
        RunDirLock(registry.run_dir("base", "d3")),
        pytest.raises(Exception, match="is being written by"),
    ):
        pretrain(make_config(corpus))


def test_config_refusals(corpus: str) -> None:
    with pytest.raises(DataError, match="tokenizer"):
        pretrain(make_config(corpus, tokenizer="nowhere"))
    train_tokenizer(TokenizerConfig(corpus=corpus, vocab_size=300, tag="d3"))
    with pytest.raises(ConfigError, match="vocab_size=301 must be that of the tokenizer"):
        pretrain(make_config(corpus, model=replace(SHAPE, vocab_size=301)))
    with pytest.raises(DataError, match="--tag"):
        train_tokenizer(TokenizerConfig(corpus=corpus, vocab_size=280, tag="d3"))


def test_seconds_fill(corpus: str) -> None:
    """A time budget becomes steps, measured and frozen."""
    train_tokenizer(TokenizerConfig(corpus=corpus, vocab_size=300))
    stop = threading.Event()
    pretrain(
        make_config(corpus, steps=0, seconds=30.0, runtime=RuntimeConfig(device="cpu")),
        on_event=stop_at(2, stop, []),
        stop=stop,
    )
    frozen = json.loads((registry.run_dir("base", "d3") / "config.json").read_text())
    assert frozen["steps"] > 10 and frozen["seconds"] == 30.0
    assert (
        frozen["runtime"]["dtype"] in ("float32", "bfloat16") and frozen["runtime"]["threads"] >= 1
    )


@pytest.mark.parametrize("guess_s", [1e-6, 1.0])
def test_the_first_tenth_settles_the_steps(
    corpus: str, monkeypatch: pytest.MonkeyPatch, guess_s: float
) -> None:
    """However wrong the seconds of a step were measured beforehand, the run fills its time; resumed, it keeps
    the settled number.
    """
    train_tokenizer(TokenizerConfig(corpus=corpus, vocab_size=300))
    real = trainer.tune_runtime
    monkeypatch.setattr(
        trainer, "tune_runtime", lambda *a, **k: replace(real(*a, **k), step_s=guess_s)
    )
    told: list[int] = []

    def hear(event: Event) -> None:
        if event.kind == "step":
            told.append(event.steps)

    evaluation = EvalConfig(tokens=256)
    config = make_config(
        corpus, steps=0, seconds=1.0, runtime=replace(FIXED, micro_batch_rows=4), eval=evaluation
    )
    result = pretrain(config, on_event=hear)
    first = max(1, int(1 / guess_s))
    assert told[-1] == result.step and result.step != first and not result.stopped
    assert sum(1 for a, b in itertools.pairwise([first, *told]) if a != b) == 1, "settled once"
    assert read_frozen(registry.run_dir("base", "d3"), PretrainConfig).steps == result.step
    events = read_metrics(registry.run_dir("base", "d3") / "metrics.jsonl")
    assert len([e for e in events if e["kind"] == "loss"]) <= 14, "the looks are spread anew"
    assert pretrain(replace(config, resume=True)).step == result.step


class Killed(BaseException):
    """Stands for a kill: nothing of the run's code catches it, and nothing is saved."""


def run_broken(
    config: PretrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    *,
    settle: int = 0,
    kill: int = 0,
    stop: int = 0,
) -> list[tuple[int, int]]:
    """Run a config whose steps fill a time; return the steps of the whole run as each step told them.

    The first tenth of the time is over after step `settle`; the run is killed or stopped after others.
    """
    told: list[tuple[int, int]] = []
    wish = threading.Event()
    monkeypatch.setattr(trainer, "SETTLE_SHARE", 0.1)

    def hear(event: Event) -> None:
        if event.kind != "step":
            return
        told.append((event.step, event.steps))
        if event.step == settle - 1:
            monkeypatch.setattr(trainer, "SETTLE_SHARE", 0.0)
        if event.step == kill:
            raise Killed
        if event.step == stop:
            wish.set()

    with pytest.raises(Killed) if kill else nullcontext():
        pretrain(config, on_event=hear, stop=wish)
    return told


@pytest.mark.parametrize("save_every", [4, 1000])
def test_killed_in_its_first_tenth_a_run_still_settles_its_steps(
    corpus: str, monkeypatch: pytest.MonkeyPatch, save_every: int
) -> None:
    """Resumed from a checkpoint, or from none, the first tenth of the time settles the steps."""
    train_tokenizer(TokenizerConfig(corpus=corpus, vocab_size=300))
    real = trainer.tune_runtime
    monkeypatch.setattr(
        trainer, "tune_runtime", lambda *a, **k: replace(real(*a, **k), step_s=0.01)
    )
    evaluation = EvalConfig(every=10**6, tokens=64, save_every=save_every)
    config = make_config(corpus, steps=0, seconds=60.0, eval=evaluation)
    told = run_broken(config, monkeypatch, kill=6)
    assert told == [(i, 6000) for i in range(1, 7)], "the first guess"
    told = run_broken(replace(config, resume=True), monkeypatch, settle=7, stop=8)
    assert told[0] == (5 if save_every == 4 else 1, 6000) and dict(told)[7] != 6000
    assert read_frozen(registry.run_dir("base", "d3"), PretrainConfig).steps == dict(told)[8]


@pytest.mark.parametrize("kill", [6, 7])
def test_early_steps_are_replayed_with_the_number_that_they_had(
    corpus: str, monkeypatch: pytest.MonkeyPatch, kill: int
) -> None:
    """Momentum and learning rate depend on the steps of the run: those before the number was settled must
    not be taken again with the new one. Killed at the very step that settles it, or right after.
    """
    train_tokenizer(TokenizerConfig(corpus=corpus, vocab_size=300))
    real = trainer.tune_runtime
    monkeypatch.setattr(
        trainer, "tune_runtime", lambda *a, **k: replace(real(*a, **k), step_s=0.01)
    )
    evaluation = EvalConfig(every=10**6, tokens=64, save_every=4)
    config = make_config(corpus, steps=0, seconds=60.0, eval=evaluation)
    first = dict(run_broken(config, monkeypatch, settle=6, kill=kill))
    assert first[5] == 6000 and first[6] != 6000
    again = dict(run_broken(replace(config, resume=True), monkeypatch, settle=6, stop=9))
    assert all(again[step] == 6000 for step in again if step < 6), again
    if kill == 7:
        assert again[8] == again[9] == first[6], "settled once, and saved with that step"


def test_what_compiling_brought_is_remembered(base_dir: Path) -> None:
    assert recall_compiling() == {}
    remember_compiling({"compile_s": 40.0, "gain_bfloat16": 1.3})
    remember_compiling({"compile_s": 5.0, "gain_float32": 1.1})  # torch had it in its cache
    assert recall_compiling() == {"compile_s": 40.0, "gain_bfloat16": 1.3, "gain_float32": 1.1}
    path = base_dir / COMPILE_FILE
    for text in (path.read_text().replace("torch", "another torch"), "{", "[]", '{"machine": 1}'):
        path.write_text(text)
        assert recall_compiling() == {}, "another machine's, or damaged"


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # torch's compiler uses what torch deprecates
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_run_follows_the_eager_one(corpus: str) -> None:
    train_tokenizer(TokenizerConfig(corpus=corpus, vocab_size=300))
    eager, notes = make_config(corpus, tag="eager", steps=6), []
    pretrain(eager)
    compiled = replace(eager, tag="compiled", runtime=replace(FIXED, compile="on"))
    result = pretrain(
        compiled, on_event=lambda e: notes.append(e.text) if e.kind == "note" else None
    )
    assert any("Compilation on: as you asked; compiled in" in note for note in notes), notes
    assert set(recall_compiling()) == {"compile_s", "gain_float32"}
    losses = read_losses(registry.base_dir() / result.path)
    plain = read_losses(registry.base_dir() / "base_checkpoints" / "eager")
    assert losses[0] == pytest.approx(plain[0], abs=1e-5) and losses[-1] < losses[0] - 1
    assert losses == pytest.approx(plain, abs=5e-3), "Muon makes rounding larger from step to step"


def test_finetune_run(corpus: str, dialogues: str) -> None:
    train_tokenizer(TokenizerConfig(corpus=corpus, vocab_size=300))
    pretrain(make_config(corpus))
    base = load_checkpoint(registry.run_dir("base", "d3"))
    config = FinetuneConfig(tag="d3", dialogues=dialogues, batch_tokens=128, steps=8, runtime=FIXED)
    result = finetune(config)
    folder = registry.base_dir() / result.path
    assert result.identifier == "sft/d3" and result.step == 8
    losses = [e["val_bpb"] for e in result.events if e["kind"] == "loss"]
    assert losses[-1] < losses[0]
    tuned = load_checkpoint(folder)
    assert (
        tuned.meta["base"] == "base/d3@12"
        and tuned.meta["tokenizer_identity"] == base.meta["tokenizer_identity"]
    )
    assert not torch.equal(tuned.model_state["lm_head.weight"], base.model_state["lm_head.weight"])
    model, tokenizer, meta = registry.open_model("sft/d3")
    assert (
        meta["identifier"] == "sft/d3@8" and tokenizer.identity == base.meta["tokenizer_identity"]
    )
    assert finetune(replace(config, resume=True)).step == 8
    with pytest.raises(ConfigError, match="batch_tokens=100 must be a multiple"):
        finetune(replace(config, tag="other", base="base/d3", batch_tokens=100))


def load_small(corpus: str) -> Tokenizer:
    return Tokenizer.load(
        registry.base_dir() / train_tokenizer(TokenizerConfig(corpus=corpus, vocab_size=300)).path
    )


def test_one_rank_prepares_the_text(
    corpus: str, dialogues: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conversations, and a student's text, wait for the machine's first rank, which fetches and cuts them."""

    def refuse(ranks: Any) -> Any:
        raise DataError("not my turn")

    load_small(corpus)
    pretrain(make_config(corpus, steps=1))
    for name in ("finetune.wait_turn", "distill.wait_turn"):
        monkeypatch.setattr(f"primechat.stages.{name}", refuse)
    for name in ("finetune.cache_dialogues", "distill.cache_corpus"):
        monkeypatch.setattr(f"primechat.stages.{name}", lambda *_: pytest.fail("out of turn"))
    small: Any = dict(batch_tokens=128, steps=1, runtime=FIXED)
    with pytest.raises(DataError, match="not my turn"):
        finetune(FinetuneConfig(tag="d3", dialogues=dialogues, **small))
    with pytest.raises(DataError, match="not my turn"):
        distill(DistillConfig(teacher="base/d3", corpus=corpus, **small))


def test_too_few_words_are_held_out(corpus: str, tmp_path: Path) -> None:
    path = tmp_path / "short.jsonl"
    talk = [{"role": "user", "content": "cat?"}, {"role": "assistant", "content": "a mat"}]
    path.write_text(
        "\n".join(json.dumps([*talk, {**talk[0], "content": f"{i}"}]) for i in range(9))
    )
    with pytest.raises(DataError, match="holds out 5 characters of replies .* at least 10; add"):
        cache_dialogues(FinetuneConfig(dialogues=str(path)), "val", load_small(corpus))


def test_question_longer_than_a_conversation_may_be(corpus: str, tmp_path: Path) -> None:
    """Its answer is cut off: it is left out, as a validation on such alone would be of nothing, and nan."""
    tokenizer = load_small(corpus)
    talk = [
        [{"role": "user", "content": f"cat {i}"}, {"role": "assistant", "content": "on the mat"}]
        for i in range(40)
    ]
    path, long = (
        tmp_path / "long.jsonl",
        [{**talk[0][0], "content": "the cat sat on " * 3000}, talk[0][1]],
    )
    path.write_text("\n".join(map(json.dumps, [*talk[:39], long, *talk[39:]])))
    config = FinetuneConfig(dialogues=str(path))
    caches = [cache_dialogues(config, split, tokenizer) for split in ("train", "val")]
    assert [cache.documents for cache in caches] == [39, 1]
    path.write_text("\n".join(map(json.dumps, [*talk[:30], long])))
    with pytest.raises(
        DataError, match="leaves nothing in val: .* or none answers within 2048 tokens"
    ):
        cache_dialogues(config, "val", tokenizer)
    with pytest.raises(DataError, match="leaves nothing in train: a weight takes no conversation"):
        cache_dialogues(replace(config, dialogues=f"{path}*0.01"), "train", tokenizer)


def test_speedrun_and_report(
    corpus: str, dialogues: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three stages in a row, stopped in the second, resumed there; and a page about what came of it."""
    talks = FinetuneConfig(dialogues=dialogues, batch_tokens=128, steps=8, runtime=FIXED)
    config = SpeedrunConfig(pretrain=make_config(corpus), finetune=talks, eval_tokens=500)
    stop, seen = threading.Event(), []

    def hear(event: Any) -> None:
        seen.append(event)
        if isinstance(event, StepEvent) and event.step == 3 and event.steps == 8:
            stop.set()

    first = speedrun(config, on_event=hear, stop=stop)
    assert (
        first.base.step == 12
        and first.chat is not None
        and first.chat.stopped
        and first.chat.step == 3
    )
    again = speedrun(replace(config, resume=True))
    assert again.chat is not None and again.chat.step == 8 and again.base.step == 12
    assert again.evaluation is not None and again.evaluation.identifier == "base/d3"
    assert 400 < again.evaluation.scored_tokens <= 512  # <|bos|> has no bytes to score
    with pytest.raises(ConfigError, match="resume it"):
        speedrun(config)
    assert cli.main(["report", "base/d3", "--output", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 5 and "<script" not in page and "step 12" in page
    for name in ("loss", "bpb", "speed", "rate", "norms"):
        assert (tmp_path / "page" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert cli.main(["report", "base/none"]) == 2 and "none" in capsys.readouterr().err


def test_finetune_mixture(corpus: str, dialogues: str) -> None:
    """A mixture, in rows of its own or as midtraining; forgetting is measured on the base's own text."""
    train_tokenizer(TokenizerConfig(corpus=corpus, vocab_size=300))
    pretrain(make_config(corpus, steps=4))
    config = FinetuneConfig(
        tag="mix",
        base="base/d3",
        dialogues=f"faq*0.5, {dialogues}@30",
        batch_tokens=128,
        steps=3,
        runtime=FIXED,
        layout="padded",
    )
    result = finetune(config)
    losses = [e for e in result.events if e["kind"] == "loss"]
    before = evaluate(EvaluateConfig(model="base/d3", corpus=corpus))
    assert all(e["general_bpb"] > 0 for e in losses) and losses[0]["step"] == 0
    assert losses[-1]["general_bpb"] != losses[0]["general_bpb"]
    whole = evaluate(EvaluateConfig(model="sft/mix", corpus=corpus, contamination=dialogues))
    assert (
        losses[-1]["general_bpb"] == pytest.approx(whole.bpb, rel=1e-4) and whole.bpb != before.bpb
    )
    assert (
        whole.overlap is not None
        and whole.overlap.contaminated == 0
        and whole.overlap.documents == 6
    )
    mid = finetune(replace(config, learn="all", layout="packed", general="none"))
    assert mid.identifier == "mid/mix" and mid.events[0]["general_bpb"] is None
    assert registry.open_model("mid/mix")[2]["step"] == 3
    wide = replace(config, learn="all", batch_tokens=2048, steps=1)
    runs = [finetune(replace(wide, tag=kind, layout=kind)) for kind in ("packed", "masked")]
    # of the same tokens and weights: what a talk costs depends on whether it sees the one before it
    first = [e["loss_nats"] for trainer in runs for e in trainer.events if e["kind"] == "step"]
    assert len(first) == 2 and first[0] != first[1] and first[0] == pytest.approx(first[1], rel=0.2)
    for wrong in (dict(layout="loose"), dict(learn="user"), dict(dialogue_shards=0)):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            replace(config, **wrong)


@pytest.mark.slow
def test_quickstart_small(base_dir: Path) -> None:
    """From the text that ships to a dialogue, in seconds; what chat training holds out, pretraining held
    out too.
    """
    result = quickstart(
        QuickstartConfig(
            seconds=2.0, depth=1, vocab_size=512, runtime=replace(FIXED, micro_batch_rows=4)
        )
    )
    assert [m["role"] for m in result.dialogue] == ["user", "assistant"] * 3
    assert (
        result.base.identifier == "base/quickstart" and result.chat.identifier == "sft/quickstart"
    )
    assert result.base.val_bpb < 3.5
    metrics = read_metrics(base_dir / result.base.path / "metrics.jsonl")
    assert metrics[-1]["kind"] == "done" and not metrics[-1]["stopped"]
    again = quickstart(
        QuickstartConfig(
            seconds=1.0, depth=1, vocab_size=512, runtime=replace(FIXED, micro_batch_rows=4)
        )
    )
    assert again.base.identifier == "base/quickstart-2"
