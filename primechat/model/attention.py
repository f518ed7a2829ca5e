"""Causal attention: which tokens each token may read, and which kernel computes the result.

Every token reads itself and the tokens before it, within a window, and only its own document where several
documents share a row. `attention_weights` is the formula. `attend` gives the same result without returning
the weights, with the fastest kernel available: FlashAttention-3 on Hopper GPUs, blocks of plain matrix
products in training on a CPU, torch's SDPA elsewhere.
Reference: Vaswani et al. 2017, section 3.2; Dao et al. 2022.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from primechat.model import fast_cpu, flash3

Rows = int | Tensor  # one number for all rows of a batch, or one per row, (B,)


@dataclass(frozen=True)
class Documents:
    """The document of each token in packed rows, (B, T), and its position there, from 0, (B, T)."""

    ids: Tensor
    places: Tensor

    @classmethod
    def find(cls, tokens: Tensor, bos_id: int) -> Documents:
        """Return the documents of rows (B, T), each of which begins with `bos_id`.

        A row may start in the middle of a document; its positions then count from the start of the row.
        """
        starts = tokens == bos_id
        place = torch.arange(tokens.size(1), device=tokens.device)
        last_start = (place * starts).cummax(1).values
        return cls(ids=starts.cumsum(1), places=place - last_start)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None = None,
    n_before: Rows = 0,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Return, for each query, the sum of the values it reads, weighted by softmax(scale * q @ k^T).

    Args:
        q: queries (B, T, H, D).
        k: keys (B, S, K, D); query head h reads key head h // (H / K).
        v: values (B, S, K, D).
        scale: factor on the scores.
        window: number of earlier tokens that a token reads, besides itself; None is all.
        n_before: number of keys before the first query (from a cache); query t is at position n_before + t.
        document_ids: (B, T); a token reads only tokens with its own number. None is all.

    Returns:
        (B, T, H, D) in q's dtype.
    """
    T, S = q.size(1), k.size(1)
    if window is not None and window >= S - 1:
        window = None  # it covers every key

    if isinstance(n_before, int) and n_before == 0:
        return attend_whole(q, k, v, scale, window, document_ids)
    assert document_ids is None, "packed documents are never read with a cache"

    # Where all rows are equally long, omit the keys outside every query's window.
    if window is not None and isinstance(n_before, int):
        first = max(0, n_before - window)
        k, v, n_before = k[:, first:], v[:, first:], n_before - first

    # A single query in rows of one length reads every remaining key and needs no mask.
    mask = None
    if T > 1 or not isinstance(n_before, int):
        mask = may_read(T, k.size(1), window, n_before, device=q.device)
    return run_sdpa(q.to(k.dtype), k, v, scale, mask).to(q.dtype)


def attend_whole(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    document_ids: Tensor | None,
) -> Tensor:
    """Return what `attend` returns where the text begins with the first query, as in training or a prompt."""
    # FlashAttention-3, where it runs.
    if document_ids is None and flash3.flash3_runs(q.device.type, q.dtype):
        # The window is the number of tokens to the left and to the right; -1 is all.
        reach = (-1, 0) if window is None else (window, 0)
        run = flash3.load_flash3().flash_attn_func
        result: Tensor = run(q, k, v, softmax_scale=scale, causal=True, window_size=reach)
        return result

    # Blocks of plain products, in training on a CPU.
    groups = q.size(2) // k.size(2)
    k, v = repeat_heads(k, groups), repeat_heads(v, groups)
    if q.is_cpu and q.requires_grad and q.size(1) <= fast_cpu.LONGEST_BLOCKWISE:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
        blocks: Tensor = fast_cpu.BlockAttention.apply(q, k, v, scale, window, document_ids)
        return blocks.transpose(1, 2)

    # torch's own attention; without a window or documents it needs no mask.
    if window is None and document_ids is None:
        return run_sdpa(q, k, v, scale, mask=None, is_causal=True)
    mask = may_read(q.size(1), k.size(1), window, 0, document_ids, device=q.device)
    return run_sdpa(q, k, v, scale, mask)


def run_sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, is_causal: bool = False
) -> Tensor:
    """Return torch's SDPA of queries (B, T, H, D) with keys and values (B, S, K, D)."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q.size(2) != k.size(2),
    )
    return out.transpose(1, 2)


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    window: int | None = None,
    n_before: Rows = 0,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Return the weight of each key for each query, float32 (B, H, T, S); each row sums to 1.

    This is the formula behind `attend`, with the same arguments: attend(...) = attention_weights(...) @ v.
    """
    k = repeat_heads(k, q.size(2) // k.size(2))
    scores = torch.einsum("bthd,bshd->bhts", q.float(), k.float()) * scale
    mask = may_read(q.size(1), k.size(1), window, n_before, document_ids, device=q.device)
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)


def may_read(
    n_query: int,
    n_key: int,
    window: int | None,
    n_before: Rows = 0,
    document_ids: Tensor | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return which keys each query may read, bool (T, S), or (B, 1, T, S) if the rows differ.

    The arguments are those of `attend`; with document_ids, queries and keys must be the same tokens.
    """
    # How far each key is before each query.
    places = torch.arange(n_query, device=device)
    if isinstance(n_before, Tensor):
        places = n_before[:, None, None] + places  # (B, 1, T)
    else:
        places = n_before + places  # (T,)
    distance = places[..., None] - torch.arange(n_key, device=device)

    mask = distance >= 0  # no token reads a later one
    if window is not None:
        mask = mask & (distance <= window)
    if document_ids is not None:
        same = document_ids[:, :, None] == document_ids[:, None, :]  # (B, T, T)
        mask = mask & same[:, None]
    return mask


def repeat_heads(x: Tensor, groups: int) -> Tensor:
    """Return x (B, S, K, D) with each head repeated `groups` times, once per query head that reads it."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=2)


def describe_attention(device_type: str, dtype: torch.dtype) -> str:
    """Return a short description of the attention kernel used in training."""
    if flash3.flash3_runs(device_type, dtype):
        return "FlashAttention-3"
    if device_type == "cpu":
        return "block by block, as plain matrix products"
    if device_type == "cuda" and flash3.problems:
        return f"torch's own, because FlashAttention-3 did not load ({flash3.problems[0]})"
    return "torch's own"
