"""Training on random tokens: the steps of a run without its text, to measure how fast a machine trains.

`primechat bench` uses it in this process, a preflight on every rank of a machine.
"""

from __future__ import annotations

import itertools
import threading
import time

import torch
from torch import Tensor

from primechat.config import GPTConfig, RuntimeConfig
from primechat.events import StepEvent
from primechat.train.loop import SumLoss, fit
from primechat.train.optim import Optimizer


def draw_batch(
    shape: GPTConfig, rows: int, *, seed: int = 0, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return ids and targets of random tokens, both (rows, T) int64 on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (rows, shape.sequence_len + 1)
    text = torch.randint(shape.vocab_size, size, generator=generator, device=device)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def rehearse_steps(
    optimizer: Optimizer,
    batch: tuple[Tensor, Tensor],
    loss: SumLoss,
    runtime: RuntimeConfig,
    *,
    device: str | torch.device,
    steps: int,
    seconds: float = float("inf"),
    least_steps: int = 0,
) -> list[float]:
    """Train on one batch again and again; return each step's speed over all ranks, in tokens per second.

    Args:
        optimizer: of the model that `loss` computes with.
        batch: ids and targets of a step of this rank.
        loss: the summed loss of a micro-batch.
        runtime: only its `micro_batch_rows` are used.
        device: of the model.
        steps: most steps to take.
        seconds: no step begins after this time, once `least_steps` are done.
        least_steps: steps to take even if the time is over.
    """
    speeds: list[float] = []
    stop, t_start = threading.Event(), time.perf_counter()

    def note_speed(event: StepEvent) -> None:
        speeds.append(event.tokens_per_s)
        if len(speeds) >= least_steps and time.perf_counter() - t_start > seconds:
            stop.set()

    fit(
        optimizer,
        itertools.repeat(batch),
        loss,
        steps=steps,
        device=device,
        micro_batch_rows=runtime.micro_batch_rows,
        on_step=note_speed,
        stop=stop,
    )
    return speeds
