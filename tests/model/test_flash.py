"""FlashAttention-3's contract, on a stand-in that does what its documentation says.

The call that a Hopper GPU will get gives what SDPA gives here.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from primechat.config import GPTConfig
from primechat.model import flash3
from primechat.model.attention import attend, describe_attention
from primechat.model.flash3 import load_flash3
from primechat.model.gpt import GPT

calls: list[tuple[int, int]] = []


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """(B, T, H, D) in 16 bit; query i of Lq stands at key i + Lk - Lq; it sees `left` keys before, itself,
    and `right` after; causal sets right to 0; -1 is no limit; query head h reads key head h // (H / K).
    """
    assert q.dtype in (torch.bfloat16, torch.float16) and q.dtype == k.dtype == v.dtype
    assert q.size(2) % k.size(2) == 0 and k.shape == v.shape
    calls.append(window_size)
    scale = q.size(-1) ** -0.5 if softmax_scale is None else softmax_scale
    groups = q.size(2) // k.size(2)
    place = torch.arange(q.size(1))[:, None] + k.size(1) - q.size(1)
    behind = place - torch.arange(k.size(1))  # how far a key lies before its query
    left, right = window_size
    right = 0 if causal else right
    seen = torch.ones_like(behind, dtype=torch.bool)
    seen &= (behind <= left) if left >= 0 else seen
    seen &= (-behind <= right) if right >= 0 else seen
    scores = (
        torch.einsum("bqkgd,bskd->bkgqs", q.float().unflatten(2, (-1, groups)), k.float()) * scale
    )
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("bkgqs,bskd->bqkgd", weights, v.float()).flatten(2, 3).to(q.dtype)


@pytest.fixture
def with_flash3(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    calls.clear()
    monkeypatch.setattr(
        flash3, "load_flash3", lambda: SimpleNamespace(flash_attn_func=flash_attn_func)
    )
    monkeypatch.setattr(flash3, "flash3_runs", lambda device, dtype: dtype == torch.bfloat16)
    yield


@pytest.mark.parametrize("left", [None, 1, 7, 16, 31, 99])
@pytest.mark.parametrize("kv", [4, 2, 1])
def test_same_as_sdpa(
    with_flash3: None, monkeypatch: pytest.MonkeyPatch, left: int | None, kv: int
) -> None:
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(2, 32, 4, 16, generator=draw).bfloat16()
    k, v = (torch.randn(2, 32, kv, 16, generator=draw).bfloat16() for _ in range(2))
    fast = attend(q, k, v, scale=0.3, window=left)
    assert calls == [(-1, 0) if left is None or left >= 31 else (left, 0)]
    monkeypatch.setattr(flash3, "flash3_runs", lambda *_: False)
    plain = attend(q, k, v, scale=0.3, window=left)
    torch.testing.assert_close(fast.float(), plain.float(), rtol=0.02, atol=0.02)
    shifted = attend(q, k, v, scale=0.3, window=(left or 0) + 1)
    if left in (1, 7):
        assert float((fast.float() - shifted.float()).abs().max()) > 0.05, (
            "one token more of window shows"
        )


def test_a_model_trains_through_it(with_flash3: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sliding windows of each layer reach the call, and loss and gradients are those of SDPA."""
    shape = GPTConfig.modern(4, vocab_size=300, sequence_len=512, head_dim=64)
    model = GPT(shape)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.02)
    model.compute_dtype = torch.bfloat16
    ids = torch.randint(300, (1, 512), generator=torch.Generator().manual_seed(2))
    found = []
    for fast in (True, False):
        monkeypatch.setattr(flash3, "flash3_runs", lambda *_, fast=fast: fast)
        loss = model.loss(ids, ids)
        loss.backward()
        grad = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((float(loss.detach()), grad))
        model.zero_grad()
    assert calls == [(128, 0), (128, 0), (128, 0), (-1, 0)]
    assert found[0][0] == pytest.approx(found[1][0], rel=2e-3)
    assert torch.nn.functional.cosine_similarity(found[0][1], found[1][1], dim=0) > 0.999


def test_how_it_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """`flash_attn_interface` first, then the prebuilt kernel by version; a failure is said, not swallowed."""
    asked: list[Any] = []
    module = SimpleNamespace(flash_attn_func=flash_attn_func)

    def get_kernel(name: str, *, version: int) -> Any:
        asked.append((name, version))
        if len(asked) > 1:
            raise OSError("no such file on the Hub")
        return module

    def import_module(name: str) -> Any:
        if name == "kernels":
            return SimpleNamespace(get_kernel=get_kernel)
        raise ImportError(name)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(importlib, "import_module", import_module)
    load_flash3.cache_clear()
    assert load_flash3() is module and asked == [("kernels-community/flash-attn3", 1)]
    assert describe_attention("cuda", torch.bfloat16) == "FlashAttention-3"
    assert describe_attention("cuda", torch.float32) == "torch's own"
    load_flash3.cache_clear()
    assert load_flash3() is None
    assert "did not load (OSError: no such file on the Hub)" in describe_attention(
        "cuda", torch.bfloat16
    )
    flash3.problems.clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    load_flash3.cache_clear()
    assert load_flash3() is None and describe_attention("cuda", torch.bfloat16) == "torch's own"
    load_flash3.cache_clear()
