"""The faster forms for a CPU against the plain formulas, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from primechat.config.model import NORM_EPS
from primechat.model import fast_cpu
from primechat.model.attention import attend, attention_weights


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])  # where eps counts, and where it does not
def test_norm(scale: float) -> None:
    x = (draw(3, 5, 32) * scale).requires_grad_()
    exact = x.detach().double().requires_grad_()
    ours, plain = fast_cpu.norm(x), F.rms_norm(exact, (32,), eps=NORM_EPS)
    assert (ours - plain).abs().max() < 1e-5
    weights = draw(3, 5, 32, seed=1)
    (ours * weights).sum().backward()
    (plain * weights).sum().backward()
    assert x.grad is not None and exact.grad is not None
    assert (x.grad - exact.grad).abs().max() < 1e-5 * exact.grad.abs().max()


def test_project() -> None:
    u = draw(2, 7, 16)
    weights = [draw(n, 16, seed=n) for n in (16, 8, 8)]
    for one, weight in zip(fast_cpu.project(u, weights), weights, strict=True):
        assert (one - F.linear(u, weight)).abs().max() < 1e-5


@pytest.mark.parametrize("window", [None, 3, 150])
def test_blocks_keep_documents_apart(window: int | None) -> None:
    """Blocks of queries with documents in a row, some of which cross a block's border."""
    T = fast_cpu.QUERY_BLOCK + 72
    q, k, v = (draw(2, T, h, 8, seed=h).requires_grad_() for h in (4, 2, 2))
    document_ids = (torch.arange(T) // torch.tensor([[50], [97]])).long()
    shape = dict(scale=0.4, window=window, document_ids=document_ids)
    ours = attend(q, k, v, **shape)  # type: ignore[arg-type]
    weights = attention_weights(q, k, **shape)  # type: ignore[arg-type]
    plain = torch.einsum("bhts,bshd->bthd", weights, v.repeat_interleave(2, dim=2))
    assert (ours - plain).abs().max() < 1e-5

    factors = draw(*ours.shape, seed=9)
    found = torch.autograd.grad((ours * factors).sum(), (q, k, v))
    wanted = torch.autograd.grad((plain * factors).sum(), (q, k, v))
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() < 1e-4


def test_wide_products_of_many_rows() -> None:
    weight = draw(24, 16)
    for n_rows in (fast_cpu.MANY_ROWS - 1, fast_cpu.MANY_ROWS):
        x = draw(n_rows, 16, seed=n_rows)
        assert (fast_cpu.map_rows(x, weight) - F.linear(x, weight)).abs().max() < 1e-5
