"""What makes a model decode fast on a CPU: how many threads, and memory that stays.

Hides: the measurement, and the C library. For a small model one thread is often faster than two, and on a
busy machine two can be a hundred times slower, because each product waits for both.
"""

from __future__ import annotations

import ctypes
import functools
import time

import torch

from primechat.protocols import LanguageModel

TRIES = 5
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)


@functools.cache
def keep_freed_memory() -> bool:
    """Let glibc keep up to 256 MB that this process has freed; tell whether it does (another libc has none).

    A step of many rows frees half a megabyte that the next one takes again. By default that goes back to
    the system each time, and its pages come back as faults, which are a twelfth of the step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(
        mallopt and mallopt(TRIM_THRESHOLD, 256 << 20) and mallopt(MMAP_THRESHOLD, 32 << 20)
    )


def settle_threads(model: LanguageModel, rows: int = 1) -> int:
    """Time a few tokens with one thread and with all, keep the faster for this process, and return it.

    Args:
        model: on the CPU; for another device nothing is measured or changed.
        rows: how many conversations it will decode at once.
    """
    everything = torch.get_num_threads()
    if model.device.type != "cpu" or everything == 1:
        return everything
    times = {n: time_decoding(model, n, rows) for n in (1, everything)}
    best = min(times, key=lambda n: times[n])
    torch.set_num_threads(best)
    return best


@torch.inference_mode()
def time_decoding(model: LanguageModel, threads: int, rows: int) -> float:
    """Return the median seconds of a token with so many threads."""
    torch.set_num_threads(threads)
    cache, ids, times = model.new_cache(rows, TRIES + 1), torch.zeros(rows, 1, dtype=torch.long), []
    for _ in range(TRIES + 1):
        t_start = time.perf_counter()
        model.advance(ids, cache)
        times.append(time.perf_counter() - t_start)
    return sorted(times[1:])[TRIES // 2]
