"""What a run needs: figures of runs that are known, counts of models that are built, memory as measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from primechat.cli.main import main
from primechat.cloud.forecast import SmallRun, forecast_bpb
from primechat.cloud.plan import (
    choose_rows,
    count_flops,
    count_shards,
    describe_plan,
    estimate_disk,
    estimate_memory,
    find_machine,
    full_config,
    make_plan,
)
from primechat.config import GPTConfig, PretrainConfig, RuntimeConfig, encode_config
from primechat.config.model import count_parts
from primechat.errors import ConfigError
from primechat.events import Event, StepEvent
from primechat.labkit.instruments import budget, forecasts
from primechat.model.gpt import GPT


def test_known_runs() -> None:
    d20 = make_plan(full_config(20), find_machine("8xH200"))
    assert sum(d20.params.values()) == 560_988_160 and d20.flops_per_token == 3_491_758_080
    assert (d20.steps, d20.tokens) == (21_400, 11_219_763_200)
    assert d20.total_flops == pytest.approx(3.918e19, rel=1e-3)
    assert d20.train_s / 3600 == pytest.approx(2.96, abs=0.01) and d20.dollars == pytest.approx(
        85, abs=0.5
    )
    assert (d20.micro_batch_rows, d20.accumulate, d20.shards) == (32, 1, 216) and d20.fits
    d32 = make_plan(full_config(32), find_machine("8xH200"))
    assert sum(d32.params.values()) == 1_879_048_192 and d32.tokens == pytest.approx(
        37.6e9, rel=1e-3
    )
    assert d32.total_flops == pytest.approx(4.54e20, rel=1e-3) and d32.shards == 722
    assert d32.train_s / 3600 == pytest.approx(34, abs=0.5) and d32.dollars == pytest.approx(
        980, abs=10
    )
    assert d32.disk["shards of text"] == pytest.approx(72e9, rel=0.01) and not d32.fits


def test_eviction_fits_the_pod() -> None:
    small = make_plan(replace(full_config(32), keep_shards=24), find_machine("8xH200"))
    assert small.fits and small.disk["shards of text"] == 25e8
    assert "DOES NOT FIT on a disk of 80 GB; --run.keep_shards" in "\n".join(
        describe_plan(make_plan(full_config(32), find_machine("8xH200")))
    )
    evaluation = replace(full_config(20).eval, snapshot_budget_mb=3000)
    assert estimate_disk(replace(full_config(20), eval=evaluation))["snapshots"] == 3e9


SHAPES = [
    *(GPTConfig.classic(depth, vocab_size=512, sequence_len=64) for depth in (1, 2, 3, 7, 20)),
    *(
        GPTConfig.modern(depth, vocab_size=777, sequence_len=64, head_dim=64)
        for depth in (1, 2, 5, 12)
    ),
    replace(GPTConfig.modern(4, vocab_size=300, sequence_len=64, head_dim=64), n_kv_head=2),
    replace(
        GPTConfig.modern(4, vocab_size=300, sequence_len=64, head_dim=64),
        smear=False,
        backout=False,
    ),
    replace(GPTConfig.classic(4, vocab_size=300, sequence_len=64), value_embeddings=True),
]


@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
def test_counts_are_the_built_models(shape: GPTConfig) -> None:
    with torch.device("meta"):
        model = GPT(shape)
    kinds = {
        "token embedding": "transformer.wte",
        "value embeddings": "value_embeds",
        "output head": "lm_head",
        "attention": ".attn.",
        "mlp": ".mlp.",
    }
    built = dict.fromkeys([*kinds, "scalars and gates"], 0)
    for name, p in model.named_parameters():
        built[
            next((kind for kind, part in kinds.items() if part in name), "scalars and gates")
        ] += p.numel()
    assert count_parts(shape) == built
    assert shape.n_params == sum(built.values())


def test_windows_cost_less() -> None:
    long = GPTConfig.modern(12)
    assert count_flops(long) < count_flops(replace(long, window_pattern=""))
    # every look at 2,048 tokens, of 12 layers nine at a quarter
    assert count_flops(replace(long, window_pattern="")) - count_flops(long) == 12 * 768 * 9 * (
        2048 - 512
    )


def test_rows_and_memory() -> None:
    d32, pod = full_config(32), find_machine("8xH100")
    rows = choose_rows(d32, pod)
    assert 0 < rows < 32
    need, more = (sum(estimate_memory(d32, n, n_gpus=8).values()) for n in (rows, 2 * rows))
    assert need <= 0.92 * 80e9 < more
    saving = replace(d32, runtime=RuntimeConfig(checkpoint_blocks=True))
    assert choose_rows(saving, pod) == 32
    assert choose_rows(full_config(20), replace(pod, memory_bytes=6e9)) == 0
    lines = describe_plan(make_plan(full_config(20), replace(pod, memory_bytes=6e9)))
    assert "DOES NOT FIT, not even one row" in "\n".join(lines)


MEASURED = [  # shape, rows of a step, of a micro-batch, dtype
    (GPTConfig.classic(6, vocab_size=16_384, sequence_len=256), 4, 4, "float32"),
    (GPTConfig.modern(6, vocab_size=8192, sequence_len=512, head_dim=64), 4, 2, "float32"),
    (GPTConfig.modern(4, vocab_size=4096, sequence_len=256, head_dim=64), 8, 8, "bfloat16"),
]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("shape", "rows", "micro", "dtype"), MEASURED, ids=["classic", "modern", "half"]
)
def test_memory(shape: GPTConfig, rows: int, micro: int, dtype: str) -> None:
    def build(model: GPTConfig, rows: int, micro: int) -> PretrainConfig:
        runtime = RuntimeConfig(device="cpu", dtype=dtype, micro_batch_rows=micro)
        return PretrainConfig(model=model, batch_tokens=rows * model.sequence_len, runtime=runtime)

    config = build(shape, rows, micro)
    tiny = build(GPTConfig.modern(1, vocab_size=300, sequence_len=32, head_dim=64), 2, 1)
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).parents[1] / "support" / "peak_main.py"),
            *(json.dumps(encode_config(c)) for c in (config, tiny)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        # Each tensor of its own, so that no gaps between them are measured; and nothing of what oneDNN keeps
        # of each shape, on processors with units for bfloat16 another 45 MB.
        env={
            **os.environ,
            "MALLOC_MMAP_THRESHOLD_": "1000000",
            "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1",
        },
    )
    assert done.returncode == 0, done.stderr
    predicted = sum(estimate_memory(config, micro, device="cpu", dtype=dtype).values())
    assert predicted == pytest.approx(float(done.stdout), rel=0.15)


def test_here_and_wrong_names(base_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="run `primechat bench train` once"):
        find_machine("here", base_dir)
    base_dir.mkdir()
    (base_dir / "bench.json").write_text('{"flops_per_s": 4e11, "memory_bytes": 16e9}')
    here = find_machine("here", base_dir)
    plan = make_plan(PretrainConfig(seconds=100), here)
    assert plan.train_s == pytest.approx(100, rel=0.05) and plan.dollars == 0 and plan.shards == 0
    for name in ("0xH100", "8xB200", "x", "H100x8"):
        with pytest.raises(ConfigError, match="try 8xH200"):
            find_machine(name)
    with pytest.raises(ConfigError, match="needs at least 8; try 16384"):
        make_plan(replace(full_config(20), batch_tokens=2048), find_machine("8xH200"))
    assert main(["plan", "--depth", "32", "--mfu", "0.5", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 71_680 and found["machine"]["mfu"] == 0.5
    assert main(["plan", "--depth", "20", "--dollars_per_hour", "10"]) == 0
    assert "$30 at $10.00 an hour" in capsys.readouterr().out
    assert main(["plan", "--depth", "x"]) == 2 and "try 20" in capsys.readouterr().err


def test_shards_follow_the_text() -> None:
    assert full_config(20).n_shards == count_shards(full_config(20)) == 216
    assert full_config(64).n_shards == 1822 < count_shards(full_config(64))


def test_recipes_cost_what_they_cost() -> None:
    """The d20 of October as it was measured; that of 2026 by its own count of parameters, batch and text."""
    pod = find_machine("8xH200")
    old, new = (make_plan(full_config(20, name), pod) for name in ("october2025", "nanochat2026"))
    assert (old.steps, old.tokens, old.shards) == (21_400, 11_219_763_200, 216)
    assert (round(old.train_s / 3600, 2), round(old.dollars)) == (2.96, 85)
    assert (new.steps, new.tokens) == (5_460, 5_725_224_960)
    assert (round(new.train_s / 3600, 1), round(new.dollars)) == (1.4, 39)
    assert new.fits and new.config.n_shards == new.shards == 170, "a third of the text is cut off"
    said = "\n".join(describe_plan(new))
    assert "recipe nanochat2026" in said
    assert "12.0 for each of the 477,103,280 parameters of the blocks and the head" in said
    said = "\n".join(describe_plan(old))
    assert "recipe october2025" in said and "20.0 for each of the 560,988,160 parameters" in said
    assert "recipe" not in "\n".join(describe_plan(make_plan(replace(old.config, seed=1), pod)))


SIZES, LENGTHS = (400_000, 1_200_000, 2_900_000), (500_000, 1_000_000, 2_000_000)


def make_runs(floor: float, noise: np.ndarray) -> list[SmallRun]:
    """Runs on a known curve, with their luck."""
    shapes = [(n, d) for n in SIZES for d in LENGTHS]
    return [
        SmallRun(n_layer=1, n_params=n, tokens=d, bpb=reach(floor, n, d) * luck)
        for (n, d), luck in zip(shapes, noise, strict=False)
    ]


def reach(floor: float, n_params: int, tokens: int) -> float:
    return float(floor + 0.35 * (n_params / 1e6) ** -0.3 + 0.35 * (tokens / 1e6) ** -0.35)


@pytest.mark.parametrize("floor", [0.3, 0.7])
def test_forecast(floor: float) -> None:
    """Nine of ten intervals hold the outcome, the middle is not biased, farther is less certain."""
    target, hits, gaps = (5_200_000, 8_000_000), 0, []
    for seed in range(200):
        noise = 1 + 0.005 * np.random.default_rng(seed).standard_normal(10)
        came = reach(floor, *target) * float(noise[9])
        (told,) = forecast_bpb(make_runs(floor, noise), [target])
        hits += told.low <= came <= told.high
        gaps.append(told.bpb - came)
        assert told.low < told.bpb < told.high < min(run.bpb for run in make_runs(floor, noise))
    assert 0.88 <= hits / 200 <= 0.98 and abs(np.mean(gaps)) < 0.012
    near, far = forecast_bpb(make_runs(floor, noise), [(3_000_000, 2_500_000), target])
    assert near.high - near.low < far.high - far.low


def test_forecast_refuses() -> None:
    runs = make_runs(0.5, np.ones(9))
    target = (5_200_000, 8_000_000)
    rising = [replace(run, bpb=1 + run.n_params / 1e6 + run.tokens / 1e6) for run in runs]
    for bad, goal, words in (
        (runs[:4], target, "too few"),
        (runs, (5_200_000, 10**9), "more than 30 times"),
        ([replace(run, bpb=float("nan")) for run in runs], target, "no positive numbers"),
        (rising, target, "does not fall"),
        ([replace(run, n_params=400_000) for run in runs], target, "nearly equal sizes"),
        ([replace(run, tokens=400_000) for run in runs], target, "nearly equal numbers of tokens"),
    ):
        with pytest.raises(ConfigError, match=words):
            forecast_bpb(bad, [goal])


def test_recorded_runs() -> None:
    """The runs that ship tell their origin, and the table says of each outcome whether the forecast held."""
    series, how = forecasts.read_record()
    assert set(how) == {"date", "machine", "command"} and len(series.runs) >= 5
    assert "shipped/base" in dict(series.held_out)
    for run in series.runs:
        shape = GPTConfig.modern(run.n_layer, vocab_size=2048, sequence_len=256, head_dim=64)
        assert run.n_params == shape.n_params
    rows, picture, said = forecasts.show_record()
    assert said.startswith(f"Recorded on {how['date']}") and hasattr(picture, "savefig")
    told = forecast_bpb(series.runs, [(run.n_params, run.tokens) for _, run in series.held_out])
    for row, (_, run), one in zip(rows, series.held_out, told, strict=True):
        assert (row["so the forecast"] == "held") is (one.low <= run.bpb <= one.high)
    run = series.held_out[0][1]
    wrong = forecasts.judge_forecast("it", replace(run, bpb=told[0].high + 0.25), told[0])
    assert wrong["so the forecast"] == "missed, by 0.250"


def test_small_runs(base_dir: Path) -> None:
    """Small runs and the one held out, stopped and gone on with; a picture of both."""
    config = forecasts.SmallRunsConfig(
        depths="2, 1", tokens="20000,10000", held_out=3, eval_tokens=512
    )
    plans = config.plan_runs()
    assert [(plan.model.n_layer, plan.steps) for plan in plans] == [
        (1, 5),
        (1, 10),
        (2, 5),
        (2, 10),
        (3, 10),
    ]
    stop = threading.Event()

    def hear(event: Event) -> None:
        if isinstance(event, StepEvent) and event.step == 3:
            stop.set()

    first = forecasts.train_small(config, on_event=hear, stop=stop)
    assert first.stopped and not first.runs
    assert "let the series end" in forecasts.show_forecast(first)[0]
    assert "press Start" in forecasts.show_forecast(None)[0]
    whole = forecasts.train_small(replace(config, resume=True))
    assert (
        not whole.stopped and len(whole.runs) == 4 and whole.held_out[0][0] == "3 blocks, held out"
    )
    assert whole.held_out[0][1].tokens == 10 * 2048
    with pytest.raises(ConfigError, match="depths='x' must be whole numbers"):
        forecasts.SmallRunsConfig(depths="1, x")


def test_lab_04_prices_no_run_that_does_not_fit() -> None:
    """A d40 on a 4090 was priced all the same; now the page says what is missing and what would do."""
    figures, said, *_ = budget.describe_run(40, "4090", 20, True)
    assert figures["cost"] == figures["time"] == "does not fit"
    assert said.startswith("It does not fit") and "4090" in said
    plan = make_plan(full_config(40), find_machine("4090"))
    assert f"{sum(plan.memory.values()) / 1e9:,.0f} GB of each GPU" in said
    depth = int(said.partition("a depth of ")[2].partition(" ")[0])
    fits = [
        make_plan(full_config(n), find_machine("4090")).micro_batch_rows > 0 for n in range(1, 41)
    ]
    assert fits[depth - 1] and not any(fits[depth:]), "the largest that fits"
    assert "H100" in said
    figures, said, *_ = budget.describe_run(20, "8xH200", 20, True)
    assert figures["cost"].startswith("$") and said.startswith("It fits")
    *_, said, _ = budget.describe_run(32, "8xH200", 20, False)
    assert "GB of disk" in said and "shards" in said
    rows = {row["machine"]: row for row in budget.compare_machines(40)}
    alone = find_machine("4090").name
    assert rows[alone]["time"] == "does not fit" and rows[alone]["dollars"] == ""
