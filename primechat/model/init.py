"""Weight initialisation, as an InitConfig describes it.

Every block initially adds nothing to the residual stream, because its output matrices are zero. The weights
are drawn in the order of the parameters, so that a seed always gives the same weights.
Reference: nanochat of October 2025 and of July 2026, gpt.py; Yang et al. 2023 (the spectral condition).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from primechat.config import InitConfig


def draw_weights(
    parameters: Iterable[tuple[str, Tensor]],
    n_embd: int,
    init: InitConfig,
    generator: torch.Generator,
) -> None:
    """Fill the parameters of a GPT in place.

    Args:
        parameters: names, as in the state_dict, and tensors.
        n_embd: width of the model, with which uniform matrices scale.
        init: the initial values and standard deviations.
        generator: source of the random numbers.
    """
    for name, p in parameters:
        if name == "resid_lambdas":
            p.copy_(lay_on_line(init.residual_first, init.residual_last, len(p)))
        elif name == "x0_lambdas":
            p.copy_(lay_on_line(init.x0_first, init.x0_last, len(p)))
        elif name == "backout_lambda":
            p.fill_(init.backout)
        elif name == "smear_lambda" or name.endswith("c_proj.weight"):
            p.zero_()
        elif name == "transformer.wte.weight":
            p.normal_(std=init.embedding_std, generator=generator)
        elif name == "lm_head.weight":
            draw_normal(p, init.head_std, generator)
        elif name.endswith("gate.weight"):
            draw_uniform(p, 0.0, init.gate_max, generator)
        elif init.matrices == "normal" and name.startswith("value_embeds"):
            p.normal_(std=init.embedding_std, generator=generator)
        else:
            gain = init.mlp_gain if name.endswith("c_fc.weight") else 1.0
            draw_matrix(p, n_embd, init.matrices, gain, generator)


def draw_matrix(p: Tensor, n_embd: int, kind: str, gain: float, generator: torch.Generator) -> None:
    """Fill a matrix (out, in) with random numbers of the given kind, scaled by `gain`."""
    if kind == "normal":
        n_out, n_in = p.shape
        draw_normal(p, gain * min(1.0, (n_out / n_in) ** 0.5) / n_in**0.5, generator)
    else:
        # A uniform distribution on [-b, b] has the standard deviation b / sqrt(3), here 1 / sqrt(n_embd).
        bound = gain * (3 / n_embd) ** 0.5
        draw_uniform(p, -bound, bound, generator)


def draw_normal(p: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill a tensor with normal numbers, or with zeros, drawing nothing, if `std` is 0."""
    if std:
        p.normal_(std=std, generator=generator)
    else:
        p.zero_()


def draw_uniform(p: Tensor, low: float, high: float, generator: torch.Generator) -> None:
    """Fill a tensor with uniform numbers, or with `low`, drawing nothing, if `low` equals `high`."""
    if high > low:
        p.uniform_(low, high, generator=generator)
    else:
        p.fill_(low)


def lay_on_line(first: float, last: float, n: int) -> Tensor:
    """Return n evenly spaced numbers from `first` to `last`, (n,); `first` alone if n is 1."""
    return torch.tensor([first + (last - first) * i / max(n - 1, 1) for i in range(n)])
