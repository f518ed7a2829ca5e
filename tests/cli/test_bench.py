"""The benchmark: every candidate is measured, and its figures are of the work that they name."""

from __future__ import annotations

import json
import os
import subprocess
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from primechat.cli import bench
from primechat.cli import main as cli
from primechat.cloud import ranks
from primechat.config import GPTConfig, PretrainConfig, RuntimeConfig
from primechat.errors import PrimechatError
from primechat.train import autotune

TINY = GPTConfig.modern(1, vocab_size=300, sequence_len=32, head_dim=16)


def test_training_candidates_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    def make_runner(shape: GPTConfig, runtime: RuntimeConfig) -> bench.Candidate:
        speed = {"float32": 100.0, "bfloat16": 150.0, "auto": 300.0}[runtime.dtype]
        speed *= 2 if runtime.compile == "on" else 1

        def turn() -> list[float]:
            order.append(runtime.compile + runtime.dtype)
            time.sleep(0.002)
            return [speed, speed, speed * 10]

        return bench.Candidate(name="x", runtime=runtime, compile_s=0.0, turn=turn, speeds=[])

    order: list[str] = []
    monkeypatch.setattr(bench, "prepare_runner", make_runner)
    monkeypatch.setattr(autotune, "half_pays", lambda: True)
    rows = bench.bench_train(bench.BenchConfig(seconds=0.1), TINY)
    assert [row["ratio"] for row in rows] == [
        1.0,
        1.5,
        2.0,
        3.0,
        3.0,
    ]  # of medians: one fast step is no speed
    assert rows[0]["best"] == 1000.0 and rows[0]["steps"] >= 6
    assert order[:10] == order[5:10] * 2  # first all warm up, then they take turns
    monkeypatch.setattr(autotune, "half_pays", lambda: False)
    rows = bench.bench_train(bench.BenchConfig(seconds=0.1), TINY)
    assert [row["ratio"] for row in rows] == [1.0, 2.0, 3.0]


def test_a_candidate_makes_real_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BATCH_TOKENS", 64)
    before = torch.get_num_threads()
    runner = bench.prepare_runner(
        TINY, RuntimeConfig(device="cpu", dtype="float32", compile="off", threads=1)
    )
    assert runner.name == "eager float32" and runner.runtime.micro_batch_rows in (1, 2)
    speeds = runner.turn()
    assert len(speeds) == bench.TURN_STEPS and min(speeds) > 0
    torch.set_num_threads(before)


def test_engine_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "NEW_TOKENS", 4)
    monkeypatch.setattr(autotune, "count_cores", lambda: 1)
    (row,) = bench.bench_infer(bench.BenchConfig(seconds=0.2), TINY)
    assert row["model"] == "random depth 1" and row["threads"] == 1
    assert set(row) >= {"ttft_ms", "prefill_tok_s", "decode_tok_s", "decode_tok_s_batch_32"}
    assert all(row[key] > 0 for key in row if key not in ("model", "threads"))


def test_speeds_are_amounts_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, int]] = []

    class Engine:
        model = TINY

        def generate_batch(self, prompts: list[list[int]], **options: Any) -> None:
            seen.append((len(prompts[0]), options["max_new_tokens"], options["num_samples"]))

        def generate(self, ids: list[int], *, max_new_tokens: int, **options: Any) -> Any:
            for _ in range(max_new_tokens):
                clock[0] += 0.01
                yield 1

    clock = [0.0]
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def measure(call: Any, seconds: float) -> float:
        call()
        prompt, new, batch = seen[-1]
        return prompt / 1000 + new * batch / 100  # reads 1,000 tokens a second, writes 100

    monkeypatch.setattr(bench, "repeat_call", measure)
    figures = bench.measure_engine(Engine(), 1.0)  # type: ignore[arg-type]
    assert figures["ttft_ms"] == pytest.approx(74) and figures["decode_tok_s"] == pytest.approx(100)
    assert figures["decode_tok_s_batch_32"] == pytest.approx(100)
    assert figures["prefill_tok_s"] == pytest.approx(32 / 0.042, abs=0.01)


def test_tokenizer_figures_and_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["one two three four five six " * 9, "seven eight nine ten " * 9]
    real = bench.bench_tokenizer
    monkeypatch.setattr(bench, "bench_tokenizer", lambda config: real(config, texts, 270))
    assert cli.main(["bench", "tokenizer", "--json", "--seconds", "0.1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bench"] == "tokenizer" and found["machine"]["torch"] == torch.__version__
    assert (
        found["rows"][0]["vocab_size"] == 270
        and found["rows"][0]["threads"] == 1
        and found["rows"][0]["encode_mb_s"] > 0
    )


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    bench.show_rows(
        [{"run": "eager float32", "tokens_per_s": 4000.4}, {"run": "auto", "tokens_per_s": 24512.0}]
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["eager", "float32", "4,000"] and lines[2].split() == [
        "auto",
        "24,512",
    ]


@pytest.mark.parametrize(
    ("words", "expected"), [("--device tpu", "tpu"), ("--seconds 0", "seconds=0.0")]
)
def test_refusals(words: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *words.split()]) == 2
    seen = capsys.readouterr().err
    assert seen.startswith("primechat: ") and expected in seen and seen.count("\n") == 1


def test_repeats_are_bounded() -> None:
    calls: list[int] = []
    assert bench.repeat_call(lambda: (calls.append(1), time.sleep(0.05)), 0.01) >= 0.05
    assert len(calls) == 1  # one call took longer than the time there was
    calls.clear()
    assert bench.repeat_call(lambda: calls.append(1), 0.02) < 0.01 and len(calls) > 3


@pytest.mark.slow
def test_ranks_take_turns_with_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds really train; the ratio is that of the medians."""
    monkeypatch.setattr(ranks, "ROUNDS", 1)
    monkeypatch.setattr(autotune, "count_cores", lambda: 2)
    rows = ranks.bench_ranks(0.5, depth=1)
    assert [row["run"] for row in rows[:2]] == ["1 x 2 threads, float32", "2 x 1 threads, float32"]
    for alone, spread in zip(rows[::2], rows[1::2], strict=True):
        assert alone["ratio"] == 1.0 and alone["steps"] >= 1 and spread["steps"] >= 1
        assert spread["ratio"] == pytest.approx(
            spread["tokens_per_s"] / alone["tokens_per_s"], abs=1e-3
        )
    with pytest.raises(PrimechatError, match="2 ranks did not train"):
        ranks.run_job(PretrainConfig(runtime=RuntimeConfig(device="mps", dtype="float32")), 2)


@pytest.mark.slow
def test_a_job_that_takes_too_long_leaves_no_rank_behind() -> None:
    runtime = RuntimeConfig(device="cpu", dtype="float32", threads=1, micro_batch_rows=2)
    config = PretrainConfig(
        tag=f"late-{os.getpid()}", model=TINY, batch_tokens=128, runtime=runtime
    )
    with pytest.raises(PrimechatError, match="2 ranks did not do 1000000 steps in 15 s"):
        ranks.run_job(config, 2, steps=1_000_000, limit_s=15)
    left = subprocess.run(
        ["pgrep", "-f", config.tag], capture_output=True, text=True
    ).stdout.split()
    assert left == [], "they would hold the GPUs"
