"""Seeds that are drawn from seeds: one independent stream of random numbers for each place that needs one.

A sum such as `seed + row` will not do: row 1 of seed 0 would draw the same numbers as row 0 of seed 1. A hash
of the seed and the place has no such pattern, and two of a million places share one of its 63 bits' values
with a probability of one in ten million. Reference: numpy's SeedSequence, which hashes for the same reason.
"""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *place: int | str) -> int:
    """Return the seed of one place: a number of 63 bits that looks unrelated to that of any other place.

    torch's CPU generator reads only the low 32 bits of a seed, so thousands of streams are to be opened by
    numpy, whose generators read all of them (`primechat.infer.sampling.draw_floats`).

    Args:
        seed: any whole number.
        place: what tells this use from others: a purpose by name, numbers of rows, turns or steps.

    >>> derive_seed(0, "row", 1) != derive_seed(1, "row", 0)
    True
    """
    numbers = [part if isinstance(part, str) else int(part) for part in (seed, *place)]
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def fold_seed(seed: int) -> int:
    """Return a seed that torch's CPU generator tells from others: one below 2**32 as it is, else a hash.

    >>> fold_seed(7), fold_seed(7 + 2**32) != 7
    (7, True)
    """
    return seed if 0 <= seed < 2**32 else derive_seed(seed) % 2**32
