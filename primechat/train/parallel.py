"""Several processes, one model: who am I, and sums over all of us.

Hides: torch.distributed. Started by torchrun there are WORLD_SIZE ranks (NCCL on CUDA, gloo elsewhere);
otherwise one rank, and every function here is free. Gradients are summed, each loss being divided by the
tokens of all ranks before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Shared = TypeVar("Shared")
BUCKET_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Ranks:
    """This process among all."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """True for the one that prints and writes."""
        return self.rank == 0


def join_ranks(device_type: str) -> Ranks:
    """Join the process group that torchrun describes in the environment; alone where there is none."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return Ranks()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device_type == "cuda":
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size(), local_rank)


def sum_grads(params: Iterable[Tensor]) -> None:
    """Sum the gradients of all ranks in place, in buckets of one dtype."""
    if not dist.is_initialized():
        return
    bucket: list[Tensor] = []
    grads = [p.grad for p in params if p.grad is not None]
    for i, grad in enumerate(grads):
        bucket.append(grad)
        full = sum(g.nbytes for g in bucket) >= BUCKET_BYTES
        if full or i + 1 == len(grads) or grads[i + 1].dtype != grad.dtype:
            flat = torch.cat([g.reshape(-1) for g in bucket])
            dist.all_reduce(flat)
            for g, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                g.copy_(part.view_as(g))
            bucket = []


def sum_numbers(numbers: list[float], device: torch.device) -> list[float]:
    """Sum a few numbers over all ranks."""
    if not dist.is_initialized():
        return numbers
    kind = torch.float32 if device.type == "mps" else torch.float64
    total = torch.tensor(numbers, dtype=kind, device=device)
    dist.all_reduce(total)
    return [float(x) for x in total.tolist()]


def share_object(value: Shared) -> Shared:
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
    """Tell whether the flag is set on any rank."""
    return sum_numbers([float(flag)], device)[0] > 0


def share_work(stack: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `work` to a stack (n, ...) of independent matrices, each rank doing its share; all get all
    results.

    Source: the owner-computes scheme of distributed Muon (Jordan et al. 2024), here by matrix.
    """
    if not dist.is_initialized():
        return work(stack)
    world_size, n = dist.get_world_size(), len(stack)
    share = -(-n // world_size)
    mine = stack[dist.get_rank() * share : (dist.get_rank() + 1) * share]
    padded = stack.new_zeros(share, *stack.shape[1:])
    if len(mine):
        padded[: len(mine)] = work(mine)
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(parts, padded)
    return torch.cat(parts)[:n]
