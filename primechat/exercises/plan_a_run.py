"""Exercises of lab 04: count parameters, count FLOPs, find what a budget buys.

Hides: the runs that the checks try. Reference: Kaplan et al. 2020, section 2.1; Hoffmann et al. 2022.
"""

from __future__ import annotations

from collections.abc import Callable

from primechat.exercises import Exercise, require

D20, D32 = (65_536, 20, 1280), (65_536, 32, 2048)
SHAPES = ((D20, 560_988_160), (D32, 1_879_048_192), ((1000, 1, 64), 177_152))


def check_params(count_params: Callable[[int, int, int], int]) -> None:
    """Try a function that counts parameters."""
    small = count_params(1000, 1, 64) - count_params(1000, 0, 64)
    require(
        count_params(1000, 0, 64) == 128_000,
        "Two tables",
        "Without blocks there are two tables of V x C: "
        f"2 x 1000 x 64 = 128,000; you count {count_params(1000, 0, 64):,}.",
    )
    require(
        small == 12 * 64 * 64,
        "Twelve squares a block",
        f"A block has 4 C^2 in attention and 8 C^2 in its MLP, 49,152 for C = 64; you count {small:,}.",
    )
    for shape, total in SHAPES:
        found = count_params(*shape)
        require(
            found == total,
            "Every block counts",
            f"{shape} has {total:,} parameters, not {found:,}.",
        )


def count_params(vocab_size: int, n_layer: int, n_embd: int) -> int:
    """Two tables, and twelve squares of the width a block."""
    return 2 * vocab_size * n_embd + 12 * n_layer * n_embd**2


def check_hours(train_hours: Callable[[float, int, float, float], float]) -> None:
    """Try a function that turns FLOPs into hours."""
    one, eight = train_hours(3.9177e19, 1, 989e12, 0.465), train_hours(3.9177e19, 8, 989e12, 0.465)
    require(
        abs(one / eight - 8) < 1e-6,
        "GPUs share the work",
        f"8 GPUs take an eighth: {one:.2f} and {eight:.2f}.",
    )
    full = train_hours(3.9177e19, 8, 989e12, 1.0)
    require(
        full < eight,
        "A real run is below the peak",
        f"At MFU 0.465 it takes longer than at 1: {eight:.2f} h.",
    )
    require(
        abs(eight - 2.958) < 0.01,
        "Hours, not seconds",
        f"The d20 takes 2.96 hours, not {eight:.4g}.",
    )


def train_hours(flops: float, n_gpus: int, peak_flops: float, mfu: float) -> float:
    """Work over speed, an hour having 3,600 seconds."""
    return flops / (n_gpus * peak_flops * mfu) / 3600


EXERCISES = (
    Exercise(
        title="Count a model",
        task="Write `count_params(vocab_size, n_layer, n_embd)` for the classic model: a table of token "
        "embeddings, an output head of the same shape, and blocks. With C = n_embd, a block holds **four** "
        "C x C matrices for attention and two of C x 4C for its MLP.",
        check=check_params,
        hint="Two tables of V x C; then n_layer times (4 + 8) C squared.",
        solution=count_params,
        mistakes=(
            (lambda v, n, c: v * c + 12 * n * c * c, "Two tables"),
            (lambda v, n, c: 2 * v * c + 6 * n * c * c, "Twelve squares a block"),
            (lambda v, n, c: 2 * v * c + 12 * (n > 0) * c * c, "Every block counts"),
        ),
        praise="This is exact: the d20 has 560,988,160, and so has the model that is built.",
    ),
    Exercise(
        title="From work to hours",
        task="Write `train_hours(flops, n_gpus, peak_flops, mfu)`. MFU is the share of the GPUs' peak that a "
        "run reaches: norms, memory traffic and talk between GPUs take the rest.",
        check=check_hours,
        hint="Divide the work by what all GPUs do in a second, then by 3,600.",
        solution=train_hours,
        mistakes=(
            (lambda f, n, p, m: f / (p * m) / 3600, "GPUs share the work"),
            (lambda f, n, p, m: f * m / (n * p) / 3600, "A real run is below the peak"),
            (lambda f, n, p, m: f / (n * p * m), "Hours, not seconds"),
        ),
        praise="2.96 hours at $28.72 an hour: the d20 costs $85.",
    ),
)
