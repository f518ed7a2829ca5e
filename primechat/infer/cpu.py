"""Settings that make decoding fast on a CPU: the number of threads, and keeping freed memory.

Hides: the measurement and the calls to the C library. For a small model one thread is often faster than two.
On a busy machine two can be a hundred times slower, because each matrix product waits for both.
"""

from __future__ import annotations

import ctypes
import functools
import time

import torch

from primechat.protocols import LanguageModel

TRIES = 5
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)


@functools.cache
def keep_freed_memory() -> bool:
    """Let glibc keep up to 256 MB of freed memory, and return whether it does (False with another libc).

    A step with many rows frees half a megabyte that the next step allocates again. By default the memory
    returns to the system each time, and the page faults on the way back take a twelfth of the step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(
        mallopt and mallopt(TRIM_THRESHOLD, 256 << 20) and mallopt(MMAP_THRESHOLD, 32 << 20)
    )


def settle_threads(model: LanguageModel, rows: int = 1) -> int:
    """Set this process to the faster of one thread and all threads, and return the number of threads.

    Both are timed on a few tokens.

    Args:
        model: a model on the CPU; on another device nothing is measured or changed.
        rows: number of conversations to decode at once.
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
    """Return the median time per decoding step, in seconds, with this number of threads."""
    torch.set_num_threads(threads)
    cache, ids, times = model.new_cache(rows, TRIES + 1), torch.zeros(rows, 1, dtype=torch.long), []
    for _ in range(TRIES + 1):
        t_start = time.perf_counter()
        model.advance(ids, cache)
        times.append(time.perf_counter() - t_start)
    return sorted(times[1:])[TRIES // 2]
