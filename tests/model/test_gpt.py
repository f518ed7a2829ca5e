"""The model against nanochat's own numbers, and each fast path against the plain formula."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from primechat.checkpoint.checkpoint import load_checkpoint
from primechat.config import GPTConfig
from primechat.metrics.bits import measure_bits
from primechat.model.attention import Documents, attend, attention_weights, may_read
from primechat.model.fast_cpu import QUERY_BLOCK
from primechat.model.gpt import GPT
from primechat.model.losses import sum_cross_entropy, token_cross_entropy
from primechat.protocols import LanguageModel

FIXTURES = Path(__file__).parents[1] / "fixtures" / "nanochat"
RUNS = [
    ("oct2025", "d2"),
    ("oct2025", "d2-compiled"),
    ("head", "d2"),
    ("head", "d2-compiled"),
    ("head_d3", "d3"),
]
TABLES = {"bf16": ("bfloat16", 1e-3), "f32": ("float32", 1e-4)}


def open_fixture(era: str, tag: str, table: str) -> tuple[GPT, dict[str, Any]]:
    loaded = load_checkpoint(FIXTURES / era / "base_checkpoints" / tag)
    config = replace(loaded.config, rope_dtype=TABLES[table][0])
    expected = json.loads((FIXTURES / era / "expected.json").read_text())
    return GPT.from_state(config, loaded.model_state), expected


def make_gpt(**changes: Any) -> GPT:
    """A tiny modern model whose every part matters: no weight is zero."""
    base = replace(
        GPTConfig.modern(3, vocab_size=97, sequence_len=48, head_dim=16),
        n_embd=64,
        n_head=4,
        n_kv_head=2,
    )
    model = GPT(replace(base, **changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3, generator=generator)
    return model


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(("era", "tag"), RUNS)
def test_logits_fixture(era: str, tag: str, table: str) -> None:
    model, expected = open_fixture(era, tag, table)
    tolerance = TABLES[table][1]
    for prompt in expected["prompts"]:
        ids = torch.tensor([prompt["ids"]])
        with torch.no_grad():
            logits = model(ids)
        want = torch.tensor(prompt[f"logits_last_{table}_rotary"])
        assert (logits[0, -1] - want).abs().max() < tolerance
        assert logits.argmax(-1)[0].tolist() == prompt[f"argmax_all_positions_{table}_rotary"]
        cache = model.new_cache(1, len(prompt["ids"]) + 32)
        last, greedy = model.advance(ids, cache), []
        for _ in range(32):
            greedy.append(int(last.argmax()))
            last = model.advance(torch.tensor([[greedy[-1]]]), cache)
        assert greedy == prompt[f"greedy32_{table}_rotary"]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("era", ["oct2025", "head", "head_d3"])
def test_bpb_fixture(era: str, table: str) -> None:
    model, expected = open_fixture(era, "d3" if era == "head_d3" else "d2", table)
    bpb, ids = expected["bpb"], torch.tensor([expected["bpb"]["ids"]])
    lengths = torch.tensor(expected["token_bytes"]).numpy()
    for skip, name in ((0, "bpb"), (10, "bpb_first10targets_masked")):
        targets = ids[:, 1:].clone()
        targets[:, :skip] = -1
        bits = measure_bits(
            lambda x, y: model.loss(x, y, "none"), [(ids[:, :-1], targets)], lengths
        )
        assert bits.bpb == pytest.approx(bpb[f"{name}_{table}_rotary"], rel=1e-4)
    assert float(model.loss(ids[:, :-1], ids[:, 1:])) == pytest.approx(
        bpb[f"mean_loss_nats_{table}_rotary"], rel=1e-4
    )


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("pattern", ["", "SSL", "L"])
def test_cache_chunks(pattern: str, frozen: bool) -> None:
    """Chunks of any length at any position give the logits of the whole, past sequence_len and past the
    window too.
    """
    model = make_gpt(window_pattern=pattern, sequence_len=140)
    if frozen:
        model = GPT.from_state(model.config, dict(model.state_dict()))
    ids = torch.randint(97, (2, 300), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = model(ids)
    for sizes in ((300,), (1,) * 300, (7, 1, 130, 2, 100, 60), (299, 1)):
        cache, at = model.new_cache(2, 300), 0
        for size in sizes:
            last = model.advance(ids[:, at : at + size], cache)
            at += size
            assert (last - whole[:, at - 1]).abs().max() < 2e-4, (sizes, at)


def test_cache_ragged() -> None:
    """Rows of different lengths, joined, selected and repeated, each go on as they would alone."""
    model = make_gpt()
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(97, (1, n), generator=generator) for n in (5, 1, 40)]
    extra = torch.randint(97, (3, 4), generator=generator)
    caches = []
    for text in texts:
        caches.append(model.new_cache(1, text.size(1) + 4))
        model.advance(text, caches[-1])
    joined = caches[0].join(caches[1:])
    assert joined.lengths == [5, 1, 40]
    got = [model.advance(extra[:, :1], joined), model.advance(extra[:, 1:3], joined)]
    picked = joined.select([2, 0, 2])
    got.append(model.advance(extra[[2, 0, 2], 3:], picked))
    with torch.no_grad():
        for row, text in enumerate(texts):
            full = model(torch.cat([text, extra[row : row + 1]], dim=1))[0]
            assert (got[0][row] - full[text.size(1)]).abs().max() < 1e-4
            assert (got[1][row] - full[text.size(1) + 2]).abs().max() < 1e-4
        assert (got[2][0] - full[-1]).abs().max() < 1e-4
        assert torch.equal(got[2][0], got[2][2])
    assert picked.lengths == [44, 9, 44]
    kept = joined.select([0, 1, 2]).keep([2, 1])
    assert torch.equal(
        model.advance(extra[[2, 1], 3:], kept),
        model.advance(extra[[2, 1], 3:], joined.select([2, 1])),
    )


@pytest.mark.parametrize("n_rows", [3, 20])  # a few rows and many multiply otherwise
@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_tokens_of_uneven_rows(n_rows: int, n_kv_head: int) -> None:
    """Decoded together, a token a step, rows of different lengths give the logits of each whole, also where
    one row's window has begun to move and another's has not.
    """
    model = make_gpt(window_pattern="SL", sequence_len=140, n_kv_head=n_kv_head)
    model = GPT.from_state(model.config, dict(model.state_dict()))
    counts = [1 + 7 * i % 160 for i in range(n_rows)]
    ids = torch.randint(97, (n_rows, 200), generator=torch.Generator().manual_seed(5))
    cache = model.new_cache(n_rows, 200)
    with torch.no_grad():
        whole = model(ids)
    model.read_padded(ids[:, : max(counts)], counts, cache)
    rows = torch.arange(n_rows)
    for step in range(12):
        at = torch.tensor(counts) + step
        got = model.advance(ids[rows, at][:, None], cache)
        assert (got - whole[rows, at]).abs().max() < 2e-4, step


def test_cache_full() -> None:
    model = make_gpt()
    with pytest.raises(ValueError, match="7 tokens do not fit in 6 places"):
        model.advance(torch.zeros(1, 7, dtype=torch.long), model.new_cache(1, 6))
    with pytest.raises(ValueError, match="in 480 places"):
        model.hidden(torch.zeros(1, 481, dtype=torch.long))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """The formula, in float64: (B, T, H, D)."""
    T, D = q.shape[1], q.shape[3]
    k, v = (x.double().repeat_interleave(q.size(2) // k.size(2), dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q.double(), k) / math.sqrt(D)
    scores = scores.masked_fill(~may_read(T, T, window), float("-inf"))
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


@pytest.mark.parametrize("window", [None, 0, 5, QUERY_BLOCK, 200])
@pytest.mark.parametrize("length", [1, 17, QUERY_BLOCK, 300])
def test_attention_formula(window: int | None, length: int) -> None:
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, length, h, 16, generator=generator) for h in (4, 2, 2))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, scale=16**-0.5, window=window)

    def run_plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain_attention(q, k, v, window)

    assert (run(q, k, v) - run_plain(q, k, v)).abs().max() < 1e-5
    weights = attention_weights(q, k, scale=16**-0.5, window=window)
    weighed = torch.einsum("bhts,bshd->bthd", weights, v.repeat_interleave(2, dim=2))
    assert (weighed - run_plain(q, k, v)).abs().max() < 1e-5
    grads = []
    for function in (run, run_plain):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = function(*inputs)
        (out.double() * torch.arange(out.numel()).view(out.shape).cos()).sum().backward()
        grads.append([x.grad for x in inputs])
    for ours, plain in zip(*grads, strict=True):
        assert ours is not None and plain is not None and (ours - plain).abs().max() < 1e-4


@pytest.mark.parametrize("cap", [0.0, 15.0])
def test_loss_formula(cap: float) -> None:
    generator = torch.Generator().manual_seed(5)
    h, w = torch.randn(3, 700, 32, generator=generator), torch.randn(4160, 32, generator=generator)
    y = torch.randint(-1, 4096, (3, 700), generator=generator)
    y[0, :50] = -1
    hs, ws = (
        [t.clone().requires_grad_() for _ in range(2)] + [t.double().requires_grad_()]
        for t in (h, w)
    )
    z = hs[2] @ ws[2][:4096].T
    z = cap * torch.tanh(z / cap) if cap else z
    plain = torch.nn.functional.cross_entropy(
        z.flatten(0, 1), y.flatten(), ignore_index=-1, reduction="none"
    )
    plain.sum().div(7).backward()
    total = sum_cross_entropy(hs[0], ws[0], y, cap, 4096)
    (total / 7).backward()
    each = token_cross_entropy(hs[1], ws[1], y, cap, 4096)
    (each.sum() / 7).backward()
    assert float(total.detach()) == pytest.approx(float(plain.detach().sum()), rel=1e-5)
    assert (each.flatten() - plain).detach().abs().max() < 1e-4
    for i in (0, 1):
        for ours, ref in ((hs[i].grad, hs[2].grad), (ws[i].grad, ws[2].grad)):
            assert ours is not None and ref is not None
            assert (ours - ref).abs().max() < 1e-4 * ref.abs().max()


def test_loss_reductions() -> None:
    model = make_gpt()
    ids = torch.randint(97, (2, 33), generator=torch.Generator().manual_seed(6))
    x, y = ids[:, :-1], ids[:, 1:].clone()
    y[0, :9] = -1
    each = model.loss(x, y, "none")
    assert each.shape == y.shape and (each[0, :9] == 0).all()
    assert float(model.loss(x, y, "sum").detach()) == pytest.approx(
        float(each.detach().sum()), rel=1e-5
    )
    assert float(model.loss(x, y).detach()) == pytest.approx(
        float(each.detach().sum()) / 55, rel=1e-5
    )
    padded = torch.log_softmax(model(x), -1).gather(-1, y.clamp(min=0)[..., None])[..., 0].detach()
    assert (each.detach() + padded)[y >= 0].abs().max() < 1e-4


def test_bfloat16_close() -> None:
    """16-bit compute over 32-bit parameters stays near the 32-bit numbers, gradients included."""
    ids = torch.randint(97, (2, 48), generator=torch.Generator().manual_seed(7))
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_gpt()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.3)
        model.compute_dtype = dtype
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
        results.append((float(loss.detach()), grads))
    assert results[0][0] == pytest.approx(results[1][0], rel=0.02)
    assert torch.cosine_similarity(results[0][1], results[1][1], dim=0) > 0.98


@pytest.mark.parametrize("make", [GPTConfig.classic, GPTConfig.modern])
@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_parameter_count(make: Any, depth: int) -> None:
    config = make(depth, vocab_size=777, sequence_len=64)
    with torch.device("meta"):
        model = GPT(config)
    assert sum(p.numel() for p in model.parameters()) == config.n_params
    assert isinstance(model, LanguageModel)


def test_known_counts() -> None:
    assert GPTConfig.classic(20).n_params == 560_988_160
    assert GPTConfig.classic(32).n_params == 1_879_048_192
    assert GPTConfig.modern(20).n_params == 1_399_850_226
    assert GPTConfig.modern(4, vocab_size=4096, sequence_len=256, head_dim=64).n_params == 7_340_162


def test_reopened_trains() -> None:
    """A model made for decoding and then thawed learns with every weight, queries and keys included."""
    model = GPT.from_state(make_gpt().config, dict(make_gpt().state_dict())).requires_grad_(True)
    ids = torch.randint(97, (2, 33), generator=torch.Generator().manual_seed(8))
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and float(p.grad.abs().sum()) > 0, name


@pytest.mark.parametrize("kind", ["classic", "modern"])
def test_checkpointed_blocks(kind: str) -> None:
    """Computing blocks again gives the same loss and gradients, and keeps far less in between."""
    shape: GPTConfig = getattr(GPTConfig, kind)(4, vocab_size=300, sequence_len=64)
    model = GPT(shape)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.02)
    ids = torch.randint(300, (4, 64), generator=torch.Generator().manual_seed(2))
    found = []
    for spare in (False, True):
        kept: dict[int, int] = {}
        model.checkpoint_blocks = spare

        def keep(t: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = model.loss(ids, ids, "sum")
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((loss.detach(), grads, sum(kept.values())))
        model.zero_grad()
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
    weights = sum(p.nbytes for p in model.parameters())
    assert found[1][2] - weights < 0.3 * (found[0][2] - weights)


def lay_rows(*texts: list[int]) -> tuple[Tensor, Tensor]:
    """Texts end to end in one row, each led by token 0, as ids and targets."""
    stream = torch.tensor([i for text in texts for i in [0, *text]])[None]
    return stream[:, :-1], stream[:, 1:]


def draw_text(count: int, seed: int) -> list[int]:
    return torch.randint(1, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("kind", ["classic", "modern"])
@pytest.mark.parametrize("train", [False, True], ids=["sdpa", "blocks"])
def test_segments_kept_apart(kind: str, train: bool) -> None:
    """What a conversation costs does not depend on its neighbours; without segments it does.

    Every switch is on: smear, value embeddings, short windows; rows are longer than a block of queries.
    """
    model = make_gpt(sequence_len=300, window_pattern="SL")
    if kind == "classic":
        model = GPT(
            replace(GPTConfig.classic(2, vocab_size=97, sequence_len=300), n_embd=64, n_head=4)
        )
        model.init_weights(torch.Generator().manual_seed(0))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    model.requires_grad_(train)
    mine, at = draw_text(130, 0), 91

    def score(before: list[int], after: list[int], bos_id: int) -> Tensor:
        costs = model.loss(*lay_rows(before, mine, after), "none", bos_id)[0].detach()
        return costs[len(before) + 1 : len(before) + 1 + len(mine)]

    one = score(draw_text(at - 1, 1), draw_text(60, 2), 0)
    assert torch.equal(one, score(draw_text(at - 1, 3), draw_text(60, 4), 0))  # to the bit
    alone = model.loss(*lay_rows(mine), "none")[0].detach()
    for neighbour in (at - 1, 7, 0):  # wherever it stands in the row
        assert (score(draw_text(neighbour, 5), draw_text(30, 6), 0) - alone).abs().max() < 2e-4
    disturbed = score(draw_text(at - 1, 3), draw_text(60, 4), -1)
    assert (disturbed - alone).abs().max() > 0.01  # so this test can fail


def test_segments_gradients() -> None:
    """The gradients of a shared row are those of its conversations in rows of their own."""
    texts = [draw_text(n, n) for n in (50, 3, 120)]
    found = []
    for rows in ([texts], [[text] for text in texts]):
        model = make_gpt(sequence_len=300, window_pattern="SL")
        for row in rows:
            ids, targets = lay_rows(*row)
            targets = targets.masked_fill(
                targets == 0, -1
            )  # the next one's beginning is nobody's word
            model.loss(ids, targets, "sum", 0).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1])
    for packed, own in zip(*found, strict=True):
        assert (packed - own).abs().max() < 1e-3 * own.abs().max()


def test_documents_of_a_row() -> None:
    found = Documents.find(torch.tensor([[5, 6, 0, 7, 0, 0, 8]]), 0)
    assert found.ids.tolist() == [[0, 0, 1, 1, 2, 3, 3]]
    assert found.places.tolist() == [[0, 1, 0, 1, 0, 0, 1]]  # a row may begin in the middle of one
