"""Causal attention behind one call, and the cache of keys and values for decoding.

Hides: which kernel runs. FlashAttention-3 where it can (Hopper GPUs, 16-bit, the `kernels` package),
torch's SDPA elsewhere, and on a CPU in training a blockwise product of plain matrices, which is faster
there than SDPA's backward. Reference: Shah et al. 2024 (FlashAttention-3); Dao et al. 2022.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # queries handled together on a CPU: keys after the block are never touched


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (j, j + D/2) of x (B, T, H, D) by minus the angle of their position.

    The tables (.., T, 1, D) hold cos twice, and sin followed by -sin.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((b, a), dim=-1), sin)


@dataclass(frozen=True)
class Segments:
    """Conversations that share rows: none sees another, and each counts its positions from 0.

    `number` (B, T) tells them apart, `at` (B, T) is a token's position within its own.
    """

    number: Tensor
    at: Tensor

    @classmethod
    def split(cls, ids: Tensor, bos_id: int) -> Segments:
        """Return the segments of rows ids (B, T), each led by a bos; a row may begin in the middle of one."""
        starts, place = ids == bos_id, torch.arange(ids.size(1), device=ids.device)
        return cls(starts.cumsum(1), place - (place * starts).cummax(1).values)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, left: int | None, scale: float
    ) -> Tensor:
        """Do what `attend` does, within each segment."""
        return attend(q, k, v, left, scale, self.number)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: int | None = None,
    scale: float | None = None,
    number: Tensor | None = None,
) -> Tensor:
    """Attend causally from each token to itself and to at most `left` tokens before it.

    Args:
        q: queries (B, T, H, D).
        k: keys (B, T, K, D); query head n reads key head n // (H / K).
        v: values (B, T, K, D).
        left: tokens of the past that are visible; None is all.
        scale: factor on the scores; None is 1 / sqrt(D).
        number: (B, T), tokens see only those of the same number; None is all.

    Returns:
        (B, T, H, D) in q's dtype.
    """
    scale = q.size(-1) ** -0.5 if scale is None else scale
    if left is not None and left >= q.size(1) - 1:
        left = None
    if number is None and flash3_runs(q.device.type, q.dtype):
        window = (-1, 0) if left is None else (left, 0)
        return load_flash3().flash_attn_func(
            q, k, v, softmax_scale=scale, causal=True, window_size=window
        )
    groups = q.size(2) // k.size(2)
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
    if q.device.type == "cpu" and q.requires_grad and q.size(2) <= 1024:
        out: Tensor = BlockAttention.apply(q, k, v, left, scale, number)
    elif left is None and number is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        mask = make_mask(0, q.size(2), q.size(2), left, q.device)
        if number is not None:
            mask = (mask & (number[:, :, None] == number[:, None]))[:, None]  # (B, 1, T, T)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2)


def weigh(q: Tensor, k: Tensor, left: int | None, scale: float) -> Tensor:
    """Return the weights of `attend`, float32 (B, H, T, T): row t is what the token at t reads."""
    k = k.repeat_interleave(q.size(2) // k.size(2), dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q.float(), k.float()) * scale
    mask = make_mask(0, q.size(1), q.size(1), left, q.device)
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)


def make_mask(
    start: int, n_query: int, n_key: int, left: int | None, device: torch.device
) -> Tensor:
    """Return which keys 0..n_key-1 the queries start..start+n_query-1 may see, bool (n_query, n_key)."""
    queries = torch.arange(start, start + n_query, device=device)[:, None]
    distance = queries - torch.arange(n_key, device=device)
    mask = distance >= 0
    return mask if left is None else mask & (distance <= left)


def key_range(start: int, stop: int, left: int | None) -> tuple[int, int]:
    """Return the first key and one past the last key that queries start..stop-1 may see."""
    return (0 if left is None else max(0, start - left)), stop


class BlockAttention(torch.autograd.Function):
    """Attention as plain matrix products over blocks of queries; the backward pass has their weights."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        left: int | None,
        scale: float,
        number: Tensor | None,
    ) -> Tensor:
        B, H, T, D = q.shape  # of k and v too
        q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
        out, weights = torch.empty_like(v), []
        for start in range(0, T, BLOCK):
            stop = min(start + BLOCK, T)
            lo, hi = key_range(start, stop, left)
            bias = torch.zeros(stop - start, hi - lo, dtype=q.dtype)
            bias.masked_fill_(
                ~make_mask(start - lo, stop - start, hi - lo, left, q.device), float("-inf")
            )
            scores = torch.baddbmm(bias, q[:, start:stop], k[:, lo:hi].mT, alpha=scale)
            if number is not None:
                other = number[:, None, start:stop, None] != number[:, None, None, lo:hi]
                scores.view(B, H, stop - start, hi - lo).masked_fill_(other, float("-inf"))
            weights.append(torch.softmax(scores, dim=-1))
            out[:, start:stop] = torch.bmm(weights[-1], v[:, lo:hi])
        ctx.save_for_backward(q, k, v, *weights)
        ctx.left, ctx.scale, ctx.shape = left, scale, (B, H, T, D)
        return out.view(B, H, T, D)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *weights = ctx.saved_tensors
        B, H, T, D = ctx.shape
        dout = grads[0].reshape(B * H, T, D)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for start, p in zip(range(0, T, BLOCK), weights, strict=True):
            stop = min(start + BLOCK, T)
            lo, hi = key_range(start, stop, ctx.left)
            dp = torch.bmm(dout[:, start:stop], v[:, lo:hi].mT)
            dv[:, lo:hi].baddbmm_(p.mT, dout[:, start:stop])
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, start:stop] = torch.bmm(ds, k[:, lo:hi]).mul_(ctx.scale)
            dk[:, lo:hi].baddbmm_(ds.mT, q[:, start:stop], alpha=ctx.scale)
        return *(x.view(B, H, T, D) for x in (dq, dk, dv)), None, None, None


class TokenStep:
    """Where one more token a row goes, and which keys it sees: worked out once for all layers. `lengths` are
    the tokens that each row holds; `at` is the position of the next ones, (B,), or one number.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.first, self.last = min(lengths), max(lengths)
        self.at: Tensor | int = self.last
        self.biases: dict[int | None, Tensor] = {}
        if self.first < self.last:
            self.at = torch.tensor(lengths, device=device)
            self.rows = torch.arange(len(lengths), device=device)

    def see(self, left: int | None, heads: int) -> tuple[int, Tensor | None]:
        """Return the first key that any row sees, and what is added to the scores from it on, for `heads`
        rows each: 0, or -inf where one does not see, (B * heads, 1, S); None where all see all.
        """
        if left is not None and self.last <= left:
            left = None
        lo = 0 if left is None else max(0, self.first - left)
        if isinstance(self.at, int):
            return lo, None
        if left not in self.biases:
            keys, at = (
                torch.arange(lo, self.last + 1, device=self.at.device),
                self.at[:, None, None],
            )
            hidden = keys > at if left is None else (keys > at) | (keys < at - left)  # (B, 1, S)
            bias = torch.zeros(hidden.shape, device=keys.device).masked_fill_(hidden, float("-inf"))
            self.biases[left] = bias.repeat_interleave(heads, 0)
        return lo, self.biases[left]


class KVCache:
    """Keys, values and the smear's last embedding of what a GPT has read; rows may differ in length."""

    def __init__(
        self,
        n_layer: int,
        batch_size: int,
        n_kv_head: int,
        capacity: int,
        head_dim: int,
        **kind: Any,
    ) -> None:
        shape = (n_layer, batch_size, n_kv_head, capacity, head_dim)
        self.keys, self.values = torch.zeros(shape, **kind), torch.zeros(shape, **kind)
        self.lengths: list[int] = [0] * batch_size
        self.last_embed: Tensor | None = None  # (B, C), before the smear

    @property
    def capacity(self) -> int:
        """Tokens that each row can hold."""
        return self.keys.size(3)

    def select(self, rows: Sequence[int]) -> KVCache:
        """Return a cache of the given rows, in that order; a row may be named several times."""
        index = torch.tensor(rows, device=self.keys.device)
        keys, values = self.keys.index_select(1, index), self.values.index_select(1, index)
        last = None if self.last_embed is None else self.last_embed.index_select(0, index)
        return self.assemble(keys, values, [self.lengths[i] for i in rows], last)

    def keep(self, rows: Sequence[int]) -> KVCache:
        """Return this cache with the given rows only, in their places or in those of dropped ones.

        Args:
            rows: n of its rows; of these, a row i < n stands at i. Only what moves is copied.
        """
        for i, source in enumerate(rows):
            if i != source:
                n = self.lengths[source]
                self.keys[:, i, :, :n] = self.keys[:, source, :, :n]
                self.values[:, i, :, :n] = self.values[:, source, :, :n]
        last = None if self.last_embed is None else self.last_embed[list(rows)]
        kept = slice(len(rows))
        return self.assemble(
            self.keys[:, kept], self.values[:, kept], [self.lengths[i] for i in rows], last
        )

    def join(self, others: Sequence[KVCache]) -> KVCache:
        """Return one cache holding the rows of this one and of `others`, whatever their lengths."""
        caches = [self, *others]
        room = max(cache.capacity for cache in caches)
        pad = [(0, 0, 0, room - cache.capacity) for cache in caches]
        keys = torch.cat([F.pad(c.keys, p) for c, p in zip(caches, pad, strict=True)], dim=1)
        values = torch.cat([F.pad(c.values, p) for c, p in zip(caches, pad, strict=True)], dim=1)
        embeds = [c.last_embed for c in caches if c.last_embed is not None]
        last = torch.cat(embeds) if len(embeds) == len(caches) else None
        return self.assemble(keys, values, [n for c in caches for n in c.lengths], last)

    def part(self, start: int, stop: int) -> KVCache:
        """Return an empty cache whose keys and values are those of some rows of this one."""
        return self.assemble(
            self.keys[:, start:stop], self.values[:, start:stop], [0] * (stop - start), None
        )

    def adopt(self, parts: Sequence[KVCache]) -> None:
        """Take over what was read into the parts that this cache consists of."""
        self.lengths = [n for part in parts for n in part.lengths]
        embeds = [part.last_embed for part in parts if part.last_embed is not None]
        self.last_embed = torch.cat(embeds) if embeds else None

    def assemble(
        self, keys: Tensor, values: Tensor, lengths: list[int], last: Tensor | None
    ) -> KVCache:
        """Return a cache of these parts."""
        cache = KVCache.__new__(KVCache)
        cache.keys, cache.values, cache.lengths, cache.last_embed = keys, values, lengths, last
        return cache

    def attend_token(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        left: int | None,
        scale: float,
        step: TokenStep,
    ) -> Tensor:
        """Do what `attend` does for one token a row: q (B, H, D), k and v (B, K, D); return (B, H, 1, D)."""
        keys, values = self.keys[layer], self.values[layer]  # (B, K, S, D)
        B, K = k.shape[:2]
        lo, bias = step.see(left, K)
        if isinstance(step.at, int):
            keys[:, :, step.at], values[:, :, step.at] = k, v
        else:
            keys[step.rows, :, step.at], values[step.rows, :, step.at] = (
                k.to(keys.dtype),
                v.to(keys.dtype),
            )
        k, v = keys[:, :, lo : step.last + 1], values[:, :, lo : step.last + 1]
        # on a CPU, SDPA of one bfloat16 query takes 3 to 4 times as long: there the cache is float32
        if B > 1 and k.is_cpu:  # and plain products take 0.6 to 0.8 of SDPA's time
            queries = q.to(k.dtype).reshape(B * K, -1, q.size(-1))  # (B * K, H / K, D)
            bias = k.new_zeros(1, 1, 1) if bias is None else bias
            weights = torch.baddbmm(bias, queries, k.flatten(0, 1).mT, alpha=scale).softmax(-1)
            return torch.bmm(weights, v.flatten(0, 1)).view(B, -1, 1, q.size(-1)).to(q.dtype)
        mask = None if bias is None else bias.view(B, K, 1, -1)[:, :1].to(k.dtype)
        out = F.scaled_dot_product_attention(
            q.unsqueeze(2).to(k.dtype), k, v, attn_mask=mask, scale=scale, enable_gqa=q.size(1) != K
        )
        return out.to(q.dtype)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, left: int | None, scale: float
    ) -> Tensor:
        """Store k and v (B, T, K, D) behind what is there and attend from q (B, T, H, D); `lengths` stay as
        they are.

        The caller adds T to `lengths` once all layers have run.
        """
        B, T = q.shape[:2]
        keys, values = self.keys[layer], self.values[layer]  # (B, K, S, D)
        start, even = self.lengths[0], min(self.lengths) == max(self.lengths)
        mask: Tensor | None
        if even:
            lo, hi = (0 if left is None else max(0, start - left)), start + T
            keys[:, :, start:hi], values[:, :, start:hi] = k.transpose(1, 2), v.transpose(1, 2)
            if start == 0:
                return attend(q, k, v, left, scale)
            mask = make_mask(start - lo, T, hi - lo, left, q.device) if T > 1 else None
        else:
            lo, hi = 0, max(self.lengths) + T
            first = torch.tensor(self.lengths, device=q.device)[:, None]
            at = first + torch.arange(T, device=q.device)  # (B, T)
            rows = torch.arange(B, device=q.device)[:, None]
            keys[rows, :, at], values[rows, :, at] = k.to(keys.dtype), v.to(keys.dtype)
            distance = at[:, :, None] - torch.arange(hi, device=q.device)  # (B, T, S)
            mask = (distance >= 0) if left is None else (distance >= 0) & (distance <= left)
            mask = mask[:, None]
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2).to(keys.dtype),
            keys[:, :, lo:hi],
            values[:, :, lo:hi],
            attn_mask=mask,
            scale=scale,
            enable_gqa=q.size(2) != k.size(2),
        )
        return out.transpose(1, 2).to(q.dtype)


@functools.cache
def load_flash3() -> Any:
    """Return FlashAttention-3's module, or None; the reason is kept for `describe_attention`.

    Source: `flash_attn_interface` where it is installed, else the prebuilt kernel that the package
        `kernels` fetches.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return None
    try:
        return importlib.import_module("flash_attn_interface")
    except ImportError:
        pass
    try:
        return importlib.import_module("kernels").get_kernel(
            "kernels-community/flash-attn3", version=1
        )
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        flash3_problem.append(f"{type(error).__name__}: {error}")
        return None


flash3_problem: list[str] = []


def flash3_runs(device_type: str, dtype: torch.dtype) -> bool:
    """Tell whether FlashAttention-3 takes these tensors."""
    return (
        device_type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and load_flash3() is not None
    )


def describe_attention(device_type: str, dtype: torch.dtype) -> str:
    """Say in a few words which attention runs in training."""
    if flash3_runs(device_type, dtype):
        return "FlashAttention-3"
    if device_type == "cpu":
        return "block by block, as plain matrix products"
    if device_type == "cuda" and flash3_problem:
        return f"torch's own, because FlashAttention-3 did not load ({flash3_problem[0]})"
    return "torch's own"
