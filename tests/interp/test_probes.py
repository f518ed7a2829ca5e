"""Probes against the plain pass and the plain formula, on both generations of model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from primechat import capture
from primechat.checkpoint.checkpoint import load_checkpoint
from primechat.config import GPTConfig
from primechat.errors import ConfigError
from primechat.interp.anatomy import dissect
from primechat.interp.circuits import (
    READABLE,
    STREAM,
    attribute,
    list_parts,
    measure_losses,
    mix_second,
    patch_grid,
    read_lens,
    repeat_text,
    scan_ablations,
    score_heads,
    shuffle_blocks,
)
from primechat.interp.hooks import Patch, list_points
from primechat.model.attention import attend
from primechat.model.gpt import GPT
from primechat.model.lora import LoraSpec, attach

FIXTURES = Path(__file__).parents[1] / "fixtures" / "nanochat"
MODERN = replace(
    GPTConfig.modern(3, vocab_size=97, sequence_len=48, head_dim=16),
    n_embd=64,
    n_head=4,
    n_kv_head=2,
)
CONFIGS = {
    "classic": replace(GPTConfig.classic(2, vocab_size=97, sequence_len=48), n_head=4, n_kv_head=4),
    "modern": MODERN,
    "modern-deep": replace(MODERN, n_layer=4, window_pattern="S"),
    "no-cap": replace(MODERN, logit_softcap=0.0),
}
IDS = torch.randint(97, (40,), generator=torch.Generator().manual_seed(2)).tolist()


def make_model(name: str, **changes: Any) -> GPT:
    """A tiny model whose every part matters: no weight is zero, every scalar is its own."""
    model = GPT(replace(CONFIGS[name], **changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.normal_(mean=float(key == "resid_lambdas"), std=0.3, generator=generator)
    return GPT.from_state(model.config, dict(model.state_dict()))


@pytest.mark.parametrize("name", CONFIGS)
def test_reading_changes_nothing(name: str) -> None:
    model = make_model(name)
    ids = torch.tensor([IDS])
    with torch.no_grad():
        want, hidden = model(ids)[0].numpy(), model.hidden(ids)[0].numpy()
        losses = model.loss(ids[:, :-1], ids[:, 1:], "none")[0].numpy()
    seen = capture(model, IDS, points=["*"])
    assert np.array_equal(seen["logits"], want) and np.array_equal(seen.last, want[-1])
    assert np.array_equal(seen["final"], hidden)
    assert np.allclose(seen.losses, losses, atol=1e-5)
    assert list(seen.points) == list_points(dissect(model)), (
        "each point is passed, in the order listed"
    )
    nothing = capture(model, IDS, points=["logits"], ablate=(), patch=Patch(source=seen, points=()))
    same = capture(
        model, IDS, points=["logits"], patch=Patch(source=seen, points=("layer.0.resid",))
    )
    assert np.array_equal(nothing["logits"], want) and np.array_equal(same["logits"], want)


@pytest.mark.parametrize(("era", "tag"), [("oct2025", "d2"), ("head", "d2"), ("head_d3", "d3")])
def test_published_formats(era: str, tag: str) -> None:
    """On nanochat's own checkpoints: its logits, and the parts that make them."""
    loaded = load_checkpoint(FIXTURES / era / "base_checkpoints" / tag)
    model = GPT.from_state(replace(loaded.config, rope_dtype="float32"), loaded.model_state)
    expected = json.loads((FIXTURES / era / "expected.json").read_text())
    for prompt in expected["prompts"]:
        seen = capture(model, prompt["ids"], points=READABLE)
        want = np.array(prompt["logits_last_f32_rotary"])
        assert np.abs(seen.last - want).max() < 1e-4
        token, cap = int(want.argmax()), model.config.logit_softcap
        parts = attribute(model, seen, -1, token)
        assert parts.values.sum() == pytest.approx(parts.logit, abs=1e-4)
        assert cap * math.tanh(parts.values.sum() / cap) == pytest.approx(want[token], abs=2e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_and_weights(name: str) -> None:
    model = make_model(name, sequence_len=16) if name == "modern-deep" else make_model(name)
    c, T = model.config, len(IDS) * 4  # past a short window of 128
    ids = IDS * 4
    seen = capture(model, ids, points=["layer.*", "embed"])
    for i in range(c.n_layer):
        q, k, v, w, heads = (
            seen[f"layer.{i}.attn.{p}"] for p in ("q", "k", "v", "weights", "heads")
        )
        assert q.shape == (T, c.n_head, c.head_dim) and k.shape == v.shape == (
            T,
            c.n_kv_head,
            c.head_dim,
        )
        assert w.shape == (c.n_head, T, T) and np.allclose(w.sum(-1), 1, atol=1e-5)
        assert not np.triu(w, 1).any() and (w >= 0).all()
        left = c.window(i)
        if left is not None and left < T:
            assert not np.tril(w, -left - 1).any() and np.tril(w, -left).any()
        shared = np.repeat(v, c.n_head // c.n_kv_head, axis=1)
        assert np.allclose(np.einsum("hts,shd->thd", w, shared), heads, atol=1e-4)
        scale = dissect(model).scale
        batch = [torch.from_numpy(x)[None] for x in (q, k, v)]
        plain = attend(*batch, scale=scale, window=left)[0].numpy()
        assert np.array_equal(plain, heads)
        raw = seen[f"layer.{i}.attn.q_raw"]
        assert np.allclose(
            np.linalg.norm(raw[:, 0] / np.sqrt((raw[:, 0] ** 2).mean(-1, keepdims=True)), axis=-1),
            np.linalg.norm(q[:, 0], axis=-1),
            rtol=1e-3,
        ), "rotation keeps the length, the norm makes it sqrt(D)"
    assert seen.stack("attn.weights").shape == (c.n_layer, c.n_head, T, T)


@pytest.mark.parametrize("name", CONFIGS)
def test_ablation_is_a_zeroed_matrix(name: str) -> None:
    """A head switched off equals a model whose output matrix has zeros where the head writes."""
    model = make_model(name)
    c, layer, head = model.config, model.config.n_layer - 1, 2
    got = capture(model, IDS, points=["logits"], ablate=[f"layer.{layer}.head.{head}"])["logits"]
    state = {key: p.clone() for key, p in model.state_dict().items()}
    columns = slice(head * c.head_dim, (head + 1) * c.head_dim)
    state[f"transformer.h.{layer}.attn.c_proj.weight"][:, columns] = 0
    cut = capture(GPT.from_state(c, state), IDS, points=["logits"])["logits"]
    whole = capture(model, IDS, points=["logits"])["logits"]
    assert np.allclose(got, cut, atol=1e-4) and np.abs(got - whole).max() > 1e-2
    for part, key in (("mlp", "mlp.c_proj"), ("attn", "attn.c_proj")):
        state = {name: p.clone() for name, p in model.state_dict().items()}
        state[f"transformer.h.0.{key}.weight"].zero_()
        cut = capture(GPT.from_state(c, state), IDS, points=["logits"])["logits"]
        got = capture(model, IDS, points=["logits"], ablate=[f"layer.0.{part}"])["logits"]
        assert np.allclose(got, cut, atol=1e-4)
    heads = [f"layer.0.head.{h}" for h in range(c.n_head)]
    assert np.array_equal(capture(model, IDS, points=["logits"], ablate=heads)["logits"], got)


@pytest.mark.parametrize("name", CONFIGS)
def test_attribution_sums_to_the_logit(name: str) -> None:
    """The parts sum to the logit before the softcap, which an independent product in float64 gives."""
    model = make_model(name)
    seen = capture(model, IDS, points=[*READABLE, "final"])
    head = model.lm_head.weight.double().numpy()
    for at in (0, 1, 17, -1):
        token = int(seen.ids[5])
        parts = attribute(model, seen, at, token)
        want = float(head[token] @ seen["final"][at].astype(np.float64))
        assert parts.values.sum() == pytest.approx(want, abs=1e-4)
        assert parts.logit == pytest.approx(want, abs=1e-4)
        assert len(parts.parts) == len(parts.values) == len(set(parts.parts))
        other = attribute(model, seen, at, token, against=3)
        want -= float(head[3] @ seen["final"][at].astype(np.float64))
        assert other.values.sum() == pytest.approx(want, abs=1e-4)
        assert sum(abs(v) > 1e-3 for v in parts.values) > len(parts.values) / 2, (
            "no part is idle here"
        )
    cap = model.config.logit_softcap
    raw = attribute(model, seen, -1, token).values.sum()
    assert seen.last[token] == pytest.approx(cap * math.tanh(raw / cap) if cap else raw, abs=1e-3)


def test_attribution_of_a_part_is_its_effect() -> None:
    """In the last layer, cutting a part before a frozen norm moves the logit by its value."""
    model = make_model("modern")
    seen = capture(model, IDS, points=[*READABLE, "layer.2.mlp.out"])
    value = dict(zip(*(lambda a: (a.parts, a.values))(attribute(model, seen, -1, 7)), strict=True))
    pull = dissect(model).readout(torch.from_numpy(seen["last"][-1]), [7]).numpy()[0]
    assert value["layer.2.mlp"] == pytest.approx(
        float(seen["layer.2.mlp.out"][-1] @ pull), abs=1e-5
    )


def test_adapters_are_seen() -> None:
    """With adapters beside its maps a logit is still the sum of the parts, and the control has none."""
    model = make_model("modern")
    plain = capture(model, IDS).last
    attach(model, "more", LoraSpec(rank=4), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for key, p in model.named_parameters():
            if ".adapter.b" in key:
                p.normal_(std=0.3, generator=torch.Generator().manual_seed(4))
    seen = capture(model, IDS, points=READABLE)
    assert not np.allclose(seen.last, plain, atol=1e-2)
    parts = attribute(model, seen, -1, 7)
    assert parts.values.sum() == pytest.approx(parts.logit, abs=1e-4)
    assert not any("adapter" in key for key in shuffle_blocks(model).state_dict())


def test_lens_ends_at_the_model() -> None:
    model = make_model("modern")
    seen = capture(model, IDS, points=[*STREAM, "logits"])
    lens = read_lens(model, seen, n_guesses=4)
    assert lens.stages == ("embed", "layer.0.resid", "layer.1.resid", "layer.2.resid", "last")
    assert lens.ids.shape == (5, 40, 4) and lens.target.shape == (5, 40)
    assert np.array_equal(lens.ids[-1, :, 0], seen["logits"].argmax(-1))
    probs = torch.from_numpy(seen["logits"]).softmax(-1).numpy()
    assert np.allclose(lens.probs[-1, :, 0], probs.max(-1), atol=1e-6)
    assert np.allclose(lens.target[-1], lens.probs[-1, :, 0]) and (lens.target[0] < 1).all()
    assert (lens.entropy >= 0).all() and lens.entropy.max() <= math.log2(97) + 1e-5


def test_patch_carries_a_state() -> None:
    model = make_model("modern")
    other = [*IDS[:5], (IDS[5] + 1) % 97, *IDS[6:]]
    clean = capture(model, IDS, points=["*"])
    full = capture(
        model, other, points=["logits"], patch=Patch(source=clean, points=("layer.2.resid",))
    )
    assert not np.array_equal(full["logits"], clean["logits"]), (
        "the middle and the embedding still differ"
    )
    stream = capture(model, other, points=["logits"], patch=Patch(source=clean, points=("last",)))
    assert np.array_equal(stream["logits"], clean["logits"])
    one = capture(
        model,
        other,
        points=["layer.*.resid"],
        patch=Patch(source=clean, points=("layer.0.head.1",), at=(9,)),
    )
    plain = capture(model, other, points=["layer.*.resid"])
    moved = np.abs(one["layer.0.resid"] - plain["layer.0.resid"]).max(-1)
    assert moved[9] > 1e-3 and not np.delete(moved, 9).any()
    with pytest.raises(ConfigError, match="must lie in both prompts"):
        capture(model, IDS[:5], patch=Patch(source=clean, points=("embed",), at=(6,)))
    with pytest.raises(ConfigError, match="was not captured"):
        capture(model, IDS, patch=Patch(source=plain, points=("embed",)))


def test_patch_grid() -> None:
    """Each cell equals a patch of that state alone; carrying all of the embedding is the clean prompt."""
    model = make_model("classic")
    other = [*IDS[:3], (IDS[3] + 1) % 97, *IDS[4:12]]
    clean = IDS[:12]
    grid, top, bottom = patch_grid(model, clean, other, 5, 9)
    assert grid.shape == (3, 12)
    seen = capture(model, clean, points=["embed", "layer.*.resid"])
    for r, point in enumerate(("embed", "layer.0.resid", "layer.1.resid")):
        for t in (3, 7, 11):
            last = capture(model, other, patch=Patch(source=seen, points=(point,), at=(t,))).last
            assert grid[r, t] == pytest.approx(float(last[5] - last[9]), abs=1e-4)
    assert grid[0, 3] == pytest.approx(top, abs=1e-4), (
        "the one token that differs, carried at the start"
    )
    assert grid[2, 11] == pytest.approx(top, abs=1e-4) and grid[0, 0] == pytest.approx(
        bottom, abs=1e-4
    )
    with pytest.raises(ConfigError, match="must be equal; reword one"):
        patch_grid(model, clean, other[:-1], 5, 9)


def test_head_scores_of_known_patterns() -> None:
    """Heads built by hand score what they do, and nothing else."""
    ids = np.array([4, 8, 6, 4, 8, 6, 4])
    n = len(ids)
    first, previous, uniform, copying = (np.zeros((n, n)) for _ in range(4))
    first[:, 0] = 1
    previous[np.arange(1, n), np.arange(n - 1)] = previous[0, 0] = 1
    uniform[:] = np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]
    copying[np.arange(3), 0] = 1
    copying[np.arange(3, n), np.arange(1, n - 2)] = 1
    got = score_heads(np.stack([first, previous, uniform, copying])[None], ids)
    assert got.first[0].tolist()[:2] == [1, 1 / 6] and got.previous[0].tolist()[:2] == [1 / 6, 1]
    assert np.allclose(got.entropy[0], [0, 0, np.log2(np.arange(2, n + 1)).mean(), 0])
    assert np.allclose(got.distance[0, :2], [3.5, 1])
    # of the last token (4, seen at 0 and 3) the places 1 and 4 count
    assert got.induction[0, 3] == 1 and np.allclose(got.induction[0, :2], [0, 0])
    assert got.induction[0, 2] == pytest.approx((1 / 4 + 1 / 5 + 1 / 6 + 2 / 7) / 4)
    assert np.isnan(score_heads(uniform[None, None, :3, :3], ids[:3]).induction).all()


def test_scan_and_controls() -> None:
    model = make_model("modern")
    found = dict(scan_ablations(model, IDS))
    assert list(found) == list_parts(dissect(model)) and len(found) == 3 * (4 + 1)
    whole = capture(model, IDS).losses.mean()
    alone = capture(model, IDS, ablate=["layer.1.head.3"]).losses.mean() - whole
    assert found["layer.1.head.3"] == pytest.approx(float(alone)) and abs(alone) > 1e-4
    control = shuffle_blocks(model)
    assert control.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    a, b = (m.state_dict()["transformer.h.1.mlp.c_fc.weight"] for m in (model, control))
    assert not torch.equal(a, b) and float(a.std()) == pytest.approx(float(b.std()), rel=0.05)
    twice = repeat_text([5, 5, 6, 7, 8], seed=1, n_tokens=3)
    assert len(twice) == 6 and len(set(twice[:3])) == 3 and np.array_equal(twice[:3], twice[3:])


def test_losses_of_many_rows_are_those_of_each() -> None:
    for model in (make_model("modern"), make_model("classic")):
        rows = np.array([IDS, IDS[::-1], np.roll(IDS, 3)])
        for cut in ((), ("layer.1.head.3", "layer.0.mlp")):
            together = measure_losses(model, rows, cut)
            alone = np.stack([capture(model, row, ablate=cut).losses for row in rows])
            np.testing.assert_allclose(together, alone, atol=1e-4)


def test_the_control_of_copying_keeps_the_words_and_loses_their_order() -> None:
    twice = repeat_text(range(20, 44), seed=3)
    mixed = mix_second(twice, 5)
    assert mixed.shape == (5, 48) and len({tuple(row) for row in mixed}) == 5
    for row in mixed:
        assert np.array_equal(row[:24], twice[:24]), "the first half is the same"
        assert sorted(row[24:]) == sorted(twice[24:]) and not np.array_equal(row, twice)
    assert np.array_equal(mix_second(twice, 5), mixed), "the same ones each time"


BAD: list[tuple[dict[str, Any], str]] = [
    (dict(ids=[]), "must be one row of 1 to"),
    (dict(ids=[1] * 481), "must be one row of 1 to 480"),
    (dict(ids=[97]), "id 97 must be in 0..96"),
    (dict(ids=[-1]), "id -1 must be"),
    (dict(ids=[1], points=["layer.0.attn.wieghts"]), "try 'layer.0.attn.weights'"),
    (dict(ids=[1], points=["layer.9.*"]), "is none of this model's"),
    (dict(ids=[1], ablate=["layer.3.mlp"]), "of 3 layers and 4 heads"),
    (dict(ids=[1], ablate=["layer.0.head.4"]), "count from 0"),
    (dict(ids=[1], ablate=["mlp"]), "must be like layer.0.head.0"),
]


@pytest.mark.parametrize(("given", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_requests(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        capture(make_model("modern"), **given)


def test_other_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="Linear cannot be looked into"):
        capture(torch.nn.Linear(2, 2), [1])
