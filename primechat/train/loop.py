"""The training loop that every stage uses.

`fit` is the loop and `train_step` one step of it: read a batch, accumulate the gradients over micro-batches,
step the optimizer at the learning rate that `read_schedule` gives. Evaluation, sampling and saving are
callbacks, so this module depends on neither files nor sampling.
Reference: warm-up, constant, warm-down (Hägele et al. 2024), as in nanochat.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from primechat.config import OptimConfig
from primechat.errors import PrimechatError
from primechat.events import StepEvent
from primechat.train.optim import Optimizer
from primechat.train.parallel import SpreadLoss, any_rank, sum_numbers

Batch = tuple[Tensor, Tensor]  # ids, targets (R, T)
SumLoss = Callable[[Tensor, Tensor], Tensor]  # ids, targets (b, T) -> summed nats


def ignore(*_: object) -> None:
    """Do nothing, in place of a callback that was left out."""


def fit(
    optimizer: Optimizer,
    batches: Iterable[Batch],
    loss: SumLoss,
    *,
    steps: int,
    start_step: int = 0,
    micro_batch_rows: int = 8,
    device: torch.device | str = "cpu",
    elapsed_s: float = 0.0,
    count_steps: Callable[[int, float], int] | None = None,
    on_step: Callable[[StepEvent], None] = ignore,
    on_eval: Callable[[int, bool], None] = ignore,
    on_save: Callable[[int, bool], None] = ignore,
    stop: threading.Event | None = None,
) -> int:
    """Train until `steps` or until stopped, and return the steps done, `start_step` included.

    Args:
        optimizer: moves the parameters; its config holds the schedule.
        batches: endless; this rank's rows of one step after the other, ids and targets (R, T) int64.
        loss: summed nats of a micro-batch; with several ranks a `SpreadLoss`, which adds up their gradients.
        steps: optimizer steps of the whole run; the schedule spans them.
        start_step: steps done before, by the run that this one resumes.
        micro_batch_rows: rows of one forward and backward pass.
        device: where the loss is computed.
        elapsed_s: training time of the steps done before.
        count_steps: called after each step with the steps done and the training time, returns a new `steps`.
        on_step: called after each step.
        on_eval: called with the steps done and whether they are the last, at first and after each step.
        on_save: called after `on_eval` with the steps done and whether the run ends here.
        stop: when set, the run ends after the current step, saved but not evaluated.

    Raises:
        PrimechatError: the loss is not finite.
    """
    place, stop = torch.device(device), stop or threading.Event()
    step, source = start_step, iter(batches)

    # A new run is evaluated and saved before its first step.
    if step == 0:
        on_eval(0, False)
        on_save(0, False)

    while step < steps:
        done = train_step(optimizer, source, loss, step, steps, micro_batch_rows, place, elapsed_s)
        step, elapsed_s = done.step, done.elapsed_s
        steps = count_steps(step, elapsed_s) if count_steps else steps
        on_step(replace(done, steps=steps))

        # All ranks stop together if any of them was told to.
        stopped = any_rank(stop.is_set(), place) and step < steps
        if not stopped:
            on_eval(step, step == steps)
        on_save(step, stopped or step == steps)
        if stopped:
            break
    return step


def train_step(
    optimizer: Optimizer,
    source: Iterator[Batch],
    loss: SumLoss,
    step: int,
    steps: int,
    micro_batch_rows: int,
    device: torch.device,
    elapsed_s: float,
) -> StepEvent:
    """Train on the next batch and return what happened; `step` and `elapsed_s` count the steps before it.

    Raises:
        PrimechatError: the loss is not finite.
    """
    # Read a batch: the rows of this rank.
    t_start = time.perf_counter()
    ids, targets = next(source)

    # Forward and backward. A loss that is not finite must not reach the weights.
    loss_nats, tokens = accumulate_gradients(loss, ids, targets, micro_batch_rows, device)
    if not math.isfinite(loss_nats):
        raise PrimechatError(
            f"The loss of step {step} is {loss_nats}, it must be a number; lower the learning rates "
            "and resume from the last checkpoint."
        )

    # Move the weights by the rates of this step, and drop the gradients.
    ratio, momentum, decay = read_schedule(step, steps, optimizer.config)
    grad_norm, update_norm = optimizer.step(ratio, momentum, decay)

    spent_s = time.perf_counter() - t_start
    return StepEvent(
        step=step + 1,
        steps=steps,
        loss_nats=loss_nats,
        lr_ratio=ratio,
        grad_norm=grad_norm,
        update_norm=update_norm,
        tokens=tokens,
        tokens_per_s=tokens / spent_s,
        elapsed_s=elapsed_s + spent_s,
    )


def accumulate_gradients(
    loss: SumLoss, ids: Tensor, targets: Tensor, micro_batch_rows: int, device: torch.device
) -> tuple[float, int]:
    """Add up the gradients of the mean loss over a batch, one micro-batch at a time.

    Args:
        loss: summed nats of a micro-batch (b, T).
        ids: this rank's rows of the batch, (R, T) int64.
        targets: the next token of each of `ids`, (R, T) int64; -1 is ignored.
        micro_batch_rows: b, the rows of a micro-batch.
        device: where the loss is computed.

    Returns:
        The mean loss in nats per target and the number of tokens, both over all ranks.
    """
    # The mean is over the targets of all ranks, so they are counted before the first backward pass.
    own_counts = [float((targets >= 0).sum()), float(ids.numel())]
    n_targets, n_tokens = sum_numbers(own_counts, device)

    nats = torch.zeros((), device=device)
    pairs = list(zip(ids.split(micro_batch_rows), targets.split(micro_batch_rows), strict=True))
    for i, (x, y) in enumerate(pairs):
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)  # (b, T)

        # Ranks exchange their gradients during the last backward pass only.
        is_last = i + 1 == len(pairs)
        with loss.no_sync() if isinstance(loss, SpreadLoss) and not is_last else nullcontext():
            part = loss(x, y) / max(1.0, n_targets)
            part.backward()
        nats += part.detach()

    (mean_nats,) = sum_numbers([float(nats)], device)
    return mean_nats, int(n_tokens)


def lr_ratio(step: int, steps: int, config: OptimConfig) -> float:
    """Return the learning rate of a step as a share of its peak: warm-up, constant, warm-down.

    >>> [lr_ratio(s, 10, OptimConfig(warmdown_ratio=0.5)) for s in (0, 5, 6, 9)]
    [1.0, 1.0, 0.8, 0.2]
    """
    # Warm-up, given as a number of steps or as a share of the run.
    down = count_warmdown(steps, config)
    if config.warmup_steps and step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    up = config.warmup_ratio * steps
    if step < up:
        return (step + 1) / (up + 1)

    # Constant, then linear warm-down to the final ratio.
    if step <= steps - down:
        return 1.0
    share = (steps - step) / down
    return round(share + (1 - share) * config.final_lr_ratio, 12)


def count_warmdown(steps: int, config: OptimConfig) -> float:
    """Return the number of steps at the end of a run in which the learning rate falls."""
    down = config.warmdown_ratio * steps
    return round(down) if config.whole_steps else down


def muon_momentum(step: int, steps: int, config: OptimConfig) -> float:
    """Return Muon's momentum at a step: it rises to its full value, stays there, and may fall at the end.

    The fall, if the config asks for one, coincides with the warm-down of the learning rate.

    >>> muon_momentum(0, 4000, OptimConfig()), muon_momentum(300, 4000, OptimConfig())
    (0.85, 0.95)
    """
    # The length of the rise, at most a share of the run.
    start, full, end = config.momentum_start, config.momentum, config.momentum_end
    limit = config.momentum_share * steps if config.momentum_share else float("inf")
    rise = max(1.0, min(float(config.momentum_steps), limit))

    # The fall during the warm-down.
    down = count_warmdown(steps, config)
    if end and down and step >= rise and step >= steps - down:
        share = (step - (steps - down)) / down
        return full * (1 - share) + end * share

    # The rise, then the constant value.
    risen = min(1.0, step / rise)
    return start + (full - start) * risen if full > start else full


def decay_ratio(step: int, steps: int, config: OptimConfig) -> float:
    """Return the weight decay of the matrices at a step, as a share of its peak.

    The decay applied at a step is this share times the learning rate of the step.

    Source: nanochat HEAD, base_train.py, for the cosine.

    >>> [round(decay_ratio(s, 10, OptimConfig(decay_schedule="cosine")), 3) for s in (0, 5, 10)]
    [1.0, 0.5, 0.0]
    """
    if config.decay_schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / steps))
    return lr_ratio(step, steps, config)


def read_schedule(step: int, steps: int, config: OptimConfig) -> tuple[float, float, float]:
    """Return the learning rate, Muon's momentum and the weight decay of a step.

    The learning rate and the weight decay are shares of their peaks.
    """
    return (
        lr_ratio(step, steps, config),
        muon_momentum(step, steps, config),
        decay_ratio(step, steps, config),
    )
