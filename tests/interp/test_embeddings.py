"""Embeddings: tables and facts of tokens, maps and how far they lie, UMAP in a child without torch."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from primechat.checkpoint.checkpoint import save_snapshot
from primechat.checkpoint.registry import open_model
from primechat.errors import ConfigError
from primechat.interp.embeddings import maps, tables
from primechat.interp.embeddings.atlas import TextAtlas, TimeAtlas, TokenAtlas
from primechat.interp.hooks import capture
from primechat.text.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
from primechat.views.widgets.atlas import AtlasView


@pytest.fixture(scope="module")
def shipped() -> tuple:
    return open_model("shipped/base")


def blobs(n: int = 60, width: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return three bundles of directions, of varying lengths, and which bundle each row is of."""
    rng = np.random.default_rng(seed)
    middle = np.linalg.qr(rng.normal(size=(width, 3)))[0].T
    own = np.repeat(np.arange(3), n // 3)
    x = (middle[own] + 0.08 * rng.normal(size=(n, width))) * rng.uniform(1, 4, size=(n, 1))
    return x.astype(np.float32), own


# ---- maps


def test_basis_is_pcas() -> None:
    x = np.random.default_rng(1).normal(size=(200, 8)) * [9, 5, 3, 1, 1, 1, 1, 1] + 7
    basis = maps.fit_basis(x)
    _, sizes, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    np.testing.assert_allclose(basis.share, sizes[:3] ** 2 / (sizes**2).sum(), rtol=1e-4)
    places = basis.project(x)
    np.testing.assert_allclose(places.var(0) / x.var(0).sum(), basis.share, rtol=1e-3)
    again = maps.fit_basis(x)
    assert np.array_equal(again.axes, basis.axes), "one basis for one cloud"
    # a push along the first axis is seen as just that
    moved = basis.project(x + 2 * basis.axes[:, 0]) - places
    np.testing.assert_allclose(moved, np.tile([2, 0, 0], (200, 1)), atol=1e-4)


def test_neighbours_go_by_direction_or_distance() -> None:
    x = np.array([[1, 0], [9, 0.5], [0, 1], [-1, 0], [1.2, 0.9]])
    near, cosines = maps.find_near(x, 0, 3)
    assert near.tolist() == [1, 4, 2] and cosines[0] == pytest.approx(9 / np.hypot(9, 0.5))
    near, far = maps.find_near(x, 0, 3, straight=True)
    assert near.tolist() == [4, 2, 3] and far[0] == pytest.approx(np.hypot(0.2, 0.9))
    assert len(maps.find_near(x, 0, 99)[0]) == 4


def test_overlap_knows_good_maps_from_bad() -> None:
    rng = np.random.default_rng(2)
    angle = rng.uniform(0, 2 * np.pi, 400)
    circle = np.stack([np.cos(angle), np.sin(angle)], 1)
    x = (circle @ rng.normal(size=(2, 2)) @ np.linalg.qr(rng.normal(size=(9, 2)))[0].T) * 3
    unit = maps.scale_rows(x)
    kept, chance = maps.measure_neighbour_overlap(unit, maps.fit_basis(unit, 2).project(unit), k=10)
    assert kept > 0.9 and chance == pytest.approx(10 / 399)
    lost, _ = maps.measure_neighbour_overlap(unit, rng.normal(size=(400, 2)), k=10)
    assert lost < 4 * chance
    # against the plain definition
    places = rng.normal(size=(400, 2))
    plain = [
        len({*maps.find_near(unit, i, 10)[0]} & {*maps.find_near(places, i, 10, straight=True)[0]})
        for i in range(400)
    ]
    assert maps.measure_neighbour_overlap(unit, places, k=10)[0] == pytest.approx(
        np.mean(plain) / 10
    )


def test_clusters_find_bundles() -> None:
    x, own = blobs()
    found = maps.cluster_rows(x, 3)
    assert all(len(set(found[own == j])) == 1 for j in range(3)) and len(set(found)) == 3
    sizes = np.bincount(maps.cluster_rows(np.vstack([x, x[:20]]), 3))
    assert list(sizes) == sorted(sizes, reverse=True)


def test_isotropy_of_known_clouds() -> None:
    rng = np.random.default_rng(3)
    even = maps.measure_isotropy(rng.normal(size=(3000, 16)))
    assert abs(even.cosine) < 0.01 and even.n_axes > 15 and even.width == 16
    leaning = maps.measure_isotropy(rng.normal(size=(3000, 16)) + 3)
    assert leaning.cosine > 0.8 and abs(leaning.cosine_centered) < 0.01
    flat = rng.normal(size=(3000, 16)) * ([1, 1] + [0.001] * 14)
    assert maps.measure_isotropy(flat).n_axes == pytest.approx(2, abs=0.1)


def test_rank_correlation_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats", reason="SciPy comes with the extra labs")
    rng = np.random.default_rng(4)
    a, b = rng.integers(0, 9, 200), rng.normal(size=200)
    for y in (b, a + b, -(a.astype(float) ** 3)):
        assert maps.rank_correlation(a, y) == pytest.approx(stats.spearmanr(a, y)[0])


def test_bad_vectors_get_a_sentence() -> None:
    with pytest.raises(ConfigError, match="give more points"):
        maps.fit_basis(np.zeros((2, 4)))
    with pytest.raises(ConfigError, match="1 rows are not finite"):
        maps.cluster_rows(np.array([[1.0, 2], [np.nan, 1], [1, 1]]))


# ---- UMAP


WATCH = """
import runpy, sys
runpy.run_module("primechat.interp.embeddings.umap_child", run_name="__main__")
assert "torch" not in sys.modules and "umap" in sys.modules
"""


@pytest.mark.slow
def test_umap_keeps_bundles_and_never_imports_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "watched_child.py").write_text(WATCH)  # one that fails leaves PCA
    monkeypatch.setattr(maps, "CHILD", "watched_child")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    x, own = blobs(90)
    job = maps.UmapJob(x, 2)
    assert job.poll() is None and job.expected_s > 0
    picture = job.wait(300)
    assert picture.method == "UMAP" and picture.places.shape == (90, 2) and not job.folder.exists()
    near = [maps.find_near(picture.places, i, 5, straight=True)[0] for i in range(90)]
    assert np.mean([own[n] == own[i] for i, n in enumerate(near)]) > 0.95


def test_umap_is_given_every_column_at_length_one() -> None:
    rng = np.random.default_rng(6)
    x = (rng.normal(size=(80, 64)) * rng.uniform(0.5, 40, size=(80, 1))).astype(np.float32)
    job = maps.UmapJob(x, 2)
    given = np.load(job.folder / "vectors.npy")
    job.stop()
    assert given.shape == x.shape, "no column is left out"
    np.testing.assert_allclose(np.linalg.norm(given, axis=1), 1, atol=1e-5)
    for row in (0, 40, 79):
        np.testing.assert_array_equal(maps.find_near(given, row)[0], maps.find_near(x, row)[0])


def test_umap_that_dies_leaves_pca(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = blobs()
    job = maps.UmapJob(x, 2)
    os.kill(job.child.pid, signal.SIGKILL)
    picture = job.wait(30)
    assert (
        picture.method == "PCA"
        and "exit code -9" in picture.note
        and picture.note.endswith("PCA's.")
    )
    np.testing.assert_allclose(picture.places, maps.fit_basis(x, 2).project(x), atol=1e-5)
    stopped = maps.UmapJob(x, 3).stop()
    assert (
        stopped.method == "PCA"
        and "it was stopped" in stopped.note
        and stopped.places.shape[1] == 3
    )
    monkeypatch.setattr(maps, "CHILD", "primechat.interp.embeddings.nothing")
    failed = maps.UmapJob(x).wait(60)
    assert failed.method == "PCA" and "No module named" in failed.note


# ---- tables


def test_tables_are_the_models(shipped: tuple) -> None:
    model, tokenizer, _ = shipped
    names = tables.list_tables(model)
    assert set(names) == {"input", "output", *(f"value.{i}" for i in model.value_embeds)}
    ids = tokenizer.encode(" a good day")
    seen = capture(model, ids, points=("token", "final", "logits"))
    rows = maps.scale_rows(tables.read_table(model, "input")[ids])
    np.testing.assert_allclose(maps.scale_rows(seen["token"]), rows, atol=1e-5)
    scores = seen["final"] @ tables.read_table(model, "output").T
    cap = model.config.logit_softcap
    np.testing.assert_allclose(cap * np.tanh(scores / cap), seen["logits"], atol=2e-3)
    with pytest.raises(ConfigError, match="table='keys' must be one of input, output"):
        tables.read_table(model, "keys")
    with pytest.raises(ConfigError, match="open one with open_model"):
        tables.list_tables(torch.nn.Linear(2, 2))


def test_kinds_and_names() -> None:
    words = [" good", "ing", " 12", "7", " ,", "\n", " ", "é", "’"]
    ranks = {bytes([i]): i for i in range(256)} | {
        w.encode(): 256 + i for i, w in enumerate(w for w in words if len(w.encode()) > 1)
    }
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    tokenizer = Tokenizer(SPLIT_PATTERN, ranks, specials)
    kinds = [tables.KINDS[k] for k in tables.sort_kinds(tokenizer)]

    def kind(text: str) -> str:
        return kinds[ranks[text.encode()]]

    assert [kind(w) for w in words] == [
        "begins a word",
        "inside a word",
        "digits",
        "digits",
        "signs and spaces",
        "signs and spaces",
        "signs and spaces",
        "inside a word",
        "signs and spaces",
    ]
    assert kinds[0xE2] == kinds[0] == "bytes" and kinds[-1] == "special"
    name = [tables.name_token(tokenizer, i) for i in range(tokenizer.vocab_size)]
    assert (
        name[ranks[b" good"]] == "·good"
        and name[10] == "↵"
        and name[0xE2] == "E2"
        and name[0] == "\\x00"
    )


def test_counts_are_those_of_the_text(shipped: tuple, tmp_path: Path) -> None:
    _, tokenizer, _ = shipped
    path = tmp_path / "some.jsonl"
    path.write_text("".join(f'{{"text": "day {i} day"}}\n' for i in range(40)))
    counts = tables.count_tokens(tokenizer, str(path), step=1)
    want = np.zeros(tokenizer.vocab_size, dtype=int)
    for i in range(38):  # the last 5 % are held out
        for token in tokenizer.encode(f"day {i} day"):
            want[token] += 1
    assert (
        np.array_equal(counts, want) and tables.count_tokens(tokenizer, str(path), step=1) is counts
    )


def test_analogies_see_steps_and_controls_do_not() -> None:
    rng = np.random.default_rng(6)
    words = [f" {a}{b}" for a in "bcdfghjk" for b in ("an", "od", "im")]
    both = words + [w + "s" for w in words]
    ranks = {bytes([i]): i for i in range(256)} | {w.encode(): 256 + i for i, w in enumerate(both)}
    tokenizer = Tokenizer(
        SPLIT_PATTERN, ranks, {n: len(ranks) + i for i, n in enumerate(SPECIAL_TOKENS)}
    )
    table = rng.normal(size=(tokenizer.vocab_size, 64)).astype(np.float32)
    rows = np.array([ranks[w.encode()] for w in words])
    step = rng.normal(size=64)
    table[rows + len(words)] = table[rows] + 1.5 * step
    table[: len(words)] = table[rows] + 0.1 * rng.normal(
        size=(len(words), 64)
    )  # nearer than the answers
    assert len(tables.find_pairs(tokenizer, "plural")) == len(words)
    score = tables.score_analogies(tokenizer, table, "plural")
    assert score is not None and score.n == 24 * 23
    assert score.offset > 0.9 and score.near == 0 and score.shuffled < 0.1
    real, near = tables.answer_analogy(table, rows[0], rows[0] + 24, rows[5])
    assert real[0][0] == rows[5] + 24 and len(near) == 5 and rows[5] not in [i for i, _ in near]
    noise = rng.normal(size=table.shape)
    blind = tables.score_analogies(tokenizer, noise, "plural")
    assert blind is not None and blind.offset < 0.2, "where there is nothing, nothing is found"
    assert tables.score_analogies(tokenizer, table, "-ing") is None


def test_states_agree_with_a_plain_pass(shipped: tuple) -> None:
    model, tokenizer, _ = shipped
    ids = tokenizer.encode("Hello, how are you?")
    names, states = tables.read_states(model, ids)
    assert (
        names[0] == "embed" and names[-1] == "last" and states.shape[:2] == (len(names), len(ids))
    )
    h = model.hidden(torch.tensor([ids]))[0].numpy()
    np.testing.assert_allclose(maps.scale_rows(h), states[-1], atol=1e-5)


# ---- atlases


def test_token_atlas(shipped: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, _ = shipped
    counts = np.arange(tokenizer.vocab_size)
    late = TokenAtlas(model, tokenizer)
    first = late.show("input")
    assert [c.key for c in first.channels] == ["kind", "norm", "cluster"] and not late.is_whole
    monkeypatch.setattr(tables, "count_tokens", lambda tokenizer: counts)
    late.complete()
    atlas = TokenAtlas(model, tokenizer, counts)
    then, want = late.show("input"), atlas.show("input")
    assert late.is_whole and np.array_equal(then.places, first.places)
    assert [(c.key, c.names) for c in then.channels] == [(c.key, c.names) for c in want.channels]
    cloud = atlas.show("output")
    assert (
        cloud.places.shape == (1, tokenizer.vocab_size, 3)
        and len(cloud.labels) == tokenizer.vocab_size
    )
    assert [c.key for c in cloud.channels] == ["kind", "frequency", "norm", "cluster"]
    near = atlas.near("output", "PCA", 2, 0, 300)
    assert near.true == tuple(maps.find_near(tables.read_table(model, "output"), 300)[0])
    assert near.drawn == tuple(maps.find_near(cloud.places[0, :, :2], 300, straight=True)[0])
    assert atlas.show("output", "PCA", 3).kept[0] > cloud.kept[0] > cloud.chance
    with pytest.raises(ConfigError, match="is not laid out yet"):
        atlas.show("output", "UMAP")
    with pytest.raises(ConfigError, match="space='x' must be one of input"):
        atlas.show("x")
    picture = maps.Picture(places=cloud.places[0, :, :2], method="UMAP")
    assert (
        atlas.keep("output", 2, picture).method == "UMAP"
        and atlas.show("output", "UMAP").kept == cloud.kept
    )


def test_text_atlas(shipped: tuple) -> None:
    model, tokenizer, _ = shipped
    atlas = TextAtlas(model, tokenizer)
    with pytest.raises(ConfigError, match="must have five"):
        atlas.read("a")
    atlas.read("My sister has a small dog. My sister has a big cat.")
    cloud = atlas.show("states")
    twice = [i for i, label in enumerate(cloud.labels) if label == "·sister"]
    apart = [np.linalg.norm(frame[twice[0]] - frame[twice[1]]) for frame in atlas.fetch("states")]
    assert len(cloud.frames) == model.config.n_layer + 2 and apart[-1] > apart[0]
    surprise = next(c for c in cloud.channels if c.key == "surprise").values
    ids = [
        tokenizer.bos_id,
        *tokenizer.encode("My sister has a small dog. My sister has a big cat."),
    ]
    loss = model.loss(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]), reduction="none")[0]
    np.testing.assert_allclose(surprise[1:], loss.numpy(), atol=1e-4)


def test_time_atlas_has_one_basis(shipped: tuple, base_dir: Path) -> None:
    model, tokenizer, meta = shipped
    run = base_dir / "base_checkpoints" / "t"
    tokenizer.save(run / "tokenizer")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for step, share in ((0, 0.0), (8, 0.5), (64, 1.0)):
        mixed = dict(state)
        noise = torch.randn(state["transformer.wte.weight"].shape, generator=generator)
        mixed["transformer.wte.weight"] = (
            share * state["transformer.wte.weight"] + (1 - share) * noise
        )
        save_snapshot(run, step, mixed, model.config, {"tokenizer_identity": tokenizer.identity})
    with pytest.raises(ConfigError, match="give two or more"):
        TimeAtlas(["base/t@snap:0"])
    atlas = TimeAtlas(
        [f"base/t@snap:{step}" for step in (0, 8, 64)], np.arange(tokenizer.vocab_size)
    )
    cloud = atlas.show("input")
    assert cloud.frames == ("0", "8", "64") and cloud.places.shape == (3, tokenizer.vocab_size, 3)
    basis = maps.fit_basis(atlas.fetch("input")[-1])
    for places, vectors in zip(cloud.places, atlas.fetch("input"), strict=True):
        np.testing.assert_allclose(places, basis.project(vectors), atol=1e-5)
    assert cloud.shown[-1] > cloud.shown[0] and cloud.kept[-1] > cloud.kept[0]
    # a table that did not move stands still
    still = atlas.show("output").places
    assert np.array_equal(still[0], still[2])
    with pytest.raises(ConfigError, match="UMAP cannot show 3 frames"):
        atlas.start("input")


# ---- the widget


class Job:
    """A picture that takes two looks."""

    elapsed_s, expected_s = 1.0, 2.0

    def __init__(self, picture: maps.Picture) -> None:
        self.picture, self.looks = picture, 0

    def poll(self) -> maps.Picture | None:
        self.looks += 1
        return self.picture if self.looks > 1 else None

    def stop(self) -> maps.Picture:
        return maps.Picture(places=self.picture.places, method="PCA", note="it was stopped")


def test_view_sends_what_the_source_says(shipped: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, _ = shipped
    atlas = TokenAtlas(model, tokenizer, np.arange(tokenizer.vocab_size))
    view = AtlasView(atlas, picked=300)
    near = atlas.near("input", "PCA", 2, 0, 300)
    assert (
        view.picked == 300
        and view.nearby["true"] == near.true
        and view.nearby["key"] == "300,0,input,PCA,2"
    )
    places = np.frombuffer(view.places, dtype="<f4").reshape(1, -1, 3)
    assert np.array_equal(places, atlas.show("input").places)
    facts = np.frombuffer(view.facts, dtype="<f4").reshape(4, -1)
    assert (
        np.array_equal(facts[1], np.arange(tokenizer.vocab_size))
        and view.cloud["channels"][1]["whole"]
    )
    view.answer_show("output", "PCA", 3)
    assert (view.space, view.n_axes, view.cloud["kept"]) == (
        "output",
        3,
        [*atlas.show("output", "PCA", 3).kept],
    )
    view.chosen = [5, 300]
    rows = view.selected()
    assert (
        rows["id"] == [5, 300] and rows["frequency"] == [5, 300] and rows["kind"][0] in tables.KINDS
    )

    picture = maps.Picture(places=atlas.show("output").places[0, :, :2], method="UMAP")
    monkeypatch.setattr(atlas, "start", lambda space, n_axes: Job(picture))
    assert view.answer_lay_out("start") == {"running": True, "elapsed_s": 1.0, "expected_s": 2.0}
    assert view.laying_out and view.answer_lay_out("poll") == {"running": False}
    assert (view.method, view.n_axes, view.laying_out) == ("UMAP", 2, False)
    view.answer_show("input", "UMAP", 2)
    assert view.method == "PCA", "the other table has no such picture yet"
    view.answer_lay_out("start")
    view.answer_lay_out("stop")
    assert view.method == "PCA" and view.cloud["note"] == "it was stopped" and view.job is None
    view.answer_show("output", "UMAP", 2)
    assert view.method == "UMAP", "kept"

    other = TextAtlas(model, tokenizer)
    other.read("My sister has a small dog.")
    view.take_source(other)
    assert view.space == "states" and view.chosen == [] and view.picked == -1
    with pytest.raises(ConfigError, match="write more"):
        view.answer_read("a")
