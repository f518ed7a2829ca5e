"""Losses that never hold the whole (B*T, V) matrix of logits.

Hides: the chunks. The logits are computed a chunk of rows at a time, with loss and gradients in one pass.
Reference: Wijmans et al. 2024 (the idea of cut cross-entropy); nanochat (softcap: logits = c * tanh(z / c)).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 8 * 2**20  # float32 logits at a time on a CPU, few enough to stay in its cache
CHUNK_BYTES_GPU = 512 * 2**20


def chunk_rows(n_rows: int, vocab: int, device_type: str) -> int:
    """Return the number of rows of logits to hold at a time."""
    budget = CHUNK_BYTES if device_type == "cpu" else CHUNK_BYTES_GPU
    return max(1, min(n_rows, budget // (4 * vocab)))


def cap_logits(z: Tensor, cap: float) -> Tensor:
    """Return c * tanh(z / c) in float32; c = 0 leaves z unchanged."""
    z = z.float()
    return cap * torch.tanh(z / cap) if cap else z


class HeadLoss(torch.autograd.Function):
    """Summed cross-entropy, in nats, of a head with softcap; the forward pass computes the gradients too."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, targets: Tensor, cap: float, vocab: int
    ) -> Tensor:
        # h is (N, C), weight (P, C) with P >= vocab rows, targets (N,). A frozen head needs no dw.
        w = weight[:vocab].to(h.dtype)
        total = torch.zeros((), dtype=torch.float32, device=h.device)
        need_h, need_w = ctx.needs_input_grad[:2]
        dh = torch.empty_like(h) if need_h or need_w else None
        dw = torch.zeros_like(weight, dtype=torch.float32) if need_w else None
        step = chunk_rows(len(h), vocab, h.device.type)
        for x, y, i in zip(h.split(step), targets.split(step), range(0, len(h), step), strict=True):
            # The logits of a chunk.
            z = (x @ w.mT).float()  # (n, V)
            keep = (y >= 0).to(torch.float32)
            rows = torch.arange(len(y), device=h.device)
            at = (rows, y.clamp(min=0))

            # Its loss, and e = exp(logit), up to a factor per row.
            if cap:
                z.mul_(1 / cap).tanh_()
                e = (z * cap).exp_()  # |c * tanh| <= c: no maximum needs to be subtracted
                z_y = z[at]
                sums = e.sum(dim=-1)
                total += ((sums.log() - cap * z_y) * keep).sum()
                slope_y = 1 - z_y * z_y
            else:
                top = z.amax(dim=-1, keepdim=True)
                z_y = z[at] - top[:, 0]
                e = z.sub_(top).exp_()
                sums = e.sum(dim=-1)
                total += ((sums.log() - z_y) * keep).sum()
            if dh is None:
                continue

            # d loss / d z = (softmax - onehot) * slope of the cap. The division of each row by its sum
            # is applied to the smaller factor of each product below.
            e[at] -= sums
            if cap:
                e_y = e[at] * slope_y
                e.addcmul_(e, z.square_(), value=-1)
                e[at] = e_y
            scale = (keep / sums)[:, None]
            g = e.to(h.dtype)
            dh[i : i + len(y)] = (g @ w) * scale.to(h.dtype)
            if dw is None:
                continue
            dw[:vocab].addmm_(g.mT, (x * scale).to(h.dtype)) if h.dtype == torch.float32 else dw[
                :vocab
            ].add_(g.mT @ (x * scale).to(h.dtype))
        if dh is not None:
            ctx.save_for_backward(dh, dw)
            ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dh, dw = ctx.saved_tensors
        (g,) = grads
        moved = None if dw is None else (dw * g).to(ctx.weight_dtype)
        return dh * g.to(dh.dtype), moved, None, None, None


def sum_cross_entropy(h: Tensor, weight: Tensor, targets: Tensor, cap: float, vocab: int) -> Tensor:
    """Return the summed cross-entropy in nats.

    Args:
        h: normalised final states (..., C).
        weight: head (P, C); rows from `vocab` on are padding.
        targets: (...) int64; -1 is ignored.
        cap: the softcap c, 0 for none.
        vocab: number of rows that are not padding.

    Returns:
        A float32 scalar.
    """
    total: Tensor = HeadLoss.apply(
        h.reshape(-1, h.size(-1)), weight, targets.reshape(-1), cap, vocab
    )
    return total


def token_cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, cap: float, vocab: int
) -> Tensor:
    """Return the cross-entropy of each token in nats, 0 where ignored; arguments as for `sum_cross_entropy`.

    With gradients enabled, the backward pass recomputes each chunk of logits instead of keeping it.
    """

    def score(x: Tensor, y: Tensor) -> Tensor:
        z = cap_logits(F.linear(x, weight[:vocab].to(x.dtype)), cap)
        return F.cross_entropy(z, y, ignore_index=-1, reduction="none")

    flat, y = h.reshape(-1, h.size(-1)), targets.reshape(-1)
    step = chunk_rows(len(flat), vocab, h.device.type)
    pairs = zip(flat.split(step), y.split(step), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([score(a, b) for a, b in pairs]).view(targets.shape)
    parts = [torch.utils.checkpoint.checkpoint(score, a, b, use_reentrant=False) for a, b in pairs]
    return torch.cat(parts).view(targets.shape)


# ---- divergences between the distributions of a student and a teacher


def diverge(log_q: Tensor, log_p: Tensor, kind: str = "forward", beta: float = 0.5) -> Tensor:
    """Return the divergence of a student's distribution q from a teacher's p, in nats.

    Args:
        log_q: (n, V) float32 log-probabilities of the student.
        log_p: (n, V) float32 log-probabilities of the teacher.
        kind: "forward" is KL(p, q), where q must cover everything that p covers; "reverse" is KL(q, p), where
            q must avoid what p avoids; "jsd" is the generalised Jensen-Shannon divergence.
        beta: for jsd, the teacher's share of the mixture m.

    Returns:
        (n,), at least 0.

    Source: Hinton et al. 2015 (forward); Gu et al. 2024, MiniLLM (reverse); Agarwal et al. 2024, GKD,
        equation 3: beta KL(p, m) + (1 - beta) KL(q, m) with m = beta p + (1 - beta) q.
    """
    if kind == "forward":
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    if kind == "reverse":
        return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    shares = torch.tensor([beta, 1 - beta], device=log_q.device).log()
    log_m = torch.logaddexp(log_p + shares[0], log_q + shares[1])
    of_p = F.kl_div(log_m, log_p, reduction="none", log_target=True).sum(-1)
    of_q = F.kl_div(log_m, log_q, reduction="none", log_target=True).sum(-1)
    return beta * of_p + (1 - beta) * of_q


def bucket_top(log_p: Tensor, ids: Tensor) -> Tensor:
    """Return the log-probabilities of some tokens and, in a last bucket, of all other tokens together.

    Args:
        log_p: (n, V) log-probabilities.
        ids: (n, k), the tokens to keep separate.

    Returns:
        (n, k + 1), again a distribution. Without the last bucket the k tokens would have to be scaled up to
        1, which would teach the student that nothing else can follow.
    """
    top = log_p.gather(-1, ids)
    rest = log_p.scatter(-1, ids, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([top, rest.clamp(min=-30.0)], dim=-1)
