"""Distillation: the loss is its formula, the control is plain training, retention is what it says."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import VOCAB_SIZE, byte_tokenizer
from torch import Tensor

from primechat.checkpoint import registry
from primechat.cli.report import ReportFlags, run_report
from primechat.config import (
    DistillConfig,
    EvalConfig,
    GPTConfig,
    PretrainConfig,
    RuntimeConfig,
    TokenizerConfig,
)
from primechat.config.model import SHARES, STUDENTS, shrink_model
from primechat.errors import CheckpointError, ConfigError
from primechat.metrics.retention import judge_writing, measure_retention, name_kind, write_texts
from primechat.model.gpt import GPT
from primechat.model.losses import bucket_top, diverge
from primechat.stages.distill import OwnBatches, distill, open_teacher_cache
from primechat.stages.pretrain import pretrain
from primechat.stages.tokenizer import train_tokenizer
from primechat.train.distill import DistillLoss, Mix, TeacherCache, make_projector, mark_own

SHAPE = replace(
    GPTConfig.modern(3, vocab_size=300, sequence_len=32, head_dim=16),
    n_embd=32,
    n_head=2,
    n_kv_head=2,
)
SMALL = replace(SHAPE, n_layer=1, n_embd=24, n_head=1, n_kv_head=1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_model(shape: GPTConfig, seed: int, train: bool = False) -> GPT:
    model = GPT(shape)
    model.init_weights(generator(seed))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator(seed + 1)), alpha=0.2)
    return model if train else model.requires_grad_(False).eval()


IDS = torch.randint(0, 300, (3, 20), generator=generator(5))
WORDS_THERE = torch.rand(3, 20, generator=generator(7)) < 0.7
TARGETS = torch.where(WORDS_THERE, torch.randint(0, 300, (3, 20), generator=generator(6)), -1)


def draw(seed: int, n: int = 5, V: int = 11) -> Tensor:
    return torch.log_softmax(2 * torch.randn(n, V, generator=generator(seed)).double(), -1)


def test_divergences_are_their_formulas() -> None:
    log_q, log_p = draw(1), draw(2)
    q, p = log_q.exp(), log_p.exp()
    assert torch.allclose(diverge(log_q, log_p), (p * (log_p - log_q)).sum(-1))
    assert torch.allclose(diverge(log_q, log_p, "reverse"), (q * (log_q - log_p)).sum(-1))
    m = 0.3 * p + 0.7 * q
    by_hand = 0.3 * (p * (log_p - m.log())).sum(-1) + 0.7 * (q * (log_q - m.log())).sum(-1)
    assert torch.allclose(diverge(log_q, log_p, "jsd", 0.3), by_hand, atol=1e-7)
    half = diverge(log_q, log_p, "jsd", 0.5)
    assert (
        torch.allclose(half, diverge(log_p, log_q, "jsd", 0.5), atol=1e-7)
        and (half < math.log(2)).all()
    )
    for kind in ("forward", "reverse", "jsd"):
        assert (
            diverge(log_p, log_p, kind).abs().max() < 1e-7
            and (diverge(log_q, log_p, kind) > 0).all()
        )


def test_tail_bucket_is_a_distribution() -> None:
    log_q, log_p = draw(1), draw(2)
    ids = log_p.topk(3, -1).indices
    q, p = bucket_top(log_q, ids), bucket_top(log_p, ids)
    assert torch.allclose(q.exp().sum(-1), torch.ones(5).double()) and p.shape == (5, 4)
    assert (diverge(q, p) <= diverge(log_q, log_p) + 1e-9).all()  # merging tokens loses information
    renormalised = [torch.log_softmax(x.gather(-1, ids), -1) for x in (log_q, log_p)]
    assert not torch.allclose(diverge(*renormalised), diverge(q, p), atol=1e-3)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_loss_is_the_formula(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("primechat.train.distill.chunk_rows", lambda *_: 7)  # several chunks
    student, teacher = make_model(SMALL, 1, train=True), make_model(SHAPE, 2)
    mix = Mix(alpha=0.3, temperature=2.5, kind=kind, beta=0.4)
    loss = DistillLoss(student, teacher, mix)(IDS, TARGETS)
    loss.backward()
    got = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    z, t = student(IDS).double(), teacher(IDS).double()
    keep = TARGETS >= 0
    ce = F.cross_entropy(z[keep], TARGETS[keep], reduction="sum")
    far = diverge(
        torch.log_softmax(z[keep] / 2.5, -1), torch.log_softmax(t[keep] / 2.5, -1), kind, 0.4
    ).sum()
    plain = 0.3 * ce + 0.7 * 2.5**2 * far
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    plain.backward()
    grads = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    noise = 1e-6 * max(float(grad.abs().max()) for grad in grads.values())  # of sums that come to 0
    for name, grad in grads.items():
        assert torch.allclose(got[name], grad, atol=1e-3 * float(grad.abs().max()) + noise), name


@pytest.mark.parametrize("kept", [False, True], ids=["asked", "cached"])
def test_neighbours_kept_apart(kept: bool, tmp_path: Path) -> None:
    """Two texts in one row cost what they cost in rows of their own, for student and teacher."""
    student, teacher = make_model(SMALL, 1, train=True), make_model(SHAPE, 2)
    texts = [torch.cat([torch.tensor([299]), row[:9] % 299]) for row in IDS[:2]]
    mix = Mix(alpha=0.3, top_k=20 if kept else 0)

    def score(rows: list[Tensor], bos_id: int) -> float:
        name = f"{len(rows)}{bos_id}"
        cache = TeacherCache(tmp_path / name, 20, len(rows[0]) - 1) if kept else None
        loss, ids = DistillLoss(student, teacher, mix, cache, bos_id), torch.stack(rows)
        targets = torch.where(ids[:, 1:] == 299, -1, ids[:, 1:])
        return float(loss(ids[:, :-1], targets).detach())

    apart = score(texts, -1)
    assert score([torch.cat(texts)], 299) == pytest.approx(apart, rel=1e-4)
    assert abs(score([torch.cat(texts)], -1) / apart - 1) > 1e-3


def test_control_is_plain_training() -> None:
    student = make_model(SMALL, 1, train=True)
    loss = DistillLoss(student, make_model(SHAPE, 2), Mix(alpha=1.0))(IDS, TARGETS)
    assert loss.item() == pytest.approx(student.loss(IDS, TARGETS, "sum").item(), rel=1e-5)
    same = make_model(SHAPE, 2)
    copy = make_model(SHAPE, 2, train=True)
    assert DistillLoss(copy, same, Mix(alpha=0.0))(IDS, TARGETS).item() == pytest.approx(
        0, abs=1e-3
    )


def test_own_words_learn_from_the_teacher_alone() -> None:
    student, teacher = make_model(SMALL, 1, train=True), make_model(SHAPE, 2)
    own = mark_own(TARGETS, 300)
    assert (own[TARGETS >= 0] >= 300).all() and (own[TARGETS < 0] == -1).all()
    a = DistillLoss(student, teacher, Mix(alpha=0.5))(IDS, own)
    b = DistillLoss(student, teacher, Mix(alpha=0.0))(IDS, TARGETS)
    assert a.item() == pytest.approx(b.item(), rel=1e-5)


def plain_divergence(q: np.ndarray, p: np.ndarray, kind: str, beta: float) -> float:
    """How far a student's q is from a teacher's p, from the definitions."""
    if kind == "forward":
        return float((p * np.log(p / q)).sum())
    if kind == "reverse":
        return float((q * np.log(q / p)).sum())
    m = beta * p + (1 - beta) * q
    return float(beta * (p * np.log(p / m)).sum() + (1 - beta) * (q * np.log(q / m)).sum())


def plain_loss(z: np.ndarray, t: np.ndarray, goals: list[int], mix: Mix, top: bool) -> float:
    """The distillation loss of logits (n, V), in float64, a place at a time."""
    total, V, T = 0.0, z.shape[1], mix.temperature
    for place, goal in enumerate(goals):
        if goal < 0:
            continue  # not learned from

        def soften(logits: np.ndarray, temperature: float) -> np.ndarray:
            e = np.exp((logits - logits.max()) / temperature)
            return e / e.sum()

        q, p = soften(z[place], T), soften(t[place], T)
        if top:  # the teacher's likeliest by themselves, the rest in one bucket
            best = np.argsort(-p)[: mix.top_k]
            q, p = (np.append(d[best], 1 - d[best].sum()) for d in (q, p))
        far = T * T * plain_divergence(q, p, mix.kind, mix.beta)
        own = goal >= V  # the student's own word: the teacher alone judges it
        word = -math.log(soften(z[place], 1.0)[goal % V])
        total += far if own else mix.alpha * word + (1 - mix.alpha) * far
    return total


@pytest.mark.parametrize("top", [False, True], ids=["whole", "top"])
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_masks_against_plain_float64(kind: str, top: bool, tmp_path: Path) -> None:
    """Text, the student's own words and what does not count, side by side; the first and the last token of
    the vocabulary stand on both sides of the border between text and own words.
    """
    student, teacher = make_model(SMALL, 1, train=True), make_model(SHAPE, 2)
    targets = TARGETS.clone()
    targets[0, :8] = torch.tensor([0, 299, 300, 599, -1, 7, 307, -1])
    targets[1] = mark_own(TARGETS[1], 300)
    mix = Mix(alpha=0.3, temperature=1.7, kind=kind, beta=0.4, top_k=25 if top else 0)
    cache = TeacherCache(tmp_path, 25, 20) if top else None
    got = DistillLoss(student, teacher, mix, cache)(IDS, targets).item()
    z, t = (m(IDS).detach().double().numpy().reshape(60, 300) for m in (student, teacher))
    goals = targets.flatten().tolist()
    # a file keeps the teacher's log-probabilities in 16 bit
    assert got == pytest.approx(plain_loss(z, t, goals, mix, top), rel=5e-3 if top else 1e-6)
    for place in (
        0,
        1,
        2,
        3,
        4,
    ):  # each of the first five alone, so that none hides behind the others
        alone = torch.full_like(targets, -1)
        alone[0, place] = targets[0, place]
        got = DistillLoss(student, teacher, mix, cache)(IDS, alone).item()
        want = plain_loss(z, t, alone.flatten().tolist(), mix, top)
        assert got == pytest.approx(want, rel=5e-3 if top else 1e-5, abs=1e-7), goals[place]


def test_own_words_cost_nothing_without_a_teacher() -> None:
    """The control, alpha 1, learns from the text alone: own words, token 0 too, are no text."""
    student, teacher = make_model(SMALL, 1, train=True), make_model(SHAPE, 2)
    loss = DistillLoss(student, teacher, Mix(alpha=1.0))
    text, own = torch.full((2, 3, 20), -1)
    text[0, 0], own[1, :3] = 0, torch.tensor([300, 450, 599])
    assert loss(IDS, own).item() == 0.0
    both = torch.where(own >= 0, own, text)
    assert loss(IDS, both).item() == pytest.approx(loss(IDS, text).item(), rel=1e-6) != 0


def test_hidden_term_needs_a_projector() -> None:
    student, teacher = make_model(SMALL, 1, train=True), make_model(SHAPE, 2)
    student.add_module("projector", make_projector(24, 32, 0))
    with_it = DistillLoss(student, teacher, Mix(hidden=2.0))(IDS, TARGETS)
    without = DistillLoss(student, teacher, Mix())(IDS, TARGETS)
    keep = TARGETS >= 0
    near = F.cosine_similarity(
        student.projector(student.hidden(IDS)[keep]), teacher.hidden(IDS)[keep], dim=-1
    )
    assert (with_it - without).item() == pytest.approx(2 * (1 - near).sum().item(), rel=1e-4)
    with_it.backward()
    assert student.projector.weight.grad.abs().sum() > 0


def test_teacher_on_disk(tmp_path: Path) -> None:
    """All tokens kept give the teacher's loss; few give the bucketed one; the second pass asks nobody."""
    student, teacher = make_model(SMALL, 1, train=True), make_model(SHAPE, 2)
    whole = DistillLoss(student, teacher, Mix())(IDS, TARGETS)
    for k, rel in ((299, 1e-2), (8, 0.9)):
        mix = Mix(top_k=k)
        cache = TeacherCache(tmp_path / str(k), k, 20)
        first = DistillLoss(student, teacher, mix, cache)(IDS, TARGETS)
        assert (
            first.item() == pytest.approx(whole.item(), rel=rel)
            and cache.misses == 3
            and not cache.hits
        )
        again = TeacherCache(tmp_path / str(k), k, 20)
        second = DistillLoss(student, None, mix, again)(IDS[[2, 0, 1]], TARGETS[[2, 0, 1]])  # type: ignore[arg-type]
        assert second.item() == pytest.approx(first.item(), rel=1e-3) and again.hits == 3
    with (tmp_path / "8" / "logprobs.bin").open("r+b") as file:
        file.truncate(20 * 8 * 2 * 2 + 5)  # a write that was cut off
    torn = TeacherCache(tmp_path / "8", 8, 20)
    assert len(torn.places) == 2 and torn.find(IDS) is None and torn.find(IDS[:2]) is not None


def test_a_teacher_is_known_by_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tag that was trained anew, and a model with an adapter, are other teachers than before."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    config = DistillConfig(top_k=4)
    asked = [(1, "base/d4@9"), (2, "base/d4@9"), (1, "lora:a*0.5+base/d4@9"), (1, "base/d4@9")]
    caches = [open_teacher_cache(config, make_model(SHAPE, seed), name, 20) for seed, name in asked]
    places = [cache.paths[0].parent for cache in caches if cache]
    assert len(set(places)) == 3 and places[0] == places[3]


def test_two_runs_share_what_the_teacher_said(tmp_path: Path) -> None:
    """Ranks, or runs side by side, write into one file: each row stays with its own tokens."""
    caches = [TeacherCache(tmp_path, 2, 3) for _ in range(2)]
    rows = torch.arange(12).view(4, 3)
    tokens = rows[..., None] * 10 + torch.arange(2)
    for i in range(4):
        part = slice(i, i + 1)
        caches[i % 2].add(rows[part], tokens[part], -tokens[part].float())
    for cache in (*caches, TeacherCache(tmp_path, 2, 3)):
        cache.add(rows, tokens, -tokens.float())
        found = cache.find(rows)
        assert (
            found is not None
            and torch.equal(found[0], tokens)
            and torch.equal(found[1], -tokens.float())
        )
    assert (tmp_path / "rows.bin").stat().st_size == 4 * 16


def test_retention_of_a_teacher_is_whole() -> None:
    teacher, other = make_model(SHAPE, 2), make_model(SHAPE, 9)
    lengths = np.array([0] * 9 + [2] * 291)
    windows = [(IDS, TARGETS)]
    own = measure_retention(teacher, teacher, windows, lengths)
    assert (
        own.total.retention == 1
        and own.total.agreement == 1
        and own.total.kl_nats == pytest.approx(0)
    )
    found = measure_retention(other, teacher, windows, lengths, name_kind=lambda i: "ab"[i % 2])
    keep = (TARGETS >= 9).flatten()
    nats = F.cross_entropy(other(IDS).flatten(0, 1)[keep], TARGETS.flatten()[keep])
    assert found.total.student_bpb == pytest.approx(nats.item() / math.log(2) / 2, rel=1e-5)
    assert found.total.untrained_bpb == pytest.approx(math.log2(300) / 2)
    assert found.total.kl_nats > 0 and found.total.tokens == keep.sum()
    for groups in found.groups.values():
        assert sum(group.tokens for group in groups) == found.total.tokens and len(groups) > 1
        mean = sum(g.tokens * g.kl_nats for g in groups) / found.total.tokens
        assert mean == pytest.approx(found.total.kl_nats)
    assert name_kind("The") == "begins a word" and name_kind("...") == "punctuation"


def test_retention_where_nothing_is_scored() -> None:
    """A few windows of conversations may hold no word of the assistant."""
    model = make_model(SHAPE, 2)
    windows = [(torch.zeros(2, 8, dtype=torch.int64), torch.full((2, 8), -1))]
    found = measure_retention(model, model, windows, np.ones(300), name_kind=str)
    assert (
        found.total.tokens == 0
        and math.isnan(found.total.agreement)
        and not found.groups["frequency"]
    )


def test_writing_is_judged() -> None:
    found = judge_writing(
        ["a b a b", "a b c"]
    )  # pairs ab ba ab, ab bc: 3 of 5 differ; 1 of 3, 0 of 2 again
    assert found == {"distinct_2": pytest.approx(0.6), "repetition": pytest.approx(1 / 6)}
    tokenizer = byte_tokenizer()
    model = make_model(replace(SMALL, vocab_size=VOCAB_SIZE), 1)
    ids = torch.tensor([list(range(97, 113)), list(range(65, 81))])
    assert write_texts(None, tokenizer, [(ids, ids)]) == ["efghijklmnop", "EFGHIJKLMNOP"]
    said = write_texts(model, tokenizer, [(ids, ids)])
    assert (
        said == write_texts(model, tokenizer, [(ids, ids)])
        and len(said) == 2
        and said[0] != said[1]
    )
    other = torch.cat([ids[:, :4], ids[:, 4:].flip(1)], 1)  # what follows the beginning is not read
    assert write_texts(model, tokenizer, [(other, other)]) == said


def test_sizes() -> None:
    d20 = GPTConfig.classic(20)
    counts = {size: shrink_model(d20, size).n_params for size in STUDENTS}
    assert counts == {"100m": 98_566_144, "100m-deep": 99_876_864, "100m-flat": 98_631_680}
    for teacher in (d20, GPTConfig.modern(4, vocab_size=2048, sequence_len=256, head_dim=64)):
        sizes = [shrink_model(teacher, size) for size in SHARES]
        for share, student in zip(SHARES.values(), sizes, strict=True):
            assert student.n_params / teacher.n_params == pytest.approx(share, rel=0.25)
            assert student.vocab_size == teacher.vocab_size
            assert student.n_layer <= teacher.n_layer and student.n_embd <= teacher.n_embd
    with pytest.raises(ConfigError, match="size='tiny'"):
        shrink_model(d20, "tiny")


def test_rows_of_ones_own() -> None:
    tokenizer = byte_tokenizer()
    model = make_model(replace(SMALL, vocab_size=VOCAB_SIZE), 1, train=True)

    class Inner:
        cursor = {"epoch": 0, "position": 3}

        def __iter__(self) -> Any:
            while True:
                yield torch.arange(48).view(4, 12), torch.arange(1, 49).view(4, 12)

    ids, targets = next(OwnBatches(Inner(), model, tokenizer, 0.5, seed=1))
    mine = [i for i in range(4) if (targets[i] == -1).any()]
    assert 0 < len(mine) < 4
    for i in range(4):
        if i not in mine:
            assert torch.equal(ids[i], torch.arange(48).view(4, 12)[i])
            continue
        assert (
            torch.equal(ids[i, :3], torch.arange(48).view(4, 12)[i, :3])
            and (targets[i, :2] == -1).all()
        )
        assert torch.equal(targets[i, 2:-1] - VOCAB_SIZE, ids[i, 3:])
    again = next(OwnBatches(Inner(), model, tokenizer, 0.5, seed=1))
    assert torch.equal(again[0], ids)

    class Half(Inner):
        """The last two rows, which are a second rank's."""

        def __iter__(self) -> Any:
            while True:
                yield torch.arange(48).view(4, 12)[2:], torch.arange(1, 49).view(4, 12)[2:]

    part = next(OwnBatches(Half(), model, tokenizer, 0.5, seed=1, first_row=2))
    assert torch.equal(part[0], ids[2:]) and torch.equal(part[1], targets[2:])


# The stage

WORDS = (
    "the cat sat on a mat and ate my hat while you ran to see what we did with all that jam".split()
)
FIXED = RuntimeConfig(device="cpu", dtype="float32", threads=1, compile="off", micro_batch_rows=2)
EVAL = EvalConfig(every=4, save_every=4, tokens=256, snapshots=False, sample_every=-1)


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    path = tmp_path / "words.jsonl"
    lines = [" ".join(rng.choice(WORDS, size=60)) for _ in range(80)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    train_tokenizer(TokenizerConfig(tag="d3", corpus=str(path), vocab_size=300))
    kind: Any = dict(
        model=SHAPE, corpus=str(path), batch_tokens=128, steps=12, runtime=FIXED, eval=EVAL
    )
    pretrain(PretrainConfig(tag="d3", **kind))
    return str(path)


def read_weights(identifier: str) -> dict[str, Tensor]:
    return registry.open_model(identifier)[0].state_dict()


@pytest.mark.parametrize(
    "change",
    [{}, {"hidden": 0.5}, {"top_k": 16}, {"on_policy": 0.5}, {"alpha": 1.0, "loss": "jsd"}],
)
def test_stage_resumes_to_the_bit(corpus: str, change: dict[str, Any]) -> None:
    config = DistillConfig(
        tag="small",
        teacher="base/d3",
        corpus=corpus,
        n_layer=1,
        n_embd=24,
        n_head=1,
        batch_tokens=128,
        steps=8,
        runtime=FIXED,
        eval=EVAL,
        **change,
    )
    result = distill(config)
    assert result.identifier == "base/small" and result.n_params == SMALL.n_params
    losses = [e for e in result.events if e["kind"] == "loss"]
    assert (
        losses[-1]["val_bpb"] < losses[0]["val_bpb"]
        and losses[-1]["retention"] > losses[0]["retention"]
    )
    assert 0 <= losses[-1]["agreement"] <= 1 and losses[-1]["kl_nats"] < losses[0]["kl_nats"]
    assert all(0 < e["distinct_2"] <= 1 and 0 <= e["repetition"] < 1 for e in losses)
    whole = read_weights("base/small@8")
    assert "projector.weight" not in whole
    folder = registry.run_dir("base", "small")
    for name in ("model_000008.pt", "optim_000008_rank0.pt", "meta_000008.json"):
        (folder / name).unlink()
    assert distill(replace(config, resume=True)).step == 8
    for key, tensor in read_weights("base/small@8").items():
        assert torch.equal(tensor, whole[key]), key


def test_stage_refuses_and_goes_on(corpus: str, tmp_path: Path) -> None:
    config = DistillConfig(
        tag="sized",
        teacher="base/d3",
        corpus=corpus,
        size="half",
        batch_tokens=128,
        steps=2,
        runtime=FIXED,
        eval=EVAL,
    )
    distill(config)
    more = distill(replace(config, tag="more", base="base/sized"))
    assert more.step == 2
    control = distill(
        replace(config, tag="control", alpha=1.0)
    )  # which leaves out hidden states too
    assert distill(replace(config, tag="still", alpha=1.0, hidden=0.5)).val_bpb == control.val_bpb
    with pytest.raises(ConfigError, match="must be given together"):
        distill(replace(config, tag="x", n_layer=2))
    with pytest.raises(ConfigError, match="top_k=4 must be 0"):
        DistillConfig(top_k=4, on_policy=0.5)
    with pytest.raises(ConfigError, match="top_k=301 must be at most 300"):
        distill(replace(config, tag="x", top_k=301))
    train_tokenizer(TokenizerConfig(tag="other", corpus=corpus, vocab_size=299))
    other = tmp_path / "other.jsonl"
    other.write_text(
        "".join(json.dumps({"text": f"zebra quilt {i} vex"}) + "\n" for i in range(40))
    )
    train_tokenizer(TokenizerConfig(tag="alien", corpus=str(other), vocab_size=290))
    shape = replace(SMALL, vocab_size=290)
    pretrain(
        PretrainConfig(
            tag="alien",
            model=shape,
            corpus=str(other),
            batch_tokens=128,
            steps=1,
            runtime=FIXED,
            eval=EVAL,
        )
    )
    with pytest.raises(CheckpointError, match="tokenizer"):
        distill(replace(config, tag="y", base="base/alien"))


def test_stage_on_conversations(corpus: str, tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    rng = np.random.default_rng(1)
    said = [[" ".join(rng.choice(WORDS, size=8)) for _ in range(2)] for _ in range(60)]
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in said]
    path.write_text("\n".join(map(json.dumps, rows)))
    config = DistillConfig(
        tag="talker",
        teacher="base/d3",
        dialogues=str(path),
        size="eighth",
        batch_tokens=128,
        steps=3,
        runtime=FIXED,
        eval=EVAL,
    )
    assert distill(config).identifier == "sft/talker"
    run_report(ReportFlags(model="sft/talker", output=str(tmp_path / "page")))
    assert {"kept.png", "writing.png"} <= {path.name for path in (tmp_path / "page").iterdir()}
