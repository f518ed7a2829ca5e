"""The formulas of gpt.py and attention.py in forms that are faster on a CPU; tests compare the two.

A small model on a CPU is limited by memory traffic and by the number of calls, so these forms read each
number fewer times: a norm in two passes, one product for queries, keys and values, attention over blocks of
queries that skips the keys after each block, and a decoding step for one token per row without the work that
longer texts need (`run_layers`, also used on a GPU, where it saves kernel launches).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from primechat.config.model import NORM_EPS
from primechat.model.kv_cache import KVCache

QUERY_BLOCK = 128  # queries computed together; measured at 256 to 1,024 tokens
LONGEST_BLOCKWISE = 1024  # beyond this, the weights of all blocks would take more memory than SDPA
MANY_ROWS = 16  # rows from which `map_rows` transposes; measured at widths 256 and 1280
EPS_TENSOR = torch.tensor(NORM_EPS, device="cpu")


# ---- the norm and the projections, in training and inference


def norm(x: Tensor) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) over the last dimension; the fast form is for float32 on a CPU."""
    if not x.is_cpu or x.dtype != torch.float32:
        return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    mean_square = torch.addcmul(EPS_TENSOR, length, length, value=1 / x.size(-1))
    return x * mean_square.rsqrt()


def project(u: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return u (..., C) mapped by each weight (N_i, C), computed as one product with all weights."""
    together = F.linear(u, torch.cat(list(weights)).to(u.dtype))
    return together.split([len(weight) for weight in weights], dim=-1)


# ---- attention in training


class BlockAttention(torch.autograd.Function):
    """Causal attention as plain matrix products over blocks of queries.

    The weights are kept for the backward pass, where SDPA would recompute them. Keys after a block of
    queries, or before its window, are never read. Arguments and result are as for `attention.attend`, except
    that q, k and v are (B, H, T, D), all with H heads.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        document_ids: Tensor | None,
    ) -> Tensor:
        B, H, T, D = q.shape
        q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
        out = torch.empty_like(v)
        kept = []

        for start in range(0, T, QUERY_BLOCK):
            queries, keys = find_block(start, T, window)
            bias = block_bias(queries, keys, window, q.dtype)
            scores = torch.baddbmm(bias, q[:, queries], k[:, keys].mT, alpha=scale)
            if document_ids is not None:
                other = document_ids[:, None, queries, None] != document_ids[:, None, None, keys]
                scores.view(B, H, *scores.shape[1:]).masked_fill_(other, float("-inf"))
            weights = torch.softmax(scores, dim=-1)
            out[:, queries] = torch.bmm(weights, v[:, keys])
            kept.append(weights)

        ctx.save_for_backward(q, k, v, *kept)
        ctx.window, ctx.scale, ctx.shape = window, scale, (B, H, T, D)
        return out.view(B, H, T, D)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        B, H, T, D = ctx.shape
        d_out = grads[0].reshape(B * H, T, D)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)

        for start, weights in zip(range(0, T, QUERY_BLOCK), kept, strict=True):
            queries, keys = find_block(start, T, ctx.window)
            # out = weights @ v
            d_weights = torch.bmm(d_out[:, queries], v[:, keys].mT)
            dv[:, keys].baddbmm_(weights.mT, d_out[:, queries])
            # weights = softmax(scale * q @ k^T)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            dq[:, queries] = torch.bmm(d_scores, k[:, keys]).mul_(ctx.scale)
            dk[:, keys].baddbmm_(d_scores.mT, q[:, queries], alpha=ctx.scale)

        return *(x.view(B, H, T, D) for x in (dq, dk, dv)), None, None, None


def find_block(start: int, n_tokens: int, window: int | None) -> tuple[slice, slice]:
    """Return the queries of a block and the keys that any of them may read, as slices."""
    stop = min(start + QUERY_BLOCK, n_tokens)
    first = 0 if window is None else max(0, start - window)
    return slice(start, stop), slice(first, stop)


def block_bias(queries: slice, keys: slice, window: int | None, dtype: torch.dtype) -> Tensor:
    """Return the bias on a block's scores: 0 where a query may read a key, -inf where it may not."""
    distance = torch.arange(queries.start, queries.stop)[:, None] - torch.arange(
        keys.start, keys.stop
    )
    hidden = distance < 0 if window is None else (distance < 0) | (distance > window)
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))


# ---- decoding one token per row


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One block's weights and scalars, including what adapters add to them.

    qkv (H*D + 2*K*D, C) maps to queries, keys and values. proj (H*D, C) is the output map of attention; fc
    (4C, C) and out (4C, C) are the two maps of the MLP. keep and again are the residual scalars; keep is None
    if the model has none. table (V, K*D) and gate (K, n) belong to a value embedding.
    """

    layer: int
    n_head: int
    n_kv_head: int
    scale: float
    window: int | None
    qkv: Tensor
    proj: Tensor
    fc: Tensor
    out: Tensor
    keep: float | None = None
    again: float = 0.0
    table: Tensor | None = None
    gate: Tensor | None = None


class TokenStep:
    """The positions of one new token per row and the keys it reads, computed once for all layers.

    Args:
        lengths: number of tokens that each row holds.
        device: where the index tensors are made.

    `place` is the position of the new tokens: one number if all rows are equally long, else (B,).
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.shortest, self.longest = min(lengths), max(lengths)
        self.place: Tensor | int = self.longest
        self.biases: dict[int | None, Tensor] = {}
        if self.shortest < self.longest:
            self.place = torch.tensor(lengths, device=device)
            self.rows = torch.arange(len(lengths), device=device)

    def find_keys(self, window: int | None, n_kv_head: int) -> tuple[slice, Tensor | None]:
        """Return the keys that any row reads, and the bias on their scores.

        The bias (B * K, 1, S) is 0, or -inf where a row may not read a key; it is None if every row reads all
        of these keys.
        """
        # The range of keys: from the start of the shortest row's window to the longest row's new token.
        if window is not None and self.longest <= window:
            window = None
        first = 0 if window is None else max(0, self.shortest - window)
        keys = slice(first, self.longest + 1)
        if isinstance(self.place, int):
            return keys, None

        # Rows of different lengths need a bias, which all layers with the same window share.
        if window not in self.biases:
            at = torch.arange(first, self.longest + 1, device=self.place.device)
            distance = self.place[:, None, None] - at  # (B, 1, S)
            hidden = distance < 0 if window is None else (distance < 0) | (distance > window)
            bias = torch.zeros(hidden.shape, device=at.device).masked_fill_(hidden, float("-inf"))
            self.biases[window] = bias.repeat_interleave(n_kv_head, 0)
        return keys, self.biases[window]


def run_layers(
    x: Tensor,
    ids: Tensor,
    layers: Sequence[LayerWeights],
    rotary: tuple[Tensor, Tensor],
    cache: KVCache,
) -> tuple[Tensor, Tensor]:
    """Return the residual streams after the blocks, for one new token per row, and store its keys and values.

    Args:
        x: the first residual stream (B, C).
        ids: the tokens (B,).
        layers: the weights of each block.
        rotary: cos and sin of their positions, (B, 1, D), or (1, D) for one position.
        cache: the tokens that the rows have read, at least one each.

    Returns:
        The stream after the last layer, and the stream after layer n_layer // 2, (B, C) each.
    """
    step = TokenStep(cache.lengths, x.device)
    first = middle = x
    for weights in layers:
        if weights.keep is not None:
            x = torch.add(x * weights.keep, first, alpha=weights.again)
        x = run_layer(x, ids, weights, rotary, cache, step)
        if weights.layer == len(layers) // 2:
            middle = x
    return x, middle


def run_layer(
    x: Tensor,
    ids: Tensor,
    weights: LayerWeights,
    rotary: tuple[Tensor, Tensor],
    cache: KVCache,
    step: TokenStep,
) -> Tensor:
    """Return the residual stream (B, C) after one block, for one token per row."""
    # Queries, keys and values of all heads, in one product.
    u = norm(x)
    B, H, K = x.size(0), weights.n_head, weights.n_kv_head
    heads = F.linear(u, weights.qkv).view(B, H + 2 * K, -1)  # (B, H + 2K, D)
    qk, v = heads[:, : H + K], heads[:, H + K :]

    # The gated value embedding.
    if weights.table is not None and weights.gate is not None:
        gate = torch.sigmoid(F.linear(u[:, : weights.gate.size(1)], weights.gate))  # (B, K)
        added = F.embedding(ids, weights.table).view_as(v)
        v = torch.addcmul(v, gate.unsqueeze(-1), added, value=3)

    # Rotate queries and keys together, then normalise them.
    cos, sin = rotary
    swapped = torch.roll(qk, qk.size(-1) // 2, -1)
    qk = norm(torch.addcmul(qk * cos, swapped, sin))
    q, k = qk[:, :H], qk[:, H:]

    # Attention, then MLP; each adds to the stream.
    store_token(k, v, weights.layer, cache, step)
    out = attend_token(q, weights, cache, step)  # (B, H, D)
    x = torch.addmm(x, out.reshape(B, -1), weights.proj)
    hidden = map_rows(norm(x), weights.fc).relu_().square_()
    return torch.addmm(x, hidden, weights.out)


def store_token(k: Tensor, v: Tensor, layer: int, cache: KVCache, step: TokenStep) -> None:
    """Write the keys and values of one token per row, (B, K, D), after the tokens that the cache holds."""
    keys, values = cache.keys[layer], cache.values[layer]  # (B, K, S, D)
    if isinstance(step.place, int):
        keys[:, :, step.place] = k
        values[:, :, step.place] = v
    else:
        keys[step.rows, :, step.place] = k.to(keys.dtype)
        values[step.rows, :, step.place] = v.to(values.dtype)


def attend_token(q: Tensor, weights: LayerWeights, cache: KVCache, step: TokenStep) -> Tensor:
    """Return the attention output (B, H, D) of one query per row, q (B, H, D), over the cache."""
    B, H, D = q.shape
    K = weights.n_kv_head
    keys, bias = step.find_keys(weights.window, K)
    k = cache.keys[weights.layer][:, :, keys]  # (B, K, S, D)
    v = cache.values[weights.layer][:, :, keys]

    # With several rows on a CPU, plain products take 0.6 to 0.8 of SDPA's time.
    if B > 1 and k.is_cpu:
        queries = q.to(k.dtype).reshape(B * K, H // K, D)
        bias = k.new_zeros(1, 1, 1) if bias is None else bias
        scores = torch.baddbmm(bias, queries, k.flatten(0, 1).mT, alpha=weights.scale)
        return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(B, H, D).to(q.dtype)

    mask = None if bias is None else bias.view(B, K, 1, -1)[:, :1].to(k.dtype)
    out = F.scaled_dot_product_attention(
        q.unsqueeze(2).to(k.dtype),
        k,
        v,
        attn_mask=mask,
        scale=weights.scale,
        enable_gqa=H != K,
    )
    return out.squeeze(2).to(q.dtype)


def map_rows(x: Tensor, weight: Tensor) -> Tensor:
    """Return x (B, C) @ weight (N, C).T.

    For many float32 rows on a CPU the transposed product is a sixth faster.
    """
    many = x.size(0) >= MANY_ROWS and x.is_cpu and x.dtype == torch.float32
    return (weight @ x.T).T if many else F.linear(x, weight)
