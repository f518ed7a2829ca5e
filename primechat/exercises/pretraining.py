"""Exercises of lab 05: bits per byte, the learning rate's course.

Hides: the numbers that the checks try. Reference: nanochat's bits per byte; Hägele et al. 2024 (warm-down).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from primechat.exercises import Exercise, require


def check_bits(bits_per_byte: Callable[[float, int], float]) -> None:
    """Try a function that turns summed nats into bits per byte."""
    one = bits_per_byte(math.log(2), 1)
    require(
        abs(one - 1) < 1e-3,
        "Bits, not nats",
        f"ln 2 nats on one byte are 1 bit per byte, not {one:.4f}.",
    )
    half = bits_per_byte(math.log(2), 2)
    require(
        abs(half - 0.5) < 1e-3, "Shared by the bytes", f"On two bytes they are 0.5, not {half:.4f}."
    )
    many = bits_per_byte(1000.0, 800)
    require(
        abs(many - 1000 / math.log(2) / 800) < 2e-3,
        "Any text",
        f"1,000 nats on 800 bytes gave {many:.4f}.",
    )


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """A bit is ln 2 nats; the bytes are of the text, however it was cut into tokens."""
    return nats / (math.log(2) * n_bytes)


def check_rate(lr_share: Callable[[int, int], float]) -> None:
    """Try a learning rate that is level and then falls."""
    require(
        lr_share(0, 100) == 1, "Begins at its peak", f"Step 0 of 100 has {lr_share(0, 100)}, not 1."
    )
    require(
        lr_share(50, 100) == 1,
        "Level in the first half",
        f"Step 50 has {lr_share(50, 100)}, not 1.",
    )
    for step, share in ((75, 0.5), (90, 0.2), (100, 0.0)):
        found = lr_share(step, 100)
        said = f"Step {step} has {found}, not {share}."
        require(abs(found - share) < 1e-9, "Falls on a straight line", said)
    require(
        abs(lr_share(150, 200) - 0.5) < 1e-9,
        "Stretches to the run",
        "Step 150 of 200 must have 0.5 too.",
    )


def lr_share(step: int, steps: int) -> float:
    """1 in the first half, then straight down to 0."""
    return min(1.0, 2 * (steps - step) / steps)


EXERCISES = (
    Exercise(
        title="Bits per byte",
        task="The loss is in **nats** and a sum over tokens, so models with other tokens cannot be compared "
        "by it. Write `bits_per_byte(nats, n_bytes)` for a text whose tokens cost `nats` in all.",
        check=check_bits,
        hint="One bit is ln 2 = 0.693 nats.",
        solution=bits_per_byte,
        mistakes=(
            (lambda nats, n: nats / n, "Bits, not nats"),
            (lambda nats, n: nats * math.log(2) / n, "Bits, not nats"),
            (lambda nats, n: nats / math.log(2), "Shared by the bytes"),
        ),
        praise="Eight would be a model that knows nothing of bytes; the d20 reaches 0.81.",
    ),
    Exercise(
        title="The rate falls",
        task="Write `lr_share(step, steps)`: the learning rate as a share of its peak. It is level for the "
        "first half of the run, then falls on a straight line to 0 at its end.",
        check=check_rate,
        hint="What is left of the run, twice over, but never more than 1.",
        solution=lr_share,
        mistakes=(
            (lambda step, steps: step / steps, "Begins at its peak"),
            (lambda step, steps: 1 - step / steps, "Level in the first half"),
            (lambda step, steps: 1.0, "Falls on a straight line"),
            (lambda step, steps: 1.0 if step <= steps / 2 else 0.5, "Falls on a straight line"),
            (
                lambda step, steps: (
                    math.sin(math.pi * lr_share(step, steps) / 2) ** 2
                ),  # half a cosine
                "Falls on a straight line",
            ),
            (lambda step, steps: min(1.0, (100 - step) / 50), "Stretches to the run"),
        ),
        praise="Much of what a run gains comes while the rate falls: small steps settle what large found.",
    ),
)
