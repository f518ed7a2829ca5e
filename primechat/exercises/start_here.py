"""Lab 00: what a model weighs, and what bits per byte are; two exercises.

Hides: the checks' numbers. Reference: Shannon 1948 (the bit); IEEE 754 (float32).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from primechat.exercises import Exercise, require

SIZES = {"float32": 4, "bfloat16": 2}


def weigh_model(n_params: int, dtype: str) -> float:
    """Return megabytes."""
    return n_params * {"float32": 4, "bfloat16": 2}[dtype] / 1e6


def check_weight(attempt: Callable[[int, str], Any]) -> None:
    """Check the weight of a model."""
    found = attempt(1_000_000, "float32")
    require(
        isinstance(found, (int, float)),
        "A number",
        f"it returned {found!r}; megabytes are a number",
    )
    require(
        math.isclose(found, 4.0, rel_tol=0.06),
        "Four bytes a number",
        f"a million parameters in float32 gave {found} MB; each takes 4 bytes, so they take 4 MB",
    )
    half = attempt(1_000_000, "bfloat16")
    require(
        math.isclose(half * 2, found),
        "Half as much in bfloat16",
        f"in bfloat16 it gave {half} MB, in float32 {found}; a bfloat16 number takes 2 bytes",
    )
    require(
        math.isclose(found, 4.0),
        "A megabyte is a million bytes",
        f"a million parameters gave {found} MB: that divides by 1,048,576, which is a mebibyte",
    )
    small = attempt(125_000, "float32")
    said = f"125 thousand gave {small} MB, not an eighth as much: 0.5"
    require(math.isclose(small, 0.5), "Every parameter counts", said)


def measure_bits(nats: float, n_bytes: int) -> float:
    """Return bits per byte."""
    return nats / math.log(2) / n_bytes


def check_bits(attempt: Callable[[float, int], Any]) -> None:
    """Check bits per byte."""
    coin = attempt(math.log(2), 1)
    require(
        isinstance(coin, (int, float)),
        "A number",
        f"it returned {coin!r}; bits per byte are a number",
    )
    require(
        math.isclose(coin, 1.0, rel_tol=1e-4),
        "A coin toss is one bit",
        f"log(2) nats over one byte gave {coin:.4f}; a nat is 1 / log(2) = 1.4427 bits",
    )
    two = attempt(math.log(2), 2)
    require(
        math.isclose(two, 0.5, rel_tol=1e-4),
        "Spread over the bytes",
        f"the same surprise over 2 bytes gave {two:.4f}, not 0.5",
    )
    blind = attempt(10 * math.log(256), 10)
    require(
        math.isclose(blind, 8.0, rel_tol=1e-4),
        "Eight bits for a blind guess",
        f"guessing among 256 bytes gave {blind:.3f}, not 8",
    )


EXERCISES = (
    Exercise(
        title="What does a model weigh?",
        task="A parameter is one number. In `float32` it takes 4 bytes, in `bfloat16` 2. Write "
        "`weigh_model(n_params, dtype)`: the model's size in **megabytes**, millions of bytes.",
        check=check_weight,
        hint="Look the bytes up by the dtype's name, multiply, and divide by a million.",
        solution=weigh_model,
        mistakes=(
            (lambda n, dtype: n * 4, "Four bytes a number"),
            (lambda n, dtype: n * 4 / 1e6, "Half as much in bfloat16"),
            (lambda n, dtype: n * SIZES[dtype] / 2**20, "A megabyte is a million bytes"),
            (lambda n, dtype: n * SIZES[dtype] * 8 / 1e6, "Four bytes a number"),
            (lambda n, dtype: SIZES[dtype], "Every parameter counts"),
            (lambda n, dtype: n * SIZES[dtype] // 10**6, "Every parameter counts"),
            (lambda n, dtype: f"{n} MB", "A number"),
        ),
        praise="So 5 million parameters are a file of 20 MB, and 1.9 billion take 7.6 GB of memory.",
    ),
    Exercise(
        title="What are bits per byte?",
        task="A model's surprise at a text is measured in **nats**. A nat is `1 / log(2)` bits, a bit is one "
        "toss of a coin. Write `measure_bits(nats, n_bytes)`: the bits that each byte of the text costs. "
        "By it models with different tokenizers can be compared: a text has the same bytes for all of them.",
        check=check_bits,
        hint="`math.log` is the natural logarithm; divide twice.",
        solution=measure_bits,
        mistakes=(
            (lambda nats, n_bytes: nats / n_bytes, "A coin toss is one bit"),
            (lambda nats, n_bytes: nats * math.log(2) / n_bytes, "A coin toss is one bit"),
            (lambda nats, n_bytes: nats / math.log(2), "Spread over the bytes"),
            (
                lambda nats, n_bytes: min(nats / math.log(2) / n_bytes, 1.0),
                "Eight bits for a blind guess",
            ),
        ),
        praise="A blind guess pays 8 bits for each byte of English, a good small model less than 2.",
    ),
)
