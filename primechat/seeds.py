"""Seeds derived from seeds: an independent stream of random numbers for each place that needs one.

A sum such as `seed + row` does not work: row 1 of seed 0 would draw the same numbers as row 0 of seed 1. A
hash of the seed and the place has no such pattern. It has 63 bits, so the probability that any two of a
million places share a value is about one in ten million.
Reference: numpy's SeedSequence, which hashes for the same reason.
"""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *place: int | str) -> int:
    """Return the seed of one place: a 63-bit number that looks unrelated to the seed of any other place.

    torch's CPU generator uses only the low 32 bits of a seed. Where thousands of streams are needed, use
    numpy, whose generators use all of them (`primechat.infer.sampling.draw_floats`).

    Args:
        seed: any integer.
        place: what distinguishes this use from others: a name, and indices of rows, turns or steps.

    >>> derive_seed(0, "row", 1) != derive_seed(1, "row", 0)
    True
    """
    numbers = [part if isinstance(part, str) else int(part) for part in (seed, *place)]
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def fold_seed(seed: int) -> int:
    """Return a seed below 2**32 for torch's CPU generator: the seed itself if it fits, else a hash.

    >>> fold_seed(7), fold_seed(7 + 2**32) != 7
    (7, True)
    """
    return seed if 0 <= seed < 2**32 else derive_seed(seed) % 2**32
