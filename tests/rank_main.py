"""One rank of test_train.test_two_ranks: trains on its half of the rows and writes its weights."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_train import make_batches, make_model

from primechat.config import OptimConfig
from primechat.train.loop import fit
from primechat.train.optim import Optimizer
from primechat.train.parallel import join_ranks


def main() -> None:
    """Train six steps."""
    torch.set_num_threads(1)
    ranks = join_ranks("cpu")
    half = slice(2 * ranks.rank, 2 * ranks.rank + 2)
    batches = [(x[half], y[half]) for x, y in make_batches()]
    model = make_model()
    optimizer = Optimizer(model, OptimConfig(), 32)
    fit(optimizer, batches, lambda x, y: model.loss(x, y, "sum"), steps=6, micro_batch_rows=2)
    torch.save(model.state_dict(), Path(sys.argv[1]) / f"rank{ranks.rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
