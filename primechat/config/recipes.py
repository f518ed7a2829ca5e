"""Three pretraining recipes, each a function that returns all settings of a run.

    october2025    nanochat's speedrun of October 2025: the d20 whose cost was measured
    nanochat2026   nanochat as of July 2026: fewer tokens, more switches, rates that follow the batch size
    quickstart     ours, for a few minutes on a laptop

A recipe is only settings: no other code depends on its name, and every number can be changed by a flag.
Source: karpathy/nanochat, c7ae920 (October 2025) and 92d63d4 (July 2026).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from primechat.config.model import GPTConfig, InitConfig
from primechat.config.optim import OptimConfig
from primechat.config.runtime import EvalConfig
from primechat.config.stages import PretrainConfig
from primechat.errors import ConfigError

FULL_EVAL = EvalConfig(
    every=250,
    tokens=2_097_152,
    sample_every=1000,
    save_every=1000,
    snapshot_budget_mb=16_000,
)
FIRST_EVAL = EvalConfig()  # a tenth of the time during training, a quarter at the end

# The run for which nanochat tuned its rates and batch of 2026: a d12 at 12 tokens per matrix parameter.
REFERENCE_DEPTH = 12
REFERENCE_BATCH = 524_288


def october2025(
    depth: int = 20, *, vocab_size: int = 65_536, sequence_len: int = 2048
) -> PretrainConfig:
    """Return the settings of nanochat's speedrun of October 2025, on FineWeb-Edu.

    >>> run = october2025(20)
    >>> run.model.n_params, run.default_steps, run.default_steps * run.batch_tokens
    (560988160, 21400, 11219763200)
    """
    return PretrainConfig(
        tag=f"d{depth}",
        model=GPTConfig.classic(depth, vocab_size=vocab_size, sequence_len=sequence_len),
        corpus="fineweb-edu",
        rows="stream",
        batch_tokens=524_288,
        tokens_per_param=20.0,
        params_counted="all",
        init=InitConfig(embedding_std=1.0, head_std=0.0, matrices="normal"),
        optim=OptimConfig(
            matrix_lr=0.02,
            embedding_lr=0.2,
            unembedding_lr=0.004,
            adam_beta1=0.8,
            adam_beta2=0.95,
            embedding_beta2=0.95,
            unembedding_beta2=0.95,
            adam_eps=1e-10,
            weight_decay=0.0,
            orthogonalize="newton-schulz",
            row_beta2=0.0,
            momentum_start=0.85,
            momentum=0.95,
            momentum_steps=300,
            momentum_share=0.0,
            grad_clip=1.0,
            warmup_steps=0,
            warmdown_ratio=0.2,
            whole_steps=True,
            final_lr_ratio=0.0,
        ),
        eval=FULL_EVAL,
    )


def nanochat2026(
    depth: int = 20,
    *,
    vocab_size: int = 65_536,
    sequence_len: int = 2048,
    batch_tokens: int = 0,
    tokens_per_param: float = 12.0,
) -> PretrainConfig:
    """Return the settings of nanochat's base training of July 2026, on ClimbMix.

    The vocabulary has the size of October 2025, so that the two recipes can be compared; nanochat's own of
    2026 has 32,768 tokens.

    Args:
        depth: number of layers.
        vocab_size: number of token ids.
        sequence_len: context length in tokens.
        batch_tokens: tokens per batch; 0 applies nanochat's rule. Rates and weight decay follow it.
        tokens_per_param: training tokens per parameter of the blocks and the output head.

    >>> run = nanochat2026(20)
    >>> run.batch_tokens, run.default_steps, run.default_steps * run.batch_tokens
    (1048576, 5460, 5725224960)
    """
    model = GPTConfig.modern(depth, vocab_size=vocab_size, sequence_len=sequence_len)
    small = GPTConfig.modern(REFERENCE_DEPTH, vocab_size=vocab_size, sequence_len=sequence_len)

    # Tokens of the run, as a multiple of those of a d12.
    horizon = model.n_matrix_params / small.n_matrix_params

    # Batch size, and the factor by which rates follow it.
    batch_tokens = batch_tokens or choose_batch(horizon)
    by_batch = (batch_tokens / REFERENCE_BATCH) ** 0.5

    return PretrainConfig(
        tag=f"d{depth}",
        model=model,
        corpus="climbmix",
        rows="best-fit",
        batch_tokens=batch_tokens,
        tokens_per_param=tokens_per_param,
        params_counted="matrices",
        init=INIT_2026,
        optim=optim_2026(by_batch, weight_decay=0.28 * by_batch / horizon),
        eval=FULL_EVAL,
    )


INIT_2026 = InitConfig(
    embedding_std=0.8,
    head_std=0.001,
    matrices="uniform",
    mlp_gain=0.4,
    residual_first=1.15,
    residual_last=1.05,
    x0_first=0.20,
    x0_last=0.05,
    backout=0.2,
    gate_max=0.02,
)


def optim_2026(by_batch: float, weight_decay: float) -> OptimConfig:
    """Return nanochat's optimizer settings of 2026.

    Args:
        by_batch: sqrt(batch / 524,288), a factor on every rate except that of smear and backout.
        weight_decay: weight decay of the matrices for the number of tokens of this run.
    """
    return OptimConfig(
        matrix_lr=0.02 * by_batch,
        embedding_lr=0.3 * by_batch,
        value_embedding_ratio=0.5,
        unembedding_lr=0.008 * by_batch,
        **scalar_rates_2026(by_batch),
        adam_beta1=0.8,
        adam_beta2=0.95,
        embedding_beta2=0.995,
        unembedding_beta2=0.96,
        adam_eps=1e-10,
        embedding_decay=0.001,
        value_embedding_decay=0.01,
        unembedding_decay=0.01,
        weight_decay=weight_decay,
        cautious_decay=True,
        decay_schedule="cosine",
        orthogonalize="polar-express",
        equalize_rows=True,
        restore_norm=True,
        row_beta2=0.9,
        momentum_start=0.85,
        momentum=0.97,
        momentum_end=0.90,
        momentum_steps=400,
        momentum_share=0.0,
        grad_clip=0.0,
        warmup_steps=40,
        warmdown_ratio=0.65,
        whole_steps=True,
        final_lr_ratio=0.05,
    )


def scalar_rates_2026(by_batch: float = 1.0) -> dict[str, float]:
    """Return nanochat's 2026 settings for learned scalars and gates; `by_batch` as in `optim_2026`."""
    return dict(
        residual_lr=0.005 * by_batch,
        residual_decay=0.05,
        x0_lr=0.5 * by_batch,
        x0_beta1=0.96,
        smear_lr=0.2,
    )


def choose_batch(horizon: float) -> int:
    """Return nanochat's batch size in tokens: 524,288 * horizon ** 0.383, rounded to a power of two.

    Args:
        horizon: tokens of the run, as a multiple of those of a d12.

    Source: Bergsma et al. 2025 (Power Lines), as in nanochat HEAD, base_train.py.

    >>> choose_batch(1.0), choose_batch(3.5), choose_batch(0.05)
    (524288, 1048576, 131072)
    """
    return int(2 ** round(math.log2(REFERENCE_BATCH * horizon**0.383)))


def quickstart(
    depth: int = 4, *, vocab_size: int = 4096, sequence_len: int = 256, seconds: float = 150.0
) -> PretrainConfig:
    """Return our settings for a laptop: as much training as fits into `seconds`, on the shipped text.

    The switches are those of 2026. The learning rates were tuned at depth 4 on 600,000 tokens; the learned
    scalars share one rate.
    """
    batch_tokens = 2048 if seconds < 60 else 4096  # a short run learns more from many small steps
    return PretrainConfig(
        tag=f"d{depth}",
        model=GPTConfig.modern(
            depth, vocab_size=vocab_size, sequence_len=sequence_len, head_dim=64
        ),
        corpus="chitchat",
        rows="stream",
        batch_tokens=batch_tokens,
        seconds=seconds,
        optim=OptimConfig(
            matrix_lr=0.012,
            embedding_lr=0.6,
            unembedding_lr=0.008,
            residual_lr=0.005,
            x0_lr=0.005,
            smear_lr=0.005,
            warmdown_ratio=0.7,
        ),
        eval=FIRST_EVAL,
    )


RECIPES: dict[str, Callable[..., PretrainConfig]] = {
    "october2025": october2025,
    "nanochat2026": nanochat2026,
    "quickstart": quickstart,
}
FULL_RECIPES = ("october2025", "nanochat2026")
RECIPE_OF_ARCH = {"classic": "october2025", "modern": "nanochat2026"}


def make_recipe(name: str, depth: int | None = None) -> PretrainConfig:
    """Return the settings of a recipe by name.

    Args:
        name: name of the recipe.
        depth: number of layers; None takes the recipe's own.

    Raises:
        ConfigError: there is no such recipe, or the depth is not allowed.
    """
    if name not in RECIPES:
        raise ConfigError(f"recipe={name!r} must be one of {', '.join(RECIPES)}; try october2025.")
    shape: dict[str, Any] = {} if depth is None else {"depth": depth}
    return RECIPES[name](**shape)
