"""How many CPU threads decode one model fastest.

Hides: the measurement. For a small model one thread is often faster than two, and on a busy machine two
can be a hundred times slower, because each product waits for both.
"""

from __future__ import annotations

import time

import torch

from primechat.protocols import LanguageModel

TRIES = 5


def settle_threads(model: LanguageModel) -> int:
    """Time a few tokens with one thread and with all, keep the faster for this process, and return it.

    Args:
        model: on the CPU; for another device nothing is measured or changed.
    """
    everything = torch.get_num_threads()
    if model.device.type != "cpu" or everything == 1:
        return everything
    times = {n: time_decoding(model, n) for n in (1, everything)}
    best = min(times, key=lambda n: times[n])
    torch.set_num_threads(best)
    return best


@torch.inference_mode()
def time_decoding(model: LanguageModel, threads: int) -> float:
    """Return the median seconds of a token with so many threads."""
    torch.set_num_threads(threads)
    cache, ids, times = model.new_cache(1, TRIES + 1), torch.zeros(1, 1, dtype=torch.long), []
    for _ in range(TRIES + 1):
        t_start = time.perf_counter()
        model.advance(ids, cache)
        times.append(time.perf_counter() - t_start)
    return sorted(times[1:])[TRIES // 2]
