"""What probes must know of a model's build, the same questions for ours and for foreign ones.

Hides: where a model keeps its parts. Every body answers `trace` (the model's own pass under a tap),
`read_stream`, `readout` and `head_map`. Reference: nostalgebraist 2020 (the logit lens).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from primechat.errors import ConfigError
from primechat.model.gpt import EPS, GPT, Block, norm
from primechat.protocols import Tap


class GPTBody:
    """A GPT of ours.

    The stream that enters layer i is keep[i] * x + again[i] * embed; behind the last layer, backout times
    the stream that left layer `middle` is taken away.
    """

    layer_points = (
        "attn.qk_raw", "attn.q", "attn.k", "attn.v", "attn.weights", "attn.heads", "attn.out",
        "mlp.pre", "mlp.out", "resid",
    )  # fmt: skip

    def __init__(self, model: GPT) -> None:
        c = model.config
        self.model, self.device, self.vocab_size = model, model.device, c.vocab_size
        self.sequence_len, self.max_context = model.sequence_len, model.max_context
        self.n_layer, self.n_head, self.n_kv_head, self.head_dim = (
            c.n_layer,
            c.n_head,
            c.n_kv_head,
            c.head_dim,
        )
        self.scale = c.qk_gain**2 / c.head_dim**0.5  # from the product of a query and a key to a score
        self.windows = tuple(c.window(i) for i in range(c.n_layer))
        scalars = c.residual_scalars
        self.keep = tuple(model.resid_lambdas.tolist()) if scalars else (1.0,) * c.n_layer
        self.again = tuple(model.x0_lambdas.tolist()) if scalars else (0.0,) * c.n_layer
        self.backout = float(model.backout_lambda) if c.backout else 0.0
        self.middle, self.has_smear, self.softcap = c.n_layer // 2, c.smear, c.logit_softcap

    def trace(self, ids: Tensor, tap: Tap) -> Tensor:
        """Return float32 logits (B, T, V) of ids (B, T), calling the tap at every point on the way."""
        return tap("logits", self.model.logits(self.model.hidden(ids, tap=tap)))

    def read_stream(self, x: Tensor) -> Tensor:
        """Return the float32 logits (..., V) that the model would give if x (..., C) left its last layer."""
        return self.model.logits(norm(x.to(self.model.compute_dtype)))

    def readout(self, x: Tensor, tokens: Sequence[int]) -> Tensor:
        """Return (len(tokens), C) float64: the linear map from a share of the stream x (C,) to the tokens'
        logits before the softcap, the final norm's scale frozen at x.
        """
        rows = self.model.lm_head.weight[list(tokens)].cpu().double()  # MPS has no float64
        return rows * torch.rsqrt(x.cpu().double().square().mean() + EPS)

    def head_map(self, layer: int) -> Tensor:
        """Return (H, D, C): how each head's result is written into the stream."""
        weight = cast(Block, self.model.blocks[layer]).attn.c_proj.weight  # (C, H * D)
        return weight.T.reshape(self.n_head, self.head_dim, -1)


def dissect(model: Any) -> GPTBody:
    """Return the body of a model.

    Raises:
        ConfigError: it is of a kind that no probe knows.
    """
    if isinstance(model, GPT):
        return GPTBody(model)
    raise ConfigError(f"{type(model).__name__} cannot be looked into; open a model of ours with open_model.")
