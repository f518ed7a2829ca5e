"""The optimizer, the loop and several ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_gpt import SHAPE, make_batches, make_model

from primechat.config import OptimConfig, RuntimeConfig
from primechat.config.recipes import make_recipe
from primechat.errors import ConfigError, PrimechatError
from primechat.events import StepEvent
from primechat.model.gpt import GPT
from primechat.train import autotune
from primechat.train.autotune import Candidate, decide_compile, list_devices, tune_runtime
from primechat.train.loop import fit, lr_ratio, muon_momentum
from primechat.train.optim import Adam, AdamRule, Muon, Optimizer, orthogonalize
from primechat.train.parallel import Ranks, is_echo


def train(steps: int, micro: int, optim: OptimConfig | None = None) -> tuple[GPT, list[StepEvent]]:
    model, events = make_model(), []
    optimizer = Optimizer(model, optim or OptimConfig(), 32)
    fit(
        optimizer,
        make_batches(),
        lambda x, y: model.loss(x, y, "sum"),
        steps=steps,
        micro_batch_rows=micro,
        on_step=events.append,
    )
    return model, events


@torch.no_grad()
def assert_same_move(got: torch.Tensor, want: torch.Tensor, start: torch.Tensor) -> None:
    """Two trainings went the same way, but for rounding, which Adam enlarges at gradients near zero."""
    assert float((got - want).norm()) < 5e-3 * float((want - start).norm())


def test_fit_learns() -> None:
    _, events = train(40, 4)
    assert events[0].loss_nats == pytest.approx(np.log(70), rel=0.2)
    assert events[-1].loss_nats < 0.4
    assert [e.step for e in events] == list(range(1, 41))
    assert all(e.grad_norm > 0 and e.update_norm > 0 for e in events[:-1])
    assert events[-1].lr_ratio == pytest.approx(0.05)


def test_micro_batches() -> None:
    """The size of a micro-batch does not change what is learned, though rows have different numbers of
    targets.
    """
    (one, a), (two, b) = train(3, 4), train(3, 1)
    fresh = dict(make_model().named_parameters())
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert_same_move(q, p, fresh[name])
    assert [e.loss_nats for e in a] == pytest.approx([e.loss_nats for e in b], rel=1e-5)


def test_weights_all_move() -> None:
    model, fresh = train(5, 4)[0], make_model()
    for (name, p), q in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert not torch.equal(p, q), name


def test_grad_clip() -> None:
    """Clipping caps what the matrices and embeddings see, not what is reported."""
    _, free = train(2, 4)
    _, cut = train(2, 4, OptimConfig(grad_clip=1e-3))
    assert cut[0].grad_norm == pytest.approx(free[0].grad_norm) and free[0].grad_norm > 1e-3


def test_schedule() -> None:
    config = OptimConfig(warmup_ratio=0.2, warmdown_ratio=0.5, final_lr_ratio=0.1)
    ratios = [lr_ratio(s, 100, config) for s in range(100)]
    assert ratios[0] == pytest.approx(1 / 21) and ratios[20:51] == [1.0] * 31
    assert all(a > b for a, b in zip(ratios[50:], ratios[51:], strict=False))
    assert ratios[99] == pytest.approx(0.1 + 0.9 * 0.02)
    assert muon_momentum(0, 4000, OptimConfig()) == 0.85
    assert muon_momentum(300, 4000, OptimConfig()) == pytest.approx(0.95)
    assert muon_momentum(10, 40, OptimConfig()) == pytest.approx(0.95)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 64, 16), (2, 16, 64), (1, 4, 12)])
def test_orthogonalize(shape: tuple[int, int, int]) -> None:
    """Singular vectors stay, singular values come near 1: against the SVD in float64."""
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(stack.double(), full_matrices=False)
    polar = orthogonalize(stack).double()
    values = torch.linalg.svdvals(polar)
    assert 0.8 < values.min() and values.max() < 1.2
    assert (
        u.mT @ polar @ v.mT - torch.diag_embed(torch.diagonal(u.mT @ polar @ v.mT, dim1=1, dim2=2))
    ).abs().max() < 1e-3


@pytest.mark.parametrize("shape", [(2, 12), (4, 32), (64, 64)])
def test_orthogonalize_in_bfloat16(shape: tuple[int, int]) -> None:
    """Rounding must not carry a value beyond 1, from where undamped steps run off to 1e11."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(500, *size, generator=generator)  # noqa: E731
    for noise in (0.0, 0.1, 1.0):  # from one large singular value to many like it
        stack = draw(shape[0], 1) @ draw(1, shape[1]) + noise * draw(*shape)
        assert torch.linalg.matrix_norm(orthogonalize(stack.bfloat16()).float(), ord=2).max() < 1.25


def test_muon_stacks() -> None:
    """A stack of equal shapes moves as each matrix would alone."""
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(8, 16, generator=generator) for _ in range(3)]
    together = [torch.nn.Parameter(torch.zeros(8, 16)) for _ in grads]
    apart = [torch.nn.Parameter(torch.zeros(8, 16)) for _ in grads]
    rules = [Muon(together, half=False)] + [Muon([p], half=False) for p in apart]
    for _ in range(3):
        for p, q, g in zip(together, apart, grads, strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        with torch.no_grad():
            for rule in rules:
                rule.step(0.1, 0.9, 0.01)
    for p, q in zip(together, apart, strict=True):
        assert torch.allclose(p, q, atol=1e-6) and p.abs().max() > 0.01


def test_bad_loss() -> None:
    optimizer = Optimizer(make_model(), OptimConfig(), 32)
    bad = torch.zeros((), requires_grad=True)
    with pytest.raises(PrimechatError, match="The loss of step 0 is nan"):
        fit(optimizer, make_batches(), lambda x, y: bad * float("nan"), steps=2)


def test_stop_saves() -> None:
    """A stop ends the run after the present step: saved as the last, not validated."""
    model, stop, calls = make_model(), threading.Event(), []
    step = fit(
        Optimizer(model, OptimConfig(), 32),
        make_batches(),
        lambda x, y: model.loss(x, y, "sum"),
        steps=30,
        stop=stop,
        on_step=lambda e: stop.set() if e.step == 3 else None,
        on_eval=lambda n, last: calls.append(("eval", n, last)),
        on_save=lambda n, last: calls.append(("save", n, last)),
    )
    assert step == 3
    assert calls[:2] == [("eval", 0, False), ("save", 0, False)]
    assert calls[-1] == ("save", 3, True) and ("eval", 3, False) not in calls


def test_state_goes_on() -> None:
    """An optimizer restored from its state makes the same next steps, bit for bit."""
    unbroken, _ = train(8, 4)
    model, half = make_model(), OptimConfig()
    first = Optimizer(model, half, 32)
    fit(
        first,
        make_batches(),
        lambda x, y: model.loss(x, y, "sum"),
        steps=8,
        stop=stop_after(5),
        on_step=stopper(5),
    )
    other = GPT(SHAPE)
    other.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    second = Optimizer(other, half, 32)
    second.load_state_dict(first.state_dict())
    fit(second, make_batches(start=5), lambda x, y: other.loss(x, y, "sum"), steps=8, start_step=5)
    for p, q in zip(unbroken.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


_stops: dict[int, threading.Event] = {}


def stop_after(step: int) -> threading.Event:
    _stops[step] = threading.Event()
    return _stops[step]


def stopper(step: int):  # noqa: ANN201
    return lambda e: _stops[step].set() if e.step == step else None


def test_tune_freezes() -> None:
    model = make_model()
    ids, targets = make_batches()[0]
    tuning = tune_runtime(
        model,
        lambda: Optimizer(model, OptimConfig(), 32),
        ids,
        targets,
        RuntimeConfig(device="cpu"),
        Ranks(),
        seconds=5,
    )
    runtime = tuning.runtime
    assert (
        runtime.device == "cpu"
        and runtime.dtype in ("float32", "bfloat16")
        and runtime.compile == "off"
    )
    assert runtime.threads >= 1 and runtime.micro_batch_rows in (1, 2, 4) and tuning.step_s > 0
    kept = RuntimeConfig(
        device="cpu", dtype="bfloat16", threads=1, micro_batch_rows=2, compile="off"
    )
    tuning = tune_runtime(
        model, lambda: Optimizer(model, OptimConfig(), 32), ids, targets, kept, Ranks()
    )
    assert tuning.runtime == kept and any(
        "Chosen: cpu, bfloat16, 1 thread" in note for note in tuning.notes
    )


def test_micro_batch_larger_than_a_step() -> None:
    """As where many GPUs have few rows each: a step, and what compiling brings, are judged by these."""
    model = make_model()
    ids, targets = make_batches()[0]
    spent = {"eager": 0.02, "compiled": 0.01}

    def make(_: Any, runtime: RuntimeConfig) -> Any:
        def loss(x: torch.Tensor, y: torch.Tensor) -> Any:
            time.sleep(spent["compiled" if runtime.compile == "on" else "eager"])
            return sum(p.sum() for p in model.parameters() if p.requires_grad) * 0.0

        return loss

    class Slow:
        def step(self, ratio: float, momentum: float, decay_ratio: float = 1.0) -> None:
            time.sleep(0.05)

    many = RuntimeConfig(
        device="cpu", dtype="float32", threads=1, micro_batch_rows=256, compile="on"
    )
    tuning = tune_runtime(model, Slow, ids, targets, many, Ranks(), make=make)  # type: ignore[arg-type]
    assert 0.05 < tuning.step_s < 1 and 0.5 < tuning.learned["gain_float32"] < 8


def test_compile_choice() -> None:
    known = {"compile_s": 40.0, "gain_float32": 1.5, "gain_bfloat16": 2.0}
    best = Candidate(device="cpu", dtype="float32", threads=1, rows=4, tokens_per_s=1.0)
    assert (
        decide_compile("on", best, 1.0, 1, 0, known)[0]
        and not decide_compile("off", best, 1.0, 9e9, 0, known)[0]
    )
    if decide_compile("auto", best, 1.0, 0, 10**6, known)[0]:  # where there is a C++ compiler
        assert not decide_compile("auto", best, 1.0, 119, 0, known)[0]
        assert decide_compile("auto", best, 1.0, 121, 0, known)[0]
        assert decide_compile("auto", best, 1.0, 0, 121, known)[0]
    assert not decide_compile("auto", replace(best, device="mps"), 1.0, 9e9, 0, known)[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_missing_device() -> None:
    with pytest.raises(ConfigError, match="runtime.device='cuda' is not on this machine"):
        list_devices("cuda")


def run_ranks(
    folder: Path, world: int, end: int, half: bool = False, start: str = "", recipe: str = ""
) -> list[dict[str, Any]]:
    """Train on `world` gloo ranks; return what each of them wrote."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(__file__).parents[1] / "support" / "rank_main.py"
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    words = [str(folder), str(end), "half" if half else "float", start, recipe]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), *words],
            env={
                **os.environ,
                **place,
                "RANK": str(r),
                "LOCAL_RANK": str(r),
                "PYTHONPATH": os.pathsep.join([str(script.parent), str(script.parents[2])]),
            },
        )
        for r in range(world)
    ]
    assert [p.wait(timeout=240) for p in ranks] == [0] * world
    return [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in range(world)]


@pytest.fixture(scope="module")
def alone() -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights and losses of one process after 50 steps of the same rows."""
    model, events = train(50, 1)
    return model.state_dict(), [event.loss_nats for event in events]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_learn_as_one(
    tmp_path: Path, world: int, alone: tuple[dict[str, torch.Tensor], list[float]]
) -> None:
    """Processes over gloo learn what one learns, and agree to the bit."""
    weights, losses = alone
    ranks, fresh = run_ranks(tmp_path, world, 50), make_model().state_dict()
    assert losses[-1] < 0.8 * losses[0]
    np.testing.assert_allclose(ranks[0]["losses"], losses, rtol=0, atol=1e-5)
    for name, p in weights.items():
        assert all(torch.equal(rank["model"][name], ranks[0]["model"][name]) for rank in ranks), (
            name
        )
        assert_same_move(ranks[0]["model"][name], p, fresh[name])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["october2025", "nanochat2026"])
def test_ranks_follow_a_recipe(tmp_path: Path, recipe: str) -> None:
    """Each kind's own rate, betas and decay, and clipping, on shares of the rows as on all of them."""
    model, losses = make_model(), []
    fit(
        Optimizer(model, make_recipe(recipe).optim, 32),
        make_batches(),
        lambda x, y: model.loss(x, y, "sum"),
        steps=50,
        micro_batch_rows=1,
        stop=stop_after(6),
        on_step=lambda e: (losses.append(e.loss_nats), stopper(6)(e)),
    )
    ranks, fresh = run_ranks(tmp_path, 2, 6, recipe=recipe), make_model().state_dict()
    np.testing.assert_allclose(ranks[0]["losses"], losses, rtol=0, atol=1e-4)
    for name, p in model.state_dict().items():
        assert torch.equal(ranks[0]["model"][name], ranks[1]["model"][name]), name
        assert_same_move(ranks[0]["model"][name], p, fresh[name])


@pytest.mark.slow
def test_state_fits_any_ranks(
    tmp_path: Path, alone: tuple[dict[str, torch.Tensor], list[float]]
) -> None:
    """Two ranks save, three with uneven shares of the rows go on, then one."""
    place = ""
    for world, first, end in ((2, 0, 20), (3, 20, 35), (1, 35, 50)):
        ranks = run_ranks(tmp_path, world, end, start=place)
        np.testing.assert_allclose(ranks[0]["losses"], alone[1][first:end], rtol=0, atol=1e-5)
        place = str(tmp_path / f"to{end}.pt")
        (tmp_path / "rank0.pt").rename(place)


def test_echoes_of_another_rank() -> None:
    assert is_echo(
        RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1")
    )
    assert not is_echo(RuntimeError("expected a tensor")) and not is_echo(
        ValueError("closed by peer")
    )


@pytest.mark.parametrize("half", [True, False])
def test_search_is_short(monkeypatch: pytest.MonkeyPatch, half: bool) -> None:
    """Where threads wait for each other, several are not tried, nor bfloat16 where it has no units; a short
    run is measured for a short time.
    """
    said: list[tuple[str, float]] = []
    monkeypatch.setattr(autotune, "threads_pay", lambda threads: False)
    monkeypatch.setattr(autotune, "half_pays", lambda: half)
    monkeypatch.setattr(autotune, "count_cores", lambda: 4)
    model = make_model()
    ids, targets = make_batches()[0]
    tuning = tune_runtime(
        model,
        lambda: Optimizer(model, OptimConfig(), 32),
        ids,
        targets,
        RuntimeConfig(device="cpu"),
        Ranks(),
        seconds=30,
        on_phase=lambda name, seconds: said.append((name, seconds)),
    )
    assert tuning.runtime.threads == 1 and any(
        "4 threads were not tried" in note for note in tuning.notes
    )
    tried = {note.split(",")[0] for note in tuning.notes if note.endswith("tokens/s")}
    assert tried == ({"cpu float32", "cpu bfloat16"} if half else {"cpu float32"})
    assert any("bfloat16 was not tried" in note for note in tuning.notes) != half
    assert said == [(autotune.MEASURING, 3.0)]


def test_units_are_found_out() -> None:
    """The two short measurements before the search leave the threads as the search expects them."""
    assert isinstance(autotune.half_pays(), bool) and isinstance(autotune.threads_pay(2), bool)


def test_optimizer_loads_no_compiler() -> None:
    """torch's compiler takes seconds to load; a run that compiles nothing must not wait for it."""
    code = (
        "import sys, torch; from torch import nn; from primechat.config import OptimConfig\n"
        "from primechat.train.optim import Optimizer\n"
        "model = nn.Sequential(); model.lm_head = nn.Linear(2, 2, bias=False)\n"
        "optimizer = Optimizer(model, OptimConfig(), 2)\n"
        "model(torch.ones(1, 2)).sum().backward(); optimizer.step(1.0, 0.9)\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n", done.stderr


def test_adam_is_that_of_torch() -> None:
    """The fused function and torch.optim.AdamW move a table alike, to the bit."""
    draw = torch.Generator().manual_seed(0)
    table = torch.randn(7, 3, generator=draw)
    mine, theirs = torch.nn.Parameter(table.clone()), torch.nn.Parameter(table.clone())
    ours = Adam([([mine], AdamRule(lr=0.1))])
    other = torch.optim.AdamW(
        [theirs], lr=0.1, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True
    )
    for ratio in (1.0, 0.7, 0.1):
        mine.grad = torch.randn(7, 3, generator=draw)
        theirs.grad = mine.grad.clone()
        other.param_groups[0]["lr"] = 0.1 * ratio
        with torch.no_grad():
            ours.step(ratio)()
        other.step()
    assert torch.equal(mine, theirs)
    kept = Adam([([mine], AdamRule(lr=0.1))])
    kept.load_state_dict(other.state_dict())  # as runs of before saved it
    assert torch.equal(
        kept.state_dict()["state"][0]["exp_avg_sq"], ours.state_dict()["state"][0]["exp_avg_sq"]
    )
