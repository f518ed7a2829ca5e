"""Data parallelism over several processes: ranks, sums over ranks, and shares of the optimizer state.

Hides: torch.distributed. Under torchrun there are WORLD_SIZE ranks (NCCL on CUDA, gloo elsewhere), on one
node or on several (torchrun's rendezvous). Otherwise there is one rank, and every function here costs
nothing. Gradients are summed during the backward pass, so each loss is first divided by the tokens of all
ranks.
Reference: Li et al. 2020 (DistributedDataParallel); Rajbhandari et al. 2020 (ZeRO, stage 1).
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Shared = TypeVar("Shared")
PATIENCE = timedelta(minutes=60)  # a rank may wait for a shard, or for rank 0 to write a checkpoint
PARTING = timedelta(seconds=10)  # how long a rank waits for the others when it exits
# Messages of errors that follow from another rank's failure. They are not the cause, so they are
# not printed.
ECHOES = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "Connection refused",
    "remote process exited",
)


@dataclass(frozen=True)
class Ranks:
    """The rank of this process and the number of processes."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints and writes files."""
        return self.rank == 0


def join_ranks(device_type: str) -> Ranks:
    """Join the process group that torchrun describes in the environment, and return this process's `Ranks`.

    Without torchrun this process is the only rank.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return Ranks()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device_type == "cuda":
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=PATIENCE)
        atexit.register(part_ranks)
    return Ranks(dist.get_rank(), dist.get_world_size(), local_rank)


def part_ranks() -> None:
    """Leave the process group at exit, once the other ranks have reached this point too.

    The threads of a group that is still open may abort an exiting process.
    """
    if dist.is_initialized():
        with suppress(RuntimeError):
            if dist.get_backend() == "gloo":
                dist.monitored_barrier(timeout=PARTING)
        dist.destroy_process_group()


@contextmanager
def wait_turn(ranks: Ranks) -> Iterator[None]:
    """Run a block on each machine's first rank before the others, so that it can prepare what they share."""
    if dist.is_initialized() and ranks.local_rank:
        dist.barrier()
    yield
    if dist.is_initialized() and not ranks.local_rank:
        dist.barrier()


def sum_numbers(numbers: list[float], device: torch.device) -> list[float]:
    """Return each number summed over all ranks."""
    if not dist.is_initialized():
        return numbers
    kind = torch.float32 if device.type == "mps" else torch.float64
    total = torch.tensor(numbers, dtype=kind, device=device)
    dist.all_reduce(total)
    return [float(x) for x in total.tolist()]


def broadcast_object(value: Shared) -> Shared:
    """Return rank 0's value on every rank; it must be plain data."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather_objects(value: Shared) -> list[Shared]:
    """Return the values of all ranks, on every rank; they must be plain data."""
    if not dist.is_initialized():
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is set on any rank."""
    return sum_numbers([float(flag)], device)[0] > 0


def is_echo(error: BaseException) -> bool:
    """Return whether an error only reports that another rank has exited."""
    network = isinstance(error, (dist.DistBackendError, dist.DistNetworkError))
    return network or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in ECHOES)
    )


class LossModule(nn.Module):
    """A loss and its model as one module, as DistributedDataParallel requires."""

    def __init__(self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return the summed nats of ids and targets (b, T)."""
        return self.loss(ids, targets)


class SpreadLoss:
    """A summed loss whose gradients are summed over all ranks during the backward pass.

    A compiled loss is compiled in pieces, one per bucket of gradients, so that communication overlaps with
    it too.
    """

    def __init__(self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.call: Callable[[Tensor, Tensor], Tensor] = loss
        self.parallel: DistributedDataParallel | None = None
        if dist.is_initialized():
            module = LossModule(model, loss)
            self.call = self.parallel = DistributedDataParallel(
                module, gradient_as_bucket_view=True
            )
            self.parallel.register_comm_hook(None, sum_bucket)

    def __call__(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return the summed nats of this rank's ids and targets (b, T)."""
        total: Tensor = self.call(ids, targets)
        return total

    def no_sync(self) -> AbstractContextManager[None]:
        """Return a context in which gradients stay on this rank, for all micro-batches but the last."""
        quiet: AbstractContextManager[None] = (
            self.parallel.no_sync() if self.parallel else nullcontext()
        )
        return quiet


def sum_bucket(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Return a future of a bucket of gradients summed over all ranks; by default they would be averaged."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None, "an asynchronous call returns its work"
    return work.get_future().then(lambda future: future.value()[0])


# DistributedDataParallel compares the annotations with the types themselves, not with their names.
sum_bucket.__annotations__.update(
    bucket=dist.GradBucket, **{"return": torch.futures.Future[Tensor]}
)


# Before torch 2.12, `all_gather_single` was named `all_gather_into_tensor`.
gather_whole = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Shard:
    """This rank's part of the rows of a tensor (n, ...): rows `lo` to `hi`, split as evenly as possible.

    >>> Shard(10).lo, Shard(10).hi
    (0, 10)
    """

    def __init__(self, n: int) -> None:
        self.n, self.world_size = n, dist.get_world_size() if dist.is_initialized() else 1
        self.size = -(-n // self.world_size)
        rank = dist.get_rank() if dist.is_initialized() else 0
        self.lo, self.hi = min(n, rank * self.size), min(n, (rank + 1) * self.size)

    def gather(self, mine: Tensor) -> Callable[[], Tensor]:
        """Start to gather the rows of all ranks, and return a function that waits for them.

        Args:
            mine: the rows of this rank, (hi - lo, ...).

        Returns:
            A function that returns all rows, (n, ...), on every rank.
        """
        if self.world_size == 1:
            return lambda: mine

        # All ranks must send the same number of rows, so the last ones may need padding.
        padded = mine.contiguous()
        if len(mine) < self.size:
            padded = mine.new_zeros(self.size, *mine.shape[1:])
            padded[: len(mine)] = mine
        whole = mine.new_empty(self.size * self.world_size, *mine.shape[1:])
        work = gather_whole(whole, padded, async_op=True)

        def wait() -> Tensor:
            assert work is not None, "an asynchronous call returns its work"
            work.wait()
            return whole[: self.n]

        return wait
