"""One rank of the tests of several: trains on its share of the rows, and writes losses, weights and state."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_gpt import make_batches, make_model

from primechat.config import OptimConfig
from primechat.config.recipes import make_recipe
from primechat.events import StepEvent
from primechat.text.batches import split_rows
from primechat.train.loop import fit
from primechat.train.optim import Optimizer
from primechat.train.parallel import SpreadLoss, join_ranks


def main(folder: Path, end: int, half: bool, start: str, recipe: str = "") -> None:
    """Train to a step of the 50, from a state where one is named."""
    torch.set_num_threads(1)
    ranks = join_ranks("cpu")
    rows = 4
    first, share = split_rows(rows, ranks.rank, ranks.world_size)
    batches = [(x[first : first + share], y[first : first + share]) for x, y in make_batches(rows)]
    model, begin = make_model(), 0
    if start:
        state = torch.load(start, weights_only=True)
        model.load_state_dict(state["model"])
        begin = state["step"]
    optim = make_recipe(recipe).optim if recipe else OptimConfig()
    optimizer = Optimizer(model, optim, 32, half=half)
    if start:
        optimizer.load_state_dict(state["optimizer"])
    losses: list[float] = []
    stop = threading.Event()

    def note(event: StepEvent) -> None:
        losses.append(event.loss_nats)
        if event.step == end:
            stop.set()

    loss = SpreadLoss(model, lambda x, y: model.loss(x, y, "sum"))
    fit(
        optimizer,
        batches[begin:],
        loss,
        steps=50,
        start_step=begin,
        micro_batch_rows=1,
        on_step=note,
        stop=stop,
    )
    found = {
        "model": model.state_dict(),
        "losses": losses,
        "optimizer": optimizer.state_dict(),
        "step": end,
    }
    torch.save(found, folder / f"rank{ranks.rank}.pt")
    if dist.is_initialized():
        dist.barrier()  # no rank closes its connections while another still reads from them
        del loss, optimizer
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "half", *sys.argv[4:])
